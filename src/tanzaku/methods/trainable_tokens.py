"""Trainable tokens: the vectors of some tokens, such as new ones, in place of the embedding's own.

    y = v_t where token t is one of them, else W_t;  v_t = W_t at first

Where other weights are tied to the embedding, as a language model's head, its rows of these tokens are v_t, too.
HF PEFT has the method; it is LoRA's setting `trainable_token_indices`, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.method import About, AdapterLayer, Method, ModuleLayer, Place, trainable
from tanzaku.core.shared import Shared, reached
from tanzaku.core.space import Range, spaces
from tanzaku.core.survey import may_not_run, survey
from tanzaku.core.weights import in_memory
from tanzaku.models import tree
from tanzaku.models.families import Base, weight_of
from tanzaku.models.quantize import full_weight
from tanzaku.support.refs import Ref


class Vectors(Shared):
    """The trained vectors, (tokens, width) for each embedding, in the tree by its path.

    Args:
        inside: of files: what PEFT puts between the path and the tensor's name.
    """

    place = "tokens"
    file_prefix = "base_model.model."  # HF PEFT has each with its embedding
    name = "trainable_tokens_delta"

    def __init__(self, inside: str = ""):
        super().__init__()
        self.inside = inside
        self.ties: dict[str, Sequence[str]] = {}

    def add(self, path: str, indices: Sequence[int], weight: Tensor, ties: Sequence[str], drawn: bool) -> None:
        """Have vectors for the rows `indices` of an embedding's weight: its own at first, or drawn at random."""
        self.ties[path] = ties
        index = torch.tensor(indices, device=weight.device)

        def fill(own: Tensor) -> None:
            torch.nn.init.normal_(own) if drawn else own.copy_(weight[index])

        holder = nn.Module()
        holder.register_parameter(self.name, trainable(len(indices), weight.shape[1], like=weight, fill=fill))
        tree.attach(self, path + self.inside, holder)

    def of(self, path: str) -> Tensor:
        """Those of the embedding at a path."""
        holder: nn.Module = self
        for part in f"{path}{self.inside}".split("."):  # past attributes, of which one may have a part's name
            holder = cast(nn.Module, holder._modules[part])
        return cast(Tensor, holder._parameters[self.name])

    def compute(self) -> None:
        return None

    def export(self) -> dict[str, Tensor]:
        found = super().export()
        if not self.inside:  # there PEFT writes them for what is tied, too
            for path, ties in self.ties.items():
                found |= {f"{other}.{self.name}": found[f"{path}.{self.name}"] for other in ties if other != path}
        return found

    def restore(self, tensors: dict[str, Tensor]) -> None:
        super().restore({key: tensors[key] for key in self.state_dict()})


class TokenVectors(ModuleLayer):
    """An embedding, or what is tied to one, with other vectors for some tokens.

    Args:
        path: of the embedding that has the vectors. indices: ids of the tokens.
    """

    def __init__(self, vectors: Vectors, path: str, indices: Sequence[int], ties: Sequence[str]):
        super().__init__()
        self.vectors, self.path, self.ties = Ref(vectors), path, tuple(ties)
        order = sorted(range(len(indices)), key=indices.__getitem__)
        self.register_buffer("ids", torch.tensor([indices[at] for at in order]), persistent=False)
        self.register_buffer("order", torch.tensor(order), persistent=False)

    ids: Tensor
    order: Tensor

    @property
    def inside(self) -> str:
        """What PEFT puts between the path and the names of what is there."""
        return reached(self.vectors).inside

    def _own(self) -> Tensor:
        """(tokens, width), by rising ids."""
        own = reached(self.vectors).of(self.path)
        return own[self.order.to(own.device)]

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        own = self._own()
        ids = self.ids.to(x.device)
        if not isinstance(module, nn.Embedding):
            bias = getattr(module, "bias", None)
            logits = F.linear(x.to(own.dtype), own, None if bias is None else in_memory(module, "bias")[ids].to(own))
            return y.index_copy(-1, ids, logits.to(y.dtype))
        at = torch.searchsorted(ids, x).clamp(max=len(ids) - 1)
        # Some models scale embedded tokens inside of the module.
        found = F.embedding(at, own) * getattr(module, "embed_scale", 1.0)
        return torch.where((ids[at] == x)[..., None], found.to(y.dtype), y)

    def merged(self, module: nn.Module) -> dict[str, Tensor] | None:
        weight = full_weight(module)
        return {"weight": weight.index_copy(0, self.ids.to(weight.device), self._own().to(weight))}


def token_layers(
    method: Method, base: Base, indices: Mapping[str, Sequence[int]], inside: str = "", drawn: bool = False
) -> Iterator[tuple[str, AdapterLayer]]:
    """The vectors of some tokens, and the layers that use them: at embeddings, and at what is tied to these.

    Args:
        indices: ids by the path of their embedding. inside, drawn: see :class:`Vectors`.
    """
    vectors = Vectors(inside)
    copied = method.copied(base)
    modules = [(path, module) for path, module in tree.named_modules(base.model) if not copied(path)]
    layers = []
    for path, ids in indices.items():
        table = base.model.get_submodule(path)
        scaled = hasattr(table, "embed_scale") or type(table).forward is nn.Embedding.forward
        plain = isinstance(table, nn.Embedding) and scaled
        method.require(plain, f"{path}, a {type(table).__name__}", "an embedding of tokens that is looked up by ids")
        weight = weight_of(table)
        known = all(type(each) is int and 0 <= each < len(weight) for each in ids)
        expected = f"ids from 0 to {len(weight) - 1}, each once"
        method.require(known and len({*ids}) == len(ids) > 0, f"tokens {list(ids)} of {path}", expected)
        at_hand = in_memory(table, "weight") if weight.is_meta and base.offloaded else weight
        ties = [other for other, module in modules if module._parameters.get("weight") is weight and other != path]
        # An embedding that a tie has by itself is its own.
        ties = [path, *(other for other in ties if other not in indices)]
        vectors.add(path, ids, at_hand.detach(), ties, drawn)
        # A table that others are tied to may never run by itself.
        run = [p for p in ties if not (may_not_run(base.model, p) and survey(base).never_runs(base, p))] or ties
        layers += [(each, TokenVectors(vectors, path, ids, ties)) for each in run]
    yield "", vectors
    yield from layers


def embedding_path(base: Base) -> str:
    """Where the model's own embedding of tokens is."""
    table = base.embedding
    return next(path for path, module in tree.named_modules(base.model) if module is table)


@dataclass
class TrainableTokens(Method):
    """The vectors of some tokens.

    As in PEFT, a classifier's head is not trained along unless `modules_to_save` names it; it is saved all the same.

    Args:
        token_indices: ids of the tokens.
        target_modules: names of embeddings; None takes the model's own. Weights tied to one go with it.
        init_weights: start from the embedding's own vectors, which changes nothing at first; False draws them.
    """

    name = "trainable_tokens"
    peft_type = "TRAINABLE_TOKENS"
    paper = "-"
    summary = "vectors of some tokens"
    about = About(
        where="the embedding, and what is tied to it: vectors of the tokens that are named",
        parameters="width of the embedding a token",
        cost="looking some vectors up",
        choose="to teach tokens that were added, alone or beside another adapter in a stack",
        limits="changes nothing in texts without these tokens",
    )
    by_default = False
    mergeable = True
    trains_head = False
    learning_rate = 1e-3  # Between HF PEFT's example of new tokens beside LoRA (1e-4) and soft prompts (1e-2).
    space = spaces(learning_rate=Range(1e-4, 1e-2, log=True))  # a decade on either side

    token_indices: list[int] = field(default_factory=list)
    target_modules: list[str] | str | None = None
    init_weights: bool = True

    def to_peft(self, config: dict[str, Any]) -> dict[str, Any]:
        # PEFT's own has no such setting.
        return {key: value for key, value in config.items() if key != "modules_to_save" or value}

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        base = place.base
        if self.target_modules is None:
            self.target_modules = [embedding_path(base)]
        found = base.targets(self.target_modules, skip=self.copied(base))
        tied: dict[int, str] = {}
        for path, module in found:  # of those that are tied, the first has the vectors
            tied.setdefault(id(module._parameters.get("weight")), path)
        self.require(bool(self.token_indices), "no token_indices", "ids of one token or more")
        drawn = not self.init_weights and not self._to_fill
        yield from token_layers(self, base, dict.fromkeys(tied.values(), self.token_indices), drawn=drawn)


def indices_by_path(method: Any, base: Base, indices: list[int] | dict[str, list[int]]) -> dict[str, list[int]]:
    """LoRA's setting, with whole paths: a list is of the model's own embedding."""
    if isinstance(indices, list):
        return {embedding_path(base): indices}
    copied = method.copied(base)
    return {path: ids for name, ids in indices.items() for path, _ in base.targets([name], skip=copied)}
