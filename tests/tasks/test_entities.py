"""Token classification: words and spans, tags and entities, and figures that are those of seqeval and nervaluate."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nervaluate import Evaluator
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.scheme import IOB2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from close import assert_close
from tanzaku.errors import TanzakuError
from tanzaku.tasks.data import Table
from tanzaku.tasks.task import Example
from tanzaku.tasks.tokens import Tokens, TokensSettings, _from_tags, _rows

DATA = TokensSettings(train="train.jsonl")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Two characters a token at most, with a space before a word in the word's own token."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [a + b for a in letters for b in letters]
    pieces = ["<pad>", "<s>", "<unk>", "▁", *letters, *pairs, *("▁" + a for a in letters)]
    vocabulary = {piece: at for at, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("▁", a) for a in letters] + [(a, b) for a in letters for b in letters]
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", unk_token="<unk>")


def spans_table(rows: list[tuple[str, list[Any]]]) -> dict[str, Table]:
    return {"train": Table({"text": [text for text, _ in rows], "spans": [each for _, each in rows]}, "train.jsonl")}


def words_table(rows: list[tuple[Any, Any]], name: str = "words") -> dict[str, Table]:
    return {"train": Table({name: [words for words, _ in rows], "tags": [tags for _, tags in rows]}, "train.jsonl")}


def span(start: int, end: int, label: str) -> dict[str, Any]:
    return {"start": start, "end": end, "label": label}


def told(task: Tokens, split: Any, rows: list[list[str]]) -> Any:
    """Records of a model that gives these tags to the units of each row."""
    batch = task.collate(split.examples, 0)
    logits = torch.zeros(len(rows), batch.width, len(task.tags))
    for row, (example, tags) in enumerate(zip(split.examples, rows, strict=True)):
        for (token, _, _), tag in zip(example.about, tags, strict=True):
            logits[row, token, task.tags.index(tag)] = 5.0
    return task.records(SimpleNamespace(logits=logits), batch)


# -- rows


def test_spans_are_aligned_to_tokens(tokenizer: Any) -> None:
    tables = spans_table([("to tokyo from kyoto", [span(3, 8, "city"), span(14, 19, "city")])])
    task = Tokens.learn(tables, DATA)
    assert task == Tokens(("city",)) and task.tags == ("O", "B-city", "I-city")
    split = task.encode(tables["train"], "train", tokenizer, 50, DATA)
    [example] = split.examples
    text = "to tokyo from kyoto"
    pieces = {text[first:last]: tag for (_, first, last), tag in zip(example.about, task._tagged(example), strict=True)}
    assert [piece for piece, tag in pieces.items() if tag] and set(pieces.values()) == {0, 1, 2}
    # What is tagged so is read back as the same characters, the space before a word left out.
    records = told(task, split, [[task.tags[tag] for tag in task._tagged(example)]])
    assert records["found"] == [[(3, 8, "city"), (14, 19, "city")]] == records["gold"]
    assert task.figures(records)["f1"] == 1.0


def test_words_are_tagged_at_their_first_token(tokenizer: Any) -> None:
    tables = words_table([(["abcdef", "to", "kyoto"], ["O", "O", "B-city"]), ('["kyoto"]', '["B-city"]')])
    task = Tokens.learn(tables, DATA)
    assert task == Tokens(("city",), "words", True)
    split = task.encode(tables["train"], "train", tokenizer, 50, DATA)
    example = split.examples[0]
    assert [(first, last) for _, first, last in example.about] == [(0, 1), (1, 2), (2, 3)]
    assert len(example.about) < example.length and example.weight == 3.0
    assert split.texts == ["abcdef to kyoto", "kyoto"]
    tags = task.collate(split.examples, 0).targets["tags"]
    assert (tags[0] >= 0).sum() == 3 and sorted(tags[0].unique().tolist()) == [-100, 0, 1]


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        (["B-x", "I-x", "O"], [(0, 2, "x")]),
        (["B-x", "B-x", "I-x"], [(0, 1, "x"), (1, 3, "x")]),
        (["I-x", "I-x", "O"], [(0, 2, "x")]),  # IOB1
        (["B-x", "E-x", "S-y"], [(0, 2, "x"), (2, 3, "y")]),  # BIOES
        (["B-x", "I-y", "O"], [(0, 1, "x"), (1, 2, "y")]),
        (["NOUN", "VERB", "VERB"], [(0, 1, "NOUN"), (1, 2, "VERB"), (2, 3, "VERB")]),
    ],
)
def test_schemes_of_tags(tags: list[str], entities: list[Any]) -> None:
    tables = words_table([(["a", "b", "c"], tags)])
    Tokens.learn(tables, DATA)
    assert _rows(tables["train"], DATA)[0][1] == entities


def test_cut_rows_keep_their_entities(tokenizer: Any) -> None:
    """What is cut off cannot be found, and counts as missed."""
    tables = spans_table([("kyoto to tokyo", [span(0, 5, "city"), span(9, 14, "city")])])
    task = Tokens.learn(tables, DATA)
    split = task.encode(tables["train"], "train", tokenizer, 4, DATA)
    assert split.truncated == 1 and split.examples[0].length == 4
    tagged = [task.tags[tag] for tag in task._tagged(split.examples[0])]
    assert task.figures(told(task, split, [tagged]))["recall"] == 0.5


# -- loss and figures


def test_loss_is_that_of_transformers(tokenizer: Any) -> None:
    """Its token classifiers take the mean over all tokens that have a label."""
    tables = spans_table([("to tokyo", [span(3, 8, "city")]), ("from kyoto to osaka", [span(5, 10, "city")])])
    task = Tokens.learn(tables, DATA)
    split = task.encode(tables["train"], "train", tokenizer, 50, DATA)
    batch = task.collate(split.examples, 0)
    torch.manual_seed(0)
    logits = torch.randn(2, batch.width, 3)
    expected = cross_entropy(logits.view(-1, 3), batch.targets["tags"].view(-1), ignore_index=-100)
    outputs = SimpleNamespace(logits=logits)
    weight = sum(example.weight for example in split.examples)
    assert_close(task.score(outputs, batch).sum() / weight, expected)
    records = task.records(outputs, batch)
    assert task.figures(records)["loss"] == pytest.approx(expected.item(), rel=1e-6)
    again = task.recorded(task.predictions(records), split.examples)
    assert task.figures(again) == pytest.approx(task.figures(records))


TAGS = ("O", "B-x", "I-x", "B-y", "I-y")
sentence = st.integers(1, 7).flatmap(
    lambda n: st.tuples(*[st.lists(st.sampled_from(TAGS), min_size=n, max_size=n) for _ in range(2)])
)


@settings(deadline=None, max_examples=100)
@given(st.lists(sentence, min_size=1, max_size=5), st.integers(0, 2**31))
def test_figures_are_those_of_seqeval_and_nervaluate(rows: list[tuple[list[str], list[str]]], seed: int) -> None:
    task = Tokens(("x", "y"), "words", True)
    # Gold tags are strict IOB2: an entity begins with B.
    gold, said = [], []
    for true, found in rows:
        strict = [
            "B" + tag[1:] if tag[0] == "I" and (at == 0 or true[at - 1][1:] != tag[1:]) else tag
            for at, tag in enumerate(true)
        ]
        gold.append(strict)
        said.append(found)

    def entities(tags: list[str]) -> list[Any]:
        example = Example({}, about=[(at, at, at + 1) for at in range(len(tags))])
        found = task._entities(np.array([task.tags.index(tag) for tag in tags]), np.ones(len(tags)), example)
        return [entity for entity, _ in found]

    records = {
        "gold": [_from_tags(tags, tags, "") for tags in gold],
        "found": [entities(tags) for tags in said],
        "loss": np.ones(len(rows)),
        "weight": np.ones(len(rows)),
    }
    figures = task.figures(records)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metrics without an entity
        strict = {"mode": "strict", "scheme": IOB2, "zero_division": 0}
        assert figures["f1"] == pytest.approx(f1_score(gold, said, **strict))
        assert figures["precision"] == pytest.approx(precision_score(gold, said, **strict))
        assert figures["recall"] == pytest.approx(recall_score(gold, said, **strict))
        if any(records["gold"]) or any(records["found"]):  # of no type there is no mean
            assert figures["macro_f1"] == pytest.approx(f1_score(gold, said, average="macro", **strict))

    def spans(column: str) -> list[list[dict[str, Any]]]:
        # nervaluate counts ends in.
        return [[span(start, end - 1, kind) for start, end, kind in row] for row in records[column]]

    overall = Evaluator(spans("gold"), spans("found"), tags=["x", "y"], loader="dict").evaluate()["overall"]["strict"]
    assert (figures["f1"], figures["precision"], figures["recall"]) == pytest.approx(
        (overall.f1, overall.precision, overall.recall)
    )
    # A bootstrap's draws are the figures of the rows drawn.
    counts = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), 4).T
    for metric in Tokens.metrics[1:]:
        for drawn, count in zip(metric.statistics(records).drawn(counts.astype(float)), counts.T, strict=True):
            at = np.repeat(np.arange(len(rows)), count)
            own = {key: [records[key][i] for i in at] for key in ("gold", "found")}
            assert drawn == pytest.approx(metric.statistics(own).value())


def test_confusion_counts_entities(tokenizer: Any) -> None:
    task = Tokens(("x", "y"), "words", True)
    gold, found = [[(0, 1, "x"), (2, 3, "y"), (4, 6, "y")]], [[(0, 1, "y"), (2, 3, "y"), (4, 5, "x")]]
    assert task.classes == ("x", "y", "none")
    assert task.confusion({"gold": gold, "found": found}) == [[0, 1, 0], [0, 1, 1], [1, 0, 0]]


# -- bad input


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (("kyoto", [span(0, 9, "x")]), ["span 1 is from 0 to 9", "0 to 5"]),
        (("kyoto", [span(3, 3, "x")]), ["span 1 is empty, from 3 to 3"]),
        (("kyoto", [span("0", 3, "x")]), ["span 1 is from '0' to 3, expected whole numbers"]),
        (("kyoto", [span(0, 3, "")]), ["label ''"]),
        (("kyoto", [{"start": 0}]), ["expected start, end and label"]),
        (("kyoto", [span(0, 3, "x"), span(2, 4, "y")]), ["overlap"]),
        (("a  b", [span(1, 3, "x")]), ["white space"]),
        (("kyoto", "[{]"), ["expected a list as JSON"]),
        (("kyoto", 3), ["is a int, expected a list"]),
        (("", []), ["no text"]),
        ((3, []), ["expected text"]),
    ],
)
def test_bad_spans(row: tuple[Any, Any], parts: list[str]) -> None:
    with pytest.raises(TanzakuError) as refused:
        Tokens.learn(spans_table([("good", [span(0, 4, "x")]), row]), DATA)
    for part in ("train.jsonl row 2", *parts):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ((["a", "b"], ["O"]), ["1 tags for 2 words"]),
        ((["a", ""], ["O", "O"]), ["word 2 is ''"]),
        ((["a"], [3]), ["tag 1 is 3", "B-PER"]),
        (("a b", ["O", "O"]), ["expected a list as JSON"]),
    ],
)
def test_bad_words(row: tuple[Any, Any], parts: list[str]) -> None:
    with pytest.raises(TanzakuError) as refused:
        Tokens.learn(words_table([(["good"], ["B-x"]), row]), DATA)
    for part in ("train.jsonl row 2", *parts):
        assert part in str(refused.value)


def test_entities_that_training_has_not() -> None:
    tables = spans_table([("kyoto", [span(0, 5, "city")])])
    tables["valid"] = Table({"text": ["kyoto"], "spans": [[span(0, 5, "town")]]}, "valid.jsonl")
    with pytest.raises(TanzakuError, match="entities of the type 'town', which no training row has"):
        Tokens.learn(tables, DATA)
    with pytest.raises(TanzakuError, match="no entity in any row"):
        Tokens.learn(spans_table([("kyoto", [])]), DATA)


def test_what_is_kept_makes_the_task_again() -> None:
    task = Tokens(("a", "b"), "words", True)
    assert Tokens.from_json(task.to_json(), "") == task
    for change in ({"types": []}, {"types": [3]}, {"column": None}, {"words": "yes"}):
        with pytest.raises(TanzakuError, match="here: "):
            Tokens.from_json(task.to_json() | change, "here: ")


@pytest.mark.parametrize(("value", "words"), [("", False), (None, True), ([], True), ("[]", True), (" [ ] ", True)])
def test_blank_cells(value: Any, words: bool) -> None:
    assert Tokens(("x",), "words", words).blank(value)


def test_a_number_in_place_of_words() -> None:
    with pytest.raises(TanzakuError, match="row 1 is a int, expected a list"):
        Tokens(("x",), "words", True).check_cell(3, "row 1")
