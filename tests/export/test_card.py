"""The model card: what it says, what it never says, and that other programs read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

import tanzaku as tz
from models import NEEDED, attach, tiny
from tanzaku.methods import METHODS
from tanzaku.storage.card import escaped

TRAINING = {
    "files": {"train": "poems.tsv", "valid": "more|poems.tsv"},
    "rows": {"train": 1200, "valid": 80},
    "settings": {"learning_rate": 0.001, "epochs": 3, "patience": None},
    "epochs": 3,
    "valid": {"loss": 0.51239, "accuracy": 0.75, "roc_auc": None, "macro_f1": 0.7},
    "test": None,
}
META = {
    "model": "org/base",
    "task": "classification",
    "labels": ["haiku", "<b>*tanka*</b>", "a|b"],
    "text": "text",
    "text_pair": None,
}


def saved(
    path: Path, method: tz.Method, head: str = "cls", meta: dict[str, Any] | None = None, training: Any = None
) -> str:
    model = tiny("llama", head)
    attach(model, method, "a", seed=0)
    tz.save(model, "a", path, meta=meta, training=training)
    return (path / "README.md").read_text(encoding="utf-8")


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_a_classifier_s_card(tmp_path: Path) -> None:
    text = saved(tmp_path / "a", tz.LoRA(r=2), meta=META, training=TRAINING)
    said = front(text)
    assert said["base_model"] == "org/base" and said["library_name"] == "peft"
    assert said["pipeline_tag"] == "text-classification" and "base_model:adapter:org/base" in said["tags"]
    assert "| train | 1,200 | poems.tsv |" in text and "| valid | 80 | more\\|poems.tsv |" in text
    assert "haiku, &lt;b&gt;\\*tanka\\*&lt;/b&gt;, a\\|b" in text
    assert "| rows of | accuracy | macro\\_f1 | loss |" in text and "| valid | 0.7500 | 0.7000 | 0.5124 |" in text
    assert "learning_rate: 0.001" in text and "patience" not in text and "r: 2" in text
    assert "tz.load(model" in text and "PeftModel.from_pretrained" in text and "num_labels=3" in text
    assert "vllm" not in text  # it reads no heads
    # The Hub's own reader.
    [result] = ModelCard(text).data.eval_results[:1]
    assert (result.task_type, result.dataset_name) == ("text-classification", "more|poems.tsv")
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.75)


@pytest.mark.parametrize("name", METHODS)
def test_who_can_load_it(name: str, tmp_path: Path) -> None:
    method = METHODS[name](**{**NEEDED, "prefix_tuning": {"num_virtual_tokens": 2}}.get(name, {}))
    text = saved(tmp_path / "a", method, "lm")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text(encoding="utf-8"))
    try:
        from peft import PeftConfig

        PeftConfig.from_pretrained(str(tmp_path / "a"))
        known = not config["peft_type"].startswith("TANZAKU_")
    except Exception:  # PEFT raises errors of several kinds for what it does not know
        known = False
    assert ("PeftModel.from_pretrained" in text) == known
    assert ("vllm serve" in text) == (name == "lora")
    assert front(text)["library_name"] == ("peft" if known else "tanzaku")
    assert "base_model" not in front(text)


def test_vllm_only_where_it_can(tmp_path: Path) -> None:
    assert "--max-lora-rank 16 " in saved(tmp_path / "a", tz.LoRA(r=12), "lm")
    assert "vllm" not in saved(tmp_path / "b", tz.LoRA(modules_to_save=["lm_head"]), "lm")
    assert "vllm" not in saved(tmp_path / "c", tz.LoRA(rank_pattern={"q_proj": 2}), "lm")


def test_nothing_of_the_machine(tmp_path: Path) -> None:
    base = tmp_path / "bamboo-grove" / "my-base"
    base.mkdir(parents=True)
    text = saved(tmp_path / "a", tz.LoRA(), meta={**META, "model": str(base)})
    assert "my-base" in text and "bamboo-grove" not in text and str(tmp_path) not in text
    assert "base_model" not in front(text) and '"BASE"' in text
    assert saved(tmp_path / "elsewhere", tz.LoRA(), meta={**META, "model": str(base)}) == text
    assert "google/gemma-3-270m" in saved(tmp_path / "b", tz.LoRA(), meta={"model": "embedded"})


def test_a_card_that_somebody_wrote_stays(tmp_path: Path) -> None:
    first = saved(tmp_path / "a", tz.LoRA(r=2))
    second = saved(tmp_path / "a", tz.LoRA(r=4))
    assert first != second and "r: 4" in second
    (tmp_path / "a" / "README.md").write_text(second + "By me.\n", encoding="utf-8")
    assert saved(tmp_path / "a", tz.LoRA(r=8)) == second + "By me.\n"
    (tmp_path / "a" / "README.md").unlink()
    assert "r: 8" in saved(tmp_path / "a", tz.LoRA(r=8))


@given(st.text())
def test_escaped_text_is_one_line_without_markup(text: str) -> None:
    out = escaped(text)
    assert "\n" not in out and "<" not in out and ">" not in out
    bare = out.replace("\\\\", "")
    for mark in "`*_[]|#":
        assert bare.count(mark) == bare.count("\\" + mark)


@pytest.mark.parametrize("meta", [{"labels": 3, "training": "x"}, {"model": None}])
def test_any_meta_is_kept(meta: dict[str, Any], tmp_path: Path) -> None:
    assert saved(tmp_path / "a", tz.LoRA(), meta=meta).startswith("---\n")
