"""An adapter for a task of which there is a description alone, written by one that has learned others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tanzaku.core.adapter import Adapter
from tanzaku.core.attach import detach
from tanzaku.core.manager import manager_of
from tanzaku.errors import TanzakuError, listed
from tanzaku.merging.combine import targets_of
from tanzaku.merging.convert import beside, take_over
from tanzaku.merging.merge import before_merging
from tanzaku.methods import METHODS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def write_lora(
    model: nn.Module,
    name: str,
    description: str | Tensor | Sequence[float],
    new: str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Adapter:
    """Attach the LoRA that adapter `name`, of the method text_to_lora, writes for a description. It is plain LoRA, to
    be routed to, trained on, saved, merged and served as any other; `name` stays as it is.

    A classifier's head, and whatever modules `name` has copies of, are taken over as they are.

    Args:
        description: a text, of which the bare base makes a vector; or a vector (width,) of the kind that the
            descriptions were given in.
        new: the new adapter's name; `NAME-lora` without it.
        tokenizer: what reads a text; None: the one that read the adapter's own.

    Raises:
        TanzakuError: `name` is of another method or was trained without descriptions, a vector of another width, a text
            where vectors were given, or a name already taken.
    """
    source = manager_of(model).get(name)
    if not source.method.writes:
        able = listed(each for each, method in METHODS.items() if method.writes)
        raise TanzakuError(f"write_lora: {name!r} is {source.method.name}, expected an adapter of {able}")
    if before_merging(model):
        raise TanzakuError("write_lora: found a merged adapter in the base's weights; unmerge it first")
    made: Any
    made, tensors = source.method.written(source, description, tokenizer)
    made.target_modules = targets_of([source], [*tensors])
    adapter = beside(source, made, new or f"{name}-{made.name}")
    try:
        for path, layer in adapter.at():
            if path in tensors:
                layer.restore(tensors[path])
        take_over(adapter, source)
    except BaseException:
        detach(model, adapter.name)
        raise
    return adapter
