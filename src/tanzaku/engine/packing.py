"""Rows without padding: a decoder's layers see the own tokens of all rows, one after another, and nothing else.

Rows of unlike length share a batch, and most of what a model does to padding is never read: its norms, activations and
rotary embeddings cost as much there as anywhere. Here the batch is packed where it enters the backbone and unpacked
where it leaves. In between each token is a row of its own, hidden states being (tokens, 1, hidden): what works on
single tokens, which is all of a layer but its attention, needs to know nothing of it, and a route counts tokens where
it counted rows. Attention gets its rows back: each by itself where they are short, else padded for the base's own
function, whose result is packed again.

Whether nothing but attention mixes tokens (no convolution, state or summary of a row) is seen and not believed: two
short rows are computed both ways, once for a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate, chain
from typing import Any, Self, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tanzaku.core.attention import PACKING, AttentionHook, register
from tanzaku.core.method import AttentionCall
from tanzaku.core.positions import numbering
from tanzaku.core.quiet import quiet
from tanzaku.core.routing import Ragged, Route, split
from tanzaku.core.tokens import without_cache
from tanzaku.engine.acceleration import Acceleration, Common
from tanzaku.engine.attention import row_attention, suits
from tanzaku.engine.layout import Layout
from tanzaku.errors import TanzakuError
from tanzaku.models import tree
from tanzaku.models.families import Base
from tanzaku.models.families.trace import PREFIX

_FLASH = ("flash_attention_2", "flash_attention_3")
_KNOWN = ("sdpa", "eager", *_FLASH)
_PROBE = (2, 5)  # tokens of the rows that are computed both ways
_agree: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class Packing(Acceleration):
    """While entered, batches of one model can be packed; `possible` tells whether its kind is known to allow it."""

    name = "packing"
    summary = "a decoder's layers see the own tokens of all rows, one after another, and no padding"

    def __init__(self, common: Common):
        super().__init__(common)
        base = self.base
        self.layout: Layout | None = None
        self._masks: dict[tuple[int, int | None, int], Tensor] = {}
        self._untold = False  # whether a layer was not told how far it sees
        self.layers: list[nn.Module] = []
        layers = _causal_layers(base)
        if not layers:
            return
        self.layers, self.names = layers, list(inspect.signature(base.backbone.forward).parameters)
        if base.model not in _agree:
            _agree[base.model] = self.possible and self._agrees()
        if not _agree[base.model]:
            self.layers = []

    @property
    def possible(self) -> bool:
        own = {str(m.config._attn_implementation).removeprefix(PREFIX) for m in self.layers}  # type: ignore[union-attr]
        return bool(own) and own <= set(_KNOWN)

    def __enter__(self) -> Self:
        for module in self.layers:
            module.__dict__[PACKING] = self
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for module in self.layers:
            module.__dict__.pop(PACKING, None)

    @contextmanager
    def batch(self, layout: Layout, route: Route | None) -> Iterator[None]:
        """See :meth:`Acceleration.batch`."""
        if not layout.packed:
            yield
            return
        assert route is not None, "a packed batch has its route"
        route.unroll(layout.lengths)
        hooks = [
            # Behind the virtual tokens on the way in, before them on the way out.
            self.base.backbone.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.base.backbone.register_forward_hook(self._leave, prepend=True),
        ]
        configs = {id(m.config): cast(Any, m.config) for m in self.layers}
        own = {key: config._attn_implementation for key, config in configs.items()}
        self.layout = layout
        try:
            for key, name in own.items():
                if not name.startswith(PREFIX):
                    register(name)
                    configs[key]._attn_implementation_internal = PREFIX + name
            yield
        finally:
            self.layout = None
            self._masks.clear()
            route.unroll(())
            for key, name in own.items():
                configs[key]._attn_implementation_internal = name
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether two rows of unequal length have the hidden states packed that they have padded."""
        backbone, lengths = self.base.backbone, _PROBE
        weight = self.base.embedding.weight
        columns = torch.arange(max(lengths), device=weight.device)
        mask = (columns < torch.tensor([[length] for length in lengths], device=weight.device)).long()
        ids = (columns * 7 + torch.tensor([[11], [23]], device=weight.device)) % len(weight)
        layout = Layout(max(lengths), [0] * len(lengths), lengths, [-1] * len(lengths), weight.device, packed=True)
        training = [module for module in tree.modules(backbone) if module.training]
        found = []
        try:
            for module in training:
                module.training = False
            for packed in (False, True):
                with quiet(), self, self.batch(layout, Route.of([None])) if packed else nullcontext():
                    out = backbone(input_ids=ids, attention_mask=mask, **without_cache(self.base))
                found.append(layout.rows.pack(out["last_hidden_state"].flatten(0, 1)).float())
                del out
        except Exception:  # whatever a model may say to rows like these, it is computed as it is made
            return False
        finally:
            for module in training:
                module.training = True
        if self._untold and _windows(self.base.config):
            return False  # rows as short as these do not show it
        close = 1e-3 if weight.dtype == torch.float32 else 5e-2
        return bool((found[0] - found[1]).abs().max() <= close * found[0].abs().max())

    # -- the backbone

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layout = self.layout
        assert layout is not None
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        embeds = given.get("inputs_embeds")
        if embeds is None:
            embeds = self.base.embedding(given["input_ids"])
        if tuple(embeds.shape[:2]) != (len(layout.lengths), layout.width):
            return None  # another pass within the batch's, such as one that a penalty is made of
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.arange(layout.width, device=embeds.device)[None]
        positions = positions.expand(len(layout.lengths), -1).flatten().index_select(0, layout.rows.places)
        given |= {
            "input_ids": None,
            "inputs_embeds": layout.rows.pack(embeds.flatten(0, 1)).unsqueeze(1),
            "position_ids": positions.unsqueeze(1),
            "attention_mask": None,
        }
        return (), given

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        layout = self.layout
        assert layout is not None
        if not self.holds(output["last_hidden_state"]):
            return None
        hidden = layout.rows.pad(output["last_hidden_state"].squeeze(1))
        output["last_hidden_state"] = hidden.view(len(layout.lengths), layout.width, -1)
        return output

    # -- attention

    def holds(self, x: Tensor) -> bool:
        """Whether hidden states, or (tokens, heads, 1, head_dim), are those of the batch that is packed now."""
        return self.layout is not None and len(x) == sum(self.layout.lengths) and x.shape[-2] == 1

    def attend(
        self,
        implementation: str,
        run: Callable[..., tuple[Tensor, Tensor | None]],
        hook: AttentionHook | None,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: dict[str, Any],
    ) -> tuple[Tensor, None]:
        """An attention layer on rows again: `run` is the base's own function, `hook` what adapters make of it. query,
        key and value are (tokens, heads, 1, head_dim), the result (tokens, 1, heads, head_dim)."""
        layout = self.layout
        assert layout is not None
        parts = [(None, slice(None))] if hook is None else hook.parts(len(layout.lengths))
        lengths = [tuple(layout.lengths[rows]) for _, rows in parts]
        inputs = [split(x.squeeze(2), [sum(part) for part in lengths]) for x in (query, key, value)]
        window = options.get("sliding_window")
        self._untold |= "sliding_window" not in options
        results = []
        for (number, _), sizes, q, k, v in zip(parts, lengths, *inputs, strict=True):
            if number is None and self._by_rows(implementation, max(sizes), q, options):
                masks = [self._added(size, window, q, q.shape[1] // k.shape[1]) for size in sizes]
                results.append(row_attention(q, k, v, sizes, sizes, masks, _scaling(options, q)))
                continue
            if number is None and implementation in _FLASH:
                results.append(_variable(run, module, q, k, v, sizes, options))
                continue
            ragged = layout.ragged(sizes)
            q, k, v = (_padded(x, ragged, len(sizes)) for x in (q, k, v))
            mask = self._mask(implementation, sizes, window, q)
            if hook is None or number is None:
                out = run(module, q, k, v, mask, **options)[0]
            else:
                base = partial(self._run, implementation, run)
                out = hook.changed(number, AttentionCall(module, q, k, v, mask, options, base, implementation))
            results.append(out.flatten(0, 1) if ragged is None else ragged.pack(out.flatten(0, 1)))
        return (torch.cat(results) if len(results) > 1 else results[0]).unsqueeze(1), None

    def _run(
        self,
        implementation: str,
        run: Callable[..., tuple[Tensor, Tensor | None]],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`run` for rows that an adapter layer has changed, row by row where that suits."""
        rows, _, queries, _ = query.shape
        keys, shared = key.shape[2], query.shape[1] // key.shape[1]
        if not self._by_rows(implementation, keys, query, options):
            return run(module, query, key, value, mask, **options)
        if mask is None:
            # The queries are the last of the keys: a single one sees all of them, a prefix's too.
            masks = [self._added(keys, None, query, shared)[:, -queries * shared :]] * rows
        else:
            added = _additive(mask).expand(rows, 1, queries, keys).squeeze(1)
            masks = [*added.mT.repeat_interleave(shared, dim=-1)]
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        out = row_attention(q, k, v, [queries] * rows, [keys] * rows, masks, _scaling(options, query))
        return out.view(rows, queries, *out.shape[1:]), None

    def _by_rows(self, implementation: str, keys: int, query: Tensor, options: dict[str, Any]) -> bool:
        return self.common.attends_rows and suits(implementation, keys, query, options)

    def _added(self, width: int, window: int | None, like: Tensor, shared: int) -> Tensor:
        """(width, width * shared): what hides the keys that a token does not see when it is added to its scores, which
        are those of so many heads that share keys."""
        if (width, window, shared) not in self._masks:
            added = _additive(_seen(width, window, like.device))
            self._masks[width, window, shared] = added.t().repeat_interleave(shared, dim=-1)
        return self._masks[width, window, shared]

    def _mask(self, implementation: str, sizes: tuple[int, ...], window: int | None, like: Tensor) -> Tensor | None:
        """(1, 1, width, width), or None where the attention masks what lies ahead by itself. What is padded lies behind
        a row's own tokens, which look back only. For flash attention (rows, width), one number a key."""
        width = max(sizes)
        if implementation in _FLASH:
            if min(sizes) == width:
                return None
            return (torch.arange(width, device=like.device) < torch.tensor(sizes, device=like.device)[:, None]).long()
        if implementation == "sdpa" and (window is None or width <= window):
            return None
        seen = _seen(width, window, like.device)
        if implementation == "sdpa":
            return seen[None, None]
        hidden = torch.zeros(width, width, dtype=like.dtype, device=like.device)
        return hidden.masked_fill(~seen, torch.finfo(like.dtype).min)[None, None]


def _causal_layers(base: Base) -> list[nn.Module]:
    """The attention layers of a decoder that reads tokens, which looks back alone and is told where they stand; none
    for any other model."""
    backbone = base.backbone
    try:
        same = backbone.get_input_embeddings() is base.embedding  # type: ignore[operator]
        layers = [module for _, module in base.attention()]
    except (TanzakuError, NotImplementedError, AttributeError):
        return []
    absent = any(t.is_meta for t in chain(backbone.parameters(), backbone.buffers()))  # or kept elsewhere
    if base.encoder_decoder or not same or absent or numbering(backbone, base).kind not in ("column", "mask"):
        return []
    causal = all(getattr(m, "is_causal", False) is True and hasattr(m, "config") for m in layers)
    return layers if causal else []


def _windows(config: Any) -> bool:
    """Whether some layers see no further than a window, or work on parts of a row, by what a model's settings say."""
    named = ("window", "chunk", "local_attention", "compress", "block_size")
    return any(
        bool(value) and isinstance(value, int | list | tuple) and any(name in key for name in named)
        for key, value in config.to_dict().items()
    )


def _seen(width: int, window: int | None, device: torch.device) -> Tensor:
    """(width, width): whether a token sees another, which is itself or before it and no further than the window."""
    seen = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(1 - window)


def _variable(
    run: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: tuple[int, ...],
    options: dict[str, Any],
) -> Tensor:
    """Flash attention of rows one after another, (tokens, heads, head_dim), which is told where each begins."""
    starts = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=q.device)
    told = {f"cu_seq_lens_{side}": starts for side in "qk"} | {f"max_length_{side}": max(sizes) for side in "qk"}
    rows = (x.transpose(0, 1)[None] for x in (q, k, v))
    return run(module, *rows, None, **{**options, **told})[0][0]


def _padded(x: Tensor, ragged: Ragged | None, rows: int) -> Tensor:
    """(tokens, heads, head_dim) as (rows, heads, width, head_dim)."""
    x = x if ragged is None else ragged.pad(x)
    return x.view(rows, -1, *x.shape[1:]).transpose(1, 2)


def _scaling(options: dict[str, Any], query: Tensor) -> float:
    scaling = options.get("scaling")
    return float(query.shape[-1] ** -0.5 if scaling is None else scaling)


def _additive(mask: Tensor) -> Tensor:
    """In fp32, as :func:`row_attention` adds it."""
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
