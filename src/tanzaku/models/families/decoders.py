"""Decoder-only language models."""

from tanzaku.models.families.family import Family

_TRIM = ("self_attn.o_proj", "mlp")
_NOT_KEYS = ("query", "value", "down")  # what HF PEFT's (IA)3 scales in many families

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
QWEN = Family(**{**vars(LLAMA), "own": {"ia3": _NOT_KEYS}})
PHI = Family(
    query="q_proj",
    key="k_proj",
    value="v_proj",
    out="dense",
    up="fc1",
    down="fc2",
    attention="self_attn",
    own={"lora": ("query", "value", "up", "down"), "ia3": _NOT_KEYS},
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
    own={"adalora": ("query", "key", "value", "out", "up", "down"), "ia3": ("query", "key", "down")},
)

FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": QWEN,
    "qwen3": QWEN,
    "gemma": QWEN,
    "gemma2": QWEN,
    "gemma3_text": QWEN,
    "gemma3": QWEN,
    "phi": PHI,
    "phi3": PHI3,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "opt": OPT,
    # Found by structure, but for what HF PEFT takes there.
    "gpt_neo": Family(own={"ia3": _NOT_KEYS}),
    "gptj": Family(own={"ia3": _NOT_KEYS}),
    "llama4": Family(own={"ia3": _NOT_KEYS}),
    "llama4_text": Family(own={"ia3": _NOT_KEYS}),
    "nemotron_h": Family(own=dict.fromkeys(("lora", "adalora"), ("query", "key", "value", "out"))),
    "rwkv": Family(
        own={
            "lora": (
                *(
                    f"{part}.{name}"
                    for part in ("attention", "feed_forward")
                    for name in ("key", "value", "receptance")
                ),
                "attention.output",
            )
        }
    ),
}
