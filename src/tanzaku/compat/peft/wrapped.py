"""What a wrapped model is: whom it stands for, and its parameters by PEFT's names."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from tanzaku.compat.peft.config import PeftConfig
from tanzaku.compat.peft.isinstances import seen_as
from tanzaku.compat.peft.layers import BaseTunerLayer, encoder_of, is_bare, is_layer, without_bias
from tanzaku.compat.peft.owner import Owner
from tanzaku.compat.peft.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from tanzaku.compat.peft.tuner import PREFIXES, BaseTuner
from tanzaku.compat.peft.utils.save_and_load import in_peft
from tanzaku.core.adapter import Adapter
from tanzaku.core.attach import Count, adapters, numbers_in
from tanzaku.core.manager import AdapterManager, manager_of
from tanzaku.core.method import AdapterLayer, ModuleLayer
from tanzaku.core.routing import Entry
from tanzaku.core.weights import BiasCopy, WeightCopy
from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.methods import AdaLoRA
from tanzaku.methods.lora_parameters import ParameterDelta
from tanzaku.methods.trainable_tokens import TokenVectors
from tanzaku.models import tree

STATE = "training_state"  # before the names of what training goes on from beside parameters


class Wrapped(Owner):
    """A base and its adapters, seen as PEFT's model."""

    heads: ClassVar[tuple[str, ...]] = ()  # names of what the task trains along
    _hf_peft_config_loaded = True  # so Trainer trains it on a quantised base too

    peft_type: Any
    _trained: dict[str, list[nn.Parameter]]

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # Trainer asks isinstance(model, PreTrainedModel) before it calls save_pretrained; others ask for a PeftModel.
        base = self.__dict__.get("_modules", {}).get("base_model")
        base = base._modules.get("model") if issubclass(type(base), BaseTuner) else base
        return seen_as(type(self), base, "peft.peft_model")

    def _get_name(self) -> str:
        return str(type(self).__name__)

    def get_base_model(self) -> nn.Module:
        """The model without adapters' names around it."""
        tuner = self._modules["base_model"]
        return tuner.model if isinstance(tuner, BaseTuner) else cast(nn.Module, tuner)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or "base_model" not in self.__dict__.get("_modules", {}):
                raise
        if name in _OF_BASES:
            raise AttributeError(
                f"{type(self).__name__} has no {name!r}: it is of models without adapters; {_OF_BASES[name]}"
            )
        try:
            return getattr(self.base_model, name)
        except AttributeError as error:
            known = [n for n in dir(type(self)) if not n.startswith("_")]
            raise AttributeError(f"{type(self).__name__}: {error}{nearest(name, known)}") from None

    def __reduce_ex__(self, protocol: Any) -> Any:
        # By its own class, whatever class it answers to.
        return _blank, (type(self),), self.__dict__

    @property
    def _manager(self) -> AdapterManager:
        return manager_of(self.get_base_model())

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return [self.active_adapter] if isinstance(self.active_adapter, str) else list(self.active_adapter)

    @property
    def active_peft_config(self) -> PeftConfig:
        """The configuration of the active adapter."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that any adapter has a copy of."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or []} or None

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter is active and not disabled."""
        return not self._adapters_disabled and bool(self.active_adapters)

    @property
    def prefix(self) -> str:
        """What the names of the active method's parameters have in them."""
        return PREFIXES[self.peft_type]

    def _trains(self, name: str, layer: AdapterLayer) -> bool:
        """Whether a layer is trained with its adapter: a head that is only kept is the base's own, as PEFT sees it."""
        trained = {id(p) for p in self._trained.get(name, ())}
        return any(id(parameter) in trained for parameter in layer.parameters())

    def _known(self, name: str, message: str) -> None:
        if name not in self.peft_config:
            raise TanzakuError(
                f"{message}{nearest(name, self.peft_config)} There are {listed(self.peft_config) or 'none'}"
            )

    def _check_copies(self, names: Sequence[str]) -> None:
        """Of two adapters with a copy of one module only one can be in its place."""
        seen: dict[str, str] = {}
        for name in names:
            for path, layer in self._manager.get(name).at():
                if isinstance(layer, WeightCopy) and self._trains(name, layer) and seen.setdefault(path, name) != name:
                    raise TanzakuError(
                        f"Only one adapter can be set at a time for ModulesToSaveWrapper: {seen[path]!r} and {name!r} "
                        f"both have a copy of {path}"
                    )

    def _entry(self) -> Entry:
        names = self.active_adapters
        return names[0] if len(names) == 1 else tuple(names)

    def _per_call(self) -> bool:
        # As in PEFT, a prompt is there while the wrapper runs, and the base by itself stays plain.
        return any(
            config.is_prompt_learning for name, config in self.peft_config.items() if name in self.active_adapters
        )

    def _activate(self) -> None:
        base = self.get_base_model()
        if not managed(base) or not self.active_adapters:
            return
        off = self._adapters_disabled or bool(self.merged_adapters) or self._per_call()
        manager_of(base).set_active(None if off else self._entry())

    # -- parameters, by PEFT's names

    def _adapters(self) -> list[Adapter]:
        # Without what was attached to the base past this wrapper.
        return [self._manager.get(name) for name in self._trained]

    def _adapter_parameters(self, name: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        for adapter in self._adapters() if name is None else [self._manager.get(name)]:
            trained = {id(p) for p in self._trained[adapter.name]}
            for path, layer in adapter.at():
                for key, parameter in layer.named_parameters():
                    # A head that is not trained is the base's own; PEFT has no copy of it.
                    if id(parameter) in trained or not isinstance(layer, WeightCopy):
                        yield in_peft(adapter, path, layer, key), parameter

    def _adapter_tensors(self) -> dict[str, Tensor]:
        """Their parameters, and what their copies of modules keep beside them, such as running statistics."""
        found: dict[str, Tensor] = {}
        for adapter in self._adapters():
            trained = {id(p) for p in self._trained[adapter.name]}
            for path, layer in adapter.at():
                if isinstance(layer, WeightCopy) and trained & {id(p) for p in layer.parameters()}:
                    found |= {in_peft(adapter, path, layer, key): buffer for key, buffer in layer.named_buffers()}
        return dict(self._adapter_parameters()) | found

    @property
    def _root(self) -> str:
        """Where the base stands in this module's tree."""
        return "base_model." if self._modules["base_model"] is self.get_base_model() else "base_model.model."

    def _base_names(self, names: Iterable[str]) -> dict[str, str]:
        """Names of the base's tensors -> PEFT's, where each lies below what took its module's place."""
        root = self._root
        layers: dict[str, str] = {}
        wrapped: dict[str, dict[str, None]] = {}  # parameters that adapters change, by the path of their module
        whole: dict[str, str] = {}
        for adapter in self._adapters():
            trained = {id(p) for p in self._trained[adapter.name]}
            for path, layer in adapter.at():
                if isinstance(layer, WeightCopy):
                    whole |= {root + path: "original_module"} if trained & {id(p) for p in layer.parameters()} else {}
                elif cast(PeftConfig, adapter.method).is_adaption_prompt:
                    whole[root + path] = "model"
                elif isinstance(layer, TokenVectors):
                    layers[root + path] = f"{layer.inside}.base_layer".lstrip(".")
                elif isinstance(layer, ModuleLayer) and not isinstance(layer, BiasCopy):
                    layers[root + path] = "base_layer"
                elif isinstance(layer, ParameterDelta):  # each in a layer of its own, around those before it
                    names_here = wrapped.setdefault(root + path, {})
                    names_here.update(dict.fromkeys(layer.factors_of))
                    layers[root + path] = ".".join(["base_layer"] * len(names_here))
        out = {}
        for name in names:
            path, _, last = name.rpartition(".")
            above = next((w for w in whole if f"{path}.".startswith(f"{w}.")), None)
            if above is not None:
                out[name] = f"{above}.{whole[above]}{name.removeprefix(above)}"
            else:
                out[name] = f"{path}.{layers[path]}.{last}" if path in layers else name
        return out

    def _hidden(self) -> set[str]:
        """Names of the base's biases that adapters train copies of: as PEFT sees it, the copies are the base's own."""
        at = (at for adapter in self._adapters() for at in adapter.at())
        return {f"{self._root}{path}.bias" for path, layer in at if isinstance(layer, BiasCopy)}

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The base's parameters and the adapters', by PEFT's names."""
        if not recurse:
            return
        # In the order of `named_modules`, by which whatever holds this module walks it: EMA pairs the two.
        dot = f"{prefix}." if prefix else ""
        at = list(super().named_parameters(remove_duplicate=remove_duplicate))
        names = self._base_names([name for name, _ in at])
        theirs = {id(parameter): name for name, parameter in self._adapter_parameters()}
        hidden = self._hidden()
        for name, parameter in at:
            if name not in hidden:
                yield dot + theirs.get(id(parameter), names[name]), parameter

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The base's modules, and below them what PEFT's layers have; what PEFT has not stands by its own name."""
        # Whatever holds this module walks it with a memory of its own.
        hidden = set() if memo is None else {name.removesuffix(".bias") for name in self._hidden()}
        memo = set() if memo is None else memo
        place = f"{prefix}.{self._root}{tree.PLACE}" if prefix else f"{self._root}{tree.PLACE}"
        bare = {id(layer) for layer in self._bare()}
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if f"{name}.".startswith(f"{place}."):
                if id(module) in bare:
                    yield from module.named_modules(None, name)
                continue
            if hidden and name.removeprefix(f"{prefix}.") in hidden:
                yield name, without_bias(module)
            else:
                yield name, module
            if is_layer(module):
                for part, inner in cast(BaseTunerLayer, module).extra_named_modules():
                    yield from inner.named_modules(memo, f"{name}.{part}", remove_duplicate)
        if (prompts := self.__dict__.get("_modules", {}) and self._prompts()) is not None:
            # Not by `memo`: the walk over the base has passed these by.
            yield from prompts.named_modules(None, f"{prefix}.prompt_encoder" if prefix else "prompt_encoder")

    def _bare(self) -> Iterator[AdapterLayer]:
        """Layers that no other module shows."""
        # While it is built there are no adapters, and not yet what tells of them.
        for adapter in self._adapters() if "_trained" in self.__dict__ and self._trained else ():
            if not cast(PeftConfig, adapter.method).is_prompt_learning:
                yield from (layer for _, layer in adapter.at() if is_bare(layer))

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The base, and the adapters' parameters as a tree of PEFT's names: Trainer tells by those what decays."""
        yield from super().named_children()
        if "base_model" in self._modules:
            whole = nn.Module()
            for name, parameter in self._adapter_parameters():
                node = whole
                *path, last = name.split(".")
                for part in path:
                    if part not in node._modules:
                        node.add_module(part, nn.Module())
                    node = cast(nn.Module, node._modules[part])
                node.register_parameter(last, parameter)
            yield from whole._modules.items()  # type: ignore[misc]

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Every tensor of the base and of the adapters, by PEFT's names."""
        full = super().state_dict(keep_vars=keep_vars)
        place, hidden = f"{self._root}{tree.PLACE}.", self._hidden()
        own = {key: tensor for key, tensor in full.items() if not key.startswith(place) and key not in hidden}
        names = self._base_names(own)
        out = full.__class__() if destination is None else destination
        out.update({prefix + names[name]: tensor for name, tensor in own.items()})
        out.update({prefix + name: t if keep_vars else t.detach() for name, t in self._adapter_tensors().items()})
        return out

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take back what `state_dict` gave, or, where not `strict`, the adapters' part of it alone.

        Raises:
            TanzakuError: a tensor of another shape; where `strict`, also one that is missing or unexpected.
        """
        if assign:
            raise TanzakuError("load_state_dict: assign=True is not supported; values are copied into what is there")
        own = self.state_dict(keep_vars=True)
        of_adapters = self._adapter_tensors()
        state = {key: value for key, value in state_dict.items() if key.startswith(f"{STATE}.")}
        missing = [key for key in (own if strict else of_adapters) if key not in state_dict]
        unexpected = [key for key in state_dict if key not in own and key not in state]
        shaped = [key for key in state_dict if key in own and own[key].shape != state_dict[key].shape]
        wrong = [("missing", missing), ("unexpected", unexpected)] if strict else []
        for what, keys in [*wrong, ("of another shape", shaped)]:
            if keys:
                raise TanzakuError(f"load_state_dict: {what} are {listed(keys, 3)}; expected this model's state_dict()")
        for key, value in state_dict.items():
            if key in own:
                own[key].copy_(value)
        for adapter in self._adapters():
            start = f"{STATE}.{adapter.name}."
            of_it = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
            if of_it:
                self._prepare(adapter)
                adapter.method.resume(adapter, of_it)
        return _IncompatibleKeys(missing, unexpected)

    def _training_state(self) -> dict[str, Tensor]:
        """What training goes on from: the adapters' own parameters, and what a method has beside them."""
        out: dict[str, Tensor] = {name: t.detach() for name, t in self._adapter_tensors().items()}
        for adapter in self._adapters():
            if adapter.method.__dict__.get("_prepared") or not isinstance(adapter.method, AdaLoRA):
                state = adapter.method.training_state(adapter)
                out |= {f"{STATE}.{adapter.name}.{key}": value for key, value in state.items()}
        return {key: value.cpu().clone(memory_format=torch.contiguous_format) for key, value in out.items()}

    def _prepare(self, adapter: Adapter) -> None:
        config = adapter.method
        if not config.__dict__.get("_prepared"):
            config.prepare(adapter, getattr(config, "total_step", None) or 0)
            config.__dict__["_prepared"] = True

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of parameters: those that train, and all."""
        sizes = [(numbers_in(p), p.requires_grad) for _, p in self.named_parameters()]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """How the adapters of each layer stand."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """How the adapters of the model stand."""
        return get_model_status(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether an adapter can be made into one of LoRA: that is not supported here."""
        self._known(adapter_name, f"Adapter {adapter_name} not found.")
        return False

    def print_trainable_parameters(self) -> None:
        """Print these numbers, in PEFT's words."""
        print(Count(*self.get_nb_trainable_parameters()))

    def _prompts(self) -> nn.ModuleDict | None:
        """PEFT's `prompt_encoder`: what makes the virtual tokens or the prefix, by adapter. None: there is none."""
        found = {}
        for adapter in self._adapters():
            if cast(PeftConfig, adapter.method).is_prompt_learning:
                layer = next(layer for _, layer in adapter.at() if not isinstance(layer, WeightCopy))
                found[adapter.name] = encoder_of(layer)
        return nn.ModuleDict(found) if found else None


def managed(base: nn.Module) -> bool:
    return bool(adapters(base))


class Forward:
    """A `forward` with the signature of the base's, by which Trainer tells the columns that a model reads."""

    def __init__(self, model: Wrapped):
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.model).forward(self.model, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.model.get_base_model().forward)


def _blank(kind: type[Wrapped]) -> Wrapped:
    return kind.__new__(kind)


def from_peft_names(model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A parent's state has the names that this class gives; in its own tree, tensors stand by others."""
    place = model._root + tree.PLACE + "."
    hidden = model._hidden()
    base = [k for k in nn.Module.state_dict(model, keep_vars=True) if not k.startswith(place) and k not in hidden]
    names = {peft: key for key, peft in model._base_names(base).items()}
    real = dict(_real_names(model))
    at = {id(t): key for key, t in real.items()}
    names |= {peft: at[id(t)] for peft, t in model._adapter_tensors().items()}
    for peft, key in names.items():
        if peft != key and prefix + peft in state:
            state[prefix + key] = state.pop(prefix + peft)
    for key, tensor in real.items():
        # A head that PEFT has no copy of, or a bias that the adapter has a copy of.
        if key in hidden or (key.startswith(place) and key not in names.values()):
            state.setdefault(prefix + key, tensor)


def _real_names(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that a state holds, as they stand in the tree, whatever names the wrapper gives them."""
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, tensor
    for name, child in module._modules.items():
        if child is not None:
            yield from _real_names(child, f"{prefix}{name}.")


# What transformers' own models have of adapters that it puts into them, and of checkpoints of theirs.
_OF_BASES = {
    "disable_adapters": "call disable_adapter_layers()",
    "enable_adapters": "call enable_adapter_layers()",
    "enable_peft_hotswap": "set_adapter() switches, and load_adapter() loads into an adapter that is there",
    "gather_sharded_state_dict_for_save": "call save_pretrained()",
    "get_adapter_state_dict": "call get_peft_model_state_dict(model)",
    "load_custom_generate": "call it of get_base_model()",
    "register_for_auto_class": "call it of get_base_model()",
    "save_distributed_checkpoint": "call save_pretrained()",
}
