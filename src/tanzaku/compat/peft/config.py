"""HF PEFT's configurations. Each is the method's own settings under PEFT's name, so it can be attached as it is."""

from __future__ import annotations

import dataclasses
import enum
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tanzaku.errors import TanzakuError, nearest
from tanzaku.method import Method
from tanzaku.methods import IA3, AdaLoRA, LlamaAdapter, LoRA, PrefixTuning, PromptTuning, PTuning
from tanzaku.store import CONFIG


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


class PromptTuningInit(enum.StrEnum):
    """What a prompt starts from."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class PromptEncoderReparameterizationType(enum.StrEnum):
    """The network that writes the virtual tokens of P-tuning."""

    MLP = "MLP"
    LSTM = "LSTM"


# Settings that PEFT has and that change something only when they are on.
_LORA_ELSEWHERE = (
    "megatron_config",
    "megatron_core",
    "trainable_token_indices",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "use_dora",
    "velora_config",
    "alora_invocation_tokens",
    "use_qalora",
    "qalora_group_size",
    "monteclora_config",
    "layer_replication",
    "runtime_config",
    "lora_bias",
    "target_parameters",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "ensure_weight_tying",
)
# Of these PEFT's own default is something, and it has an effect only beside another that is an error here.
_INERT = ("megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config", "corda_config")


@dataclass(init=False)
class PeftConfig(Method):
    """What all configurations share.

    Raises:
        TanzakuError: a keyword that is not there, a value of a wrong type, or a setting of PEFT's that is not here.
    """

    method: ClassVar[type[Method] | None] = None
    needed: ClassVar[tuple[str, ...]] = ()  # PEFT has no default for these, or none that works
    elsewhere: ClassVar[tuple[str, ...]] = ()
    trains_head = False  # as in PEFT, `modules_to_save` alone says; the class of the wrapped model adds the head to it

    base_model_name_or_path: str | None = None
    revision: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None

    def __new__(cls, **settings: Any) -> PeftConfig:
        if cls.method is None:
            kinds = ", ".join(sorted(kind.__name__ for kind in CONFIGS.values()))
            raise TanzakuError(f"{cls.__name__} is no method's own; expected one of {kinds}")
        return super().__new__(cls)

    def __init__(self, **settings: Any):
        assert self.method is not None
        settings = {k: list(v) if isinstance(v, set | tuple) else v for k, v in settings.items()}
        for field in dataclasses.fields(self):
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            self.__dict__[field.name] = default
            if isinstance(default, dict) and settings.get(field.name, 0) is None:
                del settings[field.name]
        for key in self.needed:
            if settings.get(key) is None:
                raise TanzakuError(f"{type(self).__name__}: {key} is missing; say {key}=...")
        for key, value in settings.items():
            setattr(self, key, value)
        plain = {k: v.value if isinstance(v, enum.Enum) else v for k, v in settings.items()}
        own = {field.name for field in dataclasses.fields(self.method)}
        self.method.from_settings({k: v for k, v in plain.items() if k in own})
        tasks = [task.value for task in TaskType]
        if self.task_type is not None and self.task_type not in tasks:
            raise TanzakuError(
                f"{type(self).__name__}: found task_type={self.task_type!r}{nearest(str(self.task_type), tasks)}, "
                f"expected one of {', '.join(tasks)}"
            )

    def __setattr__(self, key: str, value: Any) -> None:
        kind = type(self).__name__
        known = [field.name for field in dataclasses.fields(self)]
        if not (key in known or key in self.elsewhere or key.startswith("_")):
            raise TanzakuError(f"{kind} has no setting {key!r}{nearest(key, known)}; it has {', '.join(sorted(known))}")
        if key in self.elsewhere and key not in known and key not in _INERT and value not in (None, False, {}, [], ()):
            raise TanzakuError(
                f"{kind}: found {key}={value!r}, which is not supported; leave it out, or use HF PEFT itself"
            )
        super().__setattr__(key, value)

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method trains virtual tokens or a prefix."""
        return isinstance(self, PromptLearningConfig)

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method is LLaMA-Adapter."""
        return isinstance(self, AdaptionPromptConfig)

    def to_dict(self) -> dict[str, Any]:
        """All settings, with `peft_type`."""
        return {**dataclasses.asdict(self), "peft_type": self.peft_type}

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write adapter_config.json alone."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None) -> PeftConfig:
        """Read the adapter_config.json of a directory, PEFT's or Tanzaku's."""
        path = Path(pretrained_model_name_or_path, subfolder or "", CONFIG)
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise TanzakuError(
                f"cannot read {path}: {error.strerror}; expected the directory of an adapter, on this machine"
            ) from None
        except ValueError as error:
            raise TanzakuError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
        return cls.from_peft_type(**settings)

    @classmethod
    def from_peft_type(cls, **settings: Any) -> PeftConfig:
        """The configuration that `peft_type` names, with the other settings."""
        kind = settings.pop("peft_type", None)
        if kind is None:
            return cls(**settings)
        return kind_of(kind)(**settings)


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
    elsewhere = _LORA_ELSEWHERE


@dataclass(init=False)
class AdaLoraConfig(PeftConfig, AdaLoRA):
    """AdaLoRA: :class:`tanzaku.AdaLoRA` has the settings. `total_step` may wait until `update_and_allocate`."""

    method = AdaLoRA
    peft_type = PeftType.ADALORA
    elsewhere = _LORA_ELSEWHERE

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        if settings.get("r", 8) != 8:
            warnings.warn(f"AdaLoraConfig: r={self.r} has no effect; init_r is the rank at first", stacklevel=2)


class PromptLearningConfig(PeftConfig):
    """What the configurations of virtual tokens and prefixes share."""

    needed = ("num_virtual_tokens",)


@dataclass(init=False)
class PromptTuningConfig(PromptLearningConfig, PromptTuning):
    """Prompt tuning: :class:`tanzaku.PromptTuning` has the settings."""

    method = PromptTuning
    peft_type = PeftType.PROMPT_TUNING


@dataclass(init=False)
class PromptEncoderConfig(PromptLearningConfig, PTuning):
    """P-tuning: :class:`tanzaku.PTuning` has the settings."""

    method = PTuning
    peft_type = PeftType.P_TUNING


@dataclass(init=False)
class PrefixTuningConfig(PromptLearningConfig, PrefixTuning):
    """Prefix tuning: :class:`tanzaku.PrefixTuning` has the settings."""

    method = PrefixTuning
    peft_type = PeftType.PREFIX_TUNING


@dataclass(init=False)
class IA3Config(PeftConfig, IA3):
    """(IA)3: :class:`tanzaku.IA3` has the settings."""

    method = IA3
    peft_type = PeftType.IA3


@dataclass(init=False)
class AdaptionPromptConfig(PeftConfig, LlamaAdapter):
    """LLaMA-Adapter: :class:`tanzaku.LlamaAdapter` has the settings."""

    method = LlamaAdapter
    peft_type = PeftType.ADAPTION_PROMPT
    needed = ("adapter_len", "adapter_layers")


CONFIGS: dict[str, type[PeftConfig]] = {
    kind.peft_type.value: kind
    for kind in (
        LoraConfig,
        AdaLoraConfig,
        PromptTuningConfig,
        PromptEncoderConfig,
        PrefixTuningConfig,
        IA3Config,
        AdaptionPromptConfig,
    )
}
