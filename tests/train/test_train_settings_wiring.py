"""What settings of training mean beyond that they change something (tests/cli/test_train_settings.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tanzaku as tz
from close import RUN, assert_close, close
from models import tiny
from tanzaku.tasks.classification import Classification
from tanzaku.train.results import Job, JobResult
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings
from task_data import task

BASE = {"epochs": 1, "batch_size": 10, "learning_rate": 0.02, "schedule": "constant"}


def run(out: Path, method: tz.Method | None = None, model: Any = None, **settings: Any) -> tuple[JobResult, Any]:
    """A job's result, and its weights."""
    one = Job("a", method or tz.LoRA(r=2), TrainSettings.model_validate({**BASE, **settings}))
    [result] = train_jobs(tiny("llama", num_labels=2) if model is None else model, task(test=4), [one], out=out)
    assert result.status == "done", result.error
    return result, load_file(out / "adapters/a/adapter_model.safetensors")


def test_weight_decay_spares_biases_and_norms(tmp_path: Path) -> None:
    """One step: each matrix shrinks by its share, and a bias or a norm moves as without decay."""
    method = tz.LoRA(r=2, bias="all", modules_to_save=["score", "norm", "input_layernorm", "up_proj"])

    def model() -> Any:
        return tiny("llama", num_labels=2, attention_bias=True, mlp_bias=True)

    rate, decay = BASE["learning_rate"], 0.5
    start = run(tmp_path / "start", method, model(), learning_rate=1e-12)[1]
    plain = run(tmp_path / "plain", method, model())[1]
    found = run(tmp_path / "decayed", method, model(), weight_decay=decay)[1]
    spared = {key for key in plain if key.endswith("bias") or "norm" in key}
    assert {"bias" in key for key in spared} == {True, False} and len(spared) < len(plain)
    expected = {key: plain[key] - (0 if key in spared else rate * decay) * start[key] for key in plain}
    assert_close(found, expected, RUN)
    assert not any(close(plain[key], start[key], RUN) for key in spared), "all of them are trained"


SCRIPT = {  # figures of five epochs, of which the second is the best
    "loss": [0.9, 0.2, 0.4, 0.6, 0.8],
    **{name: [0.1, 0.8, 0.6, 0.4, 0.2] for name in ("accuracy", "roc_auc", "macro_f1")},
}


@pytest.mark.parametrize("metric", SCRIPT)
def test_the_best_epoch_is_the_best_by_the_metric(metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss is better where it is lower, all else where it is higher; all others say the opposite here."""
    expected = run(tmp_path / "two", epochs=2)[1]
    worst = {name: [1 - figure for figure in figures] for name, figures in SCRIPT.items()}
    script = iter([{**{n: f[at] for n, f in worst.items()}, metric: SCRIPT[metric][at]} for at in range(5)])
    last = {name: figures[-1] for name, figures in SCRIPT.items()}
    monkeypatch.setattr(Classification, "figures", lambda *_: next(script, last))
    result, weights = run(tmp_path / "best", epochs=5, metric=metric, patience=2, restore_best=True)
    assert (result.best_epoch, result.restored_epoch, len(result.epochs)) == (2, 2, 4)
    assert_close(weights, expected, RUN)


def test_evaluation_has_the_precision_of_the_run(tmp_path: Path) -> None:
    """As the passes of training have it: the same weights are judged otherwise in bf16."""
    (full, weights), (half, same) = (
        run(tmp_path / precision, learning_rate=1e-12, precision=precision) for precision in ("fp32", "bf16")
    )
    assert_close(same, weights)
    assert not close(half.predictions, full.predictions)
    assert not close(half.valid, full.valid)


class Batched(nn.Module):
    """A norm of hidden states by running statistics, which no transformer has but some vision and speech models do."""

    def __init__(self, size: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(size)
        self.norm.running_mean.add_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.flatten(0, -2))
        return out.view(x.shape)


@pytest.mark.parametrize("method", [tz.LoRA(r=2), tz.Full()], ids=lambda m: m.name)
def test_running_statistics_are_the_bases(method: tz.Method, tmp_path: Path) -> None:
    """A batch's rows are several jobs'; its mean and variance are nobody's, and would change the base."""
    model = tiny("llama", num_labels=2)
    model.model.layers[1].input_layernorm = Batched(model.config.hidden_size).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    together = run(tmp_path / "together", method, model, epochs=2)[1]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert_close(run(tmp_path / "apart", method, model, epochs=2, batch_size=1, accumulation=10)[1], together, RUN)


def test_so_many_steps_however_few_the_rows(tmp_path: Path) -> None:
    """Over and over the rows, in as many parts as there are epochs; where these are passes, it is the run of passes."""
    few = {"batch_size": 4, "epochs": 2, "schedule": "linear"}  # three batches a pass
    result, _ = run(tmp_path / "seven", max_steps=7, **few)
    assert result.steps == 7 and len(result.epochs) == 2 and result.epochs[1].learning_rate == 0
    halves = [run(tmp_path / str(at), max_steps=7, accumulation=at, **few)[0].steps for at in (1, 2)]
    assert halves == [7, 7], "a step may be of several batches"
    passes, expected = run(tmp_path / "passes", **few)
    same, found = run(tmp_path / "same", max_steps=6, **few)
    assert same.steps == passes.steps == 6
    assert_close(found, expected, RUN)
    with pytest.raises(ValueError, match=r"max_steps is 1, and epochs, .* 2; give --epochs 1 at most"):
        TrainSettings(max_steps=1, epochs=2)
