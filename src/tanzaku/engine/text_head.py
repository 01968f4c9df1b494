"""Losses of a language model without the logits of all tokens at once.

A vocabulary may have a quarter of a million tokens: the logits of a batch then take many times the memory of the rest
of a step. So a pass ends at the backbone, and the model's own head runs on the hidden states of those tokens whose
successor is learnt, some at a time. Where nothing in it is trained, their gradient is computed right away, and no
logits are kept for the backward pass.

The idea of losses in chunks with their gradients: Hsu et al. 2024 (Liger Kernel), arXiv 2410.10989.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from tanzaku.core import dropout
from tanzaku.core.manager import find_manager
from tanzaku.core.quiet import quiet
from tanzaku.core.tokens import without_cache
from tanzaku.core.weights import WeightCopy, stacked
from tanzaku.errors import TanzakuError
from tanzaku.models import tree
from tanzaku.models.families import Base
from tanzaku.support.autograd import once_differentiable
from tanzaku.support.targets import IGNORED

_BYTES = 2**26  # of the logits that are there at once
_heads: WeakKeyDictionary[nn.Module, TextHead] = WeakKeyDictionary()


@dataclass(frozen=True)
class Hidden:
    """What a pass gives for a task of text.

    Args:
        states: (rows, tokens, hidden), what the backbone makes of the batch.
    """

    head: TextHead
    states: Tensor

    def losses(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each token's successor, and whether it is the likeliest one.

        Args:
            targets: (rows, tokens), or IGNORED.

        Returns:
            Two tensors (rows, tokens), zero where there is no target; the first is differentiable, in fp32 at least.
        """
        return self.head.losses(self.states, targets)


def text_head(model: PreTrainedModel) -> TextHead:
    """The head of a language model, looked for once."""
    if model not in _heads:
        _heads[model] = TextHead(model)
    return _heads[model]


class TextHead:
    """What a language model does behind its backbone, an encoder-decoder behind its decoder: its last layer, and
    whatever scales or caps its result."""

    def __init__(self, model: PreTrainedModel):
        base = Base.of(model)
        self._model, self.backbone = ref(model), base.entrance
        self.size, self._both = base.vocab_size, base.encoder_decoder
        parts = [base.backbone, base.encoder, self.backbone] if self._both else [self.backbone]
        inside = {id(module) for part in parts if part is not model for module in tree.modules(part)}
        self._modules = [module for module in tree.modules(model) if id(module) not in inside and module is not model]
        self._kind: Any = None
        self._check(base)

    @property
    def model(self) -> PreTrainedModel:
        """Whose head it is; a head is kept no longer than its model."""
        model = self._model()
        assert model is not None
        return model

    def run(self, inputs: dict[str, Any]) -> Hidden:
        """A pass of the model as far as its backbone. The head runs on one token a row, or on one in all where no
        adapter changes it, and its result is dropped."""
        found: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output[0]
            found.append(hidden)
            self._kind = type(output)  # and not the output, with which a step's activations would stay
            # A head that treats all rows alike needs no more of them.
            return _with(self._kind, hidden[:1, :1] if self.plain else hidden[:, :1])

        handle = self.backbone.register_forward_hook(keep)
        try:
            self.model(**inputs)
        finally:
            handle.remove()
        return Hidden(self, found[-1])

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, tokens, vocabulary) of hidden states (rows, tokens, hidden), by the model's own code."""
        model = self.model
        path = next(path for path, module in tree.named_modules(model) if module is self.backbone)
        shell = _replaced(model, path.split("."), _Given(self.backbone, _with(self._kind, hidden)))
        read = (
            {"encoder_outputs": (hidden,), "decoder_inputs_embeds": hidden} if self._both else {"inputs_embeds": hidden}
        )
        return cast(Tensor, type(model).forward(shell, **read).logits)

    def _whole(self) -> WeightCopy | None:
        """The weights of the whole model that are in force here, which a pass has put back where it ends."""
        manager = find_manager(self.model)
        force = None if manager is None else manager.sites.in_force()
        return None if force is None else force.whole

    @property
    def plain(self) -> bool:
        """Whether the head treats all rows alike, and has nothing to train."""
        return self._whole() is None and not any(
            module._forward_hooks
            or module._forward_pre_hooks
            or "forward" in module.__dict__
            or any(p is not None and p.requires_grad for p in module._parameters.values())
            for module in self._modules
        )

    def losses(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Hidden.losses`."""
        at = targets != IGNORED
        losses = hidden.new_zeros(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
        right = torch.zeros_like(at)
        if not at.any():
            return losses + 0 * hidden.sum(), right
        size = max(1, _BYTES // (4 * self.size))
        if self.plain:
            found, hits = _Losses.apply(hidden[at], targets[at], self, size)  # type: ignore[no-untyped-call]
            return losses.masked_scatter(at, found.to(losses.dtype)), right.masked_scatter(at, hits)
        # Rows keep their places, since layers of the head go by them: those of each row stand at its beginning.
        width = int(at.sum(dim=1).max())
        order = at.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        rows = torch.arange(len(at), device=at.device)[:, None]
        parts = [
            checkpoint(
                dropout.replayed(partial(self._part, self._whole())),
                hidden[rows, some],
                targets[rows, some],
                use_reentrant=False,
            )
            for some in torch.split(order, max(1, size // len(at)), dim=1)
        ]
        losses = losses.index_put((rows, order), torch.cat([part[0] for part in parts], dim=1).to(losses.dtype))
        return losses, right.index_put((rows, order), torch.cat([part[1] for part in parts], dim=1))

    def _part(self, whole: WeightCopy | None, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with nullcontext() if whole is None else stacked([whole], self.model):
            logits = self.logits(hidden).float()
        loss = cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
        return loss, logits.detach().argmax(-1) == targets

    @torch.no_grad()
    def _check(self, base: Base) -> None:
        """A TanzakuError where a token sees what stands behind it: it then sees what it is to foretell. Two rows are
        computed that differ in their last token alone. And one where an encoder-decoder has no head behind its
        decoder, as where a whole language model is the decoder."""
        weight = base.embedding.weight
        if weight.is_meta:
            return
        ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]], device=base.device("")) % len(weight)
        training = [module for module in tree.modules(base.model) if module.training]
        options = without_cache(base)
        try:
            for module in training:
                module.training = False
            with quiet():
                if self._both:
                    read = base.encoder(ids[:1])[0].expand(len(ids), -1, -1)
                    output = self.backbone(ids, encoder_hidden_states=read, **options)
                else:
                    output = self.backbone(ids, **options)
                states = output[0].float()
                if self._both:
                    self._check_head(base, ids, output, options)
        finally:
            for module in training:
                module.training = True
        apart = (states[0] - states[1]).abs().amax(-1)
        if apart[:-1].max() > 1e-3 * apart[-1]:
            raise TanzakuError(
                f"in {type(base.model).__name__} tokens see what stands behind them, so it cannot learn to write on; "
                "expected a causal language model"
            )

    def _check_head(self, base: Base, ids: Tensor, output: Any, options: dict[str, Any]) -> None:
        self._kind = type(output)
        try:
            found = self.logits(output[0])
            expected = base.model(ids[:1].expand_as(ids), decoder_input_ids=ids, **options).logits
            same = found.shape == expected.shape and bool((found - expected).abs().max() <= 0.02 * expected.abs().max())
        except Exception:  # whatever a model of another make says of a decoder's states
            same = False
        if not same:
            raise TanzakuError(
                f"{type(base.model).__name__} makes its scores of more than its decoder's hidden states, so it cannot "
                "learn to write here; expected an encoder-decoder such as T5 or BART"
            )


class _Losses(torch.autograd.Function):
    """Losses of tokens (n, hidden), and whether each is right, some at a time, with their gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: TextHead, size: int) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        losses, hits = [], []
        gradients: list[Tensor] = []
        for some, goals in zip(torch.split(hidden, size), torch.split(targets, size), strict=True):
            with torch.set_grad_enabled(wanted):
                some = some.detach().requires_grad_(wanted)
                loss, right = head._part(None, some[None], goals[None])
                if wanted:
                    gradients += torch.autograd.grad(loss.sum(), some)
            losses.append(loss.detach()[0])
            hits.append(right[0])
        ctx.save_for_backward(torch.cat(gradients) if wanted else None)
        found, right = torch.cat(losses), torch.cat(hits)
        ctx.mark_non_differentiable(right)
        return found, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0][:, None]).to(gradient.dtype), None, None, None


class _Given(nn.Module):
    """In place of a backbone: what it gave."""

    def __init__(self, backbone: nn.Module, output: Any):
        super().__init__()
        self.__dict__.update(_backbone=backbone, _output=output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_backbone"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_output"]


def _with(kind: Any, hidden: Tensor) -> Any:
    """A backbone's output of this kind, with hidden states and nothing else."""
    return (hidden,) if kind is tuple else kind(last_hidden_state=hidden)


def _replaced(module: nn.Module, path: list[str], by: nn.Module) -> nn.Module:
    """A module that shares all with another but what stands at a path inside; it has none of its hooks."""
    shell = type(module).__new__(type(module))
    shell.__dict__.update(module.__dict__)
    hooks: dict[str, Any] = {key: OrderedDict() for key, value in module.__dict__.items() if key.endswith("_hooks")}
    shell.__dict__.update(hooks)
    first, *rest = path
    inner = _replaced(cast(nn.Module, getattr(module, first)), rest, by) if rest else by
    shell.__dict__["_modules"] = {**module._modules, first: inner}
    return shell
