"""Loading a base model and its tokenizer, from wherever they are, with nothing left to chance."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import transformers
from huggingface_hub import constants as hub
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.files.writing import check_kind
from tanzaku.models.embedded import EMBEDDED, Progress, embedded_model, gguf_model, one_line, quiet
from tanzaku.models.settings import ModelSettings, as_block
from tanzaku.support.seeds import seeded

_KINDS = {
    "AutoModelForSequenceClassification": "as a classifier",
    "AutoModelForTokenClassification": "as a classifier of tokens",
}
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "spm.model")
_PARTS = {
    "config": ("config.json",),
    "weights": (*_WEIGHTS, *(f"{file}.index.json" for file in _WEIGHTS)),
    "tokenizer": (*_VOCABULARIES, "sentencepiece.bpe.model", "tokenizer_config.json"),
}


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, on_progress: Progress = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a pad token (its end-of-sequence token where it has none of its own).

    Args:
        name: a model on the Hugging Face Hub, a directory, a ``.gguf`` file, or ``embedded``.
        trust_remote_code: run Python code that the model's repository brings.
        on_progress: called with short messages while a GGUF is converted, which happens once.

    Raises:
        TanzakuError: there is no such model, or it has no usable tokenizer.
    """
    return _tokenizer(name, _locate(name, ("tokenizer",), on_progress), trust_remote_code)


def load_classifier(
    name: str,
    num_labels: int,
    *,
    id2label: dict[int, str] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    trust_remote_code: bool = False,
    on_progress: Progress = None,
) -> PreTrainedModel:
    """A pretrained model with a classification head, on the CPU and in evaluation mode.

    See :func:`load_pair`, which returns the tokenizer too.
    """
    return load_pair(
        name,
        num_labels,
        id2label=id2label,
        dtype=dtype,
        seed=seed,
        trust_remote_code=trust_remote_code,
        on_progress=on_progress,
    )[0]


def load_pair(
    name: str,
    num_labels: int,
    *,
    id2label: dict[int, str] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    trust_remote_code: bool = False,
    on_progress: Progress = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained classifier for single-label tasks and its tokenizer, agreed on the pad token.

    A head that the checkpoint lacks, or has for another number of labels, is drawn from ``seed``, and the
    caller's random state stays as it was. Every weight below the head must come from the checkpoint.

    Args:
        name: a model on the Hugging Face Hub, a directory, a ``.gguf`` file, or ``embedded``.
        num_labels: how many classes, at least 2.
        id2label: the name of each class from 0; the checkpoint's own, or ``LABEL_0`` and so on, by default.
        dtype: of all weights, whatever they are stored as.
        seed: of the new head.
        trust_remote_code: run Python code that the model's repository brings.
        on_progress: called with short messages while a GGUF is converted, which happens once.

    Raises:
        TanzakuError: there is no such model, a part of it is missing or damaged, or the labels do not fit.
    """
    labels = _labels(num_labels, id2label)
    where = _locate(name, tuple(_PARTS), on_progress)
    return _with_head(name, where, AutoModelForSequenceClassification, labels, dtype, seed, trust_remote_code)


class Headed(Protocol):
    """What a task says of its model: see :class:`tanzaku.tasks.task.Task`."""

    auto_class: ClassVar[str]

    def model_settings(self) -> dict[str, Any]:
        """What the model's config is to say of the task."""
        ...

    def check_model(self, config: Any) -> None:
        """A TanzakuError where it is a model for other tasks."""
        ...


def load_for(
    model: str | ModelSettings,
    task: Headed,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    trust_remote_code: bool = False,
    on_progress: Progress = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained model with a task's head, on the CPU and in evaluation mode, and its tokenizer.

    See :func:`load_pair`, which does this for classes alone.

    Args:
        model: a name, or a recipe's block.
        dtype: of all weights, where the block says none.
    """
    said = ModelSettings.model_validate(as_block(model))
    where = _locate(said.name, tuple(_PARTS), on_progress)
    auto = getattr(transformers, task.auto_class)
    kind = dtype if said.dtype == "auto" else getattr(torch, said.dtype)
    settings, check = task.model_settings(), task.check_model
    return _with_head(said.name, where, auto, settings, kind, seed, trust_remote_code, said.attention, check)


def _with_head(
    name: str,
    where: str,
    auto: Any,
    settings: dict[str, Any],
    dtype: torch.dtype,
    seed: int,
    trust_remote_code: bool,
    attention: str = "auto",
    check: Callable[[Any], None] = lambda config: None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config, made = _configured(name, where, auto, settings, trust_remote_code, check)
    tokenizer = _tokenizer(name, where, trust_remote_code)
    kind, auto = _KINDS.get(auto.__name__, f"for {auto.__name__}"), made
    with _loading(f"{name!r} ({config.model_type}) {kind}"), seeded(seed):
        model, info = _pretrained(auto, where, config, dtype, trust_remote_code, attention)
    _check_backbone(name, model.base_model_prefix, info)
    agree_on_padding(name, model, tokenizer)
    return model, tokenizer


def outline_for(
    model: str | ModelSettings, task: Headed, *, on_progress: Progress = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model of :func:`load_for` on the meta device, without weights, and its tokenizer."""
    name = ModelSettings.model_validate(as_block(model)).name
    where = _locate(name, tuple(_PARTS), on_progress)
    auto = getattr(transformers, task.auto_class)
    config, made = _configured(name, where, auto, task.model_settings(), False, task.check_model)
    kind = _KINDS.get(auto.__name__, f"for {auto.__name__}")
    with _loading(f"{name!r} ({config.model_type}) {kind}"), torch.device("meta"):
        outline = made.from_config(config) if hasattr(made, "from_config") else made(config)
    tokenizer = _tokenizer(name, where, trust_remote_code=False)
    agree_on_padding(name, outline, tokenizer)
    return outline, tokenizer


def _configured(
    name: str,
    where: str,
    auto: Any,
    settings: dict[str, Any],
    trust_remote_code: bool,
    check: Callable[[Any], None],
) -> tuple[Any, Any]:
    """A model's config, which is checked, and what makes the model of it."""
    with _loading(f"the config of {name!r}"):
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **settings)
    check(config)
    if auto is AutoModelForTokenClassification and type(config) not in auto._model_mapping:
        auto = _of_tokens(name, config)
    return config, auto


def _of_tokens(name: str, config: Any) -> Any:
    """A class for token classification, for decoders that transformers has a classifier of texts for and none of
    tokens: both are made of the same part in all its decoders."""
    of_texts = AutoModelForSequenceClassification._model_mapping.get(type(config), None)
    bases = getattr(of_texts, "__bases__", ())
    if not bases or bases[0] is not GenericForSequenceClassification:
        raise TanzakuError(
            f"transformers has no token classifier for {name!r} ({config.model_type}); use another model"
        )
    title = of_texts.__name__.replace("ForSequenceClassification", "ForTokenClassification")
    return type(title, (GenericForTokenClassification, *bases[1:]), {"config_class": of_texts.config_class})


def load_base(
    name: str, auto: Any, *, dtype: torch.dtype | str = "auto", on_progress: Progress = None, **settings: Any
) -> tuple[PreTrainedModel, list[str]]:
    """A pretrained model of any class, on the CPU and in evaluation mode, and the weights that its checkpoint lacks.

    Args:
        name: a model on the Hugging Face Hub, a directory, a ``.gguf`` file, or ``embedded``.
        auto: one of transformers' classes that have ``from_pretrained``, ``AutoModelForCausalLM`` say.
        dtype: of all weights; ``"auto"`` keeps what they are stored as.
        settings: of the config, in place of the checkpoint's own, such as ``num_labels``.

    Raises:
        TanzakuError: there is no such model, or a part of it other than a head is missing or damaged.
    """
    where = _locate(name, ("config", "weights"), on_progress)
    with _loading(f"the config of {name!r}"):
        config = AutoConfig.from_pretrained(where, trust_remote_code=False, **settings)
    what = f"{name!r} ({config.model_type}) as {auto.__name__}"
    with _loading(what), torch.random.fork_rng(devices=[]):
        model, info = _pretrained(auto, where, config, dtype, trust_remote_code=False)
    _check_backbone(name, model.base_model_prefix, info)
    fresh = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    return model.eval(), sorted(key for key in fresh if ".pooler." not in f".{key}")


def _pretrained(
    auto: Any, where: Any, config: Any, dtype: torch.dtype | str, trust_remote_code: bool, attention: str = "auto"
) -> tuple[Any, dict[str, Any]]:
    """The model, and what transformers tells of its loading."""
    model, info = auto.from_pretrained(
        where,
        config=config,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **({} if attention == "auto" else {"attn_implementation": attention}),
    )
    return model, info


def read_config(name: str, *, on_progress: Progress = None) -> Any:
    """The config of a model, wherever it is."""
    where = _locate(name, ("config",), on_progress)
    with _loading(f"the config of {name!r}"):
        return AutoConfig.from_pretrained(where, trust_remote_code=False)


def read_tokenizer(name: str, *, on_progress: Progress = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model as it is, without a pad token where it has none."""
    return _vocabulary(name, _locate(name, ("tokenizer",), on_progress), False)


def _labels(num_labels: int, id2label: dict[int, str] | None) -> dict[str, Any]:
    if num_labels < 2:
        raise TanzakuError(f"num_labels is {num_labels}: expected at least 2 classes")
    chosen: dict[str, Any] = {"num_labels": num_labels, "problem_type": "single_label_classification"}
    if id2label is None:
        return chosen
    if sorted(id2label) != list(range(num_labels)):
        raise TanzakuError(
            f"id2label names classes {listed(map(repr, id2label))}: expected 0 to {num_labels - 1}, each once"
        )
    label2id = {label: index for index, label in id2label.items()}
    if len(label2id) < num_labels:
        raise TanzakuError(f"id2label gives two classes one name: {listed(map(repr, id2label.values()))}")
    return {**chosen, "id2label": dict(sorted(id2label.items())), "label2id": label2id}


def _locate(name: str, parts: Iterable[str], on_progress: Progress) -> str:
    """What to hand to transformers for ``name``: a directory that has the ``parts``, or a name on the Hub."""
    if name == EMBEDDED:
        return str(embedded_model(on_progress))
    path = Path(name).expanduser()
    if name.strip() and path.is_dir():
        _check_directory(name, path, parts)
        return str(path)
    if path.is_file():
        return str(gguf_model(path, on_progress))
    if name.endswith(".gguf") or name.startswith((".", "~", "/")) or name.count("/") > 1 or not name.strip():
        raise TanzakuError(f"no model at {name!r}: expected a directory or a .gguf file{_nearest_model(path)}")
    try:
        with quiet():
            AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        offline = "not in the local cache, and HF_HUB_OFFLINE is set, so it is not downloaded"
        reason = offline if hub.HF_HUB_OFFLINE else one_line(error)
        raise TanzakuError(
            f"no model {name!r} on the Hugging Face Hub: {reason}; expected a Hub name, a directory, "
            f"a .gguf file or {EMBEDDED!r}{_nearest_model(path)}"
        ) from error
    except ValueError:
        pass  # it exists; what ails its config is told where the config is loaded
    return name


def _nearest_model(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path()
    beside = [entry.name for entry in folder.iterdir() if entry.is_dir() or entry.suffix == ".gguf"]
    return nearest(path.name, [*beside, EMBEDDED])


def _check_directory(name: str, path: Path, parts: Iterable[str]) -> None:
    held = sorted(entry.name for entry in path.iterdir())
    for file in held:
        if file.endswith((".json", ".safetensors")) and (path / file).is_file():
            check_kind(path / file)
    for part in parts:
        if not set(_PARTS[part]) & set(held):
            if "adapter_config.json" in held:
                fix = "it holds an adapter: name its base model instead"
            elif ggufs := [file for file in held if file.endswith(".gguf")]:
                fix = f"name the file {str(path / ggufs[0])!r} instead"
            else:
                fix = f"save the {part} there with save_pretrained"
            raise TanzakuError(f"{name!r} has no {part}: looked for {listed(_PARTS[part])}; {fix}")


@contextlib.contextmanager
def _loading(what: str) -> Iterator[None]:
    try:
        with quiet():
            yield
    except Exception as error:  # tokenizers and safetensors raise errors of no common kind
        if "trust_remote_code" in str(error):
            raise TanzakuError(
                f"cannot load {what}: it needs Python code from its repository; "
                "pass trust_remote_code=True if you trust that code"
            ) from error
        raise TanzakuError(f"cannot load {what}: {one_line(error)}") from error


def _tokenizer(name: str, where: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    tokenizer = _vocabulary(name, where, trust_remote_code)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise TanzakuError(
                f"the tokenizer of {name!r} has no pad token and no eos token to pad with: "
                "set tokenizer.pad_token and save it again"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _vocabulary(name: str, where: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    with _loading(f"the tokenizer of {name!r}"):
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    # Without a vocabulary file transformers makes up a tokenizer that knows nothing but its special tokens.
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
        raise TanzakuError(
            f"the tokenizer of {name!r} has no vocabulary, only {len(tokenizer)} special tokens: "
            "expected tokenizer.json or another vocabulary file beside its config"
        )
    return tokenizer


def _check_backbone(name: str, prefix: str, info: dict[str, Any]) -> None:
    """What is outside the base model is head, and so is a pooler, which language models are saved without."""
    asked = f"of the weights that its config asks for in checkpoint {name!r}"
    missing = sorted(key for key in info["missing_keys"] if key.startswith(f"{prefix}."))
    if missing := [key for key in missing if ".pooler." not in key]:
        near = nearest(missing[0], info["unexpected_keys"])
        raise TanzakuError(f"{len(missing)} {asked} are missing: {listed(missing, 3)}{near}")
    wrong = sorted(entry for entry in info["mismatched_keys"] if entry[0].startswith(f"{prefix}."))
    if wrong:
        key, found, expected = wrong[0]
        first = f"{key} is {tuple(found)}, expected {tuple(expected)}"
        raise TanzakuError(f"{len(wrong)} {asked} have another shape: {first}; use the config it was saved with")


def reads_text(model: PreTrainedModel) -> bool:
    """Whether a model is given token ids."""
    return bool(model.main_input_name == "input_ids")


def agree_on_padding(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell a model the tokenizer's pad token; an error where the model does not know it."""
    pad = tokenizer.pad_token_id
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    if vocabulary is not None and pad >= vocabulary:
        raise TanzakuError(
            f"the pad token {tokenizer.pad_token!r} of {name!r} is number {pad}, past the "
            f"model's {vocabulary} tokens: set tokenizer.pad_token to one the model knows and save it again"
        )
    # A composite model reads its text's config. Both are set after loading: an embedding that is built with a
    # padding index would never learn that row.
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = pad
