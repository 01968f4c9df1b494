"""LoRA's starts under PEFT's names: the same training, the same files."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from close import GRADIENT, assert_close
from compat.program import PROGRAM, ROWS, run
from models import tiny
from tanzaku.compat.peft import PeftModel
from tanzaku.compat.peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

OURS = "tanzaku.compat.peft"
STARTS = {
    "pissa": "init_lora_weights='pissa', lora_alpha=3",
    "pissa-dora": "init_lora_weights='pissa', use_dora=True",
    "pissa-dropout": "init_lora_weights='pissa', lora_dropout=0.3",
    "pissa_niter": "init_lora_weights='pissa_niter_4'",
    "olora": "init_lora_weights='olora', use_rslora=True",
}


def products(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """B A at each module, and what else there is: of singular vectors either sign is right."""
    out = {key: tensor for key, tensor in tensors.items() if "lora_A" not in key and "lora_B" not in key}
    return out | {k: tensors[k.replace("lora_A", "lora_B")] @ a for k, a in tensors.items() if "lora_A" in k}


@pytest.mark.parametrize("name", STARTS)
def test_a_program_does_what_it_did(name: str, tmp_path: Path) -> None:
    text = PROGRAM.format(config=f"LoraConfig(task_type=TaskType.SEQ_CLS, r=2, {STARTS[name]})")
    runs = {
        library: run(library, text, tmp_path / library, tiny("llama", "cls", num_labels=2))
        for library in ("peft", OURS)
    }
    theirs, ours = runs.values()
    assert ours.printed.splitlines()[0] == theirs.printed.splitlines()[0]
    names = [name for name, _ in ours.model.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in theirs.model.named_parameters())
    for mine, other in zip(ours.logs, theirs.logs, strict=True):
        assert_close(mine, other, GRADIENT)
    mine, other = ours.tensors(), theirs.tensors()
    assert {k: t.shape for k, t in mine.items()} == {k: t.shape for k, t in other.items()} or name == "pissa_niter"
    assert ours.model.peft_config["default"].to_dict()["init_lora_weights"] == STARTS[name].split("'")[1]
    batch = ours.names["collate"](ROWS.train.examples)
    batch.pop("labels")
    plain = tiny("llama", "cls", num_labels=2)(**batch).logits
    for writer, done in runs.items():
        trained = done.model.eval()(**batch).logits
        assert not torch.allclose(trained, plain, atol=1e-2)
        if name == "pissa_niter" and writer == "peft":
            continue  # which draws another start when it is read
        for reader in (peft.PeftModel, PeftModel):
            again = reader.from_pretrained(tiny("llama", "cls", num_labels=2), done.folder / "last").eval()
            assert_close(again(**batch).logits, trained, GRADIENT, at=f"{reader} of {writer}'s")
    if name != "pissa_niter":
        assert_close(products(mine), products(other), GRADIENT)


@pytest.mark.parametrize("name", STARTS)
def test_a_checkpoint_is_gone_on_with(name: str, tmp_path: Path) -> None:
    """Of a start that is drawn, too: what Trainer saves has where it was."""
    config = f"LoraConfig(task_type=TaskType.SEQ_CLS, r=2, {STARTS[name]})"
    done = run(OURS, PROGRAM.format(config=config), tmp_path, tiny("llama", "cls", num_labels=2))
    batch = done.names["collate"](ROWS.train.examples)
    torch.manual_seed(1)
    made = done.names["get_peft_model"](tiny("llama", "cls", num_labels=2), eval(config, done.names)).train()
    before = list(made.parameters())
    made.load_adapter(done.folder / "last", "default", is_trainable=True)
    assert all(a is b for a, b in zip(made.parameters(), before, strict=True))  # an optimizer holds them
    model = done.model.eval()
    assert_close(made.eval()(**batch).logits, model(**batch).logits)
    if name != "pissa_niter":
        again = done.names["get_peft_model"](tiny("llama", "cls", num_labels=2), eval(config, done.names)).eval()
        set_peft_model_state_dict(again, get_peft_model_state_dict(model))
        assert_close(again(**batch).logits, model(**batch).logits)
    # Merged into the base's own weights, which stay as they were where it is off.
    with made.disable_adapter():
        assert_close(made(**batch).logits, tiny("llama", "cls", num_labels=2)(**batch).logits)
    assert_close(made.merge_and_unload()(**batch).logits, model(**batch).logits, GRADIENT)
