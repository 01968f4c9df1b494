"""Names only: where attention, feed-forward, head and embeddings are in each model family."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.patterns import groups_of

Targets = list[str] | str | None


@dataclass(frozen=True)
class Family:
    """The table of names of one family. `fused` heads a projection that holds query, key and value side by side."""

    lora: tuple[str, ...]
    adalora: tuple[str, ...] = ()
    ia3: tuple[str, ...] = ()
    ia3_feedforward: tuple[str, ...] = ()
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    key_norm: str | None = None
    fused: str | None = None
    # How a backbone numbers positions when it is given none: by column, by attention mask, by token ids, by a
    # position embedding that is told the cache's length, or not at all (relative, or no text).
    positions: Literal["column", "mask", "ids", "embedding", "none"] = "column"
    # Modules of a layer, in order, behind which only the pooled token matters in the last layer: each adds its result
    # to a residual. None where a layer is built in another way.
    trim: tuple[str, ...] | None = None


def table() -> dict[str, Family]:
    """`model_type` of a transformers configuration -> its family."""
    from tanzaku.families import decoders, encoders, seq2seq, vision

    return {**decoders.FAMILIES, **encoders.FAMILIES, **seq2seq.FAMILIES, **vision.FAMILIES}


@dataclass
class Base:
    """What a method may ask of the frozen model it is built on."""

    model: nn.Module
    family: Family | None

    @classmethod
    def of(cls, model: nn.Module) -> Base:
        config = getattr(model, "config", None)
        families = table()
        kinds = [getattr(c, "model_type", None) for c in (config, _text(config)) if c is not None]
        return cls(model, next((families[kind] for kind in kinds if kind in families), None))

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
        decoder = getattr(module, "decoder", None)
        # OPT's language model calls the decoder inside its backbone directly.
        if not self.encoder_decoder and isinstance(decoder, PreTrainedModel):
            module = decoder
        return cast(nn.Module, module)

    @property
    def encoder_decoder(self) -> bool:
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))

    @property
    def hidden_size(self) -> int:
        return int(self._number("hidden_size", "n_embd", "d_model"))

    @property
    def max_positions(self) -> int | None:
        for key in ("max_position_embeddings", "n_positions"):
            if isinstance(value := getattr(self.config, key, None), int):
                return value
        return None

    @property
    def embedding(self) -> nn.Module:
        """The module that turns token ids into vectors."""
        module = self.model.get_input_embeddings()  # type: ignore[operator]
        if not isinstance(module, nn.Embedding):
            raise TanzakuError(f"model type {self.kind!r} reads no token ids, so virtual tokens have no place in it")
        return module

    @property
    def vocab_size(self) -> int:
        return cast(nn.Embedding, self.embedding).num_embeddings

    def _number(self, *keys: str) -> int:
        for key in keys:
            if isinstance(value := getattr(self.config, key, None), int):
                return value
        raise TanzakuError(f"model type {self.kind!r}: its configuration has none of {', '.join(keys)}")

    def defaults(self, method: str) -> list[str]:
        """Default targets of `method` in this family, or an error that lists what could be targeted."""
        family = self.family
        names = getattr(family, method) if family else ()
        if not names:
            raise TanzakuError(
                f"no default target_modules for {method} on model type {self.kind!r}: set target_modules; "
                f"candidates are {listed(self.candidates())}"
            )
        return list(names)

    def candidates(self) -> list[str]:
        """Last names of the modules with weight matrices, each once."""
        kinds = (nn.Linear, Conv1D, nn.Embedding, nn.Conv2d)
        return list(dict.fromkeys(n.rsplit(".", 1)[-1] for n, m in self.model.named_modules() if isinstance(m, kinds)))

    def targets(
        self,
        names: Targets,
        *,
        exclude: Targets = None,
        layers: list[int] | int | None = None,
        layers_pattern: list[str] | str | None = None,
        skip: Iterable[str] = (),
    ) -> list[tuple[str, nn.Module]]:
        """Modules matched as HF PEFT matches them: a regular expression for the whole path, or a list of last names.

        Every name of a list must match something; `all-linear` is every linear layer but the heads.
        """
        modules = [(path, m) for path, m in self.model.named_modules() if path]
        skipped = tuple(skip)
        if isinstance(names, str) and names.lower() == "all-linear":
            names = self._linear(skipped)
        wanted = [names] if isinstance(names, str) else list(names or [])
        matches = _regex if isinstance(names, str) else _suffix
        out_of = _regex if isinstance(exclude, str) else _suffix
        excluded = [exclude] if isinstance(exclude, str) else list(exclude or [])
        found = [
            (path, module)
            for path, module in modules
            if any(matches(w, path) for w in wanted)
            and not any(out_of(w, path) for w in excluded)
            and not any(_inside(path, s) for s in skipped)
        ]
        for name in wanted:
            if not any(matches(name, path) for path, _ in modules):
                raise TanzakuError(
                    f"target_modules: {name!r} matches no module of {type(self.model).__name__}"
                    f"{nearest(name, self.candidates())}; candidates are {listed(self.candidates())}"
                )
        if layers is not None:
            found = self._only_layers(found, [layers] if isinstance(layers, int) else list(layers), layers_pattern)
        if not found:
            raise TanzakuError(f"target_modules {names!r} are all excluded; candidates are {listed(self.candidates())}")
        return found

    def _linear(self, skipped: tuple[str, ...]) -> list[str]:
        get = getattr(self.model, "get_output_embeddings", lambda: None)
        heads = {id(get())}
        heads |= {id(m) for path, m in self.model.named_modules() if any(_inside(path, h) for h in self.head_names())}
        return [
            path
            for path, m in self.model.named_modules()
            if isinstance(m, nn.Linear | Conv1D) and id(m) not in heads and not any(_inside(path, s) for s in skipped)
        ]

    def _only_layers(
        self, found: list[tuple[str, nn.Module]], layers: list[int], pattern: list[str] | str | None
    ) -> list[tuple[str, nn.Module]]:
        patterns = [pattern] if isinstance(pattern, str) else list(pattern or [])

        def number(path: str) -> int | None:
            # PEFT's own rule: the number after the named list of layers, or else after any part of the path.
            for p in patterns or ["[^.]*"]:
                if groups := groups_of(p, path, r"(?:|.*\.){}\.(\d+)\..*"):
                    return int(groups[-1] or 0)
            return None

        numbers = sorted({n for path, _ in found if (n := number(path)) is not None})
        for layer in layers:
            if layer not in numbers:
                raise TanzakuError(f"layers_to_transform: no layer {layer}; the targets lie in layers {numbers}")
        return [(path, m) for path, m in found if number(path) in layers]

    def attention(self, *, causal_only: bool = False) -> list[tuple[str, nn.Module]]:
        """Self-attention modules in layer order; in an encoder-decoder the decoder's, as in prefix tuning."""
        name = self.family.attention if self.family else "self_attn"
        found = [(p, m) for p, m in self.model.named_modules() if p.endswith("." + name)]
        if self.encoder_decoder:
            found = [(p, m) for p, m in found if ".decoder." in f".{p}."]
        if not found:
            raise TanzakuError(
                f"model type {self.kind!r}: no attention module named {name!r}; adapters at attention need a model "
                "whose attention goes through transformers' attention interface"
            )
        return found

    def head_names(self) -> list[str]:
        """Names of the freshly initialised classifier, which PEFT trains along: `score` or `classifier`."""
        if not type(self.model).__name__.endswith(("ForSequenceClassification", "ForImageClassification")):
            return []
        known = ("score", "classifier", "classification_head")
        return [name for name, _ in self.model.named_children() if name in known]


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a module that has one."""
    return cast(Tensor, module.weight)


def features(module: nn.Module, path: str = "") -> tuple[int, int]:
    """(in, out) of a module with a weight matrix, quantised or not."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(cast(int, module.in_features)), int(cast(int, module.out_features))
    raise TanzakuError(
        f"{path or type(module).__name__} is a {type(module).__name__}: expected a linear layer, Conv1D, an embedding "
        "or a Conv2d"
    )


def _text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _regex(pattern: str, path: str) -> bool:
    return groups_of(pattern, path) is not None


def _suffix(name: str, path: str) -> bool:
    return path == name or path.endswith("." + name)


def _inside(path: str, name: str) -> bool:
    return f".{name}." in f".{path}."
