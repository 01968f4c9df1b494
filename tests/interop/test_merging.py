"""Merged weights are the ones that PEFT merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tanzaku as tz
from close import assert_close
from interop.oracle import CONFIGS, PLAIN, both
from tanzaku.methods import METHODS

HEAD = {"modules_to_save": ["classifier"]}
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    **{
        f"{kind}-{name}": (kind, head, name, {})
        for kind, head in (("llama", "cls"), ("gpt2", "lm"), ("bart", "lm"), ("bert", "cls"))
        for name in ("lora", "adalora", "ia3")
    },
    # Each with PEFT's own default targets; what it merges at odds with its own forward pass is in test_differences. Of
    # norms PEFT leaves the head's wrapper where it was.
    # BEFT merges where modules have a bias.
    **{
        f"llama-{n}": ("llama", "cls", n, {})
        for n in CONFIGS
        if METHODS[n].mergeable and n not in ("ln_tuning", "beft")
    },
    "bert-beft": ("bert", "cls", "beft", {}),
    "rslora": ("llama", "lm", "lora", {"use_rslora": True, "r": 4}),
    "bias": ("bert", "cls", "lora", {"bias": "all"}),
    "embedding": ("llama", "lm", "lora", {"target_modules": ["embed_tokens"]}),
    "conv": ("vit", "cls", "lora", {"target_modules": ["projection", "fc1"], **HEAD}),
    "ia3-conv": (
        "vit",
        "cls",
        "ia3",
        {"target_modules": ["projection", "fc2"], "feedforward_modules": ["fc2"], **HEAD},
    ),
}


@pytest.mark.parametrize(("kind", "head", "name", "more"), CASES.values(), ids=CASES)
def test_merged_weights(kind: str, head: str, name: str, more: dict[str, Any], tmp_path: Path) -> None:
    base, theirs = both(kind, head, name, tmp_path, {**PLAIN[name], **more})
    tz.merge(base, "a")
    expected = theirs.merge_and_unload().state_dict()
    assert base.state_dict().keys() == expected.keys()
    for key, value in base.state_dict().items():
        assert_close(value, expected[key])
