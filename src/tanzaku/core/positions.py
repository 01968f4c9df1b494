"""How a model numbers positions when it is given none, learnt from the model itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tanzaku.models import tree
from tanzaku.models.families import Base


@dataclass(frozen=True)
class Numbering:
    """What a text's first token is numbered, and by what its tokens are counted.

    column: padding counts, too. mask, ids: what the mask hides or is the padding token does not. told: by a position
    embedding that is told how much a cache holds, and nothing else. none: no position is embedded, only distances, if
    any. unknown: some module embeds positions that cannot be set from outside.
    """

    kind: Literal["column", "mask", "ids", "told", "none", "unknown"]
    first: int = 0

    def natural(self, mask: Tensor | None, ids: Tensor | None, columns: Tensor) -> Tensor:
        """(rows, tokens) positions that the model would give its newest tokens, whose `columns` are (1, tokens)."""
        if self.kind == "mask" and mask is not None:
            seen = (mask != 0).long()
            return ((seen.cumsum(1) * seen - 1)[:, -columns.shape[1] :] + self.first).clamp(min=0)
        if self.kind == "ids" and ids is not None:
            seen = (ids != self.first - 1).long()
            return (seen.cumsum(1) + columns[:, :1]) * seen + self.first - 1
        return columns + self.first


_known: WeakKeyDictionary[nn.Module, Numbering] = WeakKeyDictionary()


def numbering(stack: nn.Module, base: Base) -> Numbering:
    """How `stack`, the text model of `base` or its decoder, numbers positions."""
    if stack in _known:
        return _known[stack]
    takes = parameters(stack)
    if "input_ids" not in takes:
        found = Numbering("none")
    elif "position_ids" in takes:
        weights = [*next(iter(_tables(stack)), nn.Module()).parameters()]
        if not weights or weights[0].is_meta or torch._guards.detect_fake_mode(weights) is not None:
            return by_structure(stack)  # there is nothing to look at yet
        found = _seen_at_work(stack, weights[0], getattr(base.config, "pad_token_id", None)) or by_structure(stack)
    elif "past_key_values_length" in parameters(getattr(stack, "embed_positions", None)):
        found = Numbering("told")
    else:
        found = Numbering("unknown" if _embeddings(stack) else "none")
    _known[stack] = found
    return found


def room(base: Base) -> int | None:
    """Tokens that a row may have, virtual ones included; None where there is no limit, or none is known."""
    limit, tables = base.max_positions, _embeddings(base.model)
    relative = getattr(base.config, "relative_attention_num_buckets", None) or getattr(
        base.config, "relative_attention", False
    )
    if limit is None or (relative and not tables):  # only distances count
        return None
    return limit - by_structure(base.model).first


def parameters(module: Any) -> tuple[str, ...]:
    """Names of what a module's forward pass takes, in order."""
    # A forward pass that was wrapped on the module itself still takes what its class says.
    return _names(type(module).forward) if isinstance(module, nn.Module) else ()


@lru_cache(maxsize=1024)
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def by_structure(stack: nn.Module) -> Numbering:
    """A guess: by column, but where a table keeps a row for padding, behind which positions begin."""
    padded = [m.padding_idx for m in _embeddings(stack) if type(m) is nn.Embedding and m.padding_idx is not None]
    return Numbering("ids", int(padded[0]) + 1) if padded else Numbering("column")


def _embeddings(stack: nn.Module) -> list[nn.Module]:
    """Modules before the layers that embed positions."""
    layers = tuple(f"{path}." for path, m in tree.named_modules(stack) if isinstance(m, nn.ModuleList))
    return [
        module
        for path, module in tree.named_modules(stack)
        if path
        and not path.startswith(layers)
        and ("pos_emb" in path.rpartition(".")[2] or "position" in path.rpartition(".")[2] or path.endswith("wpe"))
        and (isinstance(module, nn.Embedding) or "Embedding" in type(module).__name__)
        and "Rotary" not in type(module).__name__
    ]


# -- a look at what the position embedding, or else the first layer, is given


class _Seen(Exception):
    """Ends a forward pass on purpose, with the positions that were seen in it."""

    def __init__(self, positions: Tensor | None):
        self.positions = positions


_looking: ContextVar[bool] = ContextVar("looking", default=False)


def _look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not _looking.get():
        return
    given = {**dict(zip(parameters(module), args, strict=False)), **kwargs}
    positions = given.get("input") if isinstance(module, nn.Embedding) else None
    positions = given.get("position_ids") if positions is None else positions
    if isinstance(positions, Tensor):
        raise _Seen(positions)


def _end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if _looking.get():
        _look(module, args, kwargs)
        raise _Seen(None)


def _tables(stack: nn.Module) -> list[nn.Module]:
    """The embedding of token ids, where a stack says what it is."""
    try:
        return [stack.get_input_embeddings()]  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return []


def _seen_at_work(stack: nn.Module, weight: Tensor, pad: int | None) -> Numbering | None:
    """The numbering of three short rows, or None where none was seen. No layer runs."""
    empty = 0 if pad is None else pad
    word = 1 if empty == 0 else 0
    ids = torch.tensor([[word] * 4, [empty, *[word] * 3], [empty, *[word] * 3]], device=weight.device)
    mask = torch.tensor([[1] * 4, [0, 1, 1, 1], [1] * 4], device=weight.device)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    given |= {"use_cache": False} if "use_cache" in parameters(stack) else {}
    lists = [m for m in tree.modules(stack) if isinstance(m, nn.ModuleList)]
    layers = {id(layer): layer for modules in lists for layer in modules}
    before = [m for m in tree.modules(stack) if _takes_positions(m) and m is not stack and id(m) not in layers]
    handles = [m.register_forward_pre_hook(_end, with_kwargs=True) for m in layers.values()]
    handles += [m.register_forward_pre_hook(_look, with_kwargs=True) for m in [*before, *_embeddings(stack)]]
    from tanzaku.core.quiet import quiet

    token = _looking.set(True)
    try:
        with quiet(), torch.no_grad(), torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            # The class's own forward pass: hooks of the module, such as an active adapter's, take no part.
            type(stack).forward(stack, **given)
    except _Seen as seen:
        return None if seen.positions is None else _judged(seen.positions, pad)
    except Exception:  # whatever a model may say to rows like these, its structure remains
        return None
    finally:
        _looking.reset(token)
        for handle in handles:
            handle.remove()
    return None


def _takes_positions(module: nn.Module) -> bool:
    return "position_ids" in parameters(module)


def _judged(positions: Tensor, pad: int | None) -> Numbering | None:
    # (rows or 1, 4), with several kinds of positions in front of them in some models, of which the first counts tokens.
    while positions.dim() > 2:
        positions = positions[0]
    if positions.dim() != 2 or positions.shape[1] != 4:
        return None
    rows = cast(list[list[int]], positions.expand(3, -1).tolist())
    whole, masked, padded = rows
    first = whole[0]
    if whole != list(range(first, first + 4)):
        return None
    if masked[1:] == whole[1:]:
        return Numbering("column", first)
    if masked[1:] != whole[:3]:
        return None
    if padded[1:] == whole[1:]:
        return Numbering("mask", first)
    return Numbering("ids", first) if pad is not None and first == pad + 1 else None
