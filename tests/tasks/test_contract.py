"""The contract of a task: nothing else knows what a task knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tanzaku import tasks

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src/tanzaku"
ROOMS = ["engine", "train", "compare", "cli", "storage/card.py", "storage/card.md.j2"]
# What tasks alone speak of. (Accelerations know a decoder's own inputs, and a pooled token by its number.)
OWN = r"\blabels\b|\binput_ids\b|accuracy|roc_auc|ROC-AUC|macro_f1|macro F1|pearson|spearman|\bentit(y|ies)\b"
ACCELERATIONS = {"packing.py", "trim.py", "products.py"}


def files() -> list[Path]:
    found = []
    for room in ROOMS:
        path = SOURCES / room
        found += [path] if path.is_file() else [p for p in path.rglob("*") if p.suffix in (".py", ".j2", ".js")]
    return [path for path in found if path.name not in ACCELERATIONS]


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(SOURCES).as_posix())
def test_nothing_else_names_what_a_task_knows(path: Path) -> None:
    names = "|".join(f"tasks.{name}|{kind.__name__}" for name, kind in tasks.TASKS.items() if name != "tokens")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert not re.search(OWN, line), f"line {number}: {line.strip()}"
        assert not re.search(rf"\b({names})\b", line), f"line {number}: {line.strip()}"
