"""Which characters a file's bytes are: strict decoding in an order that leaves little to chance, or an error.

Detection by the frequency of letters wants more text than a small table has. Each encoding here is taken only where the
whole file decodes and what comes out is credible; of several that would do, none is taken.
"""

from __future__ import annotations

import codecs
import re

from tanzaku.errors import TanzakuError, nearest

COMMON = ("utf-8", "utf-16", "utf-16-le", "utf-16-be", "cp932", "euc_jp", "iso2022_jp", "cp1252", "gb18030", "big5")
# UTF-32's mark begins with the one of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_ESCAPES = re.compile(rb"\x1b\$[@B]|\x1b\([IJ]")
_KANA = re.compile("[\u3041-\u309f\u30a1-\u30ff]")
_NOT_ASCII = re.compile("[^\0-\x7f]")
_PRIVATE = re.compile("[\ue000-\uf8ff]")
# Letters, quotation marks and dashes: what Western text has, and mojibake of Japanese only by chance. Without ð, ý and
# þ, whose bytes are Turkish letters in cp1254, and ¹ and ³, which are Polish ones in cp1250: Icelandic has to be named.
_WESTERN = re.compile("[À-ÏÑ-ÖØ-Üß-ïñ-öø-üÿŒœŠšŽžŸ“”‘’„‚–—…€•«»‹›°§©®™¡¿£ºª·´\xa0\xad]+")


def decoded(raw: bytes, source: str, encoding: str | None = None) -> tuple[str, str]:
    """The text, without a byte order mark, and the name of its encoding.

    Args:
        encoding: what it is, where that is known; nothing is detected then.

    Raises:
        TanzakuError: no such encoding, bytes that are none of it, or a file that is mixed or could be several.
    """
    encoding = known(encoding) if encoding is not None else marked(raw)
    if encoding is None and (nul := raw.find(b"\0")) >= 0:
        twin = {0: "utf-16-be", 1: "utf-16-le"}.get(nul)  # the other half of an English letter, with no mark before it
        fix = f"it looks like UTF-16, so give --encoding {twin}" if twin else "expected plain text, so save it as UTF-8"
        raise TanzakuError(f"{source} has a NUL byte at {_place(raw, nul)}; {fix}")
    if encoding is None:
        try:
            return raw.decode("utf-8"), "utf-8"
        except UnicodeDecodeError as error:
            encoding = _detected(raw, f"{source} is not UTF-8 at {_place(raw, error.start)}")
    try:
        text = raw.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise TanzakuError(
            f"{source} is not {encoding} at {_place(raw, error.start)}; give its encoding with --encoding, "
            "or save it as UTF-8"
        ) from None
    if (nul := text.find("\0")) >= 0:
        line = text.count("\n", 0, nul) + 1
        raise TanzakuError(f"{source} has a NUL character at line {line}; expected plain text")
    return text, encoding


def known(name: str) -> str:
    """What Python calls an encoding; a TanzakuError where there is none of that name."""
    try:
        found = codecs.lookup(name)
        text = found._is_text_encoding  # what bytes.decode itself asks: codecs such as hex and rot13 are none
    except (LookupError, ValueError):
        text = False
    if not text:
        raise TanzakuError(
            f"encoding {name!r} is not known{nearest(name, COMMON)}; expected one such as cp932 or utf-8"
        )
    return found.name


def marked(raw: bytes) -> str | None:
    """The encoding that the bytes themselves name: by a byte order mark, or by the escapes of ISO-2022-JP."""
    for mark, encoding in _MARKS.items():
        if raw.startswith(mark):
            return encoding
    if not _ESCAPES.search(raw) or not raw.isascii():
        return None
    return "iso2022_jp_ext" if b"\x1b(I" in raw else "iso2022_jp"  # with half-width kana, or without


def _detected(raw: bytes, place: str) -> str:
    """The encoding of bytes that are no UTF-8; `place` says where they are not."""
    lines = [line for line in raw.splitlines() if not line.isascii()]
    utf8 = sum(_decodes(line, "utf-8") for line in lines)
    if utf8:
        raise TanzakuError(
            f"{place}, while {utf8} of its {len(lines)} lines with other letters than English ones are: "
            "it mixes encodings; save it as one, or name one with --encoding"
        )
    japanese = [name for name in ("euc_jp", "cp932") if _decodes(raw, name)]
    credible = [name for name in japanese if _is_japanese(raw.decode(name))]
    # Few letters with accents, each a byte alone, are no Japanese: a character of it takes the next byte, too.
    if not credible and not japanese and _decodes(raw, "cp1252") and _is_western(raw.decode("cp1252")):
        credible = ["cp1252"]
    if len(credible) == 1:
        return credible[0]
    could = [name for name in (*japanese, "cp1252") if _decodes(raw, name)]
    which = f"it could be {' or '.join(could)}: " if could else ""
    raise TanzakuError(f"{place}; {which}say what it is with --encoding, or save it as UTF-8")


def _place(raw: bytes, at: int) -> str:
    line, start = raw.count(b"\n", 0, at) + 1, raw.rfind(b"\n", 0, at)
    return f"line {line}, byte {at - start}"


def _decodes(raw: bytes, encoding: str) -> bool:
    try:
        raw.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _is_japanese(text: str) -> bool:
    """Whether kana is among what is not ASCII, as in any Japanese sentence; Chinese or Korean read so has none."""
    return len(_KANA.findall(text)) >= 0.1 * len(_NOT_ASCII.findall(text)) and not _PRIVATE.search(text)


def _is_western(text: str) -> bool:
    """Whether mostly English letters surround the others, which in Greek or Cyrillic text are nearly all."""
    other = "".join(_NOT_ASCII.findall(text))
    letters = sum(letter.isalpha() for letter in text)
    return bool(_WESTERN.fullmatch(other)) and sum(letter.isalpha() for letter in other) <= 0.3 * letters
