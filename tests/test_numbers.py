"""Figures as people read them."""

from __future__ import annotations

import math

import pytest

from tanzaku.support.numbers import written


@pytest.mark.parametrize(
    ("value", "decimals", "expected"),
    [
        (0.98765, 4, "0.9877"),
        (0.0, 4, "0.0000"),
        (0.00012, 4, "0.0001"),
        (0.00003214, 4, "0.000032"),
        (-0.00030, 3, "-0.00030"),
        (2.5e-10, 4, "2.5e-10"),
        (27918548268.9588, 4, "2.792e+10"),
        (math.inf, 4, "inf"),
        (math.nan, 3, "nan"),
    ],
)
def test_figures_show_digits_that_tell_something(value: float, decimals: int, expected: str) -> None:
    assert written(value, decimals) == expected
