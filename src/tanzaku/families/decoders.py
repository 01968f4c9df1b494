"""Decoder-only language models."""

from tanzaku.families import Family

_QV = ("q_proj", "v_proj")

_TRIM = ("self_attn.o_proj", "mlp")

LLAMA = Family(lora=_QV, adalora=_QV, ia3=("k_proj", "v_proj", "down_proj"), ia3_feedforward=("down_proj",), trim=_TRIM)
QWEN2 = Family(lora=_QV, adalora=_QV, ia3=("q_proj", "v_proj", "down_proj"), ia3_feedforward=("down_proj",), trim=_TRIM)
GEMMA3 = Family(
    lora=_QV,
    adalora=_QV,
    ia3=("q_proj", "v_proj", "down_proj"),
    ia3_feedforward=("down_proj",),
    key_norm="k_norm",
    trim=_TRIM,
)
PHI = Family(
    lora=("q_proj", "v_proj", "fc1", "fc2"),
    adalora=_QV,
    ia3=("q_proj", "v_proj", "fc2"),
    ia3_feedforward=("fc2",),
)
PHI3 = Family(
    lora=("qkv_proj",),
    adalora=("qkv_proj",),
    ia3=("qkv_proj", "down_proj"),
    ia3_feedforward=("down_proj",),
    fused="qkv_proj",
)
GPT2 = Family(
    lora=("c_attn",),
    adalora=("c_attn",),
    ia3=("c_attn", "mlp.c_proj"),
    ia3_feedforward=("mlp.c_proj",),
    attention="attn",
    fused="c_attn",
)
GPT_NEOX = Family(
    lora=("query_key_value",),
    adalora=("query_key_value",),
    ia3=("query_key_value", "dense_4h_to_h"),
    ia3_feedforward=("dense_4h_to_h",),
    attention="attention",
    fused="query_key_value",
)
OPT = Family(
    lora=_QV,
    adalora=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    ia3=("q_proj", "k_proj", "fc2"),
    ia3_feedforward=("fc2",),
    positions="mask",
)

FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": QWEN2,
    "qwen3": Family(**{**vars(QWEN2), "key_norm": "k_norm"}),
    "gemma": QWEN2,
    "gemma2": QWEN2,
    "gemma3_text": GEMMA3,
    "gemma3": GEMMA3,
    "phi": PHI,
    "phi3": PHI3,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "opt": OPT,
}
