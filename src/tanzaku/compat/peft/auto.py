"""A base model and an adapter by the adapter's directory alone."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, ClassVar

import transformers

from tanzaku.compat.peft.config import PeftConfig
from tanzaku.compat.peft.hub import OPTIONS, folder_of
from tanzaku.compat.peft.peft_model import PeftModel
from tanzaku.errors import TanzakuError


class AutoPeftModel:
    """Load the base that an adapter's settings name, and the adapter onto it."""

    base: ClassVar[str | None] = None  # of transformers; None: the class that the settings name
    task: ClassVar[str | None] = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load `pretrained_model_name_or_path`, an adapter's directory or repository.

        Where a tokenizer beside the adapter knows more tokens than the base, the base's embeddings are resized.

        Args:
            revision: of the adapter's repository; the base's is in the settings.
            import_allowlist: libraries that a base's class may come from; None: transformers.
            kwargs: for the base's `from_pretrained`; those of the Hub are for the adapter, too.

        Raises:
            TanzakuError: the settings name no base, a class of another library, or another task.
        """
        options = {key: value for key, value in kwargs.items() if key in OPTIONS}
        if revision is not None:
            options["revision"] = revision
        folder = folder_of("from_pretrained", pretrained_model_name_or_path, options.pop("subfolder", None), options)
        settings = PeftConfig.from_pretrained(folder)
        name = settings.base_model_name_or_path
        if not name:
            raise TanzakuError(
                f"{pretrained_model_name_or_path} names no base model; load one and use PeftModel.from_pretrained"
            )
        kind = cls._class_of(settings, import_allowlist or ["transformers"])
        model = kind.from_pretrained(name, revision=settings.revision, **kwargs)
        if (folder / _TOKENIZER).is_file() and hasattr(model, "get_input_embeddings"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(len(tokenizer))
        return PeftModel.from_pretrained(model, folder, adapter_name, is_trainable=is_trainable, config=config)

    @classmethod
    def _class_of(cls, settings: PeftConfig, allowed: list[str]) -> Any:
        """The class that loads the base."""
        task, mapping = settings.task_type, settings.auto_mapping
        if task is not None and task != cls.task:
            raise TanzakuError(
                f"{cls.__name__}: found an adapter with task_type={str(task)!r}, expected {cls.task!r}; use the class "
                "of that task"
            )
        if task is None and mapping is not None:
            library = str(mapping.get("parent_library"))
            if library not in allowed and not library.startswith(tuple(f"{each}." for each in allowed)):
                raise TanzakuError(
                    f"The auto mapping wants to import {library!r} which is not in the import allowlist. If that is "
                    f"safe, say import_allowlist=[{library!r}]"
                )
            found = getattr(importlib.import_module(library), str(mapping.get("base_model_class")), None)
            if found is None:
                raise TanzakuError(
                    f"{library} has no class {mapping.get('base_model_class')!r}, which the adapter names"
                )
            return found
        if cls.base is None:
            raise TanzakuError(f"{cls.__name__}: the adapter names no class of its base; use that of its task")
        return getattr(transformers, cls.base)


_TOKENIZER = "tokenizer_config.json"


class AutoPeftModelForCausalLM(AutoPeftModel):
    base, task = "AutoModelForCausalLM", "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    base, task = "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    base, task = "AutoModelForSequenceClassification", "SEQ_CLS"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    base, task = "AutoModelForTokenClassification", "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    base, task = "AutoModelForQuestionAnswering", "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    base, task = "AutoModel", "FEATURE_EXTRACTION"
