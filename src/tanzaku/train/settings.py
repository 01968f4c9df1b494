"""What a training run can be told. One schema for the recipe's `train` section, the flags and the Python API."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tanzaku.engine.names import AUTO, chosen
from tanzaku.errors import TanzakuError


class TrainSettings(BaseModel):
    """Settings shared by every candidate of a run; defaults are the ones transformers' Trainer has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(10, ge=1, description="passes over the training rows")
    max_steps: int | None = Field(
        None,
        ge=1,
        description="steps in all, in place of passes: over and over the rows; epochs are then parts of them",
    )
    learning_rate: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="peak learning rate of AdamW (each method's own)"
    )
    batch_size: int = Field(1, ge=1, description="rows a step")
    eval_batch_size: int = Field(8, ge=1, description="rows an evaluation step")
    weight_decay: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="decoupled decay; biases and norms are spared"
    )
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="learning rate after warm-up")
    warmup: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="steps of warm-up; below 1 it is a share of all steps"
    )
    accumulation: int = Field(1, ge=1, description="batches of one optimizer step, all rows alike")
    max_grad_norm: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="gradient norm is clipped to this; 0 turns it off"
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, allow_inf_nan=False, description="smoothing of the gradient")
    adam_beta2: float = Field(0.999, ge=0, lt=1, allow_inf_nan=False, description="smoothing of its square")
    adam_epsilon: float = Field(1e-8, gt=0, allow_inf_nan=False, description="added to the denominator")
    max_length: int = Field(200, ge=1, description="texts are cut after this many tokens, and counted")
    shuffle: bool = Field(True, description="draw a new order of the rows each epoch")
    group_by_length: bool = Field(False, description="batch rows of like length together, for less padding")
    class_weights: bool = Field(False, description="weigh the loss by inverse class frequency")
    focal_gamma: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="focal loss: count rows less that are sure already, by this power"
    )
    seed: int = Field(0, ge=-(2**62), lt=2**62, description="of initial weights, data order and dropout")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="arithmetic of the forward pass (auto: bf16 where the device is much faster, else fp32)",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations to save memory")
    metric: str = Field("loss", description="validation figure for early stopping and the best epoch")
    patience: int | None = Field(None, ge=1, description="stop after this many epochs without a better metric")
    restore_best: bool = Field(False, description="end with the weights of the best epoch, not of the last")
    tracker: str | None = Field(None, description="an accelerate tracker, such as tensorboard")
    accelerations: str = Field(
        AUTO, description="what makes a step cheap: auto (all), none, names, or no- and names (all but these)"
    )

    @model_validator(mode="after")
    def _steps_in_parts(self) -> TrainSettings:
        if self.max_steps is not None and self.max_steps < self.epochs:
            raise TanzakuError(
                f"max_steps is {self.max_steps}, and epochs, the parts that they come in, {self.epochs}; give --epochs "
                f"{self.max_steps} at most"
            )
        return self

    @field_validator("accelerations", mode="before")
    @classmethod
    def _names(cls, value: Any) -> str:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise TanzakuError(f"found {value!r}, expected auto, none, or a list of names such as [no-packing]")
        wanted = ",".join(name.strip() for name in ",".join(names).split(","))
        chosen(wanted)
        return wanted
