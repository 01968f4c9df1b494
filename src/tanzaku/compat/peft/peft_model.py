"""A model as HF PEFT wraps it: PEFT's methods, names of parameters and files, on Tanzaku's hosts and routes.

The base model stays what it is, module by module; the wrapper routes its rows. Trainer takes the wrapper for a
transformers model, since it answers `isinstance` as its base does: so it saves it with `save_pretrained`, and reads a
checkpoint back with `load_state_dict`, whether HF PEFT is installed or not.
"""

from __future__ import annotations

import copy
import inspect
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedModel

from tanzaku.compat.peft.config import AdaLoraConfig, PeftConfig, PromptEncoderConfig, TaskType
from tanzaku.compat.peft.seeding import draw_as_peft
from tanzaku.compat.peft.utils import in_peft
from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.host import Adapter, Count, Host, activate, adapters, attach, detach, host_of, numbers_in, route
from tanzaku.merging import merge, unmerge
from tanzaku.method import ModuleStrip
from tanzaku.routing import Entry
from tanzaku.store import load, save
from tanzaku.weights import BiasStrip, WeightStrip

_STATE = "training_state"
_TRAINER = "model.safetensors"  # where Trainer looks for a model's weights


class BaseTuner(nn.Module):
    """`model.base_model` where PEFT has a tuner there: it holds the model, and answers for it."""

    def __init__(self, model: nn.Module, owner: PeftModel):
        super().__init__()
        self.model = model
        self.__dict__["owner"] = owner  # not a submodule: it holds this one

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_TUNERS:
            return getattr(self.__dict__["owner"], name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


_OF_TUNERS = (
    "active_adapter",
    "active_adapters",
    "delete_adapter",
    "disable_adapter_layers",
    "enable_adapter_layers",
    "merge_adapter",
    "merge_and_unload",
    "peft_config",
    "set_adapter",
    "set_requires_grad",
    "unload",
    "unmerge_adapter",
    "update_and_allocate",
)


class PeftModel(nn.Module):
    """A model with adapters, by PEFT's names. `model` itself is the base; nothing in it is replaced.

    Args:
        peft_config: of the first adapter, called `adapter_name`, which is active.
        autocast_adapter_dtype: adapters are fp32 on a base of half precision; anything else is an error.
        low_cpu_mem_usage: has no effect: an adapter is built once, where its base is.

    Raises:
        TanzakuError: bad settings, or a target that matches nothing.
    """

    heads: ClassVar[tuple[str, ...]] = ()  # names of what the task trains along
    _hf_peft_config_loaded = True  # so Trainer trains it on a quantised base too

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ):
        if not isinstance(peft_config, PeftConfig):
            raise TanzakuError(f"found {type(peft_config).__name__}, expected a configuration such as LoraConfig(r=8)")
        _check_precision(model, autocast_adapter_dtype)
        self._wrap(model, peft_config, adapter_name)
        peft_config = self._with_head(peft_config)
        if peft_config.is_prompt_learning:
            # As in PEFT: programs override `add_adapter` in a subclass.
            self.add_adapter(adapter_name, peft_config, low_cpu_mem_usage=low_cpu_mem_usage)
        else:
            self._attach(adapter_name, peft_config)
        self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
        self._for_checkpointing()

    def _wrap(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str) -> None:
        if isinstance(model, PeftModel):
            raise TanzakuError("found a model with adapters, expected a plain one; use its add_adapter() for another")
        nn.Module.__init__(self)
        self.base_model = model if peft_config.is_prompt_learning else BaseTuner(model, self)
        self.active_adapter: str | list[str] = adapter_name
        self.peft_type = peft_config.peft_type
        self._trained: dict[str, list[nn.Parameter]] = {}
        self._adapters_disabled = False
        self._merged: str | None = None
        if type(self).forward is PeftModel.forward:
            self.__dict__["forward"] = types.MethodType(_signed(model), self)

    # -- what it is

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # Trainer asks isinstance(model, PreTrainedModel) before it calls save_pretrained.
        base = self.__dict__.get("_modules", {}).get("base_model")
        base = base.model if type(base) is BaseTuner else base
        return type(base) if isinstance(base, PreTrainedModel) else type(self)

    def _get_name(self) -> str:
        return type(self).__name__

    def get_base_model(self) -> nn.Module:
        """The model without adapters' names around it."""
        tuner = self._modules["base_model"]
        return tuner.model if isinstance(tuner, BaseTuner) else cast(nn.Module, tuner)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
        try:
            return getattr(self.get_base_model(), name)
        except AttributeError as error:
            known = [n for n in dir(type(self)) if not n.startswith("_")]
            raise AttributeError(f"{type(self).__name__}: {error}{nearest(name, known)}") from None

    def __deepcopy__(self, memo: dict[int, Any]) -> PeftModel:
        # A hook holds on to the model it hangs on: the copy gets its own.
        base = self.get_base_model()
        hosted = _hosted(base)
        if hosted:
            activate(base, None)
            for _, strip in (at for adapter in self._host.adapters.values() for at in adapter.at()):
                strip.__dict__.get("shared", {}).pop("written", None)  # the last pass's graph
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        if hosted:
            self._activate()
            new._activate()
        return new

    @property
    def _host(self) -> Host:
        return host_of(self.get_base_model())

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configuration of every adapter, by name."""
        return {adapter.name: cast(PeftConfig, adapter.method) for adapter in self._adapters()}

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

    # -- adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Hang another adapter, of any method; it is neither active nor trained until `set_adapter`."""
        _check_precision(self.get_base_model(), autocast_adapter_dtype)
        self._attach(adapter_name, self._with_head(peft_config))
        if adapter_name not in self.active_adapters:
            self.set_requires_grad(adapter_name, False)

    def _attach(self, name: str, config: PeftConfig) -> None:
        base = self.get_base_model()
        before = torch.get_rng_state()
        adapter = attach(base, config, name)
        draw_as_peft(adapter, before)
        self._note(adapter)

    def _note(self, adapter: Adapter) -> None:
        config = cast(PeftConfig, adapter.method)
        config.base_model_name_or_path = getattr(self.get_base_model(), "name_or_path", None) or None
        self._trained[adapter.name] = [p for _, p in adapter.trained()]

    def _with_head(self, config: PeftConfig) -> PeftConfig:
        """A copy that also names the head which this class trains along."""
        config = copy.deepcopy(config)
        if not config.is_adaption_prompt:
            there = {path.rpartition(".")[2] for path, _ in self.get_base_model().named_modules()}
            names = [name for name in self.heads if name in there]
            if names:
                config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *names]))
        return config

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make an adapter active and trainable, and all others neither. A list stacks several."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self._host.get(name)
        if self._merged:
            warnings.warn("an adapter is merged: it is unmerged before another is active", stacklevel=2)
            self.unmerge_adapter()
        self.active_adapter = names[0] if len(names) == 1 else names
        for name in self._trained:
            self.set_requires_grad(name, name in names and not inference_mode)
        self._activate()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train adapters, or freeze them."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._host.get(name)
            for parameter in self._trained[name]:
                parameter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off; where it was active, the first that is left is."""
        active = self.active_adapters
        if self._merged:
            self.unmerge_adapter()
        detach(self.get_base_model(), adapter_name)
        self._trained.pop(adapter_name)
        if adapter_name in active:
            if self._trained:
                first = next(iter(self._trained))
                warnings.warn(f"{adapter_name!r} was active; now {first!r} is", stacklevel=2)
                self.set_adapter(first)
            else:
                self.active_adapter = []

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block, the base model alone."""
        was = self._adapters_disabled
        self.disable_adapter_layers()
        try:
            yield
        finally:
            if not was:
                self.enable_adapter_layers()

    def disable_adapter_layers(self) -> None:
        """The base model alone, until `enable_adapter_layers`."""
        if self._merged and not self._adapters_disabled:
            unmerge(self.get_base_model())
        self._adapters_disabled = True
        self._activate()

    def enable_adapter_layers(self) -> None:
        """The active adapters again."""
        if self._merged and self._adapters_disabled:
            merge(self.get_base_model(), self._merged)
        self._adapters_disabled = False
        self._activate()

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
        if not _hosted(base) or not self.active_adapters:
            return
        off = self._adapters_disabled or self._merged or self._per_call()
        activate(base, None if off else self._entry())

    # -- running

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base's own forward pass, through the active adapter, or with one adapter a row.

        Args:
            adapter_names: one a row; "__base__" is the base alone.
        """
        with self._routed(adapter_names, args, kwargs):
            out = self.get_base_model()(*args, **_plain(kwargs))
        return out if adapter_names is not None else self._with_penalty(out)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base's own `generate`, through the active adapter, or with one adapter a row."""
        with self._routed(adapter_names, args, kwargs):
            return cast(Any, self.get_base_model()).generate(*args, **_plain(kwargs))

    @contextmanager
    def _routed(self, names: Sequence[str] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        base = self.get_base_model()
        if names is not None:
            if self._merged:
                raise TanzakuError("adapter_names: an adapter is merged; call unmerge_adapter() first")
            rows = next((len(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim()), len(names))
            if len(names) != rows:
                raise TanzakuError(f"adapter_names: found {len(names)} names and {rows} rows, expected one a row")
            with route(base, [None if name == "__base__" else name for name in names]):
                yield
        elif _hosted(base) and self.active_adapters and self._per_call() and not self._adapters_disabled:
            with route(base, [self._entry()]):
                yield
        else:
            yield

    def _with_penalty(self, out: Any) -> Any:
        """PEFT's AdaLoRA adds its penalty to the model's own loss."""
        loss = getattr(out, "loss", None)
        if isinstance(loss, Tensor) and not (self._adapters_disabled or self._merged) and self.active_adapters:
            for name in self.active_adapters:
                adapter = self._host.get(name)
                penalty = adapter.method.penalty(adapter)
                if penalty is not None:
                    out.loss = out.loss + penalty
        return out

    def update_and_allocate(self, global_step: int) -> None:
        """AdaLoRA's allocation of ranks, after optimizer step number `global_step`, before gradients are cleared."""
        adapter = self._host.get(self.active_adapters[0])
        config = adapter.method
        if not isinstance(config, AdaLoraConfig):
            raise TanzakuError(f"update_and_allocate: found {config.name}, expected an active adapter of adalora")
        if config.total_step is None:
            raise TanzakuError("update_and_allocate: AdaLoraConfig has no total_step; say how many steps there will be")
        self._prepare(adapter)
        config.after_step(adapter, global_step)

    def _for_checkpointing(self) -> None:
        model = self.get_base_model()
        on = getattr(model, "is_activation_checkpointing", None)  # its newer name
        on = getattr(model, "is_gradient_checkpointing", False) if on is None else on
        if on and hasattr(model, "enable_input_require_grads"):
            cast(Any, model).enable_input_require_grads()

    # -- parameters, by PEFT's names

    def _adapters(self) -> list[Adapter]:
        # Without what was hung on the base past this wrapper.
        return [self._host.get(name) for name in self._trained]

    def _adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for adapter in self._adapters():
            trained = {id(p) for p in self._trained[adapter.name]}
            for path, strip in adapter.at():
                for name, parameter in strip.named_parameters():
                    # A head that is not trained is the base's own; PEFT has no copy of it.
                    if id(parameter) in trained or not isinstance(strip, WeightStrip):
                        yield in_peft(adapter, path, strip, name), parameter

    def _base_names(self, names: Iterable[str]) -> dict[str, str]:
        """Names of the base's tensors -> PEFT's, where each lies below what took its module's place."""
        root = "base_model." if self._modules["base_model"] is self.get_base_model() else "base_model.model."
        layers: set[str] = set()
        whole: dict[str, str] = {}
        for adapter in self._adapters():
            trained = {id(p) for p in self._trained[adapter.name]}
            for path, strip in adapter.at():
                if isinstance(strip, WeightStrip):
                    whole |= {root + path: "original_module"} if trained & {id(p) for p in strip.parameters()} else {}
                elif cast(PeftConfig, adapter.method).is_adaption_prompt:
                    whole[root + path] = "model"
                elif isinstance(strip, ModuleStrip) and not isinstance(strip, BiasStrip):
                    layers.add(root + path)
        out = {}
        for name in names:
            path, _, last = name.rpartition(".")
            above = next((w for w in whole if f"{path}.".startswith(f"{w}.")), None)
            if above is not None:
                out[name] = f"{above}.{whole[above]}{name.removeprefix(above)}"
            else:
                out[name] = f"{path}.base_layer.{last}" if path in layers else name
        return out

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The base's parameters and the adapters', by PEFT's names."""
        if not recurse:
            return
        dot = f"{prefix}." if prefix else ""
        own = dict(super().named_parameters(remove_duplicate=remove_duplicate))
        names = self._base_names(own)
        for name, parameter in own.items():
            yield dot + names[name], parameter
        for name, parameter in self._adapter_parameters():
            yield dot + name, parameter

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The base, and the adapters' parameters as a tree of the same names, for code that walks a model."""
        yield from super().named_children()
        if "base_model" in self._modules:
            tree = nn.Module()
            for name, parameter in self._adapter_parameters():
                node = tree
                *path, last = name.split(".")
                for part in path:
                    if part not in node._modules:
                        node.add_module(part, nn.Module())
                    node = cast(nn.Module, node._modules[part])
                node.register_parameter(last, parameter)
            yield from tree._modules.items()  # type: ignore[misc]

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Every tensor of the base and of the adapters, by PEFT's names."""
        own = super().state_dict(keep_vars=keep_vars)
        names = self._base_names(own)
        out = own.__class__() if destination is None else destination
        out.update({prefix + names[name]: tensor for name, tensor in own.items()})
        out.update({prefix + name: p if keep_vars else p.detach() for name, p in self._adapter_parameters()})
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
        of_adapters = dict(self._adapter_parameters())
        state = {key: value for key, value in state_dict.items() if key.startswith(f"{_STATE}.")}
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
            start = f"{_STATE}.{adapter.name}."
            of_it = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
            if of_it:
                self._prepare(adapter)
                adapter.method.resume(adapter, of_it)
        return _IncompatibleKeys(missing, unexpected)

    def _training_state(self) -> dict[str, Tensor]:
        """What training goes on from: the adapters' own parameters, and what a method has beside them."""
        out: dict[str, Tensor] = {name: p.detach() for name, p in self._adapter_parameters()}
        for adapter in self._adapters():
            if adapter.method.__dict__.get("_prepared"):
                state = adapter.method.training_state(adapter)
                out |= {f"{_STATE}.{adapter.name}.{key}": value for key, value in state.items()}
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

    def print_trainable_parameters(self) -> None:
        """Print these numbers, in PEFT's words."""
        print(Count(*self.get_nb_trainable_parameters()))

    # -- files

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters, the one called "default" into the directory itself, others into folders of their names.

        Other files there stay. From Trainer, which hands over `state_dict`, the directory also gets model.safetensors:
        the adapters' parameters as they train, which its checkpoints are read back from.

        Raises:
            TanzakuError: an unknown adapter, a pickle asked for, or a directory that cannot be written.
        """
        _refuse("save_pretrained", save_embedding_layers=(save_embedding_layers, ("auto", False)))
        _refuse("save_pretrained", safe_serialization=(safe_serialization, (True,)))
        conversion = path_initial_model_for_weight_conversion
        _refuse("save_pretrained", path_initial_model_for_weight_conversion=(conversion, (None,)))
        by_trainer = "state_dict" in kwargs
        given = kwargs.pop("state_dict", None)
        _refuse("save_pretrained", **{key: (value, (None, False)) for key, value in kwargs.items()})
        names = list(self._trained) if selected_adapters is None else list(selected_adapters)
        for name in names:
            self._host.get(name)
        self._check_same(given or {})
        if not is_main_process:
            return
        folder = Path(save_directory)
        for name in names:
            target = folder if name == "default" else folder / name
            if target.exists() and not target.is_dir():
                raise TanzakuError(f"{target} is a file; expected a directory to save the adapter in")
            target.mkdir(parents=True, exist_ok=True)
            # Whole files take the place of old ones, and what else lies there (other checkpoints) stays.
            with TemporaryDirectory(prefix=".", dir=target) as beside:
                for path in save(self.get_base_model(), name, Path(beside, "adapter")).iterdir():
                    if (
                        path.suffix != ".md" or not (target / path.name).exists()
                    ):  # a card that a person may have edited
                        path.replace(target / path.name)
                if by_trainer and target == folder:
                    self._save_state(Path(beside), folder)
        if by_trainer and "default" not in names:
            with TemporaryDirectory(prefix=".", dir=folder) as beside:
                self._save_state(Path(beside), folder)

    def _save_state(self, beside: Path, folder: Path) -> None:
        save_file(self._training_state(), beside / _TRAINER, metadata={"format": "pt"})
        (beside / _TRAINER).replace(folder / _TRAINER)

    def _check_same(self, given: Mapping[str, Tensor]) -> None:
        own = self.state_dict()
        for key, value in given.items():
            if key not in own or not torch.equal(own[key].cpu(), value.cpu().to(own[key].dtype)):
                raise TanzakuError(
                    f"save_pretrained: {key} of state_dict is not this model's own; load_state_dict() it first"
                )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Wrap `model` with the adapter saved in the directory `model_id`, by Tanzaku or by HF PEFT.

        Args:
            is_trainable: train it on; otherwise it is frozen and the model in eval mode.
            config: take these settings instead of those in the directory.
            kwargs: `subfolder` of the directory.

        Raises:
            TanzakuError: no adapter there, a damaged file, another base, or an adapter that cannot be trained on.
        """
        _check_precision(model, autocast_adapter_dtype)
        _refuse("from_pretrained", ephemeral_gpu_offload=(ephemeral_gpu_offload, (False,)))
        _refuse("from_pretrained", key_mapping=(key_mapping, (None, {})))
        folder = _folder("from_pretrained", model_id, kwargs)
        settings = config or PeftConfig.from_pretrained(folder)
        named = cls not in (PeftModel, *BY_TASK.values())  # a program's own class
        kind = cls if named else BY_TASK.get(str(settings.task_type), cls)
        self = kind.__new__(kind)
        self._wrap(model, settings, adapter_name)
        self._load(folder, settings, adapter_name, is_trainable)
        self.set_adapter(adapter_name, inference_mode=not is_trainable)
        if not is_trainable:
            self.eval()
        self._for_checkpointing()
        return self

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hang the adapter saved in a directory; where there is one of that name, it takes the file's weights.

        Args:
            torch_device, low_cpu_mem_usage: have no effect: weights go to where their sites are.
        """
        _check_precision(self.get_base_model(), autocast_adapter_dtype)
        _refuse("load_adapter", ephemeral_gpu_offload=(ephemeral_gpu_offload, (False,)))
        _refuse("load_adapter", key_mapping=(key_mapping, (None, {})))
        folder = _folder("load_adapter", model_id, kwargs)
        settings = PeftConfig.from_pretrained(folder)
        if adapter_name not in self._trained:
            self._load(folder, settings, adapter_name, is_trainable)
        else:
            self._reload(folder, settings, adapter_name, is_trainable)
        if not is_trainable:
            self.eval()
        return _IncompatibleKeys([], [])

    def _reload(self, folder: Path, settings: PeftConfig, name: str, is_trainable: bool) -> None:
        """Give an adapter the weights of a file: into its own parameters, which an optimizer may hold."""
        base, old, beside = self.get_base_model(), self._host.get(name), f"{name}-loading"
        self._load(folder, settings, beside, is_trainable)
        new = self._host.get(beside)
        mine, theirs = dict(old.named_parameters()), dict(new.named_parameters())
        fits = {key: p.shape for key, p in mine.items()} == {key: p.shape for key, p in theirs.items()}
        if fits and not _pruned(cast(PeftConfig, old.method), settings):
            with torch.no_grad():
                for key, parameter in mine.items():
                    parameter.copy_(theirs[key])
            detach(base, beside)
        else:
            # The file has other tensors (of a network, what it wrote): a new adapter takes the name.
            detach(base, beside)
            detach(base, name)
            self._load(folder, settings, name, is_trainable)
        self._trained.pop(beside)
        self._activate()

    def _load(self, folder: Path, settings: PeftConfig, name: str, is_trainable: bool) -> None:
        config = self._with_head(settings)
        if is_trainable and _written(config):
            raise TanzakuError(
                f"{folder} holds the vectors that a network wrote, and not the network: it cannot be trained on; "
                "load it with is_trainable=False"
            )
        # Of a network that writes a prompt, the file has what it wrote.
        config.inference_mode = _written(config) or not is_trainable
        adapter = load(self.get_base_model(), folder, name, method=config)
        self._note(adapter)
        self.set_requires_grad(name, is_trainable)

    # -- merging

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base with the active adapter, or those named, folded into its weights for good; all adapters go.

        Args:
            progressbar: has no effect. safe_merge: is always done: a value out of range is an error.
        """
        if self._merged:
            self.unmerge_adapter()
        base = self.get_base_model()
        for name in self.active_adapters if adapter_names is None else adapter_names:
            merge(base, name, keep=False)
        return self._without_adapters()

    def unload(self) -> nn.Module:
        """The base with its own weights, but for the active adapter's whole modules (a head); all adapters go."""
        if self._merged:
            self.unmerge_adapter()
        base = self.get_base_model()
        for name in self.active_adapters:
            for path, strip in self._host.get(name).at():
                if isinstance(strip, WeightStrip):
                    with torch.no_grad():
                        for key, parameter in strip.own.items():
                            base.get_submodule(path).get_parameter(key).copy_(parameter)
        return self._without_adapters()

    def _without_adapters(self) -> nn.Module:
        base = self.get_base_model()
        if _hosted(base):
            detach(base)
        self._trained.clear()
        self.active_adapter = []
        return base

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold the active adapter into the base's weights, until `unmerge_adapter`."""
        names = self.active_adapters if adapter_names is None else adapter_names
        if len(names) != 1:
            raise TanzakuError(f"merge_adapter: found {len(names)} adapters, expected one; merge_and_unload takes more")
        merge(self.get_base_model(), names[0])
        self._merged = names[0]

    def unmerge_adapter(self) -> None:
        """Give the base its own weights back, bit for bit."""
        if not (self._merged and self._adapters_disabled):
            unmerge(self.get_base_model())
        self._merged = None
        self._activate()


class PeftModelForSequenceClassification(PeftModel):
    """Trains the classifier's head along."""

    heads = ("classifier", "score")


class PeftModelForTokenClassification(PeftModel):
    """Trains the classifier's head along."""

    heads = ("classifier", "score")


class PeftModelForQuestionAnswering(PeftModel):
    """Trains the head of spans along."""

    heads = ("qa_outputs",)


class PeftModelForCausalLM(PeftModel):
    """A decoder that generates."""


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder that generates."""


class PeftModelForFeatureExtraction(PeftModel):
    """A model without a head."""


BY_TASK: dict[str, type[PeftModel]] = {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def _hosted(base: nn.Module) -> bool:
    return bool(adapters(base))


def _written(config: PeftConfig) -> bool:
    """Whether a network writes the prompt, of which files hold only what it wrote."""
    return isinstance(config, PromptEncoderConfig) or bool(getattr(config, "prefix_projection", False))


def _pruned(*configs: PeftConfig) -> bool:
    return any(isinstance(config, AdaLoraConfig) and config.rank_pattern for config in configs)


def _signed(model: nn.Module) -> Any:
    """A `forward` with the signature of the base's, by which Trainer tells the columns that a model reads."""

    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    own = inspect.signature(model.forward)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = own.replace(parameters=[first, *own.parameters.values()])  # type: ignore[attr-defined]
    return forward


def _plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without what PEFT's own methods alone read."""
    _refuse("forward", **{key: (kwargs.get(key), (None,)) for key in ("task_ids", "alora_offsets")})
    return {key: value for key, value in kwargs.items() if key not in ("task_ids", "alora_offsets")}


def _refuse(where: str, **found: tuple[Any, tuple[Any, ...]]) -> None:
    """An error for a keyword whose value is none of those that are supported."""
    for key, (value, supported) in found.items():
        if value not in supported:
            known = " or ".join(repr(each) for each in supported)
            raise TanzakuError(f"{where}: found {key}={value!r}, which is not supported; expected {known}")


def _check_precision(model: nn.Module, autocast: bool) -> None:
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    if half and not autocast:
        raise TanzakuError("autocast_adapter_dtype: found False, expected True: adapters are fp32 on a half base")


def _folder(where: str, model_id: str | Path, kwargs: dict[str, Any]) -> Path:
    subfolder = kwargs.get("subfolder")
    for key, value in kwargs.items():
        if key != "subfolder" and value not in (None, False):
            raise TanzakuError(
                f"{where}: found {key}={value!r}, which is not supported; expected a directory on this machine"
            )
    return Path(model_id, subfolder or "")
