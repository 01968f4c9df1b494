"""`python -m bench families`: what every method does on tiny models of the families of the installed transformers.

A cell is `ok` where all of this holds, for adapters `a` and `b` of the method with random weights:

- a forward and a backward pass, in which every trained parameter gets a gradient;
- a batch of rows of unequal length, of `a`, of no adapter, of `b` and of `a`, gives each row what it gets alone, with
  padding on the right and on the left;
- decoding with a cache gives the logits that decoding without one gives;
- a file of `a`, loaded into another copy of the base, gives the same outputs;
- merging `a` gives the same outputs, and unmerging the base's.

What the base itself cannot do (encoders count padding on the left into positions) is not asked of it with adapters.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import re
import tempfile
import textwrap
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import tanzaku as tz
from bench.zoo import IMAGE, SUBJECTS, Row, Subject, batch_of, more
from tanzaku.core.adapter import Adapter
from tanzaku.core.method import Method, ModuleLayer

# Column -> two adapters of the method, of unequal size where rows may have such.
COLUMNS: dict[str, Callable[[], tuple[Method, Method]]] = {
    "LoRA (default)": lambda: (tz.LoRA(r=2), tz.LoRA(r=3)),
    "LoRA all-linear": lambda: (tz.LoRA(r=2, target_modules="all-linear"), tz.LoRA(r=3, target_modules="all-linear")),
    "AdaLoRA": lambda: (tz.AdaLoRA(init_r=3, target_r=2), tz.AdaLoRA(init_r=2, target_r=2)),
    "(IA)3": lambda: (tz.IA3(), tz.IA3()),
    "prompt": lambda: (tz.PromptTuning(num_virtual_tokens=3), tz.PromptTuning(num_virtual_tokens=2)),
    "P-tuning": lambda: (tz.PTuning(num_virtual_tokens=3), tz.PTuning(num_virtual_tokens=2)),
    "prefix": lambda: (tz.PrefixTuning(num_virtual_tokens=3), tz.PrefixTuning(num_virtual_tokens=2)),
    "LLaMA-Adapter": lambda: (
        tz.LlamaAdapter(adapter_len=3, adapter_layers=1),
        tz.LlamaAdapter(adapter_len=2, adapter_layers=1),
    ),
    "BitFit": lambda: (tz.BitFit(bias_scope="add"), tz.BitFit(bias_scope="add")),
    "LN tuning": lambda: (tz.LNTuning(), tz.LNTuning()),
    "full": lambda: (tz.Full(), tz.Full()),
    "head": lambda: (tz.Head(), tz.Head()),
}
MARKS = {
    "ok": "all of it holds",
    "r": "refused, when it is attached or first run, with a reason (below the table)",
    "CRASH": "an error that is no refusal",
    "nograd": "a trained parameter gets no gradient",
    "MIX, mix-r": "a row of a batch gets something else than it gets alone; is refused",
    "LPAD": "the same, with padding on the left only",
    "GEN, gen-r": "decoding with a cache differs from decoding without one; is refused",
    "LOAD, LOAD-r": "a loaded adapter differs from the saved one; is refused",
    "MERGE, merge-r": "merged weights give something else than the adapter; are refused (a tied weight)",
    "base": "the model itself cannot be built or run here",
}
NEW_TOKENS = 3


@dataclass
class Cell:
    """What one method does on one family: marks, and for each what was found."""

    found: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return ", ".join(self.found) or "ok"

    @contextmanager
    def part(self, wrong: str, refused: str, crash: str) -> Iterator[None]:
        """A check: an assertion gives the mark `wrong`, a refusal `refused`, another error `crash`."""
        try:
            yield
        except AssertionError as error:
            self.found[wrong] = str(error)
        except tz.TanzakuError as error:
            self.found[refused] = " ".join(str(error).split())
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            line = " ".join(str(error).split())
            self.found[crash] = f"{type(error).__name__}: {line} ({Path(where.filename).name}:{where.lineno})"


class Case:
    """One family: its base, its rows, and what the base gives for them by itself."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.base = subject.build()
        self.rows = subject.rows(self.base)
        config = self.base.config.get_text_config()
        self.pad = getattr(config, "pad_token_id", None) or 0
        self.notes: dict[str, str] = {}
        self.alone = [run(self.base, row) for row in self.rows]
        self.sides = [side for side in self._sides() if self._holds(side)]
        if not self.sides:
            # Padding changes what the base gives: rows of equal length remain.
            least = min(row["input_ids"].shape[1] for row in self.rows if "input_ids" in row)
            self.rows = [
                {k: v[:, :least] if k in ("input_ids", "attention_mask") else v for k, v in row.items()}
                for row in self.rows
            ]
            self.alone = [run(self.base, row) for row in self.rows]
            self.sides = ["right"]
            if not self._holds("right"):
                self.notes["MIX"] = "rows of a batch depend on each other"
        self.gradients = self._gradients()
        self.generates = subject.generates and self._generates()

    def _sides(self) -> list[str]:
        return ["right", "left"] if any("input_ids" in row for row in self.rows) else ["right"]

    def batch(self, side: str = "right") -> Row:
        return batch_of(self.rows, self.pad, side)

    def _holds(self, side: str) -> bool:
        try:
            difference = apart(rows_of(run(self.base, self.batch(side)), self.rows, side), self.alone)
        except Exception as error:
            difference = f"{type(error).__name__}: {error}"
        if difference:
            self.notes[f"padding on the {side}"] = difference
        return not difference

    def _gradients(self) -> set[str] | None:
        """Names of the base's parameters that get a gradient, or None where it has no backward pass."""
        model = copy.deepcopy(self.base)
        try:
            loss(model(**self.batch(self.sides[0]))).backward()
        except Exception as error:
            self.notes["nograd"] = f"{type(error).__name__}: {error}"
            return None
        return {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}

    def _generates(self) -> bool:
        try:
            difference = cached_apart(self.base, self.batch(self.sides[-1]))
        except Exception as error:
            difference = f"{type(error).__name__}: {error}"
        if difference:
            self.notes["GEN"] = difference
        return not difference

    def cell(self, column: str) -> Cell:
        """Check one method."""
        cell = Cell()
        model = copy.deepcopy(self.base)
        one, other = COLUMNS[column]()
        with cell.part("CRASH", "r", "CRASH"):
            adapters = [tz.attach(model, each, name, seed=0) for name, each in (("a", one), ("b", other))]
            for seed, adapter in enumerate(adapters):
                stir(adapter, seed)
            whole = rows_of(run(model, self.batch(), ["a"] * len(self.rows)), self.rows, "right")
        if cell.found:
            return cell
        if self.gradients is not None:
            with cell.part("nograd", "grad-r", "grad-CRASH"):
                self._backward(model, adapters[0])
        entries: list[Any] = ["a", None, "b", "a"] if one.shares_batch else ["a"] * 4
        self._rows(cell, model, entries)
        if self.generates:
            with cell.part("GEN", "gen-r", "GEN-CRASH"), tz.route(model, entries):
                same(cached_apart(model, self.batch(self.sides[-1])))
        with cell.part("LOAD", "LOAD-r", "LOAD-CRASH"), tempfile.TemporaryDirectory() as folder:
            tz.save(model, "a", folder)
            fresh = copy.deepcopy(self.base)
            tz.load(fresh, folder, "a")
            again = rows_of(run(fresh, self.batch(), ["a"] * len(self.rows)), self.rows, "right")
            same(apart(again, whole))
        if one.mergeable:
            with cell.part("MERGE", "merge-r", "MERGE-CRASH"):
                tz.merge(model, "a")
                merged = run(model, self.batch())
                tz.unmerge(model)
                same(apart(rows_of(merged, self.rows, "right"), whole))
                same(apart(rows_of(run(model, self.batch()), self.rows, "right"), self._bare()))
        return cell

    def _bare(self) -> list[Tensor]:
        return rows_of(run(self.base, self.batch()), self.rows, "right")

    def _backward(self, model: PreTrainedModel, adapter: Adapter) -> None:
        with tz.route(model, ["a"] * len(self.rows)):
            loss(model(**self.batch(self.sides[0]))).backward()
        missing = [name for name, p in adapter.trained() if p.grad is None or not bool(p.grad.any())]
        # What the base's own weights have no gradient of is not asked of an adapter of them.
        weighed = {name.rpartition(".")[0] for name in self.gradients or ()}
        paths = {path for path, layer in adapter.at() if isinstance(layer, ModuleLayer) and path not in weighed}
        missing = [name for name in missing if not any(name.startswith(f"{path}.") for path in paths)]
        if adapter.method.name in ("full", "head"):
            missing = [name for name in missing if name in (self.gradients or ())]
        assert not missing, f"{len(missing)} of {len(adapter.trained())}, such as {missing[0]}"

    def _rows(self, cell: Cell, model: PreTrainedModel, entries: list[Any]) -> None:
        alone: list[Tensor] = []
        with cell.part("MIX", "mix-r", "MIX-CRASH"):
            alone = [run(model, row, [entry]) for row, entry in zip(self.rows, entries, strict=True)]
        for side in self.sides if alone else []:
            wrong = "LPAD" if side == "left" else "MIX"
            if "MIX" in cell.found or "mix-r" in cell.found:
                break
            with cell.part(wrong, "mix-r", f"{wrong}-CRASH"):
                same(apart(rows_of(run(model, self.batch(side), entries), self.rows, side), alone))


# -- running and comparing


@torch.no_grad()
def run(model: PreTrainedModel, inputs: Row, entries: Sequence[Any] | None = None) -> Tensor:
    """The model's first output, of rows routed to `entries`."""
    if entries is None:
        return first(model(**inputs))
    with tz.route(model, list(entries)):
        return first(model(**inputs))


def first(output: Any) -> Tensor:
    names = ("logits", "last_hidden_state", "pooler_output")
    return next(output[name] for name in names if name in output).float()


def loss(output: Any) -> Tensor:
    x = first(output)
    return (x * torch.linspace(0.5, 1.5, x.shape[-1])).pow(2).mean()


def rows_of(output: Tensor, rows: Sequence[Row], side: str) -> list[Tensor]:
    """Each row's own part of a batch's output: its tokens without padding, where the output has them."""
    lengths = [row["input_ids"].shape[1] if "input_ids" in row else 0 for row in rows]
    out = []
    for at, length in enumerate(lengths):
        row = output[at : at + 1]
        if row.dim() == 3 and row.shape[1] == max(lengths) and "decoder_input_ids" not in rows[at]:
            row = row[:, :length] if side == "right" else row[:, row.shape[1] - length :]
        out.append(row)
    return out


def apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """ "" where all are equal to rounding, else what differs: the square root of the type's precision, by magnitude."""
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one.shape != other.shape:
            return f"row {number}: shape {tuple(one.shape)} instead of {tuple(other.shape)}"
        most = torch.finfo(one.dtype).eps ** 0.5 * max(1.0, float(other.abs().max()))
        difference = float((one - other).abs().max())
        if not difference <= most:
            return f"row {number}: off by {difference:.2g}"
    return ""


def same(difference: str) -> None:
    assert not difference, difference


@torch.no_grad()
def cached_apart(model: PreTrainedModel, inputs: Row) -> str:
    """What differs between decoding with a cache and without one, step by step until they take another token."""
    steps = []
    for use_cache in (True, False):
        out: Any = model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            use_cache=use_cache,
            suppress_tokens=[IMAGE],
            output_logits=True,
            return_dict_in_generate=True,
        )
        steps.append(torch.stack(out.logits).float())
    for row in range(steps[0].shape[1]):
        for step, (one, other) in enumerate(zip(steps[0][:, row], steps[1][:, row], strict=True)):
            if difference := apart([one], [other]):
                return f"row {row}, new token {step}: {difference.partition(': ')[2]}"
            if one.argmax() != other.argmax():
                break
    return ""


@torch.no_grad()
def stir(adapter: Adapter, seed: int) -> None:
    """Weights as after training: nothing of the adapter is the identity."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in adapter.trained():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


# -- the table


def check(subject: Subject, columns: Sequence[str]) -> tuple[dict[str, Cell], dict[str, str]]:
    """The cells of a family, and what its base does not do by itself."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    try:
        case = Case(subject)
    except Exception as error:
        traceback.print_exc()
        return {}, {"base": f"{type(error).__name__}: {error}"}
    return {column: case.cell(column) for column in columns}, case.notes


def apart_from_here(subject: Subject, columns: Sequence[str]) -> tuple[dict[str, Cell], dict[str, str]]:
    """:func:`check` in a process of its own: whatever ends it ends one row of the table."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=lambda: theirs.send(check(subject, columns)))
    child.start()
    theirs.close()
    try:
        result: tuple[dict[str, Cell], dict[str, str]] = ours.recv()
    except EOFError:
        child.join()
        result = {}, {"base": f"its process ended with {child.exitcode}"}
    child.join()
    return result


class Page:
    """Lines of Markdown, printed as they come and kept."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, *lines: str) -> None:
        self.lines += lines
        print(*lines, sep="\n", flush=True)

    def row(self, *cells: str) -> None:
        self.add(f"| {' | '.join(cells)} |")

    def head(self, *cells: str) -> None:
        self.row(*cells)
        self.add(f"|{'---|' * len(cells)}")


def table(arguments: Sequence[str] = ()) -> None:
    """Print the table, the reasons below it, and the sums."""
    parser = argparse.ArgumentParser(prog="python -m bench families", description="Every method on every family.")
    parser.add_argument("--family", nargs="+", metavar="NAME", help="only these model types")
    parser.add_argument("--method", nargs="+", metavar="COLUMN", help="only columns that begin with one of these")
    parser.add_argument("--all", action="store_true", help="every model type that transformers can build small, too")
    parser.add_argument("--here", action="store_true", help="in this process, for a debugger")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write the table with an introduction, as docs/families.md"
    )
    options = parser.parse_args(arguments)
    groups = {**SUBJECTS, **(more() if options.all else {})}
    names = {subject.name for group in groups.values() for subject in group}
    if strange := set(options.family or ()) - names:
        parser.error(f"no family {', '.join(sorted(strange))}; there are {', '.join(sorted(names))}")
    columns = [c for c in COLUMNS if not options.method or any(plain(c).startswith(plain(m)) for m in options.method)]
    if not columns:
        parser.error(f"no such method; there are {', '.join(COLUMNS)}")
    checker = check if options.here else apart_from_here
    cells: dict[tuple[str, str], Cell] = {}
    notes: dict[str, dict[str, str]] = {}
    page = Page()
    page.head("family", *columns)
    for group, subjects in groups.items():
        chosen = [s for s in subjects if not options.family or s.name in options.family]
        if chosen:
            page.row(f"**{group}**", *("" for _ in columns))
        for subject in chosen:
            row, notes[subject.name] = checker(subject, columns)
            cells |= {(subject.name, column): row[column] for column in row}
            page.row(subject.name, *(row[c].text if c in row else "base" for c in columns))
    sums(page, cells, columns)
    reasons(page, cells, notes)
    if options.write:
        marks = [f"| `{mark}` | {meaning} |" for mark, meaning in MARKS.items()]
        text = INTRODUCTION.format(
            transformers=transformers.__version__,
            torch=torch.__version__.partition("+")[0],
            families=len(notes),
            marks="\n".join(marks),
        )
        options.write.write_text("\n".join([text, *page.lines, ""]), encoding="utf-8")


INTRODUCTION = """# Every method on every family

<!-- written by `python -m bench families --write docs/families.md` -->

What Tanzaku's methods do on tiny random models of {families} families of transformers {transformers} (torch {torch}, on
a CPU). A cell is `ok` where all of this holds for two adapters `a` and `b` of the method, with random weights:

- a forward and a backward pass, in which every trained parameter gets a gradient;
- a batch of rows of unequal length, of `a`, of no adapter, of `b` and of `a`, gives each row what it gets alone, with
  padding on the right and on the left (what a base cannot do by itself, such as padding on the left where positions
  count it, is not asked of it with adapters; that is listed at the end);
- decoding with a cache gives the logits of decoding without one;
- the file of `a`, loaded into another copy of the base, gives the same outputs;
- merging `a` into the base gives the same outputs, and unmerging gives back the base's.

Outputs are compared with a tolerance of the square root of their type's precision, times their magnitude.

| mark | meaning |
|---|---|
{marks}

LoRA, AdaLoRA and (IA)3 have their default targets here. Those are the names in the table of families
(`src/tanzaku/models/families`), HF PEFT's where it has some; or else the layers that one pass over the model's modules,
without their numbers, shows to give queries, keys and values, to end a feed-forward, or to read the input of a block
without attention. Prefix tuning and LLaMA-Adapter need attention that goes through transformers' attention interface.
In a model that reads images or sounds as vectors, all of these lie in its language model, unless targets are named.

A refusal names the property of the architecture that forbids the method. Model types that are not in this table are
treated alike; `python -m bench families --all` checks every one that can be built small.
"""


def plain(text: str) -> str:
    return "".join(ch for ch in text.lower() if ch.isalnum())


def sums(page: Page, cells: dict[tuple[str, str], Cell], columns: Sequence[str]) -> None:
    """How many cells of each column are ok, refused or something else."""
    counts = {c: Counter(kind(cell) for (_, column), cell in cells.items() if column == c) for c in columns}
    page.add("")
    page.head("sum", *columns)
    for name in ("ok", "r", "other"):
        page.row(name, *(str(counts[c][name]) for c in columns))


def kind(cell: Cell) -> str:
    """`ok`, `r` for clear refusals alone, of the method or of a part of what it could do, or `other`."""
    if not cell.found:
        return "ok"
    return "r" if all(mark == "r" or (mark.endswith("-r") and mark != "LOAD-r") for mark in cell.found) else "other"


def reasons(page: Page, cells: dict[tuple[str, str], Cell], notes: dict[str, dict[str, str]]) -> None:
    """What stands behind the marks: each reason once, with where it was given."""
    given: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for (name, column), cell in cells.items():
        for mark, reason in cell.found.items():
            given.setdefault((mark, general(reason, name)), []).append((name, column))
    for title, refusals in (("Refusals", True), ("Faults", False)):
        listed = {key: at for key, at in given.items() if (key[0][-2:] == "-r" or key[0] == "r") == refusals}
        if listed:
            page.add("", f"### {title}", "")
        for (mark, reason), at in sorted(listed.items(), key=lambda item: (item[0][0], -len(item[1]))):
            families: dict[tuple[str, ...], list[str]] = {}
            for name in dict.fromkeys(name for name, _ in at):
                families.setdefault(tuple(column for n, column in at if n == name), []).append(name)
            where = "; ".join(f"{', '.join(columns)}: {', '.join(names)}" for columns, names in families.items())
            page.add(f"{textwrap.shorten(f'- `{mark}` {reason}', 500)} ({where})")
    if any(notes.values()):
        page.add("", "### What bases do not do by themselves", "")
        for name, found in notes.items():
            page.add(*(f"- {name}: {what}: {textwrap.shorten(reason, 200)}" for what, reason in found.items()))


def general(reason: str, name: str) -> str:
    """The reason without what is the family's own: its name, paths and numbers of rows."""
    reason = re.sub(r"\b[a-z_]\w*(\.\w+)+\b(?![(:])", "...", reason.replace(f"'{name}'", "..."))
    return re.sub(r"\.\.\.(, \.\.\.)+", "...", reason)
