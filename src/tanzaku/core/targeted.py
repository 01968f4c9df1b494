"""Methods that act at modules which the settings name: how these are found, and what else such methods share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from torch import nn

from tanzaku.core.delta import shape_of
from tanzaku.core.method import AdapterLayer, Method
from tanzaku.core.survey import biased
from tanzaku.core.weights import BiasCopy
from tanzaku.files.patterns import groups_of
from tanzaku.models.families import Base


@dataclass
class Targeted(Method):
    """A method at modules of its choice. Settings have HF PEFT's names and rules.

    Args:
        target_modules: last names, a regular expression for the path, or "all-linear"; None takes the family's.
        exclude_modules: what is left out of them, by last names or a regular expression.
    """

    targets: ClassVar[tuple[str, ...]] = ("query", "value", "mixer")  # roles, see families/family.py
    targets_by_kind: ClassVar[Mapping[str, tuple[str, ...]]] = {  # of model types where HF PEFT's are others
        "phi": ("query", "value", "up", "down"),
        "nemotron_h": ("query", "key", "value", "out"),
        "rwkv": (
            *(f"{part}.{name}" for part in ("attention", "feed_forward") for name in ("key", "value", "receptance")),
            "attention.output",
        ),
    }
    kinds: ClassVar[str] = "a linear layer or Conv1D"  # what `fits` lets pass, for errors
    chosen_only_here: ClassVar[
        tuple[str, ...]
    ] = ()  # settings here that choose modules, and that PEFT's method has not

    _paths = cast("list[str]", ())  # of the modules found

    target_modules: list[str] | str | None = field(default=None, kw_only=True)
    exclude_modules: list[str] | str | None = field(default=None, kw_only=True)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether the method can change such a module."""
        return not isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d)

    def find(self, base: Base) -> list[tuple[str, nn.Module]]:
        """Target modules with their paths; remembers the family's default names in the settings."""
        if self.target_modules is None:
            self.target_modules = base.defaults(self.name, self.targets, self.targets_by_kind, fits=self.fits)
        found = base.targets(
            self.target_modules, exclude=self.exclude_modules, skip=self.copied(base), **self.in_layers()
        )
        self._paths = [path for path, _ in found]
        return found

    def find_fitting(self, base: Base) -> list[tuple[str, nn.Module]]:
        """:meth:`find`, with an error for a module of a kind that the method cannot change."""
        found = self.find(base)
        for path, module in found:
            self.require(self.fits(module), f"{path}, a {type(module).__name__}", self.kinds)
            plain = not isinstance(module, nn.Embedding) or hasattr(module, "embed_scale")
            itself = not plain and type(module).forward is not nn.Embedding.forward
            found_at = f"{path}, a {type(module).__name__}, which finds out by itself what to look up"
            self.require(not itself, found_at, "an embedding that is given ids; lora changes such a one, too")
            shape_of(module, path)
        return found

    def in_layers(self) -> dict[str, Any]:
        """What of :meth:`Base.targets` says which layers."""
        return {}

    def check_chance(self, name: str) -> None:
        """Raise an error where the setting `name` is no probability of dropping something."""
        value = getattr(self, name)
        self.require(0 <= value < 1, f"{name}={value}", "a probability below 1")

    def check_seed(self, name: str) -> None:
        """Raise an error where the setting `name` is no seed of torch's generators."""
        value = getattr(self, name)
        self.require(0 <= value < 2**63, f"{name}={value}", "a seed, 0 to 2^63 - 1")

    def check_patterns(self, found: Sequence[tuple[str, nn.Module]], *patterns: Mapping[str, Any]) -> None:
        """Raise an error for a key of `patterns` that matches none of the modules found."""
        for key in (key for each in patterns for key in each):
            known = any(matches(key, path) for path, _ in found)
            self.require(known, f"pattern {key!r} that matches no target", "one that does")

    def to_peft(self, config: dict[str, Any]) -> dict[str, Any]:
        chosen = [config.pop(name) is not None for name in self.chosen_only_here]
        # What PEFT has no setting for, whole paths say.
        return {**config, "target_modules": self._paths} if any(chosen) else config


@dataclass
class TargetedInLayers(Targeted):
    """One that may leave layers out.

    Args:
        layers_to_transform, layers_pattern: only these layers, counted in the lists that layers_pattern names.
    """

    layers_to_transform: list[int] | int | None = field(default=None, kw_only=True)
    layers_pattern: list[str] | str | None = field(default=None, kw_only=True)

    def in_layers(self) -> dict[str, Any]:
        return {"layers": self.layers_to_transform, "layers_pattern": self.layers_pattern}


@dataclass
class TargetedWithBiases(TargetedInLayers):
    """One that may train biases along.

    Args:
        bias: "none", "all", or those of the targets alone, for which each method has a word as in PEFT: "lora_only".
    """

    own_biases: ClassVar[str]  # the word

    bias: str = field(default="none", kw_only=True)

    def check_bias(self) -> None:
        """Raise an error for a word that is none of them."""
        words = ("none", "all", self.own_biases)
        self.require(self.bias in words, f"bias={self.bias!r}", f"'none', 'all' or {self.own_biases!r}")

    def biases(self, base: Base, targets: Sequence[str]) -> Iterator[tuple[str, AdapterLayer]]:
        """Copies of the biases that `bias` names. A module that is copied whole has its bias in the copy."""
        if self.bias == "none":
            return
        copied = self.copied(base)
        for path, module in biased(base, lambda p: copied(p) or (self.bias == self.own_biases and p not in targets)):
            yield path, BiasCopy(module)


def matches(key: str, path: str) -> bool:
    """PEFT's rule for rank_pattern and alpha_pattern: a regular expression for the end of the path."""
    return groups_of(key, path, r"(.*\.)?({})") is not None


def pattern(values: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first key that matches `path`."""
    return next((value for key, value in values.items() if matches(key, path)), default)
