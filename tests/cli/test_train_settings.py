"""Every setting of training reaches the run: a recipe with another value of it, given as a flag, is another run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_kit import Tanzaku, results_of, write_tsv
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

from close import RUN, close
from tanzaku.errors import flag
from tanzaku.train.settings import TrainSettings

# Texts of unlike lengths, and of one label twice as many as of the other; they can be learned but not at once.
ROWS = [
    *(("warm", "mild"), ("the warm rain of the spring sea", "mild"), ("spring rain", "mild"), ("the sea", "mild")),
    *(
        ("warm wind of a spring", "mild"),
        ("cold rain", "mild"),
        ("cold", "harsh"),
        ("a cold wind of the winter", "harsh"),
    ),
    ("winter sea", "harsh"),
]
BASE: dict[str, Any] = {"epochs": 2, "batch_size": 2, "learning_rate": 0.05, "max_length": 12}
# Best in the first epoch by accuracy, in the third by the loss, and then worse.
WORSE: dict[str, Any] = {"epochs": 8, "learning_rate": 0.3, "schedule": "constant", "seed": 1}


def weights(out: Path) -> Any:
    return load_file(out / "adapters" / "lora" / "adapter_model.safetensors")


def result(*keys: str) -> Callable[[Path], Any]:
    return lambda out: [results_of(out)["jobs"][0][key] for key in keys]


# Field -> (another value, what else is set, what must be seen to differ: the trained weights, or something of the run).
CASES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "epochs": (3, {"schedule": "constant"}, weights),
    "max_steps": (4, {}, result("steps")),
    "learning_rate": (0.04, {}, weights),
    "batch_size": (3, {}, weights),
    "eval_batch_size": (1, {}, "rows in evaluation"),
    "weight_decay": (0.5, {}, weights),
    "schedule": ("cosine", {}, weights),
    "warmup": (0.5, {}, weights),
    "accumulation": (2, {}, weights),
    "max_grad_norm": (0.01, {"adam_epsilon": 0.1}, weights),
    "adam_beta1": (0.5, {}, weights),
    "adam_beta2": (0.5, {}, weights),
    "adam_epsilon": (0.1, {}, weights),
    "max_length": (4, {}, weights),
    "shuffle": (False, {}, weights),
    "group_by_length": (True, {}, weights),
    "class_weights": (True, {}, weights),
    "focal_gamma": (2.0, {}, weights),
    "seed": (1, {}, weights),
    "precision": ("bf16", {}, weights),
    "gradient_checkpointing": (True, {}, "calls of attention"),
    "metric": ("accuracy", WORSE, result("best_epoch")),
    "patience": (1, WORSE, result("epochs")),
    "restore_best": (True, WORSE, weights),
    "accelerations": ("none", {}, "calls of norms"),
    "tracker": ("tensorboard", {}, lambda out: len([*out.rglob("events.out.*")])),
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """What a run does that leaves no figure behind."""
    seen: dict[str, list[int]] = {"rows in evaluation": [], "calls of attention": [], "calls of norms": []}
    model, attention = LlamaForSequenceClassification.forward, LlamaAttention.forward
    norm = LlamaRMSNorm.forward

    def of_model(self: Any, input_ids: Any = None, **given: Any) -> Any:
        if not self.training:
            seen["rows in evaluation"].append(len(input_ids))
        return model(self, input_ids=input_ids, **given)

    def of_attention(self: Any, *args: Any, **given: Any) -> Any:
        seen["calls of attention"].append(1)
        return attention(self, *args, **given)

    def of_norm(self: Any, x: Any) -> Any:
        seen["calls of norms"].append(1)
        return norm(self, x)

    monkeypatch.setattr(LlamaRMSNorm, "forward", of_norm)
    monkeypatch.setattr(LlamaForSequenceClassification, "forward", of_model)
    monkeypatch.setattr(LlamaAttention, "forward", of_attention)
    return seen


@pytest.mark.parametrize("field", TrainSettings.model_fields)
def test_changing_this_field_changes_the_run(
    field: str, work: Path, tanzaku: Tanzaku, counted: dict[str, list[int]]
) -> None:
    """A new field fails here until it says by what it is seen."""
    value, given, seen = CASES[field]
    for name in ("train", "valid", "test"):
        write_tsv(work / f"{name}.tsv", ROWS)
    settings = {**BASE, **given}
    assert getattr(TrainSettings.model_validate(settings), field) != value
    found = []
    for out, changes in (("one", settings), ("two", {**settings, field: value})):
        flags = [
            word
            for name, each in changes.items()
            for word in ([flag(name if each else f"no_{name}")] if isinstance(each, bool) else [flag(name), each])
        ]
        for numbers in counted.values():
            numbers.clear()
        said = tanzaku("train", "recipe.yaml", "--out", out, "--allow", "duplicates-across-splits", *flags)
        assert (said.code, said.err) == (0, "")
        found.append(list(counted[seen]) if isinstance(seen, str) else seen(work / out))
    assert not close(found[0], found[1], RUN)
