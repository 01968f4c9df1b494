"""A model as HF PEFT wraps it: PEFT's methods, names of parameters and files, on Tanzaku's managers and routes.

The base model stays what it is, module by module; the wrapper routes its rows. Trainer takes the wrapper for a
transformers model, since it answers `isinstance` as its base does: so it saves it with `save_pretrained`, and reads a
checkpoint back with `load_state_dict`, whether HF PEFT is installed or not.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import huggingface_hub
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from tanzaku.compat.peft import files
from tanzaku.compat.peft.config import (
    AdaLoraConfig,
    CPTConfig,
    LoraConfig,
    PeftConfig,
    PromptEncoderConfig,
    TaskType,
    plain,
)
from tanzaku.compat.peft.hub import folder_of
from tanzaku.compat.peft.layers import dress, undress_all
from tanzaku.compat.peft.merged import Merging
from tanzaku.compat.peft.prompts import Prompting
from tanzaku.compat.peft.seeding import draw_as_peft
from tanzaku.compat.peft.starts import begin
from tanzaku.compat.peft.targets import fit
from tanzaku.compat.peft.tuner import TUNERS
from tanzaku.compat.peft.wrapped import STATE, Forward, from_peft_names, managed
from tanzaku.core.adapter import Adapter
from tanzaku.core.attach import adapters, attach, detach, route
from tanzaku.core.method import AdapterLayer
from tanzaku.core.weights import WeightCopy
from tanzaku.errors import TanzakuError, listed
from tanzaku.merging.combine import combine
from tanzaku.merging.merge import merge, unmerge
from tanzaku.methods.poly import Poly
from tanzaku.models import tree
from tanzaku.models.quantize import plain as plain_tensor
from tanzaku.storage.store import TENSORS, bringing, load

_TRAINER = "model.safetensors"  # where Trainer looks for a model's weights


class PeftModel(Prompting, Merging):
    """A model with adapters, by PEFT's names. `model` itself is the base; nothing in it is replaced.

    Args:
        peft_config: of the first adapter, called `adapter_name`, which is active.
        autocast_adapter_dtype: adapters are fp32 on a base of half precision, and train well so; False: as the base.
        low_cpu_mem_usage: has no effect: an adapter is built once, where its base is.

    Raises:
        TanzakuError: bad settings, or a target that matches nothing.
    """

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
        self._wrap(model, peft_config, adapter_name)
        if peft_config.is_prompt_learning:
            # As in PEFT: programs override `add_adapter` in a subclass.
            self.add_adapter(adapter_name, peft_config, low_cpu_mem_usage=low_cpu_mem_usage)
        else:
            self._attach(adapter_name, peft_config, autocast_adapter_dtype)
        self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
        self._for_checkpointing()

    def _wrap(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str) -> None:
        if isinstance(model, PeftModel):
            raise TanzakuError("found a model with adapters, expected a plain one; use its add_adapter() for another")
        nn.Module.__init__(self)
        self.base_model = model if peft_config.is_prompt_learning else TUNERS[peft_config.peft_type](model, self)
        self.active_adapter: str | list[str] = adapter_name
        self.peft_type = peft_config.peft_type
        self.peft_config: dict[str, PeftConfig] = {}
        self._trained: dict[str, list[nn.Parameter]] = {}
        self._adapters_disabled = False
        self._paused: dict[str, list[bool]] = {}  # while adapters are disabled: what requires gradients otherwise
        self.merged_adapters: list[str] = []
        if type(self).forward is PeftModel.forward:
            self.__dict__["forward"] = Forward(self)
        self.register_load_state_dict_pre_hook(from_peft_names)  # type: ignore[no-untyped-call]

    # -- adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Attach another adapter, of any method; it is neither active nor trained until `set_adapter`."""
        if adapter_name in self.peft_config:
            raise TanzakuError(f"Adapter with name {adapter_name!r} already exists; delete it first, or choose another")
        if not isinstance(peft_config, PeftConfig):
            raise TanzakuError(f"found {type(peft_config).__name__}, expected a configuration such as LoraConfig(r=8)")
        if self.peft_config and getattr(peft_config, "bias", "none") != "none":
            raise TanzakuError(
                "LoraModel supports only 1 adapter with bias. When using multiple adapters, set bias to 'none' for all "
                "adapters."
            )
        self._attach(adapter_name, peft_config, autocast_adapter_dtype)
        if adapter_name not in self.active_adapters:
            self.set_requires_grad(adapter_name, False)

    def _attach(self, name: str, config: PeftConfig, autocast: bool = True) -> None:
        if self.prefix and name in self.prefix:
            warnings.warn(f"Adapter name {name!r} should not be contained in the prefix {self.prefix!r}.", stacklevel=3)
        base = self.get_base_model()
        before = torch.get_rng_state()
        mine = self._with_head(config)
        fit(mine, base)
        built = mine.built()
        with bringing(base, built, name) as block:
            for label, where in built.brings().items():
                block.bring(label, folder_of("get_peft_model", where, None, {}))
            adapter = attach(base, built, name)
        draw_as_peft(adapter, before)
        try:
            begin(adapter)
        except TanzakuError:
            detach(base, name)
            raise
        self._note(adapter, config, autocast)

    def _note(self, adapter: Adapter, config: PeftConfig, autocast: bool = True) -> None:
        """Keep the program's own configuration of an adapter, with what building it has found out."""
        base, built = self.get_base_model(), cast(PeftConfig, adapter.method)
        told = [field.name for field in dataclasses.fields(config) if field.name not in ("inference_mode", "adapters")]
        for key in told:
            if plain(getattr(config, key)) != getattr(built, key):
                setattr(config, key, copy.deepcopy(getattr(built, key)))
        config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
        self.peft_config[adapter.name] = config
        base.__dict__.setdefault(_WRAPPED, set()).add(adapter.name)
        for path, layer in adapter.at():
            # A copy of a module has the module's type in PEFT. An adapter is fp32, or has it, too.
            if isinstance(layer, WeightCopy) or (not autocast and not config.is_prompt_learning):
                _as_base(layer, base.get_submodule(path))
        self._trained[adapter.name] = [p for _, p in adapter.trained()]
        dress(self)

    def _with_head(self, config: PeftConfig) -> PeftConfig:
        """A copy that also names the head which this class trains along, and no name that is not here.

        As in PEFT, one name of `modules_to_save` that is here is enough: it often lists what a head may be called.
        """
        config = copy.deepcopy(config)
        paths = [path for path, _ in tree.named_modules(self.get_base_model())]

        def here(names: Iterable[str]) -> list[str]:
            return [name for name in names if any(path.endswith(name) for path in paths)]

        names = list(config.modules_to_save or [])
        names = here(names) or names
        if "modules_to_save" in config.order:  # PEFT has no such setting of some
            names += here(self.heads)
        config.modules_to_save = list(dict.fromkeys(names)) or config.modules_to_save
        return config

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make an adapter active and trainable, and all others neither. A list stacks several."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self._known(name, f"Adapter {name} not found.")
        self._check_copies(names)
        if self.merged_adapters:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            self.unmerge_adapter()
        self.active_adapter = names[0] if len(names) == 1 else names
        self._paused = {}
        for name in self._trained:
            self.set_requires_grad(name, name in names and not inference_mode)
        self._activate()

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str | None = None,
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Make one adapter of several of LoRA or (IA)3, neither active nor trained: see :func:`tanzaku.combine`.

        Args:
            combination_type: `how` of `combine`; None: "svd" for LoRA and "linear" for (IA)3.

        Raises:
            TanzakuError: a name that is taken or unknown, adapters of other methods, or bad settings.
        """
        if adapter_name in self.peft_config:
            raise TanzakuError(f"Adapter with name {adapter_name!r} already exists; delete it first, or choose another")
        for name in adapters:
            self._known(name, f"Adapter {name} does not exist.")
        first = self.peft_config[adapters[0]] if adapters else None
        how = combination_type or ("svd" if isinstance(first, LoraConfig) else "linear")
        adapter = combine(
            self.get_base_model(),
            adapters,
            adapter_name,
            weights=weights,
            how=how,
            density=density,
            majority_sign_method=majority_sign_method,
            svd_rank=svd_rank,
            svd_clamp=svd_clamp,
            svd_full_matrices=svd_full_matrices,
            svd_driver=svd_driver,
        )
        config = type(adapter.method)(**adapter.method.settings())
        self._note(adapter, cast(PeftConfig, config))
        self.set_requires_grad(adapter_name, False)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train adapters, or freeze them."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._manager.get(name).require_gradients(True)  # from here on this class says what does
            for parameter in self._trained[name]:
                parameter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off; where it was active, the first that is left is."""
        self._known(adapter_name, f"Adapter {adapter_name} does not exist.")
        active = self.active_adapters
        if adapter_name in self.merged_adapters:
            raise TanzakuError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first."
            )
        detach(self.get_base_model(), adapter_name)
        self._trained.pop(adapter_name)
        self.peft_config.pop(adapter_name)
        undress_all(self.get_base_model()) if not self._trained else dress(self)
        if adapter_name in active:
            left = [name for name in active if name != adapter_name]
            if left:
                self.set_adapter(left)
            elif self._trained:
                first = next(iter(self._trained))
                warnings.warn(
                    f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {first}.",
                    stacklevel=2,
                )
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
        """The base model alone, until `enable_adapter_layers`; what was trained requires no gradients meanwhile."""
        if self._adapters_disabled:
            return
        if self.merged_adapters:
            unmerge(self.get_base_model())
        self._adapters_disabled = True
        self._paused = {name: [p.requires_grad for p in each] for name, each in self._trained.items()}
        for name, config in self.peft_config.items():
            if not config.is_prompt_learning:
                self.set_requires_grad(name, False)
        self._activate()

    def enable_adapter_layers(self) -> None:
        """The active adapters again, trained as before."""
        if not self._adapters_disabled:
            return
        if self.merged_adapters:
            merge(self.get_base_model(), tuple(self.merged_adapters))
        self._adapters_disabled = False
        for name, flags in self._paused.items():
            for parameter, flag in zip(self._trained.get(name, ()), flags, strict=False):
                parameter.requires_grad_(flag)
        self._paused = {}
        self._activate()

    # -- running

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base's own forward pass, through the active adapter, or with one adapter a row.

        Args:
            adapter_names: one a row; "__base__" is the base alone.
        """
        prompt = self._prompt_to_learn(args, kwargs) if adapter_names is None else None
        if prompt is not None:
            return self._learn(prompt, args, _plain(kwargs))
        if self.active_adapters and isinstance(self.active_peft_config, CPTConfig):
            kwargs.pop("input_type_mask", None)  # it says what labels count
        with self._routed(adapter_names, args, kwargs) as plain:
            out = self.get_base_model()(*args, **plain)
        return out if adapter_names is not None else self._with_penalty(out)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base's own `generate`, through the active adapter, or with one adapter a row."""
        with self._routed(adapter_names, args, kwargs) as plain:
            return cast(Any, self.get_base_model()).generate(*args, **plain)

    @contextmanager
    def _routed(
        self, names: Sequence[str] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """A block in which a pass goes through its adapters; it gives the keywords that the base reads of these."""
        base = self.get_base_model()
        context, plain = self._read_by_rows(names, kwargs)
        if names is not None:
            if self.merged_adapters:
                raise TanzakuError(
                    "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
                )
            rows = next((len(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim()), len(names))
            if len(names) != rows:
                raise TanzakuError(
                    "Length of `adapter_names` should be the same as the number of inputs, but got "
                    f"{len(names)} and {rows} respectively."
                )
            if strange := sorted({name for name in names if name != "__base__" and name not in self.peft_config}):
                raise TanzakuError(
                    f"Trying to infer with non-existing adapter(s): {', '.join(strange)}; there are "
                    f"{listed(self.peft_config)}"
                )
            if self._adapters_disabled:
                yield plain
                return
            with route(base, [None if name == "__base__" else name for name in names], context):
                yield plain
        elif managed(base) and self.active_adapters and not self._adapters_disabled and (context or self._per_call()):
            with route(base, [self._entry()], context):
                yield plain
        else:
            yield plain

    def _read_by_rows(
        self, names: Sequence[str] | None, kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What adapters read of each row, and the other keywords."""
        used = {*(self.active_adapters if names is None else names)} & {*self.peft_config}
        by_task = any(isinstance(self.peft_config[name], Poly) for name in used)
        if not by_task or kwargs.get("task_ids") is None:
            return {}, _plain(kwargs)
        return {"task_ids": kwargs["task_ids"]}, _plain({k: v for k, v in kwargs.items() if k != "task_ids"})

    def _with_penalty(self, out: Any) -> Any:
        """PEFT's AdaLoRA adds its penalty to the model's own loss."""
        loss = getattr(out, "loss", None)
        if isinstance(loss, Tensor) and not (self._adapters_disabled or self.merged_adapters) and self.active_adapters:
            for name in self.active_adapters:
                adapter = self._manager.get(name)
                penalty = adapter.method.penalty(adapter)
                if penalty is not None:
                    out.loss = out.loss + penalty
        return out

    def update_and_allocate(self, global_step: int) -> None:
        """AdaLoRA's allocation of ranks, after optimizer step number `global_step`, before gradients are cleared."""
        adapter = self._manager.get(self.active_adapters[0])
        config = adapter.method
        if not isinstance(config, AdaLoraConfig):
            raise TanzakuError(f"update_and_allocate: found {config.name}, expected an active adapter of adalora")
        if config.total_step is None:
            raise TanzakuError("update_and_allocate: AdaLoraConfig has no total_step; say how many steps there will be")
        self._prepare(adapter)
        config.after_step(adapter, global_step)

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Let gradients through checkpointed layers of a frozen model: embedded tokens require them."""
        if getattr(model, "is_quantized", False):
            return model
        if hasattr(model, "enable_input_require_grads"):
            cast(Any, model).enable_input_require_grads()
        elif hasattr(model, "get_input_embeddings"):
            cast(Any, model).get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))
        return model

    def _for_checkpointing(self) -> None:
        model = self.get_base_model()
        on = getattr(model, "is_activation_checkpointing", None)  # its newer name
        on = getattr(model, "is_gradient_checkpointing", False) if on is None else on
        if on:
            self.prepare_model_for_gradient_checkpointing(model)

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
        for key in ("max_shard_size", "is_main_process"):
            kwargs.pop(key, None)  # an adapter is one file
        _refuse("save_pretrained", **{key: (value, (None, False)) for key, value in kwargs.items()})
        names = list(self._trained) if selected_adapters is None else list(selected_adapters)
        if strange := [name for name in names if name not in self.peft_config]:
            raise TanzakuError(
                "You passed an invalid `selected_adapters` arguments, current supported adapter names are "
                f"{list(self.peft_config)} - got {strange}"
            )
        self._check_same(given or {})
        if not is_main_process:
            return
        folder = Path(save_directory)
        for name in names:
            files.write(self.get_base_model(), name, self.peft_config[name], _home(folder, name))
        if by_trainer:
            with TemporaryDirectory(prefix=".", dir=folder) as beside:
                self._save_state(Path(beside), folder, names)

    def _save_state(self, beside: Path, folder: Path, names: list[str]) -> None:
        notes = {f"beside.{name}": digest_of(_home(folder, name) / TENSORS) for name in names}
        save_file(self._training_state(), beside / _TRAINER, metadata={"format": "pt", **notes})
        (beside / _TRAINER).replace(folder / _TRAINER)

    def _check_same(self, given: Mapping[str, Tensor]) -> None:
        own = self.state_dict()
        for key, value in given.items():
            if key not in own or not torch.equal(own[key].cpu(), value.cpu().to(own[key].dtype)):
                raise TanzakuError(
                    f"save_pretrained: {key} of state_dict is not this model's own; load_state_dict() it first"
                )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload model",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: list[str] | None = None,
    ) -> Any:
        """Upload the adapters, as `save_pretrained` writes them, to a repository on the Hub.

        Args:
            repo_id: is made where there is none; `private` says how. revision: a branch.
            tags: of the model card, beside its own.
        """
        api = huggingface_hub.HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            if tags:
                files.tag(Path(folder), tags)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
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
            ephemeral_gpu_offload, low_cpu_mem_usage: have no effect: an adapter is built once, where its base is.
            kwargs: `subfolder`, and what `huggingface_hub.hf_hub_download` takes (`revision`, `token`, ...).
                `torch_device`, `device_map`, `max_memory`, `offload_...` have no effect: an adapter follows its base.

        Raises:
            TanzakuError: no adapter there, a damaged file, another base, or an adapter that cannot be trained on.
        """
        _refuse("from_pretrained", key_mapping=(key_mapping, (None, {})))
        folder = _folder("from_pretrained", model_id, kwargs)
        settings = config or PeftConfig.from_pretrained(folder)
        if not isinstance(settings, PeftConfig):
            raise ValueError(f"The input config must be a PeftConfig, got {settings.__class__}")
        named = cls not in (PeftModel, *BY_TASK.values())  # a program's own class
        kind = cls if named else BY_TASK.get(str(settings.task_type), cls)
        self = kind.__new__(kind)
        self._wrap(model, settings, adapter_name)
        self._load(folder, settings, adapter_name, is_trainable, autocast_adapter_dtype)
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
        """Attach the adapter saved in a directory or on the Hub; where there is one of that name, it takes the weights.

        Args:
            torch_device, low_cpu_mem_usage, ephemeral_gpu_offload: have no effect: weights go to where their sites are.
            kwargs: as of `from_pretrained`.
        """
        _refuse("load_adapter", key_mapping=(key_mapping, (None, {})))
        folder = _folder("load_adapter", model_id, kwargs)
        settings = PeftConfig.from_pretrained(folder)
        if adapter_name not in self._trained:
            self._load(folder, settings, adapter_name, is_trainable, autocast_adapter_dtype)
        elif not self._resume(folder, adapter_name):
            self._reload(folder, settings, adapter_name, is_trainable, autocast_adapter_dtype)
        if not is_trainable:
            self.eval()
        return _IncompatibleKeys([], [])

    def _resume(self, folder: Path, name: str) -> bool:
        """Give an adapter its parameters as they train, where Trainer left them beside the adapter."""
        path = folder / _TRAINER
        if not path.is_file():
            return False
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get(f"beside.{name}") != digest_of(_home(folder, name) / TENSORS):
                return False  # the adapter was saved again since
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
        own = dict(self._adapter_parameters(name))
        if not all(key in found and found[key].shape == parameter.shape for key, parameter in own.items()):
            return False
        state = {key: tensor for key, tensor in found.items() if key in own or key.startswith(f"{STATE}.{name}.")}
        self.load_state_dict(state, strict=False)
        return True

    def _reload(self, folder: Path, settings: PeftConfig, name: str, is_trainable: bool, autocast: bool) -> None:
        """Give an adapter the weights of a file: into its own parameters, which an optimizer may hold."""
        base, old, beside = self.get_base_model(), self._manager.get(name), f"{name}-loading"
        self._load(folder, settings, beside, is_trainable, autocast)
        new = self._manager.get(beside)
        mine, theirs = ({**dict(a.named_parameters()), **dict(a.named_buffers())} for a in (old, new))
        fits = {key: p.shape for key, p in mine.items()} == {key: p.shape for key, p in theirs.items()}
        detach(base, beside)
        self._forget(beside)
        if fits and not _pruned(cast(PeftConfig, old.method), settings):
            with torch.no_grad():
                for key, parameter in mine.items():
                    parameter.copy_(theirs[key])
        else:
            # The file has other tensors (of a network, what it wrote): a new adapter takes the name.
            detach(base, name)
            self._forget(name)
            self._load(folder, settings, name, is_trainable, autocast)
        dress(self)
        self._activate()

    def _forget(self, name: str) -> None:
        del self._trained[name], self.peft_config[name]

    def _load(self, folder: Path, settings: PeftConfig, name: str, is_trainable: bool, autocast: bool) -> None:
        if is_trainable and _written(settings):
            raise TanzakuError(
                f"{folder} holds the vectors that a network wrote, and not the network: it cannot be trained on; "
                "load it with is_trainable=False"
            )
        settings.inference_mode = not is_trainable
        config = self._with_head(settings).built()
        # Of a network that writes a prompt, the file has what it wrote.
        config.inference_mode = _written(config) or not is_trainable
        # As in PEFT, an adapter of one checkpoint may go onto another of its kind; that is said.
        adapter = load(self.get_base_model(), folder, name, method=config, any_base=True)
        self._note(adapter, settings, autocast)
        self.set_requires_grad(name, is_trainable)


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

    reads_on = True


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


def wrapped_again(base: nn.Module, name: str) -> None:
    """See to a model that was wrapped before: as in PEFT, a new adapter takes the place of an old one of its name."""
    mine: set[str] = base.__dict__.get(_WRAPPED, set())
    there = mine & set(adapters(base))
    if not there:
        return
    warnings.warn(
        "You are trying to modify a model with PEFT for a second time. To begin anew with another configuration, call "
        "`.unload()` before.",
        stacklevel=3,
    )
    if name in there:
        detach(base, name)


_WRAPPED = "_tanzaku_wrapped"  # names of a base's adapters that came by a wrapper


def _written(config: PeftConfig) -> bool:
    """Whether a network writes the prompt, of which files hold only what it wrote."""
    return isinstance(config, PromptEncoderConfig) or bool(getattr(config, "prefix_projection", False))


def _pruned(*configs: PeftConfig) -> bool:
    return any(isinstance(config, AdaLoraConfig) and config.rank_pattern for config in configs)


def _plain(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Without what PEFT's own methods alone read."""
    _refuse("forward", **{key: (kwargs.get(key), (None,)) for key in ("task_ids", "alora_offsets")})
    return {key: value for key, value in kwargs.items() if key not in ("task_ids", "alora_offsets")}


def _refuse(where: str, **found: tuple[Any, tuple[Any, ...]]) -> None:
    """An error for a keyword whose value is none of those that are supported."""
    for key, (value, supported) in found.items():
        if value not in supported:
            known = " or ".join(repr(each) for each in supported)
            raise TanzakuError(f"{where}: found {key}={value!r}, which is not supported; expected {known}")


def _as_base(layer: AdapterLayer, module: nn.Module) -> None:
    """Bring an adapter layer to the type of the module that it is at."""
    if isinstance(layer, WeightCopy):
        for name, parameter in layer.own.items():
            parameter.data = parameter.data.to(module.get_parameter(name).dtype)
        return
    dtype = next((p.dtype for p in module.parameters() if plain_tensor(p) and p.is_floating_point()), None)
    if dtype is not None:
        layer.to(dtype)


def _home(folder: Path, name: str) -> Path:
    return folder if name == "default" else folder / name


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# An adapter follows its base, wherever that is.
_NO_EFFECT = ("torch_device", "device_map", "max_memory", "offload_dir", "offload_folder", "offload_index")


def _folder(where: str, model_id: str | Path, kwargs: dict[str, Any]) -> Path:
    options = {key: value for key, value in kwargs.items() if key not in _NO_EFFECT}
    for key in ("use_safetensors", "ignore_mismatched_sizes"):
        supported = (None, True) if key == "use_safetensors" else (None, False)
        _refuse(where, **{key: (options.pop(key, None), supported)})
    return folder_of(where, model_id, options.pop("subfolder", None), options)
