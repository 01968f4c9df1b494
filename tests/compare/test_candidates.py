"""From a recipe's entries to candidates: written out, from grids, and for a search."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import tanzaku as tz
from models import NEEDED, config_of, tiny
from tanzaku.compare import candidates as module
from tanzaku.compare.candidates import Candidate, Searched, expand, slug
from tanzaku.core.space import Choice, Grid, Range, ends, space_of
from tanzaku.errors import TanzakuError
from tanzaku.methods import METHODS
from tanzaku.recipe.comparison import CompareSettings
from tanzaku.recipe.schema import MethodEntry
from tanzaku.recipe.yaml import parse_yaml
from tanzaku.train.settings import TrainSettings


def expanded(text: str, train: Any = None, **settings: Any) -> tuple[list[Candidate], list[Searched]]:
    """What becomes of the `methods` of a recipe."""
    entries = [MethodEntry.model_validate(item) for item in parse_yaml(text, "methods")]
    return expand(entries, TrainSettings.model_validate(train or {}), CompareSettings.model_validate(settings))


def names(candidates: list[Candidate]) -> list[str]:
    return [candidate.name for candidate in candidates]


def space_in(text: str, **options: Any) -> Any:
    return space_of(parse_yaml(text, "value"), **options)


# -- spaces as they are written

SPACES = [
    ("{grid: [1, 4, 16]}", Grid((1, 4, 16))),
    ("{choice: [none, all]}", Choice(("none", "all"))),
    ("{low: 1e-4, high: 1e-2, log: true}", Range(1e-4, 1e-2, log=True)),
    ("{low: '1e-4', high: 1, log: no}", Range(1e-4, 1)),
    ("{high: 8, low: 1}", Range(1, 8)),
    ("{low: '1', high: '8'}", Range(1, 8)),
    ("{grid: [[q_proj], null, true, 1]}", Grid((["q_proj"], None, True, 1))),
]


@pytest.mark.parametrize(("text", "space"), SPACES, ids=[text for text, _ in SPACES])
def test_spaces(text: str, space: Any) -> None:
    found = space_in(text)
    assert found == space and type(found) is type(space)
    assert space_of(found.written()) == space


def test_plain_values_are_no_spaces() -> None:
    for text in ("4", "1e-4", "grid", "[1, 4]", "[{grid: [1]}]", "null"):
        assert space_in(text) is None


def test_whole_numbers_are_drawn_between_whole_numbers() -> None:
    assert Range(1, 8).integer and Range(1, 8).size == 8
    assert not Range(1, 8.5).integer and Range(1.0, 8.0).size == float("inf")
    assert ends(Range(1, 8)) == (1, 8) and ends(Choice((3, 1))) == (3, 1) and ends("x") == ("x",)


BAD_SPACES = [
    ("{grid: []}", ["grid is empty", "[1, 4, 16]"]),
    ("{choice: 4}", ["choice is 4", "a list"]),
    ("{grid: [1, 4, 1]}", ["grid has 1 twice"]),
    ("{low: 4, high: 4}", ["low is 4 and high is 4", "low below high"]),
    ("{low: 4, high: 1}", ["low is 4 and high is 1", "low below high"]),
    ("{low: 0, high: 1, log: true}", ["log is on and low is 0", "above 0"]),
    ("{low: 1}", ["low alone", "expected low and high"]),
    ("{high: 1, log: true}", ["high alone", "expected low and high"]),
    ("{low: 1, hi: 4}", ["'hi'", "did you mean 'high'"]),
    ("{gird: [1, 4]}", ["'gird'", "did you mean 'grid'"]),
    ("{grid: [1], log: true}", ["found grid, log", "{grid: [1, 4]}"]),
    ("{grid: [1], choice: [1]}", ["found grid, choice"]),
    ("{log: true}", ["found log"]),
    ("{}", ["found no key"]),
    ("{low: 1, high: 4, log: 10}", ["log is 10", "true or false"]),
    ("{low: x, high: 4}", ["low is 'x'", "a number"]),
    ("{low: true, high: 4}", ["low is True", "a number"]),
    ("{low: 1, high: .inf}", ["high is inf", "a number"]),
    ("{low: [1], high: 4}", ["low is [1]", "a number"]),
]


@pytest.mark.parametrize(("text", "says"), BAD_SPACES, ids=[text for text, _ in BAD_SPACES])
def test_bad_spaces(text: str, says: list[str]) -> None:
    for where in ("lora: {r: %s}", "lora: {}, train: {learning_rate: %s}"):
        with pytest.raises(TanzakuError) as caught:
            expanded(f"[{{{where % text}}}]")
        for part in ("candidate 'lora': ", *says):
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)


def test_settings_that_are_mappings_stay_what_they_are() -> None:
    for written in ({"low": 4}, {"low": 4, "high": 8}, {"grid": 4}, {"q_proj": 4}, {}):
        (found,), _ = expanded(f"[lora: {{rank_pattern: {written}}}]")
        assert found.method.settings()["rank_pattern"] == written
    found, _ = expanded("[lora: {rank_pattern: {grid: [{q_proj: 4}, {v_proj: 4}]}}]")
    assert [c.method.settings()["rank_pattern"] for c in found] == [{"q_proj": 4}, {"v_proj": 4}]


_PLAIN = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(-9, 9), st.text("a1-./_", max_size=3))
_KEYS = st.sampled_from(["grid", "choice", "low", "high", "log", "hi", "r"])


@settings(deadline=None)
@given(st.dictionaries(_KEYS, st.one_of(_PLAIN, st.lists(_PLAIN, max_size=3)), max_size=4), st.booleans())
def test_a_mapping_is_a_space_or_an_error_that_says_why(value: dict[str, Any], mapping: bool) -> None:
    try:
        found = space_of(value, mapping=mapping)
    except TanzakuError as error:
        assert "\n" not in str(error) and ("expected" in str(error) or "found" in str(error))
        return
    assert found is not None or mapping
    if found is not None:
        assert space_of(found.written()) == found


# -- candidates


def test_entries_without_a_space_are_candidates_as_written() -> None:
    found, searched = expanded("[lora, {lora: {r: 2}, name: two, train: {epochs: 1}}, ia3]", {"epochs": 3})
    assert names(found) == ["lora", "two", "ia3"] and not searched
    assert [c.settings.epochs for c in found] == [3, 1, 3]
    assert [(c.origin, c.entry, c.drawn) for c in found] == [("recipe", name, {}) for name in names(found)]
    assert found[1].method == tz.LoRA(r=2)


def test_a_grid_is_the_product_of_its_values() -> None:
    found, searched = expanded(
        "[{lora: {r: {grid: [1, 4]}, lora_alpha: 2}, train: {learning_rate: {grid: [1e-3, '3e-4']}}}, head]"
    )
    assert names(found) == ["lora-r1-lr1e-3", "lora-r1-lr3e-4", "lora-r4-lr1e-3", "lora-r4-lr3e-4", "head"]
    assert [(c.method.settings()["r"], c.settings.learning_rate) for c in found[:4]] == [
        (1, 1e-3),
        (1, 3e-4),
        (4, 1e-3),
        (4, 3e-4),
    ]
    assert {c.method.settings()["lora_alpha"] for c in found[:4]} == {2}
    assert found[1].drawn == {"r": 1, "learning_rate": 3e-4} and found[1].origin == "grid" and found[1].entry == "lora"
    assert not searched


def test_names_of_a_grid_keep_clear_of_given_ones() -> None:
    found, _ = expanded("[lora: {r: {grid: [1, 4]}}, {ia3: {}, name: lora-r1}, {lora: {r: {grid: [8, 9]}}, name: x}]")
    assert names(found) == ["lora-r1-2", "lora-r4", "lora-r1", "x-r8", "x-r9"]


SLUGS = [
    ({"r": 4, "learning_rate": 1e-3}, "r4-lr1e-3"),
    ({"learning_rate": 0.0012, "batch_size": 1000}, "lr1_2e-3-bs1000"),
    ({"target_r": 0.5, "init_r": 2}, "tr0_5-ir2"),
    ({"lora_dropout": 0.05, "lora_alpha": 16.0}, "ld0_05-la16"),
    ({"lora_dropout": 0.5, "learning_decay": 0.5}, "lora_dropout0_5-learning_decay0_5"),
    ({"use_rslora": True, "bias": "lora_only", "target_modules": None}, "ur-on-bias-lora_only-tm-None"),
    ({"target_modules": ["q_proj", "v"]}, "tm-q_proj_v"),
    ({"r": -1, "lora_alpha": 1e6}, "r--1-la1e6"),
    ({"init_weights": "ゼロ"}, "iw-none"),
]


@pytest.mark.parametrize(("drawn", "name"), SLUGS)
def test_slugs(drawn: dict[str, Any], name: str) -> None:
    assert slug(drawn) == name


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["r", "lora_alpha", "bias", "train_on"]), _PLAIN, min_size=1))
def test_a_slug_fits_an_adapters_name(drawn: dict[str, Any]) -> None:
    assert re.fullmatch("[A-Za-z0-9_-]{1,60}", slug(drawn)) and re.fullmatch("[A-Za-z0-9_-]{1,60}", slug(drawn, 2))


def test_values_are_those_of_the_settings_type() -> None:
    (found,), _ = expanded("[lora: {r: {grid: ['4']}, lora_alpha: {grid: [4]}}]")
    assert found.drawn == {"r": 4, "lora_alpha": 4.0} and isinstance(found.drawn["lora_alpha"], float)
    # Whole bounds do not make a setting whole that takes fractions, and the other way round.
    _, (search,) = expanded("[{lora: {r: {low: 1.0, high: 8}}, train: {weight_decay: {low: 0, high: 1}}}]")
    assert search.space["r"].size == 8 and search.space["weight_decay"].size == float("inf")


REFUSED = [
    ("[lora: {r: {grid: [1, four]}}]", ["candidate 'lora'", "r is 'four'", "a valid integer"]),
    ("[lora: {r: {choice: [1, four]}}]", ["candidate 'lora'", "r is 'four'", "a valid integer"]),
    ("[lora: {r: {low: 0.5, high: 4}}]", ["candidate 'lora'", "r is 0.5", "a valid integer"]),
    ("[lora: {r: {grid: [4, '4']}}]", ["candidate 'lora': r: grid has 4 twice"]),
    ("[lora: {bias: {low: 1, high: 4}}]", ["candidate 'lora'", "bias is 1", "text"]),
    ("[lora: {use_rslora: {low: 0, high: 1}}]", ["use_rslora: low is False", "a number"]),
    ("[{lora: {}, train: {epochs: {grid: [0, 1]}}}]", ["candidate 'lora'", "epochs is 0"]),
    ("[{lora: {}, train: {learning_rate: {low: -1, high: 1}}}]", ["learning_rate is -1", "greater than 0"]),
    ("[lora: {rr: {grid: [1, 4]}}]", ["no setting 'rr'", "did you mean 'r'"]),
    ("[lorra: {r: {grid: [1, 4]}}]", ["unknown method 'lorra'"]),
    ("[lora, lora]", ["'lora' and 'lora-2' are the same"]),
    ("[lora: {r: {grid: [1, 8]}}, {lora: {}, name: mine}]", ["'lora-r8' and 'mine' are the same"]),
    ("[lora: {r: {choice: [1, 8]}}, lora: {r: {choice: [1, 8]}}]", ["'lora' and 'lora-2' are the same"]),
    ("[lora: {r: {low: 1, high: 8}}, {ia3: {}, name: lora-s01}]", ["named 'lora-s01'", "trials of 'lora'"]),
    (
        f"[lora: {{r: {{grid: {list(range(1, 41))}}}, lora_alpha: {{grid: {list(range(1, 27))}}}}}]",
        ["'lora'", "1,040 candidates", "1,000 or fewer", "choice"],
    ),
]


@pytest.mark.parametrize(("text", "says"), REFUSED, ids=[text[:50] for text, _ in REFUSED])
def test_refused(text: str, says: list[str]) -> None:
    with pytest.raises(TanzakuError) as caught:
        expanded(text)
    for part in says:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_grid_may_have_a_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_GRID", 6)
    text = "[lora: {r: {grid: [1, 2, 3]}, lora_alpha: {grid: %s}}]"
    assert len(expanded(text % [1, 2])[0]) == 6
    with pytest.raises(TanzakuError, match="9 candidates, expected 6"):
        expanded(text % [1, 2, 3])


# -- what is searched


def test_ranges_are_searched_and_grids_beside_them_are_choices() -> None:
    found, (search,) = expanded(
        "[{lora: {r: {grid: [1, 4]}, lora_alpha: 2}, train: {learning_rate: {low: 1e-4, high: 1e-2}}}, lora: {r: 2}]"
    )
    assert names(found) == ["lora-2"]
    assert (search.name, search.trials) == ("lora", 16)
    assert search.space == {"r": Choice((1, 4)), "learning_rate": Range(1e-4, 1e-2)}
    drawn = search.candidate({"r": 4, "learning_rate": 2e-3}, "lora-s01")
    assert drawn.method == tz.LoRA(r=4, lora_alpha=2) and drawn.settings.learning_rate == 2e-3
    assert (drawn.origin, drawn.entry, drawn.drawn) == ("search", "lora", {"r": 4, "learning_rate": 2e-3})
    assert search.method == tz.LoRA(lora_alpha=2)  # drawing leaves the entry's own method alone


def test_trials_search_what_an_entry_leaves_open() -> None:
    text = (
        "[lora, {lora: {r: 2}}, {lora: {}, train: {learning_rate: 1e-3}}, {ia3: {}, train: {learning_rate: 1e-3}}, "
        "{lora: {lora_alpha: {choice: [1, 2]}, r: {low: 2, high: 3}}, name: own}, "
        "{ia3: {}, name: grid, train: {learning_rate: {grid: [3e-3, 2e-3]}}}, "
        "{lora: {r: {grid: [5, 6]}}, name: both}]"
    )
    found, searched = expanded(text, {"learning_rate": 1e-3}, trials=5)
    default = METHODS["lora"].space
    rate = default["learning_rate"]
    assert names(found) == ["ia3", "grid-lr3e-3", "grid-lr2e-3"]
    assert {s.name: dict(s.space) for s in searched} == {
        "lora": dict(default),
        "lora-2": {"learning_rate": rate},  # the run's own learning rate is a default for all, and no choice of one
        "lora-3": {"r": default["r"]},
        "own": {"lora_alpha": Choice((1.0, 2.0)), "r": Range(2, 3), "learning_rate": rate},
        "both": {"r": Choice((5, 6)), "learning_rate": rate},
    }
    assert {s.trials for s in searched} == {5}
    assert searched[2].train.learning_rate == 1e-3


def test_without_trials_only_ranges_are_searched() -> None:
    found, searched = expanded("[lora, ia3, {lora: {r: {choice: [1, 2]}}, name: r}]")
    assert names(found) == ["lora", "ia3"]
    assert [(s.name, s.trials, dict(s.space)) for s in searched] == [("r", 16, {"r": Choice((1, 2))})]


# -- the methods' own spaces


@pytest.mark.parametrize("name", METHODS)
def test_a_default_space_names_settings(name: str) -> None:
    method = METHODS[name]
    own = {field.name for field in dataclasses.fields(method)}
    assert not own & TrainSettings.model_fields.keys()  # one name means one setting
    assert "learning_rate" in method.space and len(method.space) <= 3
    assert method.space.keys() <= own | TrainSettings.model_fields.keys()
    for key, space in method.space.items():
        assert isinstance(space, Choice | Range)
        text = {"low": 1, "high": 2} if isinstance(space, Range) else {"grid": list(space.values)}
        entry: dict[str, Any] = {name: {key: text}} if key in own else {name: {}, "train": {key: text}}
        entry |= {"uses": {"a": ".", "b": "."}} if method.uses_others else {}
        expand([MethodEntry.model_validate(entry)], TrainSettings(), CompareSettings())


@pytest.fixture(scope="module", params=["llama", "bert"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config_of(request.param))


# Settings beside which the default space must be valid at every corner.
BESIDE = [(name, NEEDED.get(name, {})) for name, method in METHODS.items() if not method.uses_others]
BESIDE += [("adalora", {"init_r": init_r}) for init_r in (1, 2, 8, 20, {"choice": [4, 2]}, {"low": 3, "high": 8})]
BESIDE += [("adalora", {"init_r": 2, "target_r": 0.5}), ("lora", {"init_lora_weights": "orthogonal"})]
BESIDE += [("lora", {"init_lora_weights": {"choice": ["orthogonal", True]}}), ("lora", {"use_rslora": True})]


@pytest.mark.parametrize(("name", "settings"), BESIDE)
def test_a_default_space_fits_at_its_corners(name: str, settings: dict[str, Any], model: PreTrainedModel) -> None:
    _, (search,) = expanded(f"[{name}: {settings}]", trials=3)
    assert search.space.keys() >= METHODS[name].space.keys() - settings.keys()
    corners = search.corners()
    assert len(corners) == len({corner.name for corner in corners}) >= 2
    for key, space in search.space.items():
        assert {corner.drawn[key] for corner in corners} == set(ends(space))
    for corner in corners:
        tz.attach(model, corner.method, corner.name)
        tz.detach(model, corner.name)


def test_ranks_beside_an_orthogonal_start_are_even() -> None:
    model = tiny("llama")  # with weights: they are what an odd rank fails at
    for init in ("orthogonal", {"choice": ["orthogonal", "gaussian"]}):
        _, (search,) = expanded(f"[lora: {{init_lora_weights: {init}}}]", trials=3)
        assert [r for r in METHODS["lora"].space["r"].values if r % 2 == 0] == list(ends(search.space["r"]))
        for corner in search.corners():
            tz.attach(model, corner.method, corner.name)


def test_corners_are_bounded() -> None:
    _, (search,) = expanded(f"[lora: {{r: {{choice: {list(range(1, 90))}}}}}]")
    assert len(search.corners()) == 64
