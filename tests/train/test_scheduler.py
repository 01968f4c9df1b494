"""The scheduler: who takes part in a step, what a failure costs the others, and what is left of it all afterwards."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import tanzaku as tz
from close import RUN, assert_close
from models import tiny
from tanzaku.core.adapter import Adapter
from tanzaku.core.method import Method
from tanzaku.engine.onednn import PrepackedWeights
from tanzaku.methods.lora_layers import LoraDelta
from tanzaku.tasks.classification import Classification
from tanzaku.tasks.task import TaskData
from tanzaku.train.active_job import ActiveJob
from tanzaku.train.results import EpochRecord, Job, JobResult
from tanzaku.train.scheduler import JobScheduler, Silent, train_jobs
from tanzaku.train.settings import TrainSettings
from task_data import task

# A large epsilon: Adam divides by it what is all rounding, and other batches round otherwise.
FAST = TrainSettings(epochs=1, learning_rate=0.02, adam_epsilon=1e-3)
# Six rows: an epoch of six steps of one row. No rows to validate on, which takes as long as to train.
SIX = replace(task((5, 7, 4), train=6), valid=None)
Weights = dict[str, dict[str, Tensor]]


def job(
    name: str, method: Method | None = None, *, rungs: tuple[int, ...] = (), data: Any = None, **changes: Any
) -> Job:
    # A seed of its own: jobs that do the same would not show that one's place is taken by another.
    settings = FAST.model_copy(update={"seed": sum(map(ord, name)), **changes})
    return Job(name, method or tz.LoRA(r=2), settings, data, rungs)


class Watched(JobScheduler):
    """A scheduler that notes the rows of each job in every step that it tries, and the weights that jobs end with."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.steps: list[dict[str, int]] = []
        self.weights: Weights = {}

    def _step(self, active_jobs: list[ActiveJob]) -> list[ActiveJob]:
        self.steps.append({active.job.name: len(active.next_rows or ()) for active in active_jobs})
        return super()._step(active_jobs)

    def _end(self, active: ActiveJob, status: Any, error: str | None = None) -> None:
        self.weights[active.job.name] = {name: p.detach().clone() for name, p in active.adapter.trained()}
        super()._end(active, status, error)


def train(jobs: Sequence[Job], data: TaskData = SIX, model: PreTrainedModel | None = None, **options: Any) -> Watched:
    """A scheduler that has run all jobs to their end, on a fresh model."""
    with Watched(tiny("llama", num_labels=2) if model is None else model, data, **options) as scheduler:
        scheduler.add(jobs)
        scheduler.run()
        while any(active.waiting for active in scheduler.active_jobs.values()):
            scheduler.proceed()
            scheduler.run()
    return scheduler


def assert_same_weights(found: Weights, expected: Weights, names: Sequence[str]) -> None:
    assert_close({name: found[name] for name in names}, {name: expected[name] for name in names}, RUN)


def assert_left_as_it_was(model: PreTrainedModel, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert tz.adapters(model) == [] and not any(m.training for m in model.modules())
    for path, module in model.named_modules():
        assert "forward" not in module.__dict__, path
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        assert not any(hooks), path
        assert "_tanzaku_attend" not in module.__dict__, path
    assert not {"_tanzaku_host", "named_parameters", "gradient_checkpointing_enable"} & model.__dict__.keys()
    assert not getattr(model.config, "_attn_implementation", "").startswith("tanzaku")
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


# -- jobs that go wrong, each in its own way


@dataclass
class Faulty(tz.LoRA):
    """LoRA that fails after so many calls: in its penalty, after a step, or in the forward pass."""

    where: str = "penalty"
    after: int = 2
    error: type[BaseException] = ValueError

    def due(self, where: str) -> bool:
        self.after -= where == self.where
        return self.after < 0

    def fail(self, where: str) -> None:
        if self.due(where):
            raise self.error("this is why\nand a second line")

    def penalty(self, adapter: Adapter) -> Tensor | None:
        self.fail("penalty")
        return torch.tensor(float("nan")) if self.due("nan") else None

    def after_step(self, adapter: Adapter, step: int) -> None:
        self.fail("after_step")

    def layer(self, module: nn.Module, path: str, r: int, scaling: float) -> LoraDelta:
        layer = FaultyStrip(module, r, scaling, 0.0, True)
        layer.__dict__["fail"] = lambda: self.fail("forward")
        return layer


class FaultyStrip(LoraDelta):
    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if module.training:
            self.__dict__["fail"]()
        return super().outputs(module, x, y)

    def batch_key(self, module: nn.Module) -> None:
        return None


FAULTS: dict[str, tuple[Method, dict[str, Any], str]] = {
    "penalty": (Faulty(where="penalty"), {}, "this is why"),
    "penalty that is no number": (Faulty(where="nan"), {}, "loss became nan at step 3 of 12"),
    "after_step": (Faulty(where="after_step"), {}, "this is why"),
    "forward": (Faulty(where="forward", after=9), {}, "this is why"),
    "learning rate": (tz.LoRA(r=2), {"learning_rate": 1e30, "max_grad_norm": 0.0}, "loss became"),
    "setting": (tz.LoRA(target_modules=["q_prj"]), {}, "q_prj"),
    "prepare": (tz.AdaLoRA(init_r=2, target_r=1, tinit=50), {}, "tinit=50"),
}


def company() -> list[Job]:
    return [job("a"), job("b", tz.IA3()), job("c", tz.PromptTuning(num_virtual_tokens=2), batch_size=2), job("d")]


@pytest.fixture(scope="module")
def expected() -> Weights:
    """What the company ends with when nothing goes wrong."""
    return train(company()).weights


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_job_that_fails_ends_alone(fault: str, place: int, expected: Weights) -> None:
    method, changes, error = FAULTS[fault]
    jobs = company()
    jobs.insert(place, job("bad", replace(method), epochs=2, **changes))
    scheduler = train(jobs)
    bad = scheduler.results.pop("bad")
    assert bad.status == "failed" and bad.error is not None and error in bad.error and "\n" not in bad.error
    assert {r.status for r in scheduler.results.values()} == {"done"}
    assert_same_weights(scheduler.weights, expected, "abcd")
    assert len(scheduler.results) == 4


@pytest.mark.parametrize("where", ["penalty", "after_step", "forward"])
def test_one_that_fails_is_found_by_halving(where: str) -> None:
    """Each step that fails is tried again in halves, and the others take it once."""
    jobs = [job(name) for name in "abcdefg"]
    scheduler = train([*jobs, job("bad", Faulty(where=where, after=4 if where == "forward" else 1), epochs=3)])
    assert scheduler.results["bad"].status == "failed"
    assert all(r.status == "done" and r.steps == 6 for name, r in scheduler.results.items() if name != "bad")
    tried = [len(step) for step in scheduler.steps if "bad" in step]
    assert tried == ([8, 8] if where == "after_step" else [8, 8, 4, 2, 1])
    assert len(scheduler.steps) == (6 if where == "after_step" else 6 + 6)


def test_a_loss_that_is_no_number_does_not_disturb_layers_that_are_recomputed() -> None:
    """Its adapter is off the model before the others' backward pass, in which checkpointed layers run again."""
    others = [job(name, gradient_checkpointing=True, rungs=()) for name in "ab"]
    scheduler = train([*others, job("bad", Faulty(where="nan"), gradient_checkpointing=True)])
    assert scheduler.results["bad"].status == "failed"
    assert_same_weights(scheduler.weights, train(others).weights, "ab")


def test_an_error_that_nobody_foresaw_is_not_hidden() -> None:
    model = tiny("llama", num_labels=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AssertionError, match="this is why"):
        train([*company(), job("bad", Faulty(error=AssertionError))], model=model)
    assert_left_as_it_was(model, before)


# -- who takes part in a step


def test_the_batch_stays_full_while_jobs_come_and_go() -> None:
    """As jobs finish, fail or are stopped, others take their places: three rows a step while three jobs are left."""
    jobs = [job(name, epochs=1 + at % 3) for at, name in enumerate("abcdefgh")]
    jobs[2] = job("c", Faulty(where="after_step"), epochs=3)
    jobs[4] = job("e", epochs=3, rungs=(1,))
    left = {j.name: 6 * j.settings.epochs for j in jobs}
    left["c"] = 3
    left["e"] = 6
    with Watched(tiny("llama", num_labels=2), SIX, rows_per_step=3) as scheduler:
        scheduler.add(jobs)
        scheduler.run()
        assert list(scheduler.active_jobs) == ["e"]
        scheduler.proceed(["e"])
        scheduler.run()
    assert {name: r.status for name, r in scheduler.results.items()} == {
        **dict.fromkeys("abdfgh", "done"),
        "c": "failed",
        "e": "stopped",
    }
    for step in scheduler.steps:
        assert len(step) == min(3, sum(n > 0 for n in left.values())), step
        for name in step:
            left[name] -= 1
    assert not any(left.values())


def test_small_sets_of_rows_fill_the_batch_too() -> None:
    """A job's batch is what it has rows for, however large its batch_size."""
    small = [job(name, batch_size=50, data=task((5,), train=3), epochs=2) for name in "abcd"]
    scheduler = train(small, rows_per_step=12)
    assert scheduler.steps == [{"a": 3, "b": 3, "c": 3, "d": 3}] * 2


@pytest.mark.parametrize("limit", [1, 4, 7])
def test_a_step_has_no_more_rows_than_allowed(limit: int) -> None:
    sizes = (1, 5, 2, 3, 1, 6, 2)
    scheduler = train(
        [job(name, batch_size=size) for name, size in zip("abcdefg", sizes, strict=True)], rows_per_step=limit
    )
    assert {r.status for r in scheduler.results.values()} == {"done"}
    for step in scheduler.steps:
        assert sum(step.values()) <= limit or len(step) == 1, step
    assert (max(len(step) for step in scheduler.steps) > 1) == (limit > 1)


def test_how_many_rows_are_allowed_must_be_a_number_of_rows() -> None:
    for wrong in (0, -3):
        with pytest.raises(tz.TanzakuError, match=f"rows_per_step is {wrong}"):
            JobScheduler(tiny("llama", num_labels=2), SIX, rows_per_step=wrong)


def test_rows_of_like_length_share_a_step() -> None:
    short, long = task((4,), train=6), task((30,), train=6)
    jobs = [job(f"{name}{at}", data=data) for at in range(4) for name, data in (("s", short), ("l", long))]
    scheduler = train(jobs, rows_per_step=4)
    assert len(scheduler.steps) == 12
    assert all(len({name[0] for name in step}) == 1 and len(step) == 4 for step in scheduler.steps)


def test_virtual_tokens_count_as_length() -> None:
    """A prompt of twenty tokens makes rows as long as those of others that have them as text."""
    short, long = task((4,), train=6), task((24,), train=6)
    jobs = [job("s0", data=short), job("p0", tz.PromptTuning(num_virtual_tokens=20), data=short)]
    jobs += [job("s1", data=short), job("l1", data=long)]
    for step in train(jobs, rows_per_step=2).steps:
        assert step.keys() in ({"s0", "s1"}, {"p0", "l1"})


def test_who_has_most_left_to_do_comes_first() -> None:
    """Else the longest job would end by itself, in steps of one row."""
    jobs = [job("a"), job("b"), job("c"), job("long", epochs=3)]
    steps = train(jobs, rows_per_step=2).steps
    assert len(steps) == 18 and all(len(step) == 2 and "long" in step for step in steps)


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"gradient_checkpointing": True}], ids=str)
def test_jobs_of_another_arithmetic_or_checkpointing_share_no_step(change: dict[str, Any]) -> None:
    plain, other = [job(name) for name in "ab"], [job(name, **change) for name in "cd"]
    scheduler = train([plain[0], other[0], plain[1], other[1]])
    assert {frozenset(step) for step in scheduler.steps} == {frozenset("ab"), frozenset("cd")}
    assert_same_weights(scheduler.weights, {**train(plain).weights, **train(other).weights}, "abcd")


def test_full_fine_tuning_runs_alone_after_the_others(expected: Weights) -> None:
    model = tiny("llama", num_labels=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    jobs = [job("full", tz.Full(), learning_rate=1e-3), *company(), job("full-2", tz.Full())]
    scheduler = train(jobs, model=model)
    assert all(len(step) == 1 for step in scheduler.steps if step.keys() & {"full", "full-2"})
    order = list(dict.fromkeys(name for step in scheduler.steps for name in step))
    assert order[-2:] == ["full", "full-2"]
    assert all(r.status == "done" for r in scheduler.results.values())
    assert {name for name, r in scheduler.results.items() if r.note and "alone" in r.note} == {"full", "full-2"}
    assert_same_weights(scheduler.weights, expected, "abcd")
    assert_same_weights(scheduler.weights, train([jobs[0]]).weights, ["full"])
    assert_left_as_it_was(model, before)


# -- memory that is not there


def fails(model: PreTrainedModel, when: Callable[[list[int]], bool], error: BaseException) -> list[int]:
    """Let the forward pass fail in training after its work is done, `when` the rows of all passes so far say so."""
    seen: list[int] = []
    forward = type(model).forward

    def limited(input_ids: Tensor, **inputs: Any) -> Any:
        out = forward(model, input_ids=input_ids, **inputs)
        if model.training:
            seen.append(len(input_ids))
            if when(seen):
                raise type(error)(*error.args)  # a new one: it holds what lies on the stack
        return out

    model.forward = limited
    return seen


def fails_above(model: PreTrainedModel, rows: int, error: BaseException) -> list[int]:
    return fails(model, lambda seen: seen[-1] > rows, error)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


@pytest.fixture
def _no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a step that finds no memory is first tried again without copies of weights."""
    monkeypatch.setattr(PrepackedWeights, "take", lambda self, room: 0)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
@pytest.mark.usefixtures("_no_copies")
def test_where_memory_runs_out_steps_are_halved(error: BaseException, expected: Weights) -> None:
    model = tiny("llama", num_labels=2)
    seen = fails_above(model, 2, error)
    scheduler = train(company(), model=model)
    del model.forward
    assert {r.status for r in scheduler.results.values()} == {"done"}
    assert_same_weights(scheduler.weights, expected, "abcd")
    assert seen[0] == 5 and scheduler.rows_per_step == 2
    assert seen.count(5) == 1 and sum(n > 2 for n in seen) <= 2, "once it is known, larger steps are not tried again"


def test_a_job_that_is_too_large_by_itself_ends_alone(expected: Weights) -> None:
    model = tiny("llama", num_labels=2)
    fails_above(model, 3, OUT_OF_MEMORY[0])
    scheduler = train([*company(), job("large", batch_size=4)], model=model)
    large = scheduler.results["large"]
    assert large.status == "failed" and large.error == "CUDA out of memory. Tried to allocate 2.00 GiB"
    assert_same_weights(scheduler.weights, expected, "abcd")


def test_an_error_of_another_kind_leaves_the_rows_as_they_are() -> None:
    scheduler = train([*company(), job("bad", Faulty())], rows_per_step=6)
    assert scheduler.rows_per_step == 6


def test_what_failed_is_forgotten_before_it_is_tried_again() -> None:
    """The activations of a step that ran out of memory are freed, or the half of it would run out too."""
    model = tiny("llama", num_labels=2)
    fails_above(model, 2, OUT_OF_MEMORY[0])
    kept: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def look(_module: nn.Module, _args: Any) -> None:
        alive.append(sum(ref() is not None for ref in kept))

    def note(_module: nn.Module, _args: Any, output: Tensor) -> None:
        kept.append(weakref.ref(output))

    handles = [model.model.register_forward_pre_hook(look), model.model.norm.register_forward_hook(note)]
    train(company(), model=model)
    for handle in handles:
        handle.remove()
    assert len(alive) > 8 and not any(alive)


@pytest.mark.usefixtures("_no_copies")
@pytest.mark.parametrize("at", ["forward", "backward"])
def test_gradients_summed_so_far_outlive_a_step_that_fails(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an accumulation is done when memory runs out, before or in the middle of the backward pass."""
    jobs = [job(name, accumulation=3, epochs=2) for name in "abcdef"]
    wanted = train(jobs).weights
    model = tiny("llama", num_labels=2)
    backward, rows = torch.autograd.backward, []

    def failing(losses: Sequence[Tensor], *args: Any, **options: Any) -> None:
        backward(losses, *args, **options)
        rows.append(len(losses))
        if len(rows) in (2, 7):
            raise OUT_OF_MEMORY[0]

    if at == "backward":
        monkeypatch.setattr(torch.autograd, "backward", failing)
    else:
        rows = fails(model, lambda seen: len(seen) in (2, 7), OUT_OF_MEMORY[0])
    scheduler = train(jobs, model=model)
    assert rows[:8] == [6, 6, 3, 3, 3, 3, 3, 1] and all(r.status == "done" for r in scheduler.results.values())
    assert_same_weights(scheduler.weights, wanted, "abcdef")


def test_a_job_that_ended_in_a_step_that_fails_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One loss is no number, and then memory runs out in the others' backward pass."""
    others = [job(name) for name in "abc"]
    wanted = train(others).weights
    backward, ends = torch.autograd.backward, []

    def failing(losses: Sequence[Tensor], *args: Any, **options: Any) -> None:
        if len(losses) > 1 and ends:
            raise OUT_OF_MEMORY[0]
        backward(losses, *args, **options)

    class Ends(Silent):
        def job_done(self, job: Job, result: JobResult) -> None:
            if job.name == "bad":
                ends.append(result.error)

    monkeypatch.setattr(torch.autograd, "backward", failing)
    scheduler = train([others[0], job("bad", Faulty(where="nan")), *others[1:]], observer=Ends())
    assert len(ends) == 1 and "loss became nan" in ends[0]
    assert scheduler.results["bad"].error == ends[0]
    assert_same_weights(scheduler.weights, wanted, "abc")


# -- rungs


def test_jobs_wait_at_rungs_and_end_as_without_them() -> None:
    def jobs(*rungs: int) -> list[Job]:
        return [job(name, epochs=epochs, rungs=rungs) for name, epochs in zip("abc", (4, 4, 3), strict=True)]

    unpaused = train(jobs())
    with Watched(tiny("llama", num_labels=2), SIX, rows_per_step=2) as scheduler:
        scheduler.add(jobs(1, 3))
        scheduler.run()
        assert [(active.waiting, active.epoch) for active in scheduler.active_jobs.values()] == [(True, 1)] * 3
        tried = len(scheduler.steps)
        scheduler.run()
        assert len(scheduler.steps) == tried, "who waits takes no step"
        assert not scheduler.model.training, "between two runs the model is as it is used elsewhere"
        scheduler.proceed(["b"])
        assert list(scheduler.active_jobs) == ["a", "c"]
        scheduler.run()
        # The last epoch is no rung to wait at.
        assert (
            list(scheduler.active_jobs) == ["a"]
            and scheduler.active_jobs["a"].epoch == 3
            and scheduler.results["c"].status == "done"
        )
        scheduler.proceed(["b", "c", "nobody"])
        scheduler.run()
    stopped = scheduler.results["b"]
    assert stopped.status == "stopped" and stopped.error is None and stopped.predictions is None
    assert len(stopped.epochs) == 1 and stopped.steps == 6
    assert [scheduler.results[name].status for name in "ac"] == ["done", "done"]
    assert_same_weights(scheduler.weights, unpaused.weights, "ac")
    for name in "ac":
        assert len(scheduler.results[name].epochs) == len(unpaused.results[name].epochs)


def test_full_fine_tuning_is_alone_behind_a_rung_too() -> None:
    jobs = [job("full", tz.Full(), epochs=3, rungs=(1,)), job("a", epochs=2, rungs=(1,)), job("b", epochs=2)]
    scheduler = train(jobs)
    assert {r.status for r in scheduler.results.values()} == {"done"}
    assert all(len(step) == 1 for step in scheduler.steps if "full" in step)
    assert len(scheduler.steps) == 18 + 12 + 6, "nothing was tried in vain"


def test_who_waits_makes_room_for_others_and_proceed_touches_nobody_else() -> None:
    with Watched(tiny("llama", num_labels=2), SIX, rows_per_step=1) as scheduler:
        scheduler.add([job(name, epochs=2, rungs=(1,)) for name in "abcd"])
        scheduler.run()
        assert list(scheduler.active_jobs) == list("abcd")
        scheduler.active_jobs["d"].waiting = False
        scheduler.proceed(["d"])
        assert list(scheduler.active_jobs) == list("abcd"), "only who waits can be stopped"
        scheduler.run()
        assert {r.status for r in scheduler.results.values()} == {"done"}


# -- the end


class Interrupts(Silent):
    """Ctrl-C at one moment of a run."""

    def __init__(self, moment: str, name: str):
        self.moment, self.name = moment, name

    def strike(self, moment: str, job: Job) -> None:
        if (moment, job.name) == (self.moment, self.name):
            raise KeyboardInterrupt

    def job_started(self, job: Job, result: JobResult, steps: int) -> None:
        self.strike("job_started", job)

    def step_done(self, job: Job, step: int, steps: int, loss: float) -> None:
        self.strike("step_done", job)

    def epoch_done(self, job: Job, record: EpochRecord) -> None:
        self.strike("epoch_done", job)


@pytest.mark.parametrize("moment", ["job_started", "step_done", "epoch_done"])
def test_ctrl_c_ends_jobs_under_way_and_keeps_those_that_are_done(moment: str) -> None:
    model = tiny("llama", num_labels=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    jobs = [job("a"), job("b", epochs=2), job("c", epochs=2), *(job(name) for name in "defg")]
    scheduler = train(jobs, model=model, observer=Interrupts(moment, "d"), rows_per_step=1)
    assert scheduler.interrupted
    found = {name: r.status for name, r in scheduler.results.items()}
    assert found.pop("d") == "interrupted" and found["a"] == "done" and "g" not in found
    assert "after epoch" in str(scheduler.results["d"].error)
    assert_left_as_it_was(model, before)


@pytest.mark.parametrize("where", ["forward", "penalty", "after_step"])
def test_ctrl_c_in_the_middle_of_a_step(where: str) -> None:
    model = tiny("llama", num_labels=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scheduler = train([*company(), job("e", Faulty(where=where, error=KeyboardInterrupt))], model=model)
    assert {r.status for r in scheduler.results.values()} == {"interrupted"} and len(scheduler.results) == 5
    assert_left_as_it_was(model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, AssertionError])
def test_nothing_is_left_of_a_job_that_was_about_to_begin(error: type[BaseException]) -> None:
    """Ctrl-C, or an error nobody foresaw, while a job that is attached already is being measured."""
    model = tiny("llama", num_labels=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    jobs = [job("a"), job("b", Faulty(where="penalty", after=0, error=error))]
    if error is KeyboardInterrupt:
        scheduler = train(jobs, model=model, measure=True)
        assert scheduler.interrupted and [(n, r.status) for n, r in scheduler.results.items()] == [("a", "interrupted")]
    else:
        with pytest.raises(error):
            train(jobs, model=model, measure=True)
    assert_left_as_it_was(model, before)


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_the_model_is_left_as_it_was(kind: str) -> None:
    model = tiny(kind, "cls", num_labels=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data = task((5, 7), train=4, end=model.config.eos_token_id if kind == "t5" else None)
    jobs = [job("a"), job("b", tz.PrefixTuning(num_virtual_tokens=2)), job("c", tz.PromptTuning(num_virtual_tokens=2))]
    # The last step is one of checkpointed layers.
    jobs += [job("d", gradient_checkpointing=True), job("e", tz.Full(), gradient_checkpointing=True)]
    jobs.append(job("f", tz.LoRA(target_modules=["no"])))
    scheduler = train(jobs, data, model)
    assert [r.status for r in scheduler.results.values()].count("done") == 5
    assert_left_as_it_was(model, before)


def test_jobs_that_are_attached_when_an_observer_fails_are_taken_off() -> None:
    model = tiny("llama", num_labels=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    class Broken(Silent):
        def step_done(self, job: Job, step: int, steps: int, loss: float) -> None:
            raise OSError("no terminal")

    with pytest.raises(OSError, match="no terminal"):
        train(company(), model=model, observer=Broken())
    assert_left_as_it_was(model, before)


def test_names_must_differ_from_all_that_came_before() -> None:
    with Watched(tiny("llama", num_labels=2), SIX) as scheduler:
        scheduler.add([job("a")])
        for again in ([job("a")], [job("b"), job("b")]):
            with pytest.raises(tz.TanzakuError, match=r"job names must differ, found [ab] twice"):
                scheduler.add(again)
        scheduler.run()
        with pytest.raises(tz.TanzakuError, match="must differ"):
            scheduler.add([job("a")])
        assert not scheduler.queue and list(scheduler.results) == ["a"]


def test_labels_must_be_the_models() -> None:
    three = replace(SIX, task=Classification(("a", "b", "c")))
    model = tiny("llama", num_labels=2)
    with pytest.raises(tz.TanzakuError, match="model has 2 labels and the data 3: load it with num_labels=3"):
        train_jobs(model, three, [job("a")])
    with pytest.raises(tz.TanzakuError, match="2 labels and the data 3"):
        train_jobs(model, SIX, [job("a"), job("b", data=three)])
    assert tz.adapters(model) == []


def test_results_come_in_the_order_of_the_jobs() -> None:
    jobs = [job("a", epochs=3), job("f", tz.Full()), job("b"), job("bad", tz.LoRA(r=-1))]
    assert [r.name for r in train_jobs(tiny("llama", num_labels=2), SIX, jobs)] == ["a", "f", "b", "bad"]


def test_the_seconds_of_all_jobs_are_those_of_the_run() -> None:
    """Each step's time is shared out by rows."""
    jobs = [job("a", batch_size=1), job("b", batch_size=3), job("c", tz.IA3(), batch_size=3)]
    data = task((5,), train=24)
    train(jobs, data)  # what is loaded on first use is no job's
    spent: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            began = time.monotonic()
            out = function(*args)
            spent.append(time.monotonic() - began)
            return out

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobScheduler, "_train", timed(JobScheduler._train))
        scheduler = train(jobs, data)
    seconds = {name: r.seconds for name, r in scheduler.results.items()}
    assert 0.8 * sum(spent) < sum(seconds.values()) <= sum(spent)
    for name, result in scheduler.results.items():
        epochs = sum(record.seconds for record in result.epochs)
        assert 0 < epochs <= seconds[name], "the final figures take time after the last epoch"


def test_a_steps_seconds_are_shared_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr("tanzaku.train.scheduler.time.monotonic", lambda: float(next(clock)))
    jobs = [job("a", batch_size=1, epochs=1), job("b", batch_size=3, epochs=2)]
    shares: list[tuple[str, float]] = []
    spend = ActiveJob.spend
    monkeypatch.setattr(ActiveJob, "spend", lambda self, s: (shares.append((self.job.name, s)), spend(self, s))[1])
    train(jobs)
    assert ("a", 0.25) in shares and ("b", 0.75) in shares  # the clock ticks once a step


def test_observers_hear_of_things_in_order() -> None:
    heard: list[tuple[str, str, Any]] = []

    class Listens(Silent):
        def job_started(self, job: Job, result: JobResult, steps: int) -> None:
            heard.append((job.name, "started", steps))

        def step_done(self, job: Job, step: int, steps: int, loss: float) -> None:
            assert loss == loss and steps == 6
            heard.append((job.name, "step", step))

        def epoch_done(self, job: Job, record: EpochRecord) -> None:
            heard.append((job.name, "epoch", record.epoch))

        def job_done(self, job: Job, result: JobResult) -> None:
            heard.append((job.name, "done", result.status))

    jobs = [job("a", epochs=2, batch_size=2), job("b", epochs=3, batch_size=3), job("bad", tz.LoRA(r=-1))]
    train([*jobs, job("c", Faulty(where="nan"), epochs=1)], observer=Listens())

    def of(name: str) -> list[tuple[str, Any]]:
        return [event[1:] for event in heard if event[0] == name]

    a_step = [[("step", 3 * e + 1), ("step", 3 * e + 2), ("step", 3 * e + 3), ("epoch", e + 1)] for e in range(2)]
    assert of("a") == [("started", 6), *a_step[0], *a_step[1], ("done", "done")]
    b_step = [[("step", 2 * e + 1), ("step", 2 * e + 2), ("epoch", e + 1)] for e in range(3)]
    assert of("b") == [("started", 6), *b_step[0], *b_step[1], *b_step[2], ("done", "done")]
    assert of("bad") == [("done", "failed")]
    assert of("c") == [("started", 6), ("step", 1), ("step", 2), ("done", "failed")]
