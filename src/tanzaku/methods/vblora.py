"""VB-LoRA: LoRA's matrices are put together from vectors that all layers share, each a mixture of a few.

    y = W x + B A x,  each piece of A and B a softmax over the k largest of its logits, times the vectors of one bank

Li et al. 2024, arXiv 2405.15179.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from tanzaku.core.method import About, AdapterLayer, Place, trainable
from tanzaku.core.shared import Shared, reached
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import TargetedWithBiases
from tanzaku.methods.low_rank import LowRankDelta
from tanzaku.models.families import features, weight_of
from tanzaku.support.refs import Ref


class VectorBank(Shared):
    """`vblora_vector_bank` (vectors, length)."""

    place = "vector_bank"

    def __init__(self, number: int, length: int, bound: float, like: Tensor):
        super().__init__()
        fill = partial(nn.init.uniform_, a=-bound, b=bound)
        self.vblora_vector_bank = trainable(number, length, like=like, fill=fill)

    def compute(self) -> Tensor:
        return self.vblora_vector_bank


class MixedDelta(LowRankDelta):
    """`vblora_logits_A` (r, in / length, vectors) and `vblora_logits_B` (out / length, r, vectors)."""

    def __init__(self, module: nn.Module, method: VBLoRA, bank: VectorBank):
        super().__init__()
        self.r, self.topk, self.dropout = method.r, method.topk, method.vblora_dropout
        self.bank, self.only_top = Ref(bank), method.save_only_topk_weights
        n_in, n_out = features(module)
        number, length = bank.vblora_vector_bank.shape
        weight, fill = weight_of(module), partial(nn.init.normal_, std=method.init_logits_std)
        self.vblora_logits_A = trainable(self.r, n_in // length, number, like=weight, fill=fill)
        self.vblora_logits_B = trainable(n_out // length, self.r, number, like=weight, fill=fill)

    def matrices(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        a, b = self._mixed(self.vblora_logits_A), self._mixed(self.vblora_logits_B)
        return a.flatten(1), b.transpose(1, 2).flatten(0, 1)

    def _mixed(self, logits: Tensor) -> Tensor:
        """(..., length): the mixture that each of the logits (..., vectors) means."""
        bank = reached(self.bank).value().to(logits.device)
        largest, at = logits.topk(self.topk, dim=-1)
        mixed: Tensor = (largest.softmax(-1)[..., None] * bank[at]).sum(-2)
        return mixed

    def export(self) -> dict[str, Tensor]:
        named = super().export()
        return named if not self.only_top else {k: t for name in named for k, t in self._top(name, named[name]).items()}

    def _top(self, name: str, logits: Tensor) -> dict[str, Tensor]:
        """What a mixture needs alone: which vectors, and their weights but the last, which is the rest."""
        largest, at = logits.topk(self.topk, dim=-1)
        number = logits.shape[-1]
        kind = torch.uint8 if number < 2**8 else torch.int16 if number < 2**15 else torch.int32
        weights = largest.softmax(-1)[..., :-1].contiguous()
        return {f"{name}_topk_indices": at.to(kind), f"{name}_topk_weights": weights}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        if self.only_top:
            own = {}
            for name, logits in self.named_parameters():
                weights = tensors[f"{name}_topk_weights"].to(logits)
                weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1).clamp(min=1e-30)
                at = tensors[f"{name}_topk_indices"].to(logits.device, torch.long)
                # Beyond the few that were kept none is chosen.
                own[name] = torch.full_like(logits, -1e4).scatter(-1, at, weights.log())
            tensors = own
        super().restore(tensors)


@dataclass
class VBLoRA(TargetedWithBiases):
    """Vector bank LoRA. Its start is a small change at random, as the paper has it.

    Args:
        r: rank of the change.
        num_vectors, vector_length: the bank's; the length divides a module's inputs and outputs.
        topk: vectors in each mixture.
        save_only_topk_weights: write the mixtures alone: much smaller files, of which only these vectors can be mixed
            again.
        vblora_dropout: probability of dropping an input in training.
        init_vector_bank_bound: vectors are drawn from minus to plus it. init_logits_std: deviation of the logits.
        fan_in_fan_out: kept for PEFT's files; the kind of module tells how its weight lies.
        bias: "none", "all" or "vblora_only": which biases are trained too.
    """

    name = "vblora"
    peft_type = "VBLORA"
    paper = "arXiv 2405.15179"
    summary = "LoRA put together from a bank of vectors that all layers share"
    about = About(
        where="query and value projections: y + B A x, pieces of B and A mixed from one bank",
        parameters="r (in + out) num_vectors / vector_length a matrix, and the bank",
        cost="as LoRA, and the mixtures of each matrix",
        choose="for the smallest files: with save_only_topk_weights a few numbers a piece",
        limits="trains more numbers than it keeps; starts with a small change at random",
    )
    starts_as_base = False
    by_default = False
    mergeable = True
    targets_by_kind: ClassVar = {
        **{kind: roles for kind, roles in TargetedWithBiases.targets_by_kind.items() if kind == "nemotron_h"},
        **dict.fromkeys(("opt", "t5", "bart"), ("query", "key", "value", "out", "up", "down")),
        "mt5": ("query", "key", "value", "out", "gate", "up", "down"),
        "deberta-v2": ("query", "key", "value", "dense"),
    }
    own_biases = "vblora_only"
    nonzero = ("init_vector_bank_bound",)
    learning_rate = 5e-4  # HF PEFT's method comparison (MetaMathQA, 1024 vectors); its notes: 1e-3 to 1e-2.
    # PEFT's notes: 1e-2 for logits, 1e-3 for the bank; one rate is for both.
    space = spaces(topk=Choice((2, 3, 6)), learning_rate=Range(3e-4, 3e-2, log=True))

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self.require(self.r > 0, f"r={self.r}", "a rank of 1 or more")
        self.require(self.vector_length > 0, f"vector_length={self.vector_length}", "1 or more")
        self.require(0 < self.topk <= self.num_vectors, f"topk={self.topk}", f"1 to num_vectors={self.num_vectors}")
        self.require(
            self.init_vector_bank_bound >= 0, f"init_vector_bank_bound={self.init_vector_bank_bound}", "0 or more"
        )
        self.require(self.init_logits_std >= 0, f"init_logits_std={self.init_logits_std}", "0 or more")
        self.check_chance("vblora_dropout")
        self.check_bias()
        found = self.find_fitting(place.base)
        for path, module in found:
            n_in, n_out = features(module)
            ok = n_in % self.vector_length == 0 and n_out % self.vector_length == 0
            expected = f"a divisor of {math.gcd(n_in, n_out)}, for {n_in} inputs and {n_out} outputs"
            self.require(ok, f"vector_length={self.vector_length} for {path}", expected)
        like = weight_of(found[0][1])
        bank = VectorBank(self.num_vectors, self.vector_length, self.init_vector_bank_bound, like)
        yield "", bank
        for path, module in found:
            yield path, MixedDelta(module, self, bank)
        yield from self.biases(place.base, [path for path, _ in found])
