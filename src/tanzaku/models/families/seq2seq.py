"""Encoder-decoder models."""

from tanzaku.models.families.family import Family

T5 = Family(
    query="q",
    key="k",
    value="v",
    out="o",
    up="wi",
    down="wo",
    attention="SelfAttention",
)
MT5 = Family(**{**vars(T5), "gate": "wi_0", "up": "wi_1"})
BART = Family(
    query="q_proj",
    key="k_proj",
    value="v_proj",
    out="out_proj",
    up="fc1",
    down="fc2",
    attention="self_attn",
)

FAMILIES = {"t5": T5, "mt5": MT5, "bart": BART, "mbart": BART, "whisper": BART}
