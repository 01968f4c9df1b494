from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.utils.data import RandomSampler
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from close import assert_close
from tanzaku.errors import TanzakuError
from tanzaku.methods.lora import LoRA
from tanzaku.tasks.batches import epoch_batches
from tanzaku.tasks.classification import Classification, ClassificationSettings, labels_of
from tanzaku.tasks.data import Table
from tanzaku.tasks.task import Batch, Example, Split, TaskData, weighed
from tanzaku.train.active_job import ActiveJob
from task_data import labelled

TASK = Classification(("a", "b"))
PAIR = Classification(("a", "b"), text_pair="after")
NAMES = st.text(st.characters(exclude_categories=("Cs",))).filter(lambda name: name.strip())


def refused(message: str) -> Any:
    return pytest.raises(TanzakuError, match=message)


def encode(
    tokenizer: PreTrainedTokenizerFast,
    columns: dict[str, list[Any]],
    task: Classification = TASK,
    max_length: int = 8,
    label: str | None = None,
) -> Split:
    data = None if label is None else ClassificationSettings(train="train.tsv", label=label)
    return task.encode(Table(columns, "valid.tsv"), "valid", tokenizer, max_length, data)


def row(ids: list[int], types: list[int] | None = None, target: int | None = None) -> Example:
    return Example({"input_ids": ids} | ({} if types is None else {"token_type_ids": types}), target)


# --- labels ---


@given(st.lists(NAMES | st.integers() | st.booleans(), min_size=1))
def test_every_label_has_one_id(values: list[Any]) -> None:
    names = {str(value).strip() for value in values}
    if len(names) < 2:
        with refused("two classes"):
            labels_of(values)
        return
    labels = labels_of(values)
    assert set(labels) == names
    assert len(labels) == len(names)
    task = Classification(labels)
    assert [labels[task.target_of(value, "")] for value in values] == [str(v).strip() for v in values]
    assert labels_of(reversed(values)) == labels
    config = PretrainedConfig(**task.model_settings())
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
    assert labels_of(values) == names


def test_labels_of_other_types_are_equal() -> None:
    task = Classification(labels_of(["0", "1"]))
    assert [task.target_of(value, "") for value in (1, 1.0, "1", " 1 ", 0, 0.0)] == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("missing", [None, "", "  ", math.nan])
def test_missing_label(missing: Any) -> None:
    with refused(r"^train.tsv row 2 has no label"):
        labels_of(["a", missing, "b"], "train.tsv")
    with refused(r"^valid.tsv row 7 has no label"):
        TASK.target_of(missing, "valid.tsv row 7")


def test_refused_labels() -> None:
    with refused(r"^train.tsv has only the label 'a'; expected at least two"):
        labels_of(["a", "a"], "train.tsv")
    with refused("no labels"):
        labels_of([])
    with refused("row 2 is a list; expected a name or an integer"):
        labels_of(["a", ["b"]])


def test_unknown_label() -> None:
    with pytest.raises(TanzakuError) as caught:
        TASK.target_of("x", "valid.tsv row 7")
    assert str(caught.value) == "label 'x' in valid.tsv row 7 is not among the training labels a, b"
    with refused("did you mean 'positive'"):
        Classification(("negative", "positive")).target_of("positve", "valid.tsv row 7")
    with refused("^[^\n]*$"):
        Classification(("a\nb", "c")).target_of("d\ne", "valid.tsv row 7")


# --- encoding ---


def test_rows_are_encoded_in_order(tokenizer: PreTrainedTokenizerFast) -> None:
    columns = {"text": ["古池 や", "蛙"], "label": ["b", "a"]}
    split = encode(tokenizer, columns, label="label")
    assert split.examples == [row([1, 4, 5, 2], target=1), row([1, 6, 2], target=0)]
    assert (split.name, split.source, split.texts) == ("valid", "valid.tsv", ["古池 や", "蛙"])
    assert (len(split), split.truncated) == (2, 0)
    assert [example.target for example in encode(tokenizer, columns).examples] == [None, None]


def test_pairs_and_type_ids(typed_tokenizer: PreTrainedTokenizerFast) -> None:
    split = encode(typed_tokenizer, {"text": ["古池 や"], "after": ["蛙"]}, PAIR)
    assert split.examples == [row([1, 4, 5, 2, 6, 2], [0, 0, 0, 0, 1, 1])]
    assert split.texts == ["古池 や"]


@pytest.mark.parametrize(("max_length", "truncated"), [(6, 0), (5, 1), (4, 1), (3, 2)])
def test_cut_rows_are_counted(tokenizer: PreTrainedTokenizerFast, max_length: int, truncated: int) -> None:
    texts = ["古池 や 蛙 水", "古池 や", "音"]
    split = encode(tokenizer, {"text": texts}, max_length=max_length)
    assert split.truncated == truncated
    assert split.texts == texts
    assert [example.length for example in split.examples] == [min(n, max_length) for n in (6, 4, 3)]
    assert all(example.inputs["input_ids"][-1] == 2 for example in split.examples)


def test_a_pair_is_cut_in_its_longer_text(tokenizer: PreTrainedTokenizerFast) -> None:
    columns = {"text": ["古池", "古池"], "after": ["蛙 水 の 音", "蛙"]}
    split = encode(tokenizer, columns, PAIR, max_length=6)
    assert split.truncated == 1
    assert split.examples[0].inputs["input_ids"] == [1, 4, 2, 6, 8, 2]


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
        encode(tokenizer, columns, PAIR)


def test_refused_columns_and_lengths(tokenizer: PreTrainedTokenizerFast) -> None:
    columns = {"text": ["蛙"], "label": ["c"]}
    with refused(r"no column 'txt' \(did you mean 'text'\?\)"):
        encode(tokenizer, columns, Classification(("a", "b"), "txt"))
    with refused("valid.tsv has no rows"):
        encode(tokenizer, {"text": []})
    with refused("label 'c' in valid.tsv row 1 is not among the training labels a, b"):
        encode(tokenizer, columns, label="label")
    with refused("max_length 2 leaves no room .* 2 special tokens; expected at least 3"):
        encode(tokenizer, columns, max_length=2)
    with refused("max_length 4 leaves no room .* 3 special tokens; expected at least 5"):
        encode(tokenizer, columns, Classification(("a", "b"), text_pair="text"), max_length=4)


# --- batches ---


def test_collate_pads_on_the_right() -> None:
    batch = TASK.collate([row([5, 6, 7], [0, 0, 1], 1), row([8], [1], 0)], 9)
    assert {name: values.tolist() for name, values in batch.inputs.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "token_type_ids": [[0, 0, 1], [1, 0, 0]],
    }
    assert batch.targets["target"].tolist() == [1, 0]
    assert {values.dtype for values in (*batch.inputs.values(), *batch.targets.values())} == {torch.int64}
    assert (batch.lengths, batch.width) == ([3, 1], 3)


def test_collate_to_a_width() -> None:
    """Of so many tokens, or of the longest row's if these are more."""
    batch = TASK.collate([row([5, 6], [0, 1]), row([8], [1])], 9, width=3)
    assert {name: values.tolist() for name, values in batch.inputs.items()} == {
        "input_ids": [[5, 6, 9], [8, 9, 9]],
        "attention_mask": [[1, 1, 0], [1, 0, 0]],
        "token_type_ids": [[0, 1, 0], [1, 0, 0]],
    }
    assert (batch.lengths, batch.width) == ([2, 1], 3)
    assert TASK.collate([row([5, 6])], 9, width=1).width == 2


def test_collate_without_labels_and_types() -> None:
    batch = TASK.collate([row([5, 6]), row([7])], 0)
    assert batch.inputs.keys() == {"input_ids", "attention_mask"} and not batch.targets
    with refused("1 of 2 rows have no target"):
        TASK.collate([row([5, 6]), row([7], target=1)], 0)
    with refused("no rows"):
        TASK.collate([], 0)


def test_a_batch_without_what_the_model_does_not_take() -> None:
    batch = TASK.collate([row([5, 6, 7], [0, 0, 1], 1)], 9).to("cpu", frozenset({"token_type_ids", "pixels"}))
    assert batch.inputs.keys() == {"input_ids", "attention_mask"}
    assert (batch.targets["target"].tolist(), batch.lengths) == ([1], [3])


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
    """One of each row."""

    def weights(ids: list[int], names: str) -> list[float]:
        return Classification(tuple(names)).class_weights(labelled(ids))

    assert weights([0, 0, 0, 1], "ab") == pytest.approx([4 / 6, 4 / 6, 4 / 6, 4 / 2])
    assert weights([2, 1, 0], "abc") == [1, 1, 1]
    with refused("^class b has no rows"):
        weights([0, 2, 2], "abc")


def test_weights_of_rows_and_of_classes_multiply() -> None:
    """And are 1 on average."""
    rows = [replace(row, factor=factor) for row, factor in zip(labelled([0, 0, 0, 1]), (1, 3, 0, 2), strict=True)]
    data = TaskData(Split("train", rows, [""] * 4, 0, "rows"), None, None, Classification(("a", "b")))
    factors = [row.factor for row in weighed(data, by_class=True).train.examples]
    assert factors == pytest.approx([4 * each / (4 + 6) for each in (1, 3, 0, 3 * 2)])
    assert [row.factor for row in weighed(data, by_class=False).train.examples] == pytest.approx([4 / 6, 2, 0, 8 / 6])
    none = replace(data, train=replace(data.train, examples=[replace(row, factor=0.0) for row in rows]))
    with refused("^all 4 training rows have the weight 0"):
        weighed(none, by_class=False)


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return TASK.score(SimpleNamespace(logits=logits), Batch({}, {"target": labels}, labelled(labels.tolist())))


def test_loss_is_the_cross_entropy_of_each_row_in_float32() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.5, 0.25], [-3.0, 1.0]])
    labels = torch.tensor([0, 1, 0])
    assert_close(loss(logits, labels), -logits.log_softmax(1)[range(3), labels])
    half = logits.bfloat16().requires_grad_()
    found = loss(half, labels)
    assert found.dtype == torch.float32
    assert_close(found, loss(half.float(), labels))
    found.sum().backward()
    assert half.grad is not None


@pytest.mark.parametrize("factors", [(1.0, 1.0), (1.0, 3.0)])
def test_loss_of_a_batch_is_the_mean_of_its_rows(factors: tuple[float, float]) -> None:
    """Each row counts by its factor, in a batch of one row too."""
    logits = torch.tensor([[2.0, -1.0], [0.5, 0.25], [-3.0, 1.0]])
    labels = [0, 1, 0]
    examples = [replace(each, factor=factors[each.target]) for each in labelled(labels)]
    active: Any = SimpleNamespace(adapter=SimpleNamespace(method=LoRA()))
    sums = loss(logits, torch.tensor(labels))
    each = cross_entropy(logits, torch.tensor(labels), weight=torch.tensor(factors), reduction="none")
    assert_close(ActiveJob.loss(active, sums, examples), each.mean())
    for row in range(3):
        assert_close(ActiveJob.loss(active, sums[row : row + 1], examples[row : row + 1]), each[row])
