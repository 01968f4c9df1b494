"""What a base does by itself, where its pretraining has taught it the task: measured on the rows of each run, so that
one sees what training has changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from tanzaku.compare.resamples import Resample
from tanzaku.compare.statistics import Comparison, Design, Ranking, Run, Scored, rank
from tanzaku.compare.verdict import BASE
from tanzaku.engine.accelerations import Accelerations
from tanzaku.models.families import Base
from tanzaku.tasks.inference import records_of
from tanzaku.tasks.task import Example, Metric, Records, Split, Task
from tanzaku.train.settings import TrainSettings


@dataclass(frozen=True)
class ZeroShot:
    """The bare base's predictions for the rows that candidates are measured on.

    Args:
        predictions: of each row once, in the order of :func:`rows_of`.
    """

    task: Task
    resamples: Sequence[Resample]
    predictions: Sequence[Any]

    def scored(self, metric: Metric, strata: Callable[[Split], Any]) -> Scored:
        """As a candidate that trains nothing."""
        place = {id(example): at for at, example in enumerate(rows_of(self.resamples))}
        runs = []
        for at in self.resamples:
            assert at.data.valid is not None
            found = [self.predictions[place[id(example)]] for example in at.data.valid.examples]
            statistics = metric.statistics(self.task.recorded(found, at.data.valid.examples))
            runs.append(Run(at.repeat, at.fold, at.seed, statistics.value(), statistics, strata(at.data.valid)))
        return Scored(BASE, runs, 0)

    def against(self, best: Scored, design: Design, strata: Callable[[Split], Any]) -> tuple[Ranking, Comparison]:
        """The base and the best candidate: their order, and what can be told of the two."""
        ranking = rank([best, self.scored(design.metric, strata)], design)
        return ranking, ranking.comparisons[0]


def rows_of(resamples: Sequence[Resample]) -> list[Example]:
    """The validation rows of all runs, each once."""
    found: dict[int, Example] = {}
    for at in resamples:
        for example in at.data.valid.examples if at.data.valid is not None else ():
            found.setdefault(id(example), example)
    return list(found.values())


def predicted(
    model: PreTrainedModel, task: Task, resamples: Sequence[Resample], pad_token_id: int, settings: TrainSettings
) -> list[Any]:
    """What the bare base predicts for these rows.

    Args:
        settings: a candidate's; its batches may be as large as these say.
    """
    rows = rows_of(resamples)
    split = Split("base", rows, [""] * len(rows), 0, "the validation rows")
    base: Mapping[str | None, Split] = {None: split}
    found: Mapping[str | None, Records] = records_of(
        model, task, base, pad_token_id, settings.eval_batch_size, Accelerations(Base.of(model), settings.accelerations)
    )
    return task.predictions(found[None])
