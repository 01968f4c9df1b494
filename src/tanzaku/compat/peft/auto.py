"""A base model and an adapter by the adapter's directory alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import transformers

from tanzaku.compat.peft.config import PeftConfig
from tanzaku.compat.peft.peft_model import PeftModel
from tanzaku.errors import TanzakuError


class AutoPeftModel:
    """Load the base that an adapter's settings name, and the adapter onto it."""

    base: ClassVar[str] = "AutoModel"

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load `pretrained_model_name_or_path`, an adapter's directory. `kwargs` are for the base's `from_pretrained`.

        Raises:
            TanzakuError: the settings name no base.
        """
        settings = config or PeftConfig.from_pretrained(pretrained_model_name_or_path)
        name = settings.base_model_name_or_path
        if not name:
            raise TanzakuError(
                f"{pretrained_model_name_or_path} names no base model; load one and use PeftModel.from_pretrained"
            )
        model = getattr(transformers, cls.base).from_pretrained(name, revision=settings.revision, **kwargs)
        return PeftModel.from_pretrained(
            model, pretrained_model_name_or_path, adapter_name, is_trainable=is_trainable, config=config
        )


class AutoPeftModelForCausalLM(AutoPeftModel):
    base = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    base = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    base = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    base = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    base = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    base = "AutoModel"
