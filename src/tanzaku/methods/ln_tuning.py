"""LN tuning: the gains and offsets of normalisation layers.

    y = norm(x) * g + b,  g and b trained

Zhao et al. 2023, arXiv 2312.11420.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tanzaku.core.method import About, AdapterLayer, Method, Place
from tanzaku.core.space import Range, spaces
from tanzaku.core.survey import reads_past
from tanzaku.core.weights import ParameterCopy


@dataclass
class LNTuning(Method):
    """Tuning of normalisation layers.

    Args:
        target_modules: last names or a regular expression; None takes every norm with a gain outside of the head.
    """

    name = "ln_tuning"
    peft_type = "LN_TUNING"
    paper = "arXiv 2312.11420"
    summary = "gains and offsets of normalisation layers"
    about = About(
        where="every norm's gain and offset",
        parameters="one or two numbers a norm's feature",
        cost="nothing",
        choose="with few rows, or beside other adapters in a stack",
        limits="only rescales",
    )
    by_default = False
    mergeable = True
    learning_rate = 1e-3  # As for biases: a few numbers a layer that start at their pretrained values.
    space = spaces(learning_rate=Range(1e-4, 1e-2, log=True))  # as for biases

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        base, copied = place.base, self.copied(place.base)
        norms = [path for path in base.norm_paths if not reads_past(base, path, "weight", "bias")]
        if self.target_modules is None:
            self.target_modules = base.norms(lambda path: copied(path) or path not in norms)
        for path, module in base.targets(self.target_modules, exclude=self.exclude_modules, skip=copied):
            expected = "a norm with a gain that is read by the norm alone"
            self.require(path in norms, f"{path}, a {type(module).__name__}", expected)
            yield path, ParameterCopy(module, "ln_tuning_layers")
