"""What results.json may hold, without a run: nine candidates, one of them failed and one searched, and 400 rows."""

from __future__ import annotations

import csv
import itertools
import math
import random
from importlib.resources import files
from statistics import NormalDist, fmean, stdev
from typing import Any

# name: how good it is, trained parameters, bytes of a step, seconds of a run
_KNOWN = {
    "lora-s04-r16": (0.935, 47_360, 143_000_000, 57.4),
    "prefix_tuning": (0.941, 93_440, 121_000_000, 56.0),
    "ia3": (0.922, 61_184, 150_000_000, 60.9),
    "llama_adapter": (0.926, 52_488, 98_000_000, 42.3),
    "prompt_tuning": (0.917, 7_680, 133_000_000, 70.3),
    "p_tuning": (0.908, 1_238_400, 155_000_000, 62.2),
    "adalora": (0.896, 93_512, 149_000_000, 63.6),
    "head": (0.852, 1_280, 21_000_000, 33.2),
    "full": (0.95, 268_099_456, 4_300_000_000, 148.9),
}
_METRICS = ("accuracy", "roc_auc", "macro_f1", "loss")


def poems(number: int) -> list[str]:
    """The bundled lines, over and over."""
    folder = files("tanzaku") / "data" / "poems"
    lines = [
        row["poem"]
        for name in ("test.tsv", "valid.tsv", "train.tsv")
        for row in csv.DictReader((folder / name).read_text(encoding="utf-8").splitlines(keepends=True), delimiter="\t")
    ]
    return [lines[at % len(lines)] for at in range(number)]


def sample(
    candidates: int = 9,
    rows: int = 400,
    labels: tuple[str, ...] = ("0", "1"),
    folds: int = 5,
    repeats: int = 3,
    epochs: int = 8,
) -> dict[str, Any]:
    """The content of a results.json; the same for the same arguments. The ninth candidate fails."""
    chance = random.Random(0)
    names = (list(_KNOWN) + [f"lora_r{at}" for at in range(candidates)])[:candidates]
    entries, jobs = [], []
    for name in names:
        entry, own = _candidate(chance, name, list(itertools.product(range(repeats), range(folds))), epochs)
        entries.append(entry)
        jobs += own
    entries.sort(key=lambda entry: -(entry["mean"] or 0))
    for rank, entry in enumerate((entry for entry in entries if entry["status"] == "done"), 1):
        entry["rank"] = rank
    done = [entry for entry in entries if entry["rank"]]
    trials = [_trial(chance, at) for at in range(16)]
    comparisons = _comparisons(done)
    truth = [chance.randrange(len(labels)) for _ in range(rows)]
    predictions = {}
    for entry in done[:4]:
        predictions[entry["name"]] = [_row(chance, label, len(labels), entry["mean"]) for label in truth]
        _tested(entry, predictions[entry["name"]], truth, len(labels))
    tied = [done[0]["name"]] + [pair["b"] for pair in comparisons[: len(done) - 1] if pair["p_adjusted"] >= 0.05]
    cheapest = min((entry for entry in done if entry["name"] in tied), key=lambda entry: entry["trainable_parameters"])
    return {
        "tanzaku": "0.2.0",
        "command": "compare",
        "status": "done",
        "recipe": {
            "model": "llm-jp/llm-jp-3-1.8b",
            "task": "classification",
            "data": {"train": "poems/train.tsv", "test": "poems/test.tsv", "text": "poem", "label": "label"},
            "train": {"epochs": epochs, "learning_rate": 1e-4, "batch_size": 4, "max_length": 200},
            "methods": [{name.partition("-")[0]: {}} for name in names],
            "out": "runs/poems",
            "device": "auto",
        },
        "versions": {"python": "3.11.9", "tanzaku": "0.2.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "device": "cpu",
        "machine": {"system": "Linux", "processor": "x86_64", "cores": 2, "memory_bytes": 25_276_514_304},
        "data": {
            "rows": {"train": 216, "test": rows},
            "truncated": {"train": 3, "test": 0},
            "task": {"labels": list(labels), "text": "poem", "text_pair": None},
        },
        "started": "2026-07-07T09:30:00+00:00",
        "seconds": 9_424.2,
        "design": {
            "kind": "folds",
            "folds": folds,
            "repeats": repeats,
            "seeds": list(range(repeats)),
            "runs": folds * repeats,
            "metric": "accuracy",
            "train_rows": 172,
            "valid_rows": 44,
            "rows_per_step": 16,
            "memory_limit_bytes": 4 * 2**30,
        },
        "candidates": entries,
        "comparisons": comparisons,
        "verdict": {
            "sentences": [
                f"{done[0]['name']} did best, and {len(tied) - 1} others cannot be told from it by these rows.",
                f"Of these, {cheapest['name']} trains the fewest parameters: {cheapest['trainable_parameters']:,}.",
                f"The order rests on {folds * repeats} runs of each candidate, and one of 44 validation rows is 2.3 "
                "points of accuracy.",
            ],
            "best": done[0]["name"],
            "tied": tied,
            "cheapest": cheapest["name"],
        },
        "search": [
            {
                "entry": "lora",
                "method": "lora",
                "space": {"r": [1, 2, 4, 8, 16], "lora_alpha": [8, 16, 32]},
                "trials": trials,
            }
        ],
        "rows": {"split": "test", "texts": poems(rows), "targets": truth, "predictions": predictions},
        "jobs": [_searched(chance, trial) for trial in trials] + jobs,
    }


def _candidate(
    chance: random.Random, name: str, runs: list[tuple[int, int]], epochs: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    base = _KNOWN.get(name, (0.9, 23_680, 141_000_000, 57.0))
    good, parameters, memory, seconds = (figure * chance.uniform(0.97, 1.03) for figure in base)
    failed = name == "full"
    jobs = []
    for repeat, fold in runs[:1] if failed else runs:
        curve = [] if failed else _curve(chance, epochs, min(good, 0.96) + chance.gauss(0, 0.025))
        jobs.append(
            {
                "name": f"{name}-{repeat}-{fold}",
                "candidate": name,
                "stage": "measure",
                "repeat": repeat,
                "fold": fold,
                "seed": repeat,
                "status": "failed" if failed else "done",
                "error": "step 1: a step needs 4.3 GB, which is more than memory_limit 4 GiB" if failed else None,
                "epochs": curve,
                "best_epoch": epochs - 1 if curve else None,
                "steps": 11 * len(curve),
                "seconds": seconds,
            }
        )
    scores = {} if failed else {key: [job["epochs"][-1]["valid"][key] for job in jobs] for key in _METRICS}
    entry = {
        "name": name,
        "method": "lora" if name.startswith("lora") else name,
        "origin": "search" if "-" in name else "recipe",
        "method_settings": {"r": 16, "target_modules": ["q_proj", "v_proj"]} if "-" in name else {},
        "train_settings": {"epochs": epochs, "learning_rate": 3e-4, "batch_size": 4},
        "status": "failed" if failed else "done",
        "error": jobs[0]["error"],
        "note": "runs alone: it changes every weight" if failed else None,
        "trainable_parameters": round(parameters) if name not in _KNOWN else base[1],
        "total_parameters": 1_663_870_976,
        "scores": scores,
        "mean": None if failed else fmean(scores["accuracy"]),
        "interval": None,
        "rank": None,
        "seconds": None if failed else seconds,
        "peak_memory_bytes": round(memory),
        "finalist": False,
        "adapter": None,
        "test": None,
        "test_intervals": None,
        "confusion": None,
    }
    if len(runs) > 1 and not failed:
        half = 2.1 * stdev(scores["accuracy"]) * math.sqrt(1 / len(runs) + 0.25)
        entry["interval"] = [entry["mean"] - half, min(entry["mean"] + half, 1.0)]
    return entry, jobs


def _curve(chance: random.Random, epochs: int, good: float) -> list[dict[str, Any]]:
    pace = chance.uniform(0.8, 1.4)
    curve = []
    for epoch in range(1, epochs + 1):
        learned = 1 - math.exp(-pace * epoch / 1.6)
        accuracy = min(max(0.55 + (good - 0.55) * learned + chance.gauss(0, 0.008), 0), 1)
        valid = {
            "loss": 0.75 - 0.55 * learned + 0.012 * epoch,
            "accuracy": round(accuracy * 44) / 44,
            "roc_auc": min(accuracy + 0.04, 1.0),
            "macro_f1": accuracy - 0.02,
        }
        curve.append(
            {
                "epoch": epoch,
                "train_loss": 1.1 * math.exp(-pace * epoch / 2) + chance.uniform(0, 0.03),
                "learning_rate": 3e-4 * (1 - (epoch - 1) / epochs),
                "valid": valid,
                "seconds": chance.uniform(5, 8),
            }
        )
    return curve


def _trial(chance: random.Random, at: int) -> dict[str, Any]:
    kept = at == 3
    rate = 4.7e-4 if kept else 10 ** chance.uniform(-5, -2)
    settings = {
        "r": 16 if kept else chance.choice([1, 2, 4, 8, 16]),
        "lora_alpha": chance.choice([8, 16, 32]),
        "target_modules": chance.choice([["q_proj", "v_proj"], ["all"]]),
    }
    value = 0.94 if kept else min(0.93 - 0.06 * abs(math.log10(rate) + 3.5) + chance.gauss(0, 0.015), 0.935)
    stopped = value < 0.86
    return {
        "name": f"lora-s{at + 1:02}-r{settings['r']}",
        "settings": settings,
        "learning_rate": rate,
        "value": None if at == 5 else value,
        "status": "failed" if at == 5 else "stopped" if stopped else "done",
        "epochs": 2 if stopped else 8,
        "kept": kept,
    }


def _searched(chance: random.Random, trial: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": f"search-{trial['name']}",
        "candidate": trial["name"],
        "stage": "search",
        "repeat": 0,
        "fold": None,
        "seed": 0,
        "status": "failed" if trial["value"] is None else "done",
        "error": None,
        "epochs": [] if trial["value"] is None else _curve(chance, trial["epochs"], trial["value"]),
        "best_epoch": None,
        "steps": 11 * trial["epochs"],
        "seconds": 6.0 * trial["epochs"],
    }


def _comparisons(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    pairs = list(itertools.combinations(done, 2))
    found = []
    for one, other in pairs:
        differences = [a - b for a, b in zip(one["scores"]["accuracy"], other["scores"]["accuracy"], strict=True)]
        mean = fmean(differences)
        # A corrected resampled t-test, by a normal distribution: near enough for what is only looked at.
        error = max(stdev(differences) if len(differences) > 1 else 0.02, 1e-3) * math.sqrt(1 / len(differences) + 0.25)
        p = 2 * (1 - NormalDist().cdf(abs(mean) / error))
        interval = [mean - 2.1 * error, mean + 2.1 * error]
        adjusted = min(p * len(pairs), 1.0)
        found.append(
            {"a": one["name"], "b": other["name"], "difference": mean, "interval": interval, "p": p}
            | {"p_adjusted": adjusted}
        )
    return found


def _row(chance: random.Random, label: int, labels: int, good: float) -> list[float]:
    winner = label if chance.random() < good else (label + 1) % labels
    sure = chance.uniform(0.55, 0.999)
    return [sure if at == winner else (1 - sure) / (labels - 1) for at in range(labels)]


def _tested(entry: dict[str, Any], predictions: list[list[float]], truth: list[int], labels: int) -> None:
    counts = [[0] * labels for _ in range(labels)]
    for label, row in zip(truth, predictions, strict=True):
        counts[label][row.index(max(row))] += 1
    accuracy = sum(counts[at][at] for at in range(labels)) / max(len(truth), 1)
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / max(len(truth), 1))
    figures = {"loss": 0.24, "accuracy": accuracy, "roc_auc": accuracy + 0.03, "macro_f1": accuracy - 0.01}
    entry |= {"finalist": True, "adapter": f"adapters/{entry['name']}", "test": figures, "confusion": counts}
    entry["test_intervals"] = {"accuracy": [accuracy - half, min(accuracy + half, 1.0)]}
