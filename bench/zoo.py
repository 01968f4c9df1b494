"""Tiny random models of the families of the installed transformers, and rows for them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCAB = 128
IMAGE = 120  # the token that stands for a part of an image
LENGTHS = (10, 3, 7, 5)  # of the rows; windows are shorter than the longest

# What a setting of that name is made, where a configuration has a number there.
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "decoder_vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "sep_token_id": 4,
    "cls_token_id": 5,
    "mask_token_id": 6,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "dim": 32,
    "emb_dim": 32,
    "hidden_dim": 48,
    "embedding_size": 24,
    "embed_dim": 16,
    "word_embed_proj_dim": 32,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "d_inner": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "moe_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "ffn_hidden_size": 48,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "intermediate_size_mlp": 48,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "d_kv": 8,
    "d_head": 8,
    "dim_head": 8,
    "query_pre_attn_scalar": 8,
    "kv_channels": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 12,
    "v_head_dim": 6,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "max_seq_len": 128,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "local_attention": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "zero_expert_num": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    "expert_capacity": 64,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 8,
    "mamba_head_dim": 8,
    "mamba_dt_rank": 4,
    "mamba_d_ssm": 64,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "time_step_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "lru_width": 32,
    "attention_window_size": 8,
    "attention_hidden_size": 32,
    "adapter_rank": 4,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 64,
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
    "projection_dim": 16,
    "num_mel_bins": 16,
    "max_source_positions": 20,
    "max_target_positions": 64,
    "num_labels": 3,
    "laurel_rank": 4,
    "num_kv_shared_layers": 1,
}

_FAIRSEQ = {"pad_token_id": 1, "bos_token_id": 0}
_STAGES = {"num_stages": 2, "depths": [2, 2], "num_heads": [2, 4], "hidden_sizes": [16, 32], "embedding_size": 16}
_SLIDING = ["sliding_attention", "full_attention"]

# What a family's configuration needs beside that.
_BERT = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_BERT |= {"num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0, "hidden_dropout_prob": 0.0}
_BERT |= {"attention_probs_dropout_prob": 0.0}
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"linear_num_heads": 4, "linear_head_dim": 8},
    "bamba": {"attn_layer_indices": [1]},
    "bart": _FAIRSEQ,
    "big_bird": {"attention_type": "original_full"},
    "bit": {"num_groups": 8, **_STAGES},
    "blenderbot": {"encoder_no_repeat_ngram_size": 0},
    "camembert": _FAIRSEQ,
    "codegen": {"rotary_dim": 4},
    "convnext": _STAGES,
    "convnextv2": _STAGES,
    "data2vec-text": _FAIRSEQ,
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in _SLIDING},
    },
    "dinov3_vit": {"rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "electra": {"embedding_size": 24},
    "encoder-decoder": {
        "encoder": {"model_type": "bert", **_BERT},
        "decoder": {"model_type": "bert", **_BERT, "is_decoder": True, "add_cross_attention": True},
        "decoder_start_token_id": 1,
    },
    "esm": {"vocab_size": VOCAB, "mask_token_id": 6, "position_embedding_type": "absolute", **_FAIRSEQ},
    "esmc": {"num_key_value_heads": 4},
    "falcon": {"num_kv_heads": 4},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": _SLIDING * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": 48,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {"layer_types": _SLIDING, "num_kv_shared_layers": 0},
    "gemma4_unified_text": {"layer_types": _SLIDING, "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"no_rope_layers": [1, 0], "moe_layers": [1], "num_experts_per_tok": 1},
    "longformer": {"attention_window": [4, 4], **_FAIRSEQ},
    "longt5": {"local_radius": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mbart": _FAIRSEQ,
    "ministral": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "mobilebert": {"embedding_size": 32, "true_hidden_size": 16, "intra_bottleneck_size": 16},
    "mpnet": _FAIRSEQ,
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention"]},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2, "num_experts": 2},
    "nystromformer": {"num_landmarks": 4, "segment_means_seq_len": 4, "conv_kernel_size": 3},
    "plbart": _FAIRSEQ,
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rembert": {"input_embedding_size": 24, "output_embedding_size": 24},
    "resnet": _STAGES,
    "roberta": _FAIRSEQ,
    "roberta-prelayernorm": _FAIRSEQ,
    "roformer": {"embedding_size": 32},
    "rwkv": {"context_length": 64},
    "squeezebert": {"embedding_size": 32},
    "swin": {"depths": [1, 1], "num_heads": [2, 4], "window_size": 2},
    "swinv2": {"depths": [1, 1], "num_heads": [2, 4], "window_size": 2},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 2},
    "xlm-roberta": _FAIRSEQ,
    "xlm-roberta-xl": _FAIRSEQ,
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "deit": {"architectures": ["DeiTForImageClassification"]},
    "donut-swin": {"depths": [1, 1], "num_heads": [2, 4], "window_size": 2},
    "lilt": {"hidden_size": 48, "channel_shrink_ratio": 4},
    "mobilevitv2": {"image_size": 128},
    "pvt": {"image_size": 64},
    "segformer": {"image_size": 64},
    "zamba2": {
        "hybrid_layer_ids": [1],
        "layers_block_type": ["linear_attention", "hybrid"],
        "mamba_headdim": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
}


def config_of(model_type: str, **own: Any) -> PreTrainedConfig:
    """A tiny configuration: the default one with every number of :data:`TINY` made small, then what the family needs.

    A list with an entry a layer becomes one of two: the first entry and the first that differs from it.
    """
    small = _small(AutoConfig.for_model(model_type))
    return AutoConfig.for_model(model_type, **{**small, **own})


def _small(config: PreTrainedConfig) -> dict[str, Any]:
    out: dict[str, Any] = {}
    layers = getattr(config, "num_hidden_layers", None)
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            out[name] = {**_small(value), "model_type": value.model_type}
        elif isinstance(value, int | float) and not isinstance(value, bool) and name in TINY:
            out[name] = TINY[name]
        elif isinstance(value, float) and "drop" in name:
            out[name] = 0.0
        elif isinstance(value, list) and len(value) == layers:
            out[name] = [value[0], next((v for v in value if v != value[0]), value[0])]
    if "qk_rope_head_dim" in out:  # multi-head latent attention
        out |= {"num_key_value_heads": TINY["num_attention_heads"]}
        out |= {"head_dim": TINY["qk_rope_head_dim"]} if "head_dim" in out else {}
    if hasattr(config, "pad_token_id") or "vocab_size" in out:
        out |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if config.model_type == "funnel":
        out.pop("num_hidden_layers", None)  # that is the sum of its blocks
    return {**out, **OWN.get(config.model_type, {})}


@torch.no_grad()
def lively(model: nn.Module) -> None:
    """Redraw every weight, so that outputs differ visibly from token to token."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            module = model.get_submodule(name.rpartition(".")[0])
            # An embedding that its model scales starts as much smaller.
            scale = float(getattr(module, "embed_scale", 1)) if isinstance(module, nn.Embedding) else 1.0
            parameter.normal_(
                std=0.5 / scale if isinstance(module, nn.Embedding) else max(1, parameter[0].numel()) ** -0.5
            )
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)


MOST = 40_000_000  # parameters of a model that is tried
Row = dict[str, Tensor]
_PADDED = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class Subject:
    """One row of the table: a tiny model of a family, as one of transformers' auto classes builds it, and its inputs.

    Args:
        reads: "text", "pixels", "sound", or "both": text with images in it, no image in some rows and two in others.
    """

    name: str
    auto: str = "AutoModelForCausalLM"
    reads: str = "text"
    own: dict[str, Any] = field(default_factory=dict)

    def build(self, seed: int = 0) -> PreTrainedModel:
        """The model, in eval mode and without dropout."""
        auto, config = getattr(transformers, self.auto), config_of(self.name, **self.own)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            size = sum(parameter.numel() for parameter in auto.from_config(copy.deepcopy(config)).parameters())
        if size > MOST:
            raise ValueError(f"{size / 1e6:.0f} million parameters, as small as its configuration is made here")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = auto.from_config(config)
            lively(model)
        if (settings := getattr(model, "generation_config", None)) is not None:
            settings.eos_token_id = settings.forced_eos_token_id = None
        return cast(PreTrainedModel, model.eval())

    @property
    def generates(self) -> bool:
        return any(word in self.auto for word in ("CausalLM", "Seq2Seq", "TextToText"))

    def rows(self, model: PreTrainedModel) -> list[Row]:
        """Four rows by themselves, each a batch of one."""
        generator = torch.Generator().manual_seed(1)
        config = model.config
        rows: list[Row] = []
        for number, length in enumerate(LENGTHS):
            row: Row = {}
            if self.reads == "pixels":
                size = getattr(getattr(config, "vision_config", config), "image_size", TINY["image_size"])
                sizes = (size, size) if isinstance(size, int) else tuple(size)
                row["pixel_values"] = torch.randn(1, 3, *sizes, generator=generator)
            elif self.reads == "sound":
                frames = 2 * config.max_source_positions
                row["input_features"] = torch.randn(1, config.num_mel_bins, frames, generator=generator)
            else:
                ids = torch.randint(8, IMAGE, (1, length), generator=generator)
                if self.reads == "both":
                    ids, row = _with_images(config, ids, (2, 0, 1, 0)[number], generator)
                elif config.is_encoder_decoder and not self.generates:
                    ids[:, -1] = config.eos_token_id  # what such a classifier reads
                row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **row}
            if config.is_encoder_decoder and self.generates:
                row["decoder_input_ids"] = torch.randint(8, IMAGE, (1, 4), generator=generator)
            rows.append(row)
        return rows


def _with_images(config: Any, ids: Tensor, images: int, generator: torch.Generator) -> tuple[Tensor, Row]:
    """The row's ids with so many images before them, of unequal size where the family takes such, and their pixels."""
    vision = config.vision_config
    if hasattr(vision, "spatial_merge_size"):  # Qwen-VL: patches of all images one after another, in a grid each
        grids = [[1, 4, 4], [1, 2, 4]][:images]
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        parts = [h * w // vision.spatial_merge_size**2 for _, h, w in grids]
        pixels: Row = {
            "pixel_values": torch.randn(sum(h * w for _, h, w in grids), width, generator=generator),
            "image_grid_thw": torch.tensor(grids),
        }
    else:
        parts = [getattr(config, "mm_tokens_per_image", None) or config.image_seq_length] * images
        size = vision.image_size
        pixels = {"pixel_values": torch.randn(images, 3, size, size, generator=generator)}
    marks = [torch.tensor([[3] + [IMAGE] * n]) for n in parts]
    ids = torch.cat([*marks, ids], dim=1)
    kinds = (ids == IMAGE).long()
    name = {"gemma3": "token_type_ids", "llava": ""}.get(config.model_type, "mm_token_type_ids")
    return ids, {**({name: kinds} if name else {}), **(pixels if images else {})}


def batch_of(rows: Sequence[Row], pad: int, side: str) -> Row:
    """The rows as one batch, texts padded at one side."""
    width = max((row["input_ids"].shape[1] for row in rows if "input_ids" in row), default=0)
    out: Row = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        parts = [row[key] for row in rows if key in row]
        if key in _PADDED:
            fill = pad if key == "input_ids" else 0
            empty = [width - part.shape[1] for part in parts]
            places = [(0, n) if side == "right" else (n, 0) for n in empty]
            parts = [F.pad(part, place, value=fill) for part, place in zip(parts, places, strict=True)]
        out[key] = torch.cat(parts)
    return out


def _subjects(names: str, auto: str, reads: str = "text") -> list[Subject]:
    return [Subject(name, auto, reads) for name in names.split()]


_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_QWEN_VL = {
    "text_config": {
        **_TEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    },
    "image_token_id": IMAGE,
    "video_token_id": IMAGE + 1,
    "vision_start_token_id": 3,
    "vision_end_token_id": 4,
}
_QWEN_TOWER = {
    "num_heads": 4,
    "depth": 2,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}

SUBJECTS: dict[str, list[Subject]] = {
    "causal LM": _subjects(
        "llama llama4_text qwen2 qwen3 qwen3_moe qwen3_next qwen3_5_text gemma gemma2 gemma3_text gemma3n_text mistral "
        "ministral ministral3 mixtral phi phi3 phimoe granite granitemoe granitemoehybrid granite_swa olmo olmo2 olmo3 "
        "olmo_hybrid olmoe smollm3 deepseek_v2 deepseek_v3 glm glm4 glm4_moe glm4_moe_lite gpt_oss lfm2 lfm2_moe mamba "
        "mamba2 falcon_mamba falcon_h1 bamba jamba nemotron_h zamba2 recurrent_gemma rwkv cohere cohere2 exaone4 "
        "starcoder2 stablelm nemotron helium ernie4_5 ernie4_5_moe seed_oss hunyuan_v1_dense hunyuan_v1_moe apertus "
        "arcee bitnet diffllama doge minimax minimax_m2 jetmoe afmoe longcat_flash gpt2 gpt_neo gpt_neox gptj codegen "
        "bloom mpt falcon opt xglm biogpt gpt_bigcode persimmon modernbert-decoder qwen2_moe nanochat internlm3 "
        "vaultgemma solar_open flex_olmo gemma4_text dots1 youtu minicpm3",
        "AutoModelForCausalLM",
    ),
    "sequence classification": _subjects(
        "albert bert big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert electra ernie esm "
        "eurobert fnet funnel longformer mobilebert modernbert mpnet nomic_bert nystromformer rembert roberta "
        "roberta-prelayernorm roformer xlm-roberta xlm-roberta-xl xlnet",
        "AutoModelForSequenceClassification",
    ),
    "encoder-decoder": _subjects(
        "t5 mt5 umt5 longt5 switch_transformers bart mbart pegasus marian m2m_100 nllb-moe blenderbot plbart "
        "prophetnet t5gemma",
        "AutoModelForSeq2SeqLM",
    ),
    "image classification": _subjects(
        "vit beit dinov2 siglip clip swin convnext resnet", "AutoModelForImageClassification", "pixels"
    ),
    "multimodal, speech, other": [
        Subject(
            "gemma3",
            "AutoModelForImageTextToText",
            "both",
            {
                "text_config": {**_TEXT, "query_pre_attn_scalar": 8, "layer_types": _SLIDING, "sliding_window": 64},
                "vision_config": {**_TOWER, "image_size": 32, "patch_size": 8},
                "mm_tokens_per_image": 4,
                "image_token_index": IMAGE,
            },
        ),
        Subject(
            "llava",
            "AutoModelForImageTextToText",
            "both",
            {
                "text_config": {"model_type": "llama", **_TEXT},
                "vision_config": {"model_type": "clip_vision_model", **_TOWER, "image_size": 16, "patch_size": 8},
                "image_token_index": IMAGE,
                "image_seq_length": 4,
                "vision_feature_layer": -1,
            },
        ),
        Subject(
            "qwen2_5_vl",
            "AutoModelForImageTextToText",
            "both",
            {
                **_QWEN_VL,
                "vision_config": {
                    **_QWEN_TOWER,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "out_hidden_size": 32,
                    "fullatt_block_indexes": [1],
                    "window_size": 8,
                },
            },
        ),
        Subject(
            "qwen3_vl",
            "AutoModelForImageTextToText",
            "both",
            {
                **_QWEN_VL,
                "vision_config": {
                    **_QWEN_TOWER,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "out_hidden_size": 32,
                    "num_position_embeddings": 16,
                    "deepstack_visual_indexes": [0],
                },
            },
        ),
        Subject("whisper", "AutoModelForSpeechSeq2Seq", "sound"),
        Subject("dinov3_vit", "AutoModel", "pixels"),
    ],
}


def more() -> dict[str, list[Subject]]:
    """Subjects for all other model types of transformers that read texts or images."""
    kinds = {
        "CausalLM": ("CAUSAL_LM", "text"),
        "SequenceClassification": ("SEQUENCE_CLASSIFICATION", "text"),
        "Seq2SeqLM": ("SEQ_TO_SEQ_CAUSAL_LM", "text"),
        "ImageClassification": ("IMAGE_CLASSIFICATION", "pixels"),
    }
    seen = {subject.name for subjects in SUBJECTS.values() for subject in subjects}
    out: dict[str, list[Subject]] = {}
    for kind, (mapping, reads) in kinds.items():
        names = [n for n in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES") if n not in seen]
        seen |= set(names)
        out[f"more: {kind}"] = [Subject(name, f"AutoModelFor{kind}", reads) for name in names]
    return out


NAMES = {subject.name: subject for subjects in {**more(), **SUBJECTS}.values() for subject in subjects}
