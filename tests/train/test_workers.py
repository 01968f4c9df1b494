"""Worker processes: the same results, reports and failures as in one process, and nothing left of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import PreTrainedModel

import tanzaku as tz
from close import RUN, assert_close
from models import tiny
from tanzaku.core.adapter import Adapter
from tanzaku.engine import onednn
from tanzaku.engine.memory import in_use
from tanzaku.engine.onednn import Speeds, Times
from tanzaku.engine.products import Copies, Directions
from tanzaku.methods.lora import LoRA
from tanzaku.train import executor, spawned, workers
from tanzaku.train.executor import kind_of_workers
from tanzaku.train.results import EpochRecord, Job, JobResult
from tanzaku.train.scheduler import JobScheduler, Silent, train_jobs
from tanzaku.train.settings import TrainSettings
from tanzaku.train.spawned import Spawned
from tanzaku.train.workers import Crew, Forked, parts, shares, suited
from task_data import task

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not workers.can_fork(CPU), reason="forks are for Linux without CUDA")

DATA = task((5, 7, 4), train=6)
FAST = TrainSettings(epochs=2, learning_rate=0.02, adam_epsilon=1e-3)


def job(name: str, method: Any = None, *, rungs: tuple[int, ...] = (), **changes: Any) -> Job:
    settings = FAST.model_copy(update={"seed": sum(map(ord, name)), **changes})
    return Job(name, method or tz.LoRA(r=2), settings, None, rungs)


class Told(Silent):
    """All that an observer is told, by job, and in which process."""

    def __init__(self) -> None:
        self.of: dict[str, list[Any]] = {}
        self.warnings: list[str] = []
        self.processes: set[int] = set()

    def note(self, job: Job, *what: Any) -> None:
        self.processes.add(os.getpid())
        self.of.setdefault(job.name, []).append(what)

    def job_started(self, job: Job, result: JobResult, steps: int) -> None:
        self.note(job, "started", steps)

    def step_done(self, job: Job, step: int, steps: int, loss: float) -> None:
        self.note(job, "step", step, steps, loss)

    def epoch_done(self, job: Job, record: EpochRecord) -> None:
        self.note(job, "epoch", record.epoch, record.train_loss)

    def job_done(self, job: Job, result: JobResult) -> None:
        self.note(job, "done", result.status)

    def warned(self, line: str) -> None:
        self.warnings.append(line)


@dataclass
class Does(LoRA):
    """LoRA that does something once it has taken so many steps."""

    what: str = "nothing"
    after: int = 2

    def prepare(self, adapter: Adapter, steps: int) -> None:
        if self.what == "write the process":
            Path(os.environ["NOTED"]).joinpath(adapter.name).write_text(str(os.getpid()), encoding="ascii")

    def after_step(self, adapter: Adapter, step: int) -> None:
        if step == self.after:
            if self.what == "be killed" or (self.what == "be killed once" and first("killed " + adapter.name)):
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "raise":
                raise ValueError("this job is wrong")
            if self.what == "break":
                raise AssertionError("this program is wrong")
            if self.what == "interrupt":
                raise KeyboardInterrupt


def first(what: str) -> bool:
    """Whether it happens for the first time, in any process."""
    noted = Path(os.environ["NOTED"]) / what
    with contextlib.suppress(FileExistsError):
        noted.touch(exist_ok=False)
        return True
    return False


@pytest.fixture(params=[Forked, pytest.param(Spawned, marks=(pytest.mark.slow, pytest.mark.product))])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Crew]:
    """Each kind of workers."""
    found: type[Crew] = request.param
    monkeypatch.setattr("tanzaku.train.scheduler.kind_of_workers", lambda device: found)
    return found


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(autouse=True)
def _no_worker_is_left() -> Any:
    resource_tracker.ensure_running()  # which comes with the first process that is no fork, and stays
    before = {p.pid for p in children()}
    yield
    assert {p.pid for p in children()} <= before


# -- who gets what


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 5))
def test_parts_have_every_job_in_order_and_like_loads(costs: list[int], number: int) -> None:
    jobs = [job(str(at)) for at in range(len(costs))]
    found = parts(jobs, costs, number)
    order = [[int(each.name) for each in part] for part in found]
    assert sorted(at for part in order for at in part) == list(range(len(jobs)))
    assert all(part == sorted(part) for part in order)
    loads = [sum(costs[at] for at in part) for part in order]
    assert max(loads) - min(loads) <= max(costs, default=0)
    most = loads.index(max(loads))
    for other in set(range(number)) - {most}:
        for gone in order[most]:
            for less in (costs[gone], *(costs[gone] - costs[back] for back in order[other])):
                assert max(loads[most] - less, loads[other] + less) >= loads[most], "an exchange would have helped"


def test_two_long_jobs_and_five_short_ones_are_not_shared_out_one_by_one() -> None:
    """The costliest first to whom has least would end with 170 and 130."""
    costs = [40, 40, 50, 50, 40, 40, 40]
    found = parts([job(str(at)) for at in range(7)], costs, 2)
    assert sorted(sum(costs[int(each.name)] for each in part) for part in found) == [140, 160]


def test_cost_is_in_tokens_with_virtual_ones_and_all_epochs() -> None:
    scheduler: Any = type("", (), {"data": DATA})
    own = sum(e.length for e in DATA.train.examples)
    assert workers._cost(job("a"), scheduler) == 2 * (own + 6 * workers._START)
    assert workers._cost(job("a", batch_size=4, epochs=1), scheduler) == own + 2 * workers._START
    virtual = tz.PromptTuning(num_virtual_tokens=5)
    assert workers._cost(job("a", virtual), scheduler) == 2 * (own + 6 * 5 + 6 * workers._START)
    assert workers._cost(job("a", tz.PTuning(num_virtual_tokens=5)), scheduler) == workers._cost(
        job("a", virtual), scheduler
    )
    assert workers._cost(job("a", tz.PrefixTuning(num_virtual_tokens=5)), scheduler) == workers._cost(
        job("a"), scheduler
    )


@pytest.mark.parametrize(
    ("threads", "jobs", "rows", "number"), [(2, 8, 16, 2), (16, 8, 16, 5), (2, 1, 16, 1), (4, 9, 7, 2), (1, 8, 16, 1)]
)
def test_so_many_are_suited(threads: int, jobs: int, rows: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert suited([job(str(at)) for at in range(jobs)] + [job("full", tz.Full())], rows) == number


@pytest.mark.parametrize(
    ("threads", "number", "each"), [(2, 2, [1, 1]), (5, 2, [3, 2]), (16, 5, [4, 3, 3, 3, 3]), (1, 2, [1, 1])]
)
def test_threads_are_shared_out(threads: int, number: int, each: list[int]) -> None:
    assert shares(threads, number) == each


def test_seconds_are_of_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    tell = workers._Member.tell

    def noting(self: Any, *message: Any) -> None:
        told.extend([message] if message[0] == "run" else [])
        tell(self, *message)

    monkeypatch.setattr(workers._Member, "tell", noting)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    began = time.monotonic()
    results = train_jobs(tiny("llama", num_labels=2), DATA, [job("a", epochs=4), job("b", epochs=4)], workers=2)
    took = time.monotonic() - began
    assert told == [("run", 2, 0.5)] * 2
    # Side by side each took nearly all the time, with half of the threads.
    assert sum(r.seconds for r in results) < 1.01 * took and all(r.seconds < 0.51 * took for r in results)


# -- the same as in one process


def test_results_reports_and_files_are_those_of_one_process(tmp_path: Path) -> None:
    def run(name: str, number: int) -> tuple[list[JobResult], Told]:
        told = Told()
        jobs = [job("a"), job("b", tz.IA3()), job("full", tz.Full()), job("c", tz.PromptTuning(num_virtual_tokens=3))]
        states = tmp_path / name / "states"
        options: Any = {"out": tmp_path / name, "observer": told, "states": states, "workers": number}
        found = train_jobs(tiny("llama", num_labels=2), task((5, 7, 4), train=6, test=5), jobs, **options)
        assert not any(states.iterdir())
        return found, told

    (alone, expected), (among, found) = run("one", 1), run("two", 2)
    assert_close(found.of, expected.of, RUN, scale=1)
    assert found.processes == {os.getpid()}
    for one, two in zip(alone, among, strict=True):
        assert two.status == "done" and two.name == one.name
        assert_close(two.epochs[-1].valid, one.epochs[-1].valid, RUN)
        assert_close(two.predictions, one.predictions, RUN)
        same = ("method_settings", "trainable_parameters", "note", "steps", "best_epoch", "confusion", "adapter")
        assert [getattr(two, key) for key in same] == [getattr(one, key) for key in same]
        assert two.seconds > 0 and (tmp_path / "two" / str(two.adapter) / "adapter_model.safetensors").is_file()


def test_workers_train_and_the_process_itself_has_no_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTED", str(tmp_path))
    model = tiny("llama", num_labels=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train_jobs(model, DATA, [job(name, Does(r=2, what="write the process")) for name in "abc"], workers=2)
    noted = {path.name: int(path.read_text()) for path in tmp_path.iterdir()}
    assert len(set(noted.values())) == 2 and os.getpid() not in noted.values()
    assert tz.adapters(model) == [] and "_tanzaku_host" not in model.__dict__
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_run_that_is_repeated_is_the_same() -> None:
    jobs = [job(name, epochs=3, learning_rate=0.1) for name in "abcde"]
    one, two = (train_jobs(tiny("llama", num_labels=2), DATA, jobs, workers=2, rows_per_step=4) for _ in range(2))
    for first, second in zip(one, two, strict=True):
        assert_close(second.predictions, first.predictions, RUN)
        assert_close(second.valid, first.valid, RUN)


def test_rows_of_a_step_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    become = JobScheduler.become_worker

    def noting(self: JobScheduler, jobs: Sequence[Job], *rest: Any) -> None:
        become(self, jobs, *rest)
        tmp_path.joinpath("".join(each.name for each in jobs)).write_text(str(self.rows_per_step), encoding="ascii")

    monkeypatch.setattr(JobScheduler, "become_worker", noting)
    train_jobs(tiny("llama", num_labels=2), DATA, [job(name) for name in "abc"], workers=2, rows_per_step=7)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"ac": "4", "b": "3"}


def test_copies_of_weights_are_made_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    if not onednn.available():
        pytest.skip("no oneDNN here")
    made: list[int] = []
    of = Copies.of

    def noting(weight: torch.Tensor, wanted: Directions) -> Copies:
        assert os.getpid() == process
        made.append(weight.nbytes)
        return of(weight, wanted)

    process = os.getpid()
    monkeypatch.setattr(Copies, "of", noting)
    pays = Times(torch=3.0, onednn=2.0, prepacked=1.0)
    monkeypatch.setattr(onednn, "speeds", lambda _kind: Speeds(pays, pays))
    with JobScheduler(tiny("llama", num_labels=2), DATA, workers=2, memory=in_use(CPU) + 10**10) as scheduler:
        room = scheduler.room
        scheduler.add([job("a", rungs=(1,)), job("b", rungs=(1,))])
        scheduler.run()
        assert len(scheduler.waiting) == 2 and scheduler.room == room - 2 * sum(made) and len(made) > 1


# -- rungs


def test_jobs_wait_at_rungs_in_workers_and_end_as_without_them(tmp_path: Path) -> None:
    def jobs(*rungs: int) -> list[Job]:
        return [job(name, epochs=epochs, rungs=rungs) for name, epochs in zip("abcd", (4, 4, 3, 1), strict=True)]

    def pool_of(name: str, number: int) -> JobScheduler:
        return JobScheduler(tiny("llama", num_labels=2), DATA, out=tmp_path / name, workers=number)

    with pool_of("one", 1) as scheduler:
        scheduler.add(jobs())
        scheduler.run()
        expected = scheduler.results
    with pool_of("two", 2) as scheduler:
        scheduler.add([*jobs(1, 3), job("full", tz.Full(), epochs=1)])
        scheduler.run()
        assert scheduler.waiting == {"a": 1, "b": 1, "c": 1} and scheduler.results["d"].status == "done"
        assert scheduler.queued == ["full"], "what runs alone runs when nobody waits any more"
        assert [len(scheduler.results[name].epochs) for name in "abc"] == [1, 1, 1]
        scheduler.proceed(["b"], ["a"])
        assert scheduler.waiting == {"a": 1} and scheduler.results["b"].status == "stopped"
        scheduler.run()
        assert scheduler.waiting == {"a": 1} and scheduler.results["c"].status == "done"
        scheduler.proceed()
        scheduler.run()
        assert scheduler.waiting == {"a": 3}
        scheduler.proceed()
        scheduler.run()
        assert not scheduler.waiting and not scheduler.queued and not scheduler.active_jobs and scheduler.crew is None
        assert {name: r.status for name, r in scheduler.results.items() if r.status != "done"} == {"b": "stopped"}
        for name in "acd":
            assert_close(scheduler.results[name].valid, expected[name].valid, RUN)
        scheduler.add([job("e"), job("f")])
        scheduler.run()
        assert scheduler.results["f"].status == "done"


# -- what goes wrong


def test_a_job_that_fails_ends_alone() -> None:
    wrong = [job("bad", tz.LoRA(r=0)), job("worse", learning_rate=float("nan")), job("x", Does(r=2, what="raise"))]
    results = train_jobs(tiny("llama", num_labels=2), DATA, [job("a"), *wrong, job("b")], workers=2)
    assert [r.status for r in results] == ["done", "failed", "failed", "failed", "done"]
    assert "rank of 1 or more" in str(results[1].error) and results[3].error == "this job is wrong"


@pytest.mark.parametrize("states", [True, False], ids=["states", "no states"])
def test_jobs_of_a_worker_that_is_killed_begin_again_in_another(
    kind: type[Crew], states: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of its second epoch; what is done, and the others, are as they would have been."""
    monkeypatch.setenv("NOTED", str(tmp_path))
    at = {"epochs": 3, "batch_size": 2}
    jobs = [job("a", **at), job("b", Does(r=2, what="be killed once", after=5), **at), job("c", **at), job("d", **at)]
    told = Told()
    folder = tmp_path / "states" if states else None
    found = train_jobs(tiny("llama", num_labels=2), DATA, jobs, workers=2, observer=told, states=folder)
    assert [result.status for result in found] == ["done"] * 4 and (tmp_path / "killed b").is_file()
    [warning] = told.warnings
    assert "killed by signal 9 (the machine may be out of memory)" in warning and "\n" not in warning
    expected = train_jobs(tiny("llama", num_labels=2), DATA, jobs, workers=1)
    for one, other in zip(found, expected, strict=True):
        assert_close(one.valid, other.valid, RUN)
        assert_close([record.train_loss for record in one.epochs], [record.train_loss for record in other.epochs], RUN)
    again = [what[1] for what in told.of["b"] if what[0] == "epoch"]
    assert again == ([1, 2, 3] if states else [1, 1, 2, 3]), "from its last state"
    assert [what[0] for what in told.of["b"]].count("started") == 2


def test_a_worker_that_is_killed_twice_ends_the_run_in_words_and_what_is_done_stays(kind: type[Crew]) -> None:
    told = Told()
    jobs = [job("a", epochs=1), job("b", Does(r=2, what="be killed", after=12)), job("c", epochs=20)]
    with pytest.raises(tz.TanzakuError, match=r"killed by signal 9.*out of memory.*twice with b.*fewer workers"):
        train_jobs(tiny("llama", num_labels=2), DATA, jobs, workers=2, observer=told)
    assert "done" not in [what[0] for what in told.of["b"]]


def test_a_worker_that_is_killed_while_its_jobs_wait_at_a_rung(kind: type[Crew], tmp_path: Path) -> None:
    told = Told()
    jobs = [job(name, epochs=2, rungs=(1,)) for name in "abcd"]
    with JobScheduler(tiny("llama", num_labels=2), DATA, workers=2, states=tmp_path, observer=told) as scheduler:
        scheduler.add(jobs)
        scheduler.run()
        assert scheduler.waiting == dict.fromkeys("abcd", 1) and isinstance(scheduler.crew, kind)
        gone = scheduler.crew.members[0]
        lost, left = sorted(gone.jobs), sorted(scheduler.crew.members[1].jobs)
        gone.process.kill()
        scheduler.proceed()
        assert sorted(scheduler.queued) == lost and not scheduler.waiting
        scheduler.run()
        assert sorted(scheduler.waiting) == lost and [scheduler.results[name].status for name in left] == ["done"] * 2
        scheduler.proceed()
        scheduler.run()
        assert {result.status for result in scheduler.results.values()} == {"done"} and len(told.warnings) == 1
    assert [what[1] for what in told.of[lost[0]] if what[0] == "epoch"] == [1, 2], "no epoch is trained again"


def test_a_worker_that_is_killed_as_the_run_stops(kind: type[Crew]) -> None:
    class Stops(Told):
        def epoch_done(self, job: Job, record: EpochRecord) -> None:
            for member in scheduler.crew.members:  # type: ignore[union-attr]
                member.process.kill()
            raise KeyboardInterrupt

    with JobScheduler(tiny("llama", num_labels=2), DATA, workers=2, observer=Stops()) as scheduler:
        scheduler.add([job("a", epochs=500), job("b", epochs=500)])
        scheduler.run()
        assert scheduler.interrupted
        assert {result.status for result in scheduler.results.values()} == {"interrupted"}


def test_an_error_of_the_program_comes_through_with_its_place() -> None:
    jobs = [job("a", epochs=20), job("b", Does(r=2, what="break"))]
    with pytest.raises(AssertionError, match="this program is wrong") as caught:
        train_jobs(tiny("llama", num_labels=2), DATA, jobs, workers=2)
    assert "in after_step" in str(caught.value.__cause__)


def test_a_damaged_state_is_an_error_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "b.safetensors").write_bytes(b"no state")
    with pytest.raises(tz.TanzakuError, match=r"b.safetensors is damaged"):
        train_jobs(tiny("llama", num_labels=2), DATA, [job("a"), job("b")], workers=2, states=tmp_path)


class _Unportable(Exception):
    def __init__(self, a: int, b: int):
        super().__init__(f"{a} and {b}")


def test_an_error_that_cannot_be_sent_says_what_it_was() -> None:
    error = workers._portable(_Unportable(1, 2))
    assert isinstance(error, RuntimeError) and str(error) == "_Unportable: 1 and 2"
    assert isinstance(workers._portable(tz.TanzakuError("as it is")), tz.TanzakuError)


@pytest.mark.parametrize(("number", "why"), [(0, "at least 1"), (-1, "at least 1")])
def test_wrong_numbers(number: int, why: str) -> None:
    with pytest.raises(tz.TanzakuError, match=f"workers is {number}, expected {why}"):
        JobScheduler(tiny("llama", num_labels=2), DATA, workers=number)


@pytest.mark.parametrize(
    ("device", "forks", "expected"),
    [("cpu", True, Forked), ("cpu", False, Spawned), ("cuda", True, None), ("mps", False, None)],
)
def test_which_workers(device: str, forks: bool, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "can_fork", lambda device: forks)
    monkeypatch.setattr(executor, "suited", suited)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert kind_of_workers(torch.device(device)) is expected
    jobs = [job("a"), job("b"), job("c"), job("full", tz.Full())]
    chosen = executor.number_of_workers(jobs, 16, torch.device(device), None)
    assert chosen == (3 if expected is Forked else 1), "others than forks are made where they are asked for"
    assert executor.number_of_workers(jobs, 16, torch.device(device), 2) == 2


def test_where_no_worker_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tanzaku.train.scheduler.kind_of_workers", lambda device: None)
    with pytest.raises(tz.TanzakuError, match=r"workers is 2.*one process; expected 1"):
        JobScheduler(tiny("llama", num_labels=2), DATA, workers=2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    model = tiny("llama", num_labels=2)
    with JobScheduler(model, DATA) as scheduler:
        scheduler.add([job("a"), job("b")])
        scheduler.run()
        assert scheduler.crew is None and {r.status for r in scheduler.results.values()} == {"done"}


def test_where_no_process_can_be_made_one_does_it(kind: type[Crew], monkeypatch: pytest.MonkeyPatch) -> None:
    started = kind._started

    def failing(self: Any, *part: Any) -> Any:
        if self.members:
            raise OSError(12, "Cannot allocate memory")
        return started(self, *part)

    monkeypatch.setattr(kind, "_started", failing)
    told = Told()
    results = train_jobs(tiny("llama", num_labels=2), DATA, [job("a"), job("b")], workers=2, observer=told)
    assert [r.status for r in results] == ["done", "done"]
    assert told.warnings == [
        "no worker processes can be had ([Errno 12] Cannot allocate memory): one process trains all"
    ]


# -- processes that are no forks


@pytest.mark.slow
def test_spawned_workers_train_as_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base stays bit for bit, and nothing is left behind."""
    monkeypatch.setenv("NOTED", str(tmp_path))
    monkeypatch.setattr("tanzaku.train.scheduler.kind_of_workers", lambda device: Spawned)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    jobs = [job("a"), job("b", tz.IA3()), job("c", Does(r=2, what="write the process")), job("full", tz.Full())]
    model = tiny("llama", num_labels=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = train_jobs(model, DATA, jobs, workers=2, out=tmp_path / "out")
    assert int((tmp_path / "c").read_text(encoding="ascii")) != os.getpid()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not list((tmp_path / "temporary").iterdir()), "the file is gone"
    expected = train_jobs(tiny("llama", num_labels=2), DATA, jobs, workers=1, out=tmp_path / "one")
    for one, other in zip(found, expected, strict=True):
        assert one.status == "done" and one.adapter == other.adapter
        assert_close(one.valid, other.valid, RUN)
        own, others = (
            load_file(folder / str(one.adapter) / "adapter_model.safetensors")
            for folder in (tmp_path / "out", tmp_path / "one")
        )
        assert_close(own, others, RUN)


def test_a_model_in_two_parts_is_whole_again_and_its_weights_are_mapped() -> None:
    model = tiny("gpt2", num_labels=2)
    weights = spawned._Weights()
    try:
        again = spawned._with_weights(weights.taken_from(model), weights.path)
    finally:
        weights.close()
    expected = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = {**dict(again.named_parameters()), **dict(again.named_buffers())}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    mapped = [
        range(*(int(end, 16) for end in line.split()[0].split("-"))) for line in maps if "weights.safetensors" in line
    ]
    assert all(any(tensor.data_ptr() in part for part in mapped) for tensor in found.values() if tensor.numel())
    with torch.no_grad():
        found["transformer.wte.weight"].zero_()
    assert not torch.equal(found["transformer.wte.weight"], expected["transformer.wte.weight"]), "no other's changes"


SPAWNS = """
    import sys
    sys.path.insert(0, {tests!r})
    import tanzaku.train.scheduler as scheduling
    from tanzaku.train.spawned import Spawned
    from test_workers import DATA, job, tiny
    scheduling.kind_of_workers = lambda device: Spawned
    {guard}scheduling.train_jobs(tiny("llama", num_labels=2), DATA, [job("a"), job("b")], workers=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guard", "code", "said"),
    [
        ("", 1, "reads the program's main module, so put what trains below if __name__"),
        pytest.param("if __name__ == '__main__': ", 0, "", marks=pytest.mark.product),
    ],
    ids=["bare", "guarded"],
)
def test_a_program_whose_main_module_trains_is_told_what_to_do(
    guard: str, code: int, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "program.py"
    here = Path(__file__).parent
    path.write_text(textwrap.dedent(SPAWNS).format(tests=str(here), guard=guard), encoding="utf-8")
    paths = os.pathsep.join([str(here), str(here.parent), *sys.path])
    found = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert found.returncode == code and said in found.stderr, found.stderr


# -- memory


def test_what_is_too_large_for_a_share_of_the_memory_is_trained_in_the_process_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTED", str(tmp_path))
    jobs = [job(name, Does(r=2, what="write the process")) for name in "ab"]
    # Half of it is less than what a worker needs for itself.
    memory = in_use(CPU) + Forked.private
    results = train_jobs(tiny("llama", num_labels=2), DATA, jobs, workers=2, memory=memory)
    assert [(r.status, r.error) for r in results] == [("done", None)] * 2
    assert {path.read_text() for path in tmp_path.iterdir()} == {str(os.getpid())}
    memory = in_use(CPU) + 10 * Forked.private
    train_jobs(tiny("llama", num_labels=2), DATA, jobs, workers=2, memory=memory)
    assert str(os.getpid()) not in {path.read_text() for path in tmp_path.iterdir()}


# -- the end


class Interrupts(Told):
    """Ctrl-C at one moment of a run."""

    def __init__(self, moment: str, name: str):
        super().__init__()
        self.moment, self.name = moment, name

    def note(self, job: Job, *what: Any) -> None:
        if (what[0], job.name) == (self.moment, self.name):
            self.moment = "never again"
            raise KeyboardInterrupt
        super().note(job, *what)


@pytest.mark.parametrize("moment", ["started", "step", "epoch", "done"])
def test_ctrl_c_ends_jobs_under_way_and_keeps_those_that_are_done(moment: str, tmp_path: Path) -> None:
    model: PreTrainedModel = tiny("llama", num_labels=2)
    jobs = [job("a", epochs=1), job("b", epochs=200), job("c", epochs=200), job("d", epochs=9)]
    told = Interrupts(moment, "d")
    with JobScheduler(model, DATA, workers=2, states=tmp_path, observer=told, rows_per_step=4) as scheduler:
        scheduler.add(jobs)
        scheduler.run()
        assert scheduler.interrupted
        status = {name: r.status for name, r in scheduler.results.items()}
    assert status["b"] == status["c"] == "interrupted" and "after epoch" in str(scheduler.results["b"].error)
    assert status["d"] == ("done" if moment == "done" else "interrupted")
    if moment in ("epoch", "done"):
        assert (tmp_path / "d.safetensors").is_file(), "nobody has noted its end: it may go on from there"
    if moment == "done":
        assert status["a"] == "done" and not (tmp_path / "a.safetensors").exists()
    assert tz.adapters(model) == []


def test_a_job_that_interrupts_ends_the_run() -> None:
    with JobScheduler(tiny("llama", num_labels=2), DATA, workers=2) as scheduler:
        scheduler.add([job("a"), job("b", Does(r=2, what="interrupt"))])
        scheduler.run()
        assert scheduler.interrupted and scheduler.results["b"].status == "interrupted"


def test_ctrl_c_is_noted_once_and_stays_ignored_where_it_was() -> None:
    # Where the tests run in the background of a shell, it is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), workers._deferred_interrupt() as noted:
            os.kill(os.getpid(), signal.SIGINT)
            assert noted == [signal.SIGINT]
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with workers._deferred_interrupt() as noted:
            os.kill(os.getpid(), signal.SIGINT)
            assert not noted
    finally:
        signal.signal(signal.SIGINT, before)


SCRIPT = """
    import signal, sys
    from pathlib import Path
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal
    sys.path.insert(0, {tests!r})
    from test_workers import DATA, Silent, job, tiny, train_jobs

    class Says(Silent):
        def step_done(self, job, step, steps, loss):
            print(job.name, step, flush=True)

    jobs = [job(name, epochs=5000) for name in "ab"]
    found = train_jobs(tiny("llama", num_labels=2), DATA, jobs, workers=2, observer=Says())
    print("ended", *(r.status for r in found), flush=True)
"""


def script() -> subprocess.Popen[str]:
    here = Path(__file__).parent
    text = textwrap.dedent(SCRIPT).format(tests=str(here))
    path = os.pathsep.join([str(here), str(here.parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", text],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )


def under_way(running: subprocess.Popen[str]) -> list[psutil.Process]:
    assert running.stdout is not None
    seen = set()
    for line in running.stdout:
        seen.add(line[:1])
        if seen >= {"a", "b"}:
            return psutil.Process(running.pid).children()
    raise AssertionError("it ended before both had begun")


@pytest.mark.slow
def test_workers_die_with_the_process() -> None:
    running = script()
    own = under_way(running)
    assert len(own) == 2
    running.kill()
    running.wait()
    gone, alive = psutil.wait_procs(own, timeout=5)
    assert len(gone) == 2 and not alive


@pytest.mark.slow
@pytest.mark.parametrize("group", [False, True], ids=["the process alone", "all of the terminal"])
def test_the_signal_of_ctrl_c(group: bool) -> None:
    running = script()
    own = under_way(running)
    time.sleep(0.1)
    (os.killpg if group else os.kill)(running.pid, signal.SIGINT)
    out, _ = running.communicate(timeout=60)
    assert out.splitlines()[-1] == "ended interrupted interrupted" and running.returncode == 0
    assert not any(p.is_running() for p in own)
