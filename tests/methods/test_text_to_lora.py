"""Text-to-LoRA: what the network writes, whose rows have which task, LoRA for new descriptions, files and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoTokenizer

import tanzaku as tz
from close import GRADIENT, HALF, assert_close, close
from models import batch, tiny
from tanzaku.core.manager import manager_of
from tanzaku.methods.text_to_lora import LoraWriter

SMALL: dict[str, Any] = {"r": 2, "embedding_dim": 6, "hidden_dim": 8}
THREE = [[1.0, 0.0, -1.0, 0.5], [0.0, 2.0, 0.5, -1.0], [-1.0, -1.0, 0.0, 1.0]]
TEXTS = ["one two three", "four five", "two two one"]


def opened(adapter: tz.Adapter, seed: int = 0) -> LoraWriter:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in adapter.trained():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return writer_of(adapter)


def writer_of(adapter: tz.Adapter) -> LoraWriter:
    return next(layer for _, layer in adapter.at() if isinstance(layer, LoraWriter))


def described(model: Any, **changes: Any) -> LoraWriter:
    method = tz.TextToLora(**{"descriptions": THREE, **SMALL, **changes})
    return opened(tz.attach(model, method, "t2l", seed=0))


def logits(model: Any, entries: list[Any], tasks: list[int] | None = None, rows: list[int] | None = None) -> Tensor:
    context = {} if tasks is None else {"task_ids": torch.tensor(tasks)}
    given = batch(model, rows=5)
    given = {key: each[rows if rows is not None else slice(len(entries))] for key, each in given.items()}
    with torch.no_grad(), tz.route(model, entries, context=context):
        found = model(**given).logits
    assert isinstance(found, Tensor)
    return found


def test_a_change_is_what_the_network_writes() -> None:
    """y + alpha / r B A x, of one kind's head and its layer."""
    model = tiny("llama", "lm")
    writer = described(model, lora_alpha=6)
    written = writer.compute()
    paths = [path for path in manager_of(model).get("t2l").paths if path]
    assert len(paths) == len(written) == 4 and len(writer.kinds) == 2
    assert [kind.path for kind in writer.kinds] == [f"model.layers.*.self_attn.{end}_proj" for end in "qv"]
    x = torch.randn(2, 3, 32)
    for number, path in enumerate(paths):
        module, (a, b) = model.get_submodule(path), written[number]
        with torch.no_grad(), tz.route(model, ["t2l"] * 2, context={"task_ids": torch.tensor([2, 0])}):
            found = module(x)
        with torch.no_grad():
            expected = torch.stack([module(x[i]) + 3 * x[i] @ a[task].T @ b[task].T for i, task in enumerate((2, 0))])
        assert_close(found, expected)
    # Layers differ, and so do tasks.
    assert not close(written[0][1], written[2][1]) and not close(written[0][1][0], written[0][1][1])


def test_it_starts_as_lora_does() -> None:
    """B is zero, and A is drawn, whatever the description."""
    writer = writer_of(tz.attach(tiny("llama", "lm"), tz.TextToLora(descriptions=THREE, **SMALL), "t2l", seed=0))
    for a, b in writer.compute():
        assert not b.any() and a.std() > 0.05 and a.abs().max() <= 32**-0.5
        assert_close(a[0], a[2])


def test_parameters_are_as_many_as_is_said() -> None:
    model = tiny("llama", "lm")
    described(model)
    e, h, r = 6, 8, 2
    small = (4 * e + e) + 2 * e + (3 * e * h + h) + (h * h + h)
    heads = sum((h + 1) * r * (32 + out) for out in (32, 16))
    assert tz.count(model, "t2l").trainable == small + e * (2 + 2) + heads


def test_each_row_has_its_own_task() -> None:
    """In one batch, beside another adapter and bare rows, as in a batch of its own; another task is another LoRA."""
    model = tiny("llama", "lm")
    described(model)
    tz.attach(model, tz.LoRA(r=2, init_lora_weights=False), "lora", seed=1)
    entries, tasks = ["t2l", "lora", "t2l", None, "t2l"], [2, 0, 0, 1, 1]
    mixed = logits(model, entries, tasks)
    for row in (0, 2, 4):
        assert_close(mixed[[row]], logits(model, ["t2l"], [tasks[row]], rows=[row]))
    others = logits(model, entries, [0, 0, 1, 1, 2])
    assert not close(mixed[0], others[0]) and not close(mixed[2], others[2])
    assert_close(mixed[1], others[1])
    assert_close(mixed[3], others[3])


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.sampled_from(["llama", "bert", "t5", "gpt2"]))
def test_rows_of_any_tasks_are_what_they_are_alone(tasks: list[int], kind: str) -> None:
    model = tiny(kind)
    described(model)
    mixed = logits(model, ["t2l"] * len(tasks), tasks)
    for row, task in enumerate(tasks):
        assert_close(mixed[[row]], logits(model, ["t2l"], [task], rows=[row]))


def test_over_a_base_of_half_precision() -> None:
    """Small products stay in full: rows of two tasks are what they are alone."""
    model = tiny("llama", "lm").to(torch.bfloat16)
    described(model)
    mixed = logits(model, ["t2l"] * 2, [2, 0])
    assert mixed.dtype == torch.bfloat16 and writer_of(manager_of(model).get("t2l")).descriptions.dtype == torch.float32
    for row, task in enumerate((2, 0)):
        assert_close(mixed[[row]], logits(model, ["t2l"], [task], rows=[row]), HALF)


def test_all_that_is_trained_gets_a_gradient() -> None:
    """Of rows of two tasks, once B is no zero."""
    model = tiny("llama", "lm")
    described(model)
    with tz.route(model, ["t2l"] * 2, context={"task_ids": torch.tensor([0, 2])}):
        model(**batch(model, rows=2)).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for _, p in manager_of(model).get("t2l").trained())


def test_the_description_decides() -> None:
    """Of two adapters with the same weights, and of one whose texts the base reads."""
    found = []
    for vector in ([1.0, 0.0, -1.0, 0.5], [0.0, 2.0, 0.5, -1.0]):
        model = tiny("llama", "lm")
        described(model, descriptions=[vector])
        found.append(logits(model, ["t2l"]))
    assert not close(*found)


def test_vectors_of_texts_are_means_over_their_own_tokens(tokenizer: str) -> None:
    model = tiny("llama", "lm")
    reader = AutoTokenizer.from_pretrained(tokenizer)
    with torch.no_grad():
        states = model.model(input_ids=torch.tensor([[10, 11, 12]])).last_hidden_state[0]
    found = tz.describe(model, reader, TEXTS)
    assert_close(found[0], states.mean(0))
    assert found.shape == (3, 32)
    # What is active is not asked.
    tz.attach(model, tz.LoRA(r=2, init_lora_weights=False), "lora", seed=1)
    tz.activate(model, "lora")
    model.train()
    assert_close(tz.describe(model, reader, TEXTS), found)
    assert model.training
    # A token that the tokenizer adds is read by the others, and counts for nothing by itself.
    reader.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 3)])
    with torch.no_grad(), tz.route(model.eval(), [None]):
        behind = model.model(input_ids=torch.tensor([[3, 10, 11, 12]])).last_hidden_state[0, 1:]
    assert_close(tz.describe(model, reader, TEXTS[:1])[0], behind.mean(0))
    with pytest.raises(tz.TanzakuError, match="found '', which has no token of its own"):
        tz.describe(model, reader, ["one", ""])


@pytest.mark.parametrize("kind", ["llama", "bert", "t5", "opt"])
def test_texts_are_read_where_it_is_attached(kind: str, tokenizer: str) -> None:
    model = tiny(kind)
    method = tz.TextToLora(descriptions=TEXTS, tokenizer_name_or_path=tokenizer, **SMALL)
    adapter = tz.attach(model, method, "t2l", seed=0)
    expected = tz.describe(model, AutoTokenizer.from_pretrained(tokenizer), TEXTS)
    assert_close(writer_of(adapter).descriptions, expected)
    named = {"b": TEXTS[1], "c": TEXTS[2], "a": TEXTS[0]}
    model.name_or_path = tokenizer  # where the base's own lies
    again = tz.attach(model, tz.TextToLora(descriptions=named, **SMALL), "again")
    assert_close(writer_of(again).descriptions, expected)
    assert again.method.task_names() == ["a", "b", "c"]


VECTORS = st.lists(st.floats(-3, 3, width=16), min_size=4, max_size=4)


@settings(max_examples=8, deadline=None)
@given(vector=VECTORS, kind=st.sampled_from(["llama", "bert", "t5", "gpt2"]))
def test_a_written_lora_is_what_a_row_of_it_would_get(vector: list[float], kind: str) -> None:
    """Among the tasks' own descriptions, and of a description that it has not seen. Matrices that are written first
    round otherwise than those of a row, in a T5 by more than a pass does."""
    model = tiny(kind)
    writer = described(model)
    expected = logits(model, ["t2l"] * 2, [1, 2])
    for task in (1, 2):
        lora = tz.write_lora(model, "t2l", THREE[task], f"own-{task}")
        assert lora.method.name == "lora"
        assert_close(logits(model, [f"own-{task}"], rows=[task - 1]), expected[[task - 1]], GRADIENT)
    tz.write_lora(model, "t2l", torch.tensor(vector))
    found = logits(model, ["t2l-lora"] * 2)
    with torch.no_grad():
        # A row of that task: the vector in the place of the first, and the mean as it was.
        common = writer.descriptions.mean(0)
        writer.descriptions[0] = torch.tensor(vector)
        writer.descriptions.add_(common - writer.descriptions.mean(0))
        moved = writer.descriptions[0].clone()
    tz.write_lora(model, "t2l", moved, "moved")
    assert_close(logits(model, ["moved"] * 2), logits(model, ["t2l"] * 2, [0, 0]), GRADIENT)
    with torch.no_grad():
        writer.descriptions.copy_(torch.tensor(THREE))
    assert_close(logits(model, ["t2l"] * 2, [1, 2]), expected, GRADIENT)
    if not close(torch.tensor(vector), torch.tensor(THREE[1])):
        tz.write_lora(model, "t2l", vector, "again")
        assert_close(logits(model, ["again"] * 2), found, GRADIENT)


def test_a_written_lora_is_one_as_any_other(tmp_path: Path, tokenizer: str) -> None:
    """Saved and read by a base that knows nothing of the network, and merged; with the head that all tasks share."""
    model = tiny("llama")
    method = tz.TextToLora(descriptions=TEXTS, tokenizer_name_or_path=tokenizer, **SMALL)
    opened(tz.attach(model, method, "t2l", seed=0))
    tz.write_lora(model, "t2l", "five four", "new")
    vector = tz.describe(model, AutoTokenizer.from_pretrained(tokenizer), ["five four"])[0]
    tz.write_lora(model, "t2l", vector, "same")
    expected = logits(model, ["new"] * 3)
    assert_close(logits(model, ["same"] * 3), expected)
    assert not close(expected, logits(model, ["t2l"] * 3, [0, 0, 0]))
    other = tiny("llama")
    tz.load(other, tz.save(model, "new", tmp_path / "new"), name="new")
    assert_close(logits(other, ["new"] * 3), expected)
    tz.merge(other, "new")
    with torch.no_grad():
        assert_close(other(**{key: each[:3] for key, each in batch(other, rows=5).items()}).logits, expected)


@pytest.mark.parametrize("texts", [True, False])
def test_files_keep_the_vectors(texts: bool, tmp_path: Path, tokenizer: str) -> None:
    """No tokenizer is needed to load, and new LoRA is written as before."""
    model = tiny("llama")
    given: dict[str, Any] = {"descriptions": TEXTS, "tokenizer_name_or_path": tokenizer} if texts else {}
    writer = described(model, **given)
    path = tz.save(model, "t2l", tmp_path / "t2l")
    assert ('"one two three"' in (path / "adapter_config.json").read_text(encoding="utf-8")) == texts
    for file in Path(tokenizer).iterdir():
        file.unlink()
    other = tiny("llama")
    loaded = tz.load(other, path, name="mine")
    assert torch.equal(writer_of(loaded).descriptions, writer.descriptions)
    assert_close(logits(other, ["mine"] * 3, [0, 1, 2]), logits(model, ["t2l"] * 3, [0, 1, 2]))
    vector = torch.linspace(-1, 1, writer.descriptions.shape[1])
    tz.write_lora(model, "t2l", vector, "new")
    tz.write_lora(other, "mine", vector, "new")
    assert_close(logits(other, ["new"] * 3), logits(model, ["new"] * 3))
    # What is written again is the same file.
    assert (tz.save(other, "mine", tmp_path / "again") / "adapter_config.json").read_bytes() == (
        path / "adapter_config.json"
    ).read_bytes()


def test_without_descriptions_tasks_are_told_apart_by_chance(tmp_path: Path) -> None:
    model = tiny("llama")
    writers = [
        writer_of(tz.attach(model, tz.TextToLora(num_tasks=2, **SMALL), name, seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    first, same, other = (writer.descriptions for writer in writers)
    assert first.shape == (2, 6) and torch.equal(first, same) and not close(first, other)
    opened(manager_of(model).get("a"))
    expected = logits(model, ["a"] * 2, [0, 1])
    loaded = tiny("llama")
    tz.load(loaded, tz.save(model, "a", tmp_path / "a"), name="a")
    assert_close(logits(loaded, ["a"] * 2, [0, 1]), expected)
    for each in (model, loaded):
        with pytest.raises(tz.TanzakuError, match="'a' was trained without descriptions"):
            tz.write_lora(each, "a", [0.0] * 6)


def test_of_one_task_it_merges_and_of_several_it_says_that_it_cannot() -> None:
    model = tiny("llama")
    described(model, descriptions=THREE[:1])
    expected = logits(model, ["t2l"] * 2)
    lost = tz.convert(model, "t2l", "lora", "lora", r=2).lost
    assert max(lost.values()) < 1e-4
    assert_close(logits(model, ["lora"] * 2), expected, 2**12)
    several = tiny("llama")
    described(several)
    with pytest.raises(tz.TanzakuError, match=r"text_to_lora: model.*q_proj .Linear. cannot be merged"):
        tz.merge(several, "t2l")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"descriptions": []}, "found descriptions=.*, expected one for each task"),
        ({"num_tasks": 0}, "found num_tasks=0, expected 1 or more"),
        ({"r": 0}, "found r=0, expected 1 or more"),
        ({"hidden_dim": 0}, "found hidden_dim=0"),
        ({"lora_alpha": 0}, "found lora_alpha=0"),
        ({"descriptions": THREE, "num_tasks": 2}, "found num_tasks=2 and 3 descriptions, expected one for each task"),
        ({"descriptions": [[1.0], [1.0, 2.0]]}, r"found descriptions of \[1, 2\] numbers, expected one width for all"),
        ({"descriptions": [[]]}, r"found descriptions of \[0\] numbers"),
        ({"descriptions": [[float("nan")]]}, "expected finite numbers"),
        ({"descriptions": [["one"]]}, "descriptions is .*expected"),
        ({"descriptions": THREE, "description_dim": 5}, "found description_dim=5 for vectors of 4 numbers, expected 4"),
        ({"description_dim": 5}, "found description_dim=5, and no descriptions"),
        ({"descriptions": ["one"]}, "found descriptions and no tokenizer, expected tokenizer_name_or_path"),
        ({"descriptions": ["one"], "tokenizer_name_or_path": "/nowhere"}, "'/nowhere' gives no tokenizer"),
        ({"target_modules": ["embed_tokens"]}, "found model.embed_tokens, a Embedding"),
    ],
)
def test_bad_settings(given: dict[str, Any], says: str) -> None:
    with pytest.raises(tz.TanzakuError, match=says):
        tz.attach(tiny("llama", "lm"), tz.TextToLora(**given), "t2l")


@pytest.mark.parametrize(
    ("context", "says"),
    [
        ({}, "reads 'task_ids' of each row"),
        ({"task_ids": torch.tensor([0, 3])}, r"task_ids: found \[0, 3\], expected 0 to 2"),
    ],
)
def test_bad_tasks(context: dict[str, Tensor], says: str) -> None:
    model = tiny("llama", "lm")
    described(model)
    with pytest.raises(tz.TanzakuError, match=says), tz.route(model, ["t2l"] * 2, context=context):
        model(**batch(model, rows=2))


def test_bad_descriptions_of_new_tasks(tokenizer: str) -> None:
    model = tiny("llama")
    described(model)
    tz.attach(model, tz.LoRA(r=1), "lora")
    for description, says in (
        ([1.0, 2.0], r"'t2l' was trained on \(4,\) numbers, and found \(2,\) numbers"),
        (THREE, r"found \(3, 4\) numbers"),
        ([1.0, 2.0, float("inf"), 0.0], "found a number that is not finite"),
        ("one", "'t2l' was trained on vectors, and found a text"),
    ):
        with pytest.raises(tz.TanzakuError, match=says):
            tz.write_lora(model, "t2l", description)
    with pytest.raises(tz.TanzakuError, match="'lora' is lora, expected an adapter of text_to_lora"):
        tz.write_lora(model, "lora", THREE[0])
    with pytest.raises(tz.TanzakuError, match="'lora' is attached already"):
        tz.write_lora(model, "t2l", THREE[0], "lora")
    tz.merge(model, "lora")
    with pytest.raises(tz.TanzakuError, match="unmerge it first"):
        tz.write_lora(model, "t2l", THREE[0])
    assert tz.adapters(model) == ["t2l", "lora"]


def test_texts_that_say_nothing(tokenizer: str) -> None:
    reader = AutoTokenizer.from_pretrained(tokenizer)
    model = tiny("llama")
    for texts, says in (
        (["one", ""], "found '', which has no token of its own"),
        ([" ".join(["one"] * 129)], "has 129 tokens, expected 128 at most"),
        ("one", "found one text, expected a list of texts"),
    ):
        with pytest.raises(tz.TanzakuError, match=says):
            tz.describe(model, reader, texts)
    with pytest.raises(tz.TanzakuError, match="model type 'vit' reads no token ids"):
        tz.describe(tiny("vit"), reader, ["one"])
    with pytest.raises(tz.TanzakuError, match="without weights"):
        tz.describe(tiny("llama").to("meta"), reader, ["one"])
