"""Full fine-tuning: the adapter's own copy of every weight. The yardstick that parameter-efficient methods spare.

y = f(x; theta'),  theta' = theta at first, all of it trained
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tanzaku.core.method import About, AdapterLayer, Method, Place
from tanzaku.core.space import Range, spaces
from tanzaku.core.weights import copy_of


@dataclass
class Full(Method):
    """Full fine-tuning. The base itself stays frozen: detaching gives it back. Its rows need a batch of their own."""

    name = "full"
    peft_type = "FULL"
    paper = "-"
    in_peft = False
    by_default = False
    summary = "every weight; memory for weights, gradients and two moments"
    about = About(
        where="every weight",
        parameters="all",
        cost="gradients and two moments of all weights; needs the model to itself",
        choose="where memory allows it and there are many rows",
        limits="no other candidate can share its batch; a file as large as the model",
    )
    learning_rate = 2e-5  # BERT (arXiv 1810.04805): 2e-5 to 5e-5.
    # BERT's authors tried 2e-5 to 5e-5; above 1e-4 pretrained weights are soon lost.
    space = spaces(learning_rate=Range(1e-6, 1e-4, log=True))
    shares_batch = False
    covers_head = True
    mergeable = True

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        base = place.base
        self.require(not self.modules_to_save, "modules_to_save", "none: every module is trained")
        yield "", copy_of(base.model)
