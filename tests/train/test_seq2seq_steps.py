"""Steps of an encoder-decoder that reads two texts of a row, a source and a target: jobs in one batch draw, skip
padding and need memory as they do alone, also where sources and targets come to one width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tanzaku as tz
from close import GRADIENT, RUN, assert_close, close
from models import VOCAB, tiny
from tanzaku.core.attach import attach, route
from tanzaku.core.dropout import JobDropout, JobSlice
from tanzaku.core.manager import manager_of
from tanzaku.core.method import Method
from tanzaku.core.routing import Route
from tanzaku.engine.accelerations import Accelerations
from tanzaku.engine.memory import LiveBytes
from tanzaku.errors import TanzakuError
from tanzaku.methods import lora_starts
from tanzaku.models.families import Base
from tanzaku.tasks.inference import Forward
from tanzaku.tasks.sampling import Decoding
from tanzaku.tasks.seq2seq import Seq2Seq
from tanzaku.tasks.task import DECODED, Example, Split, TaskData
from tanzaku.tasks.written import Row
from tanzaku.train import scheduler as scheduling
from tanzaku.train.active_job import ActiveJob
from tanzaku.train.results import Job
from tanzaku.train.scheduler import JobScheduler
from tanzaku.train.settings import TrainSettings

FAST = TrainSettings(epochs=1, learning_rate=0.01, adam_epsilon=1e-3, batch_size=2, shuffle=False)
# Of sources and targets: the longest source with the three tokens of a prompt is as long as the longest target.
SIZES = [(6, 4), (3, 9), (6, 9), (2, 5), (5, 9), (6, 3)]


def example(source: int, target: int, seed: int) -> Example:
    ids = torch.randint(3, VOCAB, (source + target,), generator=torch.Generator().manual_seed(seed)).tolist()
    labels = [*ids[source:-1], 2]
    return Example({"input_ids": ids[:source], DECODED: labels}, "x", float(target), about=Row(ids[:source], labels))


def data(*sizes: tuple[int, int]) -> TaskData:
    rows = [example(source, target, seed) for seed, (source, target) in enumerate(sizes or SIZES)]
    task = Seq2Seq(decoding=Decoding(max_new_tokens=2))
    return TaskData(Split("rows", rows, [""] * len(rows), 0, "rows"), None, None, task, 0)


def bamboo(kind: str, rate: float = 0.2, **settings: Any) -> Any:
    drops = {"t5": {"dropout_rate": rate}, "bart": dict.fromkeys(("dropout", "attention_dropout"), rate)}[kind]
    return tiny(kind, "lm", pad_token_id=0, **drops, **settings)


def job(name: str, method: Method, rows: TaskData | None = None, **changes: Any) -> Job:
    settings = FAST.model_copy(update={"seed": sum(map(ord, name)), **changes})
    return Job(name, method, settings, rows or data(*SIZES[len(name) % 3 :]))


def jobs_of(kind: str) -> list[Job]:
    every = {"t5": ["q", "k", "v", "o", "wo"], "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc2"]}[kind]
    return [
        job("lora", tz.LoRA(r=2, lora_dropout=0.3, target_modules=every)),
        job("prompt", tz.PromptTuning(num_virtual_tokens=3)),
        job("prefix-x", tz.PrefixTuning(num_virtual_tokens=2)),
        job("ia3-x", tz.IA3()),
        job("bottle", tz.METHODS["bottleneck"].from_settings({"reduction_factor": 8, "non_linearity": "gelu"})),
    ]


class Watched(JobScheduler):
    """Notes how many jobs each step has, and the weights at their ends."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.together: list[int] = []
        self.weights: dict[str, dict[str, Tensor]] = {}
        self.bytes: list[int] = []

    def _step(self, active_jobs: list[ActiveJob]) -> list[ActiveJob]:
        kept = sum(active.kept_bytes for active in self.active_jobs.values())
        with LiveBytes() as live:
            trained = super()._step(active_jobs)
        self.together.append(len(active_jobs))
        self.bytes.append(kept + live.peak)
        return trained

    def _end(self, active: ActiveJob, status: Any, error: str | None = None) -> None:
        self.weights[active.job.name] = {name: p.detach().clone() for name, p in active.adapter.trained()}
        super()._end(active, status, error)


def trained(model: Any, jobs: Sequence[Job], **options: Any) -> Watched:
    with Watched(model, jobs[0].data, workers=1, rows_per_step=64, **options) as scheduler:
        scheduler.add(jobs)
        scheduler.run()
    assert [(r.status, r.error) for r in scheduler.results.values()] == [("done", None)] * len(jobs)
    return scheduler


# -- random numbers


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_job_among_others_drops_what_it_drops_alone(kind: str, checkpointing: bool) -> None:
    """In the encoder, in the decoder and where this reads that, whichever method the neighbours have."""
    jobs = [
        Job(j.name, j.method, j.settings.model_copy(update={"gradient_checkpointing": checkpointing}), j.data)
        for j in jobs_of(kind)
    ]
    among = trained(bamboo(kind), jobs)
    assert among.together[0] == len(jobs), "no step was refused and halved"
    for each in jobs:
        alone = trained(bamboo(kind), [each]).weights[each.name]
        assert_close(among.weights[each.name], alone, RUN, at=each.name)
    without = trained(bamboo(kind, 0.0), jobs[2:3]).weights
    assert not close(among.weights[jobs[2].name], without[jobs[2].name], RUN)


@pytest.mark.parametrize("lead", [0, 2])
def test_masks_where_a_decoder_reads_an_encoder(lead: int) -> None:
    """(rows, heads, target, source): a job has its own corner of each."""

    def masks(*parts: tuple[int, int, int]) -> list[Tensor]:
        shares = [JobSlice(slice(n, n + 1), v, s, seed=s + t, decoded=t) for n, (v, s, t) in enumerate(parts)]
        width, decoded = max(s for _, s, _ in parts), max(t for *_, t in parts) + 2 * (len(parts) > 1)
        before = max(v for v, *_ in parts)
        route = Route.of([f"job-{n}" for n in range(len(parts))])
        assert len(parts) == 1 or decoded != before + width
        with JobDropout(route, shares, width, before, decoded=decoded):
            cross = F.dropout(torch.ones(len(parts), 3, decoded, before + width), 0.5)
            inner = F.dropout(torch.ones(len(parts), decoded, 4), 0.5)
        return [x for n, (v, s, t) in enumerate(parts) for x in (cross[n, :, :t, : v + s], inner[n, :t])]

    one, other = (lead, 4, 7), (0, 8, 3)
    for found, expected in zip(masks(other, one)[2:], masks(one), strict=True):
        assert torch.equal(found, expected)


def test_widths_that_cannot_be_told_apart_are_refused_and_halved() -> None:
    """Both texts fill all positions, and the jobs' own are others."""
    rows = [data((12, 3), (12, 3)), data((3, 12), (3, 12))]
    jobs = [job("a", tz.LoRA(r=2), rows[0]), job("b", tz.LoRA(r=2), rows[1])]
    settings = {"max_position_embeddings": 12}
    among = trained(bamboo("bart", **settings), jobs)
    assert among.together == [1, 1]
    for each in jobs:
        assert_close(among.weights[each.name], trained(bamboo("bart", **settings), [each]).weights[each.name], RUN)
    shares = [JobSlice(slice(0, 1), 0, 4, 1, decoded=2), JobSlice(slice(1, 2), 0, 2, 2, decoded=4)]
    with (
        JobDropout(Route.of(["a", "b"]), shares, 4, 0, decoded=4),
        pytest.raises(TanzakuError, match="of 4 tokens, as many as an encoder and a decoder have here"),
    ):
        F.dropout(torch.ones(2, 4, 3), 0.5)


# -- padding that is left out


@pytest.mark.parametrize("sizes", [((9, 4), (4, 7), (6, 2)), ((7, 4), (4, 9), (6, 9))], ids=["two widths", "one width"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_accelerations_change_nothing(kind: str, sizes: tuple[tuple[int, int], ...]) -> None:
    """The longest target is as long as the longest source with its virtual tokens, in the second."""
    model = bamboo(kind, 0.0)
    for name, method in (
        ("lora", tz.LoRA(r=2, init_lora_weights=False)),
        ("prompt", tz.PromptTuning(num_virtual_tokens=2)),
    ):
        attach(model, method, name, seed=1)
    manager, task = manager_of(model), Seq2Seq()
    names = ["lora", "prompt", "lora"]
    adapters = [manager.get(name) for name in names]
    forward = Forward(model, task, 0)
    batch = forward.batch([example(*size, seed) for seed, size in enumerate(sizes)], adapters=adapters)
    assert batch.decoder_width != 2 + batch.width

    def numbers(wanted: str, times: int) -> list[Tensor]:
        for _ in range(times):
            with Accelerations(Base.of(model), wanted) as fast, route(model, names):
                parameters = [p for adapter in adapters[:2] for _, p in adapter.trained()]
                for _ in range(2):  # the order of layers is known in the second pass
                    with fast.batch(batch, adapters, None):
                        sums = task.score(forward(batch), batch)
                        found = [sums.detach(), *torch.autograd.grad(sums.sum(), parameters)]
        return found

    expected = numbers("none", 1)
    assert all(x.any() for x in expected)
    assert_close(numbers("auto", 1), expected, GRADIENT)


def test_padding_of_both_texts_is_left_out() -> None:
    model = bamboo("bart", 0.0)
    attach(model, tz.LoRA(r=2), "lora", seed=1)
    adapter, task = manager_of(model).get("lora"), Seq2Seq()
    forward = Forward(model, task, 0)
    batch = forward.batch([example(9, 4, 0), example(4, 7, 1)], adapters=[adapter])
    read: dict[str, int] = {}
    with Accelerations(Base.of(model), "skip_unneeded") as fast, route(model, ["lora"] * 2):
        products = fast.common.products
        with fast.batch(batch, [adapter] * 2, None):
            for side, width in (("encoder", batch.width), ("decoder", batch.decoder_width)):
                layout = products.layout.of((2, width))  # type: ignore[union-attr]
                assert layout is not None
                read[side] = len(torch.arange(2 * width)[layout.places()])
    assert read == {"encoder": 13, "decoder": 11}


# -- memory


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_no_step_needs_more_than_the_limit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sources have short targets, and short ones long targets."""
    monkeypatch.setattr(scheduling, "in_use", lambda device: 0)
    rows = [data((60, 3), (4, 50), (30, 5)), data((5, 40), (50, 4)), data((9, 9), (8, 60))]
    jobs = [
        job(name, method, rows[n % 3])
        for n, (name, method) in enumerate(
            [("a", tz.LoRA(r=2)), ("b", tz.PromptTuning(num_virtual_tokens=5)), ("c", tz.IA3()), ("d", tz.LoRA(r=4))]
        )
    ]
    free = trained(bamboo(kind), jobs, memory=10**12)
    assert max(free.together) == len(jobs)
    limit = int(max(free.bytes) * 0.7)
    part = trained(bamboo(kind), jobs, memory=limit)
    assert max(part.bytes) <= limit and max(part.together) > 1
    for each in jobs:
        assert_close(part.weights[each.name], free.weights[each.name], RUN)


# -- a look at rows before the first step


def test_padding_of_neither_text_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """EVA starts from what modules read of own tokens: the source's, and in the decoder the target's."""
    seen: set[int] = set()
    own = lora_starts.own_tokens

    def watched(x: Tensor) -> Tensor:
        found = own(x)
        seen.add(len(found))
        return found

    monkeypatch.setattr(lora_starts, "own_tokens", watched)
    rows = data((9, 4), (4, 9), (7, 2))
    names = ["q_proj", "k_proj", "v_proj", "fc1"]
    eva = tz.LoRA(r=2, init_lora_weights="eva", target_modules=names)
    trained(bamboo("bart", 0.0), [job("eva", eva, rows, batch_size=3)])
    assert seen == {9 + 4 + 7, 4 + 9 + 2}
