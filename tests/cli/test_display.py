"""What a comparison says while it runs, and what it checks before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

import tanzaku as tz
from tanzaku.cli import live
from tanzaku.cli.run import _distinct
from tanzaku.tasks.task import Metric
from tanzaku.train.results import Job
from tanzaku.train.settings import TrainSettings


@pytest.mark.parametrize(
    ("passed", "steps", "expected"),
    [
        (5.0, 10, "-"),  # the first steps measure
        (60.0, 0, "-"),
        (60.0, 50, "1:00"),
        (60.0, 1, "1 h 39 min"),
        (86_400.0, 2, "1,176 h 00 min"),
    ],
)
def test_the_time_left_is_told_in_hours_and_not_by_the_first_steps(
    monkeypatch: pytest.MonkeyPatch, passed: float, steps: int, expected: str
) -> None:
    shown = live.Live(cast(Metric, SimpleNamespace(on_validation="accuracy")))
    shown.stage_began, shown.steps, shown.steps_known, shown.jobs_known = 0.0, steps, 100, 1
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: passed))
    assert shown._left() == expected


def test_a_method_is_checked_once_however_many_ways_it_is_trained() -> None:
    slow, fast = TrainSettings(learning_rate=1e-4), TrainSettings(learning_rate=1e-3)
    given = [("a", tz.LoRA(r=1), slow), ("b", tz.LoRA(r=1), fast), ("c", tz.LoRA(r=2), slow), ("d", tz.IA3(), slow)]
    assert [each.name for each in _distinct([Job(*each) for each in given])] == ["a", "c", "d"]
