"""How a text is written, token by token: what of it can be said. The file is apart from what writes, so that a command
line has its flags without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tanzaku.errors import TanzakuError
from tanzaku.tasks.cells import short
from tanzaku.tasks.settings import Override


class Decoding(BaseModel):
    """How a text is written, and when it ends. Whatever else a checkpoint's generation settings ask for (sampling,
    beams, penalties, lengths) is left out; its special tokens are used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_new_tokens: int = Field(64, ge=1, description="tokens that a text has at most")
    stop: tuple[str, ...] = Field((), description="a text ends before the first of these (repeatable)")
    temperature: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="of the draw of each token; 0 takes the likeliest"
    )
    top_k: int | None = Field(None, ge=1, description="draw from this many likeliest tokens (all)")
    top_p: float | None = Field(None, gt=0, le=1, description="draw from the likeliest tokens of this share (all)")
    seed: int = Field(0, ge=-(2**62), lt=2**62, description="of the draws")

    @property
    def sampling(self) -> dict[str, Any]:
        """What is said beside how much is written, fit for JSON; nothing of greedy text."""
        return self.model_dump(mode="json", exclude={"max_new_tokens"}, exclude_defaults=True)

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("found an empty text, expected characters to stop at")
        return value

    @model_validator(mode="after")
    def _drawn(self) -> Self:
        if not self.temperature and (self.top_k is not None or self.top_p is not None):
            raise ValueError("top_k and top_p are of draws, and temperature is 0; expected one above 0, such as 1")
        return self


SAMPLING = {"temperature": "NUMBER", "top_k": "INTEGER", "top_p": "NUMBER", "seed": "INTEGER", "stop": "TEXT"}
OVERRIDES: Mapping[str, Override] = {
    "max_new_tokens": Override("INTEGER", "tokens that are written for a prompt at most (as in training)"),
    **{
        name: Override(metavar, str(Decoding.model_fields[name].description), repeatable=name == "stop")
        for name, metavar in SAMPLING.items()
    },
}


def decoding_of(settings: Mapping[str, Any], named: Callable[[str], str]) -> Decoding:
    """The settings, as flags or a file have them.

    Args:
        named: how an error calls a setting.

    Raises:
        TanzakuError: a setting that is none; what was found and expected.
    """
    try:
        return Decoding.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "extra_forbidden":
            raise TanzakuError(f"{named(str(first['loc'][0]))} is no setting of how text is written") from None
        name = named(str(first["loc"][0]) if first["loc"] else "temperature")
        if first["type"] == "value_error":
            raise TanzakuError(f"{name}: {first['ctx']['error']}") from None
        expected = first["msg"].removeprefix("Input should ").removeprefix("be ")
        raise TanzakuError(f"{name} is {short(first['input'])}, expected {expected}") from None
