"""Where an adapter's files lie: a directory on this machine, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from tanzaku.errors import TanzakuError
from tanzaku.storage.store import CONFIG, META, TENSORS

OPTIONS = {name for name in inspect.signature(huggingface_hub.hf_hub_download).parameters if name not in ("repo_id",)}
ALL = (CONFIG, TENSORS, META, "tokenizer_config.json", "tokenizer.json")


def folder_of(
    where: str,
    model_id: str | Path,
    subfolder: str | None = None,
    options: Mapping[str, Any] | None = None,
    names: tuple[str, ...] = ALL,
) -> Path:
    """The directory with an adapter's files, fetched from the Hub where `model_id` is no directory here.

    Args:
        where: the method that asks, for its errors. subfolder: of the directory or the repository.
        options: of `hf_hub_download`: `revision`, `token`, `cache_dir` and their like.
        names: the files wanted. Only safetensors and JSON are ever fetched.

    Raises:
        TanzakuError: no such directory and no such repository, or an option that is none.
    """
    options = {key: value for key, value in (options or {}).items() if value is not None}
    if strange := [key for key in options if key not in OPTIONS]:
        raise TanzakuError(
            f"{where}: found {strange[0]}={options[strange[0]]!r}, which is not supported; expected an option of "
            f"huggingface_hub.hf_hub_download, such as revision, token or cache_dir"
        )
    path = Path(model_id, subfolder or "")
    # As in PEFT: a directory without the file may be named like a repository.
    if (path / CONFIG).is_file() or path.is_absolute() or str(model_id).count("/") > 1 or Path(model_id).is_dir():
        return path
    found: Path | None = None
    for name in names:
        try:
            file = huggingface_hub.hf_hub_download(str(model_id), name, subfolder=subfolder, **options)
            found = Path(file).parent
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            if name not in (CONFIG, TENSORS) or (name == TENSORS and isinstance(error, EntryNotFoundError)):
                continue  # not every repository has it; one without tensors says so when it is read
            raise TanzakuError(
                f"Can't find {CONFIG!r} at {str(model_id)!r}: no directory on this machine, and the Hub says "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from None
    assert found is not None
    return found
