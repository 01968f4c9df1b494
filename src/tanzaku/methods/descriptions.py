"""Vectors of texts that say what a task is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from tanzaku.core.manager import find_manager
from tanzaku.core.method import home
from tanzaku.core.quiet import quiet
from tanzaku.errors import TanzakuError
from tanzaku.models import tree
from tanzaku.models.families import Base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def describe(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """What the bare base makes of descriptions: the means of its last hidden states over each text's own tokens.

    Special tokens count for none: in many decoders the first one has a vector far longer than all others. Of an
    encoder-decoder they are the encoder's states. Adapters are not asked, and the model stays as it is.

    Args:
        model: with adapters or without, on any device but "meta".

    Returns:
        (texts, width) in fp32.

    Raises:
        TanzakuError: a text without a token of its own, or of more than the model has positions for; or a model that
            reads no text.
    """
    if isinstance(texts, str):
        raise TanzakuError("describe: found one text, expected a list of texts")
    manager = find_manager(model)
    return vectors_of(Base.of(model) if manager is None else manager.base, tokenizer, texts)


@torch.no_grad()
def vectors_of(base: Base, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """As :func:`describe`."""
    device = home(next(tree.parameters(base.model)))
    if device.type == "meta":
        raise TanzakuError("describe: found a model without weights (on the meta device), expected one that computes")
    try:
        base.embedding  # noqa: B018
    except TanzakuError:
        expected = "expected one that does, or vectors of your own"
        raise TanzakuError(f"describe: model type {base.kind!r} reads no token ids; {expected}") from None
    reader = base.encoder if base.encoder_decoder else base.backbone
    modes = {module: module.training for module in base.model.modules()}
    base.model.eval()
    try:
        with quiet():
            return torch.stack([_vector(base, reader, tokenizer, text, device) for text in texts])
    finally:
        for module, mode in modes.items():
            module.training = mode


def _vector(base: Base, reader: nn.Module, tokenizer: Any, text: str, device: torch.device) -> Tensor:
    found = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    ids, own = found["input_ids"], torch.tensor(found["special_tokens_mask"], device=device) == 0
    if not own.any():
        raise TanzakuError(f"describe: found {text!r}, which has no token of its own; expected a description")
    if base.max_positions is not None and len(ids) > base.max_positions:
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise TanzakuError(f"describe: {shown!r} has {len(ids)} tokens, expected {base.max_positions} at most")
    states = cast(Any, reader)(input_ids=torch.tensor([ids], device=device)).last_hidden_state[0]
    mean: Tensor = states[own.to(states.device)].float().mean(0)
    return mean.to(device)
