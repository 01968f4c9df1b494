"""Many adapters in one pass: each one's numbers are those it has alone, row by row, in the order of the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import tanzaku as tz
from close import assert_close, close
from models import NEEDED, VOCAB, attach, tiny
from tanzaku.core.manager import manager_of
from tanzaku.engine.trim import last_layer_modules
from tanzaku.methods import METHODS
from tanzaku.tasks import inference
from tanzaku.tasks.classification import Classification
from tanzaku.tasks.inference import predictions, records_of
from tanzaku.tasks.task import Example, Split
from tanzaku.train.results import Job
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings
from task_data import task
from tiers import in_families

# Where the defaults are not small enough, or so strong that a tiny model makes much of a rounding.
SETTINGS: dict[str, dict[str, Any]] = {
    "randlora": {"randlora_alpha": 32},
    "lora": {"r": 2},
    "adalora": {"init_r": 3, "target_r": 2},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "p_tuning": {"num_virtual_tokens": 2},
    "prefix_tuning": {"num_virtual_tokens": 4},
    **NEEDED,
    "waveft": {"n_frequency": 64, "scaling": 5.0},
}
SHARING = [name for name, method in METHODS.items() if method.shares_batch]
LENGTHS = (5, 1, 9, 2, 9, 3, 7)
TASK = Classification(("a", "b", "c"))


def attached(model: PreTrainedModel, name: str, method: tz.Method) -> str:
    """Attach, and move every parameter away from where it starts."""
    adapter = attach(model, method, name, seed=0)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for _, parameter in adapter.trained():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return name


def hang_all(model: PreTrainedModel) -> list[str]:
    return [attached(model, name, method.from_settings(SETTINGS.get(name, {}))) for name, method in METHODS.items()]


def row(ids: list[int], types: list[int] | None = None) -> Example:
    return Example({"input_ids": ids} | ({} if types is None else {"token_type_ids": types}))


def rows(model: PreTrainedModel, lengths: Sequence[int] = LENGTHS, cut: int = 99, types: bool = False) -> Split:
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length in lengths:
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()[:cut]
        if model.config.is_encoder_decoder:
            ids[-1] = model.config.eos_token_id  # these classifiers read the last end-of-text token
        examples.append(row(ids, [i % 2 for i in range(len(ids))] if types else None))
    return Split("data", examples, [f"text {row}" for row in range(len(lengths))], 0, "data")


def alone(model: PreTrainedModel, name: str, split: Split) -> Tensor:
    """Each row by itself: no other adapter, no other row, no padding, nothing trimmed."""
    out = []
    for example in split.examples:
        given = {key: torch.tensor([value]) for key, value in example.inputs.items()}
        with torch.no_grad(), tz.route(model, [name]):
            out.append(model(**given).logits)
    return torch.cat(out)


def logits_of(model: PreTrainedModel, splits: dict[str, Split], pad: int, batch_size: int) -> dict[str, Tensor]:
    found = records_of(model, TASK, splits, pad, batch_size)
    return {name: torch.from_numpy(records["logits"]).float() for name, records in found.items()}


def assert_alone(model: PreTrainedModel, found: dict[str, Tensor], splits: dict[str, Split]) -> None:
    assert list(found) == list(splits)
    for name, split in splits.items():
        expected = alone(model, name, split)
        assert_close(found[name], expected, at=name)


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the batches that went through the model."""
    shapes: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(
        lambda _m, _a, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


@in_families("kind", ["llama", "gemma3", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_every_method_together_equals_each_alone(kind: str, batch_size: int) -> None:
    model = tiny(kind)
    split = rows(model, types=kind == "bert")
    splits = dict.fromkeys(hang_all(model), split)
    found = logits_of(model, splits, model.config.pad_token_id, batch_size)
    assert_alone(model, found, splits)
    # They are told apart: no adapter was given another's numbers.
    every = torch.stack(list(found.values())).flatten(1)
    assert torch.pdist(every).min() > 1e-2


def test_streamed_rows_are_those_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    splits = dict.fromkeys(hang_all(model), rows(model))
    expected = {}
    for name, records in records_of(model, TASK, splits, 0, 4).items():
        expected[name] = torch.from_numpy(records["probabilities"])
        assert expected[name].dtype == torch.float64
        assert_close(expected[name], torch.from_numpy(records["logits"]).softmax(-1), dtype=torch.float32)
    monkeypatch.setattr(inference, "WINDOW", 2)
    for batch_size in (1, 2, 3, 8):
        streamed = list(predictions(model, TASK, splits, 0, batch_size))
        assert len(streamed) == len(LENGTHS) and all(list(row) == list(splits) for row in streamed)
        for name in splits:
            found = torch.tensor([row[name] for row in streamed], dtype=torch.float64)
            assert_close(found, expected[name], dtype=torch.float32)


def test_rows_stream_window_by_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "WINDOW", 4)
    model = tiny("llama")
    splits = dict.fromkeys([attached(model, "a", tz.LoRA(r=2)), attached(model, "b", tz.IA3())], rows(model, [3] * 10))
    with watched(model) as shapes:
        stream = predictions(model, TASK, splits, 0, 2)
        assert shapes == []
        next(stream)
        assert shapes == [(4, 3)] * 2  # a window of four rows, two a step, for two adapters
        assert len(list(stream)) == 9 and len(shapes) == 5


def test_sharing_adapters_take_one_pass_and_others_their_own() -> None:
    model = tiny("llama")
    splits = dict.fromkeys(hang_all(model), rows(model))
    with watched(model) as shapes:
        logits_of(model, splits, 0, 7)
    assert sorted(shapes) == [(7, 9), (7 * len(SHARING), 9)]


def test_texts_of_like_length_share_a_batch() -> None:
    model = tiny("llama")
    splits = dict.fromkeys([attached(model, "a", tz.LoRA(r=2))], rows(model, [9, 2, 9, 2, 9, 2]))
    with watched(model) as shapes:
        logits_of(model, splits, 0, 3)
    assert shapes == [(3, 2), (3, 9)]


def test_nothing_is_computed_that_nobody_reads() -> None:
    """No key-value cache, no graph of gradients, and the last feed-forward for the pooled token alone."""
    model = tiny("llama")
    splits = dict.fromkeys([attached(model, "a", tz.LoRA(r=2)), attached(model, "b", tz.IA3())], rows(model))
    seen: list[Any] = []
    model.register_forward_pre_hook(lambda _m, _a, given: seen.append(given["use_cache"]), with_kwargs=True)
    mlp = last_layer_modules(manager_of(model).base)[-1]
    mlp.register_forward_hook(lambda _m, _a, y: seen.append((int(y.flatten(0, 1).any(-1).sum()), y.requires_grad)))
    logits_of(model, splits, 0, 7)
    assert seen[-2:] == [False, (14, False)]


def test_each_adapter_reads_its_own_rows() -> None:
    model = tiny("llama")
    names = [attached(model, "short", tz.LoRA(r=2)), attached(model, "long", tz.PromptTuning(num_virtual_tokens=3))]
    splits = {names[0]: rows(model, cut=4), names[1]: rows(model)}
    found = logits_of(model, splits, 0, 2)
    assert_alone(model, found, splits)
    assert (found["short"] - alone(model, "short", splits["long"])).abs().max() > 1e-2


@pytest.mark.parametrize("method", [tz.PromptTuning(num_virtual_tokens=8), tz.PrefixTuning(num_virtual_tokens=8)])
def test_adapters_without_room_for_each_others_rows(method: tz.Method) -> None:
    """Beside long rows the virtual tokens of another adapter may have no room, though each alone has."""
    model = tiny("gpt2", n_positions=16)
    names = [attached(model, name, m) for name, m in (("a", tz.LoRA(r=2)), ("b", method), ("c", tz.IA3()))]
    long, short = rows(model, [3, 16, 5]), rows(model, [3, 16, 5], cut=8)
    splits = dict(zip(names, (long, short, long), strict=True))
    with watched(model) as shapes:
        found = logits_of(model, splits, 0, 3)
    assert sorted(shapes) == [(3, 8), (6, 16)]
    assert_alone(model, found, splits)
    with pytest.raises(tz.TanzakuError, match=r"16 tokens and 8 virtual tokens make 24.*16 positions"):
        logits_of(model, dict.fromkeys(names, long), 0, 3)
    splits["b"] = rows(model, [3, 7, 5])
    splits["a"] = splits["c"] = rows(model, [3, 8, 5])
    with watched(model) as shapes:
        assert_alone(model, logits_of(model, splits, 0, 3), splits)
    assert shapes[0] == (9, 8)  # where there is room they share the pass


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_texts_that_end_with_the_padding_token(kind: str) -> None:
    """Where it is the end of a text, too, a classifier pools the token before."""
    model = tiny(kind)
    methods = {"lora": tz.LoRA(r=2), "prompt": tz.PromptTuning(num_virtual_tokens=2)}
    names = [attached(model, name, m) for name, m in methods.items()]
    pad = model.config.pad_token_id
    texts = [[5, 6, pad], [7, 8, 9, 4], [3, pad, pad, 9], [pad, 5, pad, pad], [pad]]
    split = Split("data", [row(ids) for ids in texts], [""] * len(texts), 0, "data")
    for batch_size in (1, 5):
        splits = dict.fromkeys(names, split)
        assert_alone(model, logits_of(model, splits, pad, batch_size), splits)


def test_a_module_of_an_adapters_own_in_the_part_that_is_trimmed() -> None:
    model = tiny("llama")
    attached(model, "own", tz.LoRA(r=2, modules_to_save=["score", "mlp"]))
    attached(model, "lora", tz.LoRA(r=2))
    for lengths in ([1, 1], [1, 6], [6, 2]):
        splits = dict.fromkeys(("own", "lora"), rows(model, lengths))
        assert_alone(model, logits_of(model, splits, 0, 2), splits)


def test_the_figures_are_those_of_training(tmp_path: Path) -> None:
    data = task(test=11)
    assert data.test is not None
    model = tiny("llama", num_labels=2)
    settings = TrainSettings(epochs=1, learning_rate=0.02, batch_size=2, eval_batch_size=4)
    methods = {"lora": tz.LoRA(r=2), "prompt": tz.PromptTuning(num_virtual_tokens=3), "full": tz.Full()}
    results = train_jobs(model, data, [Job(name, m, settings) for name, m in methods.items()], out=tmp_path)
    for name in methods:
        tz.load(model, tmp_path / "adapters" / name, name)
    found = records_of(model, data.task, dict.fromkeys(methods, data.test), data.pad_token_id, 4)
    for result in results:
        assert result.predictions is not None
        expected = torch.tensor(result.predictions, dtype=torch.float64)
        assert_close(torch.from_numpy(found[result.name]["probabilities"]), expected, dtype=torch.float32)
        assert data.task.figures(found[result.name]) == pytest.approx(result.test, rel=1e-4)


def test_the_model_is_left_to_its_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two rows, and after an error, the caller's route and gradients are in force."""
    monkeypatch.setattr(inference, "WINDOW", 2)
    model = tiny("llama")
    splits = dict.fromkeys(hang_all(model), rows(model))
    example = {"input_ids": torch.tensor([[5, 6, 7]])}
    tz.activate(model, "lora")
    expected = model(**example).logits
    model.train()
    stream = predictions(model, TASK, splits, 0, 2)
    for _ in range(3):
        next(stream)
        assert not model.training
        found = model(**example).logits
        assert found.requires_grad and close(found, expected)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", fail)
        with pytest.raises(RuntimeError, match="broken"):
            logits_of(model, splits, 0, 2)
    assert manager_of(model).active == "lora"
    assert_close(model(**example).logits, expected)


def test_bad_calls() -> None:
    model = tiny("llama")
    with pytest.raises(tz.TanzakuError, match="attach one"):
        predictions(model, TASK, {"a": rows(model)}, 0, 2)
    names = [attached(model, "a", tz.LoRA(r=2)), attached(model, "b", tz.IA3())]
    split = rows(model)
    bad: list[tuple[dict[str, Split], int, str]] = [
        ({}, 2, "no adapter"),
        ({"aa": split}, 2, "no adapter named 'aa'"),
        (dict.fromkeys(names, split), 0, "batch_size is 0"),
        ({"a": split, "b": rows(model, [2])}, 2, "found 7 for a, 1 for b"),
        ({"a": rows(model, [])}, 2, "no rows"),
    ]
    for splits, batch_size, says in bad:
        for function in (predictions, records_of):
            with pytest.raises(tz.TanzakuError, match=says):
                function(model, TASK, splits, 0, batch_size)


def test_fewer_rows_than_adapters() -> None:
    model = tiny("llama")
    splits = dict.fromkeys(hang_all(model), rows(model, [4]))
    assert_alone(model, logits_of(model, splits, 0, 8), splits)
