"""The time of one training step of every method, beside HF PEFT.

Times alternate between the two libraries in one process, so that whatever else the machine does falls on both alike.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

from bench.subjects import METHODS, STEPPERS, batch_of, model_for


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


def in_process(*args: str) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.steps", *args],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def table(batches: tuple[int, ...] = (1, 8)) -> None:
    """Print the Markdown table."""
    print("| method | rows | HF PEFT | Tanzaku | ratio |")
    print("|---|---|---|---|---|")
    for method in METHODS:
        for rows in batches:
            t = in_process(method, str(rows), str(16 if rows == 1 else 7))
            ratio = t["tanzaku"] / t["peft"]
            print(
                f"| {method} | {rows} | {t['peft'] * 1e3:.0f} ms | {t['tanzaku'] * 1e3:.0f} ms | {ratio:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    print(json.dumps(times(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
