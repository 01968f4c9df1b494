"""Where attention, feed-forward, head and embeddings are in a model: by its family's names, or else by structure."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.files.patterns import groups_of
from tanzaku.models import tree
from tanzaku.models.families.family import ROLES, Family
from tanzaku.models.families.structure import Structure, block_of, names_for, structure_of
from tanzaku.models.families.sublayers import Sublayer
from tanzaku.models.families.trace import Attention, sizes_of, trace_of
from tanzaku.models.heads import heads_of

__all__ = ["Attention", "Base", "Family", "Sublayer", "Targets", "features", "table", "weight_of"]

Targets = list[str] | str | None


_structures: WeakKeyDictionary[nn.Module, Structure] = WeakKeyDictionary()
_sublayers: WeakKeyDictionary[nn.Module, list[Sublayer]] = WeakKeyDictionary()


def table() -> dict[str, Family]:
    """`model_type` of a transformers configuration -> its family."""
    from tanzaku.models.families import decoders, encoders, seq2seq, vision

    return {**decoders.FAMILIES, **encoders.FAMILIES, **seq2seq.FAMILIES, **vision.FAMILIES}


@dataclass
class Base:
    """What a method may ask of the frozen model it is built on."""

    model: nn.Module
    family: Family | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Base:
        # A copy of a part of the model does not take the whole with it.
        return Base(memo.get(id(self.model), cast(Any, None)), self.family)

    @classmethod
    def of(cls, model: nn.Module) -> Base:
        families = table()
        return cls(model, next((families[kind] for kind in _kinds(model) if kind in families), None))

    @property
    def offloaded(self) -> bool:
        """Whether weights are kept elsewhere than where they are used, by accelerate."""
        return any(getattr(hook, "offload", False) for hook in _hooks(self.model))

    @property
    def whole(self) -> bool:
        """Whether the model is there: a copy of a part of it has the part's adapters, and not the rest."""
        return cast(Any, self.model) is not None

    def check_whole(self) -> None:
        """Raise a clear error where the model is not there."""
        if not self.whole:
            raise TanzakuError(
                "this is a copy of a part of a model, and an adapter that is active in it needs the whole: copy the "
                "whole model, or activate(model, None) first"
            )

    @property
    def config(self) -> Any:
        """The text configuration where the model has several."""
        return _text(getattr(self.model, "config", None))

    @property
    def kind(self) -> str:
        return getattr(getattr(self.model, "config", None), "model_type", type(self.model).__name__)

    @property
    def backbone(self) -> nn.Module:
        """The model without its head: what turns token ids into hidden states."""
        module = getattr(self.model, "base_model", self.model)
        if module is self.model and getattr(self.model, "lm_head", None) is not None:
            # Llama 4's language model has its backbone under another name than it says.
            module = next((m for m in self.model.children() if isinstance(m, PreTrainedModel)), module)
        decoder = getattr(module, "decoder", None)
        # OPT's language model calls the decoder inside its backbone directly.
        if not self.encoder_decoder and isinstance(decoder, PreTrainedModel):
            module = decoder
        return cast(nn.Module, module)

    @property
    def entrance(self) -> nn.Module:
        """Where a pass enters the layers that adapters at attention change."""
        return cast(nn.Module, cast(Any, self.model).get_decoder() if self.encoder_decoder else self.backbone)

    @property
    def encoder(self) -> nn.Module:
        """An encoder-decoder's encoder."""
        return cast(nn.Module, cast(Any, self.model).get_encoder())

    def device(self, path: str) -> torch.device | None:
        """Where the module at a path computes: weights that are kept elsewhere (offloaded) are brought there."""
        module = self.model.get_submodule(path) if path else self.model
        found = next((p.device for p in tree.parameters(module)), None)
        if found is None or found.type == "meta":
            places = [d for h in _hooks(module) if (d := getattr(h, "execution_device", None)) is not None]
            return torch.device(places[0]) if places else found
        return found

    @property
    def encoder_decoder(self) -> bool:
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))

    @property
    def hidden_size(self) -> int:
        return int(self._number("hidden_size", "n_embd", "d_model"))

    @property
    def tells_dropout(self) -> bool:
        """Whether all that drops out in it is known to stand in its settings."""
        return self.family is not None and self.family.trim is not None

    @property
    def max_positions(self) -> int | None:
        for key in ("max_position_embeddings", "n_positions"):
            if isinstance(value := getattr(self.config, key, None), int) and value > 0:
                return value
        return None

    @property
    def embedding(self) -> nn.Embedding:
        """The module that turns token ids into vectors."""
        try:
            module = self.model.get_input_embeddings()  # type: ignore[operator]
        except (NotImplementedError, AttributeError):
            module = None
        if not isinstance(module, nn.Embedding):
            raise TanzakuError(f"model type {self.kind!r} reads no token ids, so virtual tokens have no place in it")
        return module

    @property
    def embedding_size(self) -> int:
        """Numbers of an embedded token, which may be fewer than a layer's."""
        return self.embedding.embedding_dim

    @property
    def vocab_size(self) -> int:
        return self.embedding.num_embeddings

    @property
    def by_columns(self) -> str | None:
        """A module that sums up so many columns at a time, wherever they have their positions; None: there is none."""
        return next(
            (
                path
                for path, m in tree.named_modules(self.model)
                if hasattr(m, "compress_rate") or hasattr(m, "compress_ratio")
            ),
            None,
        )

    def setting(self, *keys: str) -> int | None:
        """The first of these settings that the configuration has as one number for all layers."""
        for key in keys:
            with contextlib.suppress(RuntimeError):  # transformers' word for one that differs by layer
                if isinstance(value := getattr(self.config, key, None), int):
                    return value
        return None

    def _number(self, *keys: str) -> int:
        if (value := self.setting(*keys)) is not None:
            return value
        raise TanzakuError(f"model type {self.kind!r}: its configuration has none of {', '.join(keys)}")

    @property
    def structure(self) -> Structure:
        """Roles and attention of the model as it is. It is looked at once."""
        if self.model not in _structures:
            _structures[self.model] = structure_of(self.model, trace_of(self.model))
        return _structures[self.model]

    def defaults(
        self,
        method: str,
        roles: tuple[str, ...],
        by_kind: Mapping[str, tuple[str, ...]] | None = None,
        *,
        fits: Callable[[nn.Module], bool] = lambda _: True,
        instead: str = "",
    ) -> list[str] | str:
        """Default targets of `method`, whose roles are `roles`: the family's names, or what the structure gives.

        Args:
            by_kind: the roles, or ends of paths, that it has in models of these types.
            fits: whether the method can be at a module of the model. instead: what to do where nothing is found, for a
                method that takes no target_modules.

        Raises:
            TanzakuError: the model has no such layer; it lists what could be targeted.
        """
        family = self.family or Family()
        known = next((by_kind[kind] for kind in _kinds(self.model) if by_kind and kind in by_kind), None)
        wanted = known or roles
        if family.named and not self._language:
            return family.names(wanted)
        modules = {path: module for path, module in tree.named_modules(self.model) if path}
        if family.named:
            # Towers for images and sound bring their own rows, and are left alone unless a user names them.
            names = family.names(wanted)
            paths = [p for p in modules if p.startswith(self._language) and any(_suffix(n, p) for n in names)]
            return names_for(paths, list(modules))
        paths = [path for role in wanted for path in self._in_role(role, modules)]
        # Without attention, or anything in its place, what is left of a model is its feed-forward.
        paths = paths or [path for role in ("gate", "up", "down") for path in self._in_role(role, modules)]
        unfit = [path for path in paths if not fits(modules[path])]
        paths = [path for path in dict.fromkeys(paths) if path not in unfit]
        if not paths:
            there = [modules[path] for path in unfit] or [
                module
                for path, module in modules.items()
                if block_of(path) and any(p is not None and p.dim() > 1 for p in module._parameters.values())
            ]
            kinds = listed(dict.fromkeys(type(module).__name__ for module in there)) or "none with weights"
            what = "layers" if instead else "default target_modules"
            fix = instead or f"set target_modules; candidates are {listed(self.candidates())}"
            raise TanzakuError(
                f"no {what} for {method} on model type {self.kind!r}: its layers are {kinds}, of which {method} knows "
                f"no role that it could change; {fix}"
            )
        targets = names_for(paths, list(modules))
        if known is None:
            how = "a pass over made-up inputs" if self.structure.ran else "names and shapes"
            text = f"{method}: the table of families names no layers of {self.kind!r}; {how} gave"
            warnings.warn(f"{text} target_modules={targets!r}", stacklevel=5)
        return targets

    def norms(self, skip: Callable[[str], bool]) -> list[str] | str:
        """Targets that are every norm with a gain, in the language model where there are towers.

        Args:
            skip: whether a path is none of them.

        Raises:
            TanzakuError: the model has none.
        """
        paths = [path for path in self.norm_paths if self.in_language_model(path) and not skip(path)]
        if not paths:
            raise TanzakuError(f"{type(self.model).__name__} has no normalisation layer with a gain; expected some")
        return names_for(paths, [path for path, _ in tree.named_modules(self.model)])

    @property
    def norm_paths(self) -> list[str]:
        """Paths of normalisation layers that have a gain: one number a feature, and no matrix."""
        return [path for path, m in tree.named_modules(self.model) if "norm" in type(m).__name__.lower() and _gain(m)]

    def _in_role(self, role: str, modules: Iterable[str]) -> list[str]:
        if role in ROLES:
            return self.structure.roles.get(role, [])
        return [path for path in modules if _suffix(role, path)]

    def feed_forward(self, targets: Targets) -> list[str] | str:
        """Those of `targets` that are the feed-forward's last layers."""
        family = self.family or Family()
        if family.named and not isinstance(targets, str):
            return [name for name in targets or [] if name == family.down]
        modules = [path for path, _ in tree.named_modules(self.model) if path]
        last = [p for p in modules if _suffix(family.down, p)] if family.down else self._in_role("down", modules)
        found = {path for path, _ in self.targets(targets)}
        inside = [path for path in last if path in found]
        return names_for(inside, modules) if inside else []

    @cached_property
    def _language(self) -> str:
        """The path, with a dot, of the language model that reads the towers' output as vectors; "" where there is
        none, or the language model is all."""
        config, text = getattr(self.model, "config", None), self.config
        names = inspect.signature(self.model.forward).parameters
        if text is config or self.encoder_decoder or "inputs_embeds" not in names:
            return ""
        for path, module in tree.named_modules(self.model):
            if path and getattr(module, "config", None) is text and isinstance(module, PreTrainedModel):
                return f"{path}."
        return ""

    def in_language_model(self, path: str) -> bool:
        """Whether a path lies where default targets do: not in a tower that brings its own rows."""
        return path.startswith(self._language)

    def candidates(self) -> list[str]:
        """Last names of the modules with weight matrices, each once."""
        kinds = (nn.Linear, Conv1D, nn.Embedding, nn.Conv2d)
        return list(
            dict.fromkeys(n.rsplit(".", 1)[-1] for n, m in tree.named_modules(self.model) if isinstance(m, kinds))
        )

    def targets(
        self,
        names: Targets,
        *,
        exclude: Targets = None,
        layers: list[int] | int | None = None,
        layers_pattern: list[str] | str | None = None,
        skip: Callable[[str], bool] = lambda path: False,
    ) -> list[tuple[str, nn.Module]]:
        """Modules matched as HF PEFT matches them: a regular expression for the whole path, or a list of last names.

        Every name of a list must match something; `all-linear` is every linear layer but the heads.

        Args:
            skip: whether a path is none of them.
        """
        modules = [(path, m) for path, m in tree.named_modules(self.model) if path]
        if isinstance(names, str) and names.lower() == "all-linear":
            names = self._linear(skip)
            if not names:
                raise TanzakuError(
                    f"target_modules: 'all-linear' matches nothing: {type(self.model).__name__} has no linear layer "
                    f"outside of its head; candidates are {listed(self.candidates())}"
                )
        wanted = [names] if isinstance(names, str) else list(names or [])
        matches = _regex if isinstance(names, str) else _suffix
        out_of = _regex if isinstance(exclude, str) else _suffix
        excluded = [exclude] if isinstance(exclude, str) else list(exclude or [])
        found = [
            (path, module)
            for path, module in modules
            if any(matches(w, path) for w in wanted) and not any(out_of(w, path) for w in excluded) and not skip(path)
        ]
        for name in wanted:
            if not any(matches(name, path) for path, _ in modules):
                there = self.candidates()
                # PEFT's rule: a text is a pattern, and only a list has last names.
                pattern = f": a text is a pattern for a whole path, so write [{name}]" if name in there else None
                raise TanzakuError(
                    f"target_modules: {name!r} matches no module of {type(self.model).__name__}"
                    f"{pattern or nearest(name, there)}; candidates are {listed(there)}"
                )
        if layers is not None:
            found = self._only_layers(found, [layers] if isinstance(layers, int) else list(layers), layers_pattern)
        if not found:
            what = f"target_modules {names!r} are all excluded" if names else "target_modules is empty"
            raise TanzakuError(f"{what}; candidates are {listed(self.candidates())}")
        return found

    def _linear(self, skip: Callable[[str], bool]) -> list[str]:
        get = getattr(self.model, "get_output_embeddings", lambda: None)
        head = get()
        return [
            path
            for path, m in tree.named_modules(self.model)
            if isinstance(m, nn.Linear | Conv1D) and m is not head and not skip(path)
        ]

    def _only_layers(
        self, found: list[tuple[str, nn.Module]], layers: list[int], pattern: list[str] | str | None
    ) -> list[tuple[str, nn.Module]]:
        patterns = [pattern] if isinstance(pattern, str) else list(pattern or [])

        def number(path: str) -> int | None:
            # After the named list of layers, or else after the first list in the path: experts lie in layers.
            for p in patterns or ["[^.]*"]:
                if groups := groups_of(p, path, r"(?:|.*?\.){}\.(\d+)\..*"):
                    return int(groups[-1] or 0)
            return None

        numbers = sorted({n for path, _ in found if (n := number(path)) is not None})
        for layer in layers:
            if layer not in numbers:
                raise TanzakuError(f"layers_to_transform: no layer {layer}; the targets lie in layers {numbers}")
        return [(path, m) for path, m in found if number(path) in layers]

    def attention(self) -> list[tuple[str, nn.Module]]:
        """Self-attention modules in order of execution; in an encoder-decoder the decoder's, as in prefix tuning."""
        return [(layer.path, self.model.get_submodule(layer.path)) for layer in self.attention_layers()]

    def attention_layers(self) -> list[Attention]:
        """:meth:`attention` with the shapes of keys and values.

        Raises:
            TanzakuError: no attention goes through transformers' interface; it says what is there instead.
        """
        found = self.structure.attention if self.structure.ran else self._named_attention()
        # Towers that stand side by side keep their places, whichever is run first.
        towers = [name for name, _ in self.model.named_children()]
        found = sorted(found, key=lambda layer: towers.index(layer.path.partition(".")[0]))
        if self.encoder_decoder:
            found = [layer for layer in found if ".decoder." in f".{layer.path}." and not layer.cross]
        if found:
            return found
        if inline := self.structure.inline:
            raise TanzakuError(
                f"model type {self.kind!r} computes attention in {type(self.model.get_submodule(inline[0])).__name__} "
                f"itself ({inline[0]}); adapters at attention need transformers' attention interface"
            )
        raise TanzakuError(
            f"model type {self.kind!r} has no attention layer; adapters at attention need one that goes through "
            "transformers' attention interface"
        )

    def sublayers(self) -> list[Sublayer]:
        """Attention and feed-forward in order of execution, with the residual stream around them; in a model with
        towers those of its language model.

        Raises:
            TanzakuError: no pass of the model could be made, or none was seen in it.
        """
        if self.model not in _sublayers:
            _sublayers[self.model] = structure_of(self.model, trace_of(self.model, modules=True)).sublayers
        found = [each for each in _sublayers[self.model] if self.in_language_model(each.out)]
        numbers = {number: at for at, number in enumerate(dict.fromkeys(each.number for each in found))}
        found = [replace(each, number=numbers[each.number]) for each in found]
        if not found:
            why = (
                "has no attention or feed-forward layer" if self.structure.ran else "could not be run on made-up inputs"
            )
            raise TanzakuError(f"model type {self.kind!r} {why}, so its residual stream is not known")
        return found

    def layer_paths(self) -> list[tuple[str, str]]:
        """Of each layer, in order of execution: its path, and that of a linear layer inside that returns its width."""
        found = {each.number: (block_of(each.out), each.out) for each in self.sublayers()}
        return [found[number] for number in sorted(found)]

    def _named_attention(self) -> list[Attention]:
        """Attention by its family's name, with the shapes that the configuration tells."""
        name = (self.family.attention if self.family else None) or "self_attn"
        heads = self._number("num_attention_heads", "n_head", "num_heads", "decoder_attention_heads")
        kv_heads = self.setting("num_key_value_heads") or heads
        dim = self.setting("head_dim", "d_kv") or self.hidden_size // heads
        return [
            Attention(path, heads=heads, kv_heads=kv_heads, key_dim=dim, value_dim=dim)
            for path, _ in tree.named_modules(self.model)
            if path.startswith(self._language) and path.endswith(f".{name}")
        ]

    def head_names(self) -> list[str]:
        """Paths of the task's own modules, such as a classifier's head, and of what the checkpoint lacks."""
        return [part.path for part in heads_of(self.model)]


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks, one or several in a row at each module."""
    found = [getattr(m, "_hf_hook", None) for m in tree.modules(module)]
    return [each for hook in found if hook is not None for each in getattr(hook, "hooks", [hook])]


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a module that has one."""
    return cast(Tensor, module.weight)


def features(module: nn.Module, path: str = "") -> tuple[int, int]:
    """(in, out) of a module with a weight matrix, quantised or not."""
    sizes = None if isinstance(module, nn.Conv1d) else sizes_of(module)
    if sizes is not None:
        return sizes
    raise TanzakuError(
        f"{path or type(module).__name__} is a {type(module).__name__}: expected a linear layer, Conv1D, an embedding "
        "or a Conv2d"
    )


def _gain(module: nn.Module) -> bool:
    own = {name: p for name, p in module._parameters.items() if p is not None}
    return "weight" in own and own.keys() <= {"weight", "bias"} and all(p.dim() == 1 for p in own.values())


def _kinds(model: nn.Module) -> list[str]:
    """Types of the model, and of its language model where it has several parts."""
    config = getattr(model, "config", None)
    kinds = (getattr(each, "model_type", None) for each in (config, _text(config)) if each is not None)
    return [kind for kind in kinds if kind]


def _text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _regex(pattern: str, path: str) -> bool:
    return groups_of(pattern, path) is not None


def _suffix(name: str, path: str) -> bool:
    return path == name or path.endswith("." + name)
