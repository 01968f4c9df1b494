"""Adapters that are made of others: what they compute, what they keep still, their files and runs, bad input."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tanzaku as tz
from close import assert_close, close
from models import batch, tiny
from tanzaku.core.manager import manager_of
from tanzaku.methods.average import AverageLayer
from tanzaku.methods.fusion import FusionLayer
from tanzaku.storage.store import read_meta

KINDS: dict[str, Any] = {"fusion": tz.AdapterFusion, "average": tz.Average}
PARTS: dict[str, list[tz.Method]] = {
    "lora": [tz.LoRA(r=2), tz.MiSS(r=4), tz.LoRA(r=3, use_dora=True)],
    "ia3": [tz.IA3(), tz.IA3()],
    "bottleneck": [tz.BottleneckAdapter(non_linearity="gelu"), tz.BottleneckAdapter(reduction_factor=4)],
    "compacter": [tz.Compacter(reduction_factor=4), tz.Compacter(reduction_factor=8)],
    "parallel": [tz.BottleneckAdapter(style="parallel", non_linearity="gelu"), tz.BottleneckAdapter(style="parallel")],
    "reft": [tz.ReFT(r=2, dropout=0.0), tz.ReFT(r=3, dropout=0.0)],
    "vera": [tz.VeRA(r=4), tz.VeRA(r=4)],
    "hyper": [tz.Hyper(reduction_factor=8), tz.Hyper(reduction_factor=4)],
    "text_to_lora": [tz.TextToLora(r=2), tz.TextToLora(r=3, hidden_dim=8)],
    "embedding": [tz.LoRA(r=2, target_modules=["embed_tokens"]), tz.LoRA(r=3, target_modules=["embed_tokens"])],
}


def opened(adapter: tz.Adapter, seed: int) -> tz.Adapter:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in adapter.trained():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return adapter


def model_with(parts: str, kind: str = "llama", head: str = "lm") -> Any:
    model = tiny(kind, head)
    for number, method in enumerate(PARTS[parts]):
        opened(tz.attach(model, method, f"p{number}", seed=number), number)
    return model


def names_of(model: Any) -> list[str]:
    return [name for name in tz.adapters(model) if name.startswith("p")]


def logits(model: Any, entries: list[Any], **given: Tensor) -> Tensor:
    given = given or batch(model, rows=len(entries))
    with torch.no_grad(), tz.route(model, entries):
        out = model(**given).logits
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("weights", [[1.0, 0.0], [0.0, 3.0]], ids=["first", "second"])
def test_an_average_that_is_all_one_adapters_is_that_adapter(parts: str, weights: list[float]) -> None:
    model = model_with(parts)
    names = names_of(model)
    weights = [*weights, *[0.0] * (len(names) - 2)]
    tz.attach(model, tz.Average(adapters=names, weights=weights), "average")
    expected = logits(model, [names[weights.index(max(weights))]] * 2)
    assert_close(logits(model, ["average"] * 2), expected, 2**9)
    assert not close(expected, logits(model, [None] * 2))


def test_an_average_of_lora_is_that_of_their_products() -> None:
    """At one module, whose change is linear, so that it can be written down."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    parts = [opened(tz.attach(model, tz.LoRA(r=r, target_modules=["0"]), f"p{r}"), r) for r in (1, 2)]
    tz.attach(model, tz.Average(adapters=["p1", "p2"], weights=[1.0, 3.0]), "average")
    x = torch.randn(4, 6)
    deltas = [layer.delta(model[0]) for part in parts for _, layer in part.at()]
    with torch.no_grad(), tz.route(model, ["average"]):
        assert_close(model(x), F.linear(x, model[0].weight + 0.25 * deltas[0] + 0.75 * deltas[1], model[0].bias))


def test_a_fusion_attends_by_what_each_token_reads() -> None:
    """At one module, against the formula."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    for r in (1, 2):
        opened(tz.attach(model, tz.LoRA(r=r, target_modules=["0"]), f"p{r}"), r)
    fusion = opened(tz.attach(model, tz.AdapterFusion(adapters=["p1", "p2"]), "fusion"), 3)
    ((_, layer),) = fusion.at()
    assert isinstance(layer, FusionLayer)
    x = torch.randn(4, 6)
    with torch.no_grad():
        y = model[0](x)
        d = []
        for name in ("p1", "p2"):
            with tz.route(model, [name]):
                d.append(model(x) - y)
        changes = torch.stack(d, 1)
        own = layer.attention
        scores = ((own.query(y)[:, None]) * (changes @ own.key["weight"].T)).sum(-1)
        mixed = (scores.softmax(-1)[..., None] * changes).sum(1)
        with tz.route(model, ["fusion"]):
            assert_close(model(x), y + mixed @ own.value["weight"].T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", PARTS)
def test_its_parts_are_not_trained_by_it_though_rows_beside_it_train_them(kind: str, parts: str) -> None:
    model = model_with(parts)
    names = names_of(model)
    own = opened(tz.attach(model, KINDS[kind](adapters=names), "own", seed=0), 9)
    given = batch(model, rows=3)

    def gradients(rows: list[int]) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
        with tz.route(model, ["own", names[0], "own"]):
            loss = model(**given).logits[rows].square().sum()
            sides = [own.trained(), manager_of(model).get(names[0]).trained()]
            every = [p for side in sides for _, p in side]
            found = iter(torch.autograd.grad(loss, every, allow_unused=True))
        mine, theirs = ({name: next(found) for name, _ in side} for side in sides)
        return mine, theirs

    mine, theirs = gradients([0, 2])
    assert any(g is not None and g.any() for g in mine.values())
    assert not any(g is not None and g.any() for g in theirs.values())
    mine, theirs = gradients([1])
    assert not any(g is not None and g.any() for g in mine.values())
    assert any(g is not None and g.any() for g in theirs.values())


@pytest.mark.parametrize("kind", KINDS)
def test_its_directory_is_whole_and_finds_what_is_attached(kind: str, tmp_path: Path) -> None:
    model = model_with("bottleneck", "bert", "cls")
    opened(tz.attach(model, KINDS[kind](adapters=names_of(model)), "own", seed=0), 9)
    expected = logits(model, ["own", "p0"])
    tz.save(model, "own", tmp_path / "own")
    fresh = tiny("bert", "cls")
    tz.load(fresh, tmp_path / "own", "mine")
    assert tz.adapters(fresh) == ["mine-p0", "mine-p1", "mine"]
    assert_close(logits(fresh, ["mine", "mine-p0"]), expected)
    tz.detach(fresh, "mine")
    assert tz.adapters(fresh) == []
    # The very same adapters that are attached are used; others of their names are not.
    again = tiny("bert", "cls")
    tz.load(again, tmp_path / "own" / "parts" / "p0", "p0")
    opened(tz.attach(again, PARTS["bottleneck"][1], "p1", seed=7), 7)
    tz.load(again, tmp_path / "own", "mine")
    assert tz.adapters(again) == ["p0", "p1", "mine-p1", "mine"]
    assert_close(logits(again, ["mine", "p0"]), expected)
    # Nor is one of the same tensors that scales them otherwise.
    scaled = tiny("bert", "cls")
    method = tz.BottleneckAdapter(non_linearity="gelu", scaling=2.0)
    tz.load(scaled, tmp_path / "own" / "parts" / "p0", "p0", method=method)
    tz.load(scaled, tmp_path / "own", "mine")
    assert tz.adapters(scaled) == ["p0", "mine-p0", "mine-p1", "mine"]
    with pytest.raises(tz.TanzakuError, match="'p0' cannot be detached while 'mine' uses it: detach 'mine' first"):
        tz.detach(again, "p0")
    tz.detach(again, "mine")
    assert tz.adapters(again) == ["p0", "p1"]


def test_another_base_is_asked_for_of_its_parts_too(tmp_path: Path) -> None:
    model = model_with("lora")
    tz.attach(model, tz.AdapterFusion(adapters=["p0", "p1"]), "own", seed=0)
    tz.save(model, "own", tmp_path / "own")
    other = tiny("llama", "lm", seed=1)
    with pytest.raises(tz.TanzakuError, match="was made for a base with other weights"):
        tz.load(other, tmp_path / "own", "own")
    assert tz.adapters(other) == []
    with pytest.warns(UserWarning, match="a base with other weights"):
        tz.load(other, tmp_path / "own", "own", any_base=True)
    assert tz.adapters(other) == ["own-p0", "own-p1", "own"]


def test_what_brings_adapters_along_leaves_those_that_another_uses() -> None:
    model = model_with("lora")
    tz.attach(model, tz.AdapterFusion(adapters=["p0", "p1"]), "a")
    tz.attach(model, tz.Average(adapters=["p1", "p2"]), "b")
    manager_of(model).get("a").brought = ["p0", "p1"]
    tz.detach(model, "a")
    assert tz.adapters(model) == ["p1", "p2", "b"]
    tz.detach(model, "b")  # which has what it uses of those now
    assert tz.adapters(model) == ["p2"]


def test_it_is_counted_with_what_it_needs() -> None:
    model = model_with("lora")
    tz.attach(model, tz.Average(adapters=["p0", "p1"]), "own")
    own, base = tz.count(model, "own"), sum(p.numel() for n, p in model.named_parameters() if "tanzaku" not in n)
    parts = sum(tz.count(model, name).trainable for name in ("p0", "p1"))
    assert own.trainable == 2 * 4 and own.total == base + parts + own.trainable


def test_a_directory_without_its_parts_or_with_others(tmp_path: Path) -> None:
    model = model_with("lora")
    tz.attach(model, tz.AdapterFusion(adapters=["p0", "p1"]), "own", seed=0)
    tz.save(model, "own", tmp_path / "own")
    fresh = tiny("llama", "lm")
    shutil.move(tmp_path / "own" / "parts" / "p1", tmp_path / "p1")
    with pytest.raises(tz.TanzakuError, match=r"uses the adapter 'p1', which is neither in .*parts.p1 nor attached"):
        tz.load(fresh, tmp_path / "own", "own")
    assert tz.adapters(fresh) == [], "what was attached before is gone again"
    tz.load(fresh, tmp_path / "p1", "p1")
    tz.load(fresh, tmp_path / "own", "own")
    tz.detach(fresh)
    config = tmp_path / "own" / "parts" / "p0" / "adapter_config.json"
    config.write_text(
        config.read_text(encoding="utf-8").replace('"lora_alpha": 8', '"lora_alpha": 800'), encoding="utf-8"
    )
    with pytest.raises(tz.TanzakuError, match=r"parts.p0 is not the adapter that .*own was trained with"):
        tz.load(fresh, tmp_path / "own", "own")
    config.write_text(config.read_text(encoding="utf-8").replace("800", "8"), encoding="utf-8")
    shutil.copytree(tmp_path / "own" / "parts" / "p0", tmp_path / "own" / "parts" / "p1")
    with pytest.raises(tz.TanzakuError, match=r"parts.p1 is not the adapter that .*own was trained with"):
        tz.load(fresh, tmp_path / "own", "own")
    assert tz.adapters(fresh) == []


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (tz.AdapterFusion(), r"fusion: found adapters=\[\], expected the names of two or more"),
        (tz.AdapterFusion(adapters=["p0", "p0"]), "expected each of them once"),
        (tz.AdapterFusion(adapters=["p0", "nobody"]), "no adapter named 'nobody'"),
        (tz.AdapterFusion(adapters=["p0", "prompt"]), "found 'prompt', which adds tokens, or keys and values"),
        (tz.AdapterFusion(adapters=["p0", "prefix"]), "found 'prefix', which adds tokens, or keys and values"),
        (tz.AdapterFusion(adapters=["p0", "wide"]), r"adapters at different places .*'wide' changes the outputs of"),
        (tz.AdapterFusion(adapters=["p0", "whole"]), "found 'whole', which has its own copy of all weights"),
        (tz.AdapterFusion(adapters=["p0", "copies"]), r"found 'copies', which has its own copy of model.norm"),
        (tz.AdapterFusion(adapters=["p0", "made"]), "found 'made', which is made of others"),
        (tz.Average(adapters=["p0", "p1"], weights=[1.0]), r"found weights=\[1.0\], expected 2, one for each"),
        (
            tz.Average(adapters=["p0", "p1"], weights=[float("inf"), 1.0]),
            r"weights=\[inf, 1.0\], expected a finite number",
        ),
        (tz.Average(adapters=["p0", "p1"], weights=[1.0, -1.0]), "expected weights whose sum is not zero"),
    ],
)
def test_bad_input(method: tz.Method, message: str) -> None:
    model = model_with("lora")
    tz.attach(model, tz.PromptTuning(num_virtual_tokens=2), "prompt")
    tz.attach(model, tz.PrefixTuning(num_virtual_tokens=2), "prefix")
    tz.attach(model, tz.LoRA(target_modules="all-linear"), "wide")
    tz.attach(model, tz.Full(), "whole")
    tz.attach(model, tz.LoRA(modules_to_save=["model.norm"]), "copies")
    tz.attach(model, tz.Average(adapters=["p0", "p1"]), "made")
    before = tz.adapters(model)
    with pytest.raises(tz.TanzakuError, match=message):
        tz.attach(model, method, "own")
    assert tz.adapters(model) == before


def test_what_its_parts_said_is_kept(tmp_path: Path) -> None:
    """Their meta, and a card that somebody changed."""
    model = model_with("lora")
    tz.save(model, "p0", tmp_path / "p0", meta={"labels": ["x", "y"]})
    fresh = tiny("llama", "lm")
    tz.load(fresh, tmp_path / "p0", "p0")
    tz.attach(fresh, PARTS["lora"][1], "p1", seed=1)
    tz.attach(fresh, tz.Average(adapters=["p0", "p1"]), "own")
    tz.save(fresh, "own", tmp_path / "own")
    assert read_meta(tmp_path / "own" / "parts" / "p0") == {"labels": ["x", "y"]}
    card = tmp_path / "own" / "parts" / "p0" / "README.md"
    card.write_text("mine", encoding="utf-8")
    tz.save(fresh, "own", tmp_path / "own")
    assert card.read_text(encoding="utf-8") == "mine"


def test_what_cannot_be_done_with_it_says_so(tmp_path: Path) -> None:
    model = model_with("lora")
    tz.attach(model, tz.AdapterFusion(adapters=["p0", "p1"]), "own")
    with pytest.raises(tz.TanzakuError):
        tz.merge(model, "own")
    with pytest.raises(tz.TanzakuError, match="AdapterHub's library reads no adapter of fusion"):
        tz.save(model, "own", tmp_path / "hub", format="adapterhub")
    tz.merge(model, "p0")
    with pytest.raises(tz.TanzakuError, match="p0 is merged into the base's weights and would count twice"):
        logits(model, ["own"])


def test_half_precision_keeps_small_changes() -> None:
    """In bf16 a difference of two sums would lose most of a change that is small beside what it changes."""
    model = tiny("llama", "lm").to(torch.bfloat16)
    for number in range(2):
        part = tz.attach(model, tz.LoRA(r=2), f"p{number}", seed=number)
        with torch.no_grad():
            for name, p in part.trained():
                p.normal_(generator=torch.Generator().manual_seed(number), std=0.2 if "lora_A" in name else 1e-3)
    average = tz.attach(model, tz.Average(adapters=["p0", "p1"]), "own")
    seen: list[Tensor] = []
    for _, layer in average.at():
        assert isinstance(layer, AverageLayer)
        made = layer.made

        def note(read: Tensor, changes: Tensor, made: Any = made) -> Tensor:
            seen.append(changes)
            return made(read, changes)  # type: ignore[no-any-return]

        layer.made = note  # type: ignore[method-assign]
    logits(model, ["own"])
    for changes in seen:
        assert changes.dtype == torch.float32
        whole = changes.bfloat16().float()
        assert len(changes.unique()) > len(changes.flatten()) / 2, "all alike where it was rounded beside y"
        assert not torch.equal(changes, whole)


def test_a_penalty_holds_values_near_identity() -> None:
    model = model_with("lora")
    fusion = tz.attach(model, tz.AdapterFusion(adapters=["p0", "p1"], regularization=0.5), "own")
    penalty = fusion.method.penalty(fusion)
    assert penalty is not None and penalty == 0
    layers = [layer for _, layer in fusion.at() if isinstance(layer, FusionLayer)]
    with torch.no_grad():
        layers[0].attention.value["weight"][0, 1] += 2
    moved = fusion.method.penalty(fusion)
    assert moved is not None and moved.item() == pytest.approx(0.5 * 4)
    none = tz.attach(model, tz.AdapterFusion(adapters=["p0", "p1"], value=False), "none")
    assert none.method.penalty(none) is None
