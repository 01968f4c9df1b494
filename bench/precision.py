"""bf16 beside fp32: the same candidates in turns on a base of each type, and figures over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

import tanzaku as tz
from bench import quality
from bench.concurrent import SETTINGS, book, loras, poems, tanzaku_seconds
from tanzaku.engine.precision import precision_for
from tanzaku.models.families import Base
from tanzaku.models.loading import load_classifier
from tanzaku.train.results import Job, JobResult
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def table(rows: int = 20, rounds: int = 3, seeds: int = 5, epochs: int = 2) -> None:
    """Print seconds of concurrent runs, and validation figures of LoRA."""
    models = {name: load_classifier("embedded", 2, dtype=kind) for name, kind in TYPES.items()}
    sizes = [sum(p.nbytes for p in Base.of(model).model.parameters()) / 1e6 for model in models.values()]
    here = precision_for(models["bf16"].device, torch.bfloat16)
    print(f"`precision: auto` is {here} here; weights of {sizes[0]:.0f} and {sizes[1]:.0f} MB\n")
    print("| candidates | fp32 | bf16 | of the time |\n|---|---|---|---|")
    data = poems(rows)
    for title, candidates in (("the book's seven", book()), ("eight LoRA, r=8", loras(8))):
        took: dict[str, list[float]] = {name: [] for name in TYPES}
        for _ in range(rounds):
            for name, model in models.items():
                settings = SETTINGS.model_copy(update={"precision": name})
                took[name].append(tanzaku_seconds(model, candidates, data, workers=1, settings=settings))
        full, half = (statistics.median(took[name]) for name in TYPES)
        print(f"| {title} | {full:.1f} s | {half:.1f} s | {half / full:.2f} |", flush=True)
    print(f"\nLoRA (r=8) on the bundled lines, {seeds} seeds, means and standard deviations:\n")
    print("| | training loss by epoch | validation loss | ROC-AUC |\n|---|---|---|---|")
    lines = quality.poems()
    for name, model in models.items():
        settings = TrainSettings(epochs=epochs, learning_rate=5e-4, batch_size=4, precision=name)
        jobs = [Job(f"lora-{n}", tz.LoRA(r=8), settings.model_copy(update={"seed": n})) for n in range(seeds)]
        print(_line(name, train_jobs(model, lines, jobs)), flush=True)


def _line(name: str, results: Sequence[JobResult]) -> str:
    def spread(values: Sequence[float]) -> str:
        return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"

    epochs = zip(*([record.train_loss for record in result.epochs] for result in results), strict=True)
    last = [result.epochs[-1].valid or {} for result in results]
    curve = ", ".join(map(spread, epochs))
    return f"| {name} | {curve} | {spread([v['loss'] for v in last])} | {spread([v['roc_auc'] for v in last])} |"
