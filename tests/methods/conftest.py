"""A tiny tokenizer on disk."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def tokenizer(tmp_path):
    """The directory of a tokenizer that knows five words, with ids 10 to 14."""
    words = {"<pad>": 0, "<unk>": 3, **{word: 10 + i for i, word in enumerate(["one", "two", "three", "four", "five"])}}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", unk_token="<unk>")
    wrapped.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")
