"""Generated tokens are PEFT's, through a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from interop.oracle import CONFIGS, PLAIN, SOFT_PROMPTS, both, in_peft
from models import batch, tiny

DECODERS = ("llama", "gemma3", "gpt2", "opt")
ENCODER_DECODERS = ("t5", "bart")


def cases(*kinds: str) -> list[Any]:
    return [(kind, name) for kind in kinds for name in CONFIGS if name != "llama_adapter" or kind == "llama"]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("kind", "name"), cases(*DECODERS, *ENCODER_DECODERS))
def test_greedy_and_beams(kind: str, name: str, beams: int, tmp_path: Path) -> None:
    base, theirs = both(kind, "lm", name, tmp_path)
    given = batch(base, padding="left")
    given.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    ours = base.generate(**given, **options)
    if name in SOFT_PROMPTS and kind in DECODERS:
        # PEFT numbers the pads between a soft prompt and its row as positions, so padded rows are asked for alone.
        for row, mask in enumerate(given["attention_mask"].bool()):
            one = {key: value[row : row + 1, mask] for key, value in given.items()}
            expected = theirs.generate(**one, **options)[0, int(mask.sum()) :]
            assert torch.equal(ours[row, len(mask) :][: len(expected)], expected), f"row {row}"
        return
    assert torch.equal(ours, theirs.generate(**given, **options))


@pytest.mark.parametrize("name", SOFT_PROMPTS)
def test_padding_changes_what_peft_writes_after_a_soft_prompt(name: str) -> None:
    theirs = in_peft(tiny("llama", "lm"), name, PLAIN[name])
    given = batch(theirs.get_base_model(), padding="left")
    together = theirs.generate(**given, max_new_tokens=5, do_sample=False)[:, -5:]
    changed = []
    for row, mask in enumerate(given["attention_mask"].bool()):
        one = {key: value[row : row + 1, mask] for key, value in given.items()}
        changed.append(
            not torch.equal(theirs.generate(**one, max_new_tokens=5, do_sample=False)[0, -5:], together[row])
        )
    assert not changed[0] and any(changed[1:])
