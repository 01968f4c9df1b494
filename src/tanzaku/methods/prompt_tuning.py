"""Prompt tuning: learned vectors in front of the text.

    input = [p_1 ... p_n, e(x_1) ... e(x_T)],  p trained, the embedding e frozen

Lester et al. 2021, arXiv 2104.08691.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tanzaku.core.method import About, AdapterLayer, Method, Place, TokenLayer, trainable
from tanzaku.core.positions import room
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.tokens import check_entrance
from tanzaku.errors import TanzakuError
from tanzaku.models.families import Base, weight_of


class PromptLayer(TokenLayer):
    """Vectors of n virtual tokens."""

    def __init__(self, prompt_embeddings: nn.Parameter):
        super().__init__()
        self.prompt_embeddings = prompt_embeddings
        self.num_virtual_tokens = prompt_embeddings.shape[0]

    def vectors(self) -> Tensor:
        return self.prompt_embeddings

    def restore(self, tensors: dict[str, Tensor]) -> None:
        # An encoder-decoder's file from PEFT may hold a second set, for the decoder, that PEFT itself never reads.
        self.load_state_dict({"prompt_embeddings": tensors["prompt_embeddings"][: self.num_virtual_tokens]})


@dataclass
class PromptLearning(Method):
    """What prompt tuning, P-tuning and prefix tuning share: sizes that PEFT writes into its files."""

    file_prefix = "base_model."

    num_virtual_tokens: int = 10
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None

    def check(self, base: Base) -> None:
        """Check the number of tokens, and note the model's sizes."""
        n = self.num_virtual_tokens
        self.require(n > 0, f"num_virtual_tokens={n}", "1 or more")
        limit = room(base)
        if limit is not None and n >= limit:
            raise TanzakuError(f"{self.name}: {n} virtual tokens leave no room in the model's {limit} positions")
        self.num_transformer_submodules = 1
        self.token_dim = base.hidden_size
        for mine, keys in {
            "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
            "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
        }.items():
            setattr(self, mine, base.setting(*keys))


@dataclass
class PromptTuning(PromptLearning):
    """Prompt tuning.

    Args:
        num_virtual_tokens: how many vectors are prepended.
        prompt_tuning_init: "RANDOM" (normal), "SAMPLE_VOCAB" (vectors of random tokens) or "TEXT".
        prompt_tuning_init_text, tokenizer_name_or_path: the text whose vectors start the prompt, cut or repeated.
    """

    name = "prompt_tuning"
    peft_type = "PROMPT_TUNING"
    paper = "arXiv 2104.08691"
    summary = "learned vectors in front of the text"
    about = About(
        where="vectors in front of the text at the embedding",
        parameters="num_virtual_tokens * width",
        cost="rows are longer by num_virtual_tokens",
        choose="for large models and very small files",
        limits="slow to learn, wants high rates; weak on small models; does not merge",
    )
    learning_rate = 1e-2  # Between HF PEFT's examples with AdamW, 1e-3, and the paper's 0.3 with Adafactor.
    # The paper: 0.3 (with Adafactor), and little gain past 20 tokens; PEFT's examples take 3e-2.
    space = spaces(num_virtual_tokens=Choice((5, 10, 20, 50)), learning_rate=Range(1e-3, 3e-1, log=True))
    lengthens_rows = True

    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        base = place.base
        check_entrance(base)
        self.check(base)
        table = base.embedding
        self.token_dim = base.embedding_size
        vectors = trainable(self.num_virtual_tokens, self.token_dim, like=weight_of(table), fill=nn.init.normal_)
        if not self.inference_mode and vectors.device.type != "meta":
            start = self.start(base)
            if start is not None:
                with torch.no_grad():
                    vectors.copy_(table(start.to(vectors.device)))
        yield "", PromptLayer(vectors)

    def start(self, base: Base) -> Tensor | None:
        """Token ids (num_virtual_tokens,) whose vectors start the prompt; None for random vectors."""
        kind = self.prompt_tuning_init.upper().rsplit(".", 1)[-1]
        if kind == "RANDOM":
            return None
        if kind == "SAMPLE_VOCAB":
            return torch.randint(0, base.vocab_size, (self.num_virtual_tokens,))
        self.require(kind == "TEXT", f"prompt_tuning_init={self.prompt_tuning_init!r}", "RANDOM, TEXT or SAMPLE_VOCAB")
        ids = text_ids(self, self.prompt_tuning_init_text, self.tokenizer_name_or_path, self.tokenizer_kwargs)
        times = math.ceil(self.num_virtual_tokens / len(ids))
        return torch.tensor((ids * times)[: self.num_virtual_tokens])


def text_ids(method: Method, text: str | None, tokenizer: str | None, options: dict[str, Any] | None) -> list[int]:
    """Token ids of an initial text; errors where the text or the tokenizer is missing."""
    method.require(bool(text), "no initial text", "a text to start from")
    method.require(bool(tokenizer), "no tokenizer_name_or_path", "the tokenizer that reads the initial text")
    from transformers import AutoTokenizer

    safe = {k: v for k, v in (options or {}).items() if k != "trust_remote_code"}
    try:
        reader = AutoTokenizer.from_pretrained(tokenizer, **safe)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TanzakuError(f"{method.name}: {tokenizer!r} gives no tokenizer: {reason}") from None
    ids = list(reader(text)["input_ids"])
    method.require(bool(ids), f"the initial text {text!r}, which has no token", "one with at least one token")
    return ids
