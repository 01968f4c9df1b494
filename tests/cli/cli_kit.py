"""What the command line's tests share besides fixtures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS = [("the warm rain of spring", "mild"), ("a cold wind of winter", "harsh"), ("warm sea", "mild")]
ROWS += [("cold sea", "harsh"), ("spring rain", "mild"), ("winter wind", "harsh")]
TEXTS = [text for text, _ in ROWS]


@dataclass
class Said:
    """What a command left behind."""

    code: int
    out: str
    err: str


Tanzaku = Callable[..., Said]


def write_tsv(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8")
    return path


def results_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return found


def assert_refused(said: Said, *parts: str) -> None:
    assert said.code == 2
    assert said.err.startswith("tanzaku: error: ") and said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.err
    for part in parts:
        assert part in said.err, said.err
