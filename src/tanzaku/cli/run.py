"""What `train`, `compare` and `demo` share: check everything that is cheap, then load the model, then train."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tanzaku.errors import TanzakuError, listed
from tanzaku.recipe import Recipe, jobs_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from tanzaku.train.results import Job, JobResult


class Interrupted(Exception):
    """Ctrl-C; says what was kept and how to go on."""


def run(command: str, recipe: Recipe, overwrite: bool) -> None:
    """Train a recipe's candidates and report on them.

    Raises:
        TanzakuError: bad input, found before the model is loaded where that can be, or no candidate succeeded.
        Interrupted: Ctrl-C while training; finished candidates are kept.
        typer.Exit: with code 1, some candidates failed.
    """
    jobs = jobs_of(recipe)
    _check_sense(recipe, jobs)
    from tanzaku.cli.machine import device_named, quieten
    from tanzaku.cli.record import prepare_out
    from tanzaku.tasks.prepare import read_classification

    quieten()
    device = device_named(recipe.device)
    read = read_classification(recipe.data)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    out = Path(recipe.out or f"runs/{command}-{stamp}").expanduser()
    prepare_out(out, overwrite)
    try:
        _train(command, recipe, jobs, read, device, out)
    finally:
        # They go only if they are empty: a run that could not begin leaves nothing.
        with suppress(OSError):
            out.rmdir()
            if recipe.out is None:
                out.parent.rmdir()


def _train(command: str, recipe: Recipe, jobs: list[Job], read: Any, device: str, out: Path) -> None:
    from tanzaku.cli.display import Display
    from tanzaku.cli.machine import machine, versions
    from tanzaku.cli.record import Record, clear, data_record
    from tanzaku.models import load_classifier, load_tokenizer
    from tanzaku.tasks.prepare import encode_classification
    from tanzaku.train.loop import train_jobs

    started, clock = datetime.now(UTC), time.monotonic()
    display = Display(len(jobs))
    tokenizer = load_tokenizer(recipe.model, on_progress=display.say)
    data = encode_classification(read, recipe.data, tokenizer, recipe.train.max_length)
    display.data(data, recipe.train.max_length)
    labels = data.labels.to_config()["id2label"]
    model = load_classifier(recipe.model, len(labels), id2label=labels, dtype=_dtype(jobs), seed=recipe.train.seed)
    _check_fit(model, jobs)
    model.to(device)
    display.say(f"model: {recipe.model}, {model.num_parameters():,} parameters, on {device}")
    clear(out)
    about = {
        "command": command,
        "recipe": recipe.model_dump(mode="json"),
        "versions": versions(),
        "device": device,
        "machine": machine(device),
        "data": data_record(data),
        "started": started.isoformat(timespec="seconds"),
    }
    meta = {
        "task": recipe.task,
        "model": _portable(recipe.model),
        "labels": list(data.labels.names),
        "text": recipe.data.text,
        "text_pair": recipe.data.text_pair,
        "max_length": recipe.train.max_length,
    }
    record = Record(out, about, clock, display)
    record.write()
    try:
        with display:
            train_jobs(model, data, jobs, out=out, observer=record, meta=meta)
    except KeyboardInterrupt:  # between two candidates
        record.stopped = True
    record.write()
    results = record.results
    done = [result for result in results if result.status == "done"]
    if done and command == "train":
        display.adapter(done[0], data, out)
    elif done:
        display.ranking(results, data, out)
    if record.stopped:
        if not done:
            clear(out)
        raise Interrupted(_how_to_go_on(command, jobs, done, out))
    _check_success(jobs, results)


def _check_sense(recipe: Recipe, jobs: Sequence[Job]) -> None:
    if recipe.data.valid is not None:
        return
    for job in jobs:
        if job.settings.patience is not None or job.settings.restore_best:
            key = "restore_best" if job.settings.restore_best else "patience"
            raise TanzakuError(f"candidate {job.name!r}: {key} needs validation rows; give --valid, or leave it out")


def _check_fit(model: PreTrainedModel, jobs: Sequence[Job]) -> None:
    """Hang every candidate on a copy without weights, so that the last of many does not fail after hours."""
    import copy

    import torch

    from tanzaku.host import attach, detach

    with torch.device("meta"):
        twin = type(model)(model.config)
    for job in jobs:
        try:
            attach(twin, copy.deepcopy(job.method), job.name)
            detach(twin, job.name)
        except TanzakuError as error:
            raise TanzakuError(f"candidate {job.name!r}: {error}") from None


def _dtype(jobs: Sequence[Job]) -> torch.dtype:
    """Of the frozen weights: bf16 halves them where every candidate computes in it; adapters stay in fp32."""
    import torch

    return torch.bfloat16 if all(job.settings.precision == "bf16" for job in jobs) else torch.float32


def _portable(model: str) -> str:
    """A model's name as it can be loaded from any directory."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() and model != "embedded" else model


def _how_to_go_on(command: str, jobs: Sequence[Job], done: Sequence[JobResult], out: Path) -> str:
    if not done:
        return "interrupted before a candidate was finished; nothing is kept, so run the same command again"
    names = [result.name for result in done]
    flag = "--methods" if command == "demo" else "--method"
    rest = " ".join(f"{flag} {job.name}" for job in jobs if job.name not in names)
    fix = f"go on with {rest} and another --out" if rest else "all candidates are finished"
    return f"interrupted; {out} keeps {listed(names)}; {fix}"


def _check_success(jobs: Sequence[Job], results: Sequence[JobResult]) -> None:
    failed = [result for result in results if result.status == "failed"]
    if failed:
        line = f"candidate {failed[0].name!r} failed: {failed[0].error}"
        if len(failed) == len(jobs):
            raise TanzakuError(line)
        typer.echo(f"tanzaku: {len(failed)} of {len(jobs)} candidates failed; {line}", err=True)
        raise typer.Exit(1)
