"""HF PEFT's configurations. Each is the method's own settings under PEFT's name, so it can be attached as it is."""

from __future__ import annotations

import copy
import dataclasses
import enum
import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor

from tanzaku.compat.peft.errors import WrongType
from tanzaku.compat.peft.hub import folder_of
from tanzaku.compat.peft.isinstances import seen_as
from tanzaku.core.method import Attached, Method
from tanzaku.errors import TanzakuError, nearest
from tanzaku.methods import CPT, IA3, AdaLoRA, LlamaAdapter, LoRA, PrefixTuning, PromptTuning, PTuning, XLora
from tanzaku.methods.lora_starts import PISSA
from tanzaku.models.families import Base
from tanzaku.storage.store import CONFIG

__version__ = "0.21.2"  # of HF PEFT, whose names and files these are


class TaskType(enum.StrEnum):
    """What the base model does; it chooses the class of the wrapped model, and whether a head is trained along."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(enum.StrEnum):
    """The methods by the names that PEFT's files have for them."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    IA3 = "IA3"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    BEFT = "BEFT"
    BOFT = "BOFT"
    C3A = "C3A"
    CARTRIDGE = "CARTRIDGE"
    CPT = "CPT"
    DEFT = "DEFT"
    DELORA = "DELORA"
    FOURIERFT = "FOURIERFT"
    GLORA = "GLORA"
    GRALORA = "GRALORA"
    HIRA = "HIRA"
    HRA = "HRA"
    LN_TUNING = "LN_TUNING"
    LOHA = "LOHA"
    LOKR = "LOKR"
    MISS = "MISS"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    OFT = "OFT"
    PEANUT = "PEANUT"
    POLY = "POLY"
    PSOFT = "PSOFT"
    PVERA = "PVERA"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    SHIRA = "SHIRA"
    SUPERTUNING = "SUPERTUNING"
    TINYLORA = "TINYLORA"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    UNILORA = "UNILORA"
    VBLORA = "VBLORA"
    VERA = "VERA"
    WAVEFT = "WAVEFT"
    XLORA = "XLORA"


class PromptTuningInit(enum.StrEnum):
    """What a prompt starts from."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class PromptEncoderReparameterizationType(enum.StrEnum):
    """The network that writes the virtual tokens of P-tuning."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class LoraRuntimeConfig:
    """What LoRA asks of a machine and not of a model. It has no effect: nothing is moved while weights are made."""

    ephemeral_gpu_offload: bool = False


@dataclass
class EvaConfig:
    """What :class:`tanzaku.LoRA` has as `eva_config`."""

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True


@dataclass
class CordaConfig:
    """What :class:`tanzaku.LoRA` has as `corda_config`.

    Raises:
        TanzakuError: a file, which would be a pickle, or covariances in half precision.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        for key in ("cache_file", "covariance_file", "use_float16_for_covariance"):
            if value := getattr(self, key):
                raise TanzakuError(f"CordaConfig: found {key}={value!r}, which is not supported; leave it out")


@dataclass
class LoraGAConfig:
    """What :class:`tanzaku.LoRA` has as `lora_ga_config`."""

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int = 16


# Settings that PEFT has and that change something only when they are on, with PEFT's defaults.
_LORA_ELSEWHERE: dict[str, Any] = {
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "trainable_token_indices": None,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "use_dora": False,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "qalora_group_size": 16,
    "monteclora_config": None,
    "layer_replication": None,
    "runtime_config": None,
    "lora_bias": False,
    "target_parameters": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "ensure_weight_tying": False,
}
# Of these PEFT's own default is something, and it has an effect only beside another that is an error here.
_INERT = ("megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config", "corda_config")
_NOTHING: tuple[Any, ...] = (None, False, {}, [], (), "")
_FIRST = (
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
)
_PROMPT = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
_LORA = (
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
    "use_rslora",
    "modules_to_save",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    *_LORA_ELSEWHERE,
)
_ADALORA = ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
_NAMES = ("target_modules", "exclude_modules", "feedforward_modules")  # whose lists are sets in PEFT


@dataclass(init=False)
class PeftConfig(Method):
    """What all configurations share. Settings are PEFT's, by keyword or in PEFT's order.

    Raises:
        TanzakuError: a keyword that is not there, a value of a wrong type, or a setting of PEFT's that is not here.
    """

    method: ClassVar[type[Method] | None] = None
    order: ClassVar[tuple[str, ...]] = ()  # of positional settings, after those that all share
    needed: ClassVar[tuple[str, ...]] = ()  # PEFT has no default that works for these
    elsewhere: ClassVar[Mapping[str, Any]] = {}
    trains_head = False  # as in PEFT, `modules_to_save` alone says; the class of the wrapped model adds the head to it
    _as_peft = True

    base_model_name_or_path: str | None = None
    revision: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return seen_as(type(self), None, "peft")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (type(self),), self.__dict__

    def __new__(cls, *values: Any, **settings: Any) -> PeftConfig:
        made_from = cls.__dict__.get("made_from")
        if made_from is not None:  # `dataclasses.replace` asks an object for its class
            return cast(PeftConfig, made_from(*values, **settings))
        if cls.method is None:
            kinds = ", ".join(sorted(kind.__name__ for kind in CONFIGS.values()))
            raise TanzakuError(f"{cls.__name__} is no method's own; expected one of {kinds}")
        return super().__new__(cls)

    def __init_subclass__(cls) -> None:
        names = (*_FIRST, *cls.order)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        cls.__signature__ = inspect.Signature([inspect.Parameter(n, kind, default=None) for n in names])  # type: ignore[attr-defined]

    def __init__(self, *values: Any, **settings: Any):
        assert self.method is not None
        name = type(self).__name__
        for key, value in zip((*_FIRST, *self.order), values, strict=False):
            if key in settings:
                raise TanzakuError(f"{name}: {key} is given twice, by position and by keyword")
            settings[key] = value
        if len(values) > len(_FIRST) + len(self.order):
            raise TanzakuError(f"{name}: found {len(values)} positional settings, expected at most PEFT's own")
        if (kind := settings.pop("peft_type", None)) is not None:
            setattr(self, "peft_type", kind)  # noqa: B010 (it is the class's, and stays)
        settings = {k: list(v) if isinstance(v, set | tuple) else v for k, v in settings.items()}
        for field in dataclasses.fields(self):
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            self.__dict__[field.name] = default
            if isinstance(default, dict) and settings.get(field.name, 0) is None:
                del settings[field.name]
        self.__dict__["peft_version"] = __version__
        for key, value in settings.items():
            if key != "peft_version" or value is not None:
                setattr(self, key, value)
        own = {field.name for field in dataclasses.fields(self.method)}
        given = {k: plain(v) for k, v in settings.items() if k in own}
        self.method.from_settings({k: v for k, v in given.items() if not (k in self.needed and v is None)})
        tasks = [task.value for task in TaskType]
        if self.task_type is not None and self.task_type not in tasks:
            raise TanzakuError(
                f"Invalid task type: {self.task_type!r}. Must be one of the following task types: {', '.join(tasks)}."
                f"{nearest(str(self.task_type), tasks)}"
            )
        self.check_settings()

    def check_settings(self) -> None:
        """Raise an error for settings that do not go together."""

    def __setattr__(self, key: str, value: Any) -> None:
        kind = type(self).__name__
        known = [field.name for field in dataclasses.fields(self)]
        if key == "peft_type":
            if plain(value) != self.peft_type:
                warnings.warn(f"{kind}: peft_type={value!r} has no effect; it is {self.peft_type}", stacklevel=2)
            return
        if not (key in known or key in self.elsewhere or key.startswith("_")):
            raise TanzakuError(f"{kind} has no setting {key!r}{nearest(key, known)}; it has {', '.join(sorted(known))}")
        if (
            key in self.elsewhere
            and key not in known
            and key not in _INERT
            and value not in (*_NOTHING, self.elsewhere[key])
        ):
            raise TanzakuError(
                f"{kind}: found {key}={value!r}, which is not supported; leave it out, or use HF PEFT itself"
            )
        super().__setattr__(key, set(value) if key in _NAMES and isinstance(value, list) else value)

    def __getattr__(self, name: str) -> Any:
        # Programs look at what PEFT's own configurations have, such as `use_dora`.
        if name in type(self).elsewhere:
            default = LoraRuntimeConfig() if name == "runtime_config" else copy.copy(type(self).elsewhere[name])
            return self.__dict__.setdefault(name, default)
        raise AttributeError(f"{type(self).__name__} has no setting {name!r}")

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method trains virtual tokens or a prefix."""
        return isinstance(self, PromptLearningConfig)

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method is LLaMA-Adapter."""
        return isinstance(self, AdaptionPromptConfig)

    def settings(self) -> dict[str, Any]:
        """Settings as files have them: no enums, no sets."""
        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def copied(self, base: Base) -> Callable[[str], bool]:
        # In PEFT a head is a module like any other, but where it is trained whole.
        parts = [each.part for each in self.copies(base) if each.trained]
        return lambda path: any(part.has(path) for part in parts)

    def built(self) -> PeftConfig:
        """A copy to attach, complete and plain.

        Raises:
            TanzakuError: a setting without a default is missing.
        """
        for key in self.needed:
            if getattr(self, key) is None:
                raise TanzakuError(f"{type(self).__name__}: {key} is missing; say {key}=...")
        new = copy.copy(self)
        new.__dict__.update(copy.deepcopy(self.settings()))
        return new

    def to_dict(self) -> dict[str, Any]:
        """All settings, with `peft_type`."""
        return {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "peft_type": self.peft_type}

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write adapter_config.json alone.

        Args:
            kwargs: `auto_mapping_dict`, to be written as `auto_mapping`.
        """
        folder, mapping = Path(save_directory), kwargs.pop("auto_mapping_dict", None)
        for key, value in kwargs.items():
            if value not in _NOTHING:
                raise TanzakuError(f"save_pretrained: found {key}={value!r}, which is not supported; leave it out")
        if folder.exists() and not folder.is_dir():
            raise TanzakuError(f"{folder} is a file; expected a directory to save the configuration in")
        folder.mkdir(parents=True, exist_ok=True)
        own = {key: value for key, value in self.settings().items() if value != self.not_in_peft.get(key, ...)}
        settings = {**own, "peft_type": self.peft_type, **({"auto_mapping": mapping} if mapping else {})}
        (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read the adapter_config.json of a directory or of a repository on the Hub, PEFT's or Tanzaku's.

        Args:
            kwargs: of huggingface_hub's `hf_hub_download`, such as `revision`, `token` or `cache_dir`.
        """
        folder = folder_of("from_pretrained", pretrained_model_name_or_path, subfolder, kwargs, (CONFIG,))
        settings = cls.from_json_file(folder / CONFIG)
        if "peft_type" not in settings:
            raise WrongType(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}."
            )
        return cls.from_peft_type(**settings)

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **kwargs: Any) -> dict[str, Any]:
        """The settings in a file, as a dictionary."""
        path = Path(path_json_file)
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise TanzakuError(f"cannot read {path}: {error.strerror}; expected an adapter's {CONFIG}") from None
        except ValueError as error:
            raise TanzakuError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
        if not isinstance(settings, dict):
            raise TanzakuError(f"{path} is damaged: found a {type(settings).__name__}, expected an object")
        if settings.pop("runtime_config", None):
            warnings.warn(f"{path}: runtime_config is ignored; it is of the machine that wrote it", stacklevel=2)
        return settings

    @classmethod
    def from_peft_type(cls, **settings: Any) -> PeftConfig:
        """The configuration that `peft_type` names, with the other settings.

        A setting that this version does not know is passed over with a warning where its value is None, False or
        empty, as newer versions of PEFT write it; with a value it would change something, and is an error.
        """
        kind = settings.pop("peft_type", None)
        if kind is None and cls.method is None:
            raise TanzakuError(f"The {cls.__name__} config that is trying to be loaded is missing: {{'peft_type'}}")
        made: type[PeftConfig] = cls if kind is None else kind_of(kind)
        known = {*(field.name for field in dataclasses.fields(made)), *made.elsewhere}
        passed = sorted(key for key, value in settings.items() if key not in known and value in _NOTHING)
        if passed:
            warnings.warn(
                f"Unexpected keyword arguments {passed} for class {made.__name__}, these are ignored. They are not set "
                "to anything, so they change nothing; a later version of PEFT has written them",
                stacklevel=2,
            )
        return made(**{key: value for key, value in settings.items() if key not in passed})


def _empty(kind: type[PeftConfig]) -> PeftConfig:
    # For copies and pickles: the class that an object names is not always its own.
    return object.__new__(kind)


def plain(value: Any) -> Any:
    """A setting as files have it."""
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, set):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {plain(key): plain(each) for key, each in value.items()}
    return value


def kind_of(peft_type: str) -> type[PeftConfig]:
    """The class of configuration for one of PEFT's names of a method."""
    name = str(getattr(peft_type, "value", peft_type)).removeprefix("TANZAKU_")
    if name not in CONFIGS:
        raise TanzakuError(
            f"found peft_type={name!r}{nearest(name, CONFIGS)}, expected one of {', '.join(sorted(CONFIGS))}"
        )
    return CONFIGS[name]


@dataclass(init=False)
class LoraConfig(PeftConfig, LoRA):
    """LoRA: :class:`tanzaku.LoRA` has the settings."""

    method = LoRA
    peft_type = PeftType.LORA
    order = _LORA
    elsewhere = _LORA_ELSEWHERE
    files_as_peft = True

    def check_settings(self) -> None:
        _check_layers(self)


@dataclass(init=False)
class AdaLoraConfig(PeftConfig, AdaLoRA):
    """AdaLoRA: :class:`tanzaku.AdaLoRA` has the settings. `total_step` may wait until `update_and_allocate`."""

    method = AdaLoRA
    peft_type = PeftType.ADALORA
    order = (*_LORA, *_ADALORA)
    elsewhere = _LORA_ELSEWHERE

    def check_settings(self) -> None:
        _check_layers(self)
        if self.loftq_config:
            raise TanzakuError("ADALORA does not support LOFTQ; leave loftq_config out")
        if self.r != 8:
            warnings.warn(
                f"Note that `r` is not used in AdaLora and will be ignored: found r={self.r}, and init_r is the rank "
                "at first",
                stacklevel=4,
            )
        if self.orth_reg_weight < 0:
            raise TanzakuError(
                "`orth_reg_weight` should be greater than or equal to 0, but the value passed is "
                f"{self.orth_reg_weight}"
            )
        if self.total_step is not None and self.tinit >= self.total_step - self.tfinal:
            raise TanzakuError(
                "AdaLoraConfig: The supplied schedule values don't allow for a budgeting phase: found "
                f"tinit={self.tinit}, tfinal={self.tfinal}, total_step={self.total_step}, expected tinit + tfinal < "
                "total_step"
            )


_NATIVELY = {
    "loftq": ". HF PEFT's quantises the base, which here other adapters share; tanzaku.LoRA has a start of that name "
    "that leaves it as it is"
}


def _check_layers(config: LoraConfig | AdaLoraConfig) -> None:
    init = config.init_lora_weights
    known = ("gaussian", "orthogonal", "olora", "eva", "corda", "lora_ga")
    if not isinstance(init, bool) and init not in known and not PISSA.fullmatch(init):
        raise TanzakuError(
            f"{type(config).__name__}: found init_lora_weights={init!r}, which is not supported; expected True, False, "
            f"'pissa', 'pissa_niter_16' or one of {', '.join(map(repr, known))}{_NATIVELY.get(init, '')}"
        )
    if isinstance(config.target_modules, str):
        for key in ("layers_to_transform", "layers_pattern"):
            if getattr(config, key) is not None:
                raise TanzakuError(
                    f"`{key}` cannot be used when `target_modules` is a str. Found {config.target_modules!r}: put the "
                    "layers' numbers into the expression, or give names in a list"
                )
    if config.layers_pattern and config.layers_to_transform is None:
        raise TanzakuError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")


@dataclass(init=False)
class PromptLearningConfig(PeftConfig):
    """What the configurations of virtual tokens and prefixes share."""

    needed: ClassVar[tuple[str, ...]] = ("num_virtual_tokens",)

    num_virtual_tokens: int | None = None  # no default, where the method itself has one


@dataclass(init=False)
class PromptTuningConfig(PromptLearningConfig, PromptTuning):  # type: ignore[misc]
    """Prompt tuning: :class:`tanzaku.PromptTuning` has the settings."""

    method = PromptTuning
    peft_type = PeftType.PROMPT_TUNING
    order = (
        *_PROMPT,
        "modules_to_save",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_name_or_path",
        "tokenizer_kwargs",
    )

    def check_settings(self) -> None:
        text = self.prompt_tuning_init == "TEXT"
        for key in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            if text and not getattr(self, key):
                raise TanzakuError(f"When prompt_tuning_init='TEXT', {key} can't be {getattr(self, key)}.")
        if self.tokenizer_kwargs and not text:
            raise TanzakuError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")


@dataclass(init=False)
class PromptEncoderConfig(PromptLearningConfig, PTuning):  # type: ignore[misc]
    """P-tuning: :class:`tanzaku.PTuning` has the settings."""

    method = PTuning
    peft_type = PeftType.P_TUNING
    order = (
        *_PROMPT,
        "modules_to_save",
        "encoder_reparameterization_type",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_dropout",
    )


@dataclass(init=False)
class PrefixTuningConfig(PromptLearningConfig, PrefixTuning):  # type: ignore[misc]
    """Prefix tuning: :class:`tanzaku.PrefixTuning` has the settings."""

    method = PrefixTuning
    peft_type = PeftType.PREFIX_TUNING
    order = (*_PROMPT, "modules_to_save", "init_weights", "encoder_hidden_size", "prefix_projection")


@dataclass(init=False)
class CPTConfig(PromptLearningConfig, CPT):  # type: ignore[misc]
    """Context-aware prompt tuning: :class:`tanzaku.CPT` has the settings. The wrapped model's loss is PEFT's."""

    method = CPT
    peft_type = PeftType.CPT
    order = (
        *_PROMPT,
        "modules_to_save",
        "cpt_token_ids",
        "cpt_mask",
        "cpt_tokens_type_mask",
        "opt_weighted_loss_type",
        "opt_loss_decay_factor",
        "opt_projection_epsilon",
        "opt_projection_format_epsilon",
        "tokenizer_name_or_path",
    )
    needed = ()

    def check_settings(self) -> None:
        if self.task_type != TaskType.CAUSAL_LM:
            raise TanzakuError(f"CPTConfig only supports task_type = CAUSAL_LM. Found {self.task_type!r}")
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        n = len(self.cpt_token_ids)
        self.num_virtual_tokens, self.num_transformer_submodules = n, 1
        for key in ("cpt_mask", "cpt_tokens_type_mask"):
            if getattr(self, key) is None:
                setattr(self, key, [1] * n)
            if len(getattr(self, key)) != n:
                raise TanzakuError(
                    f"cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length. Found {n} ids and "
                    f"{len(getattr(self, key))} numbers in {key}"
                )

    def penalty(self, adapter: Attached) -> Tensor | None:
        return None  # it is in the loss of a whole batch, where PEFT has it


@dataclass(init=False)
class IA3Config(PeftConfig, IA3):
    """(IA)3: :class:`tanzaku.IA3` has the settings."""

    method = IA3
    peft_type = PeftType.IA3
    order = (
        "target_modules",
        "exclude_modules",
        "feedforward_modules",
        "fan_in_fan_out",
        "modules_to_save",
        "init_ia3_weights",
    )

    def check_settings(self) -> None:
        targets, inner = self.target_modules, self.feedforward_modules
        if isinstance(targets, set) and isinstance(inner, set) and not inner <= targets:
            raise TanzakuError(
                f"`feedforward_modules` should be a subset of `target_modules`: {sorted(inner - targets)} are not"
            )


@dataclass(init=False)
class AdaptionPromptConfig(PeftConfig, LlamaAdapter):
    """LLaMA-Adapter: :class:`tanzaku.LlamaAdapter` has the settings."""

    method = LlamaAdapter
    peft_type = PeftType.ADAPTION_PROMPT
    order = ("target_modules", "adapter_len", "adapter_layers")
    needed = ("adapter_len", "adapter_layers")

    adapter_len: int | None = None  # type: ignore[assignment]
    adapter_layers: int | None = None


@dataclass(init=False)
class XLoraConfig(PeftConfig, XLora):
    """X-LoRA: :class:`tanzaku.XLora` has the settings, but that `adapters` names directories, as PEFT has it."""

    method = XLora
    peft_type = PeftType.XLORA
    order = (
        "hidden_size",
        "adapters",
        "enable_softmax",
        "enable_softmax_topk",
        "layerwise_scalings",
        "xlora_depth",
        "xlora_size",
        "xlora_dropout_p",
        "use_trainable_adapters",
        "softmax_temperature",
        "top_k_lora",
        "scaling_pass_value",
        "global_scaling_weight",
    )
    elsewhere = {"use_trainable_adapters": False}  # noqa: RUF012 (it is annotated above)

    adapters: dict[str, str] = dataclasses.field(default_factory=dict)  # type: ignore[assignment]

    def built(self) -> PeftConfig:
        new = cast(Any, super().built())
        plain_one = cast(XLora, XLora.from_settings({"adapters": new.adapters}))
        new.__dict__.update(adapters=plain_one.adapters, _brings=plain_one.brings())
        return cast(PeftConfig, new)

    @classmethod
    def takes(cls, key: str, value: Any) -> bool:
        return XLora.takes(key, value) if key == "adapters" else super().takes(key, value)


CONFIGS: dict[str, type[PeftConfig]] = {
    kind.peft_type.value: kind
    for kind in (
        LoraConfig,
        AdaLoraConfig,
        PromptTuningConfig,
        PromptEncoderConfig,
        PrefixTuningConfig,
        CPTConfig,
        IA3Config,
        AdaptionPromptConfig,
        XLoraConfig,
    )
}
