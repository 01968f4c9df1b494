"""The report of a comparison: the content of results.json as one HTML file that never asks a network for anything.

Texts, answers, names and errors are other people's. Jinja escapes what becomes HTML and JSON, report.js only ever sets
text, and the page's own policy allows no script but the two it was written with, and no request at all.
"""

from __future__ import annotations

import hashlib
import math
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tanzaku.compare.statistics import ENOUGH
from tanzaku.compare.verdict import tested_by
from tanzaku.files.writing import written_beside
from tanzaku.support.numbers import written
from tanzaku.tasks import task_named
from tanzaku.tasks.task import LOSS, Example, Metric, Said, metric_named

_HERE = Path(__file__).parent
_COSTS = {"trainable_parameters": "trained parameters", "peak_memory_bytes": "memory", "seconds": "time"}
_SPLITS = {"train": "training", "valid": "validation", "test": "test"}
_ORDERS = {"best": "best first", "worst": "worst first", "apart": "most apart first", "file": "as in the file"}
_SHAPES = 7  # of points; report.js and the template draw as many
_HUES = 8  # of report.css; candidates past them are told apart by dashes and shapes

# What cannot be seen, or cannot be written as UTF-8, is shown by a sign of its own.
_SIGNS = {code: 0x2400 + code for code in range(32)} | {127: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_SIGNS |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD) | {ord(kept): ord(kept) for kept in "\t\n"}
_JAPANESE = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f]")


def write_report(results: Mapping[str, Any], path: Path) -> None:
    """Write the report of a comparison, running, done or interrupted.

    Args:
        results: the content of results.json.

    Raises:
        TanzakuError: the file cannot be written.
    """
    page = render(results)
    with written_beside(path) as beside:
        beside.write_text(page, encoding="utf-8", newline="\n")


def render(results: Mapping[str, Any]) -> str:
    """The report as text."""
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    environment.filters |= {
        "bytes": _bytes,
        "clock": _clock,
        "figure": _figure,
        "lang": _lang,
        "p": _p,
        "short": _short,
        "yaml": _yaml,
    }
    scripts = [get_plotlyjs(), (_HERE / "report.js").read_text(encoding="utf-8")]
    return environment.get_template("report.html.j2").render(
        **_view(_plain(results)),
        recipe_yaml=_yaml(results.get("recipe") or {}, flow=False),
        style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        hashes=[b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts],
    )


# -- what the template shows


def _view(results: dict[str, Any]) -> dict[str, Any]:
    """Everything the template names. Candidates are numbered in the order of the ranking, which is their colour."""
    design = results.get("design") or {}
    kind = task_named((results.get("recipe") or {}).get("task") or "classification")
    known = (results.get("data") or {}).get("task")
    task = None if known is None else kind.from_json(known, "results.json: data.task.")  # no rows were read yet
    judged = kind if task is None or not design else task  # which knows the user's own metrics, too
    metric = metric_named(judged, design.get("metric") or kind.rank_by)
    titles = {each.name: each.title for each in sorted(judged.metrics, key=lambda each: each is LOSS)}
    candidates = sorted(results.get("candidates") or [], key=lambda candidate: candidate["rank"] is None)
    number = {candidate["name"]: at for at, candidate in enumerate(candidates)}
    ends = [end for entry in candidates for end in _ends(entry["mean"], entry["interval"])]
    ends += [
        value
        for entry in candidates
        for value in (entry.get("scores") or {}).get(metric.name) or []
        if value is not None
    ]
    scale = _scale(ends, metric)
    for candidate in candidates:
        candidate["mark"] = _mark(candidate["mean"], candidate["interval"], scale)
        own = (candidate.get("scores") or {}).get(metric.name) or []
        # A few runs are a dot each: their spread is no interval.
        candidate["dots"] = [_mark(value, None, scale) for value in own] if 1 < len(own) < ENOUGH else []
    pairs = results.get("comparisons") or []
    reach = max((abs(end) for pair in pairs for end in _ends(pair["difference"], pair["interval"])), default=0) or 1
    for pair in pairs:
        pair["mark"] = _mark(pair["difference"], pair["interval"], (-reach, reach))
        pair["apart"] = pair["p_adjusted"] is not None and pair["p_adjusted"] < 0.05
    costs = {cost: found for cost in _COSTS if (found := _cost(candidates, cost, metric))["points"]}
    jobs = results.get("jobs") or []
    curves = _curves(jobs, number)
    search = [_searched(entry) for entry in results.get("search") or []]
    rows = results.get("rows") or {}
    finalists = [name for name in number if name in (rows.get("predictions") or {})]
    answers = _Answers()
    examples = [Example({}, target) for target in rows.get("targets") or []]
    said = {name: list(map(task.said, rows["predictions"][name], examples)) for name in finalists if task is not None}
    base = [] if task is None else list(map(task.said, rows.get("base") or [], examples))
    figures = rows.get("figures") or {}
    by_row: dict[str, list[Any]] = {name: figures[name] for name in finalists if figures.get(name)}
    return {
        "results": results,
        "model": _name_of((results.get("recipe") or {}).get("model")),
        "metric": metric.name,
        "held": results.get("forgetting"),
        "kind": kind_of(metric),
        "aim": metric.title,
        "counted": _counted(len(candidates), (results.get("data") or {}).get("rows") or {}),
        "held_out": _SPLITS.get(str(rows.get("split")), "held-out"),
        "hues": _HUES,
        "shapes": _SHAPES,
        "runs": design.get("runs"),
        "finished": sum(job["status"] == "done" for job in jobs),
        "candidates": candidates,
        "number": number,
        "verdict": {"sentences": [], "best": None, "tied": [], "cheapest": None} | (results.get("verdict") or {}),
        "scale": scale,
        "tested": tested_by({**results, "candidates": candidates}, task) if design and task is not None else [],
        "metrics": titles,
        "kinds": {each.name: kind_of(each) for each in judged.metrics},
        "of_rows": any(candidate.get("interval_of") == "rows" for candidate in candidates),
        "pairs": pairs,
        "costs": costs,
        "cost_names": {cost: _COSTS[cost] for cost in costs},
        "curves": curves,
        "curve_metrics": _figures_in(curves, titles, metric.name),
        "search": search,
        "finalists": finalists,
        "base": bool(base),
        "orders": _ORDERS if by_row else {},
        "classes": () if task is None else task.classes,
        "design_facts": _design_facts(results, design, metric),
        "machine_facts": _machine_facts(results),
        "data": {
            "hues": _HUES,
            "percent": kind_of(metric) == "percent",
            "percents": [each.name for each in judged.metrics if kind_of(each) == "percent"],
            "candidates": [
                {"short": _short(entry["name"])} | {key: entry[key] for key in ("name", "mean", "interval", *_COSTS)}
                for entry in candidates
            ],
            "costs": costs,
            "curves": curves,
            "search": search,
            "rows": {
                "texts": [_text(text) for text in rows.get("texts") or []],
                "targets": [] if task is None else [answers(_plain(task.truth(each))) for each in examples],
                "finalists": [number[name] for name in finalists],
                "predictions": [[_said(each, answers) for each in said[name]] for name in finalists],
                "figures": [[_rounded(value) for value in by_row.get(name, [])] for name in finalists],
                "base": [_said(each, answers) for each in base],
                "base_figures": [_rounded(value) for value in rows.get("base_figures") or []],
                "better": metric.better,
                "numbers": rows.get("numbers"),
                "answers": answers.texts,
            },
        },
    }


def _name_of(model: Any) -> str:
    """The base model's name, of a recipe that gives it alone or in a block."""
    found = model.get("name") if isinstance(model, dict) else model
    return str(found or "A comparison")


def _counted(candidates: int, rows: Mapping[str, int | None]) -> str:
    """How many candidates are compared, and on how many rows of each split."""
    splits = [f"{number:,} {_SPLITS.get(split, split)}" for split, number in rows.items() if number]
    on = f" on {' and '.join(filter(None, (', '.join(splits[:-1]), splits[-1])))} rows" if splits else ""
    return f"{candidates} candidate{'s' if candidates != 1 else ''}{on}."


def _design_facts(results: Mapping[str, Any], design: Mapping[str, Any], metric: Metric) -> dict[str, Any]:
    """How it was measured, in words."""
    folds, repeats, runs = (design.get(key) for key in ("folds", "repeats", "runs"))
    data = results.get("data") or {}
    cut, dropped = (
        [f"{number} {_SPLITS.get(split, split)}" for split, number in (data.get(key) or {}).items() if number]
        for key in ("truncated", "dropped")
    )
    per_run = [
        f"{design[f'{split}_rows']} {_SPLITS[split]}" for split in ("train", "valid") if design.get(f"{split}_rows")
    ]
    return {
        "validation": design and (f"{folds} folds" if folds else "one split"),
        "new folds": f"{repeats} times" if folds and repeats != 1 else None,
        "runs of a candidate": runs,
        "seeds": ", ".join(map(str, design.get("seeds") or ())),
        "ranked by": metric.title if design else None,
        "rows of one run": ", ".join(per_run),
        "rows a step": design.get("rows_per_step"),
        "memory limit": _bytes(design["memory_limit_bytes"]) if design.get("memory_limit_bytes") else None,
        "texts that were cut": ", ".join(cut) or "none",
        "rows that were left out": ", ".join(dropped),
        "started": results.get("started") and f"{results['started'][:16].replace('T', ' ')} UTC",
        "took": results.get("seconds") and _clock(results["seconds"]),
    }


def _machine_facts(results: Mapping[str, Any]) -> dict[str, Any]:
    """The machine, and the versions of libraries."""
    machine = results.get("machine") or {}
    about = {
        key.removesuffix("_bytes"): _bytes(value) if key.endswith("_bytes") else value for key, value in machine.items()
    }
    return {"device": results.get("device")} | about | (results.get("versions") or {})


def _scale(values: Sequence[float], metric: Metric) -> tuple[float, float]:
    """Round ends of an axis that holds the values."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    step = 10 ** math.floor(math.log10(high - low or 0.1)) / 2
    low = max(math.floor(low / step) * step, metric.bounds[0])
    high = min(math.ceil(high / step) * step, metric.bounds[1])
    return (low, high) if high > low else (low - step, low)


def _ends(value: float | None, interval: Sequence[float] | None) -> list[float]:
    return [end for end in (value, *(interval or ())) if end is not None]


def _mark(value: float | None, interval: Sequence[float] | None, scale: tuple[float, float]) -> dict[str, float] | None:
    """Where a figure and its interval stand on an axis, in percent of its length."""
    if value is None:
        return None
    low, high = interval or (value, value)
    first, last = scale
    at = [round(100 * min(max((end - first) / (last - first), 0), 1), 2) for end in (value, low, high)]
    return {"at": at[0], "low": at[1], "high": at[2], "zero": round(-100 * first / (last - first), 2)}


def _cost(candidates: Sequence[dict[str, Any]], cost: str, metric: Metric) -> dict[str, Any]:
    """The candidates that have the figure, and the Pareto front: those that none beats for less, cheapest first."""
    points = [at for at, entry in enumerate(candidates) if entry["mean"] is not None and entry[cost] is not None]
    sign = metric.sign
    front: list[int] = []
    for at in sorted(points, key=lambda at: (candidates[at][cost], -sign * candidates[at]["mean"])):
        if not front or sign * candidates[at]["mean"] > sign * candidates[front[-1]]["mean"]:
            front.append(at)
    kind = _axis([candidates[at][cost] for at in points], 1 if cost == "trainable_parameters" else 20)
    return {"points": points, "front": front, "axis": kind}


def _axis(values: Sequence[Any], ratio: float = 20) -> str:
    """The axis that suits the values: logarithmic where they span more than the ratio."""
    known = [value for value in values if value is not None]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        return "category"
    return "log" if known and min(known) > 0 and max(known) >= ratio * min(known) else "linear"


def _curves(jobs: Sequence[dict[str, Any]], number: Mapping[str, int]) -> list[dict[str, Any]]:
    """For each candidate its runs, and their mean as far as all finished ones go: by figure, one value an epoch."""
    found: list[dict[str, Any]] = [{"runs": [], "mean": {}} for _ in number]
    for at, curve in enumerate(found):
        own = [job for job in jobs if job["stage"] == "measure" and number.get(job["candidate"]) == at]
        curve["runs"] = [_curve(job["epochs"]) for job in own if job["epochs"]]
        done = [_curve(job["epochs"]) for job in own if job["epochs"] and job["status"] == "done"]
        for figure in done[0] if done else ():
            columns = zip(*(run[figure] for run in done), strict=False)
            curve["mean"][figure] = [None if None in column else _rounded(fmean(column)) for column in columns]
    return found


def _curve(epochs: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    names = dict.fromkeys(name for epoch in epochs for name in epoch["valid"] or {})
    valid = {metric: [_rounded((epoch["valid"] or {}).get(metric)) for epoch in epochs] for metric in names}
    return {"train_loss": [_rounded(epoch["train_loss"]) for epoch in epochs]} | valid


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _figures_in(curves: Iterable[Mapping[str, Any]], titles: Mapping[str, str], first: str) -> dict[str, str]:
    """The validation figures that any run has, the design's first."""
    runs = [run for curve in curves for run in curve["runs"]]
    return {
        metric: titles[metric]
        for metric in sorted(titles, key=lambda metric: metric != first)
        if any(value is not None for run in runs for value in run.get(metric, ()))
    }


def _searched(entry: dict[str, Any]) -> dict[str, Any]:
    """A searched entry, with an axis for each setting that differs from trial to trial."""
    trials = entry["trials"]
    drawn = {"learning_rate": [trial["learning_rate"] for trial in trials]}
    for key in dict.fromkeys(key for trial in trials for key in trial["settings"] or {}):
        drawn.setdefault(key, [(trial["settings"] or {}).get(key) for trial in trials])
    axes = {
        key: {"kind": kind, "values": values if kind != "category" else [_yaml(value) for value in values]}
        for key, values in drawn.items()
        if len(set(map(repr, values))) > 1 and (kind := _axis(values))
    }
    return entry | {"axes": axes, "titles": {key: key.replace("_", " ") for key in axes}}


def kind_of(metric: Metric) -> str:
    """How its figures are written."""
    return "percent" if metric.proportion else "number"


class _Answers:
    """What rows come to, each text once, by number."""

    def __init__(self) -> None:
        self.texts: list[dict[str, str]] = []
        self._at: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        if text not in self._at:
            self._at[text] = len(self.texts)
            self.texts.append(_text(text))
        return self._at[text]


def _said(said: Said, answers: _Answers) -> list[Any]:
    """The number of the answer, how sure it is, and whether it is wrong; what is not known is null."""
    sure = None if said.confidence is None else round(said.confidence, 4)
    return [answers(_plain(said.text)), sure, None if said.right is None else not said.right]


# -- how figures and texts are written


def _plain(value: Any) -> Any:
    """A copy with nothing that HTML or JSON cannot hold, and nothing unseen in a text."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, str):
        return value.replace("\r\n", "\n").translate(_SIGNS)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(text: str | Sequence[str]) -> dict[str, str]:
    """A row's text, or the two of a pair, with its language."""
    whole = text if isinstance(text, str) else "\n".join(text)
    return {"text": whole, "lang": _lang(whole)}


def _lang(text: str) -> str:
    """Japanese where a text has its characters, so that a browser takes Japanese glyphs for them; else unknown."""
    return "ja" if _JAPANESE.search(text) else ""


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def _figure(value: float | None, kind: str) -> str:
    """A metric or a difference as it is read: shares of rows in percent and points, the others as they are."""
    if value is None:
        return "–"
    if kind in ("points", "difference"):
        text = f"{100 * value:+.1f}" if kind == "points" else f"{'+' if value >= 0 else ''}{written(value, 3)}"
        return text.replace("-", "\N{MINUS SIGN}")
    return f"{100 * value:.1f}%" if kind == "percent" else written(value, 2 if kind == "perplexity" else 3)


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _bytes(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 2**20:,.0f} MiB" if value < 2**33 else f"{value / 2**30:,.1f} GiB"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _yaml(value: Any, flow: bool | None = True) -> str:
    """A value as a recipe has it, in one line; or, where it is not to flow, over many."""
    text: str = yaml.safe_dump(value, allow_unicode=True, sort_keys=False, default_flow_style=flow, width=math.inf)
    return text.removesuffix("...\n").strip()
