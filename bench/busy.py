"""What waiting costs on a busy machine: a step of full fine-tuning, alone and beside others, by how threads wait.

Threads that share a product wait for the slowest at its end. GNU's OpenMP has them spin at first, which is quickest
where every thread has a core; where it has none, who waits burns the core that the awaited one needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

# By environment: torch's own, and the waits between which the command line could choose.
_WAITS: dict[str, dict[str, str]] = {
    "as torch does": {},
    "a short spin": {"GOMP_SPINCOUNT": "1000"},
    "asleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
}


def table(others: tuple[int, ...] = (0, 10), steps: tuple[int, ...] = (20, 3)) -> None:
    """Print the Markdown table, means over `steps` steps beside so many `others`."""
    print("| other busy processes | threads wait | seconds a step | processor seconds a step |")
    print("|---|---|---|---|")
    for count, number in zip(others, steps, strict=True):
        for name, wait in _WAITS.items():
            wall, processor = _in_process(count, number, wait)
            print(f"| {count} | {name} | {wall:.2f} | {processor:.2f} |", flush=True)


def _in_process(others: int, steps: int, wait: dict[str, str]) -> list[float]:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    done = subprocess.run(
        [sys.executable, "-m", "bench.busy", str(others), str(steps)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
        env=environment | wait | {"THP_MEM_ALLOC_ENABLE": "1"},  # as the command line has it
    )
    result: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _steps(others: int, steps: int) -> tuple[float, float]:
    """Seconds by the clock and of processor time of a step of one row."""
    from bench.subjects import STEPPERS, batch_of, model_for

    stepper, batch = STEPPERS["tanzaku"](model_for("full"), "full"), batch_of(1)
    stepper.step(batch)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
    try:
        began, used = time.perf_counter(), time.process_time()
        for _ in range(steps):
            stepper.step(batch)
        return (time.perf_counter() - began) / steps, (time.process_time() - used) / steps
    finally:
        for process in busy:
            process.kill()


if __name__ == "__main__":
    print(json.dumps(_steps(int(sys.argv[1]), int(sys.argv[2]))))
