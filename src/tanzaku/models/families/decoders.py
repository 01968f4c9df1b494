"""Decoder-only language models."""

from tanzaku.models.families.family import Family

_TRIM = ("self_attn.o_proj", "mlp")

LLAMA = Family(
    query="q_proj",
    key="k_proj",
    value="v_proj",
    out="o_proj",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
    attention="self_attn",
    trim=_TRIM,
)
PHI = Family(
    query="q_proj",
    key="k_proj",
    value="v_proj",
    out="dense",
    up="fc1",
    down="fc2",
    attention="self_attn",
)
PHI3 = Family(
    query="qkv_proj",
    key="qkv_proj",
    value="qkv_proj",
    out="o_proj",
    up="gate_up_proj",
    down="down_proj",
    attention="self_attn",
)
GPT2 = Family(
    query="c_attn",
    key="c_attn",
    value="c_attn",
    out="attn.c_proj",
    up="c_fc",
    down="mlp.c_proj",
    attention="attn",
)
GPT_NEOX = Family(
    query="query_key_value",
    key="query_key_value",
    value="query_key_value",
    out="attention.dense",
    up="dense_h_to_4h",
    down="dense_4h_to_h",
    attention="attention",
)
OPT = Family(
    query="q_proj",
    key="k_proj",
    value="v_proj",
    out="out_proj",
    up="fc1",
    down="fc2",
    attention="self_attn",
)

FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "gemma3": LLAMA,
    "phi": PHI,
    "phi3": PHI3,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "opt": OPT,
}
