"""Multitask prompt tuning: one prompt for several tasks, times a product of low rank that each has of its own.

    p_task = P * (u_task v_task),  P (tokens, width), u (tokens, rank), v (rank, width), * element by element

A prompt is trained on source tasks, and starts one of a target task.

Wang et al. 2023, arXiv 2303.02861.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tanzaku.core.context import task_ids
from tanzaku.core.method import About, AdapterLayer, Place, trainable
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.errors import TanzakuError
from tanzaku.methods.prompt_tuning import PromptLayer, PromptTuning


class TaskPrompt(PromptLayer):
    """A prompt of several tasks.

    Attributes:
        prefix_task_cols: (tasks, tokens, rank). prefix_task_rows: (tasks, rank, width).
    """

    def __init__(self, prompt_embeddings: nn.Parameter, tasks: int, ranks: int):
        super().__init__(prompt_embeddings)
        tokens, width = prompt_embeddings.shape

        def small(t: Tensor) -> Any:
            return nn.init.normal_(t, std=0.02)

        self.prefix_task_cols = trainable(tasks, tokens, ranks, like=prompt_embeddings, fill=small)
        self.prefix_task_rows = trainable(tasks, ranks, width, like=prompt_embeddings, fill=small)

    def vectors(self) -> Tensor:
        return self.prompt_embeddings * (self.prefix_task_cols[0] @ self.prefix_task_rows[0])

    def vectors_of(self, rows: Tensor) -> Tensor:
        if len(self.prefix_task_cols) == 1:
            return self.vectors()
        task = task_ids(rows, len(self.prefix_task_cols))
        return self.prompt_embeddings * (self.prefix_task_cols[task] @ self.prefix_task_rows[task])

    def restore(self, tensors: dict[str, Tensor]) -> None:
        whole = tensors["prompt_embeddings"][: self.num_virtual_tokens]
        self.load_state_dict({**tensors, "prompt_embeddings": whole})


_FROM_SOURCE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@dataclass
class MultitaskPromptTuning(PromptTuning):
    """A prompt of several tasks.

    With more than one task, rows say theirs: `tz.route(model, entries, context={"task_ids": (rows,)})`.

    Args:
        num_tasks: how many tasks there are. num_ranks: rank of each task's own part.
        prompt_tuning_init: as for prompt tuning; or, from an adapter that was trained on source tasks,
            "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK" (the number prompt_tuning_init_task) or "ONLY_SOURCE_SHARED".
        prompt_tuning_init_state_dict_path: the safetensors of that adapter.
    """

    name = "multitask_prompt_tuning"
    peft_type = "MULTITASK_PROMPT_TUNING"
    paper = "arXiv 2303.02861"
    summary = "a prompt that tasks share, times what each has of its own"
    about = About(
        where="vectors in front of the text at the embedding",
        parameters="num_virtual_tokens * width + num_tasks * num_ranks * (num_virtual_tokens + width)",
        cost="rows are longer by num_virtual_tokens",
        choose="where related tasks with more rows can teach the prompt first",
        limits="starts slowly without a source, since each part multiplies the other; does not merge",
    )
    by_default = False
    without_prefix: ClassVar[tuple[str, ...]] = ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows")
    learning_rate = 1e-2  # As for prompt tuning.
    # As for prompt tuning; the paper has 100 tokens.
    space = spaces(num_virtual_tokens=Choice((10, 20, 50, 100)), learning_rate=Range(1e-3, 3e-1, log=True))

    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int = 0
    num_ranks: int = 1
    num_tasks: int = 1

    def row_data(self) -> Mapping[str, int]:
        return {"task_ids": self.num_tasks} if self.num_tasks > 1 else {}

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        for key in ("num_tasks", "num_ranks"):
            self.require(getattr(self, key) > 0, f"{key}={getattr(self, key)}", "1 or more")
        for path, layer in super().build(place):
            assert isinstance(layer, PromptLayer)
            made = TaskPrompt(layer.prompt_embeddings, self.num_tasks, self.num_ranks)
            if self._kind() in _FROM_SOURCE and not self.inference_mode and not made.prompt_embeddings.is_meta:
                self._start_from_source(made)
            yield path, made

    def _kind(self) -> str:
        return self.prompt_tuning_init.upper().rsplit(".", 1)[-1]

    def start(self, base: Any) -> Tensor | None:
        return None if self._kind() in _FROM_SOURCE else super().start(base)

    @torch.no_grad()
    def _start_from_source(self, layer: TaskPrompt) -> None:
        path = self.prompt_tuning_init_state_dict_path
        self.require(
            bool(path), "no prompt_tuning_init_state_dict_path", "the safetensors of the source tasks' adapter"
        )
        try:
            tensors = load_file(Path(str(path)))
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise TanzakuError(f"{self.name}: {path} cannot be read as safetensors: {reason}") from None
        own = dict(layer.named_parameters())
        names = ["prompt_embeddings"] if self._kind() == "ONLY_SOURCE_SHARED" else list(own)
        for name in names:
            self.require(name in tensors, f"no {name} in {path}", "an adapter of multitask prompt tuning")
            found = tensors[name]
            if name != "prompt_embeddings":
                last, task = len(found) - 1, self.prompt_tuning_init_task
                if self._kind() == "AVERAGE_SOURCE_TASKS":
                    found = found.mean(0, keepdim=True)
                else:
                    self.require(0 <= task <= last, f"prompt_tuning_init_task={task}", f"0 to {last}")
                    found = found[task][None]
                found = found.expand(self.num_tasks, -1, -1)
            shapes = f"{name} of {tuple(found.shape)} in {path}"
            self.require(found.shape == own[name].shape, shapes, f"{tuple(own[name].shape)}")
            own[name].copy_(found)
