"""Head only: a linear probe on frozen features. The floor that any other method should clear.

y = W' h + b',  h the frozen model's features
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from tanzaku.core.method import About, AdapterLayer, Method, Place
from tanzaku.core.space import Range, spaces
from tanzaku.core.weights import copy_of
from tanzaku.models import tree
from tanzaku.models.families import Base
from tanzaku.models.heads import task_head


@dataclass
class Head(Method):
    """The classifier's head alone.

    Args:
        target_modules: paths of the head; None takes the classifier's own, or a language model's output embedding.
    """

    name = "head"
    peft_type = "HEAD"
    paper = "-"
    in_peft = False
    summary = "the classifier's head alone, on frozen features"
    about = About(
        where="the head alone, on frozen features",
        parameters="the head's",
        cost="backward stops at the head",
        choose="as the baseline: it says what the frozen features know already",
        limits="for tasks with a head of their own",
    )
    learning_rate = 1e-3  # Adam's own (arXiv 1412.6980); a linear head has no depth to spoil.
    # A linear model on fixed features has no pretrained weights to lose: it takes steps that adapters do not.
    space = spaces(learning_rate=Range(1e-4, 1e-1, log=True))
    mergeable = True
    covers_head = True

    target_modules: list[str] | None = None

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        base = place.base
        if self._copies is not None:
            return  # a file says what they are
        tied: dict[int, Tensor] = {}
        if self.target_modules is None and (parts := self.heads(base) or task_head(base.model)):
            self.target_modules = [part.path for part in parts]
            for part in parts:
                module = base.model.get_submodule(part.path)
                yield part.path, copy_of(module, part.tensors(module), tied)
            return
        if self.target_modules is None:
            self.target_modules = [
                path for path, m in tree.named_modules(base.model) if path and m is self._output(base)
            ]
        self.require(bool(self.target_modules), "a model without a head", "one with a head, or target_modules")
        for path, module in base.targets(self.target_modules):
            yield path, copy_of(module)

    def _output(self, base: Base) -> object:
        return getattr(base.model, "get_output_embeddings", lambda: None)()
