"""What methods at modules of their choice share: which modules, patterns, biases, and what PEFT is told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

import tanzaku as tz
from close import assert_close
from interop.oracle import reopened, scatter
from models import batch, tiny
from tanzaku.core.weights import BiasCopy, WeightCopy

IN_LAYERS = [tz.LoHa(r=2), tz.VeRA(r=4), tz.OFT(oft_block_size=8), tz.HiRA(r=2), tz.RoAd(group_size=8)]


def paths(adapter: tz.Adapter) -> set[str]:
    return {path for path, layer in adapter.at() if path and not isinstance(layer, WeightCopy)}


@pytest.mark.parametrize("method", IN_LAYERS, ids=lambda method: method.name)
def test_layers_and_exclusions(method: Any) -> None:
    model = tiny("llama")
    method = type(method)(**{**vars(method), "layers_to_transform": [1], "exclude_modules": ["v_proj"]})
    assert paths(tz.attach(model, method, "x")) == {"model.layers.1.self_attn.q_proj"}


@torch.no_grad()
@pytest.mark.parametrize("method", [tz.VeRA(r=4), tz.SHiRA(r=2), tz.C3A(block_size=8)], ids=lambda method: method.name)
def test_peft_is_given_whole_paths_where_it_has_no_such_setting(method: Any, tmp_path: Path) -> None:
    model, fresh = tiny("llama", "lm"), tiny("llama", "lm")
    method.exclude_modules = ["layers.0.self_attn.q_proj"]
    adapter = tz.attach(model, method, "x", seed=0)
    scatter([p for _, p in adapter.trained()])
    tz.save(model, "x", tmp_path / "x")
    tz.activate(model, "x")
    config = peft.PeftConfig.from_pretrained(tmp_path / "x")
    assert set(config.target_modules) == paths(adapter) and len(paths(adapter)) == 3
    given = batch(model)
    assert_close(reopened(fresh, tmp_path / "x")(**given).logits, model(**given).logits)


@pytest.mark.parametrize("word", ["all", "oft_only"])
def test_biases_are_trained_along(word: str) -> None:
    model = tiny("llama", attention_bias=True, mlp_bias=True)
    adapter = tz.attach(model, tz.OFT(oft_block_size=8, bias=word), "x")
    copies = {path for path, layer in adapter.at() if isinstance(layer, BiasCopy)}
    every = {name.removesuffix(".bias") for name, _ in model.named_parameters() if name.endswith(".bias")}
    every = {name for name in every if not name.startswith("tanzaku")}
    assert copies == (every if word == "all" else {path for path in every if path.endswith(("q_proj", "v_proj"))})


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (
            tz.LoHa(target_modules=["embed_tokens"]),
            "loha: found model.embed_tokens, a Embedding, expected a linear layer",
        ),
        (tz.OFT(bias="lora_only"), "oft: found bias='lora_only', expected 'none', 'all' or 'oft_only'"),
        (tz.LoKr(rank_pattern={"k_proj": 2}), "lokr: found pattern 'k_proj' that matches no target"),
        (tz.VeRA(vera_dropout=1.0), "vera: found vera_dropout=1.0, expected a probability below 1"),
        (tz.VeRA(projection_prng_key=-1), "vera: found projection_prng_key=-1, expected a seed"),
        (tz.HiRA(r=0), "hira: found r=0 for model.layers.0.self_attn.q_proj, expected a rank of 1 or more"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_mistakes(method: Any, match: str) -> None:
    with pytest.raises(tz.TanzakuError, match=match):
        tz.attach(tiny("llama"), method, "x")


@pytest.mark.parametrize("kind", [tz.HiRA, tz.TinyLoRA])
def test_an_embedding_that_finds_out_what_to_look_up_is_refused(kind: type[tz.Method]) -> None:
    """Positions are counted from a mask inside of it: what it reads is no index into the change."""
    with pytest.raises(tz.TanzakuError, match=r"embed_positions, a .*finds out by itself.*lora changes"):
        tz.attach(tiny("opt", "lm"), kind(target_modules=["embed_positions"]), "a")
    tz.attach(tiny("opt", "lm"), kind(target_modules=["embed_tokens"]), "a")


def test_other_libraries_numbers_and_collections_are_taken() -> None:
    adapter = tz.attach(tiny("llama"), tz.LoRA(r=np.int64(2), target_modules=("q_proj",)), "a")
    assert paths(adapter) == {f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)}
