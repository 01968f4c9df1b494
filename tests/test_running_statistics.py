"""Running statistics of a module that is an adapter's own are its own, too: used, trained, saved, merged with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tanzaku as tz
from close import assert_close, close
from models import batch, tiny


class Batched(nn.Module):
    """A head with a norm by running statistics, as vision and speech models have."""

    def __init__(self, size: int, labels: int):
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(size), nn.Linear(size, labels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.norm(x.flatten(0, -2)).view(x.shape))
        return out


def model_with_statistics(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = tiny("llama", num_labels=3)
    model.score = Batched(model.config.hidden_size, 3)
    return model.eval()


METHODS = {
    "lora": lambda: tz.LoRA(r=2, modules_to_save=["score"]),
    "head": lambda: tz.Head(),
    "full": lambda: tz.Full(),
    "prompt_tuning": lambda: tz.PromptTuning(num_virtual_tokens=2),
}


def trained(model: nn.Module, method: tz.Method, name: str = "a") -> dict[str, Tensor]:
    """What a batch is to an adapter that has seen others."""
    tz.attach(model, method, name, seed=1)
    tz.activate(model, name)
    inputs = batch(model)
    model.train()
    for _ in range(4):
        model(**inputs)
    model.eval()
    return inputs


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_they_are_used_saved_and_never_the_bases(name: str, tmp_path: Path) -> None:
    model = model_with_statistics()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    inputs = trained(model, METHODS[name]())
    seen = model(**inputs).logits
    tz.save(model, "a", tmp_path / "a")
    tz.activate(model, None)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not close(model(**inputs).logits, seen)

    other = model_with_statistics()
    tz.load(other, tmp_path / "a", "b")
    with tz.route(other, ["b"] * len(seen)):
        assert_close(other(**inputs).logits, seen)
    if name != "full":
        with tz.route(other, [None, *["b"] * (len(seen) - 1)]):
            mixed = other(**inputs).logits
        assert_close(mixed[1:], seen[1:])
        assert_close(mixed[:1], model(**inputs).logits[:1])


@torch.no_grad()
def test_rows_beside_others_move_their_own_alone() -> None:
    model = model_with_statistics()
    for name in "ab":
        tz.attach(model, METHODS["lora"](), name, seed=1)
    inputs = batch(model)
    model.train()
    with tz.route(model, ["a"] * (len(inputs["input_ids"]) - 1) + [None]):
        model(**inputs)
    moved = {name: model.get_submodule(f"tanzaku.{name}.score.norm").num_batches_tracked.item() for name in "ab"}
    assert moved == {"a": 1, "b": 0}


@torch.no_grad()
def test_merging_and_combining_take_them_along() -> None:
    model = model_with_statistics()
    inputs = trained(model, METHODS["lora"]())
    seen, before = model(**inputs).logits, model.score.norm.running_mean.clone()
    tz.combine(model, ["a"], "same", how="cat")
    with tz.route(model, ["same"] * len(seen)):
        assert_close(model(**inputs).logits, seen)
    tz.merge(model, "a")
    assert_close(model(**inputs).logits, seen)
    tz.unmerge(model)
    assert torch.equal(model.score.norm.running_mean, before)


def test_a_file_without_them_says_so(tmp_path: Path) -> None:
    model = model_with_statistics()
    trained(model, METHODS["lora"]())
    tz.save(model, "a", tmp_path / "a")
    tensors = {key: t for key, t in load_file(tmp_path / "a/adapter_model.safetensors").items() if "running" not in key}
    save_file(tensors, tmp_path / "a/adapter_model.safetensors")
    (tmp_path / "a/tanzaku.json").unlink()
    with pytest.warns(UserWarning, match=r"holds no .*running_mean.*the model's own is used"):
        tz.load(model_with_statistics(), tmp_path / "a", "b")


def test_files_go_both_ways_with_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=["score"])
    theirs = peft.get_peft_model(model_with_statistics(), config)
    inputs = batch(theirs)
    theirs.train()
    with torch.no_grad():
        for _ in range(3):
            theirs(**inputs)
        theirs.eval()
        expected = theirs(**inputs).logits
        theirs.save_pretrained(tmp_path / "theirs")
        ours = model_with_statistics()
        tz.load(ours, tmp_path / "theirs", "a")
        tz.activate(ours, "a")
        assert_close(ours(**inputs).logits, expected)
        tz.save(ours, "a", tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(model_with_statistics(), tmp_path / "ours").eval()
        assert_close(again(**inputs).logits, expected)


def test_the_wrapper_has_them_as_pefts_does(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from tanzaku.compat import peft as compat

    settings = {"task_type": "SEQ_CLS", "target_modules": ["q_proj"], "modules_to_save": ["score"]}
    theirs = peft.get_peft_model(model_with_statistics(), peft.LoraConfig(**settings))
    ours = compat.get_peft_model(model_with_statistics(), compat.LoraConfig(**settings))
    assert set(ours.state_dict()) == set(theirs.state_dict())
    inputs = batch(ours)
    ours.train()
    with torch.no_grad():
        for _ in range(3):
            ours(**inputs)
        ours.eval()
        expected = ours(**inputs).logits
        state = {key: value.clone() for key, value in ours.state_dict().items()}
        copy = compat.get_peft_model(model_with_statistics(), compat.LoraConfig(**settings)).eval()
        copy.load_state_dict(state)
        assert_close(copy(**inputs).logits, expected)
        ours.save_pretrained(tmp_path)
        again = compat.PeftModel.from_pretrained(model_with_statistics(), tmp_path).eval()
        assert_close(again(**inputs).logits, expected)
        again.load_adapter(tmp_path, "default")
        assert_close(again(**inputs).logits, expected)
        assert_close(ours.merge_and_unload()(**inputs).logits, expected)
