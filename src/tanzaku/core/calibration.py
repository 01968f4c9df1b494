"""A look at rows before the first step, for methods that start from what the base does with data.

Runs do it by themselves, with their training rows. Whoever has a training loop of his own calls
:func:`tanzaku.calibrate` before he makes an optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tanzaku.core.attach import route
from tanzaku.core.manager import manager_of
from tanzaku.core.passes import Passes
from tanzaku.errors import TanzakuError

# In the context of such rows: (rows, tokens) booleans, False at padding and where labels are -100; and the same of what
# an encoder-decoder's decoder reads.
OWN, DECODED = "own_tokens", "own_decoded_tokens"


def calibrate(
    model: nn.Module,
    name: str,
    batches: Iterable[Mapping[str, Tensor]],
    loss: Callable[[Any, Mapping[str, Tensor]], Tensor] | None = None,
) -> None:
    """Let adapter `name` see rows, if its method starts from what the base does with them (see its settings).

    The model runs in evaluation mode, every batch routed to the adapter alone; a method takes as many batches as it
    needs. Parameters may be others afterwards: make optimizers later.

    Args:
        batches: of inputs by the names of the model's `forward`, (rows, ...), on its device; with `labels` where the
            method needs a loss.
        loss: the mean loss of a batch, of the model's outputs and the batch; None takes the outputs' own.

    Raises:
        TanzakuError: no adapter of that name, one that starts from no rows, or too few of them.
    """
    adapter = manager_of(model).get(name)
    if not adapter.method.calibrates:
        raise TanzakuError(f"{name!r} ({adapter.method.name}) starts from no rows by its settings, so it needs none")

    def run(batch: Mapping[str, Tensor]) -> Tensor:
        if not batch:
            raise TanzakuError("calibrate: found a batch without inputs, expected tensors by the names of forward()")
        rows = len(next(iter(batch.values())))
        both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        labels = {"decoded" if both else "labels": batch.get("labels")}
        with route(model, [name] * rows, own_of(batch.get("attention_mask"), **labels)):
            outputs = model(**batch)
        found = getattr(outputs, "loss", None) if loss is None else loss(outputs, batch)
        return torch.zeros(()) if found is None else found

    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        adapter.method.calibrate(adapter, Passes(partial(run, batch) for batch in batches))
    finally:
        for module, mode in modes.items():
            module.training = mode


def own_of(mask: Tensor | None, labels: Tensor | None = None, decoded: Tensor | None = None) -> dict[str, Tensor]:
    """The context of rows by which layers tell own tokens from padding.

    Args:
        labels: of the same tokens. decoded: of those that an encoder-decoder's decoder reads.
    """
    found = {}
    if mask is not None and mask.dim() == 2:
        own = mask.bool()
        found[OWN] = own & (labels != -100) if labels is not None and labels.shape == own.shape else own
    if decoded is not None and decoded.dim() == 2:
        found[DECODED] = decoded != -100
    return found
