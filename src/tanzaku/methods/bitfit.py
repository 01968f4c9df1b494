"""BitFit: the biases alone.

    y = W x + b,  b trained

Ben Zaken et al. 2021, arXiv 2106.10199.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tanzaku.core.method import AdapterLayer, Method, Place
from tanzaku.core.space import Range, spaces
from tanzaku.core.weights import AddedBias, BiasCopy
from tanzaku.models import tree


@dataclass
class BitFit(Method):
    """Bias-only fine-tuning.

    Args:
        bias_scope: "all" biases that the model has; "query_up", of queries and the feed-forward's first layer alone,
            which the paper finds nearly as good with half of the numbers; "add", all, and biases of zeros for linear
            layers that have none, which then cannot be merged.
    """

    name = "bitfit"
    peft_type = "BITFIT"
    paper = "arXiv 2106.10199"
    summary = "the biases alone"
    in_peft = False
    by_default = False  # many models have no bias
    mergeable = True
    learning_rate = 1e-3  # The authors' own example; the paper searches from 1e-4 up for BERT.
    # A decade below the authors' 1e-3, and one above: what is added starts at zero.
    space = spaces(learning_rate=Range(1e-4, 1e-2, log=True))

    bias_scope: str = "all"

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        base, scopes = place.base, ("all", "query_up", "add")
        self.require(self.bias_scope in scopes, f"bias_scope={self.bias_scope!r}", "'all', 'query_up' or 'add'")
        copied = self.copied(base)
        own = [p for p, m in tree.named_modules(base.model) if m._parameters.get("bias") is not None and not copied(p)]
        if self.bias_scope == "query_up":
            wanted = base.targets(base.defaults(self.name, ("query", "up")), skip=copied)
            own = [path for path, _ in wanted if path in own]
        added = []
        if self.bias_scope == "add":
            added = [path for path, _ in base.targets("all-linear", skip=copied) if path not in own]
        self.require(
            bool(own or added),
            f"a {type(base.model).__name__} without a bias" + (" there" if self.bias_scope == "query_up" else ""),
            "one that has some, or bias_scope='add', which gives some to its linear layers",
        )
        for path in own:
            yield path, BiasCopy(base.model.get_submodule(path))
        for path in added:
            yield path, AddedBias(base.model.get_submodule(path), path)
