"""`tanzaku merge`: an adapter, or several combined, folded into its base: a plain model directory."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tanzaku.cli.adapters import (
    Saved,
    agreed,
    attach_saved,
    check_mergeable,
    check_paths,
    load_base_of,
    names_of,
    note,
    read_adapter,
)
from tanzaku.errors import TanzakuError, listed, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_DTYPES = ("auto", "float32", "bfloat16", "float16")


def merge(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADAPTER", help="directories of adapters, Tanzaku's or HF PEFT's", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="the directory to write")] = None,
    model: Annotated[str | None, typer.Option(metavar="TEXT", help="where the base model is now")] = None,
    dtype: Annotated[str, typer.Option(metavar="|".join(_DTYPES), help="of the weights; auto: the base's")] = "auto",
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="of one file of weights")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a model that is there")] = False,
    weights: Annotated[
        list[str] | None,
        typer.Option(metavar="NUMBER...", help="of several adapters, as in 0.7 0.3, or with a comma; equal by default"),
    ] = None,
    combine: Annotated[
        str | None, typer.Option(metavar="HOW", help="linear, cat, svd, ties, dare_ties, ...: see docs/merging.md")
    ] = None,
    density: Annotated[float | None, typer.Option(metavar="SHARE", help="of values kept, for ties and dare")] = None,
    majority_sign_method: Annotated[str, typer.Option(metavar="total|frequency", help="for ties")] = "total",
    svd_rank: Annotated[int | None, typer.Option(metavar="INTEGER", help="of the combined change")] = None,
    copies: Annotated[
        str | None, typer.Option(metavar="NAME|mean", help="whose head the combined model has, or their mean")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="INTEGER", help="of what dare drops")] = 0,
) -> None:
    """Fold adapters into their base model.

    Writes sharded safetensors, config (with the names of classes) and tokenizer, which transformers loads by itself.
    Several adapters are combined first. A quantised base becomes a plain one.
    """
    words, numbers = _split(list(adapters or []), list(weights or []))
    paths = [Path(word) for word in words]
    check_paths(paths)
    if out is None:
        raise TanzakuError("merge needs --out, the directory to write the model to")
    _check_flags(dtype, max_shard_size)
    from tanzaku.cli.machine import quieten

    quieten()
    given = [read_adapter(name, path) for name, path in zip(names_of(paths), paths, strict=True)]
    base = model or agreed(given, "base", "base models", "say with --model where the one base of all is")
    if base is None:
        raise TanzakuError(f"{given[0].path} does not name its base model; say with --model where it is")
    _check_out(out, overwrite, [*paths, Path(base).expanduser()])
    for each in given:
        check_mergeable(each)
    if numbers is not None and len(numbers) != len(given):
        raise TanzakuError(f"--weights: found {len(numbers)} weights for {len(given)} adapters, expected one each")
    copies = next((each.name for each in given if copies is not None and each.path == Path(copies)), copies)
    asked = {"how": combine, "density": density, "svd_rank": svd_rank, "copies": copies}
    options = {key: value for key, value in asked.items() if value is not None}
    if dtype == "auto" and (base == "embedded" or base.lower().endswith(".gguf")):
        dtype = "float32"  # what a GGUF holds has no type of its own: float16 is how it is kept after unpacking
    loaded, tokenizer = load_base_of(base, given, dtype)
    _check_room(loaded, out)
    name = attach_saved(loaded, given)
    if len(given) > 1 or numbers is not None or options:
        name = _combined(loaded, given, numbers, options, majority_sign_method, seed)
    _fold(loaded, name)
    _check_range(loaded, base)
    _check_room(loaded, out)
    task = next((each.task for each in given if each.task is not None), None)
    if task is not None:
        loaded.config.update(task.left_in_config())
    _write(loaded, tokenizer, base, out, max_shard_size)
    files = sorted(out.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    kind = str(loaded.dtype).removeprefix("torch.")
    many = f"{len(files)} files" if len(files) > 1 else "1 file"
    note(f"{listed(each.name for each in given)} merged into {base}: {out}, {_gb(size)} in {many}, {kind}")
    if task is not None and (caution := task.caution()):
        note(caution)


# -- what was asked for


def _split(words: list[str], weights: list[str]) -> tuple[list[str], list[float] | None]:
    """Adapters and weights: the option takes one word, and the numbers behind it fall to the adapters."""
    if not weights:
        return words, None
    while words and _number(words[-1]) is not None and not Path(words[-1]).is_dir():
        weights.insert(1, words.pop())
    numbers = []
    for word in (part for each in weights for part in each.split(",")):
        number = _number(word)
        if number is None:
            raise TanzakuError(f"--weights has {word!r}, expected numbers, as in --weights 0.7 0.3 or --weights=1,-0.5")
        numbers.append(number)
    return words, numbers


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _check_flags(dtype: str, shard: str) -> None:
    if dtype not in _DTYPES:
        raise TanzakuError(f"--dtype is {dtype!r}{nearest(dtype, _DTYPES)}, expected {', '.join(_DTYPES)}")
    if not re.fullmatch(r"[1-9]\d*(\.\d+)?[KMGT]i?B", shard, re.IGNORECASE):
        raise TanzakuError(f"--max-shard-size is {shard!r}, expected a size such as 5GB or 500MB")


def _check_out(out: Path, overwrite: bool, others: Sequence[Path]) -> None:
    if out.exists() and not out.is_dir():
        raise TanzakuError(f"--out {out} is a file; expected a directory to write the model to")
    here = out.resolve()
    for other in others:
        there = other.resolve()
        if other.exists() and (here == there or here in there.parents):
            raise TanzakuError(f"--out {out} holds {other}, which it would replace; choose another directory")
    held = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
    if held and not overwrite:
        raise TanzakuError(f"--out {out} is there already, with {listed(held, 4)}; choose another, or give --overwrite")
    if held and "config.json" not in held:
        raise TanzakuError(f"--out {out} holds no model but {listed(held, 4)}; --overwrite replaces models alone")


# -- the adapters and their base


# -- combining, merging, writing


def _combined(
    model: PreTrainedModel,
    given: Sequence[Saved],
    weights: list[float] | None,
    options: dict[str, Any],
    sign: str,
    seed: int,
) -> str:
    import tanzaku as tz

    # The sum side by side is exact, and in merged weights its rank costs nothing.
    how = options.pop("how", given[0].method.combines_by or "linear")
    names = [each.name for each in given]
    new = next(name for name in ("combined", *(f"combined-{n}" for n in range(2, 99))) if name not in names)
    try:
        tz.combine(model, names, new, weights=weights, how=how, majority_sign_method=sign, seed=seed, **options)
    except TanzakuError as error:  # which speaks of arguments
        said = str(error).removeprefix("combine: ")
        raise TanzakuError(re.sub(r"copies='([^']*)'", r"--copies \1", said)) from None
    for name in names:
        tz.detach(model, name)
    return new


def _fold(model: PreTrainedModel, name: str) -> None:
    import tanzaku as tz
    from tanzaku.models.quantize import quantised

    packed = any(quantised(module) for module in model.modules())
    tz.merge(model, name, dequantize=packed, keep=False)
    lost = tz.rounding(model)
    if lost.worst:
        note(f"{lost}; --dtype float32 keeps it")


def _check_range(model: PreTrainedModel, base: str) -> None:
    """An error where the model computes nothing: activations of some, as of Gemma's, are beyond float16."""
    import torch

    from tanzaku.models.loading import reads_text

    if model.dtype != torch.float16 or not reads_text(model) or model.config.is_encoder_decoder:
        return
    with torch.inference_mode():
        out = model(torch.arange(1, 9)[None])[0]
    if not out.isfinite().all():
        raise TanzakuError(
            f"{base!r} in float16 gives numbers that are not finite; expected --dtype bfloat16 or float32"
        )


def _check_room(model: PreTrainedModel, out: Path) -> None:
    """An error unless the disk has room for the model's weights, and a little more."""
    needed = int(1.01 * sum(p.numel() * p.element_size() for p in model.parameters())) + (64 << 20)
    folder = out.absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TanzakuError(
            f"--out {out} needs {_gb(needed)} and {folder} has {_gb(free)} free; free some space or choose another"
        )


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, base: str, out: Path, shard: str) -> None:
    """Write the directory beside and rename it: whatever happens, the old model is there or the new one."""
    from transformers.utils import cached_file

    from tanzaku.files.writing import directory_beside
    from tanzaku.models.loading import reads_text

    with directory_beside(out.resolve() if out.is_symlink() else out) as beside:
        model.save_pretrained(beside, max_shard_size=shard)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        if not reads_text(model):
            found = cached_file(base, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
            if found is not None:
                shutil.copyfile(found, beside / "preprocessor_config.json")


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
