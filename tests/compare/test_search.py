"""The search of an entry's settings: what it draws, what it forgets in a kill (nothing), and who goes on at a rung."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from tanzaku.compare import search as module
from tanzaku.compare.candidates import Searched
from tanzaku.compare.search import Outcome, Search, Trial, direction, rungs, survivors
from tanzaku.core.space import Choice, Range, Spaces
from tanzaku.errors import TanzakuError
from tanzaku.methods import METHODS
from tanzaku.recipe.comparison import CompareSettings
from tanzaku.tasks.classification import Classification
from tanzaku.tasks.task import metric_named
from tanzaku.train.settings import TrainSettings

LORA = METHODS["lora"]
SPACE: Spaces = {"r": Choice((8, 1, 4)), "bias": Choice(("none", "all")), "learning_rate": Range(1e-4, 1e-2, log=True)}
SMALL: Spaces = {"r": Choice((4, 1)), "lora_alpha": Choice((2.0, 8.0)), "use_rslora": Choice((True, False))}


def entry(space: Spaces = SPACE, trials: int = 7, name: str = "lora") -> Searched:
    return Searched(name, LORA(), TrainSettings(), space, trials)


def opened(storage: Path | None = None, searched: Searched | None = None, seed: int = 0, **settings: Any) -> Search:
    found = CompareSettings.model_validate({"wave": 3, **settings})
    return Search(searched or entry(), storage, seed, found, metric_named(Classification, found.rank_by or "roc_auc"))


def outcome(trial: Trial) -> Outcome:
    """How a trial ends: one in a while fails, many are stopped, the others get better the nearer they are to 1e-3."""
    figure = 1 - abs(math.log10(trial.candidate.settings.learning_rate) + 3) / 4
    if trial.slot % 5 == 3:
        return Outcome("failed", [figure, math.nan])
    return Outcome("stopped", [figure / 2]) if trial.slot % 3 == 1 else Outcome("done", [figure / 2, figure])


def finished(search: Search, judge: Callable[[Trial], Outcome] = outcome) -> list[list[str]]:
    """Run the search to its end; the names of each wave."""
    waves = []
    while wave := search.wave():
        waves.append([trial.name for trial in wave])
        search.tell({trial.name: judge(trial) for trial in wave})
    return waves


def drawn(search: Search) -> list[dict[str, Any]]:
    return [dict(told.trial.candidate.drawn) for told in search.told()]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """What is written outlives a process all the same; only a power cut could undo it."""

    def hurry(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", hurry)
    yield
    sqlalchemy.event.remove(sqlalchemy.Engine, "connect", hurry)


# -- what is drawn


def test_a_search_from_end_to_end() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # optuna's word for what it may change is a warning
        search = opened()
        waves = finished(search)
    assert [len(wave) for wave in waves] == [3, 3, 1] and search.wave() == []
    names = [name for wave in waves for name in wave]
    assert [name.split("-")[1] for name in names] == [f"s{n:02}" for n in range(1, 8)]
    told = search.told()
    assert [t.trial.name for t in told] == names
    assert [t.status for t in told] == ["done", "stopped", "done", "failed", "stopped", "done", "done"]
    assert [t.epochs for t in told] == [2, 1, 2, 2, 1, 2, 2]
    assert [t.value is None for t in told] == [False, False, False, True, False, False, False]
    for t in told:
        candidate = t.trial.candidate
        assert candidate.name == t.trial.name and (candidate.origin, candidate.entry) == ("search", "lora")
        assert list(candidate.drawn) == list(SPACE)
        assert candidate.drawn["r"] in (1, 4, 8) and candidate.drawn["bias"] in ("none", "all")
        assert 1e-4 <= candidate.settings.learning_rate <= 1e-2
        assert candidate.settings.learning_rate == candidate.drawn["learning_rate"]
        assert candidate.method == LORA(r=candidate.drawn["r"], bias=candidate.drawn["bias"])


def test_draws_depend_on_the_seed_and_the_entry_and_what_was_told() -> None:
    def draws(judge: Callable[[Trial], Outcome] = outcome, name: str = "lora", **options: Any) -> list[Any]:
        search = opened(searched=entry(name=name, trials=6), **options)
        finished(search, judge)
        return drawn(search)

    first = draws()
    assert draws() == first
    assert draws(seed=1)[:3] != first[:3] and draws(name="other")[:3] != first[:3]
    informed = draws(lambda trial: Outcome("done", [trial.candidate.settings.learning_rate]))
    assert informed[:3] == first[:3] and informed[3:] != first[3:]


def test_numbers_are_drawn_as_neighbours_in_whatever_order_they_stand() -> None:
    points = []
    for values in ((1, 4, 8, 16), (16, 1, 8, 4)):
        search = opened(searched=entry({"r": Choice(values), "learning_rate": SPACE["learning_rate"]}))
        finished(search)
        points.append(drawn(search))
    assert points[0] == points[1]


def test_one_trial_may_not_know_of_another_in_its_wave() -> None:
    # What is drawn beside is known to the draw, what came of it is not: a wave is drawn before any of it is run.
    search = opened(wave=7)
    assert len(search.wave()) == 7


def test_whole_numbers_and_orders_of_magnitude() -> None:
    space: Spaces = {"r": Range(2, 9), "lora_alpha": Range(1, 1000, log=True), "learning_rate": Range(0.1, 0.2)}
    search = opened(searched=entry(space, trials=12))
    finished(search)
    for point in drawn(search):
        assert isinstance(point["r"], int) and 2 <= point["r"] <= 9
        assert isinstance(point["lora_alpha"], int) and 1 <= point["lora_alpha"] <= 1000
        assert isinstance(point["learning_rate"], float) and 0.1 <= point["learning_rate"] <= 0.2


@pytest.mark.parametrize("redraws", [module._REDRAWS, 1, 0])
def test_no_point_is_drawn_twice_and_a_small_space_ends(redraws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REDRAWS", redraws)
    search = opened(searched=entry(SMALL, trials=50))
    waves = []
    while wave := search.wave():
        waves.append(wave)
        # A draw that was not taken counts for nothing.
        assert sum(not trial.state.is_finished() for trial in search._study.trials) == len(wave)
        search.tell({trial.name: Outcome("done", [float(trial.slot)]) for trial in wave})
    assert [len(wave) for wave in waves] == [3, 3, 2]
    assert len({tuple(point.values()) for point in drawn(search)}) == 8
    again = opened(searched=entry({"r": Choice((4,))}))
    assert [len(wave) for wave in finished(again, lambda _: Outcome("done", [1.0]))] == [1]


def test_a_long_range_of_whole_numbers_is_not_counted_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REDRAWS", 0)
    search = opened(searched=entry({"r": Range(1, 10**12), "lora_alpha": Choice((1.0, 2.0))}, trials=5))
    finished(search, lambda _: Outcome("done", [1.0]))
    assert drawn(search) == [
        {"r": r, "lora_alpha": alpha} for r, alpha in [(1, 1.0), (1, 2.0), (2, 1.0), (2, 2.0), (3, 1.0)]
    ]


# -- what is told


def test_a_wave_stays_the_same_until_it_is_told(tmp_path: Path) -> None:
    search = opened(tmp_path / "s.db")
    wave = search.wave()
    assert search.wave() == wave
    again = opened(tmp_path / "s.db")
    assert again.wave() == wave == search.wave()
    ends = {trial.name: outcome(trial) for trial in wave}
    again.tell(ends)
    told = again.told()
    again.tell({name: Outcome("done", [9.0]) for name in ends})  # too late: it is told already
    assert again.told() == told
    following = search.wave()
    assert not {trial.name for trial in following} & ends.keys()
    again.tell(ends | {trial.name: outcome(trial) for trial in following})
    assert [t.trial for t in opened(tmp_path / "s.db").told()] == wave + following


def test_a_wave_is_told_as_a_whole() -> None:
    search = opened()
    wave = search.wave()
    ends = {trial.name: outcome(trial) for trial in wave}
    with pytest.raises(ValueError, match=f"{wave[1].name}.* missing"):
        search.tell({name: end for name, end in ends.items() if name != wave[1].name})
    with pytest.raises(ValueError, match="stranger"):
        search.tell(ends | {"stranger": Outcome("failed")})
    assert search.told() == [] and search.wave() == wave


def test_searches_share_a_file(tmp_path: Path) -> None:
    one, two = (opened(tmp_path / "s.db", entry(name=name)) for name in ("one", "two"))
    finished(one)
    assert two.told() == [] and len(finished(two)) == 3
    assert [t.trial.name.split("-")[0] for t in one.told() + two.told()] == ["one"] * 7 + ["two"] * 7


def test_optuna_hears_of_stopped_and_failed_trials() -> None:
    search = opened()
    finished(search)
    found = [t for t in search._study.trials if "slot" in t.user_attrs]
    states = {"done": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.PRUNED}
    assert [t.state for t in found] == [states[told.status] for told in search.told()]
    assert [len(t.intermediate_values) for t in found] == [2, 1, 2, 0, 1, 2, 2]
    assert [t.value for t in found if t.state is TrialState.COMPLETE] == [
        told.value for told in search.told() if told.status == "done"
    ]


def told_in_one_wave(ends: list[Outcome], **settings: Any) -> Search:
    search = opened(searched=entry(trials=len(ends)), wave=len(ends), **settings)
    search.tell({trial.name: end for trial, end in zip(search.wave(), ends, strict=True)})
    return search


def slots(search: Search, keep: int) -> list[int]:
    order = [told.trial.candidate for told in search.told()]
    return [order.index(candidate) for candidate in search.best(keep)]


ENDS = [
    Outcome("stopped", [0.99]),
    Outcome("done", [0.9, 0.5]),
    Outcome("failed", [1.0, 1.0]),
    Outcome("done", [0.1, 0.7]),
    Outcome("stopped", [0.1, 0.2]),
    Outcome("done", [0.9, math.nan]),
    Outcome("done", [0.2, 0.3], value=0.6),
]


def test_the_best_ran_to_the_end() -> None:
    search = told_in_one_wave(ENDS)
    assert slots(search, 10) == [3, 6, 1, 4, 0]
    assert slots(search, 1) == [3] and slots(search, 2) == [3, 6]
    assert slots(told_in_one_wave(ENDS, rank_by="loss"), 10) == [1, 6, 3, 4, 0]
    assert told_in_one_wave([Outcome("failed"), Outcome("done", [math.inf]), Outcome("done")]).best(3) == []


def test_equal_figures_are_in_the_order_of_slots() -> None:
    assert slots(told_in_one_wave([Outcome("done", [0.5])] * 4), 4) == [0, 1, 2, 3]


def test_a_search_finds_what_is_good() -> None:
    search = opened(searched=entry(METHODS["lora"].space, trials=24), wave=8)
    finished(search, lambda t: Outcome("done", [-abs(math.log10(t.candidate.settings.learning_rate) + 3)]))
    (best,) = search.best(1)
    assert 8e-4 < best.settings.learning_rate < 1.25e-3


# -- files that are none of ours


def test_another_search_of_that_name(tmp_path: Path) -> None:
    opened(tmp_path / "s.db").wave()
    opened(tmp_path / "s.db", entry(trials=9))  # more of the same
    others: list[tuple[str, dict[str, Any]]] = [
        ("seed", {"seed": 1}),
        ("wave", {"wave": 4}),
        ("rank_by", {"rank_by": "accuracy"}),
        ("space", {"searched": entry(SMALL)}),
        ("settings", {"searched": Searched("lora", LORA(lora_alpha=3), TrainSettings(), SPACE, 7)}),
        ("train", {"searched": Searched("lora", LORA(), TrainSettings(epochs=3), SPACE, 7)}),
    ]
    for key, options in others:
        with pytest.raises(TanzakuError, match=f"a search of 'lora' with another {key}: found .*--out"):
            opened(tmp_path / "s.db", **options)


def test_files_that_are_no_search(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database " * 100, encoding="utf-8")
    with pytest.raises(TanzakuError, match=r"text is no search to go on with: .*not a database"):
        opened(tmp_path / "text")
    with pytest.raises(TanzakuError, match="no search to go on with"):
        opened(tmp_path)
    with pytest.raises(TanzakuError, match=r"cannot write .*--out"):
        opened(tmp_path / "text" / "s.db")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optuna.storages._rdb.storage.time.sleep", lambda _: None)  # it tries again for seconds
    finished(opened(tmp_path / "s.db", entry(trials=3)))
    before = opened(tmp_path / "s.db").told()

    def small(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA max_page_count=1")  # as many as it has

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", small)
    try:
        with pytest.raises(TanzakuError, match=r"cannot write .*s.db: .*disk is full"):
            finished(opened(tmp_path / "s.db", entry(trials=10**4), wave=3))
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "connect", small)
    assert opened(tmp_path / "s.db").told()[:3] == before


def test_a_path_may_have_any_characters(tmp_path: Path) -> None:
    path = tmp_path / "100% {sure}? #短冊" / "s.db"
    finished(opened(path))
    assert len(opened(path).told()) == 7 and [file.name for file in path.parent.iterdir()] == ["s.db"]


# -- kills


class Killed(BaseException):
    """Passes every handler, as a kill does."""


@contextmanager
def killed_at(write: int, kill: Callable[[], Any]) -> Iterator[list[int]]:
    """Call `kill` before the given lasting write of any database, counted from 1; the list's item counts them.

    What had a database open is closed in the end, so that it holds no lock, as if its process were gone.
    """
    count = [0]
    opened: dict[int, Any] = {}

    def lasting() -> None:
        count[0] += 1
        if count[0] == write:
            kill()

    def before(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        opened[id(cursor.connection)] = cursor.connection
        if statement.lstrip().startswith("CREATE"):  # lasts at once: sqlite3 opens no transaction for it
            lasting()
        elif not statement.lstrip().startswith(("SELECT", "PRAGMA")):
            connection.info["wrote"] = True

    def commit(connection: Any) -> None:
        if connection.info.pop("wrote", False):
            lasting()

    events = (("before_cursor_execute", before), ("commit", commit))
    for name, listener in events:
        sqlalchemy.event.listen(sqlalchemy.Engine, name, listener)
    try:
        yield count
    finally:
        for name, listener in events:
            sqlalchemy.event.remove(sqlalchemy.Engine, name, listener)
        for connection in opened.values():
            connection.close()


def die() -> None:
    raise Killed


KILLED: dict[str, Any] = {"searched": entry(SMALL | {"learning_rate": SPACE["learning_rate"]}, trials=4), "wave": 2}
DISCRETE: dict[str, Any] = {"searched": entry({"r": Choice((1, 4, 8))}, 9), "wave": 2}


def ended(search: Search) -> tuple[Any, ...]:
    trials = [t for t in search._study.trials if "slot" in t.user_attrs]
    return search.told(), search.best(5), [(t.params, t.intermediate_values, t.state, t.values) for t in trials]


@pytest.mark.slow
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.product)])
@pytest.mark.parametrize("options", [KILLED, DISCRETE], ids=["ranges", "redraws"])
def test_a_kill_at_any_write_changes_nothing(
    tmp_path: Path, options: dict[str, Any], every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_REDRAWS", 2)
    judge = outcome if options is KILLED else lambda trial: Outcome("done", [float(-trial.slot)])
    whole = opened(tmp_path / "whole.db", **options)
    with killed_at(0, die) as writes:
        finished(opened(tmp_path / "counted.db", **options), judge)
    finished(whole, judge)
    assert writes[0] > 30
    for write in range(1, writes[0] + 1, every):
        path = tmp_path / f"{write}.db"
        with pytest.raises(Killed), killed_at(write, die):
            finished(opened(path, **options), judge)
        with pytest.raises(Killed), killed_at(2, die):  # and again, soon after it was taken up
            finished(opened(path, **options), judge)
            die()
        search = opened(path, **options)
        finished(search, judge)
        assert ended(search) == ended(whole), f"killed before write {write}"


@pytest.mark.slow
@pytest.mark.parametrize("write", [5, pytest.param(45, marks=pytest.mark.product)])
def test_a_process_that_is_killed(tmp_path: Path, write: int) -> None:
    path = tmp_path / "s.db"
    code = f"""
import os, signal, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from pathlib import Path
from test_search import KILLED, finished, killed_at, opened
with killed_at({write}, lambda: os.kill(os.getpid(), signal.SIGKILL)):
    finished(opened(Path({str(path)!r}), **KILLED))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL, done.stderr
    search, whole = opened(path, **KILLED), opened(None, **KILLED)
    finished(search)
    finished(whole)
    assert ended(search) == ended(whole)


# -- successive halving


@pytest.mark.parametrize(
    ("epochs", "reduction", "found"),
    [(10, 3, [1, 3, 9]), (9, 3, [1, 3]), (1, 2, []), (2, 2, [1]), (8, 2, [1, 2, 4]), (3, 10, [1])],
)
def test_rungs(epochs: int, reduction: int, found: list[int]) -> None:
    assert rungs(epochs, reduction) == found


@given(st.integers(1, 500), st.integers(2, 9))
def test_rungs_lie_before_the_end(epochs: int, reduction: int) -> None:
    found = rungs(epochs, reduction)
    assert all(epoch < epochs for epoch in found) and found == sorted(set(found))
    assert not found or found[-1] * reduction >= epochs


@settings(deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=14, unique=True), st.integers(2, 5), st.booleans())
def test_a_rung_lets_the_best_pass(figures: list[int], reduction: int, minimize: bool) -> None:
    values = {f"t{at}": figure / 7 for at, figure in enumerate(figures)}
    order = sorted(values, key=lambda name: values[name], reverse=not minimize)
    expected = set(order[: max(1, len(order) // reduction)])
    assert survivors(values, reduction, "minimize" if minimize else "maximize") == expected
    assert survivors(dict(reversed(values.items())), reduction, "minimize" if minimize else "maximize") == expected


def test_directions() -> None:
    found = {metric.name: direction(metric) for metric in Classification.metrics}
    assert found.pop("loss") == "minimize"
    assert found == dict.fromkeys(("roc_auc", "accuracy", "macro_f1"), "maximize")


_FIGURES = st.dictionaries(
    st.sampled_from("abcdefgh"), st.sampled_from([0.1, 0.2, 0.3, math.nan, math.inf, -math.inf]), min_size=1
)


@settings(deadline=None)
@given(_FIGURES, st.integers(2, 4), st.booleans())
def test_ties_and_figures_that_are_none(values: dict[str, float], reduction: int, minimize: bool) -> None:
    found = survivors(values, reduction, "minimize" if minimize else "maximize")
    assert found <= values.keys() and len(found) >= 1
    sign = 1 if minimize else -1
    cost = {name: math.inf if math.isnan(value) else sign * value for name, value in values.items()}
    assert max(cost[name] for name in found) <= min((cost[n] for n in values.keys() - found), default=math.inf)
    assume(not all(map(math.isnan, values.values())))
    assert not any(math.isnan(values[name]) for name in found)
    if len(set(cost.values())) == len(cost):
        assert len(found) == max(1, len(values) // reduction)


def test_equal_figures_go_on_together() -> None:
    assert survivors(dict.fromkeys("abcdef", 0.5), 3, "maximize") == set("abcdef")
    assert survivors({"a": 0.9, "b": 0.5, "c": 0.5, "d": 0.5}, 2, "maximize") == set("abcd")
    assert survivors({"a": 0.9, "b": 0.8, "c": 0.5, "d": 0.5}, 2, "maximize") == set("ab")
    assert survivors({"a": math.nan, "b": math.nan}, 3, "minimize") == {"a", "b"}
    assert survivors({}, 3, "minimize") == set()
