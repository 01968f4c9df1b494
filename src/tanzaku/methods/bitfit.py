"""BitFit: the biases alone.

    y = W x + b,  b trained

Ben Zaken et al. 2021, arXiv 2106.10199.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tanzaku.core.method import About, AdapterLayer, Method, Place
from tanzaku.core.space import Range, spaces
from tanzaku.core.survey import biased
from tanzaku.core.weights import AddedBias, BiasCopy

# No bias is added where tokens are mixed without attention: there padding is zero only as long as none is.
_ROLES = {"all": (), "query_up": ("query", "up"), "add": ("query", "key", "value", "out", "gate", "up", "down")}


@dataclass
class BitFit(Method):
    """Bias-only fine-tuning.

    Args:
        bias_scope: "all"; "query_up", of queries and the feed-forward's first layer, nearly as good by the paper;
            "add", all, and biases of zeros where attention and feed-forward have none, which cannot be merged.
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
        base, copied, roles = place.base, self.copied(place.base), _ROLES.get(self.bias_scope)
        self.require(roles is not None, f"bias_scope={self.bias_scope!r}", "'all', 'query_up' or 'add'")
        own = dict(biased(base, skip := lambda path: copied(path) or not base.in_language_model(path)))
        instead = "use bias_scope='all', for the biases that there are" if own else "use another method"
        wanted = dict(base.targets(base.defaults(self.name, roles, instead=instead), skip=skip)) if roles else own
        found = {**own, **wanted} if self.bias_scope == "add" else {p: m for p, m in own.items() if p in wanted}
        found = {path: m for path, m in found.items() if path in own or m._parameters.get("bias") is None}
        self.require(bool(found), f"a {type(base.model).__name__} without a bias there", "some, or bias_scope='add'")
        yield from ((path, BiasCopy(m) if path in own else AddedBias(m, path)) for path, m in found.items())
