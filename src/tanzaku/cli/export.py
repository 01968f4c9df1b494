"""`tanzaku export`: an adapter as a GGUF file, by itself or merged into its base, or a whole model, for llama.cpp and
Ollama."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tanzaku.cli.adapters import (
    attach_saved,
    check_mergeable,
    check_paths,
    load_base_of,
    load_whole,
    note,
    read_adapter,
)
from tanzaku.errors import TanzakuError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TYPES = ("f32", "f16", "bf16", "q8_0")
MODELFILE = "Modelfile"


def export(
    adapter: Annotated[
        Path,
        typer.Argument(metavar="ADAPTER", help="an adapter's directory, Tanzaku's or HF PEFT's; or a whole model's"),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE.gguf|DIR", help="the file; or a directory, for a Modelfile beside it")
    ],
    model: Annotated[str | None, typer.Option(metavar="TEXT", help="where the base model is now")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="the whole model, with the adapter folded in")] = False,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="the base beside the adapter, once for all adapters (needs a DIR)")
    ] = False,
    outtype: Annotated[str, typer.Option(metavar="|".join(_TYPES), help="of matrices in the file")] = "f16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace files that are there")] = False,
) -> None:
    """Write an adapter as GGUF, for llama.cpp and Ollama.

    A LoRA adapter becomes a small file that lies over a GGUF of the same base; with --merged, the base and the adapter
    become one file, by any method that merges. So does the directory of a whole model, as tanzaku merge writes it.
    """
    check_paths([adapter])
    if outtype not in _TYPES:
        raise TanzakuError(f"--outtype is {outtype!r}, expected {', '.join(_TYPES)}")
    alone = out.suffix == ".gguf"
    if merged and with_base:
        raise TanzakuError("--merged writes the base with the adapter inside, and --with-base beside it; choose one")
    if alone and with_base:
        raise TanzakuError(f"--with-base writes several files, and --out is the file {out}; expected a directory")
    whole = (adapter / "config.json").is_file() and not (adapter / "adapter_config.json").is_file()
    asked = {"--merged": merged, "--with-base": with_base, "--model": model is not None}
    if whole and any(asked.values()):
        odd = next(name for name, there in asked.items() if there)
        raise TanzakuError(f"{odd} is for adapters, and {adapter} is a whole model; leave it out")
    given = [] if whole else [read_adapter("adapter", adapter)]
    if merged:
        check_mergeable(given[0])
    base = str(adapter) if whole else model or given[0].base
    if base is None:
        raise TanzakuError(f"{adapter} does not name its base model; say with --model where it is")
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", adapter.resolve().name).strip("-") or "adapter"
    file = out if alone else out / f"{name}.gguf"
    base_file = out / "base.gguf"
    files = [file] if alone else [file, out / MODELFILE]
    if with_base and not base_file.exists():
        files.append(base_file)  # one that is there serves the adapters exported before
    _check_free(files, out, alone, overwrite)

    import tanzaku as tz
    from tanzaku.cli.machine import quieten
    from tanzaku.export.gguf import export_adapter, export_model
    from tanzaku.export.modelfile import modelfile
    from tanzaku.files.writing import written_beside
    from tanzaku.models.quantize import quantised

    quieten()
    dtype = "float32" if outtype == "f32" else "auto"
    loaded, tokenizer = load_base_of(base, given, dtype) if given else load_whole(base, dtype)
    if given:
        attach_saved(loaded, given)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        if merged:
            packed = any(quantised(module) for module in loaded.modules())
            tz.merge(loaded, given[0].name, dequantize=packed, keep=False)
            if (lost := tz.rounding(loaded)).worst:
                note(f"{lost}; --outtype f32 keeps it")
        if merged or whole:
            export_model(loaded, _needed(tokenizer, base), file, outtype=outtype, name=name)
        else:
            export_adapter(loaded, given[0].name, file, outtype=outtype)
            if base_file in files:
                export_model(loaded, _needed(tokenizer, base), base_file, outtype=outtype, name="base")
    for warning in told:
        if str(warning.message).startswith("llama.cpp"):
            note(f"warning: {warning.message}")
    if not alone:
        start = f"./{file.name}" if merged or whole else "./base.gguf" if base_file.exists() else base
        hint = None if start.startswith("./") else "After FROM: the base as a GGUF file, or a model that Ollama has."
        text = modelfile(
            _needed(tokenizer, base), start, adapter=None if merged or whole else f"./{file.name}", note=hint
        )
        with written_beside(out / MODELFILE) as beside:
            beside.write_text(text, encoding="utf-8")
    sizes = [f"{each} ({each.stat().st_size / 1e6:,.1f} MB)" for each in files if each.suffix == ".gguf"]
    note(f"{adapter} exported: {', '.join(sizes)}, {outtype}")


def _check_free(files: list[Path], out: Path, alone: bool, overwrite: bool) -> None:
    if alone and out.is_dir():
        raise TanzakuError(f"--out {out} is a directory; expected a file, or a directory of another name")
    if not alone and out.is_file():
        raise TanzakuError(f"--out {out} is a file of no .gguf ending; expected FILE.gguf or a directory")
    if (there := [str(each) for each in files if each.exists()]) and not overwrite:
        raise TanzakuError(f"{listed(there)} is there already; choose another --out or pass --overwrite")
    try:
        (out.parent if alone else out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TanzakuError(f"cannot write {out}: {error.strerror}; choose another --out") from None


def _needed(tokenizer: PreTrainedTokenizerBase | None, base: str) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise TanzakuError(f"{base!r} has no tokenizer, which a GGUF of a whole model and a Modelfile need")
    return tokenizer
