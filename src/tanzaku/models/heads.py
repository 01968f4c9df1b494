"""The parts of a model that its checkpoint does not bring: a task's head, and what transformers drew at random.

Without them an adapter could not be used again, since they are drawn anew each time the model is loaded. So an adapter
has its own copy of each, trained along where the method trains heads, and saved in any case.

They are told by two signs. What lies outside of the backbone of a model for classification, detection or the like is
its head. And `from_pretrained` marks what it read from a checkpoint: all that it did not mark was drawn at random, also
inside of the backbone (a pooler, which language models are saved without; cross-attention), and what it marked came
with the checkpoint, so that it stays the base's, but for the classifier itself, which is trained anew as in PEFT. The
heads of language models are none: they are pretrained, and as large as the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from tanzaku.models import tree
from tanzaku.models.quantize import plain

# Classes of transformers whose modules outside of the backbone are made for one task.
_TASK = re.compile(
    r"For\w*(Classification|Segmentation|ObjectDetection|QuestionAnswering|MultipleChoice|NextSentencePrediction"
    r"|XVector|Regression)"
)
# The classifier itself. By the first two names PEFT trains it in these classes, and leaves the rest as it is.
_NAMED = ("score", "classifier", "classification_head", "qa_outputs")
_NAMED_CLASSES = ("ForSequenceClassification", "ForImageClassification")
_LOADED = "_is_hf_initialized"  # transformers' mark on a parameter that it need not draw: it comes from a checkpoint


@dataclass(frozen=True)
class Part:
    """Parameters of one module: `names` below its path, all of them if it is `whole`."""

    path: str
    names: tuple[str, ...]
    whole: bool = True

    @classmethod
    def of(cls, path: str, module: nn.Module) -> Part:
        return cls(path, tuple(name for name, _ in tree.named_parameters(module, remove_duplicate=False)))

    def has(self, path: str) -> bool:
        """Whether the module at `path` lies in this part."""
        return self.whole and (not self.path or path == self.path or path.startswith(f"{self.path}."))

    def tensors(self, module: nn.Module) -> list[str]:
        """Names below its path, with what is saved beside the parameters, such as running statistics."""
        return [name for name, _ in tree.saved(module)] if self.whole else list(self.names)

    @property
    def parameters(self) -> list[str]:
        """Names in the model."""
        return [f"{self.path}.{name}" if self.path else name for name in self.names]


def heads_of(model: nn.Module) -> list[Part]:
    """The parts that an adapter of `model` has its own copy of, each parameter in one of them."""
    named = parameters_of(model)
    found = _task_head(model, named)
    found = {n for n in found if n.partition(".")[0] in _NAMED or not getattr(named[n], _LOADED, False)}
    found |= _drawn(model, named) - _language_head(model, named)
    kept = _end(model, "input")
    names = {name for name in found if id(named[name]) not in kept and plain(named[name])}
    return list(_parts(model, "", names))


def task_head(model: nn.Module) -> list[Part]:
    """All of a task's head, also what came with the checkpoint."""
    named = parameters_of(model)
    return list(_parts(model, "", {name for name in _task_head(model, named) if plain(named[name])}))


def named_heads(model: nn.Module) -> list[Part]:
    """The head of a classifier by the names that PEFT knows, which leaves everything else as it is."""
    if not type(model).__name__.endswith(_NAMED_CLASSES):
        return []
    return [Part.of(name, child) for name, child in _children(model) if name in _NAMED]


def left_random(model: nn.Module, covered: Iterable[str]) -> list[str]:
    """Names of the parameters that were drawn at random, and are in none of the adapter's copies."""
    named = parameters_of(model)
    have = {id(named[name]) for name in covered if name in named} | _end(model, "input")
    left = sorted(name for name in _drawn(model, named) if id(named[name]) not in have)
    output = {name for name in left if id(named[name]) in _end(model, "output")}
    # With more rows it was made anew, and is saved for that.
    return [name for name in left if name not in output] if output and resized(model) else left


def untold(model: nn.Module, covered: Iterable[str]) -> list[str]:
    """Modules that checkpoints often lack, where it cannot be told whether this model's had them.

    A deep copy has lost transformers' marks.
    """
    named = parameters_of(model)
    if not getattr(model, "name_or_path", "") or any(hasattr(p, _LOADED) for p in named.values()):
        return []
    covered = set(covered)
    parts = list(_parts(model, "", _outside(model, named) - _language_head(model, named)))
    paths = [part.path for part in parts if not covered.issuperset(part.parameters)]
    for path, module in tree.named_modules(model):
        own = Part.of(path, module).parameters
        if path.rpartition(".")[2] == "pooler" and own and not covered.issuperset(own):
            paths.append(path)
    return sorted(set(paths))


def resized(model: nn.Module) -> bool:
    """Whether the vocabulary is not that of the configuration that the model was loaded with."""
    config, name = getattr(model, "config", None), getattr(model, "name_or_path", "")
    if config is None or not name:
        return False
    try:
        first = type(config).from_dict(PretrainedConfig.get_config_dict(name, local_files_only=True)[0])
    except (OSError, ValueError):
        return False
    sizes = [getattr(each.get_text_config(), "vocab_size", None) for each in (first, config)]
    return sizes[0] != sizes[1]


def embeddings(model: nn.Module) -> set[int]:
    """Ids of the parameters at the vocabulary's two ends."""
    return _end(model, "input") | _end(model, "output")


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """All names of the base's parameters, tied ones too."""
    return dict(tree.named_parameters(model, remove_duplicate=False))


def _backbones(model: nn.Module) -> list[nn.Module]:
    """What was pretrained: the base model and other pretrained models, by which the rest is outside. None: unknown."""
    base = getattr(model, "base_model", model)
    inner = [child for _, child in _children(model) if isinstance(child, PreTrainedModel)]
    return inner if base is model else [base, *inner]


def _outside(model: nn.Module, named: dict[str, nn.Parameter]) -> set[str]:
    """Parameters outside of the backbone, and tied to nothing in it."""
    backbones = _backbones(model)
    inside = {id(p) for module in backbones for p in tree.parameters(module)} | _end(model, "input")
    return {name for name, p in named.items() if id(p) not in inside} if backbones else set()


def _task_head(model: nn.Module, named: dict[str, nn.Parameter]) -> set[str]:
    return _outside(model, named) if _TASK.search(type(model).__name__) else set()


def _drawn(model: nn.Module, named: dict[str, nn.Parameter]) -> set[str]:
    """Parameters that `from_pretrained` drew itself; none if the model does not come from there."""
    marked = {id(p) for p in named.values() if getattr(p, _LOADED, False)}
    # Offloaded parameters are other objects than those that were loaded, so nothing can be told of them.
    fresh = {n for n, p in named.items() if marked and id(p) not in marked and p.device.type != "meta"}
    # What is computed, such as sinusoids, is in no checkpoint either.
    computed = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    fresh -= {name for name in fresh if any(pattern.search(name) for pattern in computed)}
    # New parameters in most of the backbone are somebody's other modules (quantised ones, say), or another checkpoint:
    # no part of a task.
    within = {id(p): p.numel() for module in _backbones(model) for p in tree.parameters(module)} if fresh else {}
    new = {id(named[name]) for name in fresh} & within.keys()
    if 2 * sum(within[key] for key in new) > sum(within.values()):
        fresh -= {name for name in fresh if id(named[name]) in new}
    return fresh


def _language_head(model: nn.Module, named: dict[str, nn.Parameter]) -> set[str]:
    """A language model's head: its output embedding, with all that lies outside of the backbone beside it."""
    own = _end(model, "output")
    return _outside(model, named) | {name for name, p in named.items() if id(p) in own} if own else set()


def _end(model: nn.Module, end: str) -> set[int]:
    """Ids of the parameters of the input or the output embedding."""
    get: Callable[[], Any] = getattr(model, f"get_{end}_embeddings", lambda: None)
    try:
        found = get()
    except (NotImplementedError, AttributeError):  # a model that reads or writes no token ids
        return set()
    if isinstance(found, nn.Parameter):
        return {id(found)}
    return {id(p) for p in tree.parameters(found)} if isinstance(found, nn.Module) else set()


def _parts(module: nn.Module, path: str, names: set[str]) -> Iterator[Part]:
    """The largest modules that consist of `names` (of the model's parameters), and what is left of others."""
    part = Part.of(path, module)
    below = dict(zip(part.names, part.parameters, strict=True))
    found = tuple(name for name, full in below.items() if full in names)
    if not found:
        return
    if path and len(found) == len(below) and _runs(module):
        yield Part(path, found)
        return
    held = tuple(name for name in found if _holder(module, name) == "")
    if held:
        yield Part(path, held, whole=False)
    for name, child in _children(module):
        inner = f"{path}.{name}" if path else name
        yield from _parts(child, inner, names - {below[n] for n in held})


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, child), also where two names are of one, without adapters."""
    for name, child in module._modules.items():
        if child is not None and not isinstance(child, tree.Adapters):
            yield name, child


def _runs(module: nn.Module) -> bool:
    """Whether the module has a forward pass of its own; lists and dictionaries have none."""
    return type(module).forward is not nn.Module.forward


def _holder(module: nn.Module, name: str) -> str:
    """Path below `module` of the module that runs and reads the parameter: a list's are read by what holds the list."""
    path = name.rpartition(".")[0]
    while path and not _runs(module.get_submodule(path)):
        path = path.rpartition(".")[0]
    return path
