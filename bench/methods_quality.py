"""How good each method is beside LoRA, on the bundled poems: `python -m bench methods_quality [NAME ...]`.

Every method gets as many settings, drawn from its own space as `tanzaku compare --trials` draws them. They are trained
on the validation file and the best is chosen by the test file. It alone is measured, by repeated cross-validation of
the training file, of which no row had a part in choosing it; its epochs are fewer by as much as its rows are more, so
that both have equally many steps. The verdict is a comparison's, of the method and LoRA on the same folds.

Hours for all of them: what has ended is in `--out`, and the same command goes on from there.
"""

from __future__ import annotations

import _thread
import argparse
import datetime
import math
import platform
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.quality import poems
from tanzaku.cli.machine import quieten
from tanzaku.cli.record import locked
from tanzaku.compare.candidates import Candidate, Searched, expand
from tanzaku.compare.comparison import Comparison, Interrupted
from tanzaku.compare.journal import Journal
from tanzaku.compare.statistics import holm
from tanzaku.errors import TanzakuError
from tanzaku.methods import METHODS, method_named
from tanzaku.models.loading import load_for
from tanzaku.recipe.comparison import CompareSettings
from tanzaku.recipe.schema import MethodEntry
from tanzaku.support.numbers import written
from tanzaku.train.events import Event
from tanzaku.train.settings import TrainSettings

BESIDE = "lora"
ROW = "row"  # what a method's line is made of, in its journal
# Without these a method has nothing to train, or does not fit the embedded model's widths.
SETTINGS: Mapping[str, dict[str, Any]] = {
    "bitfit": {"bias_scope": "add"},
    "c3a": {"block_size": 128},
    "vblora": {"vector_length": 128},
}
OFTEN = 0.2  # of the texts have a token that `trainable_tokens` trains
COLUMNS = (
    "method",
    "parameters",
    "best setting",
    "ROC-AUC (95%)",
    "less LoRA's (95%)",
    "p",
    "p of all (Holm)",
    "verdict",
    "minutes",
)


@dataclass
class Bench:
    """The model, the rows that choose and those that judge, and how both are done."""

    options: argparse.Namespace
    out: Path

    def __post_init__(self) -> None:
        name = self.options.model
        self.choosing, self.judging = poems(name, train="valid", valid="test"), poems(name, train="train")
        self.model, _ = load_for(name, self.judging.task)

    @property
    def epochs_to_choose(self) -> int:
        """As many steps as the measured runs have."""
        measured = len(self.judging.train) * (1 - 1 / self.options.folds)
        return max(1, round(self.options.epochs * measured / len(self.choosing.train)))

    def row(self, name: str, first: Mapping[str, Any]) -> dict[str, Any]:
        """Choose a method's setting, measure it and compare it with LoRA; what its line is made of.

        Args:
            first: LoRA's own, which holds its measured candidate; nothing where this is it.

        Raises:
            Interrupted, KeyboardInterrupt: Ctrl-C, or time is up; jobs that ended are kept.
        """
        search = self._compare(name, "choosing", searched=[self._searched(name)])
        trials = search.searches[0].told()
        drawn = {"trials": len(trials), "spent": search.journal.seconds}
        if not (best := search.searches[0].best(1)):
            return {**drawn, "error": _error(search)}
        measured, known = [self._measured(best[0], name)], {}
        if first:
            lora = self._searched(BESIDE).candidate(first["setting"], BESIDE)
            measured.insert(0, self._measured(lora, BESIDE))
            known = self.journal(BESIDE, "judging").jobs
        judged = self._compare(name, "judging", candidates=measured, known=known)
        drawn["spent"] += judged.journal.seconds
        found = judged.results()
        own = next(each for each in found["candidates"] if each["name"] == name)
        if own["status"] != "done":
            return {**drawn, "error": _error(judged)}
        kept = {key: own[key] for key in ("mean", "interval", "trainable_parameters")}
        return {**drawn, **kept, "setting": best[0].drawn, **_beside(name, found)}

    def _compare(
        self,
        name: str,
        what: str,
        candidates: Sequence[Candidate] = (),
        searched: Sequence[Searched] = (),
        known: Mapping[str, Any] | None = None,
    ) -> Comparison:
        """Run a comparison, or what of it was not run before.

        Args:
            known: records of runs that another comparison had, by name.
        """
        options, journal = self.options, self.journal(name, what)
        journal.jobs.update(known or {})
        design = {} if searched else {"folds": options.folds, "repeats": options.repeats}
        settings = CompareSettings(seeds=1, finalists=1, workers=options.workers, **design)
        data = self.choosing if searched else self.judging

        def tell(event: Event) -> None:
            if event.kind == "job_done":
                clock = f"{datetime.datetime.now():%H:%M:%S}"
                print(f"{clock} {name}: {what}: {event.job} {event.figures['status']}", file=sys.stderr, flush=True)

        comparison = Comparison(
            model=self.model,
            data=data,
            candidates=candidates,
            searched=searched,
            settings=settings,
            seed=0,
            out=journal.folder.parent,
            journal=journal,
            listeners=[tell],
            meta={"task": "classification", "model": options.model, **data.task.to_json()},
        )
        comparison.run()
        return comparison

    def journal(self, name: str, what: str = "") -> Journal:
        """What a method has finished of choosing or of judging, or its line."""
        journal = Journal(self.out / name / what)
        journal.begin({})
        journal.go_on()
        return journal

    def _searched(self, name: str) -> Searched:
        settings = dict(SETTINGS.get(name, {}))
        if name == "trainable_tokens":
            texts = self.choosing.train.examples
            counts = Counter(token for row in texts for token in set(row.inputs["input_ids"]))
            settings["token_indices"] = sorted(token for token, n in counts.items() if n >= OFTEN * len(texts))
        if name == "cpt":  # two of the rows that are trained on, with nothing of an answer
            settings["cpt_token_ids"] = [t for row in self.choosing.train.examples[:2] for t in row.inputs["input_ids"]]
        train = TrainSettings(epochs=self.epochs_to_choose, batch_size=self.options.batch_size)
        how = CompareSettings(trials=self.options.trials)
        (searched,) = expand([MethodEntry.model_validate({name: settings})], train, how)[1]
        return searched

    def _measured(self, candidate: Candidate, name: str) -> Candidate:
        settings = candidate.settings.model_copy(update={"epochs": self.options.epochs})
        return replace(candidate, name=name, settings=settings)


def _beside(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The method less LoRA, and the verdict's word on the two."""
    if not found["comparisons"]:
        return {}
    (pair,) = found["comparisons"]
    low, high = pair["interval"] or (math.nan, math.nan)
    ahead = pair["a"] == name
    both = [rf"\b{each}\b" for each in (pair["a"], pair["b"])]
    sentences = found["verdict"]["sentences"]
    told = [text for text in sentences if all(re.search(each, text) for each in both)]
    return {
        "difference": pair["difference"] if ahead else -pair["difference"],
        "apart": [low, high] if ahead else [-high, -low],
        "p": pair["p"],
        "verdict": (told or sentences[-1:])[0],
    }


def _error(comparison: Comparison) -> str:
    """Why nothing came of it, in a few words."""
    errors = (record["error"] for record in comparison.journal.jobs.values() if record["error"])
    return str(next(errors, "no figure is a number"))


def table(arguments: Sequence[str]) -> None:
    """Run what the table lacks, and print it as far as it is then."""
    options = _options().parse_args(arguments)
    out = Path(options.out)
    try:
        asked = [name for name in options.names or METHODS if not method_named(name).uses_others]
        names = [BESIDE, *(name for name in asked if name != BESIDE)]
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            bench = Bench(options, out)
            _begin(out, options)
            _run(names, bench, options.minutes)
            _print(out, names, options)
    except TanzakuError as error:
        sys.exit(f"bench: {error}")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench methods_quality", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these methods, and LoRA (all)")
    parser.add_argument("--out", default="runs/methods_quality", metavar="DIR", help="where it is kept (%(default)s)")
    parser.add_argument("--minutes", type=float, metavar="N", help="stop after so many (no limit)")
    parser.add_argument("--workers", type=partial(_number, 1), metavar="N", help="processes (chosen)")
    parser.add_argument("--model", default="embedded", metavar="NAME", help="base model (%(default)s)")
    for name, default, about in (
        ("trials", 16, "settings drawn for each method"),
        ("folds", 5, "parts of the training file"),
        ("repeats", 2, "times it is cut into them"),
        ("epochs", 3, "passes of a measured run"),
        ("batch_size", 4, "rows a step"),
    ):
        flag = f"--{name.replace('_', '-')}"
        kind = partial(_number, 2 if name == "folds" else 1)
        parser.add_argument(flag, type=kind, default=default, metavar="N", help=f"{about} (%(default)s)")
    return parser


def _number(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, {least} or more")
    return int(text)


def _begin(out: Path, options: argparse.Namespace) -> None:
    """Write down what the directory's figures are of, or see that it is the same.

    Raises:
        TanzakuError: it has other settings, or another version's.
    """
    journal = Journal(out)
    about = {key: value for key, value in vars(options).items() if key not in ("names", "out", "minutes", "workers")}
    if not (journal.folder / "run.json").is_file():
        journal.begin({"settings": about})
    kept = journal.about().get("settings")
    if kept != about:
        raise TanzakuError(f"{out} was begun with {kept}, found {about}; give the same, or another --out")


def _run(names: Sequence[str], bench: Bench, minutes: float | None) -> None:
    """Run the methods one after another, until all are done, the time is up or Ctrl-C is pressed."""
    quieten()
    # A shell has what it runs behind itself ignore Ctrl-C, as which the end of the time comes.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(threading.TIMEOUT_MAX if minutes is None else 60 * minutes, _thread.interrupt_main)
    timer.daemon = True
    first: dict[str, Any] = {}
    try:
        timer.start()
        for name in names:
            journal = bench.journal(name)
            if (row := journal.kept(ROW)) is None:
                try:
                    row = bench.row(name, first)
                except TanzakuError as error:
                    row = {"error": str(error)}
                journal.keep_as(ROW, row)
            if name == BESIDE and "error" in (first := row):
                raise TanzakuError(f"{BESIDE}, beside which all stand, failed: {row['error']}")
    except (Interrupted, KeyboardInterrupt):
        print("stopped; the same command goes on", file=sys.stderr)
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)


def _print(out: Path, names: Sequence[str], options: argparse.Namespace) -> None:
    """The table of what is done, the best first, and what is not."""
    rows = {name: row for name in names if (row := Journal(out / name).kept(ROW)) is not None}
    good = sorted((name for name in rows if "mean" in rows[name]), key=lambda name: -_known(rows[name]["mean"]))
    compared = [name for name in good if rows[name].get("p") is not None]
    adjusted = dict(zip(compared, holm([rows[name]["p"] for name in compared]), strict=True))
    print(
        f"{datetime.date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"{options.model}, {options.repeats} x {options.folds} folds, {options.trials} settings each, "
        f"{options.epochs} epochs in batches of {options.batch_size}\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in good:
        print(_line(name, rows[name], adjusted.get(name)))
    for name, row in rows.items():
        if "error" in row:
            print(f"\n{name} failed: {row['error']}")
    for name in [name for name in names if name not in rows]:
        ended = len([*(out / name).glob("*/state/jobs/*.json")])
        print(f"\n{name}: {f'under way, {ended} runs ended' if ended else 'not run'}")
    left = [name for name in options.names or METHODS if METHODS[name].uses_others]
    if left:
        print(f"\nleft out, since they are made of other adapters: {', '.join(left)}")


def _line(name: str, row: Mapping[str, Any], adjusted: float | None) -> str:
    cells = [
        f"`{name}`",
        f"{row['trainable_parameters']:,}",
        ", ".join(f"{key}={_shown(value)}" for key, value in row["setting"].items()),
        _figure(row["mean"], row["interval"]),
        _figure(row["difference"], row["apart"]) if "difference" in row else "-",
        "-" if row.get("p") is None else f"{row['p']:.3f}",
        "-" if adjusted is None else f"{adjusted:.3f}",
        row.get("verdict", "-"),
        f"{row['spent'] / 60:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _known(mean: float) -> float:
    return -math.inf if math.isnan(mean) else mean


def _shown(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _figure(value: float, interval: Sequence[float] | None) -> str:
    if interval is None or any(map(math.isnan, interval)):
        return written(value, 3)
    return f"{written(value, 3)} ({written(interval[0], 3)} to {written(interval[1], 3)})"
