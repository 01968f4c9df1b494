"""Every key of a recipe is a flag: the flags of `train` and `compare` are made from the recipe's schema."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic.fields import FieldInfo

from tanzaku.recipe import SECTIONS
from tanzaku.recipe_errors import flag

Command = Callable[[Path | None, dict[str, Any], bool], None]

_METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT"}


def fields() -> list[tuple[str, str, FieldInfo]]:
    """(section, name, field) of every recipe key that holds one value."""
    return [
        (section, name, field)
        for section, schema in SECTIONS.items()
        for name, field in schema.model_fields.items()
        if section or name not in (*SECTIONS, "methods")
    ]


def recipe_flags(run: Command) -> Callable[..., None]:
    """A command line for `run(recipe file, flags nested as a recipe is, overwrite)`.

    Values reach the schema as they were typed, so that a flag and a recipe are checked by one rule and told in one way.
    """

    def command(**given: Any) -> None:
        file, overwrite = given.pop("recipe"), given.pop("overwrite")
        flags: dict[str, Any] = {"methods": given.pop("method") or [], "set": given.pop("set") or []}
        for section, name, _ in fields():
            if given[name] is not None:
                (flags.setdefault(section, {}) if section else flags)[name] = given[name]
        run(file, flags, overwrite)

    command.__name__, command.__doc__ = run.__name__, run.__doc__
    command.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
    return command


def _parameters() -> list[inspect.Parameter]:
    recipe = typer.Argument(metavar="RECIPE", help="a YAML recipe; flags override its keys", show_default=False)
    method = typer.Option(
        "--method", metavar="NAME", help="a method, or a candidate of the recipe by its name (repeatable)"
    )
    assign = typer.Option(
        "--set", metavar="KEY=VALUE", help="a method's setting: r=1, or lora.r=1 with several (repeatable)"
    )
    overwrite = typer.Option("--overwrite", help="replace the run that the output directory holds")
    return [
        _parameter("recipe", Path | None, recipe),
        _parameter("method", list[str] | None, method),
        _parameter("set", list[str] | None, assign),
        *(_flag(name, field) for _, name, field in fields()),
        _parameter("overwrite", bool, overwrite, False),
    ]


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    default = "" if field.default is None or field.is_required() else f" ({_shown(field.default)})"
    about = f"{field.description or name.replace('_', ' ')}{default}"
    if field.annotation is bool:
        names = f"{flag(name)}/{flag('no_' + name)}"
        return _parameter(name, bool | None, typer.Option(names, help=about, show_default=False))
    return _parameter(name, str | None, typer.Option(flag(name), metavar=_metavar(field.annotation), help=about))


def _parameter(name: str, kind: Any, info: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _metavar(annotation: Any) -> str:
    if isinstance(annotation, types.UnionType):  # `X | None`
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is Literal:
        return "|".join(typing.get_args(annotation))
    return _METAVARS[annotation]


def _shown(default: Any) -> str:
    return {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default)
