"""Vision encoders."""

from tanzaku.families import Family

VIT = Family(
    lora=("q_proj", "v_proj"),
    adalora=("q_proj", "v_proj"),
    ia3=("k_proj", "v_proj", "fc2"),
    ia3_feedforward=("fc2",),
    attention="attention",
    positions="none",
)
CLIP = Family(
    lora=("q_proj", "v_proj"),
    adalora=("q_proj", "v_proj"),
    ia3=("k_proj", "v_proj", "fc2"),
    ia3_feedforward=("fc2",),
    positions="none",
)

FAMILIES = {"vit": VIT, "clip": CLIP, "clip_vision_model": CLIP, "clip_text_model": CLIP}
