"""llama.cpp as the oracle of exported files, and tokenizers small enough for tiny models."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

TEXTS = ["the old pond a frog leaps in", "the sound of water", "spring rain under trees a crystal stream", "12 3456"]
TEXTS += ["古池や 蛙飛び込む 水の音", "It's the frog's pond, isn't it?\n\n  Yes.", "snow, wind & 7 trees"]
PROMPT = "the frog's old pond, 12 trees"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {"gpt-2": None, "llama-bpe": LLAMA3, "qwen2": LLAMA3.replace("{1,3}", "")}
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def byte_level(split: str = "gpt-2", size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that splits texts as llama.cpp does by the name `split`, and begins with <s>."""
    core = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    # Trained on whole texts, so that it has pieces that no split lets through: only the split keeps them out.
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), list(_SPECIAL.values())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=special)
    core.train_from_iterator(["34", "t' s", ". 5", "e\n", *TEXTS] * 4, trainer)
    steps = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=SPLITS[split] is None)
    if (expression := SPLITS[split]) is not None:
        steps = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), steps])
    core.pre_tokenizer = steps
    return _begun(core)


def sentencepiece_bpe(prefix: bool) -> PreTrainedTokenizerFast:
    """A BPE tokenizer with byte pieces and a mark for spaces, as Llama 2 (`prefix`) and Gemma have it."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    special = [*_SPECIAL.values(), *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator(TEXTS[:4] * 4, trainers.BpeTrainer(vocab_size=360, special_tokens=special))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    # The byte pieces are ordinary ones: a text that spells one is not that byte.
    spec: dict[str, Any] = json.loads(core.to_str())
    spec["added_tokens"] = [each for each in spec["added_tokens"] if not each["content"].startswith("<0x")]
    return _begun(Tokenizer.from_str(json.dumps(spec)))


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's unigram model, without byte pieces."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=list(_SPECIAL.values()), unk_token="<unk>")
    core.train_from_iterator(TEXTS * 4, trainer)
    return _begun(core)


def _begun(core: Tokenizer) -> PreTrainedTokenizerFast:
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, **_SPECIAL)


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Of each token to come next, (vocabulary,)."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    return logits.float().log_softmax(-1)


def unspoken(tokenizer: PreTrainedTokenizerBase, size: int) -> list[int]:
    """Tokens that are no whole text by themselves: special ones, unused rows, parts of a character."""
    texts = [tokenizer.decode([number], skip_special_tokens=True) for number in range(len(tokenizer))]
    return [number for number in range(size) if number >= len(texts) or not texts[number].strip().isascii()] + [
        number for number, text in enumerate(texts) if not text.strip()
    ]


@torch.no_grad()
def continued(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int) -> str:
    """The greedy continuation by whole texts."""
    ids = torch.tensor([tokenizer(prompt).input_ids])
    without = unspoken(tokenizer, model.config.vocab_size)
    settings = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "suppress_tokens": without}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return str(tokenizer.decode(out[0, ids.shape[1] :]))


def by_ollama(template: str, system: str, prompt: str) -> str:
    """A first turn as Ollama writes it: conditions, then values, cut where the reply begins."""
    chosen = re.sub(
        r"\{\{ if \.System \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}",
        lambda found: found[1 if system else 2],
        template,
        flags=re.S,
    )
    return chosen.split("{{ .Response }}")[0].replace("{{ .System }}", system).replace("{{ .Prompt }}", prompt)


class LlamaCpp:
    """One model, with at most one adapter, in llama.cpp."""

    def __init__(self, path: Path, adapter: Path | None = None, context: int = 128):
        llama = pytest.importorskip("xllamacpp")
        params = llama.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.fit_params = context, 1, False, False
        params.verbosity = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter is not None:
            params.lora_adapters = [llama.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self.server = llama.Server(params)

    def ask(self, prompt: str, **options: Any) -> dict[str, Any]:
        asked = {"prompt": prompt, "temperature": 0.0, "cache_prompt": False, **options}
        found = self.server.handle_completions(asked)
        assert "choices" in found, found
        return dict(found)

    def text(self, prompt: str, tokens: int, without: list[int]) -> str:
        """The greedy continuation that holds no token of `without`."""
        bias = [[number, False] for number in without]
        return str(self.ask(prompt, max_tokens=tokens, logit_bias=bias)["choices"][0]["text"])

    def chat(self, messages: list[dict[str, str]], tokens: int) -> str:
        """The greedy answer, by the chat template in the file."""
        asked = {"messages": messages, "temperature": 0.0, "cache_prompt": False, "max_tokens": tokens}
        found = self.server.handle_chat_completions(asked)
        assert "choices" in found, found
        return str(found["choices"][0]["message"]["content"])

    def tokens(self, prompt: str) -> int:
        return int(self.ask(prompt, max_tokens=1)["usage"]["prompt_tokens"])

    def log_probabilities(self, prompt: str, size: int, spoken: int) -> torch.Tensor:
        """Of each token to come next, (size,). `spoken` is chosen, since nothing is told of parts of characters."""
        found = self.ask(prompt, max_tokens=1, logprobs=size, logit_bias=[[spoken, 1e6]])
        out = torch.full((size,), -math.inf)
        for entry in found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            out[entry["id"]] = entry["logprob"]
        return out
