"""What a step needs: counted to the byte, foretold for steps that jobs share, and kept within a limit."""

from __future__ import annotations

import gc
import mmap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

import tanzaku as tz
from close import RUN, assert_close
from models import tiny
from tanzaku.core.method import Method
from tanzaku.engine import memory
from tanzaku.engine.memory import LiveBytes, Need, bytes_needed, free, in_use, peak, reset_peak
from tanzaku.engine.onednn import PrepackedWeights
from tanzaku.tasks.task import Records, Split, TaskData
from tanzaku.train import scheduler as scheduling
from tanzaku.train.active_job import ActiveJob
from tanzaku.train.results import Job
from tanzaku.train.scheduler import JobScheduler, train_jobs
from tanzaku.train.settings import TrainSettings
from tanzaku.train.step import SharedStep
from task_data import task
from tiers import costly

CPU = torch.device("cpu")
# A large epsilon: Adam divides by it what is all rounding, and other batches round otherwise.
FAST = TrainSettings(epochs=1, learning_rate=0.02, adam_epsilon=1e-3)
PLENTY = 10**12


@pytest.fixture(autouse=True)
def _nothing_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit is then all for the jobs."""
    monkeypatch.setattr(scheduling, "in_use", lambda device: 0)


# -- counting


@pytest.mark.parametrize(
    ("limit", "used", "left"),
    [("max\n", "5", 1000), ("900\n", "100\n", 800), ("5000", "100", 1000), ("100", "300", 0), (None, None, 1000)],
)
def test_what_is_free_is_the_machines_or_the_containers(
    limit: str | None, used: str | None, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CONTAINER", tmp_path)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    for name, text in (("memory.max", limit), ("memory.current", used)):
        if text is not None:
            (tmp_path / name).write_text(text)
    assert free() == left


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_a_weight_in_onednns_layout_is_no_storage_of_a_step() -> None:
    weight = torch.randn(64, 32)
    copy = weight.to_mkldnn()
    with LiveBytes() as live:
        out = torch.ops.mkldnn._linear_pointwise(torch.ones(4, 32), copy, None, "none", [], "")
        assert live.now == out.nbytes


def test_storage_counts_from_when_it_is_made_until_nobody_refers_to_it() -> None:
    before = torch.zeros(1000)
    with LiveBytes() as live:
        a = torch.ones(100)
        assert (live.now, live.peak) == (400, 400)
        views = [a.view(10, 10), a[5:], a.t() if a.dim() > 1 else a.detach()]
        a.add_(1).mul_(2)
        before.add_(1)
        before.view(10, 100)[0].zero_()
        assert (live.now, live.peak) == (400, 400), "views and writing in place make nothing"
        b = torch.empty(25, dtype=torch.float64)
        c = a + 1
        assert live.now == 400 + 200 + 400
        del c
        assert (live.now, live.peak) == (600, 1000)
        del a
        assert live.now == 600, "views hold it"
        del views
        assert live.now == 200
        values, indices = before.reshape(10, 100).max(dim=1)
        assert live.now == 200 + 10 * 4 + 10 * 8
        del b, values, indices
        assert (live.now, live.peak) == (0, 1000)
        after = torch.ones(10)
    torch.ones(10**4)
    assert (live.now, live.peak) == (40, 1000), "outside of the block nothing is counted"
    del after
    assert live.now == 0


def test_what_autograd_keeps_counts() -> None:
    w = torch.randn(50, requires_grad=True)
    with LiveBytes() as live:
        y = (w.exp() * 2).exp()
        # Each exp keeps its result, and the product of the two is freed.
        assert (live.now, live.peak) == (2 * 200, 3 * 200)
        y.sum().backward()
        del y
        assert live.now == 200, "the gradient"
    assert w.grad is not None


def test_the_bytes_of_a_stretch_of_work_are_its_peak() -> None:
    def work() -> None:
        for size in (10, 1000, 100):
            torch.zeros(size)

    assert bytes_needed(work, CPU) == 4000
    assert bytes_needed(lambda: None, CPU) == 0


def test_the_peak_of_the_process_can_be_read_and_forgotten() -> None:
    gc.collect()  # what earlier tests left would else be freed in between
    reset_peak(CPU)
    first, now = peak(CPU), in_use(CPU)
    assert 0 < now <= first * 1.01
    with mmap.mmap(-1, 2**26) as block:  # of pages that the process has not yet, as an allocator might have
        for start in range(0, 2**26, mmap.PAGESIZE):
            block[start] = 1
        assert peak(CPU) > first + 5e7
    reset_peak(CPU)
    assert peak(CPU) > 0


# -- foretelling


@given(
    st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 5)),
    st.integers(1, 40),
    st.integers(0, 40),
    st.integers(1, 200),
    st.integers(1, 9),
)
def test_a_need_at_two_widths_bounds_it_at_all(
    powers: tuple[int, int, int], narrow: int, gap: int, width: int, rows: int
) -> None:
    """For bytes that are any sum of powers of the width, as those of layers and of attention are."""

    def real(width: int) -> int:
        return powers[0] + powers[1] * width + powers[2] * width**2

    need = Need(0, 0, ((narrow, real(narrow)), (narrow + gap, real(narrow + gap))), once=7)
    found = need.beside(rows, width)
    assert found >= 7 + rows * real(width) - 1e-6
    if width in (narrow, narrow + gap):
        assert found == pytest.approx(7 + rows * real(width))


def data(length: int | tuple[int, ...], train: int = 3, valid: int = 0) -> TaskData:
    found = task((length,) if isinstance(length, int) else length, train=train, test=valid or 1)
    return replace(found, valid=found.test if valid else None, test=None)


def job(name: str, method: Method | None = None, rows: TaskData | None = None, **changes: Any) -> Job:
    settings = FAST.model_copy(update={"seed": sum(map(ord, name)), **changes})
    return Job(name, method or tz.LoRA(r=2), settings, rows or data(6))


class Weighed(JobScheduler):
    """A scheduler that notes the real bytes of each step: what jobs keep, and the peak of what the step makes."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.steps: list[tuple[set[str], int]] = []
        self.weights: dict[str, list[Tensor]] = {}

    def _step(self, active_jobs: list[ActiveJob]) -> list[ActiveJob]:
        kept = sum(_kept(active) for active in self.active_jobs.values())
        names = {active.job.name for active in active_jobs}
        with LiveBytes() as live:
            trained = super()._step(active_jobs)
        self.steps.append((names, kept + live.peak))
        return trained

    def _end(self, active: ActiveJob, status: Any, error: str | None = None) -> None:
        self.weights[active.job.name] = [p.detach().clone() for p in active.trained]
        super()._end(active, status, error)

    @property
    def peak(self) -> int:
        return max(size for _, size in self.steps)

    @property
    def most(self) -> int:
        return max(len(names) for names, _ in self.steps)


def _kept(active: ActiveJob) -> int:
    gradients = [p.grad for p in active.trained if p.grad is not None]
    mine = [*active.adapter.parameters(), *gradients, *tree_leaves(dict(active.optimizer.state))]
    mine += tree_leaves(list(vars(active.adapter.method).values()))
    return sum(t.numel() * t.element_size() for t in mine if isinstance(t, Tensor))


def train(jobs: Sequence[Job], model: Any = None, **options: Any) -> Weighed:
    model = tiny("llama", num_labels=2) if model is None else model
    with Weighed(model, jobs[0].data, **options) as scheduler:
        scheduler.add(jobs)
        scheduler.run()
    return scheduler


def assert_same_weights(found: Weighed, expected: Weighed, half: bool = False) -> None:
    if not half:
        return assert_close(found.weights, expected.weights, RUN)
    # AdamW divides a gradient by its own size: where it is nearly zero, half precision decides which way a step goes.
    assert found.weights.keys() == expected.weights.keys() != set()
    for name, weights in expected.weights.items():
        for one, other in zip(found.weights[name], weights, strict=True):
            assert float((one - other).norm()) < 0.2 * float(other.norm()) + 1e-6, name


def everything() -> list[Job]:
    """A job of each kind of site, of unlike lengths and batches."""
    return [
        job("a", rows=data(5)),
        job("all", tz.LoRA(r=2, target_modules="all-linear"), data(7)),
        job("ia3", tz.IA3(), data((4, 12)), batch_size=2),
        job("ada", tz.AdaLoRA(init_r=3, target_r=2), data(6)),
        job("prefix", tz.PrefixTuning(num_virtual_tokens=3), data(9)),
        job("gated", tz.LlamaAdapter(adapter_layers=1, adapter_len=3), data(9)),
        job("head", tz.Head(), data(8), batch_size=3),
        job("saved", tz.LoRA(r=2, modules_to_save=["down_proj"]), data(8)),
    ]


LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
SHARES = {"every site": (0.35, 0.7), "rows of others kept": (0.95,)}
MIXES: dict[str, Callable[[], tuple[Any, list[Job]]]] = {
    "every site": lambda: (tiny("llama", num_labels=2), everything()),
    "eager attention": lambda: (tiny("llama", num_labels=2, attn_implementation="eager"), everything()),
    "a long prompt": lambda: (
        tiny("llama", num_labels=2),
        [job("p", tz.PromptTuning(num_virtual_tokens=30)), *(job(n, batch_size=2) for n in "abc")],
    ),
    "one long text": lambda: (
        tiny("llama", num_labels=2, num_hidden_layers=4),
        [job("long", rows=data(50)), *(job(n, rows=data(4), batch_size=2) for n in "abc")],
    ),
    "heads beside a prompt": lambda: (
        tiny("llama", num_labels=2, num_hidden_layers=6),
        [*(job(n, tz.Head(), batch_size=3) for n in "abc"), job("p", tz.PromptTuning(num_virtual_tokens=2))],
    ),
    "rows of others kept": lambda: (
        tiny("llama", num_labels=2, num_hidden_layers=3),
        [
            *(job(n, tz.Head(), data(8, train=2), batch_size=2) for n in "abcdef"),
            job("all", tz.LoRA(r=2, target_modules="all-linear"), data(8, train=2)),
            job("out", tz.IA3(target_modules=[f"{n}_proj" for n in LINEAR], feedforward_modules=[]), data(8, train=2)),
        ],
    ),
    "checkpointed": lambda: (
        tiny("llama", num_labels=2, num_hidden_layers=3),
        [replace(j, settings=j.settings.model_copy(update={"gradient_checkpointing": True})) for j in everything()[:5]],
    ),
    "accumulated": lambda: (
        tiny("llama", num_labels=2),
        [job(n, tz.LoRA(r=8, target_modules="all-linear"), accumulation=2, restore_best=True) for n in "abcd"],
    ),
    "half precision": lambda: (
        tiny("llama", num_labels=2).to(torch.bfloat16),
        [replace(j, settings=j.settings.model_copy(update={"precision": "bf16"})) for j in everything()],
    ),
    "bert that drops": lambda: (
        tiny("bert", num_labels=2, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1),
        [job("a"), job("b", tz.IA3(), data(15)), job("c", tz.PromptTuning(num_virtual_tokens=4)), job("h", tz.Head())],
    ),
    "gpt2": lambda: (
        tiny("gpt2", "cls", num_labels=2),
        [job("a", batch_size=2), job("b", tz.IA3(), data(15)), job("c", tz.AdaLoRA(init_r=2, target_r=1))],
    ),
}
for kind in ("t5", "bart"):
    MIXES[kind] = lambda kind=kind: (
        tiny(kind, "cls", num_labels=2),
        [
            replace(j, data=replace(j.data, train=task((6,), train=4, end=2).train))
            for j in (job("a", batch_size=2), job("b", tz.PromptTuning(num_virtual_tokens=9)), job("c", tz.IA3()))
        ],
    )


@pytest.mark.parametrize("mix", costly([*MIXES][::2], [*MIXES][1::2]))
def test_no_step_needs_more_than_the_limit(mix: str) -> None:
    model, jobs = MIXES[mix]()
    free = train(jobs, model, memory=PLENTY)
    assert {r.status for r in free.results.values()} == {"done"}, [r.error for r in free.results.values()]
    assert free.most == len(jobs)
    # What the most demanding job needs by itself, with a part of the rest.
    least = max(r.step_bytes for r in free.results.values())
    for share in SHARES.get(mix, (0.5,)):
        limit = int(max(least * 1.2, share * free.peak))
        some = train(jobs, model, memory=limit)
        assert {r.status for r in some.results.values()} == {"done"}, [r.error for r in some.results.values()]
        assert some.peak <= limit
        assert_same_weights(some, free, half=mix == "half precision")
        assert some.most < len(jobs)


def test_a_limit_is_made_use_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that are alike are foretold closely: with room for four and a bit, three at least share a step."""
    monkeypatch.setattr(PrepackedWeights, "take", lambda self, room: 0)  # beside a model so small the copies are large
    jobs = [job(name, rows=data(40)) for name in "abcdef"]
    free = train(jobs, memory=PLENTY)
    part = train(jobs, memory=int(free.peak * 4.5 / 6))
    assert part.most >= 3 and part.peak <= free.peak * 4.5 / 6


def test_a_limit_is_for_the_whole_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "in_use", lambda device: 10**9)
    with pytest.raises(tz.TanzakuError, match=r"limit of 900\.0 MB is less than the 1\.00 GB that are in use .*allow"):
        JobScheduler(tiny("llama", num_labels=2), data(4), memory=9 * 10**8)
    assert JobScheduler(tiny("llama", num_labels=2), data(4), memory=10**9 + 5).room == 5


@pytest.mark.parametrize("method", [tz.LoRA(r=2), tz.Full()], ids=["lora", "full"])
def test_a_job_that_fits_nowhere_ends_alone_and_says_what_would_help(method: Method) -> None:
    small = [job(name, rows=data(4)) for name in "ab"]
    large = job("large", method, data(40), batch_size=4)
    expected = train(small)
    need = max(r.step_bytes for r in train(small, memory=PLENTY).results.values())
    scheduler = train([small[0], large, small[1]], memory=int(need * 1.1))
    assert [scheduler.results[name].status for name in ("a", "large", "b")] == ["done", "failed", "done"]
    error = str(scheduler.results["large"].error)
    assert "beside the model" in error and "memory limit" in error and "\n" not in error
    for what in ("gradient_checkpointing", "batch_size", "max_length", "eval_batch_size"):
        assert what in error
    assert f"{need * 1.1 / 1e6:.1f} MB are left" in error
    assert f"needs {scheduler.results['large'].step_bytes / 1e6:.1f} MB" in error
    expected.weights["large"] = scheduler.weights["large"] = []
    assert_same_weights(scheduler, expected)


def test_the_advice_is_good() -> None:
    """Checkpointing is measured by itself, also of a job that is the same in all else."""
    model = tiny("llama", num_labels=2, num_hidden_layers=6)
    jobs = [job("plain", rows=data(30)), job("less", rows=data(30), gradient_checkpointing=True)]
    needs = {name: r.step_bytes for name, r in train(jobs, model, memory=PLENTY).results.items()}
    assert needs["less"] < 0.7 * needs["plain"]
    limit = (needs["less"] + needs["plain"]) // 2
    scheduler = train(jobs, model, memory=limit)
    assert {n: r.status for n, r in scheduler.results.items()} == {"plain": "failed", "less": "done"}
    assert scheduler.peak <= limit


@pytest.mark.parametrize("lengths", [(30,), (4, 30), (30, 4, 4, 4)], ids=str)
def test_step_bytes_are_those_of_the_most_demanding_rows_alone(lengths: tuple[int, ...]) -> None:
    """What a job reports is what no step of it exceeds: weights, moments, gradients, activations, padded or not."""
    each = job("a", rows=data(lengths, train=8), batch_size=2, epochs=4)
    [result] = train([each], measure=True).results.values()
    assert result.step_bytes == pytest.approx(train([each]).peak, rel=0.01)


def test_folds_that_are_smaller_than_a_batch_are_measured_by_themselves() -> None:
    jobs = [job(f"j{rows}", rows=data(8, train=rows), batch_size=8) for rows in (2, 8)]
    found = train(jobs, measure=True).results
    assert found["j8"].step_bytes > 2 * found["j2"].step_bytes


def test_one_candidate_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    need_of = SharedStep.need_of
    monkeypatch.setattr(SharedStep, "need_of", lambda *a: (calls.append(a[1].job.name), need_of(*a))[1])
    train([job(name) for name in "abc"] + [job("d", tz.LoRA(r=3))], memory=PLENTY)
    assert calls == ["a", "d"]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_measuring_trains_nothing(accumulation: int) -> None:
    """Weights are those of a run that is not measured, also of jobs whose gradients are half summed meanwhile."""

    def jobs() -> list[Job]:
        first = [job(n, tz.LoRA(r=2, lora_dropout=0.3), accumulation=accumulation, epochs=2) for n in "ab"]
        return [*first, job("c", tz.IA3(), data(9)), job("d", tz.PromptTuning(num_virtual_tokens=2))]

    state = torch.get_rng_state()
    plain = train(jobs(), rows_per_step=1)
    measured = train(jobs(), rows_per_step=1, memory=PLENTY)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_weights(measured, plain)


def test_an_evaluation_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of an evaluation are many and keep nothing, and still they must fit."""
    rows = data(20, train=4, valid=64)
    model = tiny("llama", num_labels=2)
    wide, narrow = (job("a", rows=rows, eval_batch_size=size) for size in (64, 4))
    seen: list[int] = []
    records = SharedStep.records

    def weighed(step: SharedStep, active: ActiveJob, split: Split) -> Records:
        with LiveBytes() as live:
            out = records(step, active, split)
        seen.append(live.peak + active.kept_bytes)
        return out

    monkeypatch.setattr(SharedStep, "records", weighed)
    least = train([wide], model, memory=PLENTY).results["a"].step_bytes
    assert max(seen) > 2 * least, "the evaluation must need more than a step for this test"
    refused = train([wide], model, memory=2 * least).results["a"]
    assert refused.status == "failed" and "eval_batch_size" in str(refused.error)
    seen.clear()
    scheduler = train([narrow], model, memory=2 * least)
    assert scheduler.results["a"].status == "done" and max(seen) <= 2 * least


def test_what_a_new_job_keeps_leaves_room_for_those_that_are_there() -> None:
    """A job that keeps much but works little must not come in beside one that needs all the rest for its steps."""
    heavy = job("heavy", rows=data(40), batch_size=2)
    fat = job("fat", tz.LoRA(r=8, target_modules="all-linear"), data(3))
    needs = {n: r.step_bytes for n, r in train([heavy, fat], memory=PLENTY).results.items()}
    limit = int(needs["heavy"] * 1.05)
    assert needs["fat"] < limit
    scheduler = train([heavy, fat], memory=limit)
    assert {r.status for r in scheduler.results.values()} == {"done"} and scheduler.peak <= limit
    order = [min(names) for names, _ in scheduler.steps]
    assert order == ["heavy"] * 2 + ["fat"] * 3


def test_a_job_without_room_is_not_tried_again_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    attach = scheduling.attach
    monkeypatch.setattr(
        scheduling, "attach", lambda m, method, name, **k: (calls.append(name), attach(m, method, name, **k))[1]
    )
    jobs = [job("a", rows=data(20, train=9)), job("b", rows=data(20, train=9))]
    need = train(jobs[:1], memory=PLENTY).results["a"].step_bytes
    calls.clear()
    scheduler = train(jobs, memory=int(need * 1.01))
    assert {r.status for r in scheduler.results.values()} == {"done"}
    assert calls == ["a", "b", "b"], "once beside the other, and once when that has left"


def test_jobs_at_a_rung_keep_their_room() -> None:
    """Where they leave none for the next in the queue, it waits until they have gone on."""
    waits = [replace(job(name, tz.LoRA(r=32, target_modules="all-linear")), rungs=(1,)) for name in "ab"]
    waits = [replace(j, settings=j.settings.model_copy(update={"epochs": 2})) for j in waits]
    jobs = [*waits, job("c", tz.LoRA(r=32, target_modules="all-linear"))]
    need = train(jobs[2:], memory=PLENTY).results["c"].step_bytes
    kept = 3 * sum(p.numel() * 4 for p in train(jobs[2:]).weights["c"])
    limit = int(need + 1.5 * kept)
    with Weighed(tiny("llama", num_labels=2), data(6), memory=limit) as scheduler:
        scheduler.add(waits)
        scheduler.run()
        scheduler.add(jobs[2:])
        scheduler.run()
        assert [j.name for j in scheduler.queue] == ["c"] and list(scheduler.active_jobs) == ["a", "b"]
        scheduler.proceed(["a"])
        scheduler.run()
    assert {n: r.status for n, r in scheduler.results.items()} == {"a": "stopped", "b": "done", "c": "done"}
    assert scheduler.peak <= limit


def test_texts_as_long_as_the_model_takes_share_no_step_with_a_prompt() -> None:
    """Rows would be wider than there are positions, in a step and where its bytes are foretold."""
    model = tiny("bert", num_labels=2, max_position_embeddings=32)
    jobs = [job("long", rows=data(31)), job("p", tz.PromptTuning(num_virtual_tokens=20), data(8)), job("a")]
    jobs.append(job("prefix", tz.PrefixTuning(num_virtual_tokens=20), data(8)))
    free = train(jobs, model, memory=PLENTY)
    assert {r.status for r in free.results.values()} == {"done"}
    assert all("long" not in names or names <= {"long", "a"} for names, _ in free.steps)
    assert len(free.steps) == 6 and free.most == 3, "nothing was tried in vain"
    limit = int(free.peak * 0.9)
    assert train(jobs, model, memory=limit).peak <= limit


def test_a_run_under_a_limit_reports_what_it_used() -> None:
    [result] = train_jobs(tiny("llama", num_labels=2), data(5), [job("a")], memory=PLENTY)
    assert result.step_bytes > 0 and result.peak_memory_bytes > 10 * result.step_bytes
    [result] = train_jobs(tiny("llama", num_labels=2), data(5), [job("a")])
    assert result.step_bytes == 0, "nobody asked"
    gc.collect()
