"""Law of draws: what a method draws in training is each row's and each job's own, and elsewhere it draws nothing."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from variants import CASES, all_variants, attached, bamboo, batch, method

import tanzaku as tz
from close import RUN, assert_close, close
from tanzaku.core.dropout import JobDropout, JobSlice
from tanzaku.core.manager import manager_of
from tanzaku.core.routing import Route
from tanzaku.methods import METHODS
from tanzaku.train.results import Job
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings
from tanzaku.train.step import _drops
from task_data import task

all_that_draw = pytest.mark.parametrize(("name", "variant"), [case for case in CASES if METHODS[case[0]].draws])


@all_variants
def test_what_draws_says_so(name, variant):
    """By `draws`, or by a setting that drops: a run leaves out what keeps jobs' draws apart where nobody draws."""
    model = bamboo()
    adapter = attached(model, name, variant)
    tz.activate(model, name)
    model.train()
    state = torch.get_rng_state()
    model(**batch(model))
    drew = not torch.equal(torch.get_rng_state(), state)
    assert not drew or METHODS[name].draws or _drops(adapter.method.settings())


@all_that_draw
def test_training_draws_for_each_row_and_evaluation_draws_nothing(name, variant):
    model = bamboo()
    attached(model, name, variant)
    tz.activate(model, name)
    given = {key: value[:1].expand(3, -1) for key, value in batch(model, padding=None).items()}
    state = torch.get_rng_state()
    plain = model(**given).logits
    assert_close(model(**given).logits, plain)
    assert_close(plain[1:], plain[:1].expand(2, -1))
    assert torch.equal(torch.get_rng_state(), state)
    model.train()
    drawn = model(**given).logits
    assert not close(drawn[0], drawn[1]) and not close(drawn, plain) and not close(model(**given).logits, drawn)


@pytest.mark.parametrize("tokens", [4, 8])
@all_that_draw
def test_a_row_draws_the_same_whatever_shares_the_batch(name, variant, tokens):
    """Its job's rows may be shorter than the batch, and numbers that are drawn may be as many as its tokens."""
    model = bamboo()
    attached(model, name, variant)
    attached(model, name, as_="other")
    model.train()
    own = tokens - 2
    whole = batch(model, rows=5, length=tokens, padding=None)["input_ids"]

    def said(width: int, seed: int, *jobs: tuple[str, int]) -> Tensor:
        entries = [each for each, rows in jobs for _ in range(rows)]
        ids = whole[: len(entries), :width].clone()
        mask = torch.ones_like(ids)
        ids[:2, own:], mask[:2, own:] = 0, 0
        ends = torch.tensor([0, *(rows for _, rows in jobs)]).cumsum(0).tolist()
        places = zip(pairwise(ends), (own, tokens), strict=False)
        shares = [JobSlice(slice(a, b), 0, wide, seed=seed + a) for (a, b), wide in places]
        route = Route.of(entries)
        with manager_of(model).routed(route), JobDropout(route, shares, width, 0):
            out: Tensor = model(input_ids=ids, attention_mask=mask).logits
        return out[:2]

    alone = said(own, 0, (name, 2))
    assert_close(said(tokens, 0, (name, 2), ("other", 3)), alone)
    assert not close(said(own, 1, (name, 2)), alone)


def weights(out: Path, *jobs: tuple[str, tz.Method]) -> dict[str, Tensor]:
    """Those of the first job, after all have been trained on a model whose batches are packed where nobody draws."""
    made = [
        Job(name, of, TrainSettings(epochs=2, learning_rate=0.002, adam_epsilon=1e-3, batch_size=2, seed=number))
        for number, (name, of) in enumerate(jobs)
    ]
    results = train_jobs(bamboo(num_labels=2), task((5, 8, 3), train=6), made, out=out, workers=1)
    assert [(r.status, r.error) for r in results] == [("done", None)] * len(made)
    return load_file(out / "adapters" / jobs[0][0] / "adapter_model.safetensors")


@all_that_draw
def test_a_run_draws_the_same_alone_and_beside_others(name, variant, tmp_path):
    def this() -> tuple[str, tz.Method]:
        return "this", method(name, variant)

    beside = [
        ("alike", method(name, variant)),
        ("drops", tz.LoRA(r=2, lora_dropout=0.3)),
        ("longer", tz.PromptTuning(num_virtual_tokens=2)),
    ]
    among = weights(tmp_path / "among", this(), *beside)
    assert_close(among, weights(tmp_path / "alone", this()), 4 * RUN, scale=0.01)


@all_that_draw
def test_steps_draw_from_the_first_on(name, variant, monkeypatch, tmp_path):
    """No setting tells it, as a rate of dropout does: the method says it."""
    entered: list[int] = []
    enter = JobDropout.__enter__
    monkeypatch.setattr(JobDropout, "__enter__", lambda self: (entered.append(len(self.shares)), enter(self))[1])
    weights(tmp_path, ("this", method(name, variant)), ("quiet", tz.LoRA(r=2)))
    assert entered[0] == 2 and len(entered) >= 6
