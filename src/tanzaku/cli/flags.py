"""Every key of a recipe is a flag: the flags of `train` and `compare` are made from the recipe's schema."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic.fields import FieldInfo

from tanzaku.errors import TanzakuError, flag, listed, nearest
from tanzaku.recipe.schema import SECTIONS, bundled_names
from tanzaku.tasks.settings import Override

_METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT"}
_TRAIN = ("", "model", "data", "train")  # sections that every verb with a recipe reads
_NONE: Mapping[str, str] = types.MappingProxyType({})


def fields(sections: Collection[str] = _TRAIN) -> list[tuple[str, str, FieldInfo]]:
    """(section, name, field) of every key of these sections but for the candidates and the sections themselves. The
    model's name is the flag of its section."""
    return [
        (section, "model" if (section, name) == ("model", "name") else name, field)
        for section in sections
        for name, field in SECTIONS[section].model_fields.items()
        if section or name not in (*SECTIONS, "methods")
    ]


def recipe_flags(
    run: Callable[..., None],
    sections: Collection[str] = _TRAIN,
    switches: Mapping[str, str] = _NONE,
    own: Sequence[inspect.Parameter] = (),
) -> Callable[..., None]:
    """A command line for `run(recipe file, flags nested as a recipe is, overwrite)`.

    Values reach the schema as they were typed, so that a flag and a recipe are checked by one rule and told in one way.

    Args:
        sections: those of the recipe whose keys are flags.
        switches: further flags of the verb that are on or off, with their help; `run` gets them by name.
        own: its flags that have a value; the same.
    """

    def command(**given: Any) -> None:
        file, overwrite, bundled = given.pop("recipe"), given.pop("overwrite"), given.pop("bundled")
        flags: dict[str, Any] = {"methods": given.pop("method") or [], "set": given.pop("set") or []}
        if bundled is not None:
            flags["recipe"] = bundled
        if (start := given.pop("init_from")) is not None:
            flags["init_from"] = start
        for section, name, _ in fields(sections):
            if given[name] not in (None, []):
                key = "name" if (section, name) == ("model", "model") else name
                (flags.setdefault(section, {}) if section else flags)[key] = given[name]
        run(file, flags, overwrite, **{name: given[name] for name in [*switches, *(each.name for each in own)]})

    command.__name__, command.__doc__ = run.__name__, run.__doc__
    command.__signature__ = inspect.Signature([*_parameters(sections, switches), *own])  # type: ignore[attr-defined]
    return command


def _parameters(sections: Collection[str], switches: Mapping[str, str]) -> list[inspect.Parameter]:
    recipe = typer.Argument(metavar="RECIPE", help="a YAML recipe; flags override its keys", show_default=False)
    bundled = typer.Option(
        "--recipe", metavar="|".join(bundled_names()), help="a bundled recipe; RECIPE and flags override its keys"
    )
    method = typer.Option(
        "--method", metavar="NAME", help="a method, or a candidate of the recipe by its name (repeatable)"
    )
    assign = typer.Option(
        "--set", metavar="KEY=VALUE", help="a method's setting: r=1, or lora.r=1 with several (repeatable)"
    )
    start = typer.Option("--init-from", metavar="ADAPTER", help="go on from this adapter, with its method and settings")
    overwrite = "replace the run that the output directory holds"
    return [
        parameter("recipe", Path | None, recipe),
        parameter("bundled", str | None, bundled),
        parameter("method", list[str] | None, method),
        parameter("set", list[str] | None, assign),
        parameter("init_from", str | None, start),
        *(flag_of(name, field) for _, name, field in fields(sections)),
        *(
            parameter(name, bool, typer.Option(flag(name), help=about), False)
            for name, about in {**switches, "overwrite": overwrite}.items()
        ),
    ]


def flag_of(name: str, field: FieldInfo) -> inspect.Parameter:
    """The flag of one key of a schema."""
    default = "" if field.default in (None, []) or field.is_required() else f" ({_shown(field.default)})"
    about = f"{field.description or name.replace('_', ' ')}{default}"
    if field.annotation is bool:
        names = f"{flag(name)}/{flag('no_' + name)}"
        return parameter(name, bool | None, typer.Option(names, help=about, show_default=False))
    if typing.get_origin(field.annotation) is list:
        return parameter(name, list[str] | None, typer.Option(flag(name), metavar="NAME", help=about))
    return parameter(name, str | None, typer.Option(flag(name), metavar=_metavar(field.annotation), help=about))


def show_flag(default: str) -> inspect.Parameter:
    """The flag of how many rows are printed as the model reads them.

    Args:
        default: what is shown where nothing is said, in words.
    """
    about = f"print this many training rows, token by token, those that are learnt marked ({default})"
    return parameter("show", int | None, typer.Option("--show", metavar="INTEGER", min=0, help=about))


def take_overrides(command: Callable[..., None], overrides: Mapping[str, Override]) -> None:
    """Give a command a flag for each override, in place of its parameter of that name."""
    own = inspect.signature(command, eval_str=True)
    flags = [
        parameter(
            name,
            list[str] | None if each.repeatable else str | None,
            typer.Option(flag(name), metavar=each.metavar, help=each.about, show_default=False),
        )
        for name, each in overrides.items()
    ]
    kept = [each for name, each in own.parameters.items() if name != "overrides"]
    command.__signature__ = own.replace(parameters=[*kept, *flags])  # type: ignore[attr-defined]


def check_choices(given: Mapping[str, tuple[str | None, Collection[str]]]) -> None:
    """An error where the value of a flag is none of those that it may have."""
    for name, (value, known) in given.items():
        if value is not None and value not in known:
            raise TanzakuError(f"{name} is {value!r}{nearest(value, known)}, expected {listed(known)}")


def parameter(name: str, kind: Any, info: Any, default: Any = None) -> inspect.Parameter:
    """A parameter of a command, as typer reads it from a signature."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _metavar(annotation: Any) -> str:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):  # `X | None`
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is Literal:
        return "|".join(typing.get_args(annotation))
    return _METAVARS[annotation]


def _shown(default: Any) -> str:
    if isinstance(default, list):
        return ", ".join(default)
    return {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default)
