"""Systems that lack what Linux has, as Windows does: file locks, resource, fork, prctl, an exchange of names, and
moving or removing what is open."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli_kit import results_of

from tanzaku.engine import memory

# Other libraries look at the system's name, and count on what Linux has: nothing is missing but for us.
LACKING = """
import builtins, ctypes, fcntl, os, sys, types
flock, found = fcntl.flock, builtins.__import__
def lacking(name, space=None, *args, **more):
    ours = (space or {}).get("__name__", "").startswith("tanzaku")
    if ours and name in ("fcntl", "resource"):
        raise ModuleNotFoundError(name)
    return found(name, space, *args, **more)
builtins.__import__ = lacking
import torch
for name in ("fork", "register_at_fork", "O_CLOEXEC"):
    delattr(os, name)
whole = ctypes.CDLL
class CDLL(whole):
    def __init__(self, name, *args, **options):
        if name is None:
            raise TypeError("argument of type 'NoneType' is not iterable")
        super().__init__(name, *args, **options)
ctypes.CDLL = CDLL
def with_nothing_open(function):
    def moved(path, *args, **options):
        handles = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        used = [os.readlink(handle) for handle in handles if os.path.islink(handle)]
        used += [line.split(maxsplit=5)[-1] for line in open("/proc/self/maps").read().splitlines()]
        whole = os.path.abspath(path)
        if "dir_fd" not in options and any(f"{each}/".startswith(f"{whole}/") for each in used):
            raise PermissionError(13, "it is in use", whole)
        return function(path, *args, **options)
    return moved
for name in ("rename", "replace", "unlink"):
    setattr(os, name, with_nothing_open(getattr(os, name)))
"""

# Windows' locks, made of the other ones. They are for files alone.
MSVCRT = """
def locking(handle, mode, number):
    assert number == 1 and not __import__("stat").S_ISDIR(os.fstat(handle).st_mode)
    try:
        flock(handle, 2 | 4)
    except BlockingIOError:
        raise PermissionError(13, "Permission denied") from None
sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
"""


def run(prelude: str, code: str) -> list[str]:
    """Lines that the program prints."""
    program = [sys.executable, "-c", prelude + code]
    found = subprocess.run(program, capture_output=True, text=True, encoding="utf-8")
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


def test_the_library(model_dir: Path, tmp_path: Path) -> None:
    """Attach, train, save, save over it, load."""
    said = run(
        LACKING,
        f"""
import torch, transformers, tanzaku as tz
torch.set_num_threads(2)
model = transformers.AutoModelForCausalLM.from_pretrained({str(model_dir)!r})
tz.attach(model, tz.LoRA(r=2), "a")
tz.activate(model, "a")
ids = torch.tensor([[4, 5, 6]])
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
for _ in range(2):
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    kept = tz.save(model, "a", {str(tmp_path / "a")!r})
one = model(ids).logits
tz.load(model, kept, name="b")
tz.activate(model, "b")
print(torch.equal(one, model(ids).logits))
from tanzaku.train import workers
print(workers.can_fork(torch.device("cpu")))
""",
    )
    assert said == ["True", "False"]
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


COMMANDS = """
import json
from tanzaku.cli import main
for command in json.loads(sys.argv[1]):
    print("code", main(command), flush=True)
"""


def commands(prelude: str, *each: str) -> list[tuple[int, str]]:
    """The code of each command, and what all have said on standard error."""
    listed = json.dumps([command.split() for command in each])
    found = subprocess.run(
        [sys.executable, "-c", prelude + COMMANDS, listed], capture_output=True, text=True, encoding="utf-8"
    )
    codes = [int(line.split()[1]) for line in found.stdout.splitlines() if line.startswith("code ")]
    assert len(codes) == len(each), found.stderr
    said = iter(line for line in found.stderr.splitlines() if line.startswith("tanzaku: error"))
    return [(code, next(said) if code else "") for code in codes]


def test_the_command_line(work: Path) -> None:
    """Train, compare and predict; a second run in the same directory is told what is there."""
    predict = "predict run/adapters/lora --data test.tsv --out out"
    said = commands(
        LACKING,
        "train recipe.yaml --out run",
        "train recipe.yaml --out run",
        "train recipe.yaml --out run --overwrite",
        "compare recipe.yaml --out all --seeds 1",
        "compare recipe.yaml --out all --overwrite --workers 2",
        f"{predict}.tsv",
        f"{predict}.tsv",
        f"{predict}.parquet",
    )
    assert [code for code, _ in said] == [0, 2, 0, 0, 0, 0, 2, 0], said
    assert "run is not empty" in said[1][1] and "--overwrite" in said[1][1]
    assert "--overwrite" in said[6][1]
    assert all(job["status"] == "done" and job["peak_memory_bytes"] > 0 for job in results_of(work / "run")["jobs"])
    assert not list(work.rglob(".*"))


@contextmanager
def other(prelude: str, statement: str) -> Iterator[None]:
    """A process that is within the block of `statement`, until the end of this one."""
    code = "from pathlib import Path\nfrom tanzaku.cli.record import locked\n"
    code += "from tanzaku.cli.output import Lines, Partial\n"
    code += f"with {statement}:\n print('there', flush=True); sys.stdin.read()"
    program = [sys.executable, "-c", prelude + code]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
        yield
        process.kill()


def test_locks_of_windows(work: Path) -> None:
    """A directory and a file belong to one process, until it is killed."""
    (work / "run").mkdir()
    partial = "Partial(Path('out.tsv'), Lines('tsv', ['a']), {}, resume=False)"
    train, predict = "train recipe.yaml --out run", "predict run/adapters/lora --data test.tsv --out out.tsv"
    with other(LACKING + MSVCRT, "locked(Path('run'))"):
        assert "run is in use by another run" in commands(LACKING + MSVCRT, train)[0][1]
    assert commands(LACKING + MSVCRT, train) == [(0, "")]
    with other(LACKING + MSVCRT, partial):
        assert "being written by another" in commands(LACKING + MSVCRT, predict)[0][1]
    assert commands(LACKING + MSVCRT, predict) == [(0, "")]


def test_the_peak_of_memory_where_psutil_alone_knows_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "resource", None)
    assert memory.peak(torch.device("cpu")) == pytest.approx(memory.in_use(torch.device("cpu")), rel=0.2)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=5, peak_wset=7))
    monkeypatch.setattr(memory.psutil, "Process", lambda: process)
    assert memory.peak(torch.device("cpu")) == 7
