"""The Hub: what is uploaded is the adapter, and an adapter is found by a repository's name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import PreTrainedModel

from compat.test_model import wrapped
from models import batch, tiny
from tanzaku import TanzakuError
from tanzaku.compat import peft as compat
from tanzaku.compat.peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "tanzaku.json"]


@pytest.fixture
def uploaded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What an upload would send."""
    sent: dict[str, Any] = {"made": []}

    def create_repo(self: Any, repo_id: str, **kwargs: Any) -> Any:
        sent["made"].append((repo_id, kwargs))
        return type("Url", (), {"repo_id": repo_id})()

    def upload_folder(self: Any, *, folder_path: str, **kwargs: Any) -> str:
        sent.update(files=sorted(p.name for p in Path(folder_path).iterdir()), **kwargs)
        sent["card"] = ModelCard.load(Path(folder_path) / "README.md")
        return "done"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", lambda *_, **__: pytest.fail("past upload_folder"))
    return sent


@pytest.mark.parametrize("name", ["LoraConfig", "PromptTuningConfig"])
def test_the_adapter_alone_is_uploaded(name: str, uploaded: dict[str, Any]) -> None:
    more = {"num_virtual_tokens": 3} if name == "PromptTuningConfig" else {}
    model = get_peft_model(tiny("llama", "lm"), getattr(compat, name)(task_type="CAUSAL_LM", **more))
    assert model.push_to_hub("me/adapter", private=True, tags=["poems"], revision="refs/pr/1") == "done"
    assert uploaded["files"] == FILES and uploaded["repo_id"] == "me/adapter"
    assert uploaded["made"] == [("me/adapter", {"private": True, "exist_ok": True})]
    assert {"poems", "transformers"} <= set(uploaded["card"].data.tags)


def test_of_any_model(uploaded: dict[str, Any]) -> None:
    """Also of one that is no model of transformers."""
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    model.push_to_hub("me/adapter")
    assert uploaded["files"] == FILES and "transformers" not in uploaded["card"].data.tags


def test_what_the_base_writes_and_loads_is_out_of_reach() -> None:
    """By the base's own methods a wrapper would write the base, or put other adapters into it."""
    model = wrapped(compat, "LoraConfig(task_type='SEQ_CLS', r=2)")
    ours = {name for kind in PeftModel.__mro__[:-1] if kind is not nn.Module for name in vars(kind)}
    words = ("save", "load", "push", "adapter", "from_pretrained", "register_for")
    doubtful = {
        name
        for name in dir(PreTrainedModel)
        if any(word in name for word in words) and not name.startswith("_") and name not in dir(nn.Module)
    } - {"is_distributed_loading_by_transformers", "should_save_on_this_rank", "barrier_after_gathered_checkpoint_save"}
    assert doubtful >= {"push_to_hub", "save_pretrained", "get_adapter_state_dict", "disable_adapters"}
    for name in doubtful - ours - set(model.__dict__):
        with pytest.raises(AttributeError, match=f"has no {name!r}: it is of models without adapters"):
            getattr(model, name)


def test_cards(tmp_path: Path) -> None:
    base = tiny("llama", "lm")
    base.name_or_path = "somebody/base"
    base.add_model_tags(["own"])
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert {"base_model:adapter:somebody/base", "lora", "own", "transformers"} <= set(data.tags)
    assert (data.library_name, data.base_model, data.pipeline_tag) == ("peft", "somebody/base", "text-generation")
    (tmp_path / "README.md").write_text("---\nmeta: hello\n---\nmine\n")
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft" and card.data.to_dict()["meta"] == "hello" and "mine" in card.text


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, PeftModel]:
    """A repository in a Hub's cache, with a pickle that must not be read."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    model = wrapped(compat, "LoraConfig(task_type='SEQ_CLS', r=2)")
    commit = hashlib.sha1(b"x").hexdigest()
    root = tmp_path / "cache" / "models--me--adapter"
    (root / "refs").mkdir(parents=True)
    for revision in ("main", "v2"):
        (root / "refs" / revision).write_text(commit)
    model.save_pretrained(root / "snapshots" / commit)
    model.save_pretrained(root / "snapshots" / commit / "below")
    (root / "snapshots" / commit / "adapter_model.bin").write_bytes(b"a pickle")
    return str(tmp_path / "cache"), model


def test_an_adapter_on_the_hub(repository: tuple[str, PeftModel]) -> None:
    cache, model = repository
    given = batch(tiny("llama", "cls"))
    expected = model(**given).logits
    for options in ({}, {"revision": "v2"}, {"subfolder": "below"}, {"torch_device": "cpu", "device_map": {"": "cpu"}}):
        base = tiny("llama", "cls", num_labels=2)
        again = PeftModel.from_pretrained(base, "me/adapter", cache_dir=cache, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(again(**given).logits, expected)
        again.load_adapter("me/adapter", "other", cache_dir=cache, **options)
    assert PeftConfig.from_pretrained("me/adapter", cache_dir=cache).r == 2
    assert compat.helpers.check_if_peft_model("me/adapter") and not compat.helpers.check_if_peft_model("me/nothing")
    with pytest.raises(TanzakuError, match="no directory on this machine"):
        PeftModel.from_pretrained(tiny("llama", "cls"), "me/nothing", cache_dir=cache)
    with pytest.raises(TanzakuError, match="revison='v2', which is not supported"):
        PeftModel.from_pretrained(tiny("llama", "cls"), "me/adapter", revison="v2")


def test_auto_models(tmp_path: Path) -> None:
    """The base's class is the task's, or what the settings name of a library that is allowed."""
    base: PreTrainedModel = tiny("t5", "lm")
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig()).save_pretrained(tmp_path / "adapter")
    again = compat.AutoPeftModel.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
    assert type(again.get_base_model()) is type(base) and again.get_base_model().dtype == torch.bfloat16
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert config.task_type is None and config.auto_mapping["base_model_class"] == "T5ForConditionalGeneration"
    config.auto_mapping = {"parent_library": "os", "base_model_class": "system"}
    config.save_pretrained(tmp_path / "adapter")
    with pytest.raises(TanzakuError, match="'os' which is not in the import allowlist"):
        compat.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    config.task_type = "SEQ_2_SEQ_LM"
    config.save_pretrained(tmp_path / "adapter")
    with pytest.raises(TanzakuError, match="expected 'CAUSAL_LM'"):
        compat.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert compat.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
