"""Metrics of generated text, as each row's sufficient statistics.

Of records with `text`, what was generated, and `reference`, what it should be: lists of str, an entry for each row. All
figures are from 0 to 1: chrF and BLEU are sacrebleu's divided by 100.

BLEU and ROUGE-L compare words, and know these by rules for texts in the letters a to z. The rule of the first leaves a
Japanese sentence one word; that of the second leaves nothing of a Russian one. How references are written
(:func:`writing_of`) therefore decides which of the metrics compare characters, and their titles say so
(:func:`text_metrics`). A metric's name is the same in either case, so that a recipe can name it before rows are read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.support.lazy import Lazy
from tanzaku.tasks.cells import short
from tanzaku.tasks.task import Metric, OwnMetric, Records, Statistics

if TYPE_CHECKING:
    import numpy as np

    from tanzaku.tasks.task import Array
else:
    np = Lazy("numpy")

# How texts are written: in words of a to z, of other letters, or without spaces between words.
Writing = Literal["latin", "other", "unspaced"]

SHARE = 0.2  # of all letters, from which on letters of another kind decide; French has one of 20 with an accent
_UNSPACED = (
    r"[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Hangul}\p{scx=Thai}\p{scx=Lao}\p{scx=Khmer}\p{scx=Myanmar}]"
)


def writing_of(references: Iterable[str]) -> Writing:
    """How texts are written, by the shares of their letters: `unspaced` from a fifth on in Chinese, Japanese, Korean,
    Thai, Lao, Khmer or Burmese script, else `other` from a fifth on beyond a to z, else `latin`.

    Korean has spaces, but between phrases more than words: sacrebleu, too, splits these.
    """
    import regex  # type: ignore[import-untyped]

    letters = unspaced = other = 0
    for text in references:
        found = "".join(regex.findall(r"\p{L}+", text))
        letters += len(found)
        other += len(re.sub("[a-zA-Z]+", "", found))
        unspaced += len(regex.findall(_UNSPACED, found))
    if unspaced >= SHARE * letters > 0:
        return "unspaced"
    return "other" if other >= SHARE * letters > 0 else "latin"


def text_metrics(writing: Writing = "latin") -> tuple[Metric, ...]:
    """All metrics but a user's own, as they fit texts that are written so."""
    bleu = BLEU_CHARACTERS if writing == "unspaced" else BLEU
    rouge = ROUGE_L if writing == "latin" else ROUGE_L_CHARACTERS
    return (CHRF, bleu, rouge, EXACT_MATCH, VALID_JSON)


def _shares(right: Sequence[bool]) -> Statistics:
    rows = np.array([right, np.ones(len(right))], dtype=float).T
    return Statistics(rows, lambda sums: sums[0] / sums[1])


def _means(values: Sequence[float]) -> Statistics:
    rows = np.array([values, np.ones(len(values))], dtype=float).T
    return Statistics(rows, lambda sums: sums[0] / sums[1])


def _pairs(records: Records) -> Iterable[tuple[str, str]]:
    return zip(records["text"], records["reference"], strict=True)


# -- whole texts


def _exact_match(records: Records) -> Statistics:
    """The same characters, but for white space at both ends. Case, width and accents count."""
    return _shares([text.strip() == reference.strip() for text, reference in _pairs(records)])


def _valid_json(records: Records) -> Statistics:
    """A text that is one JSON value (RFC 8259) and white space: NaN and Infinity are none, nor is a code fence."""
    return _shares([_is_json(text) for text in records["text"]])


def _is_json(text: str) -> bool:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        # Numbers stay text: Python would refuse integers of thousands of digits, which JSON allows.
        json.loads(text, parse_constant=refuse, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return False
    return True


# -- n-grams


_CHARACTERS, _BETA = 6, 2.0  # chrF2: n-grams of one to six characters, recall twice as important
_WORDS = 4  # BLEU: n-grams of one to four


def _chrf(records: Records) -> Statistics:
    """chrF2 over all rows together, by their counts: [n, 18], of n-grams of each order, generated, expected, matched.

    Popović 2015, chrF: character n-gram F-score for automatic MT evaluation; as in sacrebleu, without white space, and
    over those orders of which both sides have n-grams.
    """
    ngrams = _sacrebleu("metrics.helpers").extract_all_char_ngrams
    rows = []
    for pair in _pairs(records):
        row: list[int] = []
        for own, expected in zip(*(ngrams(each, _CHARACTERS, False) for each in pair), strict=True):
            # As sacrebleu counts: what is generated beyond the longest n-gram of a reference is not held against it.
            row += [own.total() if expected else 0, expected.total(), (own & expected).total()]
        rows.append(row)

    def figure(sums: Array) -> Array:
        own, expected, matched = sums.reshape(_CHARACTERS, 3, -1).swapaxes(0, 1)
        both = (own > 0) & (expected > 0)
        orders = np.maximum(both.sum(axis=0), 1)
        precision = (np.where(both, matched, 0) / np.maximum(own, 1)).sum(axis=0) / orders
        recall = (np.where(both, matched, 0) / np.maximum(expected, 1)).sum(axis=0) / orders
        below = _BETA**2 * precision + recall
        score: Array = (1 + _BETA**2) * precision * recall / np.where(below > 0, below, 1)
        return score

    return Statistics(np.array(rows, dtype=float).reshape(-1, 3 * _CHARACTERS), figure)


def _bleu_of_words(records: Records) -> Statistics:
    return _bleu(records, "13a")


def _bleu_of_characters(records: Records) -> Statistics:
    return _bleu(records, "char")


def _bleu(records: Records, tokenizer: str) -> Statistics:
    """BLEU over all rows together, by their counts: [n, 10], lengths generated and expected, then n-grams of each order
    matched, and of each order generated.

    Papineni et al. 2002, BLEU: a method for automatic evaluation of machine translation; sacrebleu's defaults: cased,
    an order of which nothing matches counts as half a match, the next one as a quarter ("exp").
    """
    # Orders are left out of a row's own figure, which is not looked at; otherwise sacrebleu warns of such figures.
    scorer = _sacrebleu("metrics").BLEU(tokenize=tokenizer, effective_order=True)
    found = [scorer.sentence_score(text, [reference]) for text, reference in _pairs(records)]
    rows = [[row.sys_len, row.ref_len, *row.counts, *row.totals] for row in found]

    def figure(sums: Array) -> Array:
        own, expected = sums[:2]
        matched, total = sums[2:].reshape(2, _WORDS, -1)
        none = matched == 0
        halved = np.where(none, 0.5 ** none.cumsum(axis=0), matched)
        with np.errstate(divide="ignore"):
            precision = np.exp(np.log(halved / np.maximum(total, 1)).mean(axis=0))
        brevity = np.where(own < expected, np.exp(1 - expected / np.maximum(own, 1)), 1.0)
        score: Array = np.where((matched > 0).any(axis=0) & (total > 0).all(axis=0), brevity * precision, 0.0)
        return score

    return Statistics(np.array(rows, dtype=float).reshape(-1, 2 + 2 * _WORDS), figure)


def _sacrebleu(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"sacrebleu.{module}")
    except ImportError as error:
        raise TanzakuError(
            f"chrF and BLEU take sacrebleu, which is not here ({error}): pip install sacrebleu"
        ) from None


# -- common subsequences


def _rouge_l_of_words(records: Records) -> Statistics:
    """Words as rouge-score finds them without its stemmer: runs of a to z and digits, in small letters."""
    return _rouge_l(records, lambda text: re.findall("[a-z0-9]+", text.lower()))


def _rouge_l_of_characters(records: Records) -> Statistics:
    """Every character but white space."""
    return _rouge_l(records, lambda text: "".join(text.lower().split()))


def _rouge_l(records: Records, split: Callable[[str], Sequence[str]]) -> Statistics:
    """The mean over rows of F1 of the longest common subsequence: its share of what is generated and of what is
    expected.

    Lin 2004, ROUGE: a package for automatic evaluation of summaries.
    """
    values = []
    for text, reference in _pairs(records):
        own, expected = split(text), split(reference)
        # 2 P R / (P + R) with P = common / len(own) and R = common / len(expected).
        values.append(2 * _common(own, expected) / max(len(own) + len(expected), 1))
    return _means(values)


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence, a column of its table at a time as the bits of one number.

    Hyyrö 2004, Bit-parallel LCS-length computation revisited.
    """
    places: dict[str, int] = {}
    for at, each in enumerate(a):
        places[each] = places.get(each, 0) | 1 << at
    every = (1 << len(a)) - 1
    left = every  # a bit is 0 where the subsequence grows by one
    for each in b:
        met = left & places.get(each, 0)
        left = ((left + met) | (left - met)) & every
    return len(a) - left.bit_count()


CHRF = Metric("chrf", "chrF", "higher", (0.0, 1.0), _chrf, by_row=True)
BLEU = Metric("bleu", "BLEU", "higher", (0.0, 1.0), _bleu_of_words, by_row=True)
BLEU_CHARACTERS = Metric("bleu", "BLEU (characters)", "higher", (0.0, 1.0), _bleu_of_characters, by_row=True)
ROUGE_L = Metric("rouge_l", "ROUGE-L", "higher", (0.0, 1.0), _rouge_l_of_words, by_row=True, hub="rouge")
ROUGE_L_CHARACTERS = Metric(
    "rouge_l", "ROUGE-L (characters)", "higher", (0.0, 1.0), _rouge_l_of_characters, by_row=True, hub="rouge"
)
EXACT_MATCH = Metric("exact_match", "exact match", "higher", (0.0, 1.0), _exact_match, proportion=True, by_row=True)
VALID_JSON = Metric("valid_json", "valid JSON", "higher", (0.0, 1.0), _valid_json, proportion=True, by_row=True)


# -- a user's own


def user_metric(named: str, folder: Path = Path()) -> OwnMetric:
    """A metric by a function of the user's, which is run as it stands, with all that it may do to the machine. So call
    this with what a user wrote into a command or a recipe, and never with what a file beside an adapter says.

    The function is called as `function(text, reference)` for each row, both str, and returns one number; the figure is
    the mean over the rows. Its name is the metric's. Where less is better it says so by an attribute,
    `function.better = "lower"`, and what its numbers can be by another, `function.bounds = (0, 1)`.

    Args:
        named: `my_file.py:function`. folder: the recipe's, from which a relative path leads.

    Raises:
        TanzakuError: no such file, one that cannot be run or stands in an adapter's directory, no such function, or one
            with the name of another metric, or with attributes that say nothing. When figures are computed: the
            function raised an error, or returned what is no finite number within its bounds, and at which row, counted
            from 1.
    """
    file, colon, function = named.rpartition(":")
    if not colon or not file or not function.isidentifier():
        raise TanzakuError(f"found metric {named!r}, expected a file and a function in it: my_file.py:function")
    known = ["loss", "perplexity", "token_accuracy", *(metric.name for metric in text_metrics())]
    if function in known:
        raise TanzakuError(f"{named}: {function} is a metric already, as are {listed(known)}; rename the function")
    path = (folder / Path(file).expanduser()).absolute()
    own = _OfUser(path, function, _sha256(path))
    found = own.load()
    better, bounds = getattr(found, "better", "higher"), getattr(found, "bounds", (-math.inf, math.inf))
    if better not in ("higher", "lower"):
        raise TanzakuError(f"{named}: {function}.better is {better!r}, expected 'higher' or 'lower'")
    if not _are_bounds(bounds):
        raise TanzakuError(f"{named}: {function}.bounds is {bounds!r}, expected two numbers, as in (0, 1)")
    low, high = map(float, bounds)
    return _own(function, better, (low, high), replace(own, bounds=(low, high)), path.name, own.sha256)


def metric_from(about: Any, where: str) -> OwnMetric:
    """What a file tells of a metric by a function of somebody's. Its figures can be read, and not computed: no code is
    run that a file names.

    Raises:
        TanzakuError: begins with `where`; it does not tell.
    """
    bounds = about.get("bounds") if isinstance(about, dict) else None
    ends = (
        [inf if end is None else end for end, inf in zip(bounds, (-math.inf, math.inf), strict=False)]
        if isinstance(bounds, list)
        else []
    )
    if (
        not isinstance(about, dict)
        or not isinstance(about.get("name"), str)
        or not about["name"].isidentifier()
        or about.get("better") not in ("higher", "lower")
        or not _are_bounds(ends)
        or not all(isinstance(about.get(key), str) for key in ("file", "sha256"))
    ):
        raise TanzakuError(f"{where}measured is {short(about)}, expected name, better, bounds, file and sha256")
    name = about["name"]
    return _own(name, about["better"], (ends[0], ends[1]), _Unknown(name), about["file"], about["sha256"])


def _own(name: str, better: Any, bounds: tuple[float, float], statistics: Any, file: str, sha256: str) -> OwnMetric:
    return OwnMetric(name, name.replace("_", " "), better, bounds, statistics, by_row=True, file=file, sha256=sha256)


def _are_bounds(found: Any) -> bool:
    """Whether these are two numbers, the second one larger."""
    if not isinstance(found, tuple | list) or len(found) != 2:
        return False
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in found)
    return bool(numbers and found[0] < found[1])


@dataclass(frozen=True)
class _Unknown:
    """In place of a function that is known by its name alone."""

    name: str

    def __call__(self, records: Records) -> Statistics:
        raise TanzakuError(f"{self.name} is a function of whoever trained, and is not run again")


@dataclass(frozen=True)
class _OfUser:
    """Statistics by a function in a file. It goes to other processes by its name, and is loaded there again."""

    path: Path
    function: str
    sha256: str
    bounds: tuple[float, float] = (-math.inf, math.inf)

    def load(self) -> Callable[[str, str], Any]:
        module = _loaded(self.path, self.sha256)
        found: Callable[[str, str], Any] | None = getattr(module, self.function, None)
        if not callable(found):
            functions = [name for name, each in vars(module).items() if callable(each) and not name.startswith("_")]
            there = f"; it has {listed(functions)}" if functions else ""
            raise TanzakuError(f"{self.path} has no function {self.function}{nearest(self.function, functions)}{there}")
        return found

    def __call__(self, records: Records) -> Statistics:
        function, values, (low, high) = self.load(), [], self.bounds
        for row, (text, reference) in enumerate(_pairs(records), 1):
            where = f"metric {self.function} of {self.path.name}"
            asked = f"at row {row}, of the text {short(text)} and the reference {short(reference)}"
            try:
                value = function(text, reference)
            except Exception as error:
                raise TanzakuError(f"{where} raised {_told(error, self.path)} {asked}") from error
            if not isinstance(value, int | float | np.number | np.bool_):
                found = f"{short(value)} ({type(value).__name__})"
                raise TanzakuError(f"{where} returned {found} {asked}; expected a number")
            if not math.isfinite(value):
                raise TanzakuError(f"{where} returned {value} {asked}; expected a finite number")
            if not low <= value <= high:
                raise TanzakuError(f"{where} returned {value} {asked}; expected {low:g} to {high:g}, its bounds")
            values.append(float(value))
        return _means(values)


def _told(error: BaseException, path: Path) -> str:
    """An error's type, the first line of what it says, and which line of the file it came from."""
    said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}".removesuffix(": ")
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{said} (line {lines[-1]})" if lines else said


def _read(path: Path) -> bytes:
    from tanzaku.files.untrusted import is_there

    if path.suffix != ".py":
        raise TanzakuError(f"{path} is no Python file; expected my_file.py:function")
    if not is_there(path):
        raise TanzakuError(f"there is no {path}; a metric's file is looked for from the recipe's folder")
    if (path.resolve().parent / "adapter_config.json").exists():
        raise TanzakuError(f"{path} stands in an adapter's directory, from which no code is run; move it elsewhere")
    try:
        return path.read_bytes()
    except OSError as error:
        raise TanzakuError(f"{path} cannot be read: {error.strerror or error}") from None


def _sha256(path: Path) -> str:
    return hashlib.sha256(_read(path)).hexdigest()


@lru_cache(maxsize=64)
def _loaded(path: Path, sha256: str) -> Any:
    code = _read(path)
    if hashlib.sha256(code).hexdigest() != sha256:
        raise TanzakuError(f"{path} has changed since the run began; begin anew with it, or put it back")
    name = f"tanzaku_metric_{path.stem}_{sha256[:16]}"
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # where its classes look for themselves
    try:
        exec(compile(code, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise TanzakuError(f"{path} cannot be run: {_told(error, path)}") from error
    return module
