"""Adapters as files: loading, switching, the fiftieth adapter, merging and saving, beside HF PEFT.

LoRA r=8 on the family's default targets, without a head. Each library has a model of its own with equal weights; they
take turns.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

import tanzaku as tz
from bench.gpu import model_of
from tanzaku.models.loading import load_classifier

MANY = 50


def table(rounds: int = 5, **shape: int) -> None:
    """Print the Markdown tables, for the embedded model and the shape of llm-jp-3-1.8b."""
    models: dict[str, Callable[[], PreTrainedModel]] = {
        "Gemma 3 270M": lambda: load_classifier("embedded", 2),
        "the shape of llm-jp-3-1.8b": lambda: model_of(torch.float32, "cpu", **shape),
    }
    for name, make in models.items():
        print(f"{name}, fp32; medians of {rounds} in turns\n")
        compare(make().eval(), rounds)
        print()


def compare(base: PreTrainedModel, rounds: int) -> None:
    """Print one table."""
    warnings.filterwarnings("ignore")
    print("| what | HF PEFT | Tanzaku | ratio |")
    print("|---|---|---|---|")
    with TemporaryDirectory() as folder:
        libraries: list[Any] = [Peft(copy.deepcopy(base), Path(folder)), Tanzaku(base, Path(folder))]
        for verb, what in WHAT.items():
            seen: dict[str, list[float]] = {}
            for _ in range(rounds + 1):
                for library in libraries:
                    seen.setdefault(type(library).__name__, []).append(getattr(library, verb)())
            peft, own = (sorted(seen[name][1:])[rounds // 2] for name in ("Peft", "Tanzaku"))
            print(f"| {what} | {shown(peft)} | {shown(own)} | {own / peft:.2f} |", flush=True)


WHAT = {
    "save": "saving an adapter",
    "load": "loading an adapter",
    "switch": "switching to another adapter",
    "add": f"adding the {MANY}th adapter",
    "load_more": f"loading the {MANY + 1}st adapter",
    "switch_many": f"switching among {MANY} adapters",
    "merge": "merging in place",
    "unmerge": "taking it out again",
}


def shown(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Tanzaku:
    def __init__(self, model: PreTrainedModel, folder: Path):
        self.model, self.path, self.at = model, folder / "ours", 0
        self._attach("a0")
        self._attach("a1")
        tz.activate(model, "a0")

    def _attach(self, name: str) -> None:
        tz.attach(self.model, tz.LoRA(r=8, init_lora_weights=False, modules_to_save=[]), name, seed=0)

    def save(self) -> float:
        return seconds(lambda: tz.save(self.model, "a0", self.path))

    def load(self) -> float:
        spent = seconds(lambda: tz.load(self.model, self.path, "new"))
        tz.detach(self.model, "new")
        return spent

    load_more = load

    def switch(self) -> float:
        self.at = 1 - self.at
        return seconds(lambda: tz.activate(self.model, f"a{self.at}"))

    switch_many = switch

    def add(self) -> float:
        for number in range(2, MANY - 1):
            if f"a{number}" not in tz.adapters(self.model):
                self._attach(f"a{number}")
        if "last" in tz.adapters(self.model):
            tz.detach(self.model, "last")
        return seconds(lambda: self._attach("last"))

    def merge(self) -> float:
        if self.merged:
            tz.unmerge(self.model)
        self.merged = True
        return seconds(lambda: tz.merge(self.model, "a0"))

    merged = False

    def unmerge(self) -> float:
        if not self.merged:
            tz.merge(self.model, "a0")
        self.merged = False
        return seconds(lambda: tz.unmerge(self.model))


class Peft:
    def __init__(self, model: PreTrainedModel, folder: Path):
        import peft

        self.config = peft.LoraConfig(r=8, init_lora_weights=False)
        self.path, self.at = folder / "theirs", 0
        self.model = peft.get_peft_model(model, self.config, adapter_name="a0")
        self.model.add_adapter("a1", self.config)
        self.model.save_pretrained(self.path, selected_adapters=["a0"])

    def save(self) -> float:
        return seconds(lambda: self.model.save_pretrained(self.path, selected_adapters=["a0"]))

    def load(self) -> float:
        spent = seconds(lambda: self.model.load_adapter(self.path / "a0", "new"))
        self.model.delete_adapter("new")
        return spent

    load_more = load

    def switch(self) -> float:
        self.at = 1 - self.at
        return seconds(lambda: self.model.set_adapter(f"a{self.at}"))

    switch_many = switch

    def add(self) -> float:
        for number in range(2, MANY - 1):
            if f"a{number}" not in self.model.peft_config:
                self.model.add_adapter(f"a{number}", self.config)
        if "last" in self.model.peft_config:
            self.model.delete_adapter("last")
        return seconds(lambda: self.model.add_adapter("last", self.config))

    def merge(self) -> float:
        if self.merged:
            self.model.unmerge_adapter()
        self.merged = True
        return seconds(lambda: self.model.merge_adapter(["a0"]))

    merged = False

    def unmerge(self) -> float:
        if not self.merged:
            self.model.merge_adapter(["a0"])
        self.merged = False
        return seconds(self.model.unmerge_adapter)
