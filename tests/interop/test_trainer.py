"""Whole runs: Tanzaku's loop beside transformers' Trainer with PEFT, from the same weights over the same rows."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

import tanzaku as tz
from close import GRADIENT, assert_close
from interop.oracle import copy_trained, in_peft, inputs, method, trained_in_peft, trained_in_tanzaku
from models import tiny
from tanzaku.tasks.task import Batch, TaskData
from tanzaku.train.results import Job
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings
from task_data import as_transformers, task

TENSORS = "adapter_model.safetensors"


SETTINGS = TrainSettings(
    epochs=3,
    learning_rate=0.02,
    weight_decay=1.0,
    schedule="linear",
    warmup=4,
    max_grad_norm=1.0,
    shuffle=False,
    seed=7,
)
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2, "lora_alpha": 4},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "ia3": {},
}
PADDED, EQUAL = (5, 9, 3, 7), (6,)


class Recorded(Trainer):
    """Trainer that keeps the loss of every batch in training."""

    # Left to itself it takes a classifier's loss for one shared over the accumulated batches already, which it is not.
    loss_is_scaled_for_ga = False
    losses: list[float]
    rows: list[int]

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, *args, **kwargs)
        if model.training:
            self.losses.append(float(loss.detach()))
            self.rows.append(len(args[0]["labels"]))
        return loss


def trainer(model: nn.Module, given: TaskData, settings: TrainSettings, folder: Path) -> Recorded:
    """transformers' Trainer, told the same as `settings`."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=4,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        max_grad_norm=settings.max_grad_norm,
        gradient_accumulation_steps=settings.accumulation,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        logging_strategy="no",
    )
    run = Recorded(
        model=model,
        args=arguments,
        train_dataset=given.train.examples,
        eval_dataset=given.valid.examples if given.valid else None,
        data_collator=lambda examples: as_transformers(given.task.collate(examples, given.pad_token_id)),
    )
    run.losses, run.rows = [], []
    return run


def means(run: Recorded, epochs: int) -> list[float]:
    """Mean loss of the rows of each epoch."""
    size = len(run.losses) // epochs
    sums = [loss * rows for loss, rows in zip(run.losses, run.rows, strict=True)]
    return [sum(sums[i : i + size]) / sum(run.rows[i : i + size]) for i in range(0, len(sums), size)]


def started(base: PreTrainedModel, name: str, settings: TrainSettings, folder: Path) -> peft.PeftModel:
    """PEFT's model with the weights that a run of Tanzaku's starts from; they are also left in `folder`/start."""
    theirs = in_peft(base, name, METHODS[name])
    adapter = tz.attach(base, method(name, METHODS[name]), "start", seed=settings.seed)
    copy_trained(adapter, theirs)
    tz.save(base, "start", folder / "start")
    tz.detach(base)
    return theirs


def assert_same_tensors(ours: Path, theirs: Path, start: Path) -> None:
    """Files hold the same tensors, and none of them is what it was."""
    mine, other, before = (load_file(folder / TENSORS) for folder in (ours, theirs, start))
    assert mine.keys() == other.keys()
    for key in mine:
        assert_close(mine[key], other[key], GRADIENT, at=key)
        assert not torch.allclose(mine[key], before[key], atol=1e-3), f"{key} was not trained"


RUNS = {
    "lora-1": ("lora", 1, PADDED, {}),
    "lora-4-padded": ("lora", 4, PADDED, {}),
    "lora-accumulated": ("lora", 2, EQUAL, {"accumulation": 2, "epochs": 2, "max_grad_norm": 0.0}),
    "lora-cosine": ("lora", 4, PADDED, {"schedule": "cosine", "max_grad_norm": 0.05}),
    "prompt-1": ("prompt_tuning", 1, PADDED, {}),
    "prompt-4": ("prompt_tuning", 4, EQUAL, {}),
    "ia3-1": ("ia3", 1, PADDED, {}),
    "ia3-4-padded": ("ia3", 4, PADDED, {}),
}


@pytest.mark.parametrize(("name", "batch_size", "lengths", "more"), RUNS.values(), ids=RUNS)
def test_a_run_is_the_trainers(
    name: str, batch_size: int, lengths: tuple[int, ...], more: dict[str, Any], tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"batch_size": batch_size, **more})
    given = task(lengths)
    base = tiny("llama", "cls", num_labels=2)
    theirs = started(base, name, settings, tmp_path)

    [result] = train_jobs(base, given, [Job("ours", method(name, METHODS[name]), settings)], out=tmp_path)
    run = trainer(theirs, given, settings, tmp_path / "trainer")
    run.train()
    theirs.save_pretrained(tmp_path / "theirs")

    assert result.status == "done", result.error
    assert result.steps == run.state.global_step
    assert_close([record.train_loss for record in result.epochs], means(run, settings.epochs), GRADIENT)
    assert result.adapter is not None
    assert_same_tensors(tmp_path / result.adapter, tmp_path / "theirs", tmp_path / "start")


@pytest.mark.parametrize("name", METHODS)
def test_figures_of_an_epoch_are_the_trainers(name: str, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"batch_size": 2, "epochs": 2})
    given = task(EQUAL)
    base = tiny("llama", "cls", num_labels=2)
    theirs = started(base, name, settings, tmp_path)
    [result] = train_jobs(base, given, [Job("ours", method(name, METHODS[name]), settings)])
    run = trainer(theirs, given, settings, tmp_path / "trainer")
    run.train()
    assert given.valid is not None
    predicted = run.predict(given.valid.examples)
    scores = torch.tensor(predicted.predictions)
    rows = Batch({}, {"target": torch.tensor(predicted.label_ids)}, given.valid.examples)
    expected = given.task.figures(given.task.records(SimpleNamespace(logits=scores), rows))
    assert_close(result.epochs[-1].valid, expected, GRADIENT)
    assert_close(result.epochs[-1].valid["loss"], predicted.metrics["test_loss"], GRADIENT)
    assert {"accuracy", "roc_auc"} <= expected.keys()


@pytest.mark.parametrize("name", METHODS)
def test_any_trainer_trains_an_active_adapter(name: str, tmp_path: Path) -> None:
    """Trainer over a model with an active adapter, without PEFT, does what it does over a PEFT model."""
    settings = SETTINGS.model_copy(update={"batch_size": 2, "epochs": 2})
    given = task(EQUAL)
    base = tiny("llama", "cls", num_labels=2)
    before = copy.deepcopy(base.state_dict())
    theirs = started(base, name, settings, tmp_path)
    tz.attach(base, method(name, METHODS[name]), "ours", seed=settings.seed)
    tz.activate(base, "ours")
    runs = [trainer(model, given, settings, tmp_path / "trainer") for model in (base, theirs)]
    for run in runs:
        run.train()
    assert_close(runs[0].losses, runs[1].losses, GRADIENT)
    tz.save(base, "ours", tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs", tmp_path / "start")
    tz.activate(base, None)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


BUDGETS = {
    "integer": {"init_r": 4, "target_r": 2},
    "fraction": {"init_r": 2, "target_r": 0.5},
    "every-second-step": {"init_r": 4, "target_r": 1, "deltaT": 2},
    "warm-and-final": {"init_r": 4, "target_r": 1, "deltaT": 2, "tinit": 2, "tfinal": 3},
    "smoothing": {"init_r": 3, "target_r": 0.7, "tinit": 1, "tfinal": 2, "beta1": 0.5, "beta2": 0.99},
}


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_adalora_prunes_as_pefts_does(budget: dict[str, Any]) -> None:
    """Masks and weights after every step, with PEFT's `update_and_allocate` called as its documentation says."""
    steps = 10
    settings = {**budget, "total_step": steps, "orth_reg_weight": 0.3}
    base = tiny("llama", "cls")
    given = inputs(base, "adalora")
    labels = torch.arange(len(given["input_ids"])) % 3
    theirs = in_peft(base, "adalora", settings)
    adapter = tz.attach(base, method("adalora", settings), "a", seed=0)
    copy_trained(adapter, theirs)
    their_trained, our_trained = trained_in_peft(theirs), trained_in_tanzaku(adapter)
    tz.activate(base, "a")
    adapter.method.prepare(adapter, steps)
    optimizers = [torch.optim.AdamW(trained.values(), lr=0.02) for trained in (our_trained, their_trained)]
    patterns = []
    for step in range(1, steps + 1):
        penalty = adapter.method.penalty(adapter)
        assert penalty is not None
        ours_loss = base(**given, labels=labels).loss + penalty
        theirs_loss = theirs(**given, labels=labels).loss  # PEFT's model adds its penalty itself
        assert_close(ours_loss, theirs_loss, GRADIENT)
        for loss, optimizer in zip((ours_loss, theirs_loss), optimizers, strict=True):
            loss.backward()
            optimizer.step()
        adapter.method.after_step(adapter, step)
        theirs.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        ours_pattern = adapter.method.rank_pattern
        pattern = theirs.peft_config["default"].rank_pattern
        named = pattern and {key.replace(".default", ""): kept for key, kept in pattern.items()}
        assert ours_pattern == named, f"step {step}"
        patterns.append(named)
        for key, parameter in our_trained.items():
            assert_close(parameter, their_trained[key], GRADIENT, at=key)
    left = sum(sum(kept) for kept in patterns[-1].values())
    assert left == int(settings["target_r"] * len(patterns[-1])), "the last budget was reached"
    if settings.get("tinit"):
        assert not any(patterns[: settings["tinit"]]), "nothing is cut before tinit"
