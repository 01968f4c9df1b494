"""What other people's programs ask of a model with adapters, beside its tree: checkpointing and `save_pretrained`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from tanzaku.core.checkpointing import KeptRoute
from tanzaku.core.manager import AdapterManager
from tanzaku.core.method import ModuleLayer
from tanzaku.core.sites import Sites
from tanzaku.core.weights import copied_in
from tanzaku.errors import TanzakuError, listed
from tanzaku.models import tree
from tanzaku.models.heads import embeddings

_CHECKPOINT, _SET, _SAVE = "_gradient_checkpointing_func", "_set_gradient_checkpointing", "save_pretrained"
_RESIZE = "resize_token_embeddings"


def serve(model: nn.Module, manager: AdapterManager | None) -> None:
    """Answer for a model that has adapters, or, without a manager, for none any more."""
    for module in tree.modules(model):
        own = module.__dict__
        for key in (_SET, _SAVE, _RESIZE):
            if isinstance(own.get(key), _SetCheckpointing | _SavePretrained | _Resize):
                del own[key]
        kept = own.get(_CHECKPOINT)
        if isinstance(kept, KeptRoute):
            own[_CHECKPOINT] = kept.checkpoint
        if manager is None or not isinstance(module, PreTrainedModel):
            continue
        if "value" not in inspect.signature(type(module)._set_gradient_checkpointing).parameters:  # an older form
            own[_SET] = _SetCheckpointing(module, manager.sites)
    if manager is None:
        return
    if isinstance(model, PreTrainedModel):
        model.__dict__[_SAVE] = _SavePretrained(model, manager)
        model.__dict__[_RESIZE] = _Resize(model, manager)
    for module in tree.modules(model):
        if (kept := module.__dict__.get(_CHECKPOINT)) is not None:
            module.__dict__[_CHECKPOINT] = KeptRoute(manager.sites, kept)


class _SetCheckpointing:
    """`_set_gradient_checkpointing` of a model, with a function that keeps the route of each layer's forward pass."""

    def __init__(self, model: PreTrainedModel, sites: Sites):
        self.model, self.sites = model, sites

    def __call__(self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **options: Any) -> None:
        own = type(self.model)._set_gradient_checkpointing
        kept = KeptRoute(self.sites, gradient_checkpointing_func) if enable else gradient_checkpointing_func
        own(self.model, enable=enable, gradient_checkpointing_func=kept, **options)


# How an adapter is written is known to `storage`, which is built on the core and says so here when it is imported.
_writers: list[Callable[[nn.Module, str, Path], Any]] = []


def write_adapters_by(write: Callable[[nn.Module, str, Path], Any]) -> None:
    """Have `save_pretrained` of models write each active adapter by a function of the model, its name and a path."""
    _writers[:] = [write]


class _SavePretrained:
    """`save_pretrained` of a model: what transformers writes, and beside it each active adapter, for `tanzaku.load`."""

    def __init__(self, model: PreTrainedModel, manager: AdapterManager):
        self.model, self.manager = model, manager

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if not _writers:  # a model that was unpickled may be all that was imported
            import_module("tanzaku.storage.store")
        out = type(self.model).save_pretrained(self.model, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            for name in self.manager.active_names:
                _writers[0](self.model, name, Path(save_directory, tree.PLACE, name))
        return out


class _Resize:
    """`resize_token_embeddings` of a model, which adapters of its embeddings would not survive."""

    def __init__(self, model: PreTrainedModel, manager: AdapterManager):
        self.model, self.manager = model, manager

    def __call__(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        if new_num_tokens is not None and (names := sorted(self._affected())):
            raise TanzakuError(
                f"resize_token_embeddings: {listed(names)} changed the embeddings as they are; detach {listed(names)}, "
                "resize, and attach again"
            )
        return type(self.model).resize_token_embeddings(self.model, new_num_tokens, *args, **kwargs)

    def _affected(self) -> set[str]:
        """Names of the adapters that change an embedding, by whatever name."""
        ends = embeddings(self.model)
        paths = {path for path, m in tree.named_modules(self.model) if ends & {id(p) for p in m._parameters.values()}}
        names = {name for name, p in tree.named_parameters(self.model, remove_duplicate=False) if id(p) in ends}
        return {
            adapter.name
            for adapter in self.manager.adapters.values()
            if names & copied_in(adapter.at())
            or any(path in paths for path, layer in adapter.at() if isinstance(layer, ModuleLayer))
        }
