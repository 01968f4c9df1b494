"""Dropout of rows that share a batch: each job's masks are its own, whoever is beside it, whenever they are drawn."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tanzaku as tz
from close import GRADIENT, RUN, assert_close, close
from models import tiny
from tanzaku.core import dropout as module
from tanzaku.core.dropout import JobDropout, JobSlice, mark, replayed, rewind
from tanzaku.core.method import Method
from tanzaku.core.routing import Route
from tanzaku.methods.lora_layers import LoraDelta
from tanzaku.train.active_job import ActiveJob
from tanzaku.train.results import Job
from tanzaku.train.scheduler import JobScheduler
from tanzaku.train.settings import TrainSettings
from task_data import task

DATA = replace(task((5, 8, 3), train=6), valid=None)
FAST = TrainSettings(epochs=1, learning_rate=0.02, adam_epsilon=1e-3)


@dataclass
class Part:
    """What one job brings to a batch: rows, own tokens of the longest, virtual tokens, and its seed."""

    rows: int = 2
    tokens: int = 6
    virtual: int = 0
    seed: int = 1


def noise_of(*parts: Part, width: int | None = None, lead: int | None = None) -> JobDropout:
    shares, start = [], 0
    for part in parts:
        shares.append(JobSlice(slice(start, start + part.rows), part.virtual, part.tokens, part.seed))
        start += part.rows
    route = Route.of([f"job-{n}" for n, part in enumerate(parts) for _ in range(part.rows)])
    width = max(p.tokens for p in parts) if width is None else width
    return JobDropout(route, shares, width, max(p.virtual for p in parts) if lead is None else lead)


def drawn(*parts: Part, p: float = 0.5, calls: int = 1, features: int = 4, **sizes: int) -> list[list[Tensor]]:
    """Masks of hidden states, for each call those of each part, at its own places."""
    mode = noise_of(*parts, **sizes)
    x = torch.ones(mode.rows, mode.lead + mode.width, features)
    out = []
    with mode:
        for _ in range(calls):
            y = F.dropout(x, p)
            out.append([y[s.rows, : s.virtual + s.tokens] for s in mode.shares])
    return out


# -- whose masks they are

parts = st.builds(Part, st.integers(1, 3), st.integers(1, 7), st.integers(0, 3), st.integers(0, 2**63 - 1))


@given(st.lists(parts, min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 2))
def test_a_mask_hangs_on_the_job_and_the_call_alone(batch: list[Part], padding: int, fillers: int) -> None:
    """Whoever shares the batch, however wide it is, and at whichever end of it the job stands."""
    width, lead = max(p.tokens for p in batch) + padding, max(p.virtual for p in batch) + fillers
    together = drawn(*batch, calls=2, width=width, lead=lead)
    for number, part in enumerate(batch):
        alone = drawn(part, calls=2)
        for call in range(2):
            assert torch.equal(together[call][number], alone[call][0])


@given(parts, st.integers(1, 3), st.booleans())
def test_a_mask_of_attention_hangs_on_the_job_alone_too(part: Part, heads: int, decoder: bool) -> None:
    """Queries and keys are both tokens; beside an encoder that has the virtual tokens, a decoder has none."""
    other = Part(rows=2, tokens=9, virtual=2, seed=5)

    def draw(*batch: Part) -> Tensor:
        mode = noise_of(*batch)
        queries = mode.width if decoder else mode.lead + mode.width
        share = mode.shares[-1]
        with mode:
            y = F.dropout(torch.ones(mode.rows, heads, queries, mode.lead + mode.width), 0.5)
        own = slice(share.virtual + share.tokens)
        return y[share.rows, :, slice(share.tokens) if decoder else own, own]

    assert torch.equal(draw(other, part), draw(part))


def test_a_row_of_features_has_no_tokens() -> None:
    """A pooled row is dropped by row and feature, even where it has as many features as there are tokens."""

    def draw(*batch: Part) -> Tensor:
        mode = noise_of(*batch)
        with mode:
            return F.dropout(torch.ones(mode.rows, 10), 0.5)[mode.shares[-1].rows]

    part = Part(rows=3, tokens=4)
    assert torch.equal(draw(part), draw(Part(tokens=10, seed=9), part)) and 0 < (draw(part) == 0).sum() < 30


def test_masks_differ_between_jobs_calls_and_batches() -> None:
    rows = Part(rows=3, tokens=20)
    [first, second] = drawn(rows, replace(rows, seed=2), calls=2)
    every = [*first, *second]
    assert not any(torch.equal(a, b) for n, a in enumerate(every) for b in every[:n])
    seen = set()
    with pool_of([job("a"), job("b", seed=1)]) as scheduler:
        scheduler._admit()
        for active in scheduler.active_jobs.values():
            for _ in range(6):
                seen.add(active.dropout_seed)
                active.batch += 1
    assert len(seen) == 12 and all(0 <= seed < 2**63 for seed in seen)


@settings(max_examples=20)
@given(st.floats(0.05, 0.95), st.integers(0, 10**6))
def test_a_share_of_numbers_is_lost_and_the_rest_scaled_up(p: float, seed: int) -> None:
    [[mask]] = drawn(Part(rows=4, tokens=25, seed=seed), p=p, features=50)
    lost = float((mask == 0).float().mean())
    assert abs(lost - p) < 6 * math.sqrt(p * (1 - p) / mask.numel())
    assert torch.allclose(mask[mask != 0], torch.tensor(1 / (1 - p)))


def test_rows_of_a_job_differ_from_each_other() -> None:
    [[mask]] = drawn(Part(rows=3, tokens=10))
    assert not torch.equal(mask[0], mask[1]) and not torch.equal(mask[:, 0], mask[:, 1])


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_nothing_or_everything(p: float) -> None:
    x = torch.randn(2, 6, 4, requires_grad=True)
    with noise_of(Part()) as mode:
        y = F.dropout(x, p)
    assert torch.equal(y, x if p == 0 else torch.zeros_like(x))
    assert mode.shares[0].drew == (p > 0)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 1 - p))


def test_evaluation_loses_nothing() -> None:
    x, q = torch.randn(2, 6, 4), torch.randn(2, 2, 6, 4)
    with noise_of(Part()) as mode:
        for y in (F.dropout(x, 0.5, training=False), nn.Dropout(0.5).eval()(x), torch.dropout(x, 0.5, False)):
            assert torch.equal(y, x)
        attended = F.scaled_dot_product_attention(q, q, q, dropout_p=0.0)
    assert attended.shape == (2, 2, 6, 4) and not mode.shares[0].drew


def test_every_way_to_call_dropout_draws_the_same() -> None:
    x = torch.randn(2, 6, 4)
    ways = {
        "function": lambda x: F.dropout(x, 0.5),
        "named": lambda x: F.dropout(input=x, p=0.5, training=True),
        "in place": lambda x: F.dropout(x, 0.5, True, True),
        "module": nn.Dropout(0.5),
        "module in place": nn.Dropout(0.5, inplace=True),
        "torch": lambda x: torch.dropout(x, 0.5, True),
        "torch, named": lambda x: torch.dropout(x, p=0.5, train=True),
        "torch, in place": lambda x: torch.dropout_(x, 0.5, True),
        "torch, in place, named": lambda x: torch.dropout_(x, p=0.5, train=True),
    }
    results = {}
    for name, way in ways.items():
        with noise_of(Part()):
            given_x = x.clone()
            results[name] = way(given_x)
            if "in place" in name:
                assert results[name] is given_x, name
            else:
                assert torch.equal(given_x, x), name
    assert all(torch.equal(y, results["function"]) for y in results.values())
    assert 0 < (results["function"] == 0).sum() < x.numel()


def test_gradients_go_where_numbers_went() -> None:
    x = torch.randn(2, 6, 4, requires_grad=True)
    with noise_of(Part()):
        y = F.dropout(x, 0.25)
    y.sum().backward()
    assert x.grad is not None and torch.equal(y.detach(), x.detach() * x.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_mask_has_the_type_of_what_it_masks(dtype: torch.dtype) -> None:
    with noise_of(Part()):
        y = F.dropout(torch.ones(2, 6, 4, dtype=dtype), 0.5)
    assert y.dtype == dtype and set(y.flatten().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("shape", [(1, 16, 4), (5, 4), (3, 6, 4), (2, 7, 4), (2, 3, 5, 5)], ids=str)
def test_what_cannot_be_told_apart_by_job_is_refused(shape: tuple[int, ...]) -> None:
    """Tokens that were gathered, or no tokens of this batch. One job draws for all of it."""
    x = torch.ones(*shape)
    with noise_of(Part(rows=1), Part(rows=1)), pytest.raises(tz.TanzakuError, match="2 jobs cannot share a batch"):
        F.dropout(x, 0.5)
    masks = []
    for seed in (1, 1, 2):
        with noise_of(Part(rows=2, seed=seed)):
            masks.append(F.dropout(x, 0.5))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_rows_that_are_folded_are_split_by_job() -> None:
    """Choices of a row, heads of a row, and the tokens of all rows one after another."""

    def draw(shape: Sequence[int], *batch: Part) -> Tensor:
        mode = noise_of(*batch, width=6)
        with mode:
            y = F.dropout(torch.ones(mode.rows * shape[0], *shape[1:]), 0.5)
        return y.view(mode.rows, -1)[mode.shares[-1].rows]

    part, other = Part(rows=2, tokens=6, seed=3), Part(rows=3, seed=9)
    for shape in ((3, 6, 4), (6, 4)):
        alone = draw(shape, part)
        assert torch.equal(alone, draw(shape, other, part)) and 0 < (alone == 0).sum() < alone.numel()
        assert not torch.equal(alone, draw(shape, replace(part, seed=4)))


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)


@pytest.mark.parametrize("shared", [True, False])
def test_a_table_loses_nothing_and_rows_elsewhere_are_refused(shared: bool) -> None:
    model, x = Positions(), torch.ones(4, 6, 4)
    if shared:
        with pytest.warns(UserWarning, match=r"Positions\.drop .* a table that all rows read"):
            handles = module.watch(model, [("drop", True)])
    else:
        handles = module.watch(model, [("drop", False)])
    with noise_of(Part(), Part(seed=2)):
        if shared:
            assert torch.equal(model.drop(x), x)
        else:
            with pytest.raises(tz.TanzakuError, match=r"^drop: .* 2 jobs cannot share"):
                model.drop(x)
        assert not torch.equal(F.dropout(x, 0.5), x), "elsewhere it is as ever"
    for handle in handles:
        handle.remove()


def test_an_adapter_draws_for_its_own_rows() -> None:
    """While a stack's adapter layers run, what they drop is one job's, by its own count of calls."""
    part = Part(rows=2, tokens=6, seed=7)
    [[_], [expected]] = drawn(part, calls=2)
    with noise_of(Part(rows=3, seed=2), part) as mode:
        F.dropout(torch.ones(5, 6, 4), 0.5)
        with mode.route.running(1):
            found = F.dropout(torch.ones(2, 6, 4), 0.5)
    assert torch.equal(found, expected)
    assert [share.calls for share in mode.shares] == [1, 2]


def test_keys_of_an_adapter_stand_before_the_layers_own() -> None:
    """A prefix's keys are dropped too; the rest of the mask lies at the job's own tokens, whatever the padding."""

    def draw(tokens: int, *others: Part) -> Tensor:
        part = Part(rows=2, tokens=4, virtual=1, seed=3)
        mode = noise_of(part, *others)
        keys = mode.lead + mode.width
        with mode, mode.route.running(0, keys):
            y = F.dropout(torch.ones(2, 2, keys, tokens + keys), 0.5)
        own = range(1 + 4)
        return y[:, :, list(own)][..., [*range(tokens), *(tokens + at for at in own)]]

    alone = draw(3)
    assert alone.shape == (2, 2, 5, 8)
    assert torch.equal(alone, draw(3, Part(tokens=9, virtual=2, seed=4)))


def test_what_was_drawn_in_vain_is_drawn_again() -> None:
    x = torch.ones(4, 6, 4)
    with noise_of(Part(seed=1), Part(seed=2)):
        before = mark()
        first = F.dropout(x, 0.5)
        rewind(before, 1)
        second = F.dropout(x, 0.5)
    assert torch.equal(first[2:], second[2:]) and not torch.equal(first[:2], second[:2])
    rewind(before, 0)
    assert mark() is None


# -- attention


def explicit(q: Tensor, k: Tensor, v: Tensor, added: Tensor, scale: float, mask: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    attends = added > -math.inf
    scores = q @ k.transpose(-2, -1) * scale + added.where(attends, 0.0)
    return scores.where(attends, -1e9).softmax(-1) * attends * mask @ v


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "boolean": {"attn_mask": "boolean"},
    "float": {"attn_mask": "float"},
    "scaled": {"scale": 0.3},
    "grouped": {"enable_gqa": True},
    "all": {"attn_mask": "boolean", "scale": 0.3, "enable_gqa": True},
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_that_drops_is_attention_with_a_mask(kind: str) -> None:
    options = dict(ATTENTION[kind])
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows, heads, tokens = 3, 4, 6
    kv_heads = 2 if options.get("enable_gqa") else heads
    q, k, v = random(rows, heads, tokens, 8), random(rows, kv_heads, tokens, 8), random(rows, kv_heads, tokens, 8)
    added = torch.zeros(rows, 1, tokens, tokens)
    if options.get("is_causal"):
        added.masked_fill_(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -math.inf)
    match options.get("attn_mask"):
        case "boolean":
            attends = random(rows, 1, tokens, tokens) > -0.5
            attends[0, :, 0] = False  # a token that attends to nothing, such as padding on the left
            added = torch.zeros_like(added).masked_fill(~attends, -math.inf)
            options["attn_mask"] = attends
        case "float":
            added = random(rows, 1, tokens, tokens)
            added[0, :, 0] = added[1, :, :, 2:] = -math.inf
            options["attn_mask"] = added
    inputs = [x.requires_grad_() for x in (q, k, v)]
    part = Part(rows=rows, tokens=tokens)
    with noise_of(part):
        mask = F.dropout(torch.ones(rows, heads, tokens, tokens), 0.4)
    with noise_of(part):
        found = F.scaled_dot_product_attention(*inputs, dropout_p=0.4, **options)
    expected = explicit(q, k, v, added, options.get("scale", 8**-0.5), mask)
    assert_close(found, expected)
    weights = random(*found.shape)
    gradients = [torch.autograd.grad((y * weights).sum(), inputs, retain_graph=True) for y in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other)
        assert one.isfinite().all()
    # With next to nothing lost it is torch's own.
    with noise_of(part):
        nearly = F.scaled_dot_product_attention(*inputs, dropout_p=1e-9, **options)
    plain = F.scaled_dot_product_attention(*inputs, **options)
    assert_close(nearly, plain)
    with noise_of(part):
        assert_close(F.scaled_dot_product_attention(*inputs, **options), plain, at="nothing to drop")


def test_attention_that_drops_is_plain_attention_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 4, generator=generator) for _ in range(3))
    total = torch.zeros(1, 2, 5, 4)
    with noise_of(Part(rows=1, tokens=5)):
        for _ in range(600):
            total += F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    torch.testing.assert_close(total / 600, F.scaled_dot_product_attention(q, k, v), atol=0.12, rtol=0)


# -- layers that run again


def layer(x: Tensor) -> Tensor:
    return F.dropout(F.dropout(x.tanh(), 0.5).exp(), 0.3)


@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_layer_draws_again_what_it_drew(thread: bool, reentrant: bool) -> None:
    """In the thread of the forward pass or, as on a GPU, in one in which the mode is not in force."""

    def run(checkpointed: bool) -> list[Tensor]:
        x = torch.linspace(-1, 1, 48).view(2, 6, 4).requires_grad_()
        with noise_of(Part()) as mode:
            if checkpointed:
                # Two layers run again, the last one first, with calls between and behind them.
                y = F.dropout(checkpoint(replayed(layer), x, use_reentrant=reentrant), 0.1)
                y = checkpoint(replayed(layer), y, use_reentrant=reentrant)
            else:
                y = layer(F.dropout(layer(x), 0.1))
            loss = F.dropout(y, 0.1).sum()
            counts = [share.calls for share in mode.shares]
            if thread:
                failures: list[BaseException] = []

                def backward() -> None:
                    try:
                        loss.backward()
                        assert not torch._C._len_torch_function_stack()
                    except BaseException as error:
                        failures.append(error)

                other = threading.Thread(target=backward)
                other.start()
                other.join()
                assert not failures
            else:
                loss.backward()
            assert [share.calls for share in mode.shares] == counts
            assert module._current.get() is mode
            after = F.dropout(torch.ones(2, 6, 4), 0.5)
        assert x.grad is not None
        return [loss.detach(), x.grad, after]

    assert_close(run(True), run(False), GRADIENT)


def test_a_layer_that_runs_again_elsewhere_is_left_alone_without_noise() -> None:
    assert replayed(layer) is layer


@pytest.mark.parametrize("method", [tz.LoRA(r=2, lora_dropout=0.4), tz.PrefixTuning(num_virtual_tokens=2)])
def test_a_model_that_is_recomputed_in_another_thread(method: Method) -> None:
    """Gradients of a shared step are those without checkpointing."""
    found = []
    for checkpointing in (False, True):
        model = tiny("llama", num_labels=2, attention_dropout=0.3)
        jobs = [job("a", method), job("b", tz.IA3()), job("c", tz.PromptTuning(num_virtual_tokens=2), batch_size=2)]
        jobs = [
            replace(j, settings=j.settings.model_copy(update={"gradient_checkpointing": checkpointing})) for j in jobs
        ]
        with pool_of(jobs, model) as scheduler:
            scheduler._admit()
            active_jobs = list(scheduler.active_jobs.values())
            with scheduler.step.losses(active_jobs, [active.examples() for active in active_jobs]) as losses:
                other = threading.Thread(target=sum(losses[1:], losses[0]).backward)
                other.start()
                other.join()
            found.append([p.grad for active in active_jobs for p in active.trained])
    for plain, recomputed in zip(*found, strict=True):
        assert_close(recomputed, plain, GRADIENT)


# -- whole runs


def job(name: str, method: Method | None = None, **changes: Any) -> Job:
    options = {"seed": sum(map(ord, name)), **changes}
    return Job(name, method or tz.LoRA(r=2), FAST.model_copy(update=options))


def pool_of(jobs: Sequence[Job], model: Any = None, **options: Any) -> JobScheduler:
    scheduler = JobScheduler(tiny("llama", num_labels=2) if model is None else model, DATA, **options)
    scheduler.add(jobs)
    return scheduler


def weights(jobs: Sequence[Job], model: Any = None, **options: Any) -> dict[str, list[Tensor]]:
    active_jobs: dict[str, ActiveJob] = {}
    with pool_of(jobs, model, **options) as scheduler:
        scheduler._admit()
        active_jobs.update(scheduler.active_jobs)
        scheduler.run()
        assert [(r.status, r.error) for r in scheduler.results.values()] == [("done", None)] * len(jobs)
    return {name: [p.detach() for p in active.trained] for name, active in active_jobs.items()}


def test_a_prompt_encoder_that_drops_between_its_layers_draws_for_itself() -> None:
    def prompt(dropout: float) -> Job:
        encoder = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8, "encoder_num_layers": 3}
        return job("p", tz.PTuning(num_virtual_tokens=3, encoder_dropout=dropout, **encoder))

    others = [job("a", tz.LoRA(r=2, lora_dropout=0.3)), job("b", tz.PromptTuning(num_virtual_tokens=5), batch_size=2)]
    alone = weights([prompt(0.4)])["p"]
    torch.manual_seed(1234)
    among = weights([*others, prompt(0.4)])["p"]
    for one, other in zip(alone, among, strict=True):
        assert_close(other, one, GRADIENT)
    without = weights([prompt(0.0)])["p"]
    assert max(float((a - b).abs().max()) for a, b in zip(alone, without, strict=True)) > 1e-2


def test_an_encoder_draws_for_the_job_whose_layers_run() -> None:
    torch.manual_seed(0)
    encoder = nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True)
    x = torch.randn(1, 3, 4)

    def encoded(*seeds: int) -> Tensor:
        mode = noise_of(*(Part(rows=1, seed=seed) for seed in seeds))
        with mode, mode.route.running(len(seeds) - 1):
            out: Tensor = encoder(x)[0]
        assert mode.shares[-1].calls == 1 and not any(share.calls for share in mode.shares[:-1])
        return out

    assert_close(encoded(1, 9), encoded(2, 3, 9))
    assert not close(encoded(1, 9), encoded(1, 8))


def dropping() -> list[Job]:
    lstm = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8, "encoder_dropout": 0.3}
    return [
        job("a", tz.LoRA(r=2, lora_dropout=0.3)),
        job("b", tz.AdaLoRA(init_r=2, target_r=1, lora_dropout=0.3)),
        job("p", tz.PTuning(num_virtual_tokens=3, **lstm)),
        job("f", tz.PrefixTuning(num_virtual_tokens=3)),
        job("full", tz.Full(), learning_rate=1e-4),
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_torchs_own_numbers_are_left_alone(checkpointing: bool) -> None:
    """A run draws nothing from the global generator, and what is drawn from it changes no run."""
    jobs = [
        replace(j, settings=j.settings.model_copy(update={"gradient_checkpointing": checkpointing})) for j in dropping()
    ]
    runs = []
    for seed in (1, 2):
        model = tiny("llama", num_labels=2, attention_dropout=0.2)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        with pool_of(jobs, model) as scheduler:
            scheduler.run()
            lost = [r.epochs[0].train_loss for r in scheduler.results.values()]
        assert torch.equal(torch.get_rng_state(), state)
        runs.append(lost)
    assert_close(runs[1], runs[0], RUN)


def test_the_mode_is_left_out_where_nobody_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs time at every operation. A job that draws turns it on for all in its step."""
    entered: list[int] = []
    enter = JobDropout.__enter__
    monkeypatch.setattr(JobDropout, "__enter__", lambda self: (entered.append(len(self.shares)), enter(self))[1])
    weights([job("a"), job("b", tz.IA3())])
    assert entered == [], "settings tell that nothing is dropped"
    weights(
        [job("a"), job("b", tz.IA3())],
        tiny("bert", num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    )
    assert entered == [2], "once, to see"
    entered.clear()
    weights([job("a"), job("b", tz.LoRA(r=2, lora_dropout=0.1))])
    assert entered == [2] * 6


# -- other random numbers


DRAWS: dict[str, Any] = {
    "rand": lambda x: torch.rand(len(x), 1, 1),
    "rand, a size": lambda x: torch.rand((len(x), 1, 4), dtype=torch.float64),
    "randn": lambda x: torch.randn(len(x), 6, 4),
    "randint": lambda x: torch.randint(0, 1000, (len(x), 6, 4)),
    "randint, named": lambda x: torch.randint(high=1000, size=(len(x), 6, 4)),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint_like": lambda x: torch.randint_like(x, 1000),
    "bernoulli": lambda x: torch.bernoulli(0.5 * x),
    "bernoulli_": lambda x: x.clone().bernoulli_(0.5),
    "uniform_": lambda x: torch.empty_like(x).uniform_(0.9, 1.1),
    "normal_": lambda x: x.clone().normal_(),
    "exponential_": lambda x: x.clone().exponential_(),
    "gumbel": lambda x: F.gumbel_softmax(x),
    "distribution": lambda x: torch.distributions.Normal(x, 1.0).sample(),
    "heads": lambda x: F.multi_head_attention_forward(
        *(x.transpose(0, 1),) * 3, 4, 2, torch.eye(12, 4) + 0.1, None, None, None, False, 0.5, torch.eye(4), None
    )[0].transpose(0, 1),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_every_draw_is_a_jobs_own(kind: str) -> None:
    """As stochastic depth draws a number a row, and routers noise for each token."""

    def draw(*batch: Part) -> Tensor:
        mode = noise_of(*batch)
        x = torch.ones(mode.rows, 6, 4)
        state = torch.get_rng_state()
        with mode:
            y: Tensor = DRAWS[kind](x)
        assert torch.equal(torch.get_rng_state(), state), "torch's own numbers are left alone"
        return y[mode.shares[-1].rows]

    part, other = Part(rows=2, seed=3), Part(rows=3, seed=9)
    alone = draw(part)
    torch.testing.assert_close(alone, draw(other, part))
    assert not torch.equal(alone, draw(replace(part, seed=4)))
    assert not torch.equal(alone[0], alone[1])


def test_a_layer_that_is_left_out_by_chance() -> None:
    """At a rate of 0 or 1 there is no chance; else one job draws for itself, and several are refused."""
    with noise_of(Part(), Part(seed=2)) as mode:
        assert not torch.rand([]) < 0.0 and torch.rand([]) <= 1
        assert [share.calls for share in mode.shares] == [0, 0]
        for use in (lambda x: x < 0.5, float, lambda x: x < 0.3, lambda x: x.item(), lambda x: x + 1):
            with pytest.raises(tz.TanzakuError, match="left out by chance"):
                use(torch.rand([]))
    drawn = []
    for seed in (1, 1, 2):
        with noise_of(Part(seed=seed)) as mode:
            drawn.append([bool(torch.rand([]) < 0.5) for _ in range(40)])
            assert mode.shares[0].calls == 40 and mode.shares[0].left_out
    assert drawn[0] == drawn[1] != drawn[2] and 5 < sum(drawn[0]) < 35


def test_layers_left_out_by_chance_train_one_by_one() -> None:
    """OPT's LayerDrop: a job gets what it gets alone, whoever shares the scheduler."""
    model: dict[str, Any] = {"num_labels": 2, "layerdrop": 0.4, "dropout": 0.0}
    together = weights([job("a"), job("b", tz.IA3())], tiny("opt", **model))
    torch.manual_seed(99)
    alone = weights([job("a")], tiny("opt", **model))
    assert_close(together["a"], alone["a"], RUN)


@pytest.mark.parametrize("name", ["numpy", "random"])
def test_other_generators_belong_to_no_job(name: str) -> None:
    draw = np.random.rand if name == "numpy" else random.random
    foreign = [f for f in module.foreign_generators(Drawing()) if f[0] == name]
    assert len(foreign) == 1 and module.foreign_generators(tiny("llama")) == []

    def block() -> JobDropout:
        mode = noise_of(Part())
        mode._foreign = foreign
        return mode

    with block():
        pass
    with pytest.raises(tz.TanzakuError, match=f"generator of {name}"), block():
        draw()


class Drawing(nn.Module):
    """Of this file, which imports both."""


def test_two_threads_draw_at_once() -> None:
    """Each its own job's numbers, as if the other were not there."""
    expected = {seed: drawn(Part(seed=seed), calls=30) for seed in (1, 2)}
    found: dict[int, Any] = {}
    gate = threading.Barrier(2)

    def work(seed: int) -> None:
        gate.wait()
        found[seed] = drawn(Part(seed=seed), calls=30)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, calls in expected.items():
        for [one], [other] in zip(found[seed], calls, strict=True):
            assert torch.equal(one, other)
    assert mark() is None


# -- what cannot be shared

REFUSED = {
    "dropout1d": lambda x, on: F.dropout1d(x, 0.5, on),
    "dropout2d": lambda x, on: nn.Dropout2d(0.5).train(on)(x[:, None]),
    "dropout3d": lambda x, on: F.dropout3d(x[:, None, None], p=0.5, training=on),
    "alpha_dropout": lambda x, on: nn.AlphaDropout(0.5).train(on)(x),
    "feature_alpha_dropout": lambda x, on: F.feature_alpha_dropout(x, 0.5, training=on),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_of_dropout_are_refused(kind: str) -> None:
    x = torch.randn(2, 6, 4)
    with noise_of(Part()):
        with pytest.raises(tz.TanzakuError, match=f"^{kind} draws random numbers that jobs in one batch cannot share"):
            REFUSED[kind](x, True)
        assert REFUSED[kind](x, False).numel() == x.numel()
    assert REFUSED[kind](x, True).numel() == x.numel(), "elsewhere they are what they were"


@dataclass
class Channels(tz.LoRA):
    """LoRA that drops whole features."""

    def layer(self, module: nn.Module, path: str, r: int, scaling: float) -> LoraDelta:
        return ChannelDelta(module, r, scaling, 0.0, True)


class ChannelDelta(LoraDelta):
    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return super().outputs(module, F.dropout1d(x, 0.5, module.training), y)

    def batch_key(self, module: nn.Module) -> None:
        return None


def test_nothing_of_the_mode_is_left_after_a_failure() -> None:
    with pool_of([job("a", tz.LoRA(r=2, lora_dropout=0.1)), job("bad", Channels(r=2))]) as scheduler:
        scheduler.run()
        assert scheduler.results["a"].status == "done"
        assert scheduler.results["bad"].status == "failed" and str(scheduler.results["bad"].error).startswith(
            "dropout1d draws"
        )
    assert torch._C._len_torch_function_stack() == 0 and mark() is None
    route = Route.of(["a", "b"])
    with (
        pytest.raises(ZeroDivisionError),
        JobDropout(route, [JobSlice(slice(0, 1), 0, 3, 1), JobSlice(slice(1, 2), 0, 3, 2)], 3, 0),
    ):
        assert mark() == [0, 0]
        raise ZeroDivisionError
    assert torch._C._len_torch_function_stack() == 0 and mark() is None
    torch.manual_seed(0)
    expected = torch.nn.functional.dropout(torch.ones(1000), 0.5)
    torch.manual_seed(0)
    assert torch.equal(F.dropout(torch.ones(1000), 0.5), expected) and 0 < expected.sum() < 2000


def test_a_block_within_a_block_gives_way_to_it_again() -> None:
    with noise_of(Part()) as outer:
        with noise_of(Part()) as inner:
            assert module._current.get() is inner and inner.in_force() and outer.in_force()
            F.dropout(torch.ones(2, 6, 4))
        assert module._current.get() is outer and not inner.in_force()
    assert (inner.shares[0].calls, outer.shares[0].calls) == (1, 0)
