"""Encoder-decoder models."""

from tanzaku.families import Family

T5 = Family(
    lora=("q", "v"),
    adalora=("q", "k", "v", "o", "wi", "wo"),
    ia3=("k", "v", "wo"),
    ia3_feedforward=("wo",),
    attention="SelfAttention",
    query="q",
    key="k",
    value="v",
    positions="none",
)
BART = Family(
    lora=("q_proj", "v_proj"),
    adalora=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    ia3=("q_proj", "v_proj", "fc2"),
    ia3_feedforward=("fc2",),
    positions="embedding",
)

FAMILIES = {
    "t5": T5,
    "mt5": Family(
        **{
            **vars(T5),
            "adalora": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
            "ia3": ("k", "v", "wi_1"),
            "ia3_feedforward": (),
        }
    ),
    "bart": BART,
    "mbart": BART,
    "whisper": BART,
}
