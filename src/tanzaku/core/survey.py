"""What the modules of a base do with a tiny batch: which of them run at all, and where they have the rows of a batch.

The base runs twice on three short texts (or images, or sounds), the second time with another one in the middle row.
What differs between the two passes belongs to that row; what does not is shared by all rows. So where a tensor has its
rows is measured: a first dimension of the right size may count tokens, images or experts' tokens as well.
"""

from __future__ import annotations

import inspect
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tanzaku.core.method import AdapterLayer, ModuleLayer
from tanzaku.core.weights import WeightCopy, with_tensors
from tanzaku.errors import TanzakuError, listed
from tanzaku.models import tree
from tanzaku.models.families import Base, features
from tanzaku.models.families.trace import shadow_of
from tanzaku.models.quantize import quantised

_ROWS, _OTHER = 5, 1  # rows of the tiny batch, and which of them differs in the second pass
_TOKENS = 8


class Axis(NamedTuple):
    """Where a tensor has the rows of a batch.

    `dim` is the dimension that counts them, each row `share` times in one piece; None: the rows share the tensor.
    `dims` is how many dimensions there are, and `tokens` how many vectors there were.
    """

    dim: int | None
    share: int
    dims: int
    tokens: int


class Call(NamedTuple):
    """One call of a module: the axes of what it reads and returns, None where that is not known.

    Keys are those of :func:`tensors`. `plain`: it read nothing but tensors and plain values. `of` is what the rows are:
    "rows" of the batch, or "images".
    """

    inputs: Mapping[Key, Axis | None]
    outputs: Mapping[Key, Axis | None]
    plain: bool
    of: str


Key = tuple[int | str, ...]


@dataclass
class Survey:
    """What was seen of one model, by the paths of its modules."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # every path of a module -> the path it was seen by
    empty: bool = False  # of a model without numbers: what runs is seen, but not where the rows are

    def at(self, path: str) -> list[Call]:
        """The calls of a module, none where it has not run."""
        return self.calls.get(self.names.get(path, path), [])

    def never_runs(self, base: Base, path: str) -> bool:
        """Whether the module that holds this one ran without it, so that at most its weights are read."""
        parent = path.rpartition(".")[0]
        holder = base.model.get_submodule(parent)
        if isinstance(holder, nn.MultiheadAttention):
            return True
        return bool(path and self.at(parent)) and not self.at(path) and not isinstance(holder, _HOLDERS)

    def take(self, base: Base, run: Callable[..., Any], first: _Inputs, second: _Inputs, of: str, row: Row) -> bool:
        """See what `run` does with two batches that differ in one row; False: it does nothing with these."""
        seen = [self._watch(base.model, run, inputs) for inputs in (first, second)]
        if seen[0] is None or seen[1] is None:
            return False
        if not self.empty and not _differ(seen[0], seen[1]):
            return False  # nothing can be learnt of them
        self.names = _first_names(base.model)
        for path, calls in seen[0].items():
            others = seen[1].get(path, [])
            nothing: _Seen = ({}, {}, False)
            pairs = zip(calls, others if len(calls) == len(others) else [nothing] * len(calls), strict=True)
            self.calls.setdefault(path, []).extend(
                Call(_axes(a[0], b[0], row), _axes(a[1], b[1], row), a[2], of) for a, b in pairs
            )
        return True

    def _watch(self, model: nn.Module, run: Callable[..., Any], inputs: _Inputs) -> dict[str, list[_Seen]] | None:
        seen: dict[str, list[_Seen]] = {}

        def hook(path: str) -> Callable[..., None]:
            def after(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                calls = seen.setdefault(path, [])
                given = (*args, *kwargs.items())
                read: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
                calls.append((_sketches(read), _sketches(output), all(map(is_plain, given))))

            return after

        handles = [m.register_forward_hook(hook(p), with_kwargs=True) for p, m in tree.named_modules(model)]
        try:
            with _at_rest(model):
                run(*inputs[0], **inputs[1])
        except Exception:  # whatever a model says of inputs that it has no use for
            return None
        finally:
            for handle in handles:
                handle.remove()
        return seen


_HOLDERS = (nn.ModuleList, nn.ModuleDict)
_Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_Sketches = dict[Key, "_Sketch"]
_Seen = tuple[_Sketches, _Sketches, bool]


class Row(NamedTuple):
    """Of so many rows, the one that differs."""

    number: int
    of: int


class _Sketch(NamedTuple):
    """A tensor's shape, and a number for each place of its first two dimensions that changes with what is there.

    `tokens`: how many vectors there are, or how many numbers of tokens, which become one each.
    """

    shape: tuple[int, ...]
    numbers: Tensor
    tokens: int


_surveys: WeakKeyDictionary[nn.Module, Survey] = WeakKeyDictionary()
_lock = threading.RLock()


def survey(base: Base) -> Survey:
    """What is known of a base. It runs at the first call, on a few tokens."""
    with _lock:
        found = _surveys.get(base.model)
        if found is None or (found.empty and not _empty(base.model)):
            # The model's weights in modules without hooks: nobody who watches the model sees these passes.
            shadow = Base(shadow_of(base.model, stands_for=lambda tensor: tensor), base.family)
            _surveys[base.model] = found = Survey(empty=_empty(base.model))
            for run, first, second, of in _tiny(shadow):
                found.take(shadow, run, ((), first), ((), second), of, Row(_OTHER, _ROWS))
        return found


def _empty(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in tree.tensors(model))


def see(base: Base, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Learn of a model from a batch that it is given, where a tiny one could not be made; False: nothing was learnt."""
    if not all(map(is_plain, (*args, *kwargs.values()))):
        return False
    found = next((x.shape[0] for _, x in tensors((args, kwargs)) if x.dim() > 1), 0)
    if found < 2:
        return False
    rows = [(key, x) for key, x in tensors((args, kwargs)) if x.dim() > 1 and x.shape[0] == found]
    other = replaced((args, kwargs), {key: _other_row(x, _OTHER) for key, x in rows})
    with _lock:
        return survey(base).take(base, module, (args, kwargs), other, "rows", Row(_OTHER, found))


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """The bare base in eval mode, without gradients."""
    from tanzaku.core.quiet import quiet

    modes = {id(module): module.training for module in tree.modules(model)}
    try:
        for module in tree.modules(model):
            module.training = False
        with torch.no_grad(), quiet():
            yield
    finally:
        for module in tree.modules(model):
            # A model may have put another module in the place of one, for texts of this length.
            module.training = modes.get(id(module), modes[id(model)])


def tensors(value: Any, _key: Key = ()) -> Iterator[tuple[Key, Tensor]]:
    """The tensors of a value, of its tuples, lists and dictionaries, with the keys that lead there."""
    if isinstance(value, Tensor):
        yield _key, value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from tensors(each, (*_key, name))
    elif isinstance(value, tuple | list):
        for number, each in enumerate(value):
            yield from tensors(each, (*_key, number))


def replaced(value: Any, new: Mapping[Key, Tensor], _key: Key = ()) -> Any:
    """`value` with other tensors under the keys that `new` has."""
    if isinstance(value, Tensor):
        return new.get(_key, value)
    if isinstance(value, Mapping):
        out = {name: replaced(each, new, (*_key, name)) for name, each in value.items()}
        return out if type(value) is dict else type(value)(**out)
    if isinstance(value, tuple | list):
        parts = [replaced(each, new, (*_key, number)) for number, each in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def is_plain(value: Any) -> bool:
    """Whether a value holds nothing but tensors, numbers, texts and types: no cache, which a call would change."""
    if isinstance(value, tuple | list):
        return all(map(is_plain, value))
    if isinstance(value, Mapping):
        return all(map(is_plain, value.values()))
    return value is None or isinstance(value, Tensor | bool | int | float | str | torch.dtype | torch.device)


def _sketches(value: Any) -> _Sketches:
    return {key: _sketch(x) for key, x in tensors(value)}


def _sketch(x: Tensor) -> _Sketch:
    tokens = math.prod(x.shape[:-1]) if x.is_floating_point() else x.numel()
    rows = x.detach().reshape(*(x.shape[:2] if x.dim() > 1 else (*x.shape, *[1] * (2 - x.dim()))), -1)
    if x.is_meta or not rows.numel():
        return _Sketch(tuple(x.shape), torch.zeros(0), tokens)
    # Masks hold the least number that there is, which would hide all others.
    rows = rows.float().nan_to_num().clamp(-1e4, 1e4)
    weights = torch.arange(1, rows.shape[-1] + 1, device=rows.device).float().sin()
    return _Sketch(tuple(x.shape), (rows @ weights).cpu(), tokens)


def _axes(one: _Sketches, other: _Sketches, row: Row) -> dict[Key, Axis | None]:
    axes = {key: _axis(a, other.get(key), row) for key, a in one.items()}
    # What did not change is the rows' own all the same where it is as long as what did, such as the experts that were
    # chosen for their tokens, by chance the same ones.
    shares = {one[key].shape[0]: axis.share for key, axis in axes.items() if axis is not None and axis.dim == 0}
    for key, axis in axes.items():
        if axis is not None and axis.dim is None and axis.dims and (share := shares.get(one[key].shape[0])):
            axes[key] = axis._replace(dim=0, share=share)
    return axes


def _axis(a: _Sketch, b: _Sketch | None, row: Row) -> Axis | None:
    """Where the rows are in a tensor that was `a` in one pass and `b` in the other."""
    if b is None or a.shape != b.shape or not a.numbers.numel():
        return None
    moved = (a.numbers - b.numbers).abs()
    dims, first = len(a.shape), a.shape[0] if a.shape else 1
    most = float(moved.max())
    if most == 0:
        # As long as the batch, it is the rows' own, if alike: positions, or a mask that hides nothing.
        for dim in range(min(dims, 2)):
            if a.shape[dim] == row.of:
                return Axis(dim, 1, dims, a.tokens)
        return Axis(None, 1, dims, a.tokens)
    one = torch.arange(row.of) == row.number
    if first % row.of == 0 and _only(moved.view(row.of, -1).amax(1), most, one):
        return Axis(0, first // row.of, dims, a.tokens)
    second = a.shape[1] if dims > 1 else 1
    if second % row.of == 0 and _only(moved.amax(0).view(row.of, -1).amax(1), most, one):
        return Axis(1, second // row.of, dims, a.tokens)
    return None


def _differ(one: dict[str, list[_Seen]], other: dict[str, list[_Seen]]) -> bool:
    """Whether some module returned something else in the second pass."""
    for path, calls in one.items():
        for a, b in zip(calls, other.get(path, []), strict=False):
            if any(key in b[1] and not torch.equal(x.numbers, b[1][key].numbers) for key, x in a[1].items()):
                return True
    return False


def _only(moved: Tensor, most: float, one: Tensor) -> bool:
    # Experts round the tokens of other rows in another way where they are called with more or fewer of them.
    return torch.equal(moved > 0.05 * most, one)


def _first_names(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    return {path: first.setdefault(id(m), path) for path, m in tree.named_modules(model, remove_duplicate=False)}


# -- padding


def sees_padding(base: Base) -> bool:
    """Whether a short text has other outputs in a batch with longer ones than by itself, in spite of the mask: where
    convolutions or averages go over hidden states. Measured; a model that cannot be is taken for one that does."""
    shadow = Base(shadow_of(base.model, stands_for=lambda tensor: tensor), base.family)
    takes = inspect.signature(shadow.model.forward).parameters
    text = _text(shadow, takes) if isinstance(shadow.model, PreTrainedModel) else None
    if text is None or "attention_mask" not in text[0]:
        return True
    inputs = text[0]
    rows, width = inputs["attention_mask"].shape
    length = int(inputs["attention_mask"][-1].sum())
    short = {name: x[-1:] if name.startswith("decoder") else x[-1:, :length] for name, x in inputs.items()}
    try:
        among = _returned(shadow.model, inputs, (rows, width), length)
        alone = _returned(shadow.model, short, (1, length), length)
    except Exception:  # whatever a model says of a text of that length
        return True
    eps = max(torch.finfo(x.dtype).eps for x in tree.tensors(base.model) if x.is_floating_point())
    pairs = zip(among, alone, strict=False)
    return len(among) != len(alone) or any(_apart(one, other, eps**0.5) for one, other in pairs)


def _returned(model: nn.Module, inputs: dict[str, Tensor], sizes: tuple[int, int], length: int) -> list[Tensor | None]:
    """Of the first tensor that each module returns, what the last row has: see :func:`_row`."""
    found: list[Tensor | None] = []

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        first = next(tensors(output), None)
        if first is not None and first[1].is_floating_point():
            found.append(_row(first[1], sizes, length))

    handles = [module.register_forward_hook(hook) for module in tree.modules(model)]
    try:
        with _at_rest(model):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _row(x: Tensor, sizes: tuple[int, int], length: int) -> Tensor | None:
    """What the last row has of its tokens, or of all of it; None where nothing tells where that is."""
    if x.dim() > 2 and x.shape[:2] == sizes:
        return x[-1, :length].float()
    return x[-1].float() if x.dim() == 2 and x.shape[0] == sizes[0] else None


def _apart(one: Tensor | None, other: Tensor | None, allowed: float) -> bool:
    if one is None or other is None or one.shape != other.shape:
        return False
    return float((one - other).abs().max()) > allowed * float(other.abs().max())


# -- dropout


def odd_dropouts(base: Base) -> list[tuple[str, bool]]:
    """Dropout modules that are known to drop something else than tensors whose first dimension counts rows: their
    paths, and whether it is something that all rows share."""
    seen, out = survey(base), []
    for path, module in tree.named_modules(base.model):
        calls = seen.at(path)
        if "drop" not in type(module).__name__.lower() or not calls or list(module.children()):
            continue
        found = [next(iter(call.inputs.values()), None) for call in calls]
        if any(axis is None or axis.dim != 0 for axis in found):
            out.append((path, all(axis is not None and axis.dim is None for axis in found)))
    return out


# -- what never runs


def of_use(base: Base, layers: list[tuple[str, AdapterLayer]], named: bool) -> list[tuple[str, AdapterLayer]]:
    """The adapter layers of an adapter that can do what they are for.

    A module that never runs, of which a model reads the weights alone, has no use for any: it would change nothing, and
    have no gradient. One that returns something else than the product with its weight, as a router returns scores, has
    none for a change of that weight.

    Args:
        named: somebody asked for the modules by name, and is told of those that are left out.

    Raises:
        TanzakuError: no module is left, or one that was asked for returns something else than a product.
    """
    model = base.model
    places = {p: model.get_submodule(p) for p, s in layers if p and isinstance(s, ModuleLayer | WeightCopy)}
    suspects = [path for path in places if may_not_run(model, path)]
    idle = {path for path in suspects if survey(base).never_runs(base, path)}
    # The copy of a weight that other modules have too is used in them.
    idle -= {p for p, s in layers if p in idle and isinstance(s, WeightCopy) and _also_elsewhere(model, places[p])}
    odd = {p for p, s in layers if p in places and p not in idle and isinstance(s, ModuleLayer)}
    odd = {p for p in odd if not multiplies(places[p]) or _by_another_way(model, p)}
    if not idle and not odd:
        return layers
    left = [(path, layer) for path, layer in layers if path not in idle and path not in odd]
    reasons = [f"{holder} never runs its {names}" for holder, names in _by_holder(base, idle).items()]
    reasons += [f"{kind} returns more than the product with its weight" for kind in {_kind(places[p]) for p in odd}]
    text = f"{'; '.join(reasons)}: an adapter there would not do what it is for"
    if (odd and named) or not any(isinstance(layer, ModuleLayer) for _, layer in left):
        others = [name for name in base.candidates() if name not in {p.rpartition(".")[2] for p in idle | odd}]
        raise TanzakuError(f"{text}; leave {listed(sorted(idle | odd), 3)} out, of the candidates {listed(others)}")
    if named:
        warnings.warn(f"{text}, and is left out", stacklevel=3)
    return left


def _also_elsewhere(model: nn.Module, module: nn.Module) -> bool:
    own, inside = {id(p) for p in module.parameters()}, {id(m) for m in module.modules()}
    outside = (m for m in tree.modules(model) if id(m) not in inside)
    return any(id(p) in own for m in outside for p in m._parameters.values())


def _kind(module: nn.Module) -> str:
    return type(module).__name__


@torch.no_grad()
def biased(base: Base, skip: Callable[[str], bool]) -> list[tuple[str, nn.Module]]:
    """(path, module) of every bias that is simply added to what its module returns, as linear layers, convolutions and
    norms do. A router makes scores of the sum, and some models read a convolution's bias past it while they decode:
    of those a warning says that they are left out.

    Args:
        skip: whether a path is none of them.
    """
    kinds = (nn.Linear, Conv1D, _ConvNd, _NormBase, nn.GroupNorm, nn.LayerNorm)
    found = []
    for path, module in tree.named_modules(base.model):
        if module._parameters.get("bias") is None or skip(path):
            continue
        if not (isinstance(module, kinds) or type(module).__name__.endswith("Norm")):
            why = "it is not simply added to what that returns"
        elif reads_past(base, path, "bias"):
            why = "it is read past the module, too"
        else:
            found.append((path, module))
            continue
        warnings.warn(f"the bias of {path}, a {type(module).__name__}, is not trained: {why}", stacklevel=2)
    return found


def reads_past(base: Base, path: str, *names: str) -> bool:
    """Whether the module that holds this one reads tensors of it by these names, in a kernel of its own, say: what is
    done around the module is then not done there."""
    parent, _, name = path.rpartition(".")
    uses = _uses(cast(Any, type(base.model.get_submodule(parent))), name) if path and name.isidentifier() else ()
    return not {*uses}.isdisjoint(names)


def multiplies(module: nn.Module) -> bool:
    """Whether a module with a matrix, a convolution or a table returns the product with its weight, plus its bias, and
    nothing else: then what is added to the product may be added to the weight. A router that returns scores does
    not."""
    kinds: tuple[Any, ...] = (nn.Linear, Conv1D, nn.Conv2d, nn.Embedding)
    kind = next((kind for kind in kinds if isinstance(module, kind)), None)
    if kind is None or type(module).forward is kind.forward or quantised(module):
        return True
    weight = cast(Tensor, module.weight)
    if kind is nn.Embedding:
        return _looks_up(module)
    if kind is nn.Conv2d:
        conv = cast(nn.Conv2d, module)
        size = [2 * step * k for step, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        x = _waves((2, int(conv.in_channels), *size), weight)
    else:
        x = _waves((2, features(module)[0]), weight)
    try:
        with _at_rest(module):
            found, expected = module(x), cast(Any, kind).forward(module, x)
    except Exception:  # it wants something else than one tensor
        return False
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return found.is_meta or torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-3)


def _looks_up(module: nn.Module) -> bool:
    """Whether an embedding that finds out for itself what to look up returns what its table holds, or a multiple."""
    weight = cast(Tensor, module.weight)
    ids = torch.ones(2, 3, dtype=torch.long, device=weight.device)
    for given in ((ids,), (ids.shape,), (ids.shape, ids.device)):
        try:
            once, twice = (
                next(x for _, x in tensors(type(module).forward(with_tensors(module, {"weight": table}), *given)))
                for table in (weight, weight * 2)
            )
        except Exception:  # it reads something else
            continue
        return once.is_meta or torch.allclose(twice.float(), 2 * once.float(), rtol=1e-2)
    return False


def may_not_run(model: nn.Module, path: str) -> bool:
    """Whether the module that holds this one reads its weights, or does not mention it, by its own text."""
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    if not name.isidentifier() or isinstance(holder, (*_HOLDERS, nn.Sequential)):
        return False
    uses = _uses(cast(Any, type(holder)), name)
    return any(uses) or not uses


def _by_another_way(model: nn.Module, path: str) -> bool:
    """Whether the module that holds this one also has it look up or multiply by a method of its own, which no hook
    sees."""
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(path)
    for use in _uses(cast(Any, type(model.get_submodule(parent))), name) if name.isidentifier() else ():
        method = vars(type(module)).get(use)
        if use != "forward" and inspect.isfunction(method) and re.search(_LOOKS, _text_of(method)):
            return True
    return False


_LOOKS = r"super\(\)\.forward|\.(embedding|linear)\(|self\.weight\[|index_select"


@lru_cache(maxsize=4096)
def _uses(kind: Any, name: str) -> tuple[str, ...]:
    """What a class does with `self.NAME`: the attribute that it takes of it, "" where it takes it whole. To give it
    back, or another in its place, is no use."""
    text = "".join(map(_text_of, (each for each in kind.__mro__ if each not in (nn.Module, PreTrainedModel, object))))
    text = re.sub(rf"(=|\breturn)\s*self\.{name}\s*$", "", text, flags=re.MULTILINE)
    return tuple(re.findall(rf"\bself\.{name}\b(?!\s*=[^=])(?:\s*\.\s*(\w+))?", text))


def _text_of(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # a class that was made on the spot
        return ""


def _by_holder(base: Base, idle: Iterable[str]) -> dict[str, str]:
    """Kinds of modules, and names of what they hold and never run."""
    kinds: dict[str, set[str]] = {}
    for path in idle:
        parent, _, name = path.rpartition(".")
        kinds.setdefault(_kind(base.model.get_submodule(parent)), set()).add(name)
    return {kind: listed(sorted(names)) for kind, names in kinds.items()}


# -- tiny batches


def _tiny(base: Base) -> Iterator[tuple[Callable[..., Any], dict[str, Any], dict[str, Any], str]]:
    """(what to run, two batches that differ in one row, what the rows are) for a transformers model."""
    model = base.model
    if not isinstance(model, PreTrainedModel):
        return
    if getattr(model.config, "attention_type", None) == "block_sparse":
        return  # BigBird, which turns to another attention for good when it sees a short text
    takes = inspect.signature(model.forward).parameters
    text, others = _text(base, takes), _others(base, takes)
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    if text is not None:
        yield model, {**text[0], **options}, {**text[1], **options}, "rows"
    if others is not None and (text is None or not _has_places(model)):
        both = text or ({}, {})
        yield model, {**both[0], **others[0], **options}, {**both[1], **others[1], **options}, "rows"
    images = getattr(model, "get_image_features", None)
    if images is not None and _has_places(model) and (pictures := _images(model, images)) is not None:
        yield images, *pictures, "images"


def image_token(config: Any) -> int | None:
    """The token that stands for an image, or a part of one, in a model's texts."""
    for name in ("image_token_id", "image_token_index"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return None


def _has_places(model: PreTrainedModel) -> bool:
    """Whether images have places in the texts: then they are no rows of their own."""
    return image_token(model.config) is not None


def _text(base: Base, takes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    config, model = base.config, cast(PreTrainedModel, base.model)
    if "input_ids" not in takes:
        return _decoder(model, takes)
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        return None
    special = set(_special(model.config.to_dict()))
    plain = [token for token in range(min(vocabulary, 512)) if token not in special]
    if len(plain) < 2:
        return None
    end = next((t for t in _numbers(getattr(config, "eos_token_id", None)) if 0 <= t < vocabulary), None)
    pad = next((t for t in _numbers(getattr(config, "pad_token_id", None)) if 0 <= t < vocabulary), plain[0])
    out = []
    for changed in (False, True):
        ids = torch.tensor([[plain[(7 * i + 3 * row) % len(plain)] for i in range(_TOKENS)] for row in range(_ROWS)])
        lengths = [_TOKENS, _TOKENS - 2, _TOKENS - 1, _TOKENS, _TOKENS - 4]
        if changed:
            ids[_OTHER] = torch.tensor([plain[(5 * i + 11) % len(plain)] for i in range(_TOKENS)])
            lengths[_OTHER] = _TOKENS - 3
        inputs: dict[str, Any] = {}
        if "attention_mask" in takes:
            mask = (torch.arange(_TOKENS)[None] < torch.tensor(lengths)[:, None]).long()
            ids = ids.where(mask.bool(), pad)
            inputs["attention_mask"] = mask
        else:
            lengths = [_TOKENS] * _ROWS
        if end is not None:
            ids[range(_ROWS), [length - 1 for length in lengths]] = end
        inputs["input_ids"] = ids
        if type(model).__name__.endswith("ForMultipleChoice"):
            inputs = {name: torch.stack([x, x.roll(1, 1)], dim=1) for name, x in inputs.items()}
        out.append({name: x.to(model.device) for name, x in inputs.items()})
    more = _decoder(model, takes)
    return ({**out[0], **more[0]}, {**out[1], **more[1]}) if more is not None else (out[0], out[1])


def _decoder(model: PreTrainedModel, takes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    if "decoder_input_ids" not in takes or not getattr(model.config, "is_encoder_decoder", False):
        return None
    if "Classification" in type(model).__name__ or "QuestionAnswering" in type(model).__name__:
        return None  # they make the decoder's text out of the encoder's
    size = Base.of(model).config.vocab_size
    special = set(_special(model.config.to_dict()))
    plain = [token for token in range(min(size, 512)) if token not in special]
    first = torch.tensor([[plain[(5 * i + 2 * row) % len(plain)] for i in range(_TOKENS - 2)] for row in range(_ROWS)])
    second = first.clone()
    second[_OTHER] = torch.tensor([plain[(3 * i + 13) % len(plain)] for i in range(_TOKENS - 2)])
    return {"decoder_input_ids": first.to(model.device)}, {"decoder_input_ids": second.to(model.device)}


def _numbers(value: Any) -> list[int]:
    return [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int)]


def _special(config: Any) -> Iterator[int]:
    """Every number in a configuration that may be a token's."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            if isinstance(value, Mapping):
                yield from _special(value)
            elif isinstance(name, str) and ("token" in name or name.endswith("_id")):
                yield from _numbers(value)


def _others(base: Base, takes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Images or sounds, where a model reads some as rows."""
    model = cast(PreTrainedModel, base.model)
    config = model.config
    shapes: dict[str, tuple[int, ...]] = {}
    if "pixel_values" in takes:
        vision = getattr(config, "vision_config", config)
        shapes["pixel_values"] = (getattr(vision, "num_channels", 3), *_pair(getattr(vision, "image_size", 64)))
    elif "input_features" in takes and hasattr(config, "num_mel_bins"):
        shapes["input_features"] = (config.num_mel_bins, 2 * getattr(config, "max_source_positions", 100))
    elif "input_values" in takes and hasattr(config, "conv_kernel"):
        shapes["input_values"] = (4000,)
    if not shapes:
        return None
    like = next(tensor for tensor in tree.tensors(model) if tensor.is_floating_point())
    first = {name: _waves((_ROWS, *shape), like) for name, shape in shapes.items()}
    return first, {name: _other_row(x, _OTHER) for name, x in first.items()}


def _images(model: PreTrainedModel, takes: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Images as a model reads them that gives each a place in a text."""
    vision = getattr(model.config, "vision_config", None)
    names = inspect.signature(takes).parameters
    if vision is None or "pixel_values" not in names:
        return None
    like = next(tensor for tensor in tree.tensors(model) if tensor.is_floating_point())
    if "image_grid_thw" in names:  # patches of all images, one after another
        side = 2 * getattr(vision, "spatial_merge_size", 1)
        channels = int(getattr(vision, "in_channels", getattr(vision, "in_chans", 3)))
        each = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
        first = _waves((_ROWS, side * side, each), like)
        grid = torch.tensor([[1, side, side]] * _ROWS, device=like.device)
        both = [{"pixel_values": x.flatten(0, 1), "image_grid_thw": grid} for x in (first, _other_row(first, _OTHER))]
        return both[0], both[1]
    first = _waves((_ROWS, getattr(vision, "num_channels", 3), *_pair(getattr(vision, "image_size", 64))), like)
    return {"pixel_values": first}, {"pixel_values": _other_row(first, _OTHER)}


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _waves(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Numbers that differ from place to place, drawn from no generator."""
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (numbers.sin() + (numbers * 0.37).cos()).view(shape).to(like.device, like.dtype)


def _other_row(x: Tensor, row: int) -> Tensor:
    out = x.detach().clone()
    if x.is_floating_point():
        out[row] = out[row].flip(-1) - 0.5 * out[row]
    elif x.dtype != torch.bool:
        out[row] = out[row].roll(1, -1)  # only numbers that the model takes
    return out
