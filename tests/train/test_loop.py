"""The training loop: what a job ends with, what it leaves alone, and how it stops."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tanzaku as tz
from close import GRADIENT, RUN, assert_close, close
from models import tiny
from tanzaku.storage.store import read_meta
from tanzaku.support.seeds import seed_of
from tanzaku.tasks.task import Example
from tanzaku.train.active_job import ActiveJob
from tanzaku.train.results import EpochRecord, Job, JobResult
from tanzaku.train.scheduler import JobScheduler, Silent, train_jobs
from tanzaku.train.settings import TrainSettings
from task_data import task

FAST = TrainSettings(epochs=2, learning_rate=0.02, batch_size=2)


def job(name: str = "lora", **settings: Any) -> Job:
    return Job(name, tz.LoRA(r=2), FAST.model_copy(update=settings))


def figures(result: JobResult) -> list[tuple[float, dict[str, float]]]:
    return [(record.train_loss, record.valid) for record in result.epochs]


def test_a_job_learns_and_leaves_the_base_bitwise_as_it_was() -> None:
    model = tiny("llama", num_labels=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    [result] = train_jobs(model, task(train=40, test=12), [job(epochs=6)])
    assert result.status == "done" and len(result.epochs) == 6
    assert result.epochs[-1].train_loss < 0.5 * result.epochs[0].train_loss
    assert result.steps == 6 * 20
    assert result.test is not None and result.test_intervals.keys() == {"accuracy"} and result.confusion is not None
    low, high = result.test_intervals["accuracy"]
    assert low < result.test["accuracy"] <= high
    assert sum(map(sum, result.confusion)) == 12 == len(result.predictions or [])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert tz.adapters(model) == [] and not model.training


def test_the_same_seed_gives_the_same_run_and_another_does_not() -> None:
    runs = [figures(train_jobs(tiny("llama", num_labels=2), task(), [job(seed=seed)])[0]) for seed in (3, 3, 4)]
    assert_close(runs[1], runs[0], RUN)
    assert not close(runs[2], runs[0], RUN)


def test_a_job_does_not_hang_on_the_jobs_before_it() -> None:
    alone = train_jobs(tiny("llama", num_labels=2), task(), [job("b", seed=1)])[0]
    after = train_jobs(tiny("llama", num_labels=2), task(), [job("a"), job("b", seed=1)], rows_per_step=1)[1]
    assert_close(figures(after), figures(alone), RUN)


def test_a_loss_that_is_no_number_ends_that_job_and_says_where() -> None:
    bad, good = train_jobs(
        tiny("llama", num_labels=2), task(), [job("bad", learning_rate=1e30, max_grad_norm=0.0), job("good")]
    )
    assert bad.status == "failed" and bad.error is not None
    assert "loss became" in bad.error and "step" in bad.error and "epoch" in bad.error
    assert good.status == "done"


def test_a_bad_setting_ends_that_job_alone() -> None:
    jobs = [Job("typo", tz.LoRA(target_modules=["q_prj"]), FAST), job("good")]
    bad, good = train_jobs(tiny("llama", num_labels=2), task(), jobs)
    assert bad.status == "failed" and "q_prj" in str(bad.error) and "q_proj" in str(bad.error)
    assert good.status == "done"


def test_names_must_differ() -> None:
    with pytest.raises(tz.TanzakuError, match="differ"):
        train_jobs(tiny("llama", num_labels=2), task(), [job(), job()])


@pytest.mark.parametrize("method", [tz.LoRA(r=2), tz.AdaLoRA(init_r=2, target_r=1)], ids=lambda m: m.name)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 2), (1, 4), (3, 1)])
def test_accumulated_batches_are_one_larger_batch(
    batch_size: int, accumulation: int, weighted: bool, method: tz.Method, tmp_path: Path
) -> None:
    """Also where batches of a step have unlike numbers of rows or classes, as seven rows in twos have."""
    found = []
    for size, number in ((batch_size, accumulation), (batch_size * accumulation, 1)):
        settings = {"batch_size": size, "accumulation": number, "class_weights": weighted, "adam_epsilon": 1e-3}
        one, out = Job("one", method, FAST.model_copy(update=settings)), tmp_path / str(number)
        [result] = train_jobs(tiny("llama", num_labels=2), task((6, 3, 8), train=7), [one], out=out)
        found.append((figures(result), load_file(out / "adapters/one/adapter_model.safetensors")))
    assert_close(found[0], found[1], RUN)


def test_no_seed_has_an_epoch_of_another() -> None:
    orders = set()
    with JobScheduler(tiny("llama", num_labels=2), task(train=20)) as scheduler:
        scheduler.add([job(f"seed{seed}", seed=seed, epochs=4) for seed in (-2, -1, 0, 1, 2)])
        scheduler._admit()
        for active in scheduler.active_jobs.values():
            rows = [row for batch in active._epochs() for row in batch.rows]
            orders |= {tuple(rows[at : at + 20]) for at in range(0, len(rows), 20)}
    assert len(orders) == 5 * 4 and all(sorted(order) == list(range(20)) for order in orders)


def test_seeds_are_the_same_on_every_machine() -> None:
    assert seed_of("order", 0, 1) == 8556750900509299915
    parts: list[tuple[int | str, ...]] = [("a", -1), ("a", -2), ("a", 2**70), ("b", -1), (1, 2, 3), (1, 23), (12, 3)]
    assert len({seed_of(*each) for each in parts}) == len(parts)
    assert all(0 <= seed_of(*each) < 2**63 for each in parts)


def test_gradient_checkpointing_changes_no_figure() -> None:
    plain, saved = (
        train_jobs(tiny("llama", num_labels=2), task(), [job(gradient_checkpointing=on)])[0] for on in (False, True)
    )
    for a, b in zip(plain.epochs, saved.epochs, strict=True):
        assert_close(a.train_loss, b.train_loss, GRADIENT)


def test_training_stops_when_the_metric_no_longer_improves() -> None:
    [result] = train_jobs(tiny("llama", num_labels=2), task(), [job(epochs=30, learning_rate=0.3, patience=2)])
    assert result.status == "done" and result.best_epoch is not None
    assert len(result.epochs) == result.best_epoch + 2 < 30


def test_the_best_epochs_weights_come_back() -> None:
    settings = {"epochs": 8, "learning_rate": 0.3, "restore_best": True, "metric": "loss", "seed": 2}
    data = task()
    data = replace(data, test=data.valid)
    [result] = train_jobs(tiny("llama", num_labels=2), data, [job(**settings)])
    assert result.best_epoch is not None and result.best_epoch < 8, "the task must get worse for this test"
    assert result.restored_epoch == result.best_epoch
    assert result.test is not None
    assert_close(result.test, result.epochs[result.best_epoch - 1].valid)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_class_weights_change_the_loss_of_uneven_classes(batch_size: int) -> None:
    plain, weighted = (
        train_jobs(tiny("llama", num_labels=2), task(train=9), [job(class_weights=on, batch_size=batch_size)])[0]
        for on in (False, True)
    )
    assert not close(plain.epochs[0].train_loss, weighted.epochs[0].train_loss, RUN)
    assert not close(
        plain.epochs[0].valid["loss"], weighted.epochs[0].valid["loss"], RUN
    )  # the weights learned from it
    assert plain.epochs[0].valid.keys() == {"loss", "accuracy", "roc_auc", "macro_f1"}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules_warm_up_and_end_where_they_should(schedule: str) -> None:
    rates: list[float] = []

    class Watch(Silent):
        def step_done(self, job: Job, step: int, steps: int, loss: float) -> None:
            rates.append(active_jobs[0].optimizer.param_groups[0]["lr"])

    active_jobs: list[ActiveJob] = []
    first = ActiveJob.__init__

    def spy(self: ActiveJob, *args: Any, **kwargs: Any) -> None:
        first(self, *args, **kwargs)
        active_jobs.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActiveJob, "__init__", spy)
        train_jobs(tiny("llama", num_labels=2), task(), [job(schedule=schedule, warmup=0.4)], observer=Watch())
    assert len(rates) == 10
    assert rates[0] == pytest.approx(0.02 / 4) and max(rates) == pytest.approx(0.02)
    assert rates[-1] == pytest.approx(0.02 if schedule == "constant" else 0.0, abs=1e-9)


def test_half_precision_of_base_and_arithmetic_trains() -> None:
    model = tiny("llama", num_labels=2).to(torch.bfloat16)
    [result] = train_jobs(model, task(), [job(precision="bf16")])
    assert result.status == "done" and all(math.isfinite(r.train_loss) for r in result.epochs)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("method", [tz.Full, tz.Head, tz.PrefixTuning, tz.PromptTuning])
def test_other_methods_train_in_bf16_too(method: type[tz.Method]) -> None:
    [result] = train_jobs(
        tiny("llama", num_labels=2).to(torch.bfloat16), task(), [Job("m", method(), job(precision="bf16").settings)]
    )
    assert result.status == "done", result.error


def test_finished_jobs_are_kept_when_a_run_is_interrupted(tmp_path: Path) -> None:
    class Stop(Silent):
        def epoch_done(self, job: Job, record: EpochRecord) -> None:
            if job.name == "second":
                raise KeyboardInterrupt

    jobs = [job("first"), job("second"), job("third")]
    model = tiny("llama", num_labels=2)
    results = train_jobs(model, task(), jobs, out=tmp_path, observer=Stop(), rows_per_step=1)
    assert [(r.name, r.status) for r in results] == [("first", "done"), ("second", "interrupted")]
    assert sorted(p.name for p in (tmp_path / "adapters").iterdir()) == ["first"]


def test_a_saved_adapter_predicts_what_the_job_did(tmp_path: Path) -> None:
    data = task(test=6)
    model = tiny("llama", num_labels=2)
    [result] = train_jobs(model, data, [job()], out=tmp_path, meta={"labels": ["a", "b"]})
    assert result.adapter is not None
    assert read_meta(tmp_path / result.adapter) == {"labels": ["a", "b"], "precision": "fp32"}
    tz.load(model, tmp_path / result.adapter, "mine")
    assert data.test is not None
    for example, expected in zip(data.test.examples, result.predictions or [], strict=True):
        with torch.no_grad(), tz.route(model, ["mine"]):
            logits = model(input_ids=torch.tensor([example.inputs["input_ids"]])).logits[0]
        assert_close(logits.softmax(-1).tolist(), expected)


def test_a_tracker_gets_every_epoch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_jobs(tiny("llama", num_labels=2), task(), [job(tracker="tensorboard")], out=tmp_path)
    [file] = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    assert {"train/loss", "valid/loss", "valid/accuracy"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("train/loss")) == 2


def test_a_base_that_passes_no_gradient_back_is_an_error_and_no_silent_training_of_the_head() -> None:
    model = tiny("llama", num_labels=2)
    model.model.norm.register_forward_hook(lambda module, args, out: out.detach())
    jobs = [job(), Job("head", tz.Head(), FAST), Job("prompt", tz.PromptTuning(num_virtual_tokens=2), FAST)]
    lora, head, prompt = train_jobs(model, task(), jobs)
    assert (lora.status, head.status, prompt.status) == ("failed", "done", "failed")
    assert "what lora trains at model.layers.0.self_attn.q_proj (Linear, Parameter)" in str(lora.error)
    assert "no gradient reaches what prompt_tuning trains at the tokens" in str(prompt.error)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("steps", "epochs", "accumulation"), [(12, 3, 1), (36, 5, 1), (18, 4, 2), (7, 7, 1)])
def test_so_many_steps_go_over_the_rows_evenly(steps: int, epochs: int, accumulation: int, shuffle: bool) -> None:
    """Parts with figures are no new beginnings: no row is trained on twice more often than another."""
    rows = [Example({"input_ids": [5, 6]}, 0) for _ in range(24)]
    settings = TrainSettings(
        max_steps=steps, epochs=epochs, batch_size=2, accumulation=accumulation, shuffle=shuffle, learning_rate=0.1
    )
    active = ActiveJob.__new__(ActiveJob)
    active.job = Job("one", tz.LoRA(), settings)
    active.data = SimpleNamespace(train=SimpleNamespace(examples=rows))  # type: ignore[assignment]
    active.generator, active.epoch, active.per_pass = torch.Generator(), 0, 12
    batches = [*active._epochs()]
    seen = Counter(row for batch in batches for row in batch.rows)
    assert sum(batch.ends_step for batch in batches) == steps and sum(batch.ends_epoch for batch in batches) == epochs
    counts = [seen[row] for row in range(24)]
    assert max(counts) - min(counts) <= 1 and sum(counts) == 2 * steps * accumulation
    # A job that goes on after a part has the batches that were left.
    active.epoch = 1
    assert [batch.rows for batch in active._epochs()] == [b.rows for b in batches][-len([*active._epochs()]) :]
