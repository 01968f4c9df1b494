"""What accelerations are called, and how a run chooses among them. Nothing here waits for torch."""

from __future__ import annotations

from tanzaku.errors import TanzakuError, listed, nearest

AUTO, NONE, _NOT = "auto", "none", "no-"

# Name -> the one within which alone it does something. `accelerations.py` has the classes, in the same order.
NAMES: dict[str, str | None] = {
    "packing": None,
    "row_attention": "packing",
    "last_token": None,
    "skip_unneeded": None,
    "onednn": None,
    "prepacked_weights": "onednn",
    "norms": None,
    "gates": None,
}


def chosen(wanted: str) -> tuple[str, ...]:
    """The names that a choice stands for, in the registry's order.

    Args:
        wanted: `auto` (all), `none`, names with commas between them, or names with `no-` before each: all but these,
            and but for what does something within one of these alone.

    Raises:
        TanzakuError: an unknown name, names of both kinds, or one without that within which it does something.
    """
    names = [name.strip() for name in wanted.split(",")]
    if names in ([AUTO], [NONE]):
        return tuple(NAMES) if names == [AUTO] else ()
    if alone := {AUTO, NONE} & {*names}:
        raise TanzakuError(f"found {alone.pop()!r} beside other names in {wanted!r}, expected it by itself")
    without = [name.startswith(_NOT) for name in names]
    if any(without) and not all(without):
        mixed = names[without.index(False)]
        raise TanzakuError(
            f"found {mixed!r} beside names with no- in {wanted!r}, expected all with no- (all but these) or none"
        )
    known = (AUTO, NONE, *NAMES, *(_NOT + name for name in NAMES))
    for name in names:
        if name.removeprefix(_NOT) not in NAMES:
            raise TanzakuError(
                f"found {name!r}, expected {AUTO}, {NONE}, or names, each or none with no- before it: {listed(NAMES)}"
                f"{nearest(name, known)}"
            )
    if all(without):
        left = [name for name in NAMES if _NOT + name not in names]
        return tuple(name for name in left if NAMES[name] in (None, *left))
    for name in names:
        if (within := NAMES[name]) is not None and within not in names:
            raise TanzakuError(f"found {name} without {within}, within which alone it does something; add {within}")
    return tuple(name for name in NAMES if name in names)
