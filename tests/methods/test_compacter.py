"""Compacter: its matrices are sums of Kronecker products, of which all layers share a factor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tanzaku as tz
from close import assert_close
from models import batch, tiny
from tanzaku.methods.bottleneck import BottleneckLayer
from tanzaku.methods.compacter import KroneckerProjection, Rule


def attached(model: Any, **settings: Any) -> tz.Adapter:
    adapter = tz.attach(model, tz.Compacter(**{"reduction_factor": 4, "modules_to_save": [], **settings}), "a", seed=0)
    with torch.no_grad():
        for _, parameter in adapter.trained():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return adapter


def projections(adapter: tz.Adapter) -> list[KroneckerProjection]:
    found = [p for _, s in adapter.at() if isinstance(s, BottleneckLayer) for p in (s.down, s.up)]
    assert all(isinstance(each, KroneckerProjection) for each in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("whole", [False, True])
def test_the_matrix_is_a_sum_of_kronecker_products(whole: bool) -> None:
    adapter = attached(tiny("llama", "base"), phm_rank=2, factorized_phm_W=not whole)
    rule = next(s for _, s in adapter.at() if isinstance(s, Rule)).phm_rule
    for each in projections(adapter):
        own = each.W if whole else torch.bmm(each.W_left, each.W_right)
        expected = sum(torch.kron(a, b) for a, b in zip(rule, own, strict=True))
        assert_close(each.matrix(), expected)


def test_all_layers_share_the_rule_and_train_it() -> None:
    model = tiny("llama", "base")
    adapter = attached(model)
    rules = [name for name, _ in adapter.trained() if name.endswith("phm_rule")]
    assert rules == ["phm_rule"]
    assert tz.count(model, "a").trainable == 4**3 + 4 * (2 * (32 + 8) + 32 + 8)
    own = attached(tiny("llama", "base"), shared_phm_rule=False)
    assert sum(name.endswith("phm_rule") for name, _ in own.trained()) == 8
    kept = attached(tiny("llama", "base"), learn_phm=False)
    assert not [name for name, _ in kept.trained() if name.endswith("phm_rule")]


def test_the_bottleneck_is_as_wide_as_its_factors_ask_for() -> None:
    assert {min(p.n_in, p.n_out) for p in projections(attached(tiny("llama", "base"), reduction_factor=32))} == {4}
    assert {min(p.n_in, p.n_out) for p in projections(attached(tiny("llama", "base"), reduction_factor=5))} == {8}


@pytest.mark.parametrize("settings", [{"learn_phm": False}, {"shared_phm_rule": False}, {"style": "compacter++"}])
def test_files_hold_the_rule(settings: dict[str, Any], tmp_path: Path) -> None:
    model, inputs = tiny("bert", "base"), batch(tiny("bert", "base"))
    attached(model, **settings)
    tz.save(model, "a", tmp_path / "a")
    tz.save(model, "a", tmp_path / "hub", format="adapterhub")
    with torch.no_grad(), tz.route(model, ["a"]):
        expected = model(**inputs).last_hidden_state
    for folder in ("a", "hub"):
        again = tiny("bert", "base")
        tz.load(again, tmp_path / folder, "b")
        with torch.no_grad(), tz.route(again, ["b"]):
            assert_close(again(**inputs).last_hidden_state, expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"phm_dim": 5}, r"found phm_dim=5 for a matrix 32 x 10, expected a divisor of both its sides"),
        ({"phm_dim": 0}, "found phm_dim=0"),
        ({"phm_rank": 0}, "found phm_rank=0"),
        ({"phm_c_init": "zero"}, "found phm_c_init='zero'"),
        ({"hypercomplex_nonlinearity": "phm"}, "found hypercomplex_nonlinearity='phm'"),
        ({"style": "pfeiffer"}, "found style='pfeiffer'"),
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(tz.TanzakuError, match=said):
        tz.attach(tiny("llama", "base"), tz.Compacter(**{"reduction_factor": 4, **settings}))
