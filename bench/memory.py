"""The memory of one training step of every method, beside HF PEFT: the peak of the bytes that its tensors hold.

Resident memory moves in steps of a few MiB, too coarse to tell two libraries apart; this is exact and repeats.
"""

from __future__ import annotations

import copy
import warnings

from bench.subjects import METHODS, STEPPERS, batch_of, model_for
from tanzaku.engine.memory import LiveBytes


def table(batches: tuple[int, ...] = (1, 8)) -> None:
    """Print the Markdown table."""
    warnings.filterwarnings("ignore")
    print("| method | rows | HF PEFT | Tanzaku | ratio |")
    print("|---|---|---|---|---|")
    for method in METHODS:
        base = model_for(method)
        for rows in batches:
            batch, peak = batch_of(rows), {}
            for library, make in STEPPERS.items():
                stepper = make(copy.deepcopy(base), method)
                stepper.step(batch)  # the optimizer's state is made in the first
                with LiveBytes() as live:
                    stepper.step(batch)
                peak[library] = live.peak / 2**20
                del stepper
            ratio = peak["tanzaku"] / peak["peft"]
            print(
                f"| {method} | {rows} | {peak['peft']:.1f} MiB | {peak['tanzaku']:.1f} MiB | {ratio:.2f} |", flush=True
            )
