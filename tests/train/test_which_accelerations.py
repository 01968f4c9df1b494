"""How a run chooses among accelerations, and that its jobs, its evaluation and its workers follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import tanzaku as tz
from models import tiny
from tanzaku.engine.acceleration import Common
from tanzaku.engine.accelerations import ACCELERATIONS
from tanzaku.engine.names import NAMES, chosen
from tanzaku.engine.norms import FrozenNorms
from tanzaku.engine.packing import Packing
from tanzaku.errors import TanzakuError
from tanzaku.models.families import Base
from tanzaku.recipe.schema import MethodEntry
from tanzaku.train import step
from tanzaku.train.results import Job
from tanzaku.train.scheduler import JobScheduler, train_jobs
from tanzaku.train.settings import TrainSettings
from task_data import task


def test_every_name_has_its_class_and_says_in_a_line_what_it_is() -> None:
    assert list(ACCELERATIONS) == list(NAMES)
    assert all(kind.summary and len(kind.summary.splitlines()) == 1 for kind in ACCELERATIONS.values())
    assert len({kind.summary for kind in ACCELERATIONS.values()}) == len(NAMES)


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("auto", list(NAMES)),
        ("none", []),
        ("norms, packing", ["packing", "norms"]),
        ("packing,row_attention", ["packing", "row_attention"]),
        ("no-gates", [name for name in NAMES if name != "gates"]),
        ("no-packing,no-onednn", ["last_token", "skip_unneeded", "norms", "gates"]),
    ],
)
def test_a_choice_stands_for_names(wanted: str, names: list[str]) -> None:
    """Without packing, rows are not attended one by one; without oneDNN, it needs no copies of weights."""
    assert list(chosen(wanted)) == names
    assert list(chosen(TrainSettings(accelerations=wanted).accelerations)) == names


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (
            "pack",
            "found 'pack', expected auto, none, or names, each or none with no- before it: packing, row_attention",
        ),
        ("no_packing", "did you mean 'no-packing'"),
        ("", "found ''"),
        ("packing,", "found ''"),
        ("auto,packing", "found 'auto' beside other names"),
        ("no-none", "found 'no-none'"),
        ("no-packing,norms", "found 'norms' beside names with no-"),
        ("prepacked_weights,norms", "add onednn"),
        (False, "found False, expected auto, none, or a list of names"),
        ([1], "found [1]"),
        (None, "found None"),
    ],
)
def test_another_choice_is_told(value: Any, says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainSettings.model_validate({"accelerations": value})
    (error,) = caught.value.errors()
    assert says in error["msg"] and "\n" not in error["msg"]


def test_a_recipe_may_list_them() -> None:
    settings = TrainSettings.model_validate({"accelerations": ["no-packing", "no-norms"]})
    assert settings.accelerations == "no-packing,no-norms"
    assert TrainSettings.model_validate(settings.model_dump()) == settings


def test_they_are_the_whole_runs() -> None:
    """One model has them for all jobs that share it."""
    jobs = [Job(name, tz.LoRA(r=2), TrainSettings(epochs=1, accelerations=name)) for name in ("none", "norms")]
    with JobScheduler(tiny("llama", num_labels=2), task()) as scheduler:
        for added in (jobs, jobs[::-1]):
            with pytest.raises(TanzakuError, match="give all of them the same"):
                scheduler.add(added)
        scheduler.add(jobs[:1])
        with pytest.raises(TanzakuError, match="'none' and 'norms'"):
            scheduler.add(jobs[1:])
    with pytest.raises(ValidationError, match="accelerations go into the recipe's train section"):
        MethodEntry.model_validate({"lora": {}, "train": {"accelerations": "none"}})


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("wanted", ["auto", "no-norms", "no-packing", "none"])
def test_training_and_evaluation_follow(
    wanted: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a pass of the model is in, in training mode and in evaluation, in this process and in workers of it."""
    notes = tmp_path / "notes"

    def noting(batch: Any) -> Any:
        def noted(self: Any, layout: Any, route: Any) -> Any:
            with notes.open("a", encoding="ascii") as out:
                out.write(f"{self.name} {layout.packed} {self.base.model.training}\n")
            return batch(self, layout, route)

        return noted

    model = tiny("llama", num_labels=2)
    assert Packing(Common(Base.of(model))).possible  # which is tried once
    for kind in (FrozenNorms, Packing):
        monkeypatch.setattr(kind, "batch", noting(kind.batch))
    jobs = [Job(f"lora{n}", tz.LoRA(r=2), TrainSettings(epochs=1, seed=n, accelerations=wanted)) for n in range(2)]
    results = train_jobs(model, task(), jobs, workers=workers)
    assert [result.status for result in results] == ["done", "done"]
    assert all(result.train_settings["accelerations"] == wanted for result in results)
    lines = set(notes.read_text(encoding="ascii").splitlines()) if notes.exists() else set()
    packed = "packing" in chosen(wanted)
    assert lines == {
        f"{name} {packed} {training}" for name in {"packing", "norms"} & {*chosen(wanted)} for training in (True, False)
    }


def test_a_model_is_free_of_what_was_chosen_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is entered has all of them; the first jobs say which of them stay."""
    model = tiny("llama", num_labels=2)
    with step.SharedStep(model, task().task, 0) as shared:
        assert any("forward" in module.__dict__ for module in model.modules())
        shared.accelerate("gates")
        assert sum("forward" in module.__dict__ for module in model.modules()) == 2
        shared.accelerate("none")
        assert not any("forward" in module.__dict__ for module in model.modules())
        shared.accelerate("gates")
        assert sum("forward" in module.__dict__ for module in model.modules()) == 2
    assert not any("forward" in module.__dict__ for module in model.modules())
