"""PVeRA: numbers that are drawn in training, for each job its own, and their means elsewhere."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tanzaku as tz
from close import RUN, assert_close, close
from interop.oracle import copy_trained, in_peft, inputs, logits, scatter
from models import batch, tiny
from tanzaku.core.dropout import JobDropout, JobSlice
from tanzaku.core.manager import manager_of
from tanzaku.core.method import Method
from tanzaku.core.routing import Route
from tanzaku.core.shared import Frozen
from tanzaku.errors import TanzakuError
from tanzaku.train.results import Job
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings
from task_data import task

DATA = replace(task((5, 8, 3), train=6), valid=None)


def weights(out: Path, **jobs: tuple[Method, int]) -> dict[str, Tensor]:
    """Those of job `a`, after all have been trained on a model whose batches are packed where nobody draws."""
    settings = TrainSettings(epochs=2, learning_rate=0.02, adam_epsilon=1e-3, batch_size=2)
    made = [
        Job(name, copy.deepcopy(method), settings.model_copy(update={"seed": seed}))
        for name, (method, seed) in jobs.items()
    ]
    results = train_jobs(tiny("llama", num_labels=2), DATA, made, out=out)
    assert [(r.status, r.error) for r in results] == [("done", None)] * len(made)
    return load_file(out / "adapters" / "a" / "adapter_model.safetensors")


def test_a_run_draws_the_same_alone_and_beside_others(tmp_path: Path) -> None:
    drawn = tz.PVeRA(r=4, init_weights=False)
    alone = weights(tmp_path / "alone", a=(drawn, 1))
    others = {
        "b": (drawn, 2),
        "c": (tz.LoRA(r=2, lora_dropout=0.3), 3),
        "d": (tz.PromptTuning(num_virtual_tokens=2), 4),
    }
    assert_close(weights(tmp_path / "beside", a=(drawn, 1), **others), alone, 4 * RUN)


def test_steps_draw_from_the_first_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting tells it, as a rate of dropout does: the method says it."""
    entered: list[int] = []
    enter = JobDropout.__enter__
    monkeypatch.setattr(JobDropout, "__enter__", lambda self: (entered.append(len(self.shares)), enter(self))[1])
    weights(tmp_path, a=(tz.PVeRA(r=4), 1), b=(tz.LoRA(r=2), 2))
    assert entered == [2] * 6


def opened(model: torch.nn.Module) -> None:
    adapter = tz.attach(model, tz.PVeRA(r=4), "x", seed=0)
    scatter([p for _, p in adapter.trained()])
    tz.activate(model, "x")


def test_training_draws_for_each_row_and_evaluation_draws_nothing() -> None:
    model = tiny("llama")
    opened(model)
    given = {key: value[:1].expand(3, -1) for key, value in batch(model, padding=None).items()}
    state = torch.get_rng_state()
    plain = model(**given).logits
    assert_close(model(**given).logits, plain)
    assert_close(plain[1:], plain[:1].expand(2, -1))
    assert torch.equal(torch.get_rng_state(), state)
    model.train()
    drawn = model(**given).logits
    assert not close(drawn[0], drawn[1]) and not close(drawn, plain) and not close(model(**given).logits, drawn)


def test_a_row_draws_the_same_whatever_shares_the_batch() -> None:
    model = tiny("llama")
    opened(model)
    model.train()
    tz.attach(model, tz.PVeRA(r=6), "y", seed=1)
    ids = batch(model, rows=5, length=6, padding=None)["input_ids"]

    def said(*counts: tuple[str, int]) -> Tensor:
        entries = [name for name, rows in counts for _ in range(rows)]
        ends = torch.tensor([0, *(rows for _, rows in counts)]).cumsum(0).tolist()
        shares = [JobSlice(slice(a, b), 0, 6, seed=a) for a, b in pairwise(ends)]
        route = Route.of(entries)
        with manager_of(model).routed(route), JobDropout(route, shares, 6, 0):
            return model(input_ids=ids[: len(entries)]).logits[:2]

    assert_close(said(("x", 2), ("y", 3)), said(("x", 2)))
    assert not close(said(("x", 2)), said(("y", 2)))


def test_one_draw_is_pefts() -> None:
    """With one target the same seed draws the same numbers in the same order, after those of dropout."""
    base = tiny("llama", "cls")
    given = inputs(base, "pvera")
    settings = {"r": 4, "pvera_dropout": 0.3, "target_modules": ["q_proj", "down_proj"]}
    theirs = in_peft(base, "pvera", settings).train()
    adapter = tz.attach(base, tz.PVeRA.from_settings(settings), "a")
    scatter([p for _, p in adapter.trained()])
    copy_trained(adapter, theirs)
    tz.activate(base, "a")
    base.train()
    outs = []
    for model in (base, theirs):
        torch.manual_seed(5)
        outs.append(logits(model, given))
    assert_close(outs[0], outs[1])
    assert not close(outs[0], logits(base.eval(), given))


@torch.no_grad()
@pytest.mark.parametrize("saved", [True, False])
def test_a_file_without_the_projection_draws_it_again(saved: bool, tmp_path: Path) -> None:
    model, other = tiny("llama"), tiny("llama")
    adapter = tz.attach(model, tz.PVeRA(r=4, save_projection=saved, projection_prng_key=5), "x", seed=0)
    shared = next(layer for _, layer in adapter.at() if isinstance(layer, Frozen))
    assert {n: tuple(t.shape) for n, t in shared.named_buffers()} == {"pvera_A": (8, 32), "pvera_B": (32, 4)}
    scatter([p for _, p in adapter.trained()])
    tz.save(model, "x", tmp_path / "x")
    keys = load_file(tmp_path / "x" / "adapter_model.safetensors").keys()
    assert ("base_model.pvera_A" in keys) == saved
    tz.load(other, tmp_path / "x", "x")
    tz.activate(model, "x")
    tz.activate(other, "x")
    assert_close(other(**batch(model)).logits, model(**batch(model)).logits)


def test_numbers_drawn_outside_of_training_are_refused() -> None:
    with pytest.raises(TanzakuError, match="found sample_at_inference=True, expected False"):
        tz.attach(tiny("llama"), tz.PVeRA(r=4, sample_at_inference=True), "x")
