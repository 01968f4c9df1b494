"""PEFT's layers, as a face of the base's own modules.

PEFT puts a layer of its own in the place of each module that it adapts. Here the module stays what and where it is;
while it has adapters its class is one made of its own and of a class below, so that programs which look into PEFT's
layers (`module.lora_A["default"].weight`, `module.scaling`, `isinstance(module, LoraLayer)`) find the adapters' own
parameters. What such a layer holds can be read and filled; adapters come and go by the model's methods alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from tanzaku.compat.peft.owner import Owner
from tanzaku.core.adapter import Adapter
from tanzaku.core.method import AdapterLayer
from tanzaku.core.targeted import pattern
from tanzaku.core.weights import WeightCopy
from tanzaku.errors import TanzakuError
from tanzaku.methods.adalora import SvdDelta
from tanzaku.methods.dora import Magnitude
from tanzaku.methods.ia3 import ScaleLayer
from tanzaku.methods.llama_adapter import GatedPrompt
from tanzaku.methods.lora_layers import LoraConv2d, LoraDelta, LoraEmbedding
from tanzaku.methods.prompt_tuning import PromptLayer
from tanzaku.models import tree
from tanzaku.models.families import features
from tanzaku.models.quantize import full_weight

_PLACE = "_tanzaku_place"


class Place:
    """Where a module is in a wrapped model."""

    def __init__(self, model: Owner, path: str):
        self.model, self.path = model, path
        self.kept: dict[str, Any] = {}  # what programs were given to look into, which follows the adapters

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": {}}

    def layers(self, kind: type[AdapterLayer] | tuple[type[AdapterLayer], ...]) -> dict[str, Any]:
        """The adapter layers of one kind here, by the names of their adapters."""
        out: dict[str, Any] = {}
        for adapter in self.model._adapters():
            for path, layer in adapter.at():
                if path == self.path and isinstance(layer, kind):
                    out[adapter.name] = layer
        return out

    def adapter(self, name: str) -> Adapter:
        return self.model._manager.get(name)

    def modules(self, key: str, found: Mapping[str, nn.Module]) -> Modules:
        """A container of these modules: the same one at each call."""
        kept: Modules = self.kept.setdefault(key, Modules())
        kept._modules.clear()
        kept._modules.update(found)
        return kept

    def parameters(self, key: str, found: Mapping[str, nn.Parameter]) -> Parameters:
        """A container of these parameters: the same one at each call."""
        kept: Parameters = self.kept.setdefault(key, Parameters())
        kept._parameters.clear()
        kept._keys.clear()
        for name, parameter in found.items():
            kept._parameters[name] = parameter
            kept._keys[name] = None
        return kept

    def numbers(self, key: str, found: Mapping[str, Any], put: Callable[[str, Any], None] | None = None) -> Numbers:
        """A dictionary of these numbers: the same one as long as they are the same."""
        kept: Numbers | None = self.kept.get(key)
        if kept is None or kept != found:
            kept = self.kept[key] = Numbers(found)
        kept.put = put
        return kept

    def clear(self) -> None:
        """Empty what was given out: adapters have come or gone, and who looks again sees them."""
        for kept in self.kept.values():
            if isinstance(kept, Numbers):
                kept.clear()
                continue
            (kept._parameters if isinstance(kept, Parameters) else kept._modules).clear()
            if isinstance(kept, Parameters):
                kept._keys.clear()


class _Fixed:
    """A container that tells what is there; adapters come and go by the model's own methods."""

    def __setitem__(self, key: str, value: Any) -> None:
        raise TanzakuError(f"{key!r}: adapters come by add_adapter() and load_adapter() of the model")

    def __delitem__(self, key: str) -> None:
        raise TanzakuError(f"{key!r}: adapters go by delete_adapter() of the model")


class Modules(_Fixed, nn.ModuleDict):
    """Parts of a layer that are modules, by adapter."""


class Parameters(_Fixed, nn.ParameterDict):
    """Parts of a layer that are parameters, by adapter."""


class Numbers(dict[str, Any]):
    """A number by adapter, which can be set where the adapter computes with it."""

    put: Callable[[str, Any], None] | None = None

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self or self.put is None:
            raise TanzakuError(f"{key!r} cannot be set to {value!r} here; add an adapter with other settings")
        self.put(key, value)
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        raise TanzakuError(f"{key!r}: adapters go by delete_adapter() of the model")


class _Dropout(nn.Dropout):
    """The dropout of one adapter at one module; its `p` is what the adapter computes with."""

    def __init__(self, layer: Any):
        nn.Module.__init__(self)
        self.__dict__["layer"], self.inplace = layer, False

    @property
    def p(self) -> float:
        return float(self.__dict__["layer"].dropout)

    @p.setter
    def p(self, value: float) -> None:
        self.__dict__["layer"].dropout = value


class BaseTunerLayer:
    """What all of PEFT's layers have, on the module that they stand for."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[tuple[type[AdapterLayer], ...]] = ()
    shown_as: ClassVar[str] = ""
    quantization_backend = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        faces, own = _MADE_OF[type(self)]
        return _again, (faces, own), self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        # A copy of the base, or of one layer, is of no wrapped model: it is the module that it would be without one.
        whole = id(self._at.model) in memo
        new: Any = object.__new__(type(self) if whole else own_class(cast(nn.Module, self)))
        memo[id(self)] = new
        state = {key: value for key, value in self.__dict__.items() if whole or key != _PLACE}
        new.__dict__.update(copy.deepcopy(state, memo))
        return cast(nn.Module, new)

    @property
    def _at(self) -> Place:
        return cast(Place, self.__dict__[_PLACE])

    def _layers(self) -> dict[str, Any]:
        return self._at.layers(self.kinds)

    @property
    def base_layer(self) -> nn.Module:
        """The module without adapters: the same tensors, and no hooks."""
        return bare(cast(nn.Module, self))

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    @property
    def active_adapters(self) -> list[str]:
        return self._at.model.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        active = self._at.model.active_adapter
        return [active] if isinstance(active, str) else active

    @property
    def disable_adapters(self) -> bool:
        return self._at.model._adapters_disabled

    @property
    def merged_adapters(self) -> list[str]:
        here = self._layers()
        return [name for name in self._at.model.merged_adapters if name in here]

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def _get_available_adapters(self) -> set[str]:
        return set(self._layers())

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self._layers())

    def enable_adapters(self, enabled: bool) -> None:
        raise _of_model("enable_adapters", "enable_adapter_layers() and disable_adapter_layers()")

    def set_adapter(self, adapter_names: Any, inference_mode: bool = False) -> None:
        raise _of_model("set_adapter", "set_adapter()")

    def delete_adapter(self, adapter_name: str) -> None:
        raise _of_model("delete_adapter", "delete_adapter()")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise _of_model("merge", "merge_adapter()")

    def unmerge(self) -> None:
        raise _of_model("unmerge", "unmerge_adapter()")

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        layers = self._layers()
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in layers:
                for parameter in layers[name].parameters():
                    parameter.requires_grad_(requires_grad)

    def extra_named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of what PEFT's layer has below it beside the module's own parts."""
        for part in self.adapter_layer_names:
            yield part, getattr(self, part)

    def __repr__(self) -> str:
        lines = [f"(base_layer): {self.base_layer!r}"]
        for part, module in self.extra_named_modules():
            lines.append(f"({part}): {module!r}")
        body = "\n".join(lines).replace("\n", "\n  ")
        return f"{self.shown_as}(\n  {body}\n)"


def _of_model(name: str, instead: str) -> TanzakuError:
    return TanzakuError(f"{name} of one layer is not supported: adapters are whole; call {instead} of the model")


class LoraLayer(BaseTunerLayer):
    """A module with LoRA."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = (
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    )
    other_param_names: ClassVar[tuple[str, ...]] = (
        "r",
        "lora_alpha",
        "scaling",
        "lora_dropout",
        "use_dora",
        "use_rslora",
        "lora_bias",
    )
    kinds: ClassVar[tuple[type[AdapterLayer], ...]] = (LoraDelta, LoraEmbedding)
    shown_as = "lora.Linear"

    @property
    def lora_A(self) -> nn.Module:
        return self._low("lora_A")

    @property
    def lora_B(self) -> nn.Module:
        return self._low("lora_B")

    def _low(self, key: str) -> nn.Module:
        layers = self._layers()
        return self._at.modules(key, {n: _low(s, key, self) for n, s in layers.items() if isinstance(s, LoraDelta)})

    @property
    def lora_embedding_A(self) -> nn.Module:
        return self._vectors("lora_embedding_A")

    @property
    def lora_embedding_B(self) -> nn.Module:
        return self._vectors("lora_embedding_B")

    def _vectors(self, key: str) -> nn.Module:
        layers = self._layers()
        return self._at.parameters(key, {n: getattr(s, key) for n, s in layers.items() if hasattr(s, key)})

    @property
    def lora_magnitude_vector(self) -> nn.Module:
        found = {n: _magnitude(s) for n, s in self._layers().items() if isinstance(s, Magnitude)}
        return self._at.modules("lora_magnitude_vector", found)

    @property
    def scaling(self) -> Any:
        return self._at.numbers("scaling", {n: s.scaling for n, s in self._layers().items()}, self._put_scaling)

    @scaling.setter
    def scaling(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._put_scaling(name, value)

    def _put_scaling(self, name: str, value: float) -> None:
        self._layers()[name].scaling = value

    @property
    def r(self) -> Any:
        return self._at.numbers("r", {n: _rank(s) for n, s in self._layers().items()})

    @property
    def lora_alpha(self) -> Any:
        methods = {name: cast(Any, self._at.adapter(name).method) for name in self._layers()}
        alphas = {n: pattern(m.alpha_pattern, self._at.path, m.lora_alpha) for n, m in methods.items()}
        return self._at.numbers("lora_alpha", alphas)

    @property
    def lora_dropout(self) -> nn.Module:
        found = {
            name: _Dropout(layer) if getattr(layer, "dropout", 0) else nn.Identity()
            for name, layer in self._layers().items()
        }
        return self._at.modules("lora_dropout", found)

    @property
    def use_rslora(self) -> Any:
        flags = {name: cast(Any, self._at.adapter(name).method).use_rslora for name in self._layers()}
        return self._at.numbers("use_rslora", flags)

    @property
    def use_dora(self) -> Any:
        return self._at.numbers("use_dora", {n: isinstance(s, Magnitude) for n, s in self._layers().items()})

    @property
    def lora_bias(self) -> Any:
        return self._at.numbers("lora_bias", dict.fromkeys(self._layers(), False))

    @property
    def in_features(self) -> int:
        return _size(self, 0)

    @property
    def out_features(self) -> int:
        return _size(self, 1)

    def extra_named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        yield "lora_dropout", self.lora_dropout
        yield from super().extra_named_modules()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the module's weight, in the weight's own shape."""
        layer, module = self._layers()[adapter], cast(nn.Module, self)
        with torch.no_grad():
            merged = layer.merged(module)["weight"]
            full = full_weight(module)
            return cast(Tensor, (merged - full).view(full.shape).to(cast(Tensor, module.weight).dtype))

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale as the settings say, times `scale`."""
        if adapter in self._layers():
            self._put_scaling(adapter, scale * self._first_scaling(adapter))

    def _first_scaling(self, adapter: str) -> float:
        r, rs = self.r[adapter], self.use_rslora[adapter]
        return float(self.lora_alpha[adapter] / (math.sqrt(r) if rs else r))

    def scale_layer(self, scale: float | int) -> None:
        """Multiply what the active adapters add by `scale`."""
        for name, layer in self._layers().items():
            if name in self.active_adapters and scale != 1:
                layer.scaling *= scale

    def unscale_layer(self, scale: float | int | None = None) -> None:
        """Divide it again; None: as the settings say."""
        for name, layer in self._layers().items():
            if name in self.active_adapters:
                layer.scaling = self._first_scaling(name) if scale is None else layer.scaling / scale


class Linear(LoraLayer):
    """A linear layer, Conv1D or quantised layer with LoRA."""


class Embedding(LoraLayer):
    """An embedding with LoRA."""

    shown_as = "lora.Embedding"


class Conv2d(LoraLayer):
    """A convolution with LoRA."""

    shown_as = "lora.Conv2d"


class AdaLoraLayer(LoraLayer):
    """A module with AdaLoRA."""

    adapter_layer_names = ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "ranknum")
    kinds = (SvdDelta,)
    shown_as = "adalora.SVDLinear"

    def _low(self, key: str) -> nn.Module:
        return self._vectors(key)

    @property
    def lora_E(self) -> nn.Module:
        return self._vectors("lora_E")

    @property
    def ranknum(self) -> nn.Module:
        return self._vectors("ranknum")

    def _put_scaling(self, name: str, value: float) -> None:
        layer = self._layers()[name]
        layer.scaling, layer.factor = value, value / (layer.r + 1e-5)

    def _first_scaling(self, adapter: str) -> float:
        alpha = float(self.lora_alpha[adapter])
        return alpha if alpha > 0 else float(self.r[adapter])

    def scale_layer(self, scale: float | int) -> None:
        for name in self._layers():
            if name in self.active_adapters:
                self._put_scaling(name, self.scaling[name] * scale)

    def unscale_layer(self, scale: float | int | None = None) -> None:
        for name in self._layers():
            if name in self.active_adapters:
                self._put_scaling(name, self._first_scaling(name) if scale is None else self.scaling[name] / scale)

    def extra_named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        yield from super().extra_named_modules()
        yield "ranknum", self.ranknum


class SVDLinear(AdaLoraLayer):
    """A linear layer with AdaLoRA."""


class IA3Layer(BaseTunerLayer):
    """A module with (IA)3."""

    adapter_layer_names = ("ia3_l",)
    kinds = (ScaleLayer,)
    shown_as = "ia3.Linear"

    @property
    def ia3_l(self) -> nn.Module:
        return self._at.parameters("ia3_l", {n: s.ia3_l for n, s in self._layers().items()})

    @property
    def is_feedforward(self) -> bool:
        return any(layer.edits_input for layer in self._layers().values())

    @property
    def in_features(self) -> int:
        return _size(self, 0)

    @property
    def out_features(self) -> int:
        return _size(self, 1)


class AdaptedAttention(BaseTunerLayer):
    """An attention layer with LLaMA-Adapter. PEFT has one of them at a time in a model, and no names of adapters."""

    kinds = (GatedPrompt,)
    shown_as = "AdaptedAttention"

    def _own(self) -> Any:
        layers = self._layers()
        return next((layers[name] for name in self.active_adapters if name in layers), next(iter(layers.values())))

    @property
    def adaption_prompt(self) -> nn.Parameter:
        return cast(nn.Parameter, self._own().adaption_prompt)

    @property
    def adaption_gate(self) -> nn.Parameter:
        return cast(nn.Parameter, self._own().adaption_gate)

    @property
    def model(self) -> nn.Module:
        return self.base_layer


class AuxiliaryTrainingWrapper(BaseTunerLayer):
    """A module that adapters have copies of their own of, or parts of it."""

    @property
    def _adapters(self) -> set[str]:
        return set(self._layers())


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module that adapters have trained copies of their own of."""

    adapter_layer_names = ("modules_to_save",)
    kinds = (WeightCopy,)
    shown_as = "ModulesToSaveWrapper"

    def _layers(self) -> dict[str, Any]:
        return {name: s for name, s in super()._layers().items() if self._at.model._trains(name, s)}

    @property
    def active_adapters(self) -> list[str]:
        here = self._layers()
        return [name for name in self._at.model.active_adapters if name in here]

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    @property
    def original_module(self) -> nn.Module:
        return self.base_layer

    @property
    def modules_to_save(self) -> nn.Module:
        module = cast(nn.Module, self)
        return self._at.modules("modules_to_save", {name: _with(module, s) for name, s in self._layers().items()})


def is_bare(layer: AdapterLayer) -> bool:
    """Whether a layer of an adapter without a prompt is shown by nothing else: as no part of one of PEFT's layers.

    A copy of a module is never: a trained one is in its module's layer, and of one that is only kept PEFT has none.
    """
    return isinstance(layer, GatedPrompt) or _face(layer) is None


def encoder_of(layer: AdapterLayer) -> nn.Module:
    """What makes virtual tokens or a prefix, as PEFT's prompt encoder."""
    if not isinstance(layer, PromptLayer):
        return layer
    weight = layer.prompt_embeddings
    embedding = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    embedding.__dict__["_parameters"] = _Shared(layer, {"weight": "prompt_embeddings"})
    encoder = nn.Module()
    encoder.embedding = embedding
    return encoder


def is_layer(module: nn.Module) -> bool:
    """Whether a module has adapters' parts that PEFT would have in a layer."""
    return type(module) in _MADE_OF


# -- faces of modules


_MADE_OF: dict[type, tuple[tuple[type, ...], type]] = {}


@cache
def _made(faces: tuple[type, ...], own: type) -> type:
    made = type(own.__name__, (*faces, own), {"__module__": own.__module__, "__doc__": own.__doc__})
    _MADE_OF[made] = (faces, own)
    return made


def _again(faces: tuple[type, ...], own: type) -> nn.Module:
    # For pickle, copy and deepcopy: the class has no name that they could find.
    return cast(nn.Module, object.__new__(_made(faces, own)))


def own_class(module: nn.Module) -> type:
    """The class that a module has without adapters."""
    return _MADE_OF.get(type(module), ((), type(module)))[1]


def dress(model: Owner) -> None:
    """Give the modules with adapters, and no others, the face of PEFT's layers."""
    base = model.get_base_model()
    faces: dict[str, list[type]] = {}
    for adapter in model._adapters():
        for path, layer in adapter.at():
            face = _face(layer)
            if face is not None and (face is not ModulesToSaveWrapper or model._trains(adapter.name, layer)):
                known = faces.setdefault(path, [])
                if face not in known:
                    known.append(face)
    for path, module in tree.named_modules(base):
        wanted = tuple(sorted(faces.get(path, ()), key=lambda face: face is not ModulesToSaveWrapper))
        now = _MADE_OF.get(type(module))
        place = module.__dict__.get(_PLACE)
        if place is not None:
            place.clear()
        if wanted and path:
            module.__class__ = _made(wanted, own_class(module))
            if place is None or place.model is not model:
                module.__dict__[_PLACE] = Place(model, path)
        elif now is not None:
            undress(module)


def undress(module: nn.Module) -> None:
    module.__class__ = own_class(module)
    place = module.__dict__.pop(_PLACE, None)
    if place is not None:
        place.clear()


def undress_all(base: nn.Module) -> None:
    for module in tree.modules(base):
        if is_layer(module):
            undress(module)


def _face(layer: AdapterLayer) -> type | None:
    kinds: tuple[tuple[type[AdapterLayer], type], ...] = (
        (SvdDelta, SVDLinear),
        (LoraConv2d, Conv2d),
        (LoraDelta, Linear),
        (LoraEmbedding, Embedding),
        (ScaleLayer, IA3Layer),
        (GatedPrompt, AdaptedAttention),
        (WeightCopy, ModulesToSaveWrapper),
    )
    return next((face for kind, face in kinds if isinstance(layer, kind)), None)


def bare(module: nn.Module) -> nn.Module:
    """A module of the same tensors, without hooks and adapters on it or on its parts."""
    new = cast(nn.Module, object.__new__(own_class(module)))
    new.__dict__.update(module.__dict__)
    new.__dict__.pop(_PLACE, None)
    for name in _HOOKS:
        if name in new.__dict__:
            new.__dict__[name] = type(new.__dict__[name])()
    new.__dict__["_modules"] = {name: child and bare(child) for name, child in new._modules.items()}
    return new


def without_bias(module: nn.Module) -> nn.Module:
    """A module of the same tensors but the bias, in whose place an adapter's stands."""
    new = bare(module)
    new.__dict__["_parameters"] = {name: p for name, p in new._parameters.items() if name != "bias"}
    return new


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def _with(module: nn.Module, layer: WeightCopy) -> nn.Module:
    """A module like `module` with the tensors of an adapter's copy."""
    new = bare(module)
    new.__dict__.update(_parameters=dict(new._parameters), _buffers=dict(new._buffers))
    new.__dict__["_modules"] = {n: child and _with(child, _Part(layer, n)) for n, child in module._modules.items()}
    for name, tensor in layer.tensors.items():
        if "." not in name:
            table: dict[str, Any] = new._buffers if name in new._buffers else new._parameters
            table[name] = tensor
    return new


class _Part(WeightCopy):
    """The copies of what lies below one part of a module."""

    def __init__(self, whole: WeightCopy, name: str):
        nn.Module.__init__(self)
        start = f"{name}."
        self.__dict__["part"] = {k.removeprefix(start): t for k, t in whole.below(name).items()}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return cast(dict[str, Tensor], self.__dict__["part"])


def _low(adapter_layer: LoraDelta, name: str, layer: Any) -> nn.Module:
    """A or B as the layer that PEFT has there, around the adapter layer's own parameter."""
    low = getattr(adapter_layer, name)
    weight = low.weight
    shown: nn.Module
    if isinstance(adapter_layer, LoraConv2d):
        first = name == "lora_A"
        conv = cast(nn.Conv2d, layer)
        groups = conv.groups
        places = (
            {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": groups}
            if first
            else {"groups": groups}
        )
        shown = nn.Conv2d(
            weight.shape[1] * groups,
            weight.shape[0],
            cast(Any, tuple(weight.shape[2:])),
            bias=False,
            device="meta",
            **cast(Any, places),
        )
    else:
        shown = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    shown.__dict__["_parameters"] = _Shared(low, {"weight": "weight"})
    shown.training = layer.training
    return shown


def _magnitude(layer: Magnitude) -> nn.Module:
    """DoRA's magnitudes as the module that PEFT has there."""
    shown = nn.Module()
    shown.__dict__["_parameters"] = _Shared(layer.lora_magnitude_vector, {"weight": "weight"})
    return shown


class _Shared(dict[str, Any]):
    """The parameters of a module by other names, and `bias` None: what is set here is set there."""

    def __init__(self, module: nn.Module, names: Mapping[str, str]):
        super().__init__({name: module._parameters[own] for name, own in names.items()}, bias=None)
        self.module, self.names = module, names

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if key in self.names:
            self.module._parameters[self.names[key]] = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Shared, (self.module, self.names)


def _rank(layer: Any) -> int:
    return int(layer.lora_embedding_A.shape[0] if isinstance(layer, LoraEmbedding) else layer.r)


def _size(layer: Any, which: int) -> int:
    own = layer.__dict__.get("in_features" if which == 0 else "out_features")
    if own is not None:
        return int(own)
    if isinstance(layer, nn.Embedding):
        return int((layer.num_embeddings, layer.embedding_dim)[which])
    return features(bare(layer))[which]


__all__ = [
    "AdaLoraLayer",
    "AdaptedAttention",
    "AuxiliaryTrainingWrapper",
    "BaseTunerLayer",
    "Conv2d",
    "Embedding",
    "IA3Layer",
    "Linear",
    "LoraLayer",
    "ModulesToSaveWrapper",
    "SVDLinear",
]
