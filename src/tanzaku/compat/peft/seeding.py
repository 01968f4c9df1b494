"""Initial weights as HF PEFT draws them, so that one seed gives one adapter.

PEFT builds LoRA's matrices as layers, which draw weights that are then drawn anew, and it does so on the CPU wherever
the model is. The draws are the same ones here; what the other methods draw, they draw alike.
"""

from __future__ import annotations

import copy
import math
from typing import cast

import torch
from torch import Tensor, nn

from tanzaku.core.adapter import Adapter
from tanzaku.core.delta import base_matrix
from tanzaku.core.weights import BiasCopy, WeightCopy
from tanzaku.methods.activated import Invocation
from tanzaku.methods.adalora import SvdDelta
from tanzaku.methods.dora import Magnitude
from tanzaku.methods.ia3 import ScaleLayer
from tanzaku.methods.lora import LoRA
from tanzaku.methods.lora_layers import (
    ActivatedDelta,
    DoraConv2d,
    DoraDelta,
    DoraEmbedding,
    DoraStarted,
    LoraConv2d,
    LoraDelta,
    LoraEmbedding,
    StartedDelta,
    initialise,
)
from tanzaku.methods.lora_parameters import ParameterDelta
from tanzaku.methods.trainable_tokens import TokenVectors, Vectors


@torch.no_grad()
def draw_as_peft(adapter: Adapter, before: Tensor) -> None:
    """Draw initial weights anew as PEFT does, from the generator's state `before`."""
    lora = (LoraDelta, LoraConv2d, LoraEmbedding, DoraDelta, DoraConv2d, DoraEmbedding, ActivatedDelta)
    drawn = (*lora, StartedDelta, DoraStarted, ParameterDelta, SvdDelta, ScaleLayer)
    kinds = (*drawn, Invocation, Vectors, TokenVectors, BiasCopy, WeightCopy)
    on_meta = any(p.device.type == "meta" for _, p in adapter.named_parameters())
    # Only what is known to begin as PEFT's own does; what is left draws alike, on one device.
    if on_meta or not all(type(layer) in kinds for _, layer in adapter.at()):
        return
    torch.set_rng_state(before)
    init = getattr(adapter.method, "init_lora_weights", getattr(adapter.method, "init_ia3_weights", True))
    for path, layer in adapter.at():
        if type(layer) not in drawn:
            continue
        fresh = copy.deepcopy(layer).cpu()
        if isinstance(fresh, ScaleLayer):
            start = torch.randn(fresh.ia3_l.shape)
            fresh.ia3_l.fill_(1.0) if init else fresh.ia3_l.copy_(start)
        elif isinstance(fresh, SvdDelta):
            _svd(fresh, bool(init))
        elif isinstance(fresh, LoraEmbedding):
            _embedding(fresh, init)
        elif isinstance(fresh, ParameterDelta):
            _parameters(fresh, init is True)
        else:
            assert isinstance(fresh, LoraDelta)
            for low in (fresh.lora_A, fresh.lora_B):
                nn.init.kaiming_uniform_(low.weight, a=math.sqrt(5))
            module = adapter.base.model.get_submodule(path)
            if isinstance(fresh, StartedDelta):  # what was drawn gives way to a start, which may be drawn, too
                if fresh.watch is None:
                    fresh.begin(*cast(LoRA, adapter.method).start_of(base_matrix(module), fresh.r, fresh.scaling))
            elif init is not False:
                fresh.lora_B.weight.zero_()
                if init != "eva":
                    initialise(fresh, module, init)
        layer.load_state_dict(fresh.state_dict())
        if isinstance(layer, Magnitude):
            layer.measure(adapter.base.model.get_submodule(path))


def _svd(layer: SvdDelta, small: bool) -> None:
    for parameter in (layer.lora_A, layer.lora_E, layer.lora_B):
        parameter.normal_()
    torch.randn(1)  # the rank's, which is then set
    if small:
        layer.lora_E.zero_()
        layer.lora_A.normal_(std=0.02)
        layer.lora_B.normal_(std=0.02)


def _parameters(layer: ParameterDelta, zero: bool) -> None:
    for factors in layer.factors():
        factors.draw(zero=False)
        if zero:
            factors.draw(zero=True)
            factors.lora_B.get_parameter("weight").zero_()


def _embedding(layer: LoraEmbedding, init: bool | str) -> None:
    layer.lora_embedding_A.normal_()
    layer.lora_embedding_B.normal_()
    if init is not False:
        layer.lora_embedding_A.zero_()
        layer.lora_embedding_B.normal_()
