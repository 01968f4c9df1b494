"""Data of each row that an adapter reads: its own rows' alone, whatever a pass does with rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from bench import zoo
from torch import Tensor, nn

import tanzaku as tz
from close import GRADIENT, PASS, RUN, assert_close
from models import batch, tiny
from tanzaku.core.context import context
from tanzaku.core.manager import manager_of
from tanzaku.core.method import AdapterLayer, ModuleLayer, Place, trainable
from tanzaku.core.routing import Route
from tanzaku.tasks.classification import Classification
from tanzaku.tasks.task import Batch, TaskData
from tanzaku.train.results import Job
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings
from task_data import task


class Reads(ModuleLayer):
    """Adds a projection of what its rows bring along."""

    def __init__(self, like: Tensor):
        super().__init__()
        self.projection = trainable(like.shape[0], 3, like=like, fill=nn.init.normal_)

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        added = context("features", y) @ self.projection.T
        return y + added.view(len(y), *[1] * (y.dim() - 2), -1)


@dataclass
class Conditioned(tz.Method):
    name = "conditioned"
    peft_type = "CONDITIONED"
    paper = summary = "-"
    targets: list[str] = field(default_factory=lambda: ["v_proj", "up_proj"])

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        for path, module in place.base.targets(self.targets):
            yield path, Reads(module.weight)


FEATURES = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Any:
    model = tiny("llama", num_labels=2)
    for name in ("a", "b"):
        tz.attach(model, Conditioned(modules_to_save=[]), name, seed=ord(name))
    return model


def logits(model: Any, entries: list[Any], features: Tensor | None, **inputs: Tensor) -> Tensor:
    with tz.route(model, entries, context=None if features is None else {"features": features}):
        return model(**inputs).logits


def test_each_row_has_its_own(model: Any) -> None:
    inputs, entries = batch(model), ["a", "b", None, "a"]
    together = logits(model, entries, FEATURES, **inputs)
    for row, entry in enumerate(entries):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        alone = logits(model, [entry], None if entry is None else FEATURES[row : row + 1], **one)
        assert_close(together[row : row + 1], alone, PASS)
    other = logits(model, entries, FEATURES.flip(0), **inputs)
    assert not torch.allclose(other[0], together[0], atol=1e-3), "the data makes no difference"
    assert_close(other[2], together[2], PASS)
    assert_close(logits(model, ["a"], FEATURES, **inputs)[[0, 3]], together[[0, 3]], PASS)


def test_a_batch_of_a_multiple_of_rows_repeats_it(model: Any) -> None:
    inputs, entries = batch(model), ["a", "b", None, "a"]
    double = {key: value.repeat_interleave(2, 0) for key, value in inputs.items()}
    once = logits(model, entries, FEATURES, **inputs)
    assert_close(logits(model, entries, FEATURES, **double), once.repeat_interleave(2, 0), PASS)


def test_a_checkpointed_layer_reads_what_its_first_run_read(model: Any) -> None:
    inputs, entries = batch(model), ["a", "b", None, "a"]

    def gradients() -> list[Tensor]:
        model.zero_grad()
        loss = logits(model, entries, FEATURES, **inputs).square().sum()
        with tz.route(model, ["b"] * 4, context={"features": -FEATURES}):  # another pass is under way by now
            loss.backward()
        return [p.grad.clone() for _, p in manager_of(model).get("a").trained()]

    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for found, expected in zip(gradients(), plain, strict=True):
        assert float(expected.abs().max()) > 0
        assert_close(found, expected, GRADIENT)


def test_what_is_missing_or_does_not_fit_is_told(model: Any) -> None:
    inputs = batch(model)
    with pytest.raises(tz.TanzakuError, match=r"reads 'features' of each row, and was given none: route\(model, .*"):
        logits(model, ["a"], None, **inputs)
    with (
        tz.route(model, ["a"], context={"feature": FEATURES}),
        pytest.raises(tz.TanzakuError, match="given 'feature'"),
    ):
        model(**inputs)
    with pytest.raises(tz.TanzakuError, match="found 4 rows where 3 have data; expected as many, or a multiple"):
        logits(model, ["a"], FEATURES[:3], **inputs)
    with pytest.raises(tz.TanzakuError, match="found list for 'features', expected a tensor"):
        logits(model, ["a"], FEATURES.tolist(), **inputs)  # type: ignore[arg-type]
    with (
        pytest.raises(tz.TanzakuError, match="4 for features, 3 for more; expected one entry a row"),
        tz.route(model, ["a"], context={"features": FEATURES, "more": FEATURES[:3]}),
    ):
        pass


def test_it_is_the_models_own_and_the_routes_own(model: Any) -> None:
    other = tiny("llama", num_labels=2)
    tz.attach(other, Conditioned(modules_to_save=[]), "x", seed=3)
    tz.activate(other, "x")
    inputs = batch(model)
    with tz.route(model, ["a"], context={"features": FEATURES}):
        expected = model(**inputs).logits
        for inner in (other, model):
            entry = "x" if inner is other else "a"
            with pytest.raises(tz.TanzakuError, match="given none"), tz.route(inner, [entry]):
                inner(**inputs)
        with pytest.raises(tz.TanzakuError, match="given none"):
            other(**inputs)
        assert_close(model(**inputs).logits, expected)


@pytest.mark.parametrize(("kind", "target"), [("xlnet", "ff.layer_1"), ("switch_transformers", "wi")])
def test_rows_that_are_not_the_first_dimension_are_found_or_refused(kind: str, target: str) -> None:
    """Sequence first, rows are the second; experts have tokens before them."""
    subject = zoo.NAMES[kind]
    model = subject.build()
    tz.attach(model, Conditioned(targets=[target], modules_to_save=[]), "a", seed=0)
    for length in (4, 6, 8):
        inputs = {"input_ids": torch.randint(3, 20, (2, length))}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]

        def run(features: Tensor, inputs: Any = inputs) -> Tensor:
            with tz.route(model, ["a", "a"], context={"features": features}):
                return model(**inputs).logits.detach()

        if kind == "switch_transformers":
            with pytest.raises(tz.TanzakuError, match="does not have the batch's rows in its first dimension"):
                run(FEATURES[:2])
            continue
        before = run(FEATURES[:2])
        after = run(FEATURES[[0, 2]])
        assert_close(after[0], before[0], PASS)
        assert not torch.allclose(after[1], before[1], atol=1e-3)


def test_compiled_layers_that_are_checkpointed_read_their_own(model: Any) -> None:
    """Compiled code sees no context variables."""
    inputs, entries = batch(model), ["a", "b", None, "a"]

    def gradients() -> list[Tensor]:
        model.zero_grad()
        loss = logits(model, entries, FEATURES, **inputs).square().sum()
        with tz.route(model, ["b"] * 4, context={"features": -FEATURES}):
            loss.backward()
        return [p.grad.clone() for _, p in manager_of(model).get("a").trained()]

    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if type(module).__name__.endswith("MLP"):
            module.compile(backend="eager")
    for found, expected in zip(gradients(), plain, strict=True):
        assert_close(found, expected, GRADIENT)


def test_a_part_of_a_route_has_what_the_whole_has_now() -> None:
    """Parts are kept from batch to batch, and a task gives new data with each."""
    whole = Route.of(["a", "b"])
    part = whole.alone(0)
    assert not part.has_context
    whole.context = {"features": FEATURES}
    assert part.has_context


class WithFeatures(Classification):
    """Classification whose rows bring along what is their own, by their tokens."""

    def collate(self, examples: Any, pad_token_id: int, width: int = 0) -> Batch:
        own = [[len(e.inputs["input_ids"]) / 10, e.inputs["input_ids"][0] / 50, 1.0] for e in examples]
        return replace(super().collate(examples, pad_token_id, width), context={"features": torch.tensor(own)})


@pytest.mark.parametrize("accelerations", ["auto", "none"])
def test_a_task_gives_it_to_a_shared_step(accelerations: str) -> None:
    """Rows of unlike length, packed or not, beside another method's: each job comes to what it comes to alone."""
    data: TaskData = task()
    data = replace(data, task=WithFeatures(("a", "b")))
    settings = TrainSettings(epochs=2, batch_size=2, learning_rate=0.01, accelerations=accelerations)
    jobs = [Job("lora", tz.LoRA(r=2), settings)]
    jobs += [Job(name, Conditioned(), settings.model_copy(update={"seed": ord(name)})) for name in "ab"]
    together = train_jobs(tiny("llama", num_labels=2), data, jobs, rows_per_step=6)
    for job, found in zip(jobs, together, strict=True):
        (alone,) = train_jobs(tiny("llama", num_labels=2), data, [job], rows_per_step=2)
        assert found.status == alone.status == "done", (found.error, alone.error)
        assert_close(found.predictions, alone.predictions, RUN)
        assert_close(found.epochs[-1].valid, alone.epochs[-1].valid, RUN)
