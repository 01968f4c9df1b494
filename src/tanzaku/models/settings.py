"""The base model of a run: one block of a recipe, read by one loader, and kept beside an adapter for prediction."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer


class ModelSettings(BaseModel):
    """Which model, and how it is loaded. Where nothing but the name is said, the name alone stands for it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, description="base model: a Hub name, a directory, a .gguf file, or embedded")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the frozen weights (auto: bfloat16 where all candidates compute in bf16, else float32)"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = Field(
        "auto", description="transformers' implementation of attention (auto: the model's own choice)"
    )

    def to_json(self) -> str | dict[str, Any]:
        """The name, or a mapping with what else was said."""
        said = self.model_dump(exclude_defaults=True)
        return self.name if said.keys() == {"name"} else said


def as_block(value: Any) -> Any:
    """A name as the block that it stands for; anything else as it is."""
    return {"name": value} if isinstance(value, str) else value


# A field that a recipe may give as a name or as a block.
Model = Annotated[ModelSettings, BeforeValidator(as_block), PlainSerializer(ModelSettings.to_json)]
