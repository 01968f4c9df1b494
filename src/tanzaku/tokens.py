"""The token site: virtual tokens inside the backbone, unseen outside of it.

A virtual token is a token id past the end of the vocabulary. The ids are prepended where token ids enter the backbone
and get their learned vectors at the embedding, so masks, positions, padding and caches treat them as tokens; they are
cut off again where hidden states leave it, so pooling, labels and generate() see only the row's own tokens.

Rows of one batch may have different numbers of virtual tokens. The widest number is prepended to all rows; a row with
fewer starts with fillers, which are masked and take no position.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tanzaku.errors import TanzakuError
from tanzaku.families import Base
from tanzaku.routing import Route, put


@dataclass
class _Lead:
    """What is prepended in the forward pass under way; row by row, `fill` fillers and `width - fill` virtual tokens."""

    width: int
    fill: Tensor  # (rows,)
    groups: list[tuple[int, Any]]
    length: int  # tokens with the lead
    fresh: bool  # not yet embedded


class VirtualTokens:
    """Hooks that prepend virtual tokens and number positions, for one route.

    `offsets` has the positions that each stack's prefixes take, and `placed` whether what the stack adds has a place
    in the text, from which the distance to the row's own tokens counts.
    """

    def __init__(self, base: Base, route: Route, tokens: list[list[Any]], offsets: list[int], placed: list[bool]):
        self.base, self.route, self.tokens = base, route, tokens
        self.counts = [sum(s.num_virtual_tokens for s in stack) for stack in tokens]
        self.offsets, self.placed = offsets, [int(p) for p in placed]
        self.width = max(self.counts)
        self.lead: _Lead | None = None
        self.positions: Tensor | None = None
        self.inside = False

    def hang(self) -> list[RemovableHandle]:
        base = self.base
        handles: list[RemovableHandle] = []
        model = cast(Any, base.model)
        entrance = model.get_encoder() if base.encoder_decoder else base.backbone
        if self.width:
            own = getattr(entrance, "embed_tokens", None) if base.encoder_decoder else None
            # One table may be in several modules (T5's encoder has its own); one of them is run.
            table = base.embedding.weight
            tied: list[nn.Module] = [m for m in entrance.modules() if isinstance(m, nn.Embedding) and m.weight is table]
            for embedding in [own] if isinstance(own, nn.Module) else tied or [base.embedding]:
                handles.append(embedding.register_forward_pre_hook(self._hide_ids))
                handles.append(embedding.register_forward_hook(self._embed))
            handles += self._enter(entrance, self.counts, [0] * len(self.counts))
            if base.encoder_decoder:
                decoder = model.get_decoder()
                handles.append(decoder.register_forward_pre_hook(self._widen_cross_mask, with_kwargs=True))
            else:
                handles.append(entrance.register_forward_hook(self._leave))
                pooler = getattr(entrance, "pooler", None)
                if isinstance(pooler, nn.Module):
                    handles.append(pooler.register_forward_pre_hook(self._cut))
        if any(self.offsets) or (any(self.placed) and not base.encoder_decoder):
            stack = model.get_decoder() if base.encoder_decoder else entrance
            if base.encoder_decoder or not self.width:
                handles += self._enter(stack, [0] * len(self.counts), self.offsets)
        return handles

    def _enter(self, stack: nn.Module, counts: list[int], offsets: list[int]) -> list[RemovableHandle]:
        # With virtual tokens and a shift at one backbone, a single pass does both.
        if not self.base.encoder_decoder:
            offsets = self.offsets
        names = list(inspect.signature(stack.forward).parameters)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            return (), self._extend(given, names, counts, offsets)

        handles = [stack.register_forward_pre_hook(hook, with_kwargs=True)]
        embed_positions = getattr(stack, "embed_positions", None)
        if isinstance(embed_positions, nn.Embedding) and self._kind == "embedding":
            handles.append(embed_positions.register_forward_hook(self._place))
        return handles

    @property
    def _kind(self) -> str:
        return self.base.family.positions if self.base.family else "column"

    # -- on the way in

    def _extend(self, given: dict[str, Any], names: list[str], counts: list[int], offsets: list[int]) -> dict[str, Any]:
        self.inside = True
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        source = ids if ids is not None else embeds
        if source is None:
            return given
        rows, length = source.shape[:2]
        device = source.device
        groups = self.route.groups(rows)
        width = max(counts)
        count = _per_row(groups, counts, rows, device)
        offset = _per_row(groups, offsets, rows, device)
        fill = width - count
        past = _past(given)
        mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            if not (width or any(offsets)):
                return given
            raise TanzakuError("virtual tokens and prefixes need a 2D attention mask of ones and zeros (or none)")
        # An encoder-decoder's parts number for themselves; what stands before a text is in its encoder.
        placed = [int(c > 0) for c in counts] if self.base.encoder_decoder else self.placed
        left = self._padding(mask, _per_row(groups, placed, rows, device))
        if past == 0:
            self._check_room(length, max(c + o for c, o in zip(counts, offsets, strict=True)))
        if width:
            column = torch.arange(width, device=device)
            real = column[None, :] >= fill[:, None]  # (rows, width)
            if mask is None and bool((fill > 0).any()):
                mask = torch.ones(rows, max(past - width, 0) + length, dtype=torch.long, device=device)
            if mask is not None:
                mask = torch.cat([real.to(mask), mask], dim=1)
                given["attention_mask"] = mask
            if past == 0:
                lead = _Lead(width, fill, groups, width + length, fresh=True)
                self.lead = lead
                if ids is not None:
                    pad = getattr(self.base.config, "pad_token_id", None) or 0
                    virtual = self.base.vocab_size + column[None, :] - fill[:, None]
                    ids = torch.cat([torch.where(real, virtual, pad).to(ids), ids], dim=1)
                    given["input_ids"] = ids
                else:
                    assert embeds is not None
                    given["inputs_embeds"] = torch.cat([self._vectors(lead, embeds), embeds], dim=1)
                    lead.fresh = False
                if (kinds := given.get("token_type_ids")) is not None:
                    given["token_type_ids"] = torch.cat([kinds.new_zeros(rows, width), kinds], dim=1)
                length += width
        self._number(given, names, mask, ids, past, length, width if past == 0 else 0, fill, count, offset, left)
        return given

    def _padding(self, mask: Tensor | None, placed: Tensor) -> Tensor:
        """(rows,) padding before the first token, in rows where a distance is counted across it."""
        if mask is None or self._kind not in ("column", "embedding") or bool(mask[:, 0].all()):
            return torch.zeros_like(placed)
        return (mask.cumsum(1) == 0).sum(1) * placed

    def _number(
        self,
        given: dict[str, Any],
        names: list[str],
        mask: Tensor | None,
        ids: Tensor | None,
        past: int,
        length: int,
        width: int,
        fill: Tensor,
        count: Tensor,
        offset: Tensor,
        left: Tensor,
    ) -> None:
        """Number the positions, unless the model's own numbering is right: fillers take none, a prefix shifts all.

        Where something stands before a row that is padded on the left, that padding takes none either.
        """
        self.positions = None
        shifted = bool((offset > 0).any())
        moved = shifted or bool((fill + left > 0).any())
        device = fill.device
        columns = torch.arange(past, past + length, device=device)[None, :]
        skipped = fill[:, None] + left[:, None] * (columns >= past + width)
        by_column = (columns - skipped).clamp(min=0) + offset[:, None]
        if (own := given.get("position_ids")) is not None:
            shift = (count + offset)[:, None]
            given["position_ids"] = torch.cat([by_column[:, :width], own.expand(len(fill), -1) + shift], dim=1)
        elif self._kind == "column" and moved:
            if "position_ids" in names:
                given["position_ids"] = by_column
        elif self._kind == "mask" and shifted:
            ones = mask if mask is not None else torch.ones(len(fill), past + length, device=device)
            given["position_ids"] = ((ones.cumsum(1) * ones - 1).long() + offset[:, None])[:, -length:]
        elif self._kind == "ids" and shifted and ids is not None:
            pad = self.base.config.pad_token_id
            seen = (ids != pad).long()
            given["position_ids"] = seen.cumsum(1) * seen + pad + offset[:, None] * seen
        elif self._kind == "embedding" and moved:
            self.positions = by_column

    def _check_room(self, length: int, virtual: int) -> None:
        limit = self.base.max_positions
        if limit is not None and length + virtual > limit:
            raise TanzakuError(
                f"{length} tokens and {virtual} virtual tokens make {length + virtual}, more than the model's "
                f"{limit} positions: shorten the texts (max_length) or use fewer virtual tokens"
            )

    # -- at the embedding

    def _fresh(self, ids: Any) -> _Lead | None:
        lead = self.lead
        if lead is None or not lead.fresh or not isinstance(ids, Tensor) or ids.shape[-1] != lead.length:
            return None
        return lead

    def _hide_ids(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not (self.inside or self.base.encoder_decoder):
            raise TanzakuError(
                f"{type(self.base.model).__name__} embeds tokens outside of its {type(self.base.backbone).__name__}: "
                "virtual tokens have no place in it"
            )
        if (lead := self._fresh(args[0])) is None:
            return None
        ids = args[0].clone()
        ids[:, : lead.width] = 0
        return (ids, *args[1:])

    def _embed(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        if (lead := self._fresh(args[0])) is None:
            return None
        lead.fresh = False
        return torch.cat([self._vectors(lead, output), output[:, lead.width :]], dim=1)

    def _vectors(self, lead: _Lead, like: Tensor) -> Tensor:
        """(rows, width, hidden): fillers are zero."""
        rows = len(lead.fill)
        parts = like.new_zeros(rows, lead.width, like.shape[-1])
        pieces: list[tuple[Any, Tensor]] = []
        for number, at in lead.groups:
            if not self.tokens[number]:
                continue
            self.route.at = number
            vectors = torch.cat([s.vectors() for s in self.tokens[number]]).to(like)
            self.route.at = None
            n = rows if at is None else (at.stop - at.start if isinstance(at, slice) else len(at))
            pad = vectors.new_zeros(lead.width - len(vectors), like.shape[-1])
            pieces.append((at, torch.cat([pad, vectors]).expand(n, -1, -1)))
        return put(parts, pieces)

    def _place(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        if self.positions is None:
            return None
        at = self.positions + getattr(module, "offset", 0)
        return nn.functional.embedding(at, cast(Tensor, module.weight))

    # -- on the way out

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        lead, self.lead, self.inside = self.lead, None, False
        if lead is None:
            return None

        def cut(x: Any) -> Any:
            if isinstance(x, Tensor) and x.dim() == 3 and x.shape[1] == lead.length:
                return x[:, lead.width :]
            return tuple(cut(y) for y in x) if type(x) is tuple else x

        if isinstance(output, tuple):
            return tuple(cut(x) for x in output)
        for key in ("last_hidden_state", "hidden_states"):
            if key in output:
                output[key] = cut(output[key])
        return output

    def _cut(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        lead = self.lead
        return None if lead is None else (args[0][:, lead.width :], *args[1:])

    def _widen_cross_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The decoder attends to virtual tokens of the encoder, but not to fillers."""
        states = kwargs.get("encoder_hidden_states")
        if states is None:
            return None
        rows = states.shape[0]
        count = _per_row(self.route.groups(rows), self.counts, rows, states.device)
        real = torch.arange(self.width, device=states.device)[None, :] >= (self.width - count)[:, None]
        mask = kwargs.get("encoder_attention_mask")
        if mask is None:
            mask = torch.ones(rows, states.shape[1] - self.width, dtype=torch.long, device=states.device)
        if mask.shape[1] + self.width == states.shape[1]:
            kwargs = {**kwargs, "encoder_attention_mask": torch.cat([real.to(mask), mask], dim=1)}
        return args, kwargs


def _per_row(groups: list[tuple[int, Any]], values: list[int], rows: int, device: torch.device) -> Tensor:
    out = torch.zeros(rows, dtype=torch.long)
    for number, at in groups:
        out[slice(None) if at is None else at] = values[number]
    return out.to(device)


def _past(given: dict[str, Any]) -> int:
    cache = given.get("past_key_values")
    if cache is None or not hasattr(cache, "get_seq_length"):
        return 0
    return int(cache.get_seq_length())
