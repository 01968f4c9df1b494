"""What a run is given and what it reports: plain records, written to results.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tanzaku.core.method import Method
from tanzaku.train.settings import TrainSettings

if TYPE_CHECKING:
    from tanzaku.tasks.task import TaskData


@dataclass
class Job:
    """One training run of a candidate. `name` is unique in a run.

    `data` has its own rows, such as a fold's; without it the run's are used. After the epochs in `rungs` it waits to be
    told whether to go on. `uses` has the directories of adapters that its method uses, by the method's names for them;
    `init_from` is that of the adapter whose weights it begins with.
    """

    name: str
    method: Method
    settings: TrainSettings
    data: TaskData | None = None
    rungs: tuple[int, ...] = ()
    save: bool = True  # its adapter, where the run has a directory
    uses: Mapping[str, Path] = field(default_factory=dict)
    init_from: Path | None = None

    def __post_init__(self) -> None:
        self.settings = for_method(self.settings, self.method)


def for_method(settings: TrainSettings, method: Method) -> TrainSettings:
    """The settings with the method's own learning rate, where they give none."""
    if settings.learning_rate is not None:
        return settings
    return settings.model_copy(update={"learning_rate": method.learning_rate})


@dataclass
class EpochRecord:
    """Figures after one epoch. Metrics are keyed by their names; times are in seconds.

    The training loss is the mean over the epoch's rows, of the weights that each of them met.
    """

    epoch: int
    train_loss: float
    learning_rate: float
    valid: dict[str, float]
    seconds: float


@dataclass
class JobResult:
    """How a job ended. `error` says where and why it stopped, in one line."""

    name: str
    method: str
    method_settings: dict[str, Any]
    train_settings: dict[str, Any]
    status: Literal["done", "stopped", "failed", "interrupted"] = "done"  # stopped: at a rung, for lagging behind
    error: str | None = None
    note: str | None = None
    epochs: list[EpochRecord] = field(default_factory=list)
    best_epoch: int | None = None
    restored_epoch: int | None = None
    valid: dict[str, float] | None = None  # figures of the weights it ended with, on the validation rows
    test: dict[str, float] | None = None
    test_intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # of shares of rows: Wilson, 95%
    held_perplexity: float | None = None  # of the text that nothing is trained on, where there is one
    confusion: list[list[int]] | None = None  # of the test split, or else of the validation split; rows are true
    by_class: dict[str, dict[str, float]] = field(default_factory=dict)  # figures of the same rows, by class
    predictions: list[Any] | None = None  # of the same rows, as the task writes them
    trainable_parameters: int = 0
    total_parameters: int = 0
    steps: int = 0
    seconds: float = 0.0  # of all threads: its share, by rows, of the steps it took part in, and its evaluation
    peak_memory_bytes: int = 0  # of the process that ran it (CPU), the base included, or of the device (CUDA)
    step_bytes: int = 0  # of tensors that a step of it needs beside the base, with gradients and optimizer state; or 0
    init_from: dict[str, Any] | None = None  # the adapter it went on from: its name and `sha256`
    adapter: str | None = None  # directory, relative to the run's

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Observer(Protocol):
    """Told what happens during a run; a run on the command line makes events of it (`events.py`)."""

    def job_started(self, job: Job, result: JobResult, steps: int) -> None: ...

    def step_done(self, job: Job, step: int, steps: int, loss: float) -> None: ...

    def epoch_done(self, job: Job, record: EpochRecord) -> None: ...

    def job_done(self, job: Job, result: JobResult) -> None: ...

    def warned(self, line: str) -> None:
        """Something went wrong that the run gets over, in one line."""
