"""A tokenizer small enough to build in the process: words split at white space."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "古池", "や", "蛙", "飛び込む", "水", "の", "音"]


def word_tokenizer(**options: object) -> PreTrainedTokenizerFast:
    """``<s> A </s>`` and ``<s> A </s> B </s>``, with type ids 0 and 1 when asked for."""
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        **options,
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="session")
def typed_tokenizer() -> PreTrainedTokenizerFast:
    """The same, and it returns token_type_ids."""
    return word_tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
