"""One program text, run with HF PEFT and with its import line changed."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from transformers import PreTrainedModel

from close import GRADIENT, assert_close
from compat.program import CONFIGS, PROGRAM, ROWS, Run, run
from models import tiny
from tanzaku.compat.peft import PeftModel

OURS = "tanzaku.compat.peft"


@pytest.mark.parametrize("direct", [False, True], ids=["get_peft_model", "class"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_program_does_what_it_did(name: str, direct: bool, tmp_path: Path) -> None:
    text = PROGRAM.format(config=CONFIGS[name])
    theirs, ours = (
        run(library, text, tmp_path / library, tiny("llama", "cls", num_labels=2), direct=direct)
        for library in ("peft", OURS)
    )
    assert ours.printed.splitlines()[0] == theirs.printed.splitlines()[0], "the line of trainable parameters"
    assert ours.printed.startswith("trainable params: ")
    assert ours.names["called"] == theirs.names["called"]
    assert len(ours.logs) == len(theirs.logs) > 4
    for mine, other in zip(ours.logs, theirs.logs, strict=True):
        assert_close(mine, other, GRADIENT)
    for where in ("last", "checkpoint-4", "checkpoint-8"):
        mine, other = ours.tensors(where), theirs.tensors(where)
        # An untrained head was drawn at random: the adapter is saved with it.
        extra = {"base_model.model.score.weight"} if name == "llama_adapter" else set()
        assert mine.keys() - extra == other.keys()
        for key, tensor in other.items():
            assert_close(mine[key], tensor, GRADIENT)
    assert not all(torch.equal(a, b) for a, b in zip(ours.tensors("checkpoint-4").values(), mine.values(), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_files_go_both_ways(name: str, tmp_path: Path) -> None:
    text = PROGRAM.format(config=CONFIGS[name])
    rows = ours_and_theirs(text, tmp_path)
    collate = rows[OURS].names["collate"]
    batch = collate(ROWS.train.examples)
    batch.pop("labels")
    for writer, done in rows.items():
        trained = done.model.eval()(**batch).logits
        for reader in (peft.PeftModel, PeftModel):
            again = reader.from_pretrained(base_of(), done.folder / "last").eval()(**batch).logits
            assert_close(again, trained, GRADIENT, at=f"{reader} of {writer}'s")
            assert not torch.allclose(again, base_of()(**batch).logits, atol=1e-3)


def base_of() -> PreTrainedModel:
    return tiny("llama", "cls", num_labels=2)


def ours_and_theirs(text: str, folder: Path) -> dict[str, Run]:
    return {library: run(library, text, folder / library, base_of()) for library in ("peft", OURS)}
