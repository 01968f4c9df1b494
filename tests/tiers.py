"""Two tiers of one suite: `make test` runs each law on one family, and each condition for each kind of method, and
`make test-all` all conditions for all methods on all families.

Of costly tests that hold one thing in several cases, such as kills at several moments, `make test` has some (`costly`).

A test that takes both a method and a family takes its families from here:

    @in_families(("kind", "head"), [("llama", "cls"), ("bert", "cls")])
    @all_methods
    def test_padding(name, kind, head): ...

Where a condition depends on what a method does and not on its formula, `make test` has the methods that are unlike one
another (`all_kinds` in tests/laws/variants.py). The first family is in both tiers, and the others carry the marker
`product`, which tests/conftest.py leaves out unless pytest is given `--all`, `-m` or the name of a test
(`file.py::test`). A test of the families themselves, or one that has all methods in one batch, needs no tier.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def in_families(names: str | Sequence[str], cases: Iterable[Any], *, by: int = 0) -> pytest.MarkDecorator:
    """`pytest.mark.parametrize`, with all cases but those of the first family in the tier of all.

    Args:
        names: as pytest takes them.
        cases, by: see :func:`tiered`.
    """
    return pytest.mark.parametrize(names, tiered(cases, by=by))


def tiered(cases: Iterable[Any], *, by: int = 0) -> list[Any]:
    """Cases of a parametrisation, of which those of another family than the first are in the tier of all.

    Args:
        cases: families, or tuples or `pytest.param`s that have one.
        by: where it stands in these.
    """
    out: list[Any] = []
    for case in cases:
        is_param = isinstance(case, tuple) and hasattr(case, "marks")
        param: Any = case if is_param else pytest.param(*(case if isinstance(case, tuple) else (case,)))
        other = bool(out) and param.values[by] != out[0].values[by]
        out.append(param._replace(marks=(*param.marks, pytest.mark.product)) if other else param)
    return out


def costly(cases: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Cases of a parametrisation, and others that stand in the tier of all, since each takes long."""
    values = (case if isinstance(case, tuple) else (case,) for case in others)
    return [*cases, *(pytest.param(*each, marks=pytest.mark.product) for each in values)]
