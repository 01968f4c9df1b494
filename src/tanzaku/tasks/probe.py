"""What a base forgets: a text that nothing is trained on, and how likely the model holds it before and after."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path

from tanzaku.errors import TanzakuError

BUNDLED, NONE = "bundled", "none"


def probe_text(named: str) -> tuple[str, str] | None:
    """The name of a held text, without its folder, and the text; None where there is to be none.

    Args:
        named: `bundled`, `none`, or a file.

    Raises:
        TanzakuError: no such file, or nothing in it, or no text.
    """
    from tanzaku.files.untrusted import is_there

    if named == NONE:
        return None
    if named == BUNDLED:
        folder = files("tanzaku") / "data" / "held"
        parts = [(folder / f"{name}.txt").read_text(encoding="utf-8") for name in ("english", "japanese")]
        return BUNDLED, "\n".join(parts)
    path = Path(named).expanduser()
    expected = "expected a text file in UTF-8, bundled or none"
    if not is_there(path):
        raise TanzakuError(f"forgetting: there is no {path}; {expected}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise TanzakuError(f"forgetting: {path} cannot be read: {error.strerror or error}; {expected}") from None
    except UnicodeDecodeError:
        raise TanzakuError(f"forgetting: {path} is no UTF-8; {expected}") from None
    if not text.strip():
        raise TanzakuError(f"forgetting: {path} has no text; {expected}")
    return path.name, text


def sha256_of(text: str) -> str:
    """What tells a text that was changed."""
    return hashlib.sha256(text.encode()).hexdigest()
