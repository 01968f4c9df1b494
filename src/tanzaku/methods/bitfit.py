"""BitFit: the biases alone.

    y = W x + b,  b trained

Ben Zaken et al. 2021, arXiv 2106.10199.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from tanzaku.core.method import About, AdapterLayer, Method, Place
from tanzaku.core.space import Range, spaces
from tanzaku.core.survey import biased
from tanzaku.core.weights import AddedBias, BiasCopy


@dataclass
class BitFit(Method):
    """Bias-only fine-tuning.

    Args:
        bias_scope: "all" biases that the model has; "query_up", of queries and the feed-forward's first layer alone,
            which the paper finds nearly as good with half of the numbers; "add", all, and biases of zeros for linear
            layers of attention and feed-forward that have none, which then cannot be merged.
    """

    name = "bitfit"
    peft_type = "BITFIT"
    paper = "arXiv 2106.10199"
    summary = "the biases alone"
    about = About(
        where="every bias of the model, or biases that are added",
        parameters="one number a bias",
        cost="nothing",
        choose="on models that have biases, with few rows",
        limits='most decoders have none (bias_scope="add" gives them some, which do not merge)',
    )
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

        def skip(path: str) -> bool:
            return copied(path) or not base.in_language_model(path)

        own = dict(biased(base, skip))
        instead = "use bias_scope='all', for the biases that there are" if own else "use another method"
        added: dict[str, nn.Module] = {}
        if self.bias_scope == "query_up":
            wanted = base.targets(base.defaults(self.name, ("query", "up"), instead=instead), skip=skip)
            own = {path: own[path] for path, _ in wanted if path in own}
        if self.bias_scope == "add":
            # Not where tokens are mixed without attention: there padding is zero only as long as nothing is added.
            roles = ("query", "key", "value", "out", "gate", "up", "down")
            found = base.targets(base.defaults(self.name, roles, instead=instead), skip=skip)
            added = {path: module for path, module in found if module._parameters.get("bias") is None}
        self.require(
            bool(own or added),
            f"a {type(base.model).__name__} without a bias" + (" there" if self.bias_scope == "query_up" else ""),
            "one that has some, or bias_scope='add', which gives some to attention and feed-forward",
        )
        for path, module in own.items():
            yield path, BiasCopy(module)
        for path, module in added.items():
            yield path, AddedBias(module, path)
