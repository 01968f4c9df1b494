"""T-Few from a few rows: `python -m bench t_few --data DIR`.

Slices of JGLUE (Kurihara et al. 2022) as JSON Lines in DIR: jcommonsenseqa.{train,valid}.jsonl, with five choices a
row, and jnli.{train,valid}.jsonl, pairs with three labels. For each number of rows and each seed that many are drawn of
the training file; the bundled recipe's (IA)3 and LoRA learn them with the same losses, steps and scores, and of the
pairs LoRA with a classifier's head, too. What is measured are the first rows of the validation file.

Hours for all of it: what has ended is in `--out`, and the same command goes on from there.
"""

from __future__ import annotations

import _thread
import argparse
import datetime
import math
import platform
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student

from tanzaku.cli.machine import quieten
from tanzaku.cli.record import locked
from tanzaku.compare.journal import Journal
from tanzaku.errors import TanzakuError
from tanzaku.methods import method_named
from tanzaku.models.loading import load_for, load_tokenizer
from tanzaku.recipe.schema import bundled
from tanzaku.support.numbers import written
from tanzaku.tasks import task_named
from tanzaku.tasks.inference import records_of
from tanzaku.tasks.prepare import encode, open_tables
from tanzaku.tasks.task import TaskData, subset
from tanzaku.train.results import Job
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings

# By data set and task, the columns as a recipe names them.
DATA: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "jcommonsenseqa": {"choice": {"template": "質問：{{ question }}\n答え："}},
    "jnli": {
        "choice": {
            "template": "前提：{{ sentence1 }}\n仮説：{{ sentence2 }}\n関係：",
            "choices": {"entailment": "含意", "neutral": "中立", "contradiction": "矛盾"},
        },
        "classification": {"text": "sentence1", "text_pair": "sentence2"},
    },
}
BASE, BESIDE = "the base", "LoRA"
COLUMNS = ("data", "rows", "candidate", "parameters", "accuracy (95% of the seeds)", "less LoRA's (95%)", "minutes")


@dataclass(frozen=True)
class Case:
    """A data set, as one task, with so many rows drawn by a seed."""

    data: str
    task: str
    rows: int
    seed: int

    def key(self, candidate: str) -> str:
        """What its figures are kept under."""
        return f"{self.data}-{self.task}-{self.rows}-{self.seed}-{candidate}"


class Bench:
    """Models and rows, each read when first asked for."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.data = cache(self._data)
        self.model = cache(self._model)

    def _data(self, name: str, task: str) -> TaskData:
        folder = Path(self.options.data)
        kind = task_named(task)
        files = {split: str(folder / f"{name}.{split}.jsonl") for split in ("train", "valid")}
        read = open_tables(kind, kind.Data(**files, **DATA[name][task]))
        data = encode(read, load_tokenizer(self.options.model), self.settings(0).max_length)
        assert data.valid is not None
        few = range(min(self.options.valid, len(data.valid)))
        return replace(data, valid=subset(data.valid, few, "valid"))

    def _model(self, task: str) -> Any:
        # A classifier's head has as many outputs as the data set labels; a language model is the same for all.
        name = next(name for name, tasks in DATA.items() if task in tasks)
        return load_for(self.options.model, self.data(name, task).task)[0]

    def settings(self, seed: int, **changes: Any) -> TrainSettings:
        """The recipe's, with as many steps as are asked for and as large a share of them warm-up."""
        own, steps = bundled("t-few")["train"], self.options.steps
        warmup = round(own["warmup"] / own["max_steps"] * steps)
        own = {**own, "max_steps": steps, "epochs": 1, "warmup": warmup, "eval_batch_size": 16, "seed": seed}
        return TrainSettings.model_validate({**own, **changes})

    def jobs(self, case: Case) -> dict[str, Job]:
        """By candidate."""
        whole = self.data(case.data, case.task)
        drawn = sorted(random.Random(case.seed).sample(range(len(whole.train)), case.rows))
        data = replace(whole, train=subset(whole.train, drawn, "train"))
        [entry] = bundled("t-few")["methods"]
        ia3, lora = method_named("ia3").from_settings(entry["ia3"]), method_named("lora").from_settings({"r": 8})
        plain = self.settings(case.seed, learning_rate=None)  # LoRA's own
        if case.task == "classification":
            return {"LoRA, head": Job(case.key("head"), lora, plain, data)}
        rates = {"T-Few": (ia3, self.settings(case.seed)), BESIDE: (lora, plain)}
        return {name: Job(case.key(name.lower()), method, how, data) for name, (method, how) in rates.items()}

    def base(self, data: str) -> float:
        """The accuracy of the base, which has seen no row."""
        own = self.data(data, "choice")
        found = records_of(self.model("choice"), own.task, {None: own.valid}, own.pad_token_id, 16)
        return own.task.figures(found[None])["accuracy"]


def table(arguments: Sequence[str]) -> None:
    """Run what the table lacks, and print it as far as it is then."""
    options = _options().parse_args(arguments)
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            journal = _begin(out, options)
            _run(Bench(options), journal, options)
            _print(journal, options)
    except TanzakuError as error:
        sys.exit(f"bench: {error}")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench t_few", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of the rows")
    parser.add_argument("--only", nargs="+", choices=[*DATA], default=[*DATA], help="data sets (all)")
    parser.add_argument("--rows", nargs="+", type=_number, default=[16, 50], metavar="N", help="rows (16 and 50)")
    parser.add_argument("--seeds", type=_number, default=5, metavar="N", help="draws of them (%(default)s)")
    parser.add_argument("--steps", type=_number, default=1000, metavar="N", help="of a run (%(default)s)")
    parser.add_argument("--valid", type=_number, default=200, metavar="N", help="rows that judge (%(default)s)")
    parser.add_argument("--model", default="embedded", metavar="NAME", help="base model (%(default)s)")
    parser.add_argument("--out", default="runs/t_few", metavar="DIR", help="where it is kept (%(default)s)")
    parser.add_argument("--minutes", type=float, metavar="N", help="stop after so many (no limit)")
    return parser


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, 1 or more")
    return int(text)


def _begin(out: Path, options: argparse.Namespace) -> Journal:
    """What the directory has; an error where its figures are of other settings."""
    journal = Journal(out)
    about = {key: getattr(options, key) for key in ("steps", "valid", "model")}
    if not (journal.folder / "run.json").is_file():
        journal.begin({"settings": about})
    if (kept := journal.about().get("settings")) != about:
        raise TanzakuError(f"{out} was begun with {kept}, found {about}; give the same, or another --out")
    journal.go_on()
    return journal


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    """Few rows and first seeds first, so that what is there when time is up is of all data sets."""
    for rows in options.rows:
        for seed in range(options.seeds):
            for name in options.only:
                yield from (Case(name, task, rows, seed) for task in DATA[name])


def _run(bench: Bench, journal: Journal, options: argparse.Namespace) -> None:
    quieten()
    # A shell has what it runs behind itself ignore Ctrl-C, as which the end of the time comes.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(
        threading.TIMEOUT_MAX if options.minutes is None else 60 * options.minutes, _thread.interrupt_main
    )
    timer.daemon = True
    try:
        timer.start()
        for name in options.only:
            if journal.kept(f"{name}-base") is None:
                journal.keep_as(f"{name}-base", {"accuracy": bench.base(name)})
        for case in _cases(options):
            left = {name: job for name, job in bench.jobs(case).items() if job.name not in journal.jobs}
            for name, job in left.items():
                assert job.data is not None
                # One after the other: they would share no step, since a batch has a row for each choice.
                results = train_jobs(bench.model(case.task), job.data, [job], workers=1)
                if not results or results[0].status == "interrupted":
                    raise KeyboardInterrupt
                _keep(journal, name, job, results[0])
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)


def _keep(journal: Journal, candidate: str, job: Job, result: Any) -> None:
    figures = {"accuracy": None if result.valid is None else result.valid["accuracy"], "error": result.error}
    cost = {"seconds": result.seconds, "parameters": result.trainable_parameters}
    journal.keep({"name": job.name, "candidate": candidate, **figures, **cost})
    print(f"{time.strftime('%H:%M:%S')} {job.name}: {figures['accuracy']}", file=sys.stderr, flush=True)


def _print(journal: Journal, options: argparse.Namespace) -> None:
    print(
        f"{datetime.date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"{options.model}, {options.steps} steps in batches of 8, {options.valid} validation rows\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in options.only:
        base = journal.kept(f"{name}-base")
        if base is not None:
            print(f"| {name} | 0 | {BASE} | 0 | {written(base['accuracy'], 3)} | - | - |")
        for rows in options.rows:
            cases = [Case(name, task, rows, seed) for seed in range(options.seeds) for task in DATA[name]]
            found: dict[str, dict[int, dict[str, Any]]] = {}
            for case in cases:
                for key in ("t-few", BESIDE.lower(), "head"):
                    record = journal.jobs.get(case.key(key))
                    if record is not None and record["accuracy"] is not None:
                        found.setdefault(record["candidate"], {})[case.seed] = record
            for candidate, by_seed in found.items():
                print(_line(name, rows, candidate, by_seed, found.get(BESIDE, {})))


def _line(
    name: str, rows: int, candidate: str, own: Mapping[int, Mapping[str, Any]], beside: Mapping[int, Mapping[str, Any]]
) -> str:
    both = [seed for seed in own if seed in beside]
    apart = [own[seed]["accuracy"] - beside[seed]["accuracy"] for seed in both]
    cells = [
        name,
        str(rows),
        candidate if len(own) == 5 else f"{candidate} ({len(own)} seeds)",
        f"{next(iter(own.values()))['parameters']:,}",
        _mean([each["accuracy"] for each in own.values()]),
        "-" if candidate == BESIDE or not apart else _mean(apart),
        f"{sum(each['seconds'] for each in own.values()) / 60:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _mean(values: Sequence[float]) -> str:
    """With Student's interval: the seeds draw rows, order and weights anew, but not the rows that judge."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return written(mean, 3)
    reach = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{written(mean, 3)} ({written(mean - reach, 3)} to {written(mean + reach, 3)})"
