"""What a comparison can be told: the recipe's `compare` section, and the flags of `tanzaku compare`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tanzaku.errors import TanzakuError

MARGIN = 0.01  # of a metric: less is no reason to train more parameters

FOLDS, SEEDS = 5, 3  # where a comparison is not told: of rows without a validation split, and of rows with one

_UNITS = {"b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", 1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


class CompareSettings(BaseModel):
    """How candidates are searched and measured.

    A candidate is measured by `runs` of :meth:`design`. What a search draws: where `trials` is not given, only what an
    entry gives a choice or a range; with a number, every entry is searched, over what it leaves open of its method's
    default space too. An entry leaves a setting open unless it gives a value itself: the recipe's own `train` section
    holds defaults for all entries, so the learning rate there, or from a flag, is searched, and one in an entry's own
    `train` is not. A space that an entry gives stands in for the method's. An entry that others use is never searched.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folds: int | None = Field(
        None, ge=2, description="parts of the rows, each held out once (5 where there are no validation rows)"
    )
    repeats: int = Field(1, ge=1, description="times the rows are cut into folds anew")
    seeds: int | None = Field(
        None, ge=1, description="runs of each candidate, each with another seed (3 on one split, 1 on each fold)"
    )
    trials: int | None = Field(
        None, ge=1, description="settings drawn for each candidate (16 for those with ranges, the others as written)"
    )
    wave: int = Field(8, ge=1, description="settings drawn at once; the next draw knows how they did")
    keep: int = Field(1, ge=1, description="best settings of each search that are measured in full")
    reduction: int = Field(3, ge=2, description="one trial in this many goes on where a search stops those that lag")
    finalists: int = Field(3, ge=1, description="best candidates whose adapters are kept and tested")
    rank_by: str | None = Field(None, description="validation figure that candidates are ranked by (the task's own)")
    margin: float = Field(
        MARGIN,
        ge=0,
        allow_inf_nan=False,
        description="what a cheaper candidate may be expected to lose against the best, of that and of the figures "
        "beside it; of a loss, a share",
    )
    rows_per_step: int | None = Field(None, ge=1, description="rows of all candidates in one step (chosen)")
    workers: int | None = Field(
        None, ge=1, description="processes that share the frozen weights and the candidates (chosen on Linux, else 1)"
    )
    memory: str | None = Field(None, description="what the run may take, such as 8GB or 512MiB (no limit)")

    @field_validator("memory", mode="before")
    @classmethod
    def _has_a_unit(cls, value: Any) -> Any:
        if value is not None:
            bytes_of(str(value))
        return value

    def design(self, valid_rows: bool) -> Design:
        """What is run of each candidate, where there are validation rows or none.

        Raises:
            TanzakuError: repeats without folds.
        """
        folds = self.folds or (None if valid_rows else FOLDS)
        if folds is None and self.repeats > 1:
            raise TanzakuError(
                f"repeats is {self.repeats}, and the validation rows are one split; give folds too, or seeds instead"
            )
        return Design(folds, self.repeats, self.seeds or (SEEDS if folds is None else 1))


@dataclass(frozen=True)
class Design:
    """The runs of one candidate: on each of `repeats` times `folds` folds, or on one split (None), by each seed."""

    folds: int | None
    repeats: int
    seeds: int

    @property
    def runs(self) -> int:
        """Jobs a candidate."""
        return (self.folds or 1) * self.repeats * self.seeds


def bytes_of(text: str) -> int:
    """The number of bytes in `8GB` (of 1000 to the third), `512MiB` (of 1024 squared) or `7.5 GB`.

    Raises:
        TanzakuError: no number, no unit or an unknown one, or nothing at all.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    unit = _UNITS.get(found[2].lower()) if found else None
    count = int(Decimal(found[1]) * unit) if found and unit else 0
    if count < 1:
        raise TanzakuError(f"found {text!r}, expected a number and a unit, such as 8GB or 512MiB")
    return count
