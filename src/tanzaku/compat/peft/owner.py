"""A wrapped model, as its layers, its tuner and functions on it see it: they are what it is built of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tanzaku.compat.peft.config import PeftConfig
from tanzaku.core.adapter import Adapter
from tanzaku.core.manager import AdapterManager
from tanzaku.core.method import AdapterLayer


class Owner(nn.Module):
    """A base and its adapters. Every :class:`tanzaku.compat.peft.peft_model.PeftModel` is one, and nothing else is."""

    peft_config: dict[str, PeftConfig]  # the configuration of every adapter, by name: the program's own
    active_adapter: str | list[str]
    merged_adapters: list[str]
    _adapters_disabled: bool

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        raise NotImplementedError

    @property
    def _manager(self) -> AdapterManager:
        raise NotImplementedError

    def get_base_model(self) -> nn.Module:
        """The model without adapters' names around it."""
        raise NotImplementedError

    def _adapters(self) -> list[Adapter]:
        raise NotImplementedError

    def _trains(self, name: str, layer: AdapterLayer) -> bool:
        """Whether a layer is trained with its adapter: a head that is only kept is the base's own, as PEFT sees it."""
        raise NotImplementedError

    def _check_same(self, state_dict: Mapping[str, Any] | Mapping[str, Tensor]) -> None:
        """A TanzakuError where a given state is not the model's own."""
        raise NotImplementedError
