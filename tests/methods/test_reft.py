"""ReFT: edits at the first and last tokens of each row, wherever padding, prompts and caches put them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tanzaku as tz
from close import assert_close, close
from models import KINDS, batch, tiny
from tanzaku.methods.reft import OrthonormalRows, ReftLayer

TEXT = [kind for kind in KINDS if kind not in ("clip", "whisper", "vit")]
ENDS = {"prefix_positions": 2, "suffix_positions": 3, "r": 2}


def attached(model: nn.Module, name: str = "a", seed: int = 0, **settings: Any) -> tz.Adapter:
    adapter = tz.attach(model, tz.ReFT(**{**ENDS, "modules_to_save": [], **settings}), name, seed=seed)
    with torch.no_grad():
        for _, parameter in adapter.trained():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.3)
    return adapter


def run(model: nn.Module, entries: list[Any], **inputs: Tensor) -> Tensor:
    with torch.no_grad(), tz.route(model, entries):
        out = model(**inputs)
    return out.last_hidden_state if "last_hidden_state" in out else out.logits


def layers_of(adapter: tz.Adapter) -> list[ReftLayer]:
    return [layer for _, layer in adapter.at() if isinstance(layer, ReftLayer)]


@pytest.mark.parametrize("style", ["loreft", "noreft", "direft"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_family(kind: str, style: str) -> None:
    if kind in ("clip", "whisper"):
        pytest.skip("two towers, or no text to have first tokens")
    model = tiny(kind, "base")
    attached(model, style=style)
    inputs = batch(model)
    base, alone = run(model, [None] * 4, **inputs), run(model, ["a"] * 4, **inputs)
    mixed = run(model, ["a", None, "a", None], **inputs)
    assert_close(mixed[[1, 3]], base[[1, 3]])
    assert_close(mixed[[0, 2]], alone[[0, 2]])
    assert not close(alone, base)


# -- places


def unpadded(inputs: dict[str, Tensor], row: int) -> tuple[dict[str, Tensor], Tensor]:
    """One row by itself, and which columns its tokens have."""
    at = inputs["attention_mask"][row].nonzero()[:, 0]
    return {"input_ids": inputs["input_ids"][row : row + 1, at]}, at


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_padding_takes_no_place(kind: str, padding: str) -> None:
    """Each row of a padded batch has the hidden states that it has alone, also rows shorter than both ends."""
    model = tiny(kind, "base")
    attached(model, prefix_positions=5, suffix_positions=4)
    inputs = batch(model, padding=padding)
    if kind != "llama" and padding == "left":  # whose positions count padding where nobody says otherwise
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    found = run(model, ["a"] * 4, **inputs)
    for row in range(4):
        alone, at = unpadded(inputs, row)
        assert_close(found[row, at], run(model, ["a"], **alone)[0])


@pytest.mark.parametrize("padding", ["left", "right"])
def test_virtual_tokens_take_no_place(padding: str) -> None:
    """A prompt of another row, or of the same stack, moves tokens and not the edits."""
    model = tiny("llama", "lm")
    attached(model)
    adapter = tz.attach(model, tz.PromptTuning(num_virtual_tokens=3), "prompt", seed=0)
    del adapter
    inputs = batch(model, padding=padding)
    alone = run(model, ["a"] * 4, **inputs) * inputs["attention_mask"][..., None]
    mixed = run(model, ["a", "prompt", "a", None], **inputs) * inputs["attention_mask"][..., None]
    assert_close(mixed[[0, 2]], alone[[0, 2]])
    for stack in (("prompt", "a"), ("a", "prompt")):
        found = run(model, [stack] * 4, **inputs)
        for row in range(4):
            one, at = unpadded(inputs, row)
            assert_close(found[row, at], run(model, [stack], **one)[0])


def test_the_edits_are_where_they_should_be() -> None:
    """Of one layer's output exactly the first two and last three own tokens change."""
    model = tiny("llama", "base")
    attached(model, layers=[1])
    inputs = batch(model, padding="left")
    changed = (run(model, ["a"] * 4, **inputs) - run(model, [None] * 4, **inputs)).abs().amax(-1) > 1e-6
    place = inputs["attention_mask"].cumsum(1) - 1
    length = inputs["attention_mask"].sum(1, keepdim=True)
    expected = (inputs["attention_mask"] == 1) & ((place < 2) | (place >= length - 3))
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("settings", [{"suffix_positions": 0, "prefix_positions": 12}, {}])
def test_generation_with_a_cache(settings: dict[str, int], padding: str | None) -> None:
    """Tokens that are generated have places in the whole text; the last tokens are the prompt's."""
    model = tiny("llama", "lm")
    attached(model, **settings)
    inputs = batch(model, padding=padding, length=6)
    with torch.no_grad(), tz.route(model, ["a"] * 4):
        found = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        slow = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert torch.equal(found[:, :7], slow)
    if settings:  # then a text that is computed anew has the same edits
        with torch.no_grad(), tz.route(model, ["a"] * 4):
            slow = model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=False)
        assert torch.equal(found, slow)


def test_beams_and_several_answers() -> None:
    model = tiny("llama", "lm")
    attached(model)
    attached(model, "b", 1)
    inputs = batch(model, padding="left", length=6)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3}
    with torch.no_grad(), tz.route(model, ["a", "b", None, "a"]):
        mixed = model.generate(**inputs, **options)
    with torch.no_grad(), tz.route(model, ["a"] * 4):
        alone = model.generate(**inputs, **options)
    assert torch.equal(mixed[[0, 3]], alone[[0, 3]])


# -- what is learned


@pytest.mark.parametrize("full", [False, True])
def test_rows_are_orthonormal_and_stay_so(full: bool) -> None:
    model = tiny("llama", "base")
    adapter = tz.attach(model, tz.ReFT(**ENDS, full_form=full), seed=0)
    for _, parameter in adapter.trained() if not full else []:
        parameter.data.mul_(0.9)  # as weight decay does
    for layer in layers_of(adapter):
        for unit in layer.units.values():
            rows = unit.projection.matrix()
            assert_close(rows @ rows.mT, torch.eye(2))


@pytest.mark.parametrize("shape", [(3, 16), (16, 16)])
def test_torch_computes_the_same_rows(shape: tuple[int, int]) -> None:
    if shape[0] == shape[1]:
        pytest.skip("torch takes another map there")
    linear = nn.utils.parametrizations.orthogonal(nn.Linear(shape[1], shape[0], bias=False))
    ours = OrthonormalRows(*shape, like=torch.zeros(1), base=True)
    with torch.no_grad():
        own = linear.parametrizations.weight
        own.original.add_(torch.randn(shape).triu(1) * 0.3)
        ours.original.copy_(own.original)
        ours.base.copy_(own[0].base)
    assert_close(ours.matrix(), linear.weight)


def test_an_end_that_is_not_edited_has_no_parameters() -> None:
    assert [*layers_of(attached(tiny("llama", "base"), suffix_positions=0))[0].units] == ["0"]
    assert [*layers_of(attached(tiny("llama", "base"), prefix_positions=0))[0].units] == ["1"]
    assert [*layers_of(attached(tiny("llama", "base"), tied_weights=True))[0].units] == ["0"]
    full = attached(tiny("llama", "base"), suffix_positions=0, full_form=True)
    assert [*layers_of(full)[0].units] == ["0", "1"]
    assert not any(".units.1." in name for name, _ in full.trained())


@pytest.mark.parametrize("style", ["loreft", "noreft", "direft"])
def test_the_adapters_librarys_form_comes_back(style: str, tmp_path: Path) -> None:
    model, inputs = tiny("llama", "base"), batch(tiny("llama", "base"))
    attached(model, style=style, suffix_positions=0, full_form=True)
    tz.save(model, "a", tmp_path / "hub", format="adapterhub")
    tz.load(model, tmp_path / "hub", "b")
    assert torch.equal(run(model, ["a"] * 4, **inputs), run(model, ["b"] * 4, **inputs))
    attached(model, "lean", style=style)
    with pytest.raises(tz.TanzakuError, match="attach with full_form=True"):
        tz.save(model, "lean", tmp_path / "x", format="adapterhub")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"style": "lorft"}, r"found style='lorft' .did you mean 'loreft'"),
        ({"layers": [2]}, r"found layers=\[2\], expected numbers of layers, 0 to 1"),
        ({"prefix_positions": 0, "suffix_positions": 0}, "expected some to edit"),
        ({"r": 0}, "found r=0"),
        ({"dropout": 1.0}, "found dropout=1.0"),
        ({"non_linearity": "prelu"}, "found non_linearity='prelu'"),
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(tz.TanzakuError, match=said):
        tz.attach(tiny("llama", "base"), tz.ReFT(**settings))
