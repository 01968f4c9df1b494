"""Law 11: losses and figures of every task are those of plain transformers, and do not depend on how rows are batched;
and law 1 for every task: a job among others ends as it does alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from variants import VARIANTS, method, sharing

from close import RUN, assert_close, close
from models import VOCAB, config_of, lively, with_parts
from tanzaku.methods import METHODS
from tanzaku.tasks import TASKS
from tanzaku.tasks.answer_choices import Reading
from tanzaku.tasks.choice import RankClassification
from tanzaku.tasks.classification import Classification
from tanzaku.tasks.generation import Generation
from tanzaku.tasks.multilabel import Multilabel
from tanzaku.tasks.ordinal import Ordinal
from tanzaku.tasks.regression import Regression
from tanzaku.tasks.sampling import Decoding
from tanzaku.tasks.seq2seq import Seq2Seq
from tanzaku.tasks.task import DECODED, Example, Split, Task, TaskData
from tanzaku.tasks.tokens import Tokens
from tanzaku.tasks.written import Row
from tanzaku.train.results import Job
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings
from task_data import rows
from tiers import in_families


class Numbers:
    """Of ids, the text that their numbers are."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return " ".join(map(str, ids))


# One of each, for rows of `task_data`, whose label depends on their last token.
EACH: dict[str, Task] = {
    "classification": Classification(("a", "b")),
    "ordinal": Ordinal(("a", "b")),
    "multilabel": Multilabel(("a", "b", "c")),
    "regression": Regression(10.0, 4.0),
    "tokens": Tokens(("x",), "words", True),
    "generation": Generation("pairs", {"prompt": "prompt"}, decoding=Decoding(max_new_tokens=3), tokenizer=Numbers()),
    "seq2seq": Seq2Seq(decoding=Decoding(max_new_tokens=3), tokenizer=Numbers()),
    "choice": RankClassification(Reading(choices="choices")),
}
OTHER_FAMILIES = {"generation": ["llama"], "seq2seq": ["bart", "t5"], "choice": ["llama"]}
FAMILIES_OF: dict[str, list[str]] = {name: OTHER_FAMILIES.get(name, ["llama", "bert"]) for name in EACH}


def first_of(name: str) -> str:
    return FAMILIES_OF[name][0]


every_task = pytest.mark.parametrize("name", TASKS)
CASES = [(name, kind) for name in TASKS for kind in FAMILIES_OF[name]]
every_family = pytest.mark.parametrize(("name", "kind"), CASES)


def split_of(name: str, number: int, seed: int) -> Split:
    split = rows(number, (4, 9, 3, 7), seed)
    if name in ("classification", "ordinal"):
        return split
    examples = []
    for example in split.examples:
        ids = list(example.inputs["input_ids"])
        if name == "multilabel":
            examples.append(Example(example.inputs, [at for at in range(3) if ids[-1] >> at & 1]))
        elif name == "generation":
            prompt = len(ids) - 2
            reference = Numbers().decode(ids[prompt:])
            labels = [-100] * prompt + ids[prompt:]
            examples.append(Example(example.inputs, reference, 2.0, about=Row(ids[:prompt], labels)))
        elif name == "seq2seq":
            # Some targets are as long as some sources, whole and with virtual tokens before them.
            target = [ids[-1], *ids[: (1, 6, 10)[len(examples) % 3]], 2]
            inputs = {**example.inputs, DECODED: target}
            examples.append(Example(inputs, Numbers().decode(target), float(len(target)), about=Row(ids, target)))
        elif name == "choice":
            # Two or three, of unequal length.
            names = ("low", "high", "never")[: 2 + len(ids) % 2]
            own = [{"input_ids": ids + answer} for answer in ([7, 9], [11], [7, 5, 13])[: len(names)]]
            right = names[ids[-1] > VOCAB // 2]
            examples.append(Example(own[0], right, about=names, others=own[1:], shared=len(ids)))
        elif name == "regression":
            examples.append(Example(example.inputs, 10.0 + ids[-1] / VOCAB * 8))
        else:
            found = [(at, at + 1, "x") for at, token in enumerate(ids) if token > VOCAB // 2]
            about = [(at, at, at + 1) for at in range(len(ids))]
            examples.append(Example(example.inputs, found, float(len(ids)), about=about))
    return Split("rows", examples, split.texts, 0, "rows")


def data_of(name: str) -> TaskData:
    return TaskData(split_of(name, 11, 0), split_of(name, 9, 1), split_of(name, 5, 2), EACH[name], 0)


def model_of(name: str, kind: str) -> Any:
    settings = EACH[name].model_settings()
    auto = getattr(transformers, EACH[name].auto_class)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Decoders' token classifiers drop out a tenth of what the head reads unless they are told.
        model = auto.from_config(config_of(kind, pad_token_id=0, classifier_dropout=0.0, **settings))
        lively(model)
    return model.eval()


def test_every_task_is_here() -> None:
    assert EACH.keys() == TASKS.keys()


@every_family
def test_loss_is_the_models_own(name: str, kind: str) -> None:
    """The mean over rows, or over tagged tokens, that transformers' model gives with `labels`."""
    task, model, split = EACH[name], model_of(name, kind), split_of(name, 6, 3)
    batch = task.collate(split.examples, 0)
    with torch.no_grad():
        if name == "choice":
            loss = sum(of_choices(model, example) for example in split.examples) / len(split.examples)
        else:
            [target] = batch.targets.values()
            shifted = {"shift_labels": target} if name == "generation" else {}
            loss = model(**{**batch.inputs, "labels": target, **shifted}).loss
        plain = task.writes or name == "choice"
        outputs = task.run(model, {**batch.inputs, "use_cache": False} if plain else batch.inputs)
        sums = task.score(outputs, batch)
    weight = sum(example.weight for example in split.examples)
    assert_close(sums.sum() / weight, loss)
    records = task.records(outputs, batch)
    assert task.figures(records)["loss"] == pytest.approx(loss.item(), rel=1e-5)


def of_choices(model: Any, example: Example) -> torch.Tensor:
    """The sum of T-Few's three losses of a row, by whole logits, one choice at a time."""
    right, means, wrong = example.about.index(example.target), [], []
    for at, row in enumerate(example.rows):
        ids = torch.tensor([row["input_ids"]])
        chances = model(input_ids=ids).logits[0].log_softmax(-1)
        begin = example.shared
        own = torch.stack([chances[place - 1, ids[0, place]] for place in range(begin, ids.shape[1])])
        means.append(own.mean())
        wrong += [] if at == right else [-(1 - token.exp()).log() for token in own]
    return -means[right] + torch.stack(wrong).mean() - torch.stack(means).log_softmax(0)[right]


@every_family
def test_figures_do_not_depend_on_batches(name: str, kind: str) -> None:
    found = []
    for size in (1, 4, 9):
        settings = TrainSettings(epochs=1, learning_rate=0.01, batch_size=2, eval_batch_size=size)
        [result] = train_jobs(model_of(name, kind), data_of(name), [Job("a", method("lora"), settings)], workers=1)
        assert result.error is None
        found.append(result)
    for other in found[1:]:
        assert_close(other.valid, found[0].valid, RUN)
        assert_close(other.test, found[0].test, RUN)


@in_families(("name", "kind"), sorted(CASES, key=lambda case: case[1] != first_of(case[0])), by=1)
def test_a_job_among_others_ends_as_it_does_alone(name: str, kind: str, tmp_path: Path) -> None:
    """Each with another batch size and accumulation: losses over tokens weigh every token alike."""

    def weights(jobs: list[Job], out: Path) -> dict[str, torch.Tensor]:
        model = model_of(name, kind)
        results = train_jobs(model, data_of(name), with_parts(model, jobs, out), out=out, workers=1)
        assert [(r.status, r.error) for r in results] == [("done", None)] * len(jobs)
        return load_file(out / "adapters" / jobs[0].name / "adapter_model.safetensors")

    def job(at: int, own: str) -> Job:
        changes = {"batch_size": 1 + at % 3, "accumulation": 1 + at % 2, "seed": at}
        settings = TrainSettings.model_validate({"epochs": 2, "learning_rate": 0.01, **changes})
        return Job(f"job-{at}", method(own, next(iter(VARIANTS[own]))), settings)

    jobs = [job(at, own) for at, own in enumerate(["lora", *sharing()])]
    alone, among = weights(jobs[:1], tmp_path / "alone"), weights(jobs, tmp_path / "among")
    assert alone.keys() == among.keys()
    for key, value in alone.items():
        assert_close(among[key], value, 4 * RUN, at=key)


def test_choices_of_a_row_are_dropped_out_by_their_job(tmp_path: Path) -> None:
    """Rows of a pass that are one row of a table: each job draws for its own, whoever is beside it."""

    def weights(jobs: list[Job], out: Path) -> dict[str, torch.Tensor]:
        model = model_of("choice", "llama")
        model.config.attention_dropout = 0.2
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.2
        results = train_jobs(model, data_of("choice"), jobs, out=out, workers=1)
        assert [(r.status, r.error) for r in results] == [("done", None)] * len(jobs)
        return load_file(out / "adapters" / "a" / "adapter_model.safetensors")

    def job(name: str, seed: int, dropout: float = 0.5) -> Job:
        settings = TrainSettings(epochs=2, learning_rate=0.01, batch_size=2, seed=seed)
        return Job(name, METHODS["lora"].from_settings({"r": 2, "lora_dropout": dropout}), settings)

    prompt = Job("c", method("prompt_tuning", "default"), TrainSettings(epochs=2, learning_rate=0.01, batch_size=3))
    alone = weights([job("a", 1)], tmp_path / "alone")
    among = weights([job("b", 2), job("a", 1), prompt], tmp_path / "among")
    other = weights([job("a", 1, 0.0)], tmp_path / "other")
    for key, value in alone.items():
        assert_close(among[key], value, 4 * RUN, at=key)
    assert not all(close(other[key], alone[key], 4 * RUN) for key in alone), "nothing was dropped"


@in_families("name", list(TASKS))
def test_every_method_learns_every_task(name: str, tmp_path: Path) -> None:
    """In steps of their own: the training loss falls."""
    settings = TrainSettings(epochs=12, learning_rate=0.02, batch_size=4)
    jobs = [Job(own, method(own, next(iter(VARIANTS[own]))), settings) for own in METHODS]
    model = model_of(name, first_of(name))
    for result in train_jobs(model, data_of(name), with_parts(model, jobs, tmp_path), workers=1):
        assert result.error is None, result.name
        first, *others = (epoch.train_loss for epoch in result.epochs)
        assert min(others) < first, result.name


@every_task
def test_accumulated_batches_weigh_rows_as_one_batch_does(name: str, tmp_path: Path) -> None:
    """Uneven batches, whose rows have losses over unequal numbers of tokens."""

    def weights(**changes: Any) -> dict[str, torch.Tensor]:
        settings = TrainSettings.model_validate(
            # Where a gradient is near 0, AdamW's step is its sign, which is rounding; unless epsilon is larger.
            {"epochs": 1, "learning_rate": 0.01, "shuffle": False, "adam_epsilon": 1e-2, **changes}
        )
        folder = tmp_path / str(changes["batch_size"])
        [result] = train_jobs(
            model_of(name, first_of(name)), data_of(name), [Job("a", method("lora"), settings)], out=folder
        )
        assert result.error is None and result.steps == 2
        return load_file(folder / "adapters/a/adapter_model.safetensors")

    once, often = weights(batch_size=6), weights(batch_size=2, accumulation=3)
    for key, value in once.items():
        assert_close(often[key], value, 4 * RUN, at=key)


@every_task
def test_a_row_of_weight_two_counts_as_two_rows(name: str, tmp_path: Path) -> None:
    """And one of weight 0 as none, whatever number the weights are multiplied with."""
    counts = [2, 1, 0, 1, 3, 1, 1, 0, 1, 2, 1]

    def weights(data: TaskData, out: str) -> dict[str, torch.Tensor]:
        settings = TrainSettings(epochs=3, learning_rate=0.01, batch_size=13, shuffle=False, adam_epsilon=1e-2)
        job = Job("a", method("lora"), settings)
        [result] = train_jobs(model_of(name, first_of(name)), data, [job], out=tmp_path / out, workers=1)
        assert result.error is None
        return load_file(tmp_path / out / "adapters/a/adapter_model.safetensors")

    data = data_of(name)
    rows = data.train.examples
    weighed = [replace(row, factor=0.1 * count) for row, count in zip(rows, counts, strict=True)]
    often = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
    repeated = replace(data.train, examples=often, texts=[""] * len(often))
    expected = weights(replace(data, train=repeated), "often")
    found = weights(replace(data, train=replace(data.train, examples=weighed)), "weighed")
    plain = weights(data, "plain")
    for key, value in expected.items():
        assert_close(found[key], value, 4 * RUN, at=key)
    assert not all(close(found[key], plain[key], 4 * RUN) for key in plain)


@every_family
def test_predictions_keep_all_that_figures_need(name: str, kind: str) -> None:
    """Also through JSON: a comparison that goes on after a kill computes nothing again."""
    task, model, split = EACH[name], model_of(name, kind), split_of(name, 9, 4)
    batch = task.collate(split.examples, 0)
    with torch.no_grad():
        records = task.records(task.run(model, batch.inputs), batch)
    if task.writes:
        records["text"] = [example.target for example in split.examples[1:]] + ["another"]
    kept = json.loads(json.dumps(task.predictions(records)))
    again = task.recorded(kept, split.examples)
    assert task.figures(again) == pytest.approx(task.figures(records), rel=1e-5)
    assert task.confusion(again) == task.confusion(records)
    assert [task.said(each, example) for each, example in zip(kept, split.examples, strict=True)]
