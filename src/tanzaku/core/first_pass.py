"""A pass of the bare base before each pass, for methods whose layers depend on what the base makes of a whole text.

What layers share says that it `reads_first_pass`, and finds in :meth:`~tanzaku.core.shared.Shared.compute_of` a
:class:`FirstPass`. It has no gradient. Where a text goes on from a cache, the bare base goes on from one of its own,
which stands beside it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from tanzaku.core import caches
from tanzaku.core.positions import parameters
from tanzaku.core.quiet import quiet

FIRST_PASS = "tanzaku_first_pass"  # among what `compute_of` is given


class FirstPass(NamedTuple):
    """What the bare base made of the tokens that a stack of layers is given.

    Args:
        hidden: (rows, tokens, width), what the last layer and the norm behind it return.
        own: (rows, tokens), which are no padding. before: (rows, 1), own tokens of a row in the cache.
        encoder: (rows, tokens of the encoder, width), what the decoder reads of it.
        training: whether the model is being trained.
    """

    hidden: Tensor
    own: Tensor
    before: Tensor
    encoder: Tensor | None
    training: bool


def first_pass(module: nn.Module, given: dict[str, Any]) -> FirstPass:
    """Run a stack of layers, without what adapters do there, on what it is given."""
    name, cache = caches.held(given)
    mark = caches.mark_of(cache)
    past = 0 if cache is None else (caches.length(cache) or 0) - (0 if mark is None else mark.width)
    own = dict(given)
    if name is not None:
        own[name] = caches.beside(cache)
    elif "use_cache" in parameters(module):
        own["use_cache"] = False
    with quiet(), torch.no_grad():
        out = module.forward(**own)
    hidden: Tensor = out.last_hidden_state if isinstance(out, ModelOutput) else out[0]
    rows, tokens = hidden.shape[:2]
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        real = mask != 0
        return FirstPass(
            hidden,
            real[:, -tokens:],
            real[:, :-tokens].sum(1, keepdim=True),
            given.get("encoder_hidden_states"),
            module.training,
        )
    every = torch.ones(rows, tokens, dtype=torch.bool, device=hidden.device)
    before = torch.full((rows, 1), past, device=hidden.device)
    return FirstPass(hidden, every, before, given.get("encoder_hidden_states"), module.training)
