"""Vision encoders."""

from tanzaku.models.families.family import Family

VIT = Family(
    query="q_proj",
    key="k_proj",
    value="v_proj",
    out="o_proj",
    up="fc1",
    down="fc2",
    attention="attention",
)
CLIP = Family(**{**vars(VIT), "out": "out_proj", "attention": "self_attn"})

FAMILIES = {"vit": VIT, "clip": CLIP, "clip_vision_model": CLIP, "clip_text_model": CLIP}
