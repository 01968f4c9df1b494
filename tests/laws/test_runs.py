"""Law 1 for whole runs: a job trained among others ends with the weights that it has when it is trained alone."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from bench import zoo
from safetensors.torch import load_file
from variants import CASES, VARIANTS, all_kinds, all_variants, bamboo, method, sharing

import tanzaku as tz
from close import RUN, assert_close
from interop.oracle import scatter
from models import tiny, with_parts
from tanzaku.core.manager import manager_of
from tanzaku.core.method import Method
from tanzaku.core.survey import sees_padding
from tanzaku.methods import METHODS
from tanzaku.models.families import Base
from tanzaku.train.results import Job
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings
from task_data import task
from tiers import in_families

BASE = {"epochs": 2, "learning_rate": 0.01, "batch_size": 2}


def settings(**changes):
    return TrainSettings(**{**BASE, **changes})


def company(variant: int = -1) -> list[Job]:
    """A job of each of a comparison's own methods that shares a batch, each with another pace, order and length of its
    own; of the method's last variant, or of its first, which fits every family."""
    names = [name for name in sharing() if METHODS[name].by_default]
    return [
        paced(f"other-{number}", method(name, list(VARIANTS[name])[variant]), number)
        for number, name in enumerate(names)
    ]


def paced(name: str, of: Method, number: int, **changes) -> Job:
    """A job with a pace, an order and a length of its own."""
    own = {"batch_size": 1 + number % 3, "epochs": 1 + number % 4, "seed": number, "accumulation": 1 + number % 2}
    return Job(name, of, settings(**{**own, **changes}))


def all_weights(model, jobs: list[Job], out: Path, **options) -> dict[str, dict[str, torch.Tensor]]:
    """Those of every job, after all have been trained."""
    config = model.config
    end = config.eos_token_id if config.is_encoder_decoder else None
    data = task((4, 9, 3, 7, 12), train=11, end=end, pad=config.pad_token_id or 0)
    results = train_jobs(model, data, with_parts(model, jobs, out), out=out, **options)
    assert [(r.status, r.error) for r in results] == [("done", None)] * len(jobs)
    return {job.name: load_file(out / "adapters" / job.name / "adapter_model.safetensors") for job in jobs}


def weights(model, jobs: list[Job], out: Path, **options) -> dict[str, torch.Tensor]:
    """The first job's."""
    return all_weights(model, jobs, out, **options)[jobs[0].name]


def assert_same_weights(among: dict[str, torch.Tensor], alone: dict[str, torch.Tensor]) -> None:
    """To roundings of the largest number of each tensor, or of what a few steps move: of a tensor without a gradient,
    such as a bias of keys that are not rotated, all of it is rounding."""
    assert alone.keys() == among.keys()
    for key, value in alone.items():
        assert_close(among[key], value, 4 * RUN, scale=5 * BASE["learning_rate"], at=key)


def assert_same_run(model_of, job: Job, tmp_path: Path, **options) -> None:
    alone = weights(model_of(), [job], tmp_path / "alone")
    variant = -1 if model_of().config.model_type == "llama" else 0
    assert_same_weights(weights(model_of(), [job, *company(variant)], tmp_path / "among", **options), alone)


# One run of all methods, whose jobs are then trained one by one.


@cache
def among_all_others(workers: int) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of every case's job from one run of them all."""
    with TemporaryDirectory() as folder:
        return all_weights(bamboo(num_labels=2), list(EVERY.values()), Path(folder), workers=workers)


# Where a gradient is near 0, AdamW's step is its sign, which is rounding; unless epsilon is larger.
EVERY = {
    (name, variant): paced(f"{name}-{variant}", method(name, variant), number, adam_epsilon=1e-5)
    for number, (name, variant) in enumerate(CASES)
}


@all_variants
def test_every_method_among_all_others(name, variant, tmp_path):
    job = EVERY[name, variant]
    assert_same_weights(among_all_others(1)[job.name], weights(bamboo(num_labels=2), [job], tmp_path))


@all_kinds
def test_every_method_in_a_worker_process(name, tmp_path):
    job = EVERY[name, next(iter(VARIANTS[name]))]
    assert_same_weights(among_all_others(2)[job.name], weights(bamboo(num_labels=2), [job], tmp_path))


DROPS = {
    "bert": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3},
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "opt": {"dropout": 0.3, "attention_dropout": 0.3},
    "t5": {"dropout_rate": 0.3},
    "bart": {"dropout": 0.3, "attention_dropout": 0.3, "activation_dropout": 0.3, "classifier_dropout": 0.3},
}
# A bias of keys that are not rotated changes no attention: its gradient is rounding, which Adam would blow up.
DROPPED = {name: paced(name, method(name), number, epochs=1, adam_epsilon=1e-5) for number, name in enumerate(METHODS)}


@cache
def among_all_that_drop(kind: str) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of every method's job from one run of them all, on a base with dropout."""
    model = tiny(kind, "cls", num_labels=2, **DROPS[kind])
    with TemporaryDirectory() as folder:
        return all_weights(model, list(DROPPED.values()), Path(folder))


@pytest.mark.parametrize("name", METHODS)
@in_families("kind", DROPS)
def test_a_base_with_dropout(kind, name, tmp_path):
    """The base draws dropout masks too, for hidden states and attention: each job's are its own."""
    model = tiny(kind, "cls", num_labels=2, **DROPS[kind])
    assert_same_weights(among_all_that_drop(kind)[name], weights(model, [DROPPED[name]], tmp_path))


@pytest.mark.parametrize("name", [name for name, each in METHODS.items() if each.uses_others])
def test_parts_that_drop(name, tmp_path):
    """An adapter that is made of others draws what their layers drop, also where nothing else in the batch draws."""
    model = bamboo(num_labels=2)
    uses = {}
    for number, part in enumerate(("one", "other")):
        tz.attach(model, tz.LoRA(r=2, lora_dropout=0.3), part, seed=number)
        scatter([p for _, p in manager_of(model).get(part).trained()])
        tz.save(model, part, tmp_path / part)
        uses[part] = tmp_path / part
    tz.detach(model)
    this = Job("this", METHODS[name].from_settings({"adapters": [*uses]}), settings(), uses=uses)
    beside = Job("beside", method("ia3"), settings(batch_size=3))

    def trained(jobs, out):
        train_jobs(bamboo(num_labels=2), task(train=11), jobs, out=out)
        return load_file(out / "adapters" / "this" / "adapter_model.safetensors")

    alone = trained([this], tmp_path / "alone")
    assert_same_weights(trained([beside, this], tmp_path / "among"), alone)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_that_drops(attention, tmp_path):
    def model_of():
        return bamboo(num_labels=2, attention_dropout=0.3, attn_implementation=attention)

    for name in ("prefix_tuning", "prompt_tuning", "lora", "llama_adapter"):
        assert_same_run(model_of, Job("this", method(name), settings(epochs=1)), tmp_path / name)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"accumulation": 3},
        {"batch_size": 5, "group_by_length": True},
        {"patience": 1, "restore_best": True, "epochs": 6, "learning_rate": 0.1},
        {"max_grad_norm": 0.1, "warmup": 0.3, "schedule": "cosine", "class_weights": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", [("lora", "dropout"), ("adalora", "default"), ("prompt_tuning", "default")], ids=str)
def test_settings_of_training(case, changes, tmp_path):
    job = Job("this", method(*case), settings(**changes))
    assert_same_run(lambda: bamboo(num_labels=2), job, tmp_path, rows_per_step=7)


def test_checkpointed_layers_draw_again_what_they_drew(tmp_path):
    """Recomputed layers of a base with dropout, beside jobs of the same kind."""

    def model_of():
        return tiny("bert", "cls", num_labels=2, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)

    plain = Job("this", method("lora"), settings())
    checkpointed = Job("this", method("lora"), settings(gradient_checkpointing=True))
    expected = weights(model_of(), [plain], tmp_path / "plain")
    others = [Job(j.name, j.method, j.settings.model_copy(update={"gradient_checkpointing": True})) for j in company(0)]
    found = weights(model_of(), [checkpointed, *others], tmp_path / "checkpointed")
    for key, value in expected.items():
        assert_close(found[key], value, RUN)


@pytest.mark.parametrize("rows_per_step", [1, 4, 1000])
def test_any_number_of_rows_a_step(rows_per_step, tmp_path):
    assert_same_run(
        lambda: bamboo(num_labels=2), Job("this", method("lora"), settings()), tmp_path, rows_per_step=rows_per_step
    )


@pytest.mark.parametrize("kind", ["fnet", "mobilebert", "convbert", "nystromformer", "xlnet", "deberta"])
def test_a_base_that_sees_padding(kind, tmp_path):
    """Its rows are padded with others' as they are alone. (DeBERTa does not see it, and has a dropout of its own.)"""

    def model_of():
        return zoo.Subject(kind, "AutoModelForSequenceClassification", own={"num_labels": 2}).build()

    assert sees_padding(Base.of(model_of())) == (kind != "deberta")
    this = Job("this", method("lora", "dropout"), settings(epochs=1))
    others = [
        Job(f"other-{number}", method(name, "default"), settings(batch_size=1 + number, seed=number))
        for number, name in enumerate(("lora", "ia3", "adalora"))
    ]
    alone = weights(model_of(), [this], tmp_path / "alone")
    among = weights(model_of(), [this, *others], tmp_path / "among")
    for key, value in alone.items():
        assert_close(among[key], value, 4 * RUN, at=key)


def test_the_table_of_variants_is_whole():
    assert {name for name, _ in CASES} == set(METHODS)
