"""(IA)3: learned rescaling of keys, values and feed-forward activations.

    y = l * (W x)  at attention,  y = W (l * x)  at the feed-forward's last layer,  l = 1 at first

Liu et al. 2022, arXiv 2205.05638.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tanzaku.core.combining import Combining
from tanzaku.core.method import About, AdapterLayer, Attached, Method, ModuleLayer, Place, trainable
from tanzaku.core.routing import in_equal_shares
from tanzaku.core.space import Range, spaces
from tanzaku.core.targeted import Targeted
from tanzaku.errors import TanzakuError, listed
from tanzaku.models.families import features, weight_of
from tanzaku.models.quantize import full_weight

_NOT_KEYS = ("query", "value", "down")  # what HF PEFT scales in many families


class ScaleLayer(ModuleLayer):
    """One factor an output feature, or an input feature where the module is of the feed-forward kind."""

    def __init__(self, module: nn.Module, feedforward: bool, init: bool):
        super().__init__()
        n_in, n_out = features(module)
        self.edits_input, self.edits_output = feedforward, not feedforward  # type: ignore[misc]
        shape: tuple[int, ...] = (1, n_in) if feedforward else (n_out, 1)
        if isinstance(module, nn.Conv2d):
            shape = (1, n_in, 1, 1) if feedforward else (1, n_out, 1, 1)
        self.ia3_l = trainable(*shape, like=weight_of(module), fill=nn.init.ones_ if init else nn.init.normal_)

    def _scaled(self, module: nn.Module, x: Tensor) -> Tensor:
        factor = self.ia3_l if isinstance(module, nn.Conv2d) else self.ia3_l.flatten()
        return (x * factor).to(x.dtype)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        return self._scaled(module, x)

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self._scaled(module, y)

    def batch_key(self, module: nn.Module) -> Hashable | None:
        return None if isinstance(module, nn.Conv2d) else (self.edits_input, self.ia3_l.dtype)

    @staticmethod
    def batched_inputs(layers: Sequence[ScaleLayer], sizes: tuple[int, ...], module: nn.Module, x: Tensor) -> Tensor:
        if len(layers) == 1:
            return layers[0]._scaled(module, x)
        factors = torch.stack([s.ia3_l.flatten() for s in layers])[:, None]

        def scaled(x: Tensor) -> Tensor:
            return (x.reshape(len(layers), -1, x.shape[-1]) * factors).view(x.shape).to(x.dtype)

        return in_equal_shares(sizes, scaled, x)

    @staticmethod
    def batched_outputs(
        layers: Sequence[ScaleLayer], sizes: tuple[int, ...], module: nn.Module, x: Tensor, y: Tensor
    ) -> Tensor:
        return ScaleLayer.batched_inputs(layers, sizes, module, y)

    def combine(self, module: nn.Module, given: Sequence[Any], weights: Sequence[float], by: Combining) -> None:
        self.ia3_l.copy_(by.rule([each.ia3_l for each in given], weights))

    def merged(self, module: nn.Module) -> dict[str, Tensor] | None:
        factor: Any = self.ia3_l
        if isinstance(module, nn.Conv2d) and self.edits_input:
            # Each group of output channels reads its own part of the input's.
            factor = factor.view(module.groups, 1, -1, 1, 1).expand(-1, module.out_channels // module.groups, -1, 1, 1)
            factor = factor.flatten(0, 1)
        elif isinstance(module, nn.Conv2d):
            factor = factor.transpose(0, 1)
        out = {"weight": full_weight(module) * (factor.t() if isinstance(module, Conv1D) else factor)}
        bias = module._parameters.get("bias")
        if bias is not None and self.edits_output:
            out["bias"] = bias * self.ia3_l.flatten()
        return out


@dataclass
class IA3(Targeted):
    """(IA)3: infused adapter by inhibiting and amplifying inner activations.

    Args:
        target_modules: last names or a regular expression; None takes the family's.
        feedforward_modules: those of them that are scaled at their input; None takes the family's.
        init_ia3_weights: True starts with factors of one, which changes nothing.
        fan_in_fan_out: kept for PEFT's files; the kind of module tells how its weight lies.
    """

    name = "ia3"
    peft_type = "IA3"
    paper = "arXiv 2205.05638"
    summary = "learned rescaling of keys, values and feed-forward activations"
    about = About(
        where="keys, values and what the last feed-forward layer reads, each feature times a factor",
        parameters="one number a feature",
        cost="a multiplication of each such tensor",
        choose="with very few rows, or thousands of adapters",
        limits="only rescales: what the model cannot do, it does not learn; wants high rates",
    )
    mergeable = True
    learning_rate = 5e-3  # HF PEFT's method comparison; T-Few (arXiv 2205.05638): 3e-3.
    # The paper's 3e-3, and above: a factor starts at one and has far to go.
    space = spaces(learning_rate=Range(5e-4, 5e-2, log=True))

    combines_by = "linear"
    targets: ClassVar[tuple[str, ...]] = ("key", "value", "down", "mixer")  # roles, see families/family.py
    targets_by_kind: ClassVar[Mapping[str, tuple[str, ...]]] = {  # of model types where HF PEFT's are others
        **dict.fromkeys(("qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gemma3", "phi"), _NOT_KEYS),
        **dict.fromkeys(("gpt_neo", "gptj", "llama4", "llama4_text", "bart", "mbart", "whisper"), _NOT_KEYS),
        "opt": ("query", "key", "down"),
        "mt5": ("key", "value", "up"),
    }

    feedforward_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return not isinstance(module, nn.Embedding)

    def combined(self, parts: Sequence[Attached], by: Combining) -> Method:
        if by.how != "linear":
            raise TanzakuError(f"combine: found how={by.how!r} for ia3, expected 'linear': its factors have no rank")
        inner = [{p for p, s in part.at() if isinstance(s, ScaleLayer) and s.edits_input} for part in parts]
        outer = [{p for p, s in part.at() if isinstance(s, ScaleLayer) and s.edits_output} for part in parts]
        if torn := set().union(*inner) & set().union(*outer):
            raise TanzakuError(
                f"combine: {listed(sorted(torn), 3)} is scaled at its input by one adapter and at its output by "
                "another; expected the same feedforward_modules"
            )
        return dataclasses.replace(self, feedforward_modules=by.names(sorted(set().union(*inner))))

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        base, skip = place.base, self.copied(place.base)
        by_default = self.target_modules is None
        found = self.find(base)
        if by_default and self.feedforward_modules is None:
            self.feedforward_modules = base.feed_forward(self.target_modules)
        inner: set[str] = set()
        if self.feedforward_modules:
            inner = {path for path, _ in base.targets(self.feedforward_modules, skip=skip)}
            self.require(
                bool(inner & {path for path, _ in found}),
                f"feedforward_modules={self.feedforward_modules!r} outside of target_modules",
                "a part of target_modules",
            )
        for path, module in found:
            self.require(not isinstance(module, nn.Embedding), f"{path}, an embedding", "a linear layer or Conv2d")
            yield path, ScaleLayer(module, path in inner, self.init_ia3_weights)
