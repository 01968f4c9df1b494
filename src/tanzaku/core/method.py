"""What a method is: the whole contract, on one screen.

A method is a dataclass of settings and one function, :meth:`Method.build`, that attaches *adapter layers* to sites of a
frozen model. An adapter layer owns the parameters and the mathematics of one adapter at one site. Saving, loading,
merging, routing, devices and data types are written once, elsewhere.

| adapter layer    | it overrides                 | meaning                                                          |
|------------------|------------------------------|------------------------------------------------------------------|
| `ModuleLayer`    | `inputs`, `outputs`          | change what a submodule reads or what it returns; `batched_...` |
| `WeightDelta`    | `delta` (see `delta.py`)     | change a submodule's weight; merging comes with it               |
| `AttentionLayer` | `attend`                     | change one attention layer's result, given queries, keys, values |
| `TokenLayer`     | `vectors`                    | virtual tokens, put before the row's own                         |
| `WeightCopy`    | (nothing: see `weights.py`)  | the adapter's own copy of a module's weights                     |
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from tanzaku.core.space import Choice, Range, Spaces, spaces
from tanzaku.errors import TanzakuError, TooLarge, nearest
from tanzaku.models import tree
from tanzaku.models.heads import Part, heads_of, named_heads
from tanzaku.support.context import Local
from tanzaku.support.refs import Ref

if TYPE_CHECKING:
    from tanzaku.core.combining import Combining
    from tanzaku.core.passes import Passes
    from tanzaku.models.families import Base


@dataclass(frozen=True)
class Copy:
    """A part of the model that an adapter has its own copy of.

    Args:
        tied: tensors of it that are tied in the base are one in the adapter, too, across all its tied copies.
    """

    part: Part
    trained: bool
    tied: bool = False


OFFLOADED = (
    "an adapter's tensors are on the meta device, and its base is not: it was offloaded with it; offload the base "
    "first, then attach or load the adapter"
)


class AdapterLayer(nn.Module):
    """Parameters and mathematics of one adapter at one site."""

    trained = True  # False for what is only kept, such as a head that is not to be trained
    found_again: ClassVar[tuple[str, ...]] = ()  # tensors that HF PEFT computes of the base, and its files lack
    hub: ClassVar[str | None] = None  # where the Adapters library keeps such layers, by its own word

    def check_here(self, like: Tensor) -> None:
        """Raise a clear error where the layer's tensors were moved off with a base that was offloaded after it was
        attached: what is computed with them is whatever memory holds, and no error of torch's."""
        first = self.__dict__.get("_first")
        if first is None:
            # Its own, or, of a layer that has none, those of what it shares with others.
            shared = (ref() for ref in self.__dict__.values() if isinstance(ref, Ref))
            modules = (m for at in (self, *shared) if isinstance(at, AdapterLayer) for m in at.modules())
            named = ((m._parameters, n) for m in modules for n, p in m._parameters.items() if p is not None)
            first = self.__dict__["_first"] = next(named, ({}, ""))
        here = first[0].get(first[1])
        if here is not None and here.is_meta and not like.is_meta:
            raise TanzakuError(OFFLOADED)

    def export(self) -> dict[str, Tensor]:
        """Tensors as they go to a file, by the names HF PEFT gives them below the site's path."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`export` gave. Names and shapes were checked before."""
        self.load_state_dict(tensors)

    def combine(self, module: nn.Module, given: Sequence[Any], weights: Sequence[float], by: Combining) -> None:
        """Become what is made of layers of this kind at this module, in place, where the method combines."""
        raise TypeError(f"{type(self).__name__} defines no combine()")


class ModuleLayer(AdapterLayer):
    """Changes a submodule's input or output, for the rows routed to it. Rows are the first dimension.

    In training a decoder's rows may come as single tokens, (tokens, 1, features), or as the token alone that is read
    at the end: a layer treats each token by itself, or says that it needs `whole_rows`, or both modules `untrimmed`.
    """

    edits_input: ClassVar[bool] = False
    edits_output: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = False  # what it computes depends on the module's own weight
    reads_call: ClassVar[bool] = False  # it wants all that the module was given: `outputs_of` in place of `outputs`
    ties: Sequence[str] = ()  # paths whose weights are tied to its module's and which the adapter changes alike
    undoes: ClassVar[bool] = False  # it undoes what its adapter did elsewhere: of a stack, the last one comes first
    reads_places: ClassVar[bool] = False  # it asks where tokens stand in their row's text: see `places.py`
    whole_rows: ClassVar[bool] = False  # it reads more of a row than the token it changes: rows stay whole, and padded
    reads_padding: ClassVar[bool] = False  # and of the padding, too: what shares a step is padded alike
    width: int | None = None  # features of what it changes, where its module's weight does not tell
    untrimmed: ClassVar[bool] = False  # it reads what two modules have: neither has but one token of a row, then

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """`x` as the module shall read it; same shape."""
        return x

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """`y` as the module shall return it; same shape. `x` is what the module read."""
        return y

    def outputs_of(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        """`y` as the module shall return it, of all that it was given."""
        raise TypeError(f"{type(self).__name__} defines no outputs_of()")

    def reads(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """What it looks at as it changes `y`, in the size of `y`: by this attention over several adapters asks."""
        return y

    def batch_key(self, module: nn.Module) -> Hashable | None:
        """Layers of one kind at one module with equal answers are computed together; None: this one by itself."""
        return None

    @staticmethod
    def batched_inputs(layers: Sequence[Any], sizes: tuple[int, ...], module: nn.Module, x: Tensor) -> Tensor:
        """:meth:`inputs` of layers of one batch key, each for so many rows of `x`, one layer after another."""
        raise TypeError(f"{type(layers[0]).__name__} defines no batched_inputs()")

    @staticmethod
    def batched_outputs(
        layers: Sequence[Any], sizes: tuple[int, ...], module: nn.Module, x: Tensor, y: Tensor
    ) -> Tensor:
        """:meth:`outputs` of layers of one batch key, each for so many rows of `x` and `y`, one after another."""
        raise TypeError(f"{type(layers[0]).__name__} defines no batched_outputs()")

    def merged(self, module: nn.Module) -> dict[str, Tensor] | None:
        """The module's tensors with this adapter layer folded in, or None where the mathematics does not allow it.

        They are in full precision (`quantize.full_weight` reads the module's own): merging rounds them once.
        """
        return None


@dataclass
class AttentionCall:
    """One call of an attention layer: `query` (rows, heads, queries, head_dim), `key` and `value` (rows, kv_heads,
    keys, head_dim), `mask` None, boolean (True attends) or additive, broadcast to (rows, 1, queries, keys)."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]
    base: Callable[..., tuple[Tensor, Tensor | None]]
    implementation: str = "sdpa"  # the base's, by its name in transformers' attention interface

    def base_result(self) -> tuple[Tensor, Tensor | None]:
        """The base model's own result, (rows, queries, heads, head_dim), and its weights where it has them."""
        return self.base(self.module, self.query, self.key, self.value, self.mask, **self.options)

    def run(self) -> Tensor:
        """The base model's own result alone."""
        return self.base_result()[0]


class AttentionLayer(AdapterLayer):
    """Adds keys and values to an attention layer, or a second result to its own."""

    position_offset: int = 0  # how many positions the adapter layer takes before the row's first token

    def attend(self, call: AttentionCall) -> Tensor:
        """The layer's result, (rows, queries, heads, head_dim), before its output projection."""
        return call.run()


class TokenLayer(AdapterLayer):
    """Virtual tokens with learned vectors, prepended to the rows routed to it."""

    num_virtual_tokens: int

    def vectors(self) -> Tensor:
        """(num_virtual_tokens, width of the embedding) in the scale of the model's embedded tokens."""
        raise TypeError(f"{type(self).__name__} defines no vectors()")

    def vectors_of(self, rows: Tensor) -> Tensor:
        """As :meth:`vectors`, or (rows, num_virtual_tokens, width) where rows have vectors of their own.

        Args:
            rows: (rows routed to it,) by which a layer asks for their :func:`~tanzaku.core.context.context`.
        """
        return self.vectors()


class Attached(Protocol):
    """An adapter, as its method is shown it."""

    name: str
    method: Method
    base: Base

    def at(self) -> Iterator[tuple[str, AdapterLayer]]:
        """(path, layer) in the order they were attached."""
        ...


@dataclass(frozen=True)
class Place:
    """Where an adapter is built.

    Args:
        base: the frozen model.
        adapters: those that the method's :meth:`Method.uses` names.
    """

    base: Base
    adapters: Mapping[str, Attached] = field(default_factory=dict)


@dataclass(frozen=True)
class About:
    """What a user should know of a method to choose it; `docs/methods.md` is made of these.

    Args:
        where: the modules that it changes where nothing else is said, and how.
        parameters: how many numbers it trains, as a formula.
        cost: what it adds to a step's computation.
        choose: when to choose it.
        limits: what it cannot do.
    """

    where: str
    parameters: str
    cost: str
    choose: str
    limits: str


@dataclass
class Method:
    """Settings of a method, by HF PEFT's field names where PEFT has it."""

    name: ClassVar[str]
    peft_type: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    about: ClassVar[About]
    mergeable: ClassVar[bool] = False
    shares_batch: ClassVar[bool] = True  # False: its rows need the model to themselves
    trains_head: ClassVar[bool] = True  # a classifier's head is trained along, unless modules_to_save is empty
    draws: ClassVar[bool] = False  # its layers draw random numbers in training, whatever its settings
    lengthens_rows: ClassVar[bool] = False  # by num_virtual_tokens, which go through every layer
    covers_head: ClassVar[bool] = False  # the method's own adapter layers say what of the head is trained
    file_prefix: ClassVar[str] = "base_model.model."
    without_prefix: ClassVar[tuple[str, ...]] = ("prompt_embeddings",)  # names of tensors that stand bare in files
    combines_by: ClassVar[str | None] = None  # the usual way to make one of several adapters; see `combined`
    holds_changes: ClassVar[bool] = False  # its layers define `hold`, so that other adapters can be made ones of it
    writes: ClassVar[bool] = False  # it makes adapters of descriptions: see `written`
    starts_as_base: ClassVar[bool] = True  # False: by no setting does it start without changing the model
    nonzero: ClassVar[tuple[str, ...]] = ()  # settings that, at zero, leave nothing that could ever be learnt
    repeats: ClassVar[tuple[str, ...]] = ()  # names of tensors that PEFT's files hold at each site, too, for nothing
    in_peft: ClassVar[bool] = True  # False: HF PEFT has the method under no name
    not_in_peft: ClassVar[Mapping[str, Any]] = {}  # settings PEFT has not, by what needs no word in its files
    uses_others: ClassVar[bool] = False  # it is made of other adapters: see `uses`
    by_default: ClassVar[bool] = True  # a candidate of a comparison that names none
    learning_rate: ClassVar[float] = 1e-3  # where none is given; each method says where its own is from
    space: ClassVar[Spaces] = spaces(learning_rate=Range(1e-5, 1e-2, log=True))  # what a search draws; see open_space

    _to_fill = False  # True on one that is built for a file: its weights need not be drawn
    _as_peft = False  # True where PEFT's rules say what is a head: the rest is left as it is
    _under = cast("Mapping[str, str]", {})  # what adapters that it uses are attached as, where not by their own names
    _copies = cast("list[Copy] | None", None)  # what a file says the adapter has copies of; None: what the settings say

    modules_to_save: list[str] | None = field(default=None, kw_only=True)
    task_type: str | None = field(default=None, kw_only=True)
    inference_mode: bool = field(default=False, kw_only=True)

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        """Yield (path of the site's module, layer). Token layers and what layers share have the path ""."""
        raise TypeError(f"{type(self).__name__} defines no build()")

    def uses(self) -> Sequence[str]:
        """Names of attached adapters that this one reads, and that stay attached as long as it is."""
        return ()

    def used(self) -> dict[str, str]:
        """Of each of :meth:`uses`, under which name it is attached."""
        return {name: self._under.get(name, name) for name in self.uses()}

    def brings(self) -> Mapping[str, str]:
        """Of each of :meth:`uses`, in which directory it lies, where HF PEFT's file says that and brings none along."""
        return {}

    def reads_ends(self) -> str | None:
        """The setting by which its layers go by where a row ends, which text that is being written does not show."""
        return None

    def row_data(self) -> Mapping[str, int]:
        """What its layers read of each row (see `context.py`), by name, and how many values there may be."""
        return {}

    def task_names(self) -> Sequence[str] | None:
        """What the settings call the tasks whose rows it tells apart, in the order of their numbers; None: they do not
        say."""
        return None

    def heads(self, base: Base) -> list[Part]:
        """The parts of the model that the adapter has its own copy of, whatever `modules_to_save` names."""
        if self._copies is not None:
            return [copy.part for copy in self._copies]
        return named_heads(base.model) if self._as_peft else heads_of(base.model)

    def copies(self, base: Base) -> list[Copy]:
        """What the adapter has its own copies of: what `modules_to_save` names, and the heads, trained or not.

        A head that is not trained is copied all the same: without it the adapter could not be used again.
        """
        if self._copies is not None:
            return self._copies
        heads = self.heads(base)
        paths = [part.path for part in heads]
        out = []
        for name in self.modules_to_save or []:
            if heads and name in ("classifier", "score") and name not in paths:
                continue  # PEFT writes both of its names for a head, whichever the model has
            found = [(p, m) for p, m in tree.named_modules(base.model) if self._means(name, p)]
            if not found:
                raise TanzakuError(
                    f"modules_to_save: {name!r} matches no module of {type(base.model).__name__}"
                    f"{nearest(name, [p.rsplit('.', 1)[-1] for p, _ in tree.named_modules(base.model)])}"
                )
            out += [Copy(Part.of(path, module), trained=True) for path, module in found]
        trained = self.trains_head and self.modules_to_save != [] and not self.covers_head
        return [*out, *(Copy(part, trained, tied=True) for part in heads)]

    def copied(self, base: Base) -> Callable[[str], bool]:
        """Whether the module at a path is copied whole, so that nothing else is attached to it."""
        parts = self.heads(base)
        names = (self.modules_to_save or []) if self._copies is None else []

        def inside(path: str) -> bool:
            above = [path[:at] for at, letter in enumerate(f"{path}.") if letter == "."]
            return any(part.has(path) for part in parts) or any(self._means(n, p) for n in names for p in above)

        return inside

    def _means(self, name: str, path: str) -> bool:
        """Whether a name of `modules_to_save` means the module at `path`. PEFT asks for the ending alone, so that
        "classifier" means DistilBERT's pre_classifier, too."""
        return path.endswith(name) if self._as_peft else f".{path}".endswith(f".{name}")

    def file_type(self, base: Base) -> str:
        """The name that files carry: PEFT's, unless PEFT would read the same file to another effect."""
        return self.peft_type

    def to_peft(self, config: dict[str, Any]) -> dict[str, Any]:
        """The adapter_config.json of an adapter, from its settings, as HF PEFT can read it."""
        return config

    @classmethod
    def from_hub(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """The settings of an adapter that the Adapters library stored, by the names that it has for them; those it has
        left over are errors. None: the config is another method's."""
        return None

    def to_hub(self) -> dict[str, Any] | None:
        """What the Adapters library calls these settings; None: it has no such adapter."""
        return None

    def combined(self, parts: Sequence[Attached], by: Combining) -> Method:
        """The settings of what is made of several adapters of this method; sites and copies are noted elsewhere."""
        raise TypeError(f"{type(self).__name__} defines no combined()")

    def written(
        self, adapter: Attached, description: Any, tokenizer: Any
    ) -> tuple[Method, dict[str, dict[str, Tensor]]]:
        """The settings of the adapter for a description, but for its sites, and by these the tensors of its layers, as
        their :meth:`AdapterLayer.restore` takes them. See `tanzaku.write_lora`."""
        raise TypeError(f"{type(self).__name__} defines no written()")

    def rate_of(self, parameter: str) -> float:
        """What the learning rate is multiplied by for a parameter, by its name in :meth:`Adapter.trained`."""
        return 1.0

    @property
    def calibrates(self) -> bool:
        """Whether :meth:`calibrate` wants to see rows before the first step."""
        return False

    def calibrate(self, adapter: Attached, passes: Passes) -> None:
        """See what the base does with training rows, once and before :meth:`prepare`, and start from it.

        Args:
            passes: see :mod:`tanzaku.core.passes`, and :mod:`tanzaku.core.calibration` for what layers can ask of rows.
        """

    def prepare(self, adapter: Attached, total_steps: int) -> None:
        """Called once before training, with the number of optimizer steps to come."""

    def penalty(self, adapter: Attached) -> Tensor | None:
        """A term added to the training loss, or None."""
        return None

    def after_step(self, adapter: Attached, step: int) -> None:
        """Called after optimizer step number `step` (from 1), while the gradients are still there."""

    def training_state(self, adapter: Attached) -> dict[str, Tensor]:
        """What training has made beside the trained parameters and goes on from, such as running means."""
        return {}

    def resume(self, adapter: Attached, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`training_state` gave, after :meth:`prepare`."""

    @classmethod
    def open_space(cls, given: Mapping[str, Any]) -> dict[str, Choice | Range]:
        """What a search draws where `given` says nothing. Keys are the method's settings, or `learning_rate`.

        Args:
            given: values, or spaces, that a candidate has for some settings. Where one setting bounds another, a
                method narrows its space by them, so that every point of it can be built.
        """
        return {key: space for key, space in cls.space.items() if key not in given}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Method:
        """Build from plain settings; an unknown name or a value of a wrong type is an error that says what fits."""
        cls.check_names(settings)
        cls._check_types(settings)
        return cls(**settings)

    @classmethod
    def _check_types(cls, settings: Mapping[str, Any]) -> None:
        known = {f.name: f.type for f in dataclasses.fields(cls)}
        for key, value in settings.items():
            if not cls.takes(key, value):
                raise TanzakuError(f"method {cls.name!r}: {key} is {value!r}, expected {known[key]}")

    @classmethod
    def takes(cls, key: str, value: Any) -> bool:
        """Whether a setting has a value of its type."""
        try:
            # A class can be hashed, though its instances cannot.
            _checks(cls)[key].validate_python(value, strict=True)  # type: ignore[arg-type]
        except ValidationError:
            return False
        return True

    @classmethod
    def check_names(cls, settings: Iterable[str]) -> dict[str, Any]:
        """The annotations of all settings; an error for a name that is none of them."""
        known = {f.name: f.type for f in dataclasses.fields(cls)}
        for key in settings:
            if key not in known:
                raise TanzakuError(
                    f"method {cls.name!r} has no setting {key!r}{nearest(key, known)}; "
                    f"it has {', '.join(sorted(known))}"
                )
        return known

    def settings(self) -> dict[str, Any]:
        """Plain settings, as :meth:`from_settings` reads them."""
        return dataclasses.asdict(self)

    def check_values(self) -> None:
        """Raise a clear error where a setting is of another type than its own, nan or infinite, which whatever depends
        on it would be, too, or zero where nothing could be learnt then."""
        settings = self.settings()
        self._check_types({key: _plain(value) for key, value in settings.items()})
        for key in () if self._to_fill else self.nonzero:
            # Such as lora_alpha, and what alpha_pattern has in its place at some modules.
            patterns = [p for p in settings if p.endswith("_pattern") and key.endswith(p.removesuffix("_pattern"))]
            for each in (key, *patterns):
                value = settings[each]
                zero = 0 in value.values() if isinstance(value, dict) else value == 0
                self.require(not zero, f"{each}={value}", "another number: at zero nothing is ever learnt")
        for key, value in settings.items():
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            for number in parts:
                finite = not isinstance(number, float) or math.isfinite(number)
                self.require(finite, f"{key}={value}", "a finite number")

    def largest(self) -> str:
        """The largest setting, as `r=8`: what to name where there is no memory."""
        flat = {
            f"{key}.{part}" if part else key: number
            for key, value in self.settings().items()
            for part, number in (value.items() if isinstance(value, dict) else [("", value)])
        }
        numbers = {key: value for key, value in flat.items() if type(value) is int}
        key = max(numbers, key=lambda each: numbers[each], default="")
        return f"{key}={numbers[key]}" if key else self.name

    def require(self, ok: bool, found: str, expected: str) -> None:
        """Raise a clear error unless `ok`."""
        if not ok:
            raise TanzakuError(f"{self.name}: found {found}, expected {expected}")


def _plain(value: Any) -> Any:
    """A value as recipes have it: also numbers of other libraries, and other collections than lists."""
    if isinstance(value, tuple | set | frozenset):
        return list(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


@cache
def _checks(cls: Any) -> dict[str, TypeAdapter[Any]]:
    """What tells whether a setting has its type: made once, since making takes longer than asking."""
    types = get_type_hints(cls)
    return {f.name: TypeAdapter(types[f.name]) for f in dataclasses.fields(cls)}


offloaded: Local[torch.device] = Local("tanzaku_offloaded")  # where adapters of an offloaded base are made


def home(like: Tensor) -> torch.device:
    """The device of what works beside `like`. Between passes the weights of an offloaded base are on none."""
    there = offloaded.get()
    return like.device if there is None or not like.is_meta else there


_LARGEST = 2**48  # numbers in a tensor, beyond which torch's own errors speak of overflow


def trainable(*size: int, like: Tensor, fill: Callable[[Tensor], Any] | None = None) -> nn.Parameter:
    """A new parameter on `like`'s device; fp32 also on a base of half precision, which trains badly, as in PEFT."""
    dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
    if not all(n < _LARGEST for n in size) or math.prod(size) >= _LARGEST:
        raise TooLarge(size)
    tensor = torch.zeros(*size, device=home(like), dtype=dtype)
    if fill is not None and tensor.device.type != "meta":
        fill(tensor)
    return nn.Parameter(tensor)
