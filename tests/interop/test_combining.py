"""Combined adapters are those that PEFT combines: the same weights in, the same change out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel

import tanzaku as tz
from close import assert_close, close
from interop.oracle import config, reopened, scatter
from models import batch, tiny
from tanzaku.merging.combine import HOW

TWO = ({"r": 4, "lora_alpha": 6}, {"r": 4, "lora_alpha": 3})
PRUNING = {how: {"density": 0.6} for how in HOW if how not in ("linear", "cat", "svd")}

# name: base, settings of each adapter, weights, how, options
CASES: dict[str, tuple[tuple[str, str], tuple[dict[str, Any], ...], list[float], str, dict[str, Any]]] = {
    **{how: (("llama", "lm"), TWO, [0.7, 0.4], how, PRUNING.get(how, {})) for how in HOW},
    **{
        f"negative-{how}": (("llama", "lm"), TWO, [0.9, -0.5], how, PRUNING.get(how, {}))
        for how in ("linear", "cat", "svd", "ties")
    },
    **{
        f"frequency-{how}": (
            ("llama", "lm"),
            (*TWO, {"r": 4}),
            [1.0, 0.5, 0.3],
            how,
            {"density": 0.5, "majority_sign_method": "frequency"},
        )
        for how in ("ties", "dare_ties_svd")
    },
    "density-one": (("llama", "lm"), TWO, [0.5, 0.5], "ties_svd", {"density": 1.0}),
    "one-adapter": (("llama", "lm"), TWO[:1], [0.5], "linear", {}),
    "ranks-cat": (("llama", "lm"), ({"r": 2}, {"r": 5}), [0.5, 2.0], "cat", {}),
    "ranks-svd": (("llama", "lm"), ({"r": 2}, {"r": 5}), [0.5, 2.0], "svd", {"svd_rank": 3}),
    "clamp": (("llama", "lm"), TWO, [0.5, 2.0], "svd", {"svd_clamp": 0.9, "svd_full_matrices": False}),
    "targets-svd": (
        ("llama", "lm"),
        ({"r": 2, "target_modules": ["q_proj", "v_proj"]}, {"r": 2, "target_modules": ["v_proj", "down_proj"]}),
        [0.5, 0.8],
        "dare_linear_svd",
        {"density": 0.5},
    ),
    "targets-cat": (
        ("llama", "lm"),
        ({"r": 2, "target_modules": ["q_proj"]}, {"r": 3, "target_modules": ["v_proj", "q_proj"]}),
        [0.5, 0.8],
        "cat",
        {},
    ),
    "expressions": (
        ("llama", "lm"),
        ({"r": 2, "target_modules": r".*\.0\..*q_proj"}, {"r": 2, "target_modules": r".*v_proj"}),
        [0.5, 0.8],
        "linear",
        {},
    ),
    "rslora-cat": (("llama", "lm"), ({"r": 4}, {"r": 2, "use_rslora": True}), [0.5, 0.8], "cat", {}),
    "conv1d": (("gpt2", "lm"), ({"r": 2, "fan_in_fan_out": True},) * 2, [0.5, 0.8], "dare_ties_svd", {"density": 0.5}),
    "embedding": (
        ("llama", "lm"),
        ({"r": 2, "target_modules": ["embed_tokens"]},) * 2,
        [0.5, 0.8],
        "magnitude_prune_svd",
        {"density": 0.5},
    ),
    "embedding-ties": (
        ("llama", "lm"),
        ({"r": 2, "target_modules": ["embed_tokens"]},) * 2,
        [0.5, 0.8],
        "ties",
        {"density": 0.5},
    ),
    "conv2d-svd": (
        ("vit", "base"),
        ({"r": 2, "target_modules": ["projection"]}, {"r": 3, "target_modules": ["projection"]}),
        [0.5, 0.8],
        "svd",
        {},
    ),
    "conv2d-cat": (
        ("vit", "base"),
        ({"r": 2, "target_modules": ["projection"]}, {"r": 3, "target_modules": ["projection"]}),
        [0.5, 0.8],
        "cat",
        {},
    ),
}


def several(
    base: PreTrainedModel, name: str, each: tuple[dict[str, Any], ...], folder: Path
) -> tuple[list[str], peft.PeftModel]:
    """Adapters of several settings in a PEFT model, and the same ones, through files, on `base`."""
    names = ["a", "b", "c"][: len(each)]
    configs = [config(base, name, settings) for settings in each]
    if not base.can_generate():
        for one in configs:
            one.task_type = None
    theirs = peft.get_peft_model(copy.deepcopy(base), configs[0], adapter_name="a").eval()
    for other, settings in zip(names[1:], configs[1:], strict=True):
        theirs.add_adapter(other, settings)
    for seed, one in enumerate(names):
        scatter([p for key, p in theirs.named_parameters() if f".{one}." in key or key.endswith(f".{one}")], seed=seed)
        theirs.save_pretrained(folder, selected_adapters=[one])
        tz.load(base, folder / one, one)
    return names, theirs


def changed(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize(("base", "each", "weights", "how", "options"), CASES.values(), ids=CASES)
def test_the_change_is_peft_s(
    base: tuple[str, str],
    each: tuple[dict[str, Any], ...],
    weights: list[float],
    how: str,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny(*base)
    names, theirs = several(model, "lora", each, tmp_path)
    # PEFT draws the start of the new adapter first, from the same generator: what DARE drops is seeded behind that.
    freeze = peft.tuners.lora.model._freeze_adapter

    def seeded(*args: Any) -> None:
        freeze(*args)
        torch.manual_seed(5)

    monkeypatch.setattr(peft.tuners.lora.model, "_freeze_adapter", seeded)
    tz.combine(model, names, "new", weights=weights, how=how, seed=5, **options)
    theirs.add_weighted_adapter(names, weights, "new", combination_type=how, **options)
    theirs.set_adapter("new")
    tz.merge(model, "new")
    before, expected = changed(tiny(*base)), theirs.merge_and_unload().state_dict()
    moved = 0
    for key, value in changed(model).items():
        assert_close(value, expected[key])
        moved += not close(value, before[key])
    assert moved


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", ({}, {})),
        ("gpt2", ({}, {})),
        (
            "llama",
            (
                {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
                {"target_modules": ["v_proj", "up_proj"], "feedforward_modules": ["up_proj"]},
            ),
        ),
    ],
)
def test_ia3_factors_are_peft_s(kind: str, more: tuple[dict[str, Any], ...], tmp_path: Path) -> None:
    model = tiny(kind, "lm")
    names, theirs = several(model, "ia3", more, tmp_path)
    tz.combine(model, names, "new", weights=[0.7, 0.4])
    theirs.add_weighted_adapter(names, [0.7, 0.4], "new")
    theirs.set_adapter("new")
    inputs = batch(model, padding=None)
    with tz.route(model, ["new"] * 4):
        assert_close(model(**inputs).logits, theirs(**inputs).logits)


def test_peft_reads_a_combined_adapter(tmp_path: Path) -> None:
    """Also where the adapters change different modules, with different ranks."""
    model = tiny("llama", "lm")
    each = ({"r": 2, "target_modules": ["q_proj"]}, {"r": 3, "target_modules": r".*\.1\..*v_proj"})
    names, _ = several(model, "lora", each, tmp_path / "parts")
    tz.combine(model, names, "new", weights=[1.0, -0.5], how="cat")
    tz.save(model, "new", tmp_path / "new")
    theirs = reopened(tiny("llama", "lm"), tmp_path / "new")
    inputs = batch(model, padding=None)
    with tz.route(model, ["new"] * 4):
        assert_close(theirs(**inputs).logits, model(**inputs).logits)


def test_rslora_keeps_its_scale(tmp_path: Path) -> None:
    """A difference: PEFT's result scales once more, by the square root of its rank, where the first is rank-stabilised.

    Here the combination of one adapter with itself, in halves, is that adapter.
    """
    model = tiny("llama", "lm")
    _, theirs = several(model, "lora", ({"r": 4, "use_rslora": True},), tmp_path)
    tz.combine(model, ["a", "a"], "new", weights=[0.5, 0.5], how="cat")
    theirs.add_weighted_adapter(["a", "a"], [0.5, 0.5], "new", combination_type="cat")
    inputs = batch(model, padding=None)
    with torch.no_grad():
        theirs.set_adapter("a")
        expected = theirs(**inputs).logits
        theirs.set_adapter("new")
        assert not torch.allclose(theirs(**inputs).logits, expected, atol=1e-2)
        with tz.route(model, ["new"] * 4):
            assert_close(model(**inputs).logits, expected)
