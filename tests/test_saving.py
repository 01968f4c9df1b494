"""Kill -9 at any moment of writing leaves what was there or what shall be there, whole, and nothing for long beside it.

A forked process is killed at every line that it runs in the code that writes, one after another, until it survives; and
by the kernel in the middle of a write, after so many bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import tanzaku as tz
from close import close
from models import batch, tiny
from tanzaku.cli.record import write_results
from tanzaku.compare.journal import Journal
from tanzaku.files import writing as files
from tanzaku.files.writing import directory_beside
from tiers import costly

# Whose lines count: the code that touches the file system, and what it calls for that.
WRITERS = {files.__file__, sys.modules["shutil"].__file__, sys.modules["tempfile"].__file__}
CALLERS = {"save", "_json", "_sha256", "_write", "keep", "write_results"}
NAMES = {"adapter_config.json", "adapter_model.safetensors", "tanzaku.json"}


def killed(work: Callable[[], object], line: int = 0, size: int = 0) -> bool:
    """Do the work in a child that is killed before its `line`-th line, or when a file would exceed `size` bytes."""
    child = os.fork()
    if child == 0:
        try:
            if size:
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            if line:
                sys.settrace(tracer(line))
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def tracer(line: int) -> Callable[..., Any]:
    seen = 0

    def lines(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if event == "line":
            seen += 1
            if seen == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return lines

    def calls(frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        return lines if code.co_filename in WRITERS or code.co_name in CALLERS else None

    return calls


def until_it_survives(work: Callable[[], object], check: Callable[[], bool], *, least: int) -> None:
    """Kill the work at every line. After each kill `check` tells whether the new one is there; at first it is not, and
    from some line on it is."""
    told = []
    for line in count(1):
        if not killed(work, line):
            break
        told.append(check())
    assert check() and len(told) >= least
    assert told == sorted(told) and not told[0], "the new one was there, and then the old one again"


@pytest.fixture(scope="module")
def model() -> Any:
    """A model with two adapters, `old` and `new`, of different methods."""
    model = tiny("llama", num_labels=2)
    for name, method in (("old", tz.LoRA(r=2)), ("new", tz.IA3())):
        adapter = tz.attach(model, method, name, seed=0)
        with torch.no_grad():
            for _, parameter in adapter.trained():
                parameter.add_(0.1)
    return model


def which(model: Any, path: Path) -> str:
    """The adapter that a directory holds, by what it computes."""
    inputs = batch(model)
    tz.load(model, path, "loaded")  # which puts back what a kill has left under another name
    try:
        assert {each.name for each in path.iterdir()} >= NAMES
        found = {}
        for name in ("old", "new", "loaded"):
            with tz.route(model, [name] * 4):
                found[name] = model(**inputs).logits
    finally:
        tz.detach(model, "loaded")
    same = [name for name in ("old", "new") if close(found[name], found["loaded"])]
    assert len(same) == 1, "neither the one nor the other"
    return same[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("over", "exchange"),
    costly([(True, True)], [(True, False), (False, True), (False, False)]),
    ids=["over-exchanging", "over-renaming twice", "fresh-exchanging", "fresh-renaming twice"],
)
def test_saving_an_adapter(
    model: Any, over: bool, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "a", tmp_path / "a.b"
    tz.save(model, "old", other)
    if not exchange:  # as on a file system that cannot exchange names
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    if over:
        tz.save(model, "old", path)

    def check() -> bool:
        if not over and not path.exists():
            return False
        found = which(model, path)
        assert found == "new" or over
        if over and found == "new":
            tz.save(model, "old", path)  # for the next kill
        elif not over:
            for each in path.iterdir():
                each.unlink()
            path.rmdir()
        return found == "new"

    until_it_survives(lambda: tz.save(model, "new", path), check, least=60)
    tz.save(model, "new", path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "a.b"], "something is left beside it"
    assert which(model, other) == "old"


@pytest.mark.parametrize("size", [1, 100, 1000, 2000, 3000])
def test_killed_in_the_middle_of_a_write(model: Any, size: int, tmp_path: Path) -> None:
    path = tz.save(model, "old", tmp_path / "a")
    assert size < (path / "adapter_model.safetensors").stat().st_size
    assert killed(lambda: tz.save(model, "old", path), size=size)
    assert which(model, path) == "old"
    assert len(list(tmp_path.iterdir())) == 2
    tz.save(model, "new", path)
    assert which(model, path) == "new" and list(tmp_path.iterdir()) == [path]


def test_what_others_are_writing_is_left_alone(tmp_path: Path) -> None:
    """A directory that a living process writes, and names that only look like leftovers."""
    like = [tmp_path / name for name in (".a.b.12345678.saving", ".a.short.saving", ".a.12345678.other", ".ab.saving")]
    for each in like:
        each.mkdir()
    with directory_beside(tmp_path / "a") as first:
        (first / "x").write_text("first")
        with directory_beside(tmp_path / "a") as second:
            assert first != second and first.exists()
            (second / "x").write_text("second")
        assert (tmp_path / "a" / "x").read_text() == "second"
    assert (tmp_path / "a" / "x").read_text() == "first"
    assert sorted(tmp_path.iterdir()) == sorted([*like, tmp_path / "a"])


def test_a_file_system_without_locks_clears_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(9, "Bad file descriptor")

    (tmp_path / ".a.12345678.saving").mkdir()
    monkeypatch.setattr(fcntl, "flock", flock)
    with directory_beside(tmp_path / "a") as beside:
        (beside / "x").write_text("here")
    assert sorted(each.name for each in tmp_path.iterdir()) == [".a.12345678.saving", "a"]


def test_a_directory_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two renames fails: the first is taken back."""
    (tmp_path / "a").mkdir()
    rename = Path.rename

    def once(self: Path, to: Path) -> Path:
        if self.name.endswith(".saving"):
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(OSError, match="Input/output"), directory_beside(tmp_path / "a"):
        pass
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("kind", ["results", "journal"])
def test_writing_a_file(kind: str, tmp_path: Path) -> None:
    """results.json, and a journal's record of a job."""
    (tmp_path / "state" / "jobs").mkdir(parents=True)

    def write(value: str) -> Callable[[], object]:
        if kind == "results":
            return lambda: write_results(tmp_path, {"name": value})
        return lambda: Journal(tmp_path).keep({"name": "job", "value": value})

    path = tmp_path / ("results.json" if kind == "results" else "state/jobs/job.json")
    write("old" * 1000)()

    def check() -> bool:
        found = json.loads(path.read_text(encoding="utf-8"))
        new = "new" in str(found)
        assert ("old" * 1000 in str(found)) != ("new" * 1000 in str(found))
        if new:
            write("old" * 1000)()
        return new

    until_it_survives(write("new" * 1000), check, least=8)
    assert killed(write("new" * 1000), size=500)
    assert not check()
    write("new")()
    assert [each.name for each in path.parent.iterdir() if each.is_file()] == [path.name]


def test_an_adapter_is_on_the_disk_before_it_has_its_name(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut could lose is brought to the disk first: every file, their names, and at last the new name."""
    order: list[str] = []
    monkeypatch.setattr(files, "to_disk", lambda path: order.append(path.name))
    monkeypatch.setattr(files, "replace_directory", lambda new, target: (order.append("here"), new.rename(target)))
    tz.save(model, "new", tmp_path / "a")
    *names, beside, here, above = order
    assert set(names) >= NAMES and beside.endswith(".saving") and (here, above) == ("here", tmp_path.name)
    assert set(names) == {each.name for each in (tmp_path / "a").iterdir()}
