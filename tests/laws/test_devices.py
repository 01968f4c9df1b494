"""The laws on a GPU, where there is one: what the CPU computes is computed there, in mixed batches and in shared steps.

On the CPU the same tests hold the CPU against itself, so that they are known to run.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from variants import attach, attached, bamboo, gradients, logits, losses, method, sharing, unlike

import tanzaku as tz
from close import GRADIENT, RUN, assert_close
from models import batch, with_parts
from tanzaku.core.manager import manager_of
from tanzaku.engine.memory import in_use
from tanzaku.methods import METHODS
from tanzaku.train.results import Job, JobResult
from tanzaku.train.scheduler import JobScheduler, train_jobs
from tanzaku.train.settings import TrainSettings
from task_data import task

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_gpu)])


@devices
def test_a_batch_of_all_methods(device):
    """Logits and gradients of every row are those that the CPU gives."""
    entries = [*sharing(), None]
    found = {}
    for place in ("cpu", device):
        model = bamboo()
        for name in sharing():
            attached(model, name)
        model.to(place)
        inputs = {key: value.to(place) for key, value in batch(model, rows=len(entries)).items()}
        out = logits(model, entries, inputs)
        each = losses(out.cpu())
        grads = {
            (name, key): gradient.cpu()
            for row, name in enumerate(sharing())
            for key, gradient in gradients(each[row], manager_of(model).get(name), retain=True).items()
        }
        found[place] = {"logits": out.cpu(), **grads}
    for key, value in found["cpu"].items():
        assert_close(found[device][key], value, GRADIENT, at=key)


@devices
@pytest.mark.parametrize("name", METHODS)
def test_a_file_of_one_device_is_one_of_the_other(name, device, tmp_path):
    there, here = bamboo().to(device), bamboo()
    attach(there, method(name), name, seed=1)
    tz.save(there, name, tmp_path / "adapter")
    tz.load(here, tmp_path / "adapter", name=name)
    inputs = batch(here, rows=2)
    expected = logits(here, [name, name], inputs)
    found = logits(there, [name, name], {key: value.to(device) for key, value in inputs.items()})
    assert_close(found.cpu(), expected, GRADIENT)


@devices
def test_merging_and_taking_out_again(device):
    model = bamboo().to(device)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attached(model, "lora")
    inputs = {key: value.to(device) for key, value in batch(model, rows=2).items()}
    expected = logits(model, ["lora", "lora"], inputs)
    tz.merge(model, "lora")
    assert_close(model(**inputs).logits, expected, GRADIENT)
    tz.unmerge(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def company(**settings) -> list[Job]:
    """A job of every method, full fine-tuning too; without a GPU, where other tests have them all, of every kind."""
    common = {"epochs": 2, "learning_rate": 0.01, "batch_size": 2, **settings}
    names = METHODS if torch.cuda.is_available() else unlike()
    return [Job(name, method(name), TrainSettings(**common)) for name in names]


def trained(device: str, jobs: list[Job], out: Path, **options) -> tuple[list[JobResult], dict[str, torch.Tensor]]:
    data = task((4, 9, 3, 7, 12), train=11, test=5)
    model = bamboo(num_labels=2).to(device)
    results = train_jobs(model, data, with_parts(model, jobs, out), out=out, workers=1, **options)
    assert [(r.status, r.error) for r in results] == [("done", None)] * len(jobs)
    weights = {}
    for job in jobs:
        for key, value in load_file(out / "adapters" / job.name / "adapter_model.safetensors").items():
            weights[f"{job.name}: {key}"] = value
    return results, weights


@devices
@pytest.mark.parametrize("checkpointed", [False, pytest.param(True, marks=pytest.mark.product)])
def test_candidates_end_as_they_end_alone(device, checkpointed, tmp_path):
    jobs = company(gradient_checkpointing=checkpointed)
    _, among = trained(device, jobs, tmp_path / "among")
    for job in jobs:
        _, alone = trained(device, [job], tmp_path / job.name)
        for key, value in alone.items():
            assert_close(among[key], value, RUN, at=key)


@devices
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(device, precision, tmp_path):
    if (device, precision) == ("cpu", "fp16"):
        pytest.skip("fp16 with its scaler is for GPUs")
    results, weights = trained(device, company(precision=precision), tmp_path)
    assert all(value.isfinite().all() for value in weights.values())
    assert all(r.test is not None and 0 <= r.test["accuracy"] <= 1 for r in results)


@devices
def test_a_limit_of_memory_holds(device, tmp_path):
    model = bamboo(num_labels=2).to(device)
    limit = in_use(model.device) + 2**29
    jobs = with_parts(model, company(), tmp_path)
    with JobScheduler(model, task(train=11), memory=limit, workers=1) as scheduler:
        scheduler.add(jobs)
        scheduler.run()
        assert [r.status for r in scheduler.results.values()] == ["done"] * len(company())
        assert all(r.step_bytes > 0 for r in scheduler.results.values())
    if device == "cuda":
        assert torch.cuda.max_memory_allocated() <= limit


@devices
def test_text_from_rows_of_many_adapters(device):
    model = bamboo(head="lm").to(device).eval()
    for name in sharing():
        attached(model, name)
    inputs = {key: value.to(device) for key, value in batch(model, rows=len(sharing())).items()}
    with tz.route(model, sharing()):
        together = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert together.device.type == device
    for row, name in enumerate(sharing()):
        with tz.route(model, [name]):
            one = {key: value[row : row + 1] for key, value in inputs.items()}
            alone = model.generate(**one, max_new_tokens=4, do_sample=False)
        assert torch.equal(together[row, : alone.shape[1]], alone[0])
