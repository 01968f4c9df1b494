"""What a model does in one forward pass: which layers with weights run, in which order, and what each of them reads.

The pass is made by a shadow of the model: its modules, configurations and plain attributes are copied, its tensors are
not. Every layer with a weight matrix returns a tensor of the right shape, so nothing is multiplied, a model on any
device (also offloaded, quantised or without numbers) is traced within milliseconds a layer, and the model itself, its
mode and the random state are left alone.

Each result is the start of a new autograd graph. Walking back from what a layer reads ends at the results that it is
computed from: the flow of data, whatever the layers are called.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from tanzaku.models import tree
from tanzaku.models.families.prompt_call import PromptCall, catch, keys_values

_TOKENS, _DECODER_TOKENS = 12, 7  # unequal, so that cross-attention is told by its keys
_MANY = 8  # a layer that reads more results than these reads the residual stream
_LARGE = 50_000_000  # numbers of a model that is worth a pass without them
_SMALL = 1 << 20  # numbers of a tensor that is given memory of its own
_NAME = "tanzaku_trace"


@dataclass
class Call:
    """The first time that a layer ran.

    Args:
        path: of the module. sizes: its (in, out) features or channels.
        reads: the tensor that it read, by a number. result: the number of what it returned.
        sources: what its input is computed from.
        direct: the input is another layer's result itself.
    """

    path: str
    module: nn.Module
    sizes: tuple[int, int]
    reads: int
    result: int
    sources: Sources
    direct: bool


@dataclass
class Sources:
    """Numbers of the results that a tensor is computed from, the nearest first, straight or through a softmax."""

    straight: list[int] = field(default_factory=list)
    weighing: list[int] = field(default_factory=list)
    many: bool = False  # there are more: it is the residual stream, or close to it


@dataclass
class Attention:
    """One call of transformers' attention interface.

    Args:
        path: of the module that called.
        heads, kv_heads: of queries; of keys and values. key_dim, value_dim: numbers of one head.
        cross: keys are of other tokens than queries. shared: keys and values are those of an earlier layer.
        query, key, value: what they are computed from. result: its number.
        prompt: how the layer is called with a prompt for tokens; None where it cannot be.
        of: the path of the layer whose keys and values they are, and that `prompt` calls.
    """

    path: str
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    cross: bool = False
    shared: bool = False
    query: Sources = field(default_factory=Sources)
    key: Sources = field(default_factory=Sources)
    value: Sources = field(default_factory=Sources)
    result: int = -1
    prompt: PromptCall | None = None
    of: str = ""


class Passed(NamedTuple):
    """The first time that a module ran: the nodes of autograd's graph that gave the first tensor that it read and the
    first that it returned."""

    path: str
    module: nn.Module
    read: Any
    returned: Any


@dataclass
class Trace:
    """What ran, in order: layers with weights, and calls of the attention interface; each path once.

    `passed` are all modules, in the order in which they ended, where somebody asks for them.
    """

    calls: list[Call] = field(default_factory=list)
    passed: list[Passed] = field(default_factory=list)
    attention: list[Attention] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)  # modules that hold the experts of a mixture in fused tensors
    convolves: set[str] = field(default_factory=set)  # modules that have a convolution over tokens
    remembers: list[str] = field(default_factory=list)  # modules that keep a state in themselves, in no cache


class _Recorder:
    def __init__(self, model: nn.Module):
        self.trace = Trace()
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.leaves: dict[int, int] = {}  # id of the start of a graph -> number
        self.kept: list[Tensor] = []  # an id is a tensor's as long as it lives
        self.seen: set[str] = set()
        self.ended: set[str] = set()
        self.keys: dict[int, Attention] = {}
        self.given: dict[int, tuple[Any, Any]] = {}  # what modules were called with last

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.given[id(module)] = (args, kwargs)

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        path = self.paths[id(module)]
        if path not in self.ended and torch.is_grad_enabled():
            self.ended.add(path)
            read, returned = (next(_tensors_in(value), None) for value in ((args, kwargs), output))
            if read is not None and returned is not None:
                self.kept += [read, returned]  # a node is the same object as long as it lives
                self.trace.passed.append(Passed(path, module, read.grad_fn, returned.grad_fn))

    def result(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, int]:
        start = torch.zeros(shape, dtype=dtype, requires_grad=True)
        number = len(self.leaves)
        self.leaves[id(start)] = number
        self.kept.append(start)
        return start.clone(), number

    def called(self, path: str, module: nn.Module, sizes: tuple[int, int], x: Tensor, shape: tuple[int, ...]) -> Tensor:
        out, number = self.result(shape, x.dtype)
        # What runs without gradients first and with them later (in a model that refines its thoughts) counts then.
        if path not in self.seen and torch.is_grad_enabled():
            self.seen.add(path)
            self.kept.append(x)
            sources, steps = self.walk(x)
            self.trace.calls.append(Call(path, module, sizes, id(x), number, sources, steps == 0))
        return out

    def attended(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, queries, _ = query.shape
        out, number = self.result((rows, queries, heads, value.shape[-1]), query.dtype)
        path = self.paths.get(id(module), "")
        if path in self.seen or not torch.is_grad_enabled():
            return out
        self.seen.add(path)
        self.kept.append(key)
        layer = Attention(
            path,
            heads=heads,
            kv_heads=key.shape[1],
            key_dim=key.shape[-1],
            value_dim=value.shape[-1],
            cross=key.shape[2] != queries,
            query=self.walk(query)[0],
            key=self.walk(key)[0],
            value=self.walk(value)[0],
            result=number,
            prompt=PromptCall.of(module, *self.given.get(id(module), ((), {})), queries),
            of=path,
        )
        first = self.keys.setdefault(id(key), layer)
        layer.shared, layer.prompt, layer.of = first is not layer, first.prompt, first.of
        self.trace.attention.append(layer)
        return out

    def try_prompt(self, layer: Attention, shadow: nn.Module) -> None:
        """Call the layer with a prompt of two, and forget how where its keys and values are not those of a prompt."""
        if layer.prompt is None:
            return
        prompt = torch.zeros(1, 2, layer.prompt.width)
        try:
            caught = keys_values(shadow.get_submodule(layer.of), layer.prompt, prompt)
        except Exception:  # another library's code on inputs that it was not written for
            layer.prompt = None
            return
        shapes = [(1, layer.kv_heads, 2, layer.key_dim), (1, layer.kv_heads, 2, layer.value_dim)]
        if [tuple(x.shape) for x in caught] != shapes:
            layer.prompt = None

    def walk(self, x: Tensor) -> tuple[Sources, int]:
        """What `x` is computed from, and by how many operations that change numbers."""
        found = Sources()
        steps = 0
        seen: set[tuple[Any, bool]] = set()
        queue: list[tuple[Any, bool]] = [(x.grad_fn, False)] if x.grad_fn is not None else []
        while queue:
            node, weighing = queue.pop(0)
            if (node, weighing) in seen:
                continue
            seen.add((node, weighing))
            start = getattr(node, "variable", None)
            if start is not None and id(start) in self.leaves:
                side = found.weighing if weighing else found.straight
                side.append(self.leaves[id(start)])
                if len(found.straight) + len(found.weighing) > _MANY:
                    found.many = True
                    break
                continue
            name = node.name()
            steps += not any(word in name for word in ("Clone", "View", "AccumulateGrad", "ToCopy"))
            softmax = "Softmax" in name
            for place, (before, _) in enumerate(node.next_functions):
                if before is not None:
                    # The fused function's third input, the values, is weighed and does not weigh.
                    asks = softmax or ("ScaledDotProduct" in name and place < 2)
                    queue.append((before, weighing or asks))
        return found, steps


_recorder: ContextVar[_Recorder] = ContextVar("_recorder")


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    catch(key, value)
    return _recorder.get().attended(module, query, key, value), None


def _experts(module: nn.Module, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    recorder = _recorder.get()
    recorder.trace.experts.append(recorder.paths.get(id(module), ""))
    return recorder.result(tuple(hidden_states.shape), hidden_states.dtype)[0]


def _register() -> None:
    if _NAME in ALL_ATTENTION_FUNCTIONS:
        return
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:  # transformers before its interface for experts
        return
    ALL_EXPERTS_FUNCTIONS.register(_NAME, _experts)


def trace_of(model: nn.Module, modules: bool = False) -> Trace | None:
    """One pass of a shadow of `model` over a few made-up inputs, or None where that is not possible.

    Args:
        modules: note all modules that pass, too, which takes as long again.
    """
    _register()
    # Without numbers no operation takes time, but some code looks at them (whether a mask hides anything). Most of
    # it spares fake tensors, which are slow. A small model takes no time with numbers.
    large = sum(tensor.numel() for tensor in tree.tensors(model)) > _LARGE
    for place in ("meta", "fake", "cpu") if large else ("cpu", "meta"):
        try:
            with (
                torch.random.fork_rng(devices=[]),
                FakeTensorMode(allow_non_fake_inputs=True) if place == "fake" else torch.device(place),
                torch.enable_grad(),
                torch.autocast("cpu", enabled=False),
            ):
                shadow = shadow_of(model, partial(_zeros, place=place), attention=_NAME, experts=_NAME)
                found = _pass_of(shadow, modules)
        except Exception:  # another library's code on inputs that it was not written for
            continue
        if found.calls:
            return found
    return None


def _pass_of(shadow: Any, modules: bool) -> Trace:
    recorder = _Recorder(shadow)
    found = recorder.trace
    for path, module in shadow.named_modules():
        _stand_in(path, module)
        module.register_forward_pre_hook(recorder.before, with_kwargs=True)
        if modules:
            module.register_forward_hook(recorder.after, with_kwargs=True)
        if isinstance(module, nn.Conv1d):
            found.convolves.add(path.rpartition(".")[0])
    token = _recorder.set(recorder)
    try:
        held = {path: _held(module) for path, module in shadow.named_modules()}
        entrance = _entrance(shadow)
        entrance(**_inputs(entrance))
        found.remembers = [path for path, module in shadow.named_modules() if _held(module) != held[path]]
        for layer in found.attention:
            recorder.try_prompt(layer, shadow)
    finally:
        _recorder.reset(token)
    return found


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Those with floating point numbers, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping | tuple | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(each)


def _held(module: nn.Module) -> list[int]:
    return [id(value) for value in vars(module).values() if isinstance(value, Tensor)]


# -- the shadow

PREFIX = "tanzaku_"  # of attention functions that are wrapped for adapters


def shadow_of(
    model: nn.Module,
    stands_for: Callable[[Tensor], Tensor],
    attention: str | None = None,
    experts: str | None = None,
) -> Any:
    """A copy of the modules without hooks and adapters, in eval mode.

    Args:
        stands_for: gives what is in the place of each tensor. attention, experts: implementations by their names;
            None: the model's own.
    """
    memo: dict[int, Any] = {}
    for module in tree.modules(model):
        for child in module._modules.values():
            if isinstance(child, tree.Adapters):
                memo[id(child)] = None
        for name, value in vars(module).items():
            if name.endswith("_hooks") and isinstance(value, OrderedDict):
                memo[id(value)] = OrderedDict()
            elif name.startswith("_tanzaku") or name == "forward":  # with tensors that have no copies
                memo[id(value)] = None
        for tensor in _tensors(module):
            if id(tensor) not in memo:
                memo[id(tensor)] = stands_for(tensor)
    shadow: Any = copy.deepcopy(model, memo)
    for module in shadow.modules():
        module.__dict__.pop("forward", None)  # accelerate's, which moves weights
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            own = config._attn_implementation_internal
            config._attn_implementation_internal = attention or (own and own.removeprefix(PREFIX))
            if experts is not None and hasattr(config, "_experts_implementation_internal"):
                config._experts_implementation_internal = experts
    return shadow.eval()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
        if isinstance(value, Tensor):
            yield value


def _zeros(tensor: Tensor, place: str) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    shape = tuple(tensor.shape)
    if place != "cpu" or tensor.numel() <= _SMALL:
        numbers = torch.zeros(shape, dtype=dtype)
    else:
        numbers = torch.zeros((), dtype=dtype).expand(shape)
    return nn.Parameter(numbers, requires_grad=False) if isinstance(tensor, nn.Parameter) else numbers


def _stand_in(path: str, module: nn.Module) -> None:
    """Let a layer with a weight matrix, or a table of embeddings, return zeros of the shape that it would return."""
    kind = type(module)
    plain = kind.forward in (nn.Linear.forward, Conv1D.forward) or not kind.__module__.startswith("transformers.")
    sizes = sizes_of(module)
    if isinstance(module, nn.Embedding) and kind.forward is nn.Embedding.forward:
        module.__dict__["forward"] = partial(_embedded, module)
    elif isinstance(module, nn.Embedding):
        module.__dict__["forward"] = partial(_embedded_by_its_own_code, module)
    elif sizes is not None and plain and not isinstance(module, nn.Conv1d | nn.Conv2d):
        module.__dict__["forward"] = partial(_multiplied, path, module, sizes)
    elif sizes is not None:
        module.__dict__["forward"] = partial(_by_its_own_code, path, module, sizes)


def _embedded(module: nn.Embedding, ids: Tensor) -> Tensor:
    return _recorder.get().result((*ids.shape, module.embedding_dim), module.weight.dtype)[0]


def _embedded_by_its_own_code(module: nn.Embedding, *args: Any, **kwargs: Any) -> Any:
    out = type(module).forward(module, *args, **kwargs)
    return _recorder.get().result(tuple(out.shape), out.dtype)[0] if isinstance(out, Tensor) else out


def _multiplied(path: str, module: nn.Module, sizes: tuple[int, int], x: Tensor, *_: Any, **__: Any) -> Tensor:
    return _recorder.get().called(path, module, sizes, x, (*x.shape[:-1], sizes[1]))


def _by_its_own_code(path: str, module: nn.Module, sizes: tuple[int, int], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    # Without numbers it tells the shape at no cost.
    bare = copy.copy(module)
    bare._parameters = {n: None if p is None else nn.Parameter(p.to("meta")) for n, p in module._parameters.items()}
    with torch.no_grad():
        out = type(module).forward(bare, x.to("meta"), *args, **kwargs)
    if not isinstance(out, Tensor):  # a router, which is a linear layer and returns what follows from it
        return type(module).forward(module, x, *args, **kwargs)
    return _recorder.get().called(path, module, sizes, x, tuple(out.shape))


def sizes_of(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a layer with a weight matrix, quantised or not; None for other modules."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return module.in_channels, module.out_channels
    n_in, n_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(n_in, int) and isinstance(n_out, int) and isinstance(getattr(module, "weight", None), Tensor):
        return n_in, n_out
    return None


def _entrance(model: Any) -> Any:
    """What is run: the model, or its backbone where a head makes the decoder's text out of the encoder's."""
    headed = any(word in type(model).__name__ for word in ("Classification", "QuestionAnswering"))
    return model.base_model if headed and getattr(model.config, "is_encoder_decoder", False) else model


def _inputs(model: Any) -> dict[str, Tensor]:
    """Made-up inputs: a row of a few tokens, a picture or a piece of sound, as the model's forward() takes."""
    names = inspect.signature(model.forward).parameters
    config = model.config
    main = getattr(model, "main_input_name", "input_ids")
    out: dict[str, Tensor] = {}
    if main == "pixel_values" or ("pixel_values" in names and "input_ids" not in names):
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or 64
        height, width = size if isinstance(size, list | tuple) else (size, size)
        out["pixel_values"] = torch.zeros(1, getattr(vision, "num_channels", 3), height, width)
    elif main == "input_features":
        frames = 2 * (getattr(config, "max_source_positions", None) or 64)
        out["input_features"] = torch.zeros(1, config.num_mel_bins, frames)
    elif main == "input_values":
        out["input_values"] = torch.zeros(1, 16000)
    else:
        out["input_ids"] = torch.full((1, _TOKENS), 7)
        end = getattr(config.get_text_config(), "eos_token_id", None)
        if isinstance(end, int) and end >= 0:  # what some classifiers read
            out["input_ids"][0, -1] = end
        if "attention_mask" in names:
            out["attention_mask"] = torch.ones_like(out["input_ids"])
        if "pixel_values" in names and "inputs_embeds" not in names:  # two towers side by side
            vision = config.vision_config
            out["pixel_values"] = torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size)
    if type(model).__name__.endswith("ForMultipleChoice"):  # which reads a text for each choice
        out = {name: torch.stack([x, x], dim=1) for name, x in out.items()}
    if "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", False):
        out["decoder_input_ids"] = torch.full((1, _DECODER_TOKENS), 7)
    if "use_cache" in names:
        out["use_cache"] = False  # type: ignore[assignment]
    return out
