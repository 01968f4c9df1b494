"""Figures as people read them."""

from __future__ import annotations

import math


def written(value: float, decimals: int) -> str:
    """So many decimals, or two digits of what these would not show, or four of what is very large."""
    if not math.isfinite(value) or value == 0:
        return f"{value:.{decimals}f}"
    if abs(value) < 10**-decimals:
        places = 1 - math.floor(math.log10(abs(value)))
        return f"{value:.{places}f}" if places <= 9 else f"{value:.1e}"
    return f"{value:.{decimals}f}" if abs(value) < 1e7 else f"{value:.4g}"
