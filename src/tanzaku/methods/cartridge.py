"""Cartridges: a long text's keys and values, cut short and trained to stand for all of it.

    attention(q, [p_k; k], [p_v; v]),  p = the base's own keys and values of the text's first tokens at first

The first tokens stay as they are: models attend to them whatever they are, and training is unsteady where they change.

Eyuboglu et al. 2025, arXiv 2506.06266.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tanzaku.core.method import About, AdapterLayer, Place
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.methods.prefix_tuning import Prefix, PrefixTuning
from tanzaku.methods.prompt_tuning import text_ids


class HeldPrefix(Prefix):
    """A prefix whose first tokens are not trained."""

    def __init__(self, tokens: int, shapes: list[tuple[int, int]], frozen: int):
        super().__init__(tokens, shapes, None, 0, zero=False)
        whole = self.embedding.weight.detach()
        del self.embedding
        self.frozen_embedding = nn.Parameter(whole[:frozen].clone(), requires_grad=False)
        self.trainable_embedding = nn.Parameter(whole[frozen:].clone())

    def forward(self) -> Tensor:
        return torch.cat([self.frozen_embedding, self.trainable_embedding])

    def restore(self, tensors: dict[str, Tensor]) -> None:
        held = len(self.frozen_embedding)
        with torch.no_grad():
            self.frozen_embedding.copy_(tensors["prompt_embeddings"][:held])
            self.trainable_embedding.copy_(tensors["prompt_embeddings"][held:])


@dataclass
class Cartridge(PrefixTuning):
    """A text's keys and values, trained.

    Args:
        num_virtual_tokens: how many tokens' keys and values there are. num_frozen_tokens: the first of them, which stay
            as they are.
        prefix_init_text, tokenizer_name_or_path: the text, of which the first tokens count, and what reads it; None
            starts from normal random numbers, which the paper finds worse.
    """

    name = "cartridge"
    peft_type = "CARTRIDGE"
    paper = "arXiv 2506.06266"
    summary = "a text's keys and values, trained to stand for it"
    about = About(
        where="keys and values in front of every attention layer, from a text",
        parameters="2 * layers * (num_virtual_tokens - num_frozen_tokens) * key width",
        cost="attention over num_virtual_tokens more keys",
        choose="to have many questions about one long text answered in little memory",
        limits="decoders alone have texts to start from; does not merge",
    )
    by_default = False
    learning_rate = 1e-2  # The authors' code trains with 2e-2; prefix tuning's ranges lie below.
    # Around it; the paper has lengths up to 8192, for texts of 100 thousand tokens and more.
    space = spaces(num_virtual_tokens=Choice((16, 32, 64)), learning_rate=Range(1e-3, 5e-2, log=True))

    num_frozen_tokens: int = 1

    def to_peft(self, config: dict[str, Any]) -> dict[str, Any]:
        # PEFT's own has a number of frozen tokens and nothing else; what is left out is in the tensors.
        left_out = ("encoder_hidden_size", "prefix_projection", "init_weights")
        kept = {key: value for key, value in super().to_peft(config).items() if key not in left_out}
        return {key: value for key, value in kept.items() if key != "modules_to_save" or value}

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self.require(not self.prefix_projection, "prefix_projection", "prefix_tuning, which has it")
        self.require(self.init_weights is None, f"init_weights={self.init_weights!r}", "prefix_tuning, which has it")
        n = self.num_virtual_tokens
        self.require(n > 0, f"num_virtual_tokens={n}", "1 or more")
        self.require(0 <= self.num_frozen_tokens < n, f"num_frozen_tokens={self.num_frozen_tokens}", f"0 to {n - 1}")
        yield from super().build(place)

    def prefix(self, shapes: list[tuple[int, int]]) -> Prefix:
        return HeldPrefix(self.num_virtual_tokens, shapes, self.num_frozen_tokens)

    def initial_ids(self) -> list[int]:
        ids = text_ids(self, self.prefix_init_text, self.tokenizer_name_or_path, None)
        found = f"a text of {len(ids)} tokens for num_virtual_tokens={self.num_virtual_tokens}"
        self.require(len(ids) >= self.num_virtual_tokens, found, "a text at least as long")
        return ids[: self.num_virtual_tokens]
