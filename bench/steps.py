"""One training step of every method: time and peak memory, beside HF PEFT.

Times alternate between the two libraries in one process, so that whatever else the machine does falls on both alike.
Memory is read in a process of its own for each library: what resident memory rises to in a step, above what the loaded
model holds.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

from bench.subjects import METHODS, STEPPERS, batch_of, model_for
from tanzaku.train.memory import peak, reset_peak

_CPU = torch.device("cpu")


def times(method: str, rows: int, rounds: int) -> dict[str, float]:
    """Seconds a step of each library: the median of `rounds` in turns."""
    warnings.filterwarnings("ignore")
    model = model_for(method)
    steppers = {name: make(copy.deepcopy(model), method) for name, make in STEPPERS.items()}
    batch = batch_of(rows)
    seen: dict[str, list[float]] = {name: [] for name in steppers}
    for round_ in range(rounds + 2):
        for name, stepper in steppers.items():
            began = time.perf_counter()
            stepper.step(batch)
            if round_ >= 2:
                seen[name].append(time.perf_counter() - began)
    return {name: sorted(values)[len(values) // 2] for name, values in seen.items()}


def memory(library: str, method: str, rows: int) -> dict[str, int]:
    """Bytes: resident before the first step, and the highest in three steps."""
    warnings.filterwarnings("ignore")
    model = model_for(method)
    # Weights that still lie in the mapped file would be counted when they are first read.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    stepper = STEPPERS[library](model, method)
    reset_peak(_CPU)
    before = peak(_CPU)
    for _ in range(3):
        stepper.step(batch_of(rows))
    return {"before": before, "peak": peak(_CPU)}


def in_process(what: str, *args: str) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.steps", what, *args],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def table(batches: tuple[int, ...] = (1, 8)) -> None:
    """Print the Markdown table."""
    print("| method | rows | step, PEFT | step, Tanzaku | ratio | peak above model, PEFT | Tanzaku | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for method in METHODS:
        for rows in batches:
            t = in_process("times", method, str(rows), str(16 if rows == 1 else 7))
            m = {library: in_process("memory", library, method, str(rows)) for library in STEPPERS}
            above = {library: (x["peak"] - x["before"]) / 2**20 for library, x in m.items()}
            print(
                f"| {method} | {rows} | {t['peft'] * 1e3:.0f} ms | {t['tanzaku'] * 1e3:.0f} ms "
                f"| {t['tanzaku'] / t['peft']:.2f} | {above['peft']:.0f} MiB | {above['tanzaku']:.0f} MiB "
                f"| {above['tanzaku'] / above['peft']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "times":
        print(json.dumps(times(rest[0], int(rest[1]), int(rest[2]))))
    else:
        print(json.dumps(memory(rest[0], rest[1], int(rest[2]))))
