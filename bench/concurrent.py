"""Training many candidates: all at once in Tanzaku, one after another with HF PEFT, on the same rows of the same model.

Both libraries take a batch of one row a step. HF PEFT is driven by a bare loop, which costs it less than Trainer would.
Loading the model does not count, nor attaching for HF PEFT; for Tanzaku attaching all but the first adapter does.
Rounds alternate between the two.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import tanzaku as tz
from bench.subjects import METHODS, ours, peft_stepper, theirs
from tanzaku.engine.memory import LiveBytes
from tanzaku.engine.onednn import available
from tanzaku.engine.products import fits, multiply
from tanzaku.models.families import Base
from tanzaku.tasks.classification import Classification, ClassificationSettings
from tanzaku.tasks.prepare import encode, read_tables
from tanzaku.tasks.task import Example, Split, TaskData
from tanzaku.train.results import Job, JobResult
from tanzaku.train.scheduler import Silent, train_jobs
from tanzaku.train.settings import TrainSettings

BOOK = [name for name in METHODS if name not in ("full", "head")]
SETTINGS = TrainSettings(epochs=1, batch_size=1, learning_rate=1e-4)


@dataclass(frozen=True)
class Candidate:
    """One candidate as each library has it."""

    name: str
    ours: Callable[[], tz.Method]
    theirs: Callable[[], Any]


def book() -> list[Candidate]:
    """The book's seven methods with its settings."""
    return [Candidate(name, lambda n=name: ours(n), lambda n=name: theirs(n)) for name in BOOK]  # type: ignore[misc]


def loras(number: int, r: int = 8) -> list[Candidate]:
    """So many LoRA candidates of one rank."""
    import peft

    return [
        Candidate(f"lora-{i}", lambda: tz.LoRA(r=r), lambda: peft.LoraConfig(r=r, task_type="SEQ_CLS"))
        for i in range(number)
    ]


def poems(number: int) -> TaskData:
    """The first training poems, as the embedded model reads them."""
    from importlib import resources

    from tanzaku.models.loading import load_tokenizer

    folder = resources.files("tanzaku") / "data" / "poems"
    settings = ClassificationSettings(train=str(folder / "train.tsv"), text="poem")
    data = encode(read_tables(Classification, settings), load_tokenizer("embedded"), 200)
    split = Split("train", data.train.examples[:number], data.train.texts[:number], 0, "")
    return replace(data, train=split)


def equal_rows(number: int, tokens: int, vocabulary: int) -> TaskData:
    """Random rows of one length."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (number, tokens), generator=generator).tolist()
    examples = [Example({"input_ids": row}, at % 2) for at, row in enumerate(ids)]
    return TaskData(Split("train", examples, [""] * number, 0, ""), None, None, Classification(("a", "b")))


def peft_seconds(model: PreTrainedModel, candidate: Candidate, data: TaskData) -> float:
    """HF PEFT over all rows, one a step."""
    # PEFT knows LLaMA-Adapter for Llama alone: there a random Llama of the embedded model's size stands in.
    fits = candidate.name != "llama_adapter" or model.config.model_type == "llama"
    stepper = peft_stepper(copy.deepcopy(model) if fits else llama_like(model), candidate.name, candidate.theirs())
    batches = [
        {
            "input_ids": torch.tensor([e.inputs["input_ids"]], device=model.device),
            "attention_mask": torch.ones(1, e.length, dtype=torch.long, device=model.device),
            "labels": torch.tensor([e.target], device=model.device),
        }
        for e in data.train.examples
    ]
    stepper.step(batches[0])
    wait(model)
    began = time.perf_counter()
    for batch in batches:
        stepper.step(batch)
    wait(model)
    return time.perf_counter() - began


def tanzaku_seconds(model: PreTrainedModel, candidates: Sequence[Candidate], data: TaskData, **options: Any) -> float:
    """Tanzaku over all rows, a row of every candidate in each step; `options` go to :func:`run`."""
    warm = Split("train", data.train.examples[:1], [""], 0, "")
    run(model, candidates, replace(data, train=warm), **options)
    return run(model, candidates, data, **options)


class FromStart(Silent):
    """Notes when the first job was attached and ready: a worker may train while another attaches."""

    began = math.inf

    def job_started(self, job: Job, result: JobResult, steps: int) -> None:
        self.began = min(self.began, time.perf_counter())


def run(
    model: PreTrainedModel,
    candidates: Sequence[Candidate],
    data: TaskData,
    workers: int | None = None,
    settings: TrainSettings = SETTINGS,
) -> float:
    """Train the candidates together; seconds since the first of them was attached."""
    clock = FromStart()
    jobs = [Job(c.name, c.ours(), settings.model_copy(update={"seed": i})) for i, c in enumerate(candidates)]
    results = train_jobs(model, data, jobs, rows_per_step=max(16, len(jobs)), observer=clock, workers=workers)
    wait(model)
    spent = time.perf_counter() - clock.began
    if failed := [f"{r.name}: {r.error}" for r in results if r.status != "done"]:
        raise RuntimeError("; ".join(failed))
    return spent


def wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def llama_like(model: PreTrainedModel) -> PreTrainedModel:
    """A random Llama of the embedded model's width and depth."""
    from bench.subjects import model_for

    return model_for("llama_adapter").to(model.device)


def race(
    model: PreTrainedModel, candidates: Sequence[Candidate], data: TaskData, rounds: int = 3
) -> tuple[float, float]:
    """(HF PEFT's seconds, one candidate after another; Tanzaku's, all at once): medians of rounds in turns."""
    warnings.filterwarnings("ignore")
    theirs_, ours_ = [], []
    for _ in range(rounds):
        theirs_.append(sum(peft_seconds(model, c, data) for c in candidates))
        ours_.append(tanzaku_seconds(model, candidates, data))
    return sorted(theirs_)[rounds // 2], sorted(ours_)[rounds // 2]


def peak_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of large square matrix products on this machine: the best of several, by the faster library."""
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    best = float("inf")
    for product in (torch.mm, lambda x, weight: multiply(x, weight, None, available() and fits(x))):
        for _ in range(10):
            began = time.perf_counter()
            product(a, a)
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best


def flops(model: PreTrainedModel, candidates: int, data: TaskData) -> float:
    """Of the products with frozen weights that the runs cannot do without: forward and backward of every own token."""
    inner = [m for m in Base.of(model).backbone.modules() if isinstance(m, nn.Linear)]
    weights = sum(m.weight.numel() for m in inner)
    return 4.0 * weights * candidates * sum(e.length for e in data.train.examples)


def table(rows: int = 20) -> None:
    """Print the Markdown tables of the concurrent run."""
    from tanzaku.models.loading import load_classifier

    model = load_classifier("embedded", 2)
    data = poems(rows)
    mean = sum(e.length for e in data.train.examples) / rows
    rate = peak_rate(model.device)
    print(f"{rows} poems of {mean:.0f} tokens on average; large matrix products: {rate / 1e9:.0f} GFLOP/s\n")
    head = ("candidates", "HF PEFT, one after another", "Tanzaku, at once", "times faster", "products, of that rate")
    print(f"| {' | '.join(head)} |")
    print("|---|---|---|---|---|")
    for name, candidates in (("the book's seven", book()), ("eight LoRA, r=8", loras(8))):
        peft, own = race(model, candidates, data)
        share = flops(model, len(candidates), data) / own / rate
        print(f"| {name} | {peft:.1f} s | {own:.1f} s | {peft / own:.2f} | {share:.0%} |", flush=True)


def curve(numbers: Sequence[int] = (1, 2, 4, 8, 16, 32), rows: int = 8) -> None:
    """Print time and memory a candidate, as their number grows in one process."""
    from tanzaku.models.loading import load_classifier

    model = load_classifier("embedded", 2)
    data = poems(rows)
    print("| LoRA candidates at once | ms a candidate's step | peak MiB of a step | MiB a candidate |")
    print("|---|---|---|---|")
    for number in numbers:
        seconds = tanzaku_seconds(model, loras(number), data, workers=1)
        step = peak_bytes(model, loras(number), data) / 2**20
        each = seconds / rows / number
        print(f"| {number} | {each * 1e3:.0f} | {step:.0f} | {step / number:.1f} |", flush=True)


def workers(rows: int = 20, rounds: int = 3) -> None:
    """Print seconds of eight LoRA in one process, in forks and in spawned processes, in turns."""
    from unittest import mock

    from tanzaku.models.loading import load_classifier
    from tanzaku.train.spawned import Spawned
    from tanzaku.train.workers import Forked

    model, data = load_classifier("embedded", 2), poems(rows)
    kinds = {"one process": (1, Forked), "two forks": (2, Forked), "two spawned": (2, Spawned)}
    took: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, (number, kind) in kinds.items():
            with mock.patch("tanzaku.train.scheduler.kind_of_workers", lambda _device, kind=kind: kind):
                began = time.perf_counter()
                run(model, loras(8), data, number)
                took[name].append(time.perf_counter() - began)
    print("| eight LoRA, r=8 | seconds |\n|---|---|")
    for name, seconds in took.items():
        print(f"| {name} | {sorted(seconds)[rounds // 2]:.1f} |", flush=True)


def peak_bytes(model: PreTrainedModel, candidates: Sequence[Candidate], data: TaskData) -> int:
    """Most bytes that tensors of a whole run hold, beside the model."""
    short = Split("train", data.train.examples[:2], ["", ""], 0, "")
    with LiveBytes() as live:
        run(model, candidates, replace(data, train=short), workers=1)  # other processes' tensors are not seen
    return live.peak
