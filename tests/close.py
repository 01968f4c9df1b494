"""When two computations count as one: they are equal to rounding.

Matrix libraries add up in an order of their own, by the processor, the number of threads and even the place in memory
where a buffer begins; what is computed twice, be it twice the same, differs by roundings. How much of it is right
depends on the type and on the largest numbers that take part, not on the test. Tests that compare computations ask this
module, with the kind of work that lies between them, and hold on any processor.

Bits are compared (`torch.equal`) of what is kept and not computed: files, stored tensors, the frozen base, random
draws, and the very same tensor. Closed formulas in float64 may have `pytest.approx`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Roundings of the largest number, by what was computed. A fault is orders of magnitude beyond them.
PASS = 2**7  # a forward pass, or less
GRADIENT = 2**10  # and the way back
RUN = 2**12  # steps of an optimizer, which divides by what may be small
HALF = 2**3  # a forward pass in half precision, whose sums are in full

# Tensors that are compared together, such as gradients, come from sums of like size: one that cancels out to next to
# nothing is held to this share of the largest.
_LEAST = 2**-4


def tolerance(expected: Any, roundings: int = PASS, *, dtype: torch.dtype | None = None, scale: float = 0.0) -> float:
    """How far from `expected` a number may be.

    Args:
        expected: a tensor or a number. Infinite numbers do not count, and whole ones are exact.
        roundings: of the largest of its numbers.
        dtype: what it was computed in, if that is not its own; of Python's numbers, float32 if nothing is said.
        scale: a number that took part, if larger ones did than are in `expected`.
    """
    own = expected.dtype if isinstance(expected, Tensor) else torch.float32
    if not (expected.is_floating_point() if isinstance(expected, Tensor) else isinstance(expected, float)):
        return 0.0
    least = torch.finfo(dtype or own).tiny  # below it numbers have fewer digits, and kernels may take them for zero
    return roundings * torch.finfo(dtype or own).eps * max(_largest([expected]), scale, least)


def assert_close(
    found: Any,
    expected: Any,
    roundings: int = PASS,
    *,
    dtype: torch.dtype | None = None,
    scale: float = 0.0,
    at: object = "",
) -> None:
    """Two computations are one.

    Args:
        found, expected: tensors of one shape and type, or numbers; or lists and mappings of them, of one length and
            the same keys. What else is in these (names, counts) must be equal; nothing at all is an error.
        at: what is compared, for the message.
        roundings, dtype, scale: see :func:`tolerance`.
    """
    assert _compared(found, expected, roundings, dtype, scale, at), f"{at}: there is nothing to compare"


def _compared(found: Any, expected: Any, roundings: int, dtype: torch.dtype | None, scale: float, at: object) -> int:
    """The number of tensors and numbers that were found to be close."""
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), at
        # Tensors of one kind; figures of a mapping are of different kinds.
        scale = max(scale, _LEAST * _largest(each for each in expected.values() if isinstance(each, Tensor)))
        parts = [(found[key], each, key) for key, each in expected.items()]
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        assert len(found) == len(expected), at
        scale = max(scale, _LEAST * _largest(expected))
        parts = [(mine, each, number) for number, (mine, each) in enumerate(zip(found, expected, strict=True))]
    else:
        allowed = tolerance(expected, roundings, dtype=dtype, scale=scale)
        if isinstance(expected, Tensor):
            torch.testing.assert_close(
                found,
                expected,
                rtol=0,
                atol=allowed,
                equal_nan=True,
                msg=lambda text: f"{at}: {text}" if at else text,
            )
        else:
            same = found == expected or (isinstance(expected, float) and _near(found, expected, allowed))
            assert same, f"{at}: {found!r} is not {expected!r} to {allowed:.1e}"
        return 1
    return sum(_compared(mine, each, roundings, dtype, scale, f"{at} {key}".strip()) for mine, each, key in parts)


def close(found: Any, expected: Any, roundings: int = PASS, **options: Any) -> bool:
    """Whether :func:`assert_close` holds: for what must differ."""
    try:
        assert_close(found, expected, roundings, **options)
    except AssertionError:
        return False
    return True


def _near(found: float, expected: float, allowed: float) -> bool:
    return abs(found - expected) <= allowed or (math.isnan(found) and math.isnan(expected))


def _largest(values: Iterable[Any]) -> float:
    """The largest finite number among floats and tensors of them."""
    found = [torch.as_tensor(v).detach() for v in values if isinstance(v, float | Tensor)]
    finite = [v.double().nan_to_num(0.0, 0.0, 0.0).abs() for v in found if v.is_floating_point() and v.numel()]
    return max((float(v.max()) for v in finite), default=0.0)
