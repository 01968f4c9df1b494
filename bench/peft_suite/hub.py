"""A Hub of tiny random models, as a cache on this machine: the names that HF PEFT's tests load resolve with no network.

A model's shape is chosen by its name. Adapters that the tests load by name are made with HF PEFT.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

_OPT = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 4, "num_hidden_layers": 5, "num_attention_heads": 4}
_OPT_125M = {"hidden_size": 96, "word_embed_proj_dim": 96, "ffn_dim": 192, "num_hidden_layers": 12}
_GPT2 = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512}
_BERT = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 5, "num_attention_heads": 4}
_ROBERTA = {**_BERT, "pad_token_id": 1, "bos_token_id": 0}
_LLAMA = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_MISTRAL = {**_LLAMA, "hidden_size": 32, "num_key_value_heads": 2}
_GROUPED = {**_LLAMA, "num_key_value_heads": 2}
_QWEN = {**_GROUPED, "hidden_size": 8}
_MOE = {**_GROUPED, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4, "decoder_start_token_id": 0}
_BART = {
    "d_model": 16,
    **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 4))},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
}
_GEMMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8, "num_attention_heads": 2}
_WHISPER = {
    **_BART,
    "num_mel_bins": 80,
    "max_source_positions": 30,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}

VOCABULARY = 1024

# Repository -> (model_type, transformers' class, settings).
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "peft-internal-testing/opt-125m": ("opt", "AutoModelForCausalLM", {**_OPT, **_OPT_125M}),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("opt", "AutoModelForCausalLM", _OPT),
    "peft-internal-testing/opt-tokenizer-revision-base": ("opt", "AutoModelForCausalLM", _OPT),
    "peft-internal-testing/tiny-random-gpt2": ("gpt2", "AutoModelForCausalLM", _GPT2),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("gpt2", "AutoModelForCausalLM", _GPT2),
    "hf-internal-testing/tiny-random-gpt2": ("gpt2", "AutoModelForCausalLM", _GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "gptj",
        "AutoModelForCausalLM",
        {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512, "rotary_dim": 4},
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("gpt_neox", "AutoModelForCausalLM", _BERT),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "bloom",
        "AutoModelForCausalLM",
        {"hidden_size": 32, "n_layer": 5, "n_head": 4},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("llama", "AutoModelForCausalLM", _LLAMA),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("llama", "AutoModelForCausalLM", _LLAMA),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("llama", "AutoModelForCausalLM", _LLAMA),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "llama",
        "AutoModelForSequenceClassification",
        {**_GROUPED, "pad_token_id": 0},
    ),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("mistral", "AutoModelForCausalLM", _MISTRAL),
    "peft-internal-testing/tiny-dummy-qwen2": ("qwen2", "AutoModelForCausalLM", _QWEN),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("qwen3", "AutoModelForCausalLM", {**_QWEN, "head_dim": 8}),
    "Qwen/Qwen2-0.5B": ("qwen2", "AutoModelForCausalLM", _QWEN),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": ("qwen3_moe", "AutoModelForCausalLM", {**_MOE, "head_dim": 8}),
    "hf-internal-testing/tiny-qwen3-moe": ("qwen3_moe", "AutoModelForCausalLM", {**_MOE, "head_dim": 8}),
    "hf-internal-testing/Mixtral-tiny": ("mixtral", "AutoModelForCausalLM", _MOE),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "gemma3_text",
        "AutoModelForCausalLM",
        {**_GEMMA, "num_key_value_heads": 1, "sliding_window": 64},
    ),
    "tiiuae/falcon-mamba-tiny-dev": (
        "falcon_mamba",
        "AutoModelForCausalLM",
        {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4},
    ),
    "peft-internal-testing/tiny-random-BertModel": ("bert", "AutoModel", _BERT),
    "hf-internal-testing/tiny-random-BertModel": ("bert", "AutoModel", _BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("roberta", "AutoModel", _ROBERTA),
    "peft-internal-testing/tiny-random-DebertaModel": ("deberta", "AutoModel", _BERT),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("deberta-v2", "AutoModel", _BERT),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "bert",
        "AutoModelForSequenceClassification",
        _BERT,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "roberta",
        "AutoModelForSequenceClassification",
        _ROBERTA,
    ),
    "peft-internal-testing/tiny-random-t5": ("t5", "AutoModelForSeq2SeqLM", _T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("t5", "AutoModelForSeq2SeqLM", _T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("t5", "AutoModelForSeq2SeqLM", _T5),
    "google/flan-t5-small": (
        "t5",
        "AutoModelForSeq2SeqLM",
        {**_T5, "feed_forward_proj": "gated-gelu", "num_layers": 8},
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("bart", "AutoModelForSeq2SeqLM", _BART),
    "peft-internal-testing/tiny-random-WhisperForConditionalGeneration": (
        "whisper",
        "AutoModelForSpeechSeq2Seq",
        _WHISPER,
    ),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": (
        "resnet",
        "AutoModelForImageClassification",
        {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1], "num_labels": 3},
    ),
    "peft-internal-testing/tiny-clip-text-2": (
        "clip_text_model",
        "AutoModel",
        {**_LLAMA, "hidden_size": 32, "projection_dim": 16},
    ),
}

# Repository -> (base, class of the base, PEFT's task); of LoRA, made with HF PEFT.
_OPT_NAME = "peft-internal-testing/tiny-random-OPTForCausalLM"
_GPT2_NAME = "peft-internal-testing/tiny-random-GPT2LMHeadModel"
_BERT_NAME = "hf-internal-testing/tiny-random-BertModel"
_WHISPER_NAME = "peft-internal-testing/tiny-random-WhisperForConditionalGeneration"
ADAPTERS: dict[str, tuple[str, str, str | None]] = {
    "peft-internal-testing/tiny-OPTForCausalLM-lora": (_OPT_NAME, "AutoModelForCausalLM", "CAUSAL_LM"),
    "peft-internal-testing/tiny-opt-lora-revision": (_OPT_NAME, "AutoModelForCausalLM", "CAUSAL_LM"),
    "peft-internal-testing/test-lora-subfolder": (_OPT_NAME, "AutoModelForCausalLM", "CAUSAL_LM"),
    "peft-internal-testing/tiny_OPTForSequenceClassification-lora": (
        _OPT_NAME,
        "AutoModelForSequenceClassification",
        "SEQ_CLS",
    ),
    "peft-internal-testing/tiny_OPTForQuestionAnswering-lora": (
        _OPT_NAME,
        "AutoModelForQuestionAnswering",
        "QUESTION_ANS",
    ),
    "peft-internal-testing/tiny_OPTForFeatureExtraction-lora": (_OPT_NAME, "AutoModel", "FEATURE_EXTRACTION"),
    "peft-internal-testing/tiny_GPT2ForTokenClassification-lora": (
        _GPT2_NAME,
        "AutoModelForTokenClassification",
        "TOKEN_CLS",
    ),
    "peft-internal-testing/tiny_T5ForSeq2SeqLM-lora": (
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration",
        "AutoModelForSeq2SeqLM",
        "SEQ_2_SEQ_LM",
    ),
    "peft-internal-testing/tiny_WhisperForConditionalGeneration-lora": (
        _WHISPER_NAME,
        "AutoModelForSpeechSeq2Seq",
        None,
    ),
    "peft-internal-testing/gpt2-lora-random": (
        "peft-internal-testing/tiny-random-gpt2",
        "AutoModelForCausalLM",
        "CAUSAL_LM",
    ),
    "peft-internal-testing/tiny-random-BertModel-lora": (_BERT_NAME, "AutoModelForCausalLM", None),
    "ybelkada/test-st-lora": (_OPT_NAME, "AutoModelForCausalLM", "CAUSAL_LM"),
}

# Beside "main", where a test names another; of a base its weights are others.
REVISIONS = {
    "peft-internal-testing/tiny-random-BertModel": "v2.0.0",
    "peft-internal-testing/tiny-random-BertModel-lora": "v1.2.3",
    "peft-internal-testing/tiny-opt-lora-revision": "test",
}


def build(cache: Path) -> None:
    """Write the models, their tokenizer and the adapters into `cache`, a directory for HF_HUB_CACHE."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    for name, (kind, auto, settings) in MODELS.items():
        common = {} if kind in ("resnet",) else {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
        padding = {} if kind in ("llama", "mistral", "qwen2", "qwen3", "resnet") else {"pad_token_id": 0}
        places = {} if kind in ("bloom", "t5", "resnet", "falcon_mamba") else {"max_position_embeddings": 512}
        config = transformers.AutoConfig.for_model(kind, **{**common, **padding, **places, **settings})
        for revision in ["main", *([REVISIONS[name]] if name in REVISIONS else [])]:
            torch.manual_seed(int(hashlib.sha256(f"{name}@{revision}".encode()).hexdigest()[:8], 16))
            model = getattr(transformers, auto).from_config(config)
            folder = snapshot(cache, name, revision)
            model.save_pretrained(folder)
            if kind == "resnet":
                _image_processor(folder)
            else:
                _tokenizer(folder)
    _adapters(cache)


def snapshot(cache: Path, name: str, revision: str = "main") -> Path:
    """The folder of a repository's files, as huggingface_hub lays a cache out."""
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    letters = [chr(c) for c in range(33, 127)]
    words = {word: i for i, word in enumerate([*special, *letters, *(f"▁w{i}" for i in range(VOCABULARY - 98))])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ("pad_token", "bos_token", "eos_token", "unk_token")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, **dict(zip(names, special, strict=True))
    ).save_pretrained(folder)


def _image_processor(folder: Path) -> None:
    settings = {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_pct": 1.0,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def _adapters(cache: Path) -> None:
    import peft
    import torch
    import transformers

    for name, (base, auto, task) in ADAPTERS.items():
        torch.manual_seed(0)
        model = getattr(transformers, auto).from_pretrained(snapshot(cache, base))
        kinds = {"Bert": ["query", "value"], "Whisper": ["q_proj", "v_proj"]}
        targets = next((targets for kind, targets in kinds.items() if kind in base), None)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type=task, r=4, target_modules=targets))
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.1)
        for config in wrapped.peft_config.values():
            config.base_model_name_or_path = base
        for revision in ["main", *([REVISIONS[name]] if name in REVISIONS else [])]:
            folder = snapshot(cache, name, revision)
            wrapped.save_pretrained(folder / "test" if "subfolder" in name else folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
