from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import RandomSampler
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from close import assert_close
from tanzaku.errors import TanzakuError
from tanzaku.tasks.classification import (
    Example,
    Labels,
    Split,
    class_weights,
    classification_loss,
    collate,
    encode_split,
    epoch_batches,
)
from tanzaku.tasks.data import Table

NAMES = st.text(st.characters(exclude_categories=("Cs",))).filter(lambda name: name.strip())


def refused(message: str) -> Any:
    return pytest.raises(TanzakuError, match=message)


def encode(tokenizer: PreTrainedTokenizerFast, columns: dict[str, list[Any]], **options: Any) -> Split:
    options = {"text": "text", "text_pair": None, "label": None, "labels": None, "max_length": 8, **options}
    return encode_split(Table(columns, "valid.tsv"), "valid", tokenizer, **options)


# --- labels ---


@given(st.lists(NAMES | st.integers() | st.booleans(), min_size=1))
def test_every_label_has_one_id(values: list[Any]) -> None:
    names = {str(value).strip() for value in values}
    if len(names) < 2:
        with refused("two classes"):
            Labels.from_column(values)
        return
    labels = Labels.from_column(values)
    assert set(labels.names) == names
    assert len(labels) == len(names)
    assert [labels.names[labels.encode(value, "")] for value in values] == [str(v).strip() for v in values]
    assert Labels.from_column(reversed(values)) == labels
    config = PretrainedConfig(**labels.to_config())
    assert config.num_labels == len(labels)
    assert all(config.label2id[config.id2label[index]] == index for index in range(len(labels)))


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["10", "9", "-1", "2.5"], ("-1", "2.5", "9", "10")),
        ([10, 9, 1.0, "1"], ("1", "9", "10")),
        (["10", "9", "a"], ("10", "9", "a")),
        (["b", "a ", "a"], ("a", "b")),
        ([True, False], ("False", "True")),
    ],
)
def test_order_of_labels(values: list[Any], names: tuple[str, ...]) -> None:
    assert Labels.from_column(values).names == names


def test_labels_of_other_types_are_equal() -> None:
    labels = Labels.from_column(["0", "1"])
    assert [labels.encode(value, "") for value in (1, 1.0, "1", " 1 ", 0, 0.0)] == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("missing", [None, "", "  ", math.nan])
def test_missing_label(missing: Any) -> None:
    with refused(r"^train.tsv row 2 has no label"):
        Labels.from_column(["a", missing, "b"], "train.tsv")
    with refused(r"^valid.tsv row 7 has no label"):
        Labels(("a", "b")).encode(missing, "valid.tsv row 7")


def test_refused_labels() -> None:
    with refused(r"^train.tsv has only the label 'a'; expected at least two"):
        Labels.from_column(["a", "a"], "train.tsv")
    with refused("no labels"):
        Labels.from_column([])
    with refused("row 2 is a list; expected a name or an integer"):
        Labels.from_column(["a", ["b"]])


def test_unknown_label() -> None:
    with pytest.raises(TanzakuError) as caught:
        Labels(("a", "b")).encode("x", "valid.tsv row 7")
    assert str(caught.value) == "label 'x' in valid.tsv row 7 is not among the training labels a, b"
    with refused("did you mean 'positive'"):
        Labels(("negative", "positive")).encode("positve", "valid.tsv row 7")
    with refused("^[^\n]*$"):
        Labels(("a\nb", "c")).encode("d\ne", "valid.tsv row 7")


# --- encoding ---


def test_rows_are_encoded_in_order(tokenizer: PreTrainedTokenizerFast) -> None:
    labels = Labels(("a", "b"))
    columns = {"text": ["古池 や", "蛙"], "label": ["b", "a"]}
    split = encode(tokenizer, columns, label="label", labels=labels)
    assert split.examples == [Example([1, 4, 5, 2], None, 1), Example([1, 6, 2], None, 0)]
    assert (split.name, split.source, split.texts) == ("valid", "valid.tsv", ["古池 や", "蛙"])
    assert (len(split), split.truncated) == (2, 0)
    assert [example.label for example in encode(tokenizer, columns).examples] == [None, None]


def test_pairs_and_type_ids(typed_tokenizer: PreTrainedTokenizerFast) -> None:
    split = encode(typed_tokenizer, {"text": ["古池 や"], "after": ["蛙"]}, text_pair="after")
    assert split.examples == [Example([1, 4, 5, 2, 6, 2], [0, 0, 0, 0, 1, 1], None)]
    assert split.texts == ["古池 や"]


@pytest.mark.parametrize(("max_length", "truncated"), [(6, 0), (5, 1), (4, 1), (3, 2)])
def test_cut_rows_are_counted(tokenizer: PreTrainedTokenizerFast, max_length: int, truncated: int) -> None:
    texts = ["古池 や 蛙 水", "古池 や", "音"]
    split = encode(tokenizer, {"text": texts}, max_length=max_length)
    assert split.truncated == truncated
    assert split.texts == texts
    assert [len(example.input_ids) for example in split.examples] == [min(n, max_length) for n in (6, 4, 3)]
    assert all(example.input_ids[-1] == 2 for example in split.examples)


def test_a_pair_is_cut_in_its_longer_text(tokenizer: PreTrainedTokenizerFast) -> None:
    columns = {"text": ["古池", "古池"], "after": ["蛙 水 の 音", "蛙"]}
    split = encode(tokenizer, columns, text_pair="after", max_length=6)
    assert split.truncated == 1
    assert split.examples[0].input_ids == [1, 4, 2, 6, 8, 2]


@pytest.mark.parametrize("column", ["text", "after"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "has no text"),
        ("", "has no text"),
        (math.nan, "has no text"),
        (" \n", r"is ' \\n', which gives no tokens"),
        (5, r"is 5 \(int\), expected text"),
        ("a\ud800", "surrogate"),
    ],
)
def test_a_row_without_text(tokenizer: PreTrainedTokenizerFast, column: str, value: Any, message: str) -> None:
    columns = {"text": ["蛙", "蛙"], "after": ["水", "水"]}
    columns[column][1] = value
    with refused(f"^valid.tsv row 2: column '{column}' [^\n]*{message}[^\n]*$"):
        encode(tokenizer, columns, text_pair="after")


def test_refused_columns_and_lengths(tokenizer: PreTrainedTokenizerFast) -> None:
    columns = {"text": ["蛙"], "label": ["c"]}
    with refused(r"no column 'txt' \(did you mean 'text'\?\)"):
        encode(tokenizer, columns, text="txt")
    with refused("valid.tsv has no rows"):
        encode(tokenizer, {"text": []})
    with refused("label 'c' in valid.tsv row 1 is not among the training labels a, b"):
        encode(tokenizer, columns, label="label", labels=Labels(("a", "b")))
    with refused("'label' of valid.tsv needs the training labels"):
        encode(tokenizer, columns, label="label")
    with refused("max_length 2 leaves no room .* 2 special tokens; expected at least 3"):
        encode(tokenizer, columns, max_length=2)
    with refused("max_length 4 leaves no room .* 3 special tokens; expected at least 5"):
        encode(tokenizer, columns, text_pair="text", max_length=4)


# --- batches ---


def test_collate_pads_on_the_right() -> None:
    batch = collate([Example([5, 6, 7], [0, 0, 1], 1), Example([8], [1], 0)], pad_token_id=9)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "token_type_ids": [[0, 0, 1], [1, 0, 0]],
        "labels": [1, 0],
    }
    assert {values.dtype for values in batch.values()} == {torch.int64}


def test_collate_without_labels_and_types() -> None:
    rows = [Example([5, 6], None, None), Example([7], None, 1)]
    assert collate(rows, 0, labels=False).keys() == {"input_ids", "attention_mask"}
    with refused("1 of 2 rows have no label"):
        collate(rows, 0)
    with refused("no rows"):
        collate([], 0)


@given(
    lengths=st.lists(st.integers(1, 9), max_size=300),
    batch_size=st.integers(1, 5),
    shuffle=st.booleans(),
    group=st.booleans(),
    seed=st.integers(0, 99),
)
def test_an_epoch_has_every_row_once(
    lengths: list[int], batch_size: int, shuffle: bool, group: bool, seed: int
) -> None:
    def draw() -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return epoch_batches(lengths, batch_size, shuffle=shuffle, group_by_length=group, generator=generator)

    batches = draw()
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert sorted((len(batch) for batch in batches), reverse=True) == [
        min(batch_size, len(lengths) - start) for start in range(0, len(lengths), batch_size)
    ]
    assert draw() == batches


def test_order_is_that_of_the_random_sampler() -> None:
    n = 23
    batches = epoch_batches([1] * n, 4, shuffle=True, group_by_length=False, generator=torch.Generator().manual_seed(3))
    sampler = RandomSampler(range(n), generator=torch.Generator().manual_seed(3))
    assert [row for batch in batches for row in batch] == list(sampler)
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 3]


def test_order_of_the_file() -> None:
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"shuffle": False, "generator": generator}
    assert epoch_batches([1, 3, 2], 2, group_by_length=False, **options) == [[0, 1], [2]]
    assert epoch_batches([1, 3, 2], 2, group_by_length=True, **options) == [[1, 2], [0]]
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())
    with refused("batch_size is 0"):
        epoch_batches([1], 0, group_by_length=False, **options)


def test_grouping_pads_less_and_stays_random() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 200, (1000,), generator=generator).tolist()

    def batches(group: bool) -> list[list[int]]:
        return epoch_batches(lengths, 4, shuffle=True, group_by_length=group, generator=generator)

    def padding(epoch: list[list[int]]) -> int:
        return sum(max(lengths[i] for i in batch) - lengths[row] for batch in epoch for row in batch)

    grouped = batches(True)
    assert padding(grouped) < padding(batches(False)) / 10
    longest = [max(lengths[row] for row in batch) for batch in grouped]
    assert sum(a < b for a, b in pairwise(longest)) > 50  # not sorted: shuffled batches
    together = {row: set(batch) for batch in batches(True) for row in batch}
    assert any(together[row] != set(batch) for batch in grouped for row in batch)


# --- loss ---


def test_class_weights() -> None:
    assert class_weights([0, 0, 0, 1], 2).tolist() == pytest.approx([4 / 6, 4 / 2])
    assert class_weights([2, 1, 0], 3).tolist() == [1, 1, 1]
    with refused("^class 1 has no rows"):
        class_weights([0, 2, 2], 3)
    with refused("label id 2 is outside 0 to 1"):
        class_weights([0, 1, 2], 2)


def test_loss_is_the_mean_cross_entropy_in_float32() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.5, 0.25], [-3.0, 1.0]])
    labels = torch.tensor([0, 1, 0])
    each = -logits.log_softmax(1)[range(3), labels]
    assert_close(classification_loss(logits, labels), each.mean())
    weights = torch.tensor([1.0, 3.0])
    weighted = (each * weights[labels]).sum() / weights[labels].sum()
    assert_close(classification_loss(logits, labels, weights), weighted)
    half = logits.bfloat16().requires_grad_()
    loss = classification_loss(half, labels)
    assert loss.dtype == torch.float32
    assert_close(loss, classification_loss(half.float(), labels))
    loss.backward()
    assert half.grad is not None
