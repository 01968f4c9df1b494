"""Folding a wrapped model's adapters into its base, and taking them out."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from tanzaku.compat.peft.layers import undress_all
from tanzaku.compat.peft.wrapped import Wrapped, managed
from tanzaku.core.attach import detach
from tanzaku.core.weights import WeightCopy
from tanzaku.errors import TanzakuError
from tanzaku.merging.merge import merge, unmerge


class Merging(Wrapped):
    """A wrapped model whose adapters may be merged."""

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base with the active adapters, or those named, folded into its weights for good; all adapters go.

        Args:
            progressbar: has no effect. safe_merge: is always done: a value out of range is an error.
        """
        self._check_mergeable()
        names = self.active_adapters if adapter_names is None else adapter_names
        self._check_copies(names)
        if self.merged_adapters:
            self.unmerge_adapter()
        if names:
            self._merge(tuple(names), keep=False)
        return self._without_adapters()

    def unload(self) -> nn.Module:
        """The base with its own weights, but for the active adapter's whole modules (a head); all adapters go."""
        self._check_mergeable()
        if self.merged_adapters:
            self.unmerge_adapter()
        base = self.get_base_model()
        for name in self.active_adapters:
            for path, layer in self._manager.get(name).at():
                if isinstance(layer, WeightCopy):
                    with torch.no_grad():
                        for key, tensor in layer.tensors.items():
                            place, _, last = key.rpartition(".")
                            getattr(base.get_submodule(path).get_submodule(place), last).copy_(tensor)
        return self._without_adapters()

    def _check_mergeable(self) -> None:
        if self.peft_config and self.active_peft_config.is_prompt_learning:
            # As in PEFT, programs ask for it by hasattr().
            raise AttributeError(
                f"{type(self).__name__}: a prompt is no change of weights; get_base_model() is the base"
            )

    def _without_adapters(self) -> nn.Module:
        base = self.get_base_model()
        undress_all(base)
        if managed(base):
            detach(base)
        self._trained.clear()
        self.peft_config.clear()
        self.active_adapter = []
        return base

    def _merge(self, names: tuple[str, ...], keep: bool = True) -> None:
        broken = [
            name
            for name in names
            for _, parameter in self._manager.get(name).named_parameters()
            if not bool(parameter.isfinite().all())
        ]
        if broken:
            raise TanzakuError(
                f"NaNs detected in the merged weights. The adapter {broken[0]} seems to be broken: it holds numbers "
                "that are not finite"
            )
        merge(self.get_base_model(), names, keep=keep)
        for name in self._trained if keep else ():
            self._manager.get(name).require_gradients(True)  # as in PEFT, merging says nothing of that

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold the active adapters, or those named, into the base's weights, until `unmerge_adapter`."""
        self._check_mergeable()
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        if new := [name for name in names if name not in self.merged_adapters]:
            self._check_copies(names)
            every = [*self.merged_adapters, *new]
            if self.merged_adapters:
                unmerge(self.get_base_model())
            self.merged_adapters = []
            self._merge(tuple(every))
            self.merged_adapters = every
        else:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)

    def unmerge_adapter(self) -> None:
        """Give the base its own weights back, bit for bit."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if not self._adapters_disabled:
            unmerge(self.get_base_model())
        self.merged_adapters = []
        self._activate()
