"""LoRA's starts under PEFT's names: the same training, the same files."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import tanzaku.compat.peft as compat
from close import GRADIENT, assert_close
from compat.program import PROGRAM, ROWS, run
from interop.oracle import scatter
from models import VOCAB, tiny
from tanzaku.compat.peft import PeftModel
from tanzaku.compat.peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from tanzaku.errors import TanzakuError

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


# -- from data

LORA: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, VOCAB, (1, 40), generator=generator) for _ in range(6)]
    return [{"input_ids": each, "attention_mask": torch.ones_like(each), "labels": each} for each in ids]


def parts(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_data_that_is_shown_before(init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same functions of the program are called, and A and B start where PEFT's do."""

    def exact(matrix: Tensor, q: int = 6, niter: int = 2) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :q], s[:q], vh[:q].t()

    monkeypatch.setattr(torch, "svd_lowrank", exact)  # which is random, and so is PEFT's start
    given = rows()

    def made(library: Any) -> Any:
        base = tiny("llama", "lm")
        if init == "corda":
            about = library.tuners.lora.config.CordaConfig(corda_method="kpm")
            config = library.LoraConfig(**LORA, init_lora_weights=init, corda_config=about)
            preprocess = importlib.import_module(f"{library.__name__}.tuners.lora.corda").preprocess_corda
            preprocess(base, config, lambda: [base(**row) for row in given])
        else:
            about = library.LoraGAConfig(direction="ArBr", scale="gd_scale")
            config = library.LoraConfig(**LORA, init_lora_weights=init, lora_ga_config=about)
            library.preprocess_loraga(base, config, lambda: [base(**row).loss.backward() for row in given])
        return library.get_peft_model(base, config).eval()

    theirs, ours = made(peft), made(compat)
    found, expected = parts(ours), parts(theirs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name].abs(), value.abs(), GRADIENT)  # of singular vectors either sign is right
    batch = given[0]
    assert_close(ours(**batch).logits, tiny("llama", "lm")(**batch).logits)
    scatter([p for p in ours.parameters() if p.requires_grad])
    trained = ours(**batch).logits
    ours.save_pretrained(tmp_path)
    for reader in (peft, compat):
        again = reader.PeftModel.from_pretrained(tiny("llama", "lm"), tmp_path).eval()
        assert_close(again(**batch).logits, trained, GRADIENT)


def test_data_that_is_shown_after(tmp_path: Path) -> None:
    """Ranks go to where components explain more, in the program's own configuration, too; the file is PEFT's."""
    config = compat.LoraConfig(**LORA, init_lora_weights="eva", eva_config=compat.EvaConfig(rho=2.0))
    model = compat.get_peft_model(tiny("llama", "lm"), config)
    compat.initialize_lora_eva_weights(model, rows())
    theirs = peft.LoraConfig(**LORA, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0))
    other = peft.get_peft_model(tiny("llama", "lm"), theirs)
    peft.initialize_lora_eva_weights(other, rows(), show_progress_bar=False)
    assert config.rank_pattern and config.eva_config.rho == 2.0
    first = {name: value for name, value in parts(model).items() if "lora_A" in name}
    assert sum(len(a) for a in first.values()) == sum(len(a) for n, a in parts(other).items() if "lora_A" in n) == 12
    for name, a in first.items():  # the first component, whose direction few rows tell well
        there = parts(other)[name]
        assert abs(torch.cosine_similarity(a[0], there[0], dim=0)) > 0.9
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**rows()[0]).loss.backward()
    optimizer.step()
    assert any(value.any() for name, value in parts(model).items() if "lora_B" in name)
    trained = model.eval()(**rows()[0]).logits
    model.save_pretrained(tmp_path)
    for reader in (peft, compat):
        again = reader.PeftModel.from_pretrained(tiny("llama", "lm"), tmp_path).eval()
        assert_close(again(**rows()[0]).logits, trained, GRADIENT)


def test_what_shows_data_wrongly_says_so() -> None:
    base = tiny("llama", "lm")
    corda = compat.LoraConfig(**LORA, init_lora_weights="corda")
    with pytest.raises(TanzakuError, match=r"'corda' starts from data: preprocess_corda\(\) comes first"):
        compat.get_peft_model(base, corda)
    with pytest.raises(TanzakuError, match="expected a LoraConfig with init_lora_weights='lora_ga'"):
        compat.preprocess_loraga(base, corda, lambda: None)
    with pytest.raises(TanzakuError, match="no pass through"):
        compat.tuners.lora.corda.preprocess_corda(base, corda, lambda: None)
    with pytest.raises(TanzakuError, match="run_model must be specified"):
        compat.tuners.lora.corda.preprocess_corda(base, corda)
    compat.tuners.lora.corda.preprocess_corda(base, corda, lambda: base(**rows()[0]))
    other = compat.LoraConfig(**{**LORA, "r": 2}, init_lora_weights="corda")
    with pytest.raises(TanzakuError, match="was called with other settings than these"):
        compat.get_peft_model(base, other)
    with pytest.raises(TanzakuError, match="found cache_file='a'"):
        compat.tuners.lora.config.CordaConfig(cache_file="a")
    plain = compat.get_peft_model(tiny("llama", "lm"), compat.LoraConfig(**LORA))
    with pytest.raises(TanzakuError, match="can only be used with `init_lora_weights='eva'`"):
        compat.initialize_lora_eva_weights(plain, rows())
    assert all(p.requires_grad for p in base.parameters())
