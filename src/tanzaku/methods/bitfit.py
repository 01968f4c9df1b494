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

_ROLES = {  # Nothing is added where tokens are mixed without attention: padding is zero there only without biases.
    "query_up": ("query", "up"),
    "add": ("query", "key", "value", "out", "gate", "up", "down"),
}


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
    learning_rate = 1e-3  # the authors' own example; their search begins at 1e-4
    space = spaces(learning_rate=Range(1e-4, 1e-2, log=True))  # and added biases start at zero: a decade above, too

    bias_scope: str = "all"

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        base, copied, scope = place.base, self.copied(place.base), self.bias_scope
        self.require(scope in ("all", *_ROLES), f"bias_scope={scope!r}", "'all', 'query_up' or 'add'")
        own = dict(biased(base, skip := lambda path: copied(path) or not base.in_language_model(path)))
        there: dict[str, nn.Module] = own
        if scope != "all":
            instead = "use bias_scope='all', for the biases that there are" if own else "use another method"
            there = dict(base.targets(base.defaults(self.name, _ROLES[scope], instead=instead), skip=skip))
        chosen = {path: BiasCopy(m) for path, m in own.items() if path in there or scope == "add"}
        bare = {path: m for path, m in there.items() if scope == "add" and m._parameters.get("bias") is None}
        what = f"a {type(base.model).__name__} without a bias" + (" there" if scope == "query_up" else "")
        self.require(
            bool(chosen or bare), what, "one that has some, or bias_scope='add', which gives linear layers some"
        )
        yield from chosen.items()
        yield from ((path, AddedBias(module, path)) for path, module in bare.items())
