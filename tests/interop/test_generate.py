"""Generated tokens are PEFT's, through a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from interop.oracle import CONFIGS, PLAIN, SOFT_PROMPTS, both, in_peft, in_reach
from models import batch, tiny
from tiers import in_families

DECODERS = ("llama", "gemma3", "gpt2", "opt")
ENCODER_DECODERS = ("t5", "bart")


def cases(*kinds: str) -> list[Any]:
    left_out = ("gpt2", "llama_adapter")
    return [(k, name) for k in kinds for name in CONFIGS if in_reach(k, name) and (k, name) != left_out]


def written(model: PreTrainedModel | peft.PeftModel, given: dict[str, Tensor], **options: Any) -> Tensor:
    """What is generated for each row, without the row itself."""
    out: Tensor = model.generate(**given, **options)
    return out if model.config.is_encoder_decoder else out[:, given["input_ids"].shape[1] :]


@pytest.mark.parametrize("beams", [1, 3])
@in_families(("kind", "name"), cases(*DECODERS, *ENCODER_DECODERS))
def test_greedy_and_beams(kind: str, name: str, beams: int, tmp_path: Path) -> None:
    # Beams of random models may be as likely as each other but for rounding.
    base, theirs = (model.double() for model in both(kind, "lm", name, tmp_path))
    given = batch(base, padding="left")
    given.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    if name not in SOFT_PROMPTS:
        assert torch.equal(base.generate(**given, **options), theirs.generate(**given, **options))
        return
    # In PEFT the pads between a soft prompt and its row take positions, in a T5 too: padded rows are asked for alone.
    ours = written(base, given, **options)
    for row, mask in enumerate(given["attention_mask"].bool()):
        one = {key: value[row : row + 1, mask] for key, value in given.items()}
        expected = written(theirs, one, **options)[0]
        assert torch.equal(ours[row, : len(expected)], expected), f"row {row}"


@pytest.mark.parametrize("name", SOFT_PROMPTS)
def test_padding_changes_what_peft_writes_after_a_soft_prompt(name: str) -> None:
    theirs = in_peft(tiny("llama", "lm"), name, PLAIN[name])
    given = batch(theirs.get_base_model(), padding="left")
    options = {"max_new_tokens": 5, "do_sample": False}
    together = written(theirs, given, **options)
    changed = []
    for row, mask in enumerate(given["attention_mask"].bool()):
        one = {key: value[row : row + 1, mask] for key, value in given.items()}
        changed.append(not torch.equal(written(theirs, one, **options)[0], together[row]))
    assert not changed[0] and any(changed[1:])
