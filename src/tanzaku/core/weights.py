"""An adapter's own copies of weights that the base has: whole modules, or one bias."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache

from tanzaku.core.method import AdapterLayer, ModuleLayer, home, trainable
from tanzaku.core.routing import Rows, put, take
from tanzaku.errors import TanzakuError
from tanzaku.models import tree
from tanzaku.models.families import features, weight_of
from tanzaku.models.quantize import elsewhere, plain


class OwnWeights(AdapterLayer):
    """Weights that stand in place of a module's while it runs."""

    @property
    def own(self) -> dict[str, nn.Parameter]:
        """The layer's parameters by names for people."""
        raise TypeError(f"{type(self).__name__} defines no own")

    def below(self, part: str) -> Any:
        """Whether some weight below a part of the module is another."""
        raise TypeError(f"{type(self).__name__} defines no below()")

    def swapped(self, module: nn.Module, part: str = "") -> AbstractContextManager[None]:
        """The module with these weights in place of its own, or those of a part of it."""
        raise TypeError(f"{type(self).__name__} defines no swapped()")

    def merged(self, module: nn.Module) -> dict[str, Tensor] | None:
        """The module's tensors with this adapter layer folded in, in full precision."""
        return None


@contextmanager
def stacked(layers: Sequence[OwnWeights], module: nn.Module, part: str = "") -> Iterator[None]:
    """The module with the weights of several adapters, one upon the other."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.swapped(module, part))
        yield


class WeightCopy(OwnWeights):
    """The adapter's own copy of a module's weights, used in their place while the module runs.

    `own` maps the names of the module's tensors to the adapter's: parameters, and what is kept beside them, such as
    running statistics. They stand in this layer's tree by these names, so that whoever goes by names (weight decay,
    sharding) knows them again; tied ones stand there once, by their first.

    Args:
        resized: they are the embeddings of a base whose vocabulary was resized, which files hold as the base's.
    """

    def __init__(self, own: Mapping[str, Tensor], resized: bool = False):
        super().__init__()
        self.resized = resized
        first: dict[int, str] = {}
        self._place = {name: first.setdefault(id(tensor), name) for name, tensor in own.items()}
        for name, tensor in own.items():
            if self._place[name] == name:
                owner, last = _owner(self, name)
                table: dict[str, Any] = owner._parameters if isinstance(tensor, nn.Parameter) else owner._buffers
                table[last] = tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The module's names -> the adapter's tensors, read off the tree: somebody may have put others there."""
        found = {}
        for name, place in self._place.items():
            owner, last = _owner(self, place)
            found[name] = _table(owner, last)[last]
        return found

    @property
    def own(self) -> dict[str, nn.Parameter]:
        """Those of :attr:`tensors` that are parameters."""
        return {name: tensor for name, tensor in self.tensors.items() if isinstance(tensor, nn.Parameter)}

    def below(self, part: str) -> dict[str, Tensor]:
        """Those of :attr:`tensors` below a part of the module."""
        start = f"{part}." if part else ""
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith(start)}

    @contextmanager
    def swapped(self, module: nn.Module, part: str = "") -> Iterator[None]:
        """The module with this adapter layer's tensors in place of its own, or those of a part of it."""
        put = []
        for name, tensor in self.below(part).items():
            path, _, last = name.rpartition(".")
            owner = module.get_submodule(path)
            table = _table(owner, last)
            original = table[last]
            if original is not None:
                self.check_here(original)
                check_shape(name, tensor, original)
            check_in_reach(owner)
            put.append((table, last, original, tensor))
            table[last] = as_used(tensor, original)
        try:
            yield
        finally:
            for table, last, original, tensor in put:
                now, table[last] = table[last], original
                if now is not tensor and not isinstance(tensor, nn.Parameter):
                    tensor.copy_(now)  # the module made a new one of it, or changed it in another type


def trained_copies(layers: Iterable[tuple[str, AdapterLayer]]) -> set[str]:
    """Names, in the base, of the tensors of which some of these layers, by their paths, are trained copies. In a stack
    they count before copies that are only kept."""
    copies = [(path, layer) for path, layer in layers if isinstance(layer, WeightCopy) and layer.trained]
    return {f"{path}.{name}" if path else name for path, layer in copies for name in layer.tensors}


def gives_way(path: str, layer: AdapterLayer, trained: Container[str]) -> bool:
    """Whether a layer is a copy that nobody trained, of what others have trained copies of: see `trained_copies`."""
    kept = isinstance(layer, WeightCopy) and not layer.trained
    return kept and all((f"{path}.{name}" if path else name) in trained for name in cast(WeightCopy, layer).tensors)


def _table(owner: nn.Module, last: str) -> dict[str, Any]:
    """Where a module keeps its tensor of this name."""
    return owner._buffers if last in owner._buffers else owner._parameters


def check_shape(name: str, own: Tensor, original: Tensor) -> None:
    """Raise a clear error where the base's weight has another shape by now."""
    if own.shape != original.shape:
        raise TanzakuError(
            f"the base's {name} is {tuple(original.shape)}, and was {tuple(own.shape)} when the adapter was attached: "
            "detach it, resize, and attach it again"
        )


def check_in_reach(owner: nn.Module) -> None:
    """Raise a clear error where a module's weights are brought from elsewhere for each pass: they would take the place
    of the adapter's own again."""
    hook = owner.__dict__.get("_hf_hook")
    if any(getattr(each, "offload", False) for each in getattr(hook, "hooks", [hook])):
        raise TanzakuError(
            f"an adapter has an own copy of a {type(owner).__name__} of the base that is offloaded, and cannot be used "
            "in its place; keep that module on a device (device_map), or attach without it (modules_to_save=[])"
        )


def copied_in(layers: Iterable[tuple[str, AdapterLayer]]) -> set[str]:
    """Names of the base's tensors that (path, adapter layer) pairs have own copies of."""
    own = ((path, key) for path, layer in layers if isinstance(layer, WeightCopy) for key in layer.tensors)
    return {f"{path}.{key}" if path else key for path, key in own}


def _owner(tree: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module of `tree` that holds the parameter `name`, made if there is none yet, and the name's last part.

    Past attributes: a part may be named as one of `nn.Module`'s or of the adapter layer's.
    """
    *path, last = name.split(".")
    for part in path:
        node = tree._modules.get(part)
        if node is None:
            node = tree._modules[part] = nn.Module()
        tree = node
    return tree, last


def copy_of(
    module: nn.Module, names: Iterable[str] | None = None, copies: dict[int, Tensor] | None = None
) -> WeightCopy:
    """An adapter's own, trainable copy of every weight below `module`, and of what is saved beside weights, such as
    running statistics; tied tensors stay tied.

    Args:
        names: only these. copies: those made already, by the id of the base's tensor, where ties reach further.
    """
    copies = {} if copies is None else copies
    chosen = None if names is None else set(names)
    own = {}
    for name, tensor in tree.saved(module):
        if chosen is not None and name not in chosen:
            continue
        if id(tensor) not in copies:
            if not isinstance(tensor, nn.Parameter):
                copies[id(tensor)] = _at_hand(module, name).detach().clone()
            elif plain(tensor):
                # As in `trainable`: half precision trains badly, so the copy is in full.
                full = tensor.dtype if tensor.dtype == torch.float64 else torch.float32
                copies[id(tensor)] = nn.Parameter(_at_hand(module, name).detach().to(full, copy=True))
            else:
                raise TanzakuError(f"cannot copy {name!r}: it holds quantised values ({type(tensor).__name__})")
        own[name] = copies[id(tensor)]
    return WeightCopy(own)


def _at_hand(module: nn.Module, name: str) -> Tensor:
    """The values of a tensor, also of one that is kept elsewhere between passes."""
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    found = cast(Tensor, _table(owner, last)[last])
    kept = elsewhere(owner, last) if found.is_meta else None
    return found if kept is None else kept[0].to(home(found))


class BiasCopy(ModuleLayer):
    """The adapter's own copy of a bias; the rest of the module stays the base's."""

    def __init__(self, module: nn.Module):
        super().__init__()
        own = _at_hand(module, "bias").detach()
        self.bias = trainable(*own.shape, like=own, fill=lambda bias: bias.copy_(own))

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        change = (self.bias - in_memory(module, "bias")).to(y.dtype)
        return y + (change.view(-1, *[1] * (y.dim() - 2)) if _channels_first(module) else change)

    def merged(self, module: nn.Module) -> dict[str, Tensor] | None:
        return {"bias": self.bias.detach().clone()}


class AddedBias(ModuleLayer):
    """A bias of zeros for a module with a matrix and none of its own."""

    def __init__(self, module: nn.Module, path: str):
        super().__init__()
        self.bias = trainable(features(module, path)[1], like=weight_of(module))

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return y + self.bias.to(y.dtype)


class ParameterCopy(ModuleLayer):
    """The adapter's own parameters of a small module, such as a norm, which is computed anew with them for the rows
    routed here. A `WeightCopy`, by contrast, is for what a batch should not compute twice.

    Args:
        place: what stands before their names in files.
    """

    def __init__(self, module: nn.Module, place: str):
        super().__init__()
        self.place = place
        found = {name: _at_hand(module, name).detach() for name, p in module._parameters.items() if p is not None}
        own = {n: trainable(*t.shape, like=t, fill=partial(_copied, t)) for n, t in found.items()}
        self.add_module(place, nn.ParameterDict(own))
        self.reads_call = len(inspect.signature(module.forward).parameters) > 1  # type: ignore[misc]  # and a gate, say

    @property
    def own(self) -> dict[str, nn.Parameter]:
        """The module's names -> the adapter's parameters."""
        return dict(cast(nn.ParameterDict, getattr(self, self.place)).items())

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.outputs_of(module, (x,), {}, y)

    def outputs_of(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        own = {name: as_used(p, module._parameters[name]) for name, p in self.own.items()}
        return cast(Tensor, type(module).forward(with_tensors(module, own), *args, **kwargs)).to(y.dtype)

    def merged(self, module: nn.Module) -> dict[str, Tensor] | None:
        return {name: p.detach().clone() for name, p in self.own.items()}


def _copied(own: Tensor, into: Tensor) -> None:
    into.copy_(own)


def rows_in(given: Any, at: Callable[[int], Rows], path: str) -> Any:
    """What a module is given (tensors, or what holds some), for the rows of one stack alone.

    Args:
        at: of so many rows, which those are.

    Raises:
        TanzakuError: it is given a cache, which would take up the same tokens twice.
    """

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, Cache):
            raise TanzakuError(
                f"an adapter's own copy of {path!r} needs a batch to itself: it is given a {type(leaf).__name__}, "
                "which cannot be cut into rows; route it alone, or generate with use_cache=False"
            )
        # One row is every row's, such as a mask that all share.
        return take(leaf, at(len(leaf))) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) > 1 else leaf

    return tree_map(cut, given)


def rows_put(output: Any, part: Any, at: Callable[[int], Rows], path: str) -> Any:
    """A module's output, with what it computes for the rows of one stack in their place."""

    def joined(whole: Any, own: Any) -> Any:
        if not isinstance(whole, Tensor):
            return whole
        if not whole.dim() or (len(whole) == 1 and len(own) == 1):
            raise TanzakuError(
                f"an adapter's own copy of {path!r} needs a batch to itself: the module returns a tensor without rows; "
                "route it alone"
            )
        rows = at(len(whole))
        # What is computed of no rows, such as positions, is computed for as many as there are.
        return put(whole, [(rows, take(own, rows) if len(own) == len(whole) else own)])

    return tree_map(joined, output, part)


def with_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module like this one with other tensors of its own, of which the rest is shared. The module itself stays as it
    is, since somebody else may run it meanwhile."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__, _parameters={**module._parameters, **tensors})
    return twin


def _channels_first(module: nn.Module) -> bool:
    """Whether a module's features are the second dimension and not the last, as those of convolutions."""
    kinds = (_ConvNd, _NormBase, nn.GroupNorm)
    return isinstance(module, kinds) or getattr(module, "data_format", None) == "channels_first"


def in_memory(module: nn.Module, name: str) -> Tensor:
    """A tensor of a module, read from where it is kept while the module does not run."""
    tensor = cast(Tensor, getattr(module, name))
    if not tensor.is_meta:
        return tensor
    kept = elsewhere(module, name)
    if kept is None:
        raise TanzakuError(f"the {name} of a {type(module).__name__} of the base is not in memory; load the base whole")
    return kept[0].to(kept[1])


def as_used(own: Tensor, original: Tensor | None) -> Tensor:
    """The adapter's weight in the type that the base computes in; under autocast any type will do."""
    if original is None or own.dtype == original.dtype or torch.is_autocast_enabled(own.device.type):
        return own
    return own.to(original.dtype)
