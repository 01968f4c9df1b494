"""The token site: virtual tokens inside the backbone, unseen outside of it.

Where token ids enter the backbone, each row gets places for its virtual tokens, directly before its first token (see
`layout.py`), and the embedding puts their learned vectors there: so masks, positions, padding and caches treat them as
tokens. Where hidden states leave it they are cut off again, so pooling, labels and generate() see only the row's own
tokens. Rows of one batch may have different numbers of them.

Prefixes take positions as well: what numbers them is here, too (see `positions.py`).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from tanzaku.core import caches, layout
from tanzaku.core.layout import Layout
from tanzaku.core.positions import Numbering, numbering, parameters, room
from tanzaku.core.routing import Route
from tanzaku.errors import TanzakuError
from tanzaku.models import tree
from tanzaku.models.families import Base

# (module, "forward_pre" or "forward", what runs there). Hooks get keyword arguments; those behind a forward pass also
# run where it fails, with None for its output.
Hook = tuple[nn.Module, str, Callable[..., Any]]

# Models whose tokens see padding in spite of the mask: convolutions over hidden states, averages over the columns; and
# recurrences, which see what comes before them.
_SEE_PADDING = ("convbert", "fnet", "funnel", "nystromformer", "yoso", "mra", "reformer")
_SEE_WHAT_WAS = ("recurrent_gemma", "rwkv")
# How packed texts are told apart where positions alone do not.
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
# What XLNet reads beside the text, and before it.
_OTHER_ORDERS = ("perm_mask", "target_mapping", "mems")
# Arguments that count other things than tokens of the text.
_NO_TOKENS = ("decoder_", "pixel_", "image_position", "video_position", "input_features", "audio_")


@dataclass
class _Pass:
    """A forward pass that is under way through one stack of layers."""

    virtual: VirtualTokens
    stack: nn.Module
    before: _Pass | None  # the pass that this one runs in
    counts: list[int]  # virtual tokens of each row
    length: int  # of the rows in this pass, with virtual tokens that enter
    read: int = 0  # tokens that a cache held before, virtual ones too
    last: bool = True  # text ends in the last column: see `layout.py`
    layout: Layout | None = None  # where virtual tokens enter
    whole: Layout | None = None  # of all that a cache holds
    fresh: bool = False  # virtual tokens have their places, but not their vectors
    skipped: Any = 0  # (rows, 1) columns before a row's first token that take no position
    moved: bool = False  # whether there may be any
    numbered: bool = False  # the caller gave positions
    positions: Tensor | None = None  # for a position embedding that takes none from outside
    hidden: Tensor | None = None  # what the last layer gave, where the pooler sees a part of it alone
    cache: tuple[str | None, Any] = (None, None)  # the caller's own


# A pass runs in one thread, and nothing else runs there meanwhile. Compiled code could not read a context variable.
_here = threading.local()


def _under_way() -> _Pass | None:
    return cast("_Pass | None", getattr(_here, "under_way", None))


class VirtualTokens:
    """Hooks that put virtual tokens in and number positions, for one route.

    `offsets` has the positions that each stack's prefixes take, and `placed` whether what the stack adds has a place
    in the text, from which the distance to the row's own tokens counts.
    """

    def __init__(self, base: Base, route: Route, tokens: list[list[Any]], offsets: list[int], placed: list[bool]):
        self.base, self.route, self.tokens = base, route, tokens
        self.counts = [sum(s.num_virtual_tokens for s in stack) for stack in tokens]
        self.offsets, self.placed = offsets, placed
        self.width = max(self.counts)
        self.room = room(base)  # positions that the model has for a row's tokens
        self._neutral: int | None = None
        self._stacks: list[tuple[nn.Module, Numbering]] = []  # those that number positions, and how

    def hooks(self) -> list[Hook]:
        """All that runs at the model's modules, in order."""
        base = self.base
        entrance = entrance_of(base)
        hooks: list[Hook] = []
        if self.width:
            check_entrance(base)
            hooks += [(table, "forward", self._embed) for table in _tables(base, entrance)]
            per_layer = getattr(_text_stack(base, entrance), "embed_tokens_per_layer", None)
            if isinstance(per_layer, nn.Module):
                hooks.append((per_layer, "forward_pre", self._hide))
            hooks += self._pooling(entrance)
            if base.encoder_decoder:
                hooks.append((_decoder(base), "forward_pre", self._widen))
        shifted = any(self.offsets) or (any(self.placed) and not base.encoder_decoder)
        if self.width or (shifted and not base.encoder_decoder):
            hooks += [(entrance, "forward_pre", self._enter), (entrance, "forward", self._leave)]
        numbers = _decoder(base) if base.encoder_decoder else _text_stack(base, entrance)
        if (shifted or self.width) and numbers is not entrance:
            hooks += [(numbers, "forward_pre", self._enter_text), (numbers, "forward", self._leave_text)]
        # Known before a pass: what is known of all models changes with them, and compiled code would guard that.
        # Without weights there is nothing to know it by yet.
        stacks = [stack for stack in (numbers, _text_stack(base, entrance)) if not any_meta(stack)]
        self._stacks = [(stack, numbering(stack, base)) for stack in stacks]
        if numbering(numbers, base).kind == "told":
            hooks.append((cast(nn.Module, numbers.embed_positions), "forward", self._place))
        return hooks

    def _pooling(self, entrance: nn.Module) -> list[Hook]:
        pooler = getattr(entrance, "pooler", None)
        if not isinstance(pooler, nn.Module):
            return []
        hooks: list[Hook] = [(pooler, "forward_pre", self._pool)]
        layers = getattr(entrance, "encoder", None)
        if isinstance(pooler, nn.Linear) and isinstance(layers, nn.Module):
            # It is given the first token alone, which is a virtual one.
            hooks.append((layers, "forward", self._remember))
        return hooks

    # -- the pass under way

    def _begin(self, stack: nn.Module, rows: int, length: int) -> _Pass:
        before = _under_way()
        while before is not None and before.virtual.base.model is self.base.model:
            before = before.before  # it was left by an error
        state = _Pass(self, stack, before, self.route.of_rows(self.counts, rows), length)
        _here.under_way = state
        return state

    def _now(self) -> _Pass | None:
        state = _under_way()
        return state if state is not None and state.virtual is self else None

    def _finish(self, stack: nn.Module) -> _Pass | None:
        state = self._now()
        if state is None or state.stack is not stack:
            return None
        _here.under_way = state.before
        return state

    # -- on the way in

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(parameters(module), args, strict=False)), **kwargs}
        source = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if source is None:
            if self.width:
                raise TanzakuError(
                    f"{type(module).__name__} was called without input_ids or inputs_embeds: virtual tokens have no "
                    "place in it"
                )
            return None
        state = self._begin(module, *source.shape[:2])
        state.numbered = given.get("position_ids") is not None
        name, cache = state.cache = caches.held(given)
        held = 0 if cache is None else caches.length(cache)
        if name is not None and self.width:
            given[name] = caches.whole(cache)
        mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            self._check_mask(mask, given)
            mask = None
        if held == 0:
            self._insert(state, module, given, mask)
        else:
            self._go_on(state, given, mask, held, source.device)
        text = _text_stack(self.base, module)
        if not self.base.encoder_decoder:
            self._number(state, module, given, 0 if text is not module else self.offsets)
        return (), given

    def _check_mask(self, mask: Any, given: dict[str, Any]) -> None:
        if self.width or (any(self.offsets) and given.get("position_ids") is None):
            raise TanzakuError(
                "virtual tokens and prefixes need a 2D attention mask of ones and zeros (or none), found "
                f"{f'{mask.dim()}D' if isinstance(mask, Tensor) else type(mask).__name__}; a static cache makes "
                "generate() pass such masks: use its default cache"
            )

    def _insert(self, state: _Pass, module: nn.Module, given: dict[str, Any], mask: Tensor | None) -> None:
        """Give virtual tokens their places."""
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        source = cast(Tensor, ids if ids is not None else embeds)
        rows, length, device = *source.shape[:2], source.device
        counts = state.counts
        if not self.width:
            self._skip(state, mask)
            self._check_room(length, max(self.offsets), module, mask)
            return
        if any(given.get(key) is not None for key in _OTHER_ORDERS):
            names = " or ".join(key for key in _OTHER_ORDERS if given.get(key) is not None)
            raise TanzakuError(f"virtual tokens have no place in what {type(module).__name__} does with {names}")
        if given.get("input_mask") is not None:  # the opposite of an attention mask
            mask = 1 - given.pop("input_mask")
        mixed = len(set(counts)) > 1
        own = given.get("position_ids")
        last = state.last = self._caches(module, given)
        if mixed:
            self._check_apart(last)
        several = None if mask is not None or own is None else self._packed(counts, own, rows, last, given)
        if several is not None:
            lay = several[0]
        elif last:
            lay = layout.at_the_end(counts, mask, length, device)
        else:
            lay = layout.in_front(counts, mask, length, device)
        if several is None:
            most = max(c + o for c, o in zip(self.counts, self.offsets, strict=True))
            self._check_room(length, most, module, mask)
        state.layout = state.whole = lay
        state.length = lay.columns
        if own is not None:
            given["position_ids"] = several[1] if several is not None else _numbers(lay, counts, own, mask, rows)
        if several is None:
            if mask is None and mixed:
                mask = torch.ones(rows, length, dtype=torch.long, device=device)
            if mask is not None:
                given["attention_mask"] = lay.join(lay.real.to(mask.dtype), mask)
            self._skip(state, mask)
        if ids is not None and "perm_mask" in parameters(module):
            embeds, ids = self.base.embedding(ids), None  # XLNet turns ids around before it embeds them
        if ids is not None:
            slots = torch.where(lay.real, self._word(), _pad(self.base)).to(ids)
            given["input_ids"] = lay.join(slots, ids)
            state.fresh = True
        else:
            assert embeds is not None
            given["input_ids"] = None
            given["inputs_embeds"] = lay.join(self._vectors(rows, embeds), embeds)
            self._embed_per_layer(lay, given, embeds)
        for key, value in given.items():
            if _of_tokens(key, value, rows, length):
                fill = -1 if key == "block_sequence_ids" else 0
                slots = value.new_full((rows, lay.width, *value.shape[2:]), fill)
                given[key] = lay.join(slots, value.expand(rows, *value.shape[1:]))
        if given.get("logits_to_keep") is not None:
            given["logits_to_keep"] = 0  # which tokens are the last is known behind the backbone

    def _go_on(
        self, state: _Pass, given: dict[str, Any], mask: Tensor | None, held: int | None, device: torch.device
    ) -> None:
        """Go on with a cache that has the virtual tokens already."""
        cache, length, counts = state.cache[1], state.length, state.counts
        state.read = held or 0
        mark = caches.mark_of(cache)
        if self.width and isinstance(cache, Cache):
            self._check_mark(mark)
            self._check_static(cache, state.read + length)
        state.last = True
        if self.width:
            # Columns of text, the cache's and the new ones.
            text = None if held is None else held - self.width + length
            if mask is not None and text is not None and mask.shape[1] != text:
                raise TanzakuError(
                    f"attention_mask has {mask.shape[1]} columns, expected {text}: of the tokens in the cache and the "
                    f"{length} new ones, without virtual tokens"
                )
            if mask is None and text is not None and len(set(counts)) > 1:
                mask = torch.ones(len(counts), text, dtype=torch.long, device=device)
            if mask is not None:
                most = mark.read if mark is not None else 0
                if most and length > 1 and not torch.compiler.is_compiling():
                    self._check_begun(mask, most)
                state.whole = lay = layout.at_the_end(counts, mask, mask.shape[1], mask.device, most)
                given["attention_mask"] = lay.join(lay.real.to(mask.dtype), mask)
            elif text is not None:
                state.whole = layout.at_the_end(counts, None, text, device)
            if (own := given.get("position_ids")) is not None:
                given["position_ids"] = own + _column(counts, own.device)
        self._skip(state, mask)

    def _skip(self, state: _Pass, mask: Tensor | None) -> None:
        """Note the columns that take no position: fillers before a row, and the padding of one that has something with
        a place before its text."""
        placed = self.route.of_rows([int(p) for p in self.placed], len(state.counts))
        fill = [self.width - count for count in state.counts]
        if not state.last:
            # Fillers are behind a row, and one that begins with its virtual tokens has no padding before them.
            fill, placed = [0] * len(fill), [int(p and not c) for p, c in zip(placed, state.counts, strict=True)]
        state.moved = any(fill) or (mask is not None and any(placed))
        if state.moved:
            left = 0 if mask is None else layout.leading(mask) * _column(placed, mask.device)
            state.skipped = left + _column(fill, None if mask is None else mask.device)

    def _packed(
        self, counts: list[int], own: Tensor, rows: int, last: bool, given: dict[str, Any]
    ) -> tuple[Layout, Tensor] | None:
        """What :func:`layout.packed` says, where positions may tell several texts in one row apart."""
        if any(given.get(key) is not None for key in _PACKING):
            names = " or ".join(key for key in _PACKING if given.get(key) is not None)
            raise TanzakuError(f"virtual tokens do not go with texts that are packed by {names}: use position_ids")
        if own.dim() > 2:
            if own.shape[0] != 4:
                return None
            own = own[0]  # beside three positions of what images show, the one in the text
        if torch.compiler.is_compiling() or torch._guards.detect_fake_mode([own]) is not None:
            raise TanzakuError(
                "virtual tokens: position_ids without an attention_mask may stand for several texts in a row, which "
                "cannot be seen while compiling: pass an attention_mask of ones"
            )
        found = layout.packed(counts, own.expand(rows, -1))
        if found is not None and last:
            raise TanzakuError("virtual tokens: several texts in one row need use_cache=False")
        if found is not None and given["position_ids"].dim() > 2:
            raise TanzakuError("virtual tokens: several texts in one row need position_ids of two dimensions")
        return found

    def _embed_per_layer(self, lay: Layout, given: dict[str, Any], embeds: Tensor) -> None:
        """Gemma 4 reads a second embedding of ids, which it finds by the vectors of the first one."""
        text = cast(Any, _text_stack(self.base, entrance_of(self.base)))
        find = getattr(text, "get_per_layer_inputs", None)
        if find is None or "inputs_embeds" not in inspect.signature(find).parameters:
            return
        own = given.get("per_layer_inputs")
        own = find(None, embeds) if own is None else own
        slots = find(torch.full(lay.real.shape, _pad(self.base), device=embeds.device))
        given["per_layer_inputs"] = lay.join(slots, own)

    # -- what a model cannot have

    def _caches(self, module: nn.Module, given: dict[str, Any]) -> bool:
        """Whether a pass that reads nothing from a cache may write one."""
        if not any(name in parameters(module) for name in caches.NAMES):
            return False
        if caches.held(given)[1] is not None:
            return True
        if (wanted := given.get("use_cache")) is not None:
            return bool(wanted)
        config = getattr(module, "config", self.base.config)  # its own, where a model is made of two
        if getattr(config, "use_cache", True) is False:
            return False
        encoder = getattr(config, "is_decoder", None) is False
        return not encoder or any(getattr(m, "is_causal", False) is True for m in tree.modules(module))

    def _check_apart(self, last: bool) -> None:
        after = _sees_what_was(self.base)
        if sees_padding(self.base, last):
            raise TanzakuError(
                f"tokens of model type {self.base.kind!r} see padding: rows of one batch need the same number of "
                f"virtual tokens{' (or use_cache=False)' if after else ''}"
            )

    def _check_mark(self, mark: caches.Virtual | None) -> None:
        if mark is None or not mark.counts:
            raise TanzakuError(
                f"the cache holds tokens that were read without the {self.width} virtual tokens of this route: begin "
                "the text with a new cache (or use_cache=True where it began)"
            )
        if mark.counts != self._counted():
            raise TanzakuError(
                f"the cache was begun under another route, with {max(mark.counts)} virtual tokens before a row; this "
                f"one has {self.width}: begin the text with a new cache"
            )

    def _counted(self) -> tuple[int, ...]:
        counts = tuple(self.counts[number] for number in self.route.index)
        return counts if len(set(counts)) > 1 else counts[:1]

    def _check_static(self, cache: Cache, needed: int) -> None:
        room = int(cache.get_max_length()) if getattr(cache, "layers", None) and cache.is_compileable else -1
        if 0 < room < needed:
            raise TanzakuError(
                f"the static cache has room for {room} tokens, and the text with its virtual tokens needs {needed}: "
                f"make it longer by {self.width}"
            )

    def _check_begun(self, mask: Tensor, read: int) -> None:
        if bool((layout.leading(mask) > read).any()):
            raise TanzakuError(
                f"a row is padding alone in the first {read} columns, where virtual tokens entered: read longer chunks "
                "at first"
            )

    def _check_room(self, length: int, virtual: int, module: nn.Module, mask: Any) -> None:
        limit = self.room
        if limit is None or length + virtual <= limit:
            return
        if isinstance(mask, Tensor) and mask.dim() == 2 and self._numbering(module).kind in ("mask", "ids"):
            length = int((mask != 0).sum(1).max())  # padding takes no position
        if length + virtual > limit:
            raise TanzakuError(
                f"{length} tokens and {virtual} virtual tokens make {length + virtual}, more than the model's "
                f"{limit} positions: shorten the texts (max_length) or use fewer virtual tokens"
            )

    # -- positions

    def _enter_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Where positions are numbered by another module than the one that token ids enter."""
        given = {**dict(zip(parameters(module), args, strict=False)), **kwargs}
        source = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if source is None:
            return None
        state = self._now()
        if state is None:
            state = self._begin(module, *source.shape[:2])
            cache = caches.held(given)[1]
            state.read = 0 if cache is None else caches.length(cache) or 0
            if not state.read:
                self._check_room(state.length, max(self.offsets), module, given.get("attention_mask"))
        self._number(state, module, given, self.offsets)
        return (), given

    def _leave_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._finish(module)

    def _number(self, state: _Pass, module: nn.Module, given: dict[str, Any], offsets: Any) -> None:
        """Number the positions, unless the model's own numbering is right: fillers take none, a prefix shifts all.

        Where something stands before a row that is padded on the left, that padding takes none either.
        """
        rows = len(state.counts)
        shifted = offsets != 0 and any(offsets)
        if not (shifted or state.moved):
            return
        source = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        device = cast(Tensor, source).device
        columns = torch.arange(state.read, state.read + state.length, device=device)[None]
        offset = _column(self.route.of_rows(offsets, rows), device) if shifted else 0
        skipped = state.skipped.to(device) if isinstance(state.skipped, Tensor) else state.skipped
        own = given.get("position_ids")
        if own is not None:
            if state.moved and not state.numbered:
                # The modules before this one gave them. Only if they counted columns, padding is among them.
                own = (own - skipped * (own == columns).all()).clamp(min=0)
            given["position_ids"] = own + offset
            return
        if hasattr(module, "get_rope_index") and offsets == 0:
            if state.read:
                raise TanzakuError(f"{type(module).__name__}: pass position_ids to go on with virtual tokens in a row")
            if any(key.endswith("grid_thw") and value is not None for key, value in given.items()):
                return  # with images in the text it numbers what the mask shows
        found = self._numbering(module)
        if found.kind == "unknown":
            raise TanzakuError(
                f"{type(module).__name__} numbers positions in a way that leaves no room for what stands before a "
                "text: use_cache=False, or rows without padding that have the same number of virtual tokens"
            )
        if found.kind == "column":
            given["position_ids"] = self._within((columns - skipped).clamp(min=0) + offset) + found.first
        elif found.kind in ("mask", "ids") and shifted:
            mask = given.get("attention_mask")
            given["position_ids"] = found.natural(mask, given.get("input_ids"), columns) + offset
        elif found.kind == "told":
            state.positions = self._within((columns - skipped).clamp(min=0) + offset).expand(rows, -1)

    def _numbering(self, module: nn.Module) -> Numbering:
        stack = _text_stack(self.base, module)
        return next((found for known, found in self._stacks if known is stack), None) or numbering(stack, self.base)

    def _within(self, positions: Tensor) -> Tensor:
        """Positions that the model has: there is room for a row's own (`_check_room`), and what else stands in its
        columns is masked."""
        limit = self.room
        return positions if limit is None else positions.clamp(max=limit - 1)

    def _place(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Positions of an embedding that is told the cache's length alone."""
        state = self._now()
        if state is None or state.positions is None or output is None:
            return None
        if isinstance(module, nn.Embedding):
            return nn.functional.embedding(state.positions + getattr(module, "offset", 0), module.weight)
        # It computes what it embeds: a prefix is a longer cache to it.
        given = {**dict(zip(parameters(module), args, strict=False)), **kwargs}
        held = given.pop("past_key_values_length", 0)
        offsets = self.route.of_rows(self.offsets, len(state.counts))
        every = sorted(set(offsets))
        parts = [cast(Any, module).forward(**given, past_key_values_length=held + o).expand_as(output) for o in every]
        which = torch.tensor([every.index(o) for o in offsets], device=output.device)
        return torch.stack(parts)[which, torch.arange(len(offsets), device=output.device)]

    # -- at the embedding

    def _word(self) -> int:
        """An id that stands for a virtual token until it is embedded: one without a meaning of its own to the model."""
        if self._neutral is None:
            special: set[Any] = set()
            for config in (self.base.config, getattr(self.base.model, "config", None)):
                for key, value in config.to_dict().items() if config is not None else ():
                    if key.endswith(("token_id", "token_index", "token_ids")):
                        special |= set(value) if isinstance(value, list | tuple) else {value}
            self._neutral = next((i for i in range(self.base.vocab_size) if i not in special), 0)
        return self._neutral

    def _embed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        state = self._now()
        if state is None or not state.fresh or output is None:
            return None
        rows, columns = len(state.counts), cast(Layout, state.layout).columns
        # Some models fill rows up to whole blocks before they embed them.
        if output.dim() != 3 or output.shape[0] != rows or output.shape[1] < columns:
            return None
        state.fresh = False
        return cast(Layout, state.layout).replace(self._vectors(rows, output), output)

    def _hide(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Virtual tokens are padding to an embedding for single layers, as images are."""
        state = self._now()
        ids = args[0] if args else kwargs.get("input")
        if state is None or state.layout is None or not isinstance(ids, Tensor):
            return None
        slots = state.layout.of_slots
        if ids.shape != slots.shape:
            return None
        return (torch.where(slots, _pad(self.base), ids), *args[1:]), kwargs if args else {}

    def _vectors(self, rows: int, like: Tensor) -> Tensor:
        """(rows, width, hidden): fillers are as good as zero, which is what a model sees beyond a row's ends, and yet
        not zero, since some divide by a vector's length."""
        least = max(1e-12, torch.finfo(like.dtype).tiny / 64)
        filler = torch.linspace(-least, least, like.shape[-1], dtype=like.dtype, device=like.device)
        which = self.route.of_rows(range(len(self.tokens)), rows)
        stacks = []
        for number, layers in enumerate(self.tokens):
            own = torch.empty(which.count(number), device=like.device)
            with self.route.running(number):
                for layer in layers:
                    layer.check_here(like)
                vectors = [s.vectors_of(own).to(like) for s in layers]
            for v in vectors:
                if v.shape[-1] != like.shape[-1]:
                    raise TanzakuError(
                        f"virtual tokens have {v.shape[-1]} numbers each, and the embedded tokens of "
                        f"{type(self.base.model).__name__} have {like.shape[-1]}"
                    )
            each = [filler.expand(self.width - self.counts[number], -1), *vectors]
            if any(v.dim() == 3 for v in vectors):
                each = [v if v.dim() == 3 else v.expand(len(own), -1, -1) for v in each]
            stacks.append(torch.cat(each, dim=-2))
        if len(stacks) == 1:
            return stacks[0].expand(rows, -1, -1)
        if all(stack.dim() == 2 for stack in stacks):
            return torch.stack(stacks).index_select(0, torch.tensor(which, device=like.device))
        # Rows as their stacks have them, one stack after another, and where each row of the batch is among them.
        together = torch.cat([stack.expand(which.count(n), -1, -1) for n, stack in enumerate(stacks)])
        order = sorted(range(rows), key=which.__getitem__)
        return together.index_select(0, torch.tensor(order, device=like.device).argsort())

    # -- on the way out

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        state = self._finish(module)
        if state is None or output is None or not self.width:
            return None
        if state.fresh:
            raise TanzakuError(
                f"{type(module).__name__} did not embed the token ids it was given: virtual tokens have no place in it"
            )
        self._keep(state, output)
        if self.base.encoder_decoder:
            return None  # its decoder reads the virtual tokens
        if not isinstance(output, ModelOutput):
            return tuple(self._cut(state, "", x) for x in output) if isinstance(output, tuple) else output
        for key in output.keys() & _CUT:
            output[key] = self._cut(state, key, output[key])
        pooled = output.get("pooler_output") is not None and state.layout is not None
        if pooled and not hasattr(module, "pooler") and not hasattr(module, "eos_token_id"):
            raise TanzakuError(f"{type(module).__name__} pools tokens by itself, and would pool virtual ones")
        return output

    def _cut(self, state: _Pass, key: str, x: Any) -> Any:
        if isinstance(x, tuple | list):
            return type(x)(self._cut(state, key, y) for y in x)
        if not isinstance(x, Tensor):
            return x
        rows, entered = len(state.counts), state.layout
        if key == "attentions":
            if entered is not None and x.dim() == 4 and x.shape[2] == entered.columns:
                x = entered.cut(x, 2)
            if state.whole is not None and x.dim() == 4 and x.shape[3] == state.whole.columns:
                x = state.whole.cut(x, 3)
            return x
        if entered is None:
            return x
        if x.dim() == 2 and x.shape[0] == rows * entered.columns:  # of tokens one after another
            return entered.cut(x.view(rows, entered.columns, -1)).flatten(0, 1)
        if x.dim() >= 3 and x.shape[-2] == entered.columns and x.shape[-3] == rows:
            return entered.cut(x, x.dim() - 2, x.dim() - 3)
        if key == "last_hidden_state":
            raise TanzakuError(
                f"{type(state.stack).__name__} makes {tuple(x.shape[1:-1])} hidden states of {entered.columns} tokens: "
                "virtual tokens cannot be cut off again"
            )
        return x

    def _keep(self, state: _Pass, output: Any) -> None:
        """Hand the caller's own cache back, and note what stands in it."""
        name, cache = state.cache
        if isinstance(output, ModelOutput):
            name = name or next((n for n in caches.NAMES if output.get(n) is not None), None)
            if name is not None and output.get(name) is not None:
                cache = output[name] if cache is None else cache
                output[name] = cache
        elif cache is None and isinstance(output, tuple):
            cache = next((x for x in output if isinstance(x, Cache)), None)
        if cache is not None and state.layout is not None and caches.length(cache) != 0:
            # Behind a text that does not end in the last column nothing can follow.
            caches.mark(cache, self._counted() if state.last else (), self.width, state.layout.length)

    def _pool(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self._now()
        if state is None or state.layout is None or not args:
            return None
        x = args[0]
        if x.dim() == 3:
            return (state.layout.cut(x), *args[1:]), kwargs
        assert state.hidden is not None
        return (state.layout.cut(state.hidden)[:, 0], *args[1:]), kwargs

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        state = self._now()
        if state is not None and output is not None:
            state.hidden = output if isinstance(output, Tensor) else output[0]

    def _widen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wider = self.widened(module, {**dict(zip(parameters(module), args, strict=False)), **kwargs})
        return None if wider is None else ((), wider)

    def widened(self, module: nn.Module, given: dict[str, Any]) -> dict[str, Any] | None:
        """What a decoder is given, so that it attends to virtual tokens of the encoder, but not to fillers; None: as
        it is."""
        key = next((name for name in _CROSS_MASKS if name in parameters(module)), "")
        states, mask = given.get("encoder_hidden_states"), given.get(key)
        if states is None:
            return None
        rows, length = states.shape[0], states.shape[1] - self.width
        counts = self.route.of_rows(self.counts, rows)
        if mask is None and len(set(counts)) > 1:
            if not key:
                raise TanzakuError(
                    f"{type(module).__name__} takes no mask of the encoder's tokens to hide fillers with"
                )
            mask = torch.ones(rows, length, dtype=torch.long, device=states.device)
        if mask is None:
            return None
        if mask.shape[1] != length:
            raise TanzakuError(
                f"the encoder's states are of {states.shape[1]} tokens and its mask of {mask.shape[1]}, with "
                f"{self.width} virtual tokens: run the encoder under the same route"
            )
        lay = layout.in_front(counts, mask, length, states.device)
        return {**given, key: lay.join(lay.real.to(mask.dtype), mask)}


_CROSS_MASKS = ("encoder_attention_mask", "encoder_padding_mask")
_CUT = {"last_hidden_state", "hidden_states", "attentions", "router_logits"}


# -- where virtual tokens enter


def entrance_of(base: Base) -> nn.Module:
    """The module that token ids enter: the backbone, or an encoder-decoder's encoder."""
    return base.encoder if base.encoder_decoder else base.backbone


def check_entrance(base: Base) -> None:
    """Raise a clear error where a model has no place for virtual tokens."""
    entrance = entrance_of(base)
    _ = base.embedding
    takes = parameters(entrance)
    if "input_ids" not in takes:
        raise TanzakuError(
            f"{type(entrance).__name__} of model type {base.kind!r} reads {takes[0]}, no token ids, so virtual tokens "
            "have no place in it"
        )


def sees_padding(base: Base, last: bool) -> bool:
    """Whether tokens see padding in spite of the mask, where rows begin in the first column, or end in the `last`."""
    takes = parameters(entrance_of(base))
    return base.kind in _SEE_PADDING or (last and _sees_what_was(base)) or "attention_mask" not in takes


def _sees_what_was(base: Base) -> bool:
    return base.kind in _SEE_WHAT_WAS or base.by_columns is not None


def without_cache(base: Base) -> dict[str, bool]:
    """What a forward pass is given so that it writes no cache. Rows then begin in the first column."""
    takes = inspect.signature(base.model.forward).parameters
    passed_on = any(p.kind is p.VAR_KEYWORD for p in takes.values()) and "use_cache" in parameters(base.backbone)
    return {"use_cache": False} if "use_cache" in takes or passed_on else {}


def _decoder(base: Base) -> nn.Module:
    return cast(nn.Module, cast(Any, base.model).get_decoder())


def any_meta(module: nn.Module) -> bool:
    return any(p.is_meta for p in tree.parameters(module))


def _text_stack(base: Base, entrance: nn.Module) -> nn.Module:
    """The module that numbers positions of text: another one only where a model also reads images."""
    if base.encoder_decoder or not isinstance(entrance, PreTrainedModel):
        return entrance
    inner: Any = entrance.get_decoder()
    return cast(nn.Module, inner) if isinstance(inner, PreTrainedModel) else entrance


def _tables(base: Base, entrance: nn.Module) -> list[nn.Module]:
    """The modules that embed token ids on their way in. One table may be in several (T5's encoder has its own), of
    which one is run."""
    own = getattr(entrance, "embed_tokens", None) if base.encoder_decoder else None
    if isinstance(own, nn.Module):
        return [own]
    table = base.embedding.weight
    return [m for m in tree.modules(entrance) if isinstance(m, nn.Embedding) and m.weight is table] or [base.embedding]


def _pad(base: Base) -> int:
    return getattr(base.config, "pad_token_id", None) or 0


def _of_tokens(key: str, value: Any, rows: int, length: int) -> bool:
    """Whether a model's argument has an entry a token."""
    named = key.endswith(("_ids", "_mask", "_inputs")) or key in ("bbox", "langs")
    if key in ("input_ids", "attention_mask", "position_ids") or not named or key.startswith(_NO_TOKENS):
        return False
    return isinstance(value, Tensor) and value.dim() >= 2 and value.shape[0] in (1, rows) and value.shape[1] == length


def _column(values: Sequence[int], device: torch.device | None) -> Tensor:
    return torch.tensor(values, device=device)[:, None]


def _numbers(lay: Layout, counts: list[int], own: Tensor, mask: Tensor | None, rows: int) -> Tensor:
    """The caller's positions (..., rows or 1, length) and those of virtual tokens: a row's begin where its own did."""
    count = _column(counts, own.device)
    before = torch.arange(lay.width, device=own.device)[None] - (lay.width - count)
    parts = []
    for of_kind in own.reshape(-1, *own.shape[-2:]):
        of_kind = of_kind.expand(rows, -1)
        first = of_kind[:, :1] if mask is None else layout.take(of_kind, layout.leading(mask).clamp(max=lay.length - 1))
        parts.append(lay.join(first + before.clamp(min=0), of_kind + count))
    return torch.stack(parts).reshape(*own.shape[:-2], rows, -1)
