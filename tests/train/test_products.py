"""Frozen products and norms: the numbers of the modules they stand in for, and nothing left behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tanzaku as tz
from close import GRADIENT, HALF, PASS, assert_close
from models import batch, tiny
from tanzaku.core.method import Method
from tanzaku.engine import onednn, products
from tanzaku.engine.acceleration import Common
from tanzaku.engine.accelerations import Accelerations
from tanzaku.engine.layout import Layout
from tanzaku.engine.memory import in_use
from tanzaku.engine.norms import FrozenNorms
from tanzaku.engine.onednn import Speeds, Times
from tanzaku.engine.order import ABOVE
from tanzaku.engine.products import Copies, Directions
from tanzaku.engine.skipping import SkipUnneeded
from tanzaku.models.families import Base
from tanzaku.train.results import Job, JobResult
from tanzaku.train.scheduler import JobScheduler, Silent
from tanzaku.train.settings import TrainSettings
from task_data import task

CPU = torch.device("cpu")
BOTH = Directions(True, True)
PAYS, LOSES = (Speeds(times, times) for times in (Times(3, 2, 1), Times(1, 2, 3)))


@pytest.fixture(autouse=True)
def _onednn_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever processor runs these tests: oneDNN is used wherever it can be."""
    monkeypatch.setattr(onednn, "speeds", lambda _kind: PAYS)


class Fast:
    """What makes a model's products fast, and nothing else of the kind."""

    def __init__(self, model: nn.Module):
        self.accelerations = Accelerations(Base.of(model), "skip_unneeded,onednn,prepacked_weights")
        self.products = self.accelerations.common.products

    def __enter__(self) -> Fast:
        self.accelerations.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.accelerations.__exit__(*error)

    def batch(self, layout: Layout) -> AbstractContextManager[None]:
        return self.products.batch(layout)

    def take(self, room: float = math.inf) -> int:
        return self.accelerations.take(room)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, list[int], list[int], list[int]]:
    """(width, starts, lengths, lowest layers) of a batch."""
    width = draw(st.integers(1, 7))
    rows = draw(st.integers(1, 5))
    starts = [draw(st.integers(0, width - 1)) for _ in range(rows)]
    lengths = [draw(st.integers(1, width - start)) for start in starts]
    return width, starts, lengths, [draw(st.sampled_from([-1, 0, 1, 3, ABOVE])) for _ in range(rows)]


@settings(deadline=None, max_examples=60)
@given(layouts(), st.integers(0, 4), st.booleans(), st.sampled_from(["torch", "oneDNN", "copies"]))
def test_own_tokens_get_the_products_they_would_get(layout: Any, depth: int, bias: bool, by: str) -> None:
    width, starts, lengths, lowest = layout
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=bias).requires_grad_(False)
    x = torch.randn(len(lengths), width, 6, requires_grad=True)
    own = torch.zeros(len(lengths), width, 1)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        own[row, start : start + length] = 1
    needed = own * torch.tensor([low <= depth for low in lowest]).view(-1, 1, 1)
    tokens = Layout(width, starts, lengths, lowest, CPU)
    fast = BOTH if by != "torch" and onednn.available() else Directions()
    copies = Copies.of(layer.weight, BOTH) if by == "copies" and fast else None
    y = products._Product.apply(x, layer.weight, layer.bias, tokens.places(), tokens.places(depth), fast, copies)
    assert_close(y, F.linear(x, layer.weight, layer.bias) * own)
    gradient = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, gradient)
    assert_close(found, gradient @ layer.weight * needed)


@pytest.mark.parametrize(("kind", "head"), [("llama", "cls"), ("gemma3", "cls"), ("bert", "cls"), ("gpt2", "cls")])
def test_a_batch_of_adapters_at_different_layers(kind: str, head: str) -> None:
    """Rows that train the top alone beside rows that train everything: the gradients of the plain model."""
    model = tiny(kind, head)
    base = Base.of(model)
    top = len(base.attention()) - 1
    methods = [tz.LoRA(r=2, layers_to_transform=[top]), tz.Head(), tz.LoRA(r=2), tz.PromptTuning(num_virtual_tokens=2)]
    attached = [tz.attach(model, method, f"a{seed}", seed=seed) for seed, method in enumerate(methods)]
    for adapter in attached:
        for _, parameter in adapter.trained():
            parameter.data += 0.1
    inputs = batch(model, rows=4)
    lengths = inputs["attention_mask"].sum(1).tolist()
    virtual = [0, 0, 0, 2]
    # As in training: a cache would be gone on from, and texts end in the last column then.
    options = {"use_cache": False} if head == "lm" or kind in ("llama", "gemma3") else {}
    common = Common(base)
    trained = [p for adapter in attached for _, p in adapter.trained()]

    def gradients() -> list[torch.Tensor]:
        with tz.route(model, [adapter.name for adapter in attached]):
            loss = model(**inputs, **options).logits.square().sum()
        return [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True)
        ]

    expected = gradients()
    with common.order.recorded():
        gradients()
    lowest = [common.order.lowest(adapter) for adapter in attached]
    assert lowest[3] == -1 < lowest[2] < lowest[0] < lowest[1]
    assert top == 0 or all(common.order.depth(module) < lowest[1] for module in common.products.layers)
    tokens = Layout(
        2 + inputs["input_ids"].shape[1],
        [0] * len(virtual),
        [v + length for v, length in zip(virtual, lengths, strict=True)],
        lowest,
        CPU,
    )
    with FrozenNorms(common), SkipUnneeded(common) as skips, skips.batch(tokens, None):
        found = gradients()
    assert any(g.any() for g in expected)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, GRADIENT)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_weights_that_are_trained_are_left_alone() -> None:
    """An adapter's own copy of a layer gets its gradient."""
    model = tiny("llama")
    adapter = tz.attach(model, tz.LoRA(r=2, modules_to_save=["score", "down_proj"]), "a", seed=0)
    inputs = batch(model, rows=2)
    tz.activate(model, "a")
    width = inputs["input_ids"].shape[1]
    with Fast(model) as fast, fast.batch(Layout(width, [0, 0], [width, width], [0, 0], CPU)):
        model(**inputs).logits.square().sum().backward()
    copies = [p for name, p in adapter.trained() if "down_proj" in name]
    assert len(copies) == 2 and all(p.grad is not None and p.grad.any() for p in copies)


def test_only_plain_linear_layers_are_touched() -> None:
    class Odd(nn.Linear):
        pass

    model = tiny("llama")
    model.model.layers[0].mlp.up_proj = Odd(32, 64)
    paths = {id(module) for module in Fast(model).products.layers}
    assert id(model.model.layers[0].mlp.up_proj) not in paths and id(model.score) not in paths
    assert id(model.model.layers[0].mlp.down_proj) in paths


def test_a_weight_of_another_kind_is_left_alone() -> None:
    """A quantised weight in a plain layer multiplies in its own way."""

    class Packed(Tensor):
        pass

    model = tiny("llama").requires_grad_(False)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Packed), requires_grad=False)
    fast = Fast(model)
    assert id(layer) not in {id(module) for module in fast.products.layers} and fast.products.layers
    with fast:
        assert "forward" not in layer.__dict__


def test_somebody_elses_patch_stays() -> None:
    model = tiny("llama").requires_grad_(False)
    layer = model.model.layers[0].mlp.up_proj
    patch = layer.__dict__["forward"] = lambda x: F.linear(x, layer.weight) + 1
    with Fast(model):
        assert layer.forward is patch
    assert layer.forward is patch


def fast_layer(weight: Tensor, bias: Tensor | None = None, depth: int = 0) -> tuple[nn.Linear, Fast]:
    """A linear layer of a model whose products are frozen ones, which lies so deep."""
    model = tiny("llama").requires_grad_(False)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    model.model.layers[0].mlp.up_proj = layer
    fast = Fast(model)
    fast.products.order._first[id(layer)] = depth
    return layer, fast


@pytest.mark.parametrize("speeds", [PAYS, LOSES], ids=["oneDNN", "torch"])
@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 1, 6), (3, 5, 6), (2, 6), (1, 5, 6), (2, 3, 5, 6)], ids=str)
def test_tensors_of_other_shapes_are_multiplied_whole(
    shape: tuple[int, ...], speeds: Speeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only (rows, width, ...) of the batch is known to be its tokens: pooled ones, queries and tables are not."""
    monkeypatch.setattr(onednn, "speeds", lambda _kind: speeds)
    torch.manual_seed(0)
    layer, fast = fast_layer(torch.randn(4, 6), torch.randn(4))
    x = torch.randn(*shape, requires_grad=True)
    expected = F.linear(x, layer.weight, layer.bias)
    gradient = torch.randn_like(expected)
    own = torch.ones(shape[:-1])
    needed = own.clone()
    if shape == (2, 5, 6):
        own[1, 2:] = needed[1, 2:] = needed[0] = 0
    with fast, fast.batch(Layout(5, [0, 0], [5, 2], [1, 0], CPU)):
        y = layer(x)
        (found,) = torch.autograd.grad(y, x, gradient)
    assert_close(y, expected * own.unsqueeze(-1))
    assert_close(found, gradient @ layer.weight * needed.unsqueeze(-1))


TRAINED = ["weight", "bias", "weight bias", "x weight", "x bias", "x weight bias"]


@pytest.mark.parametrize("speeds", [PAYS, LOSES], ids=["oneDNN", "torch"])
@pytest.mark.parametrize("trains", TRAINED)
def test_what_is_trained_gets_its_gradient(trains: str, speeds: Speeds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "speeds", lambda _kind: speeds)
    torch.manual_seed(0)
    layer, fast = fast_layer(torch.randn(4, 6), torch.randn(4))
    x, gradient = torch.randn(2, 5, 6), torch.randn(2, 5, 4)
    wanted = [{"x": x, **dict(layer.named_parameters())}[name].requires_grad_() for name in trains.split()]
    expected = F.linear(x, layer.weight, layer.bias)
    expected_gradients = torch.autograd.grad(expected, wanted, gradient)
    with fast, fast.batch(Layout(5, [0, 0], [5, 2], [ABOVE, ABOVE], CPU)):
        y = layer(x)
        found = torch.autograd.grad(y, wanted, gradient)
    assert_close(y, expected)
    assert_close(found, expected_gradients)


def test_trained_weights_too_are_multiplied_by_the_faster_library(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, fast = fast_layer(torch.randn(4, 6))
    tokens = multiplied(monkeypatch)
    layer.requires_grad_()
    x = torch.randn(2, 5, 6, requires_grad=True)
    with fast, fast.batch(Layout(5, [0, 0], [5, 2], [0, 0], CPU)):
        layer(x).sum().backward()
    # Forward, for x, and for the weight, whose rows are the features of the output.
    assert tokens == ([10, 10, 4] if onednn.available() else [])


def test_outside_of_a_block_products_are_whole() -> None:
    layer, fast = fast_layer(torch.randn(4, 6))
    x = torch.randn(2, 5, 6)
    with fast:
        with fast.batch(Layout(5, [0, 0], [5, 2], [0, 0], CPU)):
            assert not layer(x)[1, 2:].any()
            assert_close(layer(input=x), layer(x))
        assert layer(x)[1, 2:].all()
        with pytest.raises(RuntimeError, match="on the way"), fast.batch(Layout(5, [0, 0], [5, 2], [0, 0], CPU)):
            raise RuntimeError("on the way")
        assert_close(layer(x), F.linear(x, layer.weight))
    assert "forward" not in layer.__dict__


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", [False, True])
def test_half_precision_is_that_of_the_plain_layer(base: torch.dtype, cast: bool) -> None:
    torch.manual_seed(0)
    layer, fast = fast_layer(torch.randn(4, 6).to(base), torch.randn(4).to(base))
    x = torch.randn(2, 5, 6, dtype=torch.float32 if cast else base, requires_grad=True)
    gradients = []
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        expected = layer(x)
    with fast, fast.batch(Layout(5, [0, 0], [5, 2], [0, 0], CPU)):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            y = layer(x)
        assert y.dtype == expected.dtype == (torch.bfloat16 if cast else base)
        for out in (y, expected):
            (gradient,) = torch.autograd.grad(out[:, :2].float().square().sum(), x)
            gradients.append(gradient)
    half = expected.dtype == torch.bfloat16
    assert_close(y[:, :2], expected[:, :2], HALF if half else PASS)
    assert_close(*gradients, HALF if half else GRADIENT, dtype=expected.dtype)
    if base == torch.bfloat16 or not cast:
        assert not y[1, 2:].any(), "padding is left out"


def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes the tokens of every frozen product."""
    tokens: list[int] = []
    multiply = products.multiply

    def spy(x: Tensor, *rest: Any) -> Tensor:
        tokens.append(x.numel() // x.shape[-1])
        return multiply(x, *rest)

    monkeypatch.setattr(products, "multiply", spy)
    return tokens


def test_padding_and_rows_that_need_no_gradient_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, fast = fast_layer(torch.randn(4, 6), depth=1)
    tokens = multiplied(monkeypatch)
    x = torch.randn(4, 5, 6, requires_grad=True)
    with fast, fast.batch(Layout(5, [0, 1, 0, 2], [5, 2, 1, 3], [ABOVE, 0, 2, 1], CPU)):
        layer(x).sum().backward()
        assert tokens == [5 + 2 + 1 + 3, 2 + 3]
        tokens.clear()
        fast.products.layout = Layout(5, [0, 0], [5, 5], [0, 0], CPU)
        layer(x[:2]).sum().backward()
        assert tokens == [10, 10]
        tokens.clear()
        fast.products.layout = Layout(5, [0, 0], [5, 5], [ABOVE, 2], CPU)
        layer(x[:2]).sum().backward()
        assert tokens == [10], "no row needs one"


METHODS: dict[str, Callable[[], Method]] = {
    "top": lambda: tz.LoRA(r=2, layers_to_transform=[1]),
    "head": tz.Head,
    "all": lambda: tz.LoRA(r=2, target_modules="all-linear"),
    "prompt": lambda: tz.PromptTuning(num_virtual_tokens=3),
    "prefix": lambda: tz.PrefixTuning(num_virtual_tokens=2),
    "ia3": tz.IA3,
}


def gradients_of_a_step(kind: str, fast: bool, model: Any = None, **changes: Any) -> dict[str, Tensor]:
    """Of all that a shared step trains, with and without what makes it fast."""
    model = tiny(kind, "cls", num_labels=2) if model is None else model
    precision = torch.bfloat16 if changes.get("precision") == "bf16" else torch.float32
    end = model.config.eos_token_id if model.config.is_encoder_decoder else None
    data = replace(task((5, 9, 3), train=6, end=end, pad=model.config.pad_token_id), valid=None)
    jobs = []
    changes["accelerations"] = "auto" if fast else "none"
    for number, (name, method) in enumerate(METHODS.items()):
        settings = TrainSettings(batch_size=1 + number % 2, seed=number, **changes)
        jobs.append(Job(name, method(), settings))
    if kind == "llama":
        jobs.append(Job("saved", tz.LoRA(r=2, modules_to_save=["score", "down_proj"]), TrainSettings(**changes)))
    with JobScheduler(model.to(precision), data, rows_per_step=50) as scheduler:
        scheduler.add(jobs)
        scheduler._admit()
        active_jobs = scheduler._picked()
        assert len(active_jobs) == len(jobs), [r.error for r in scheduler.results.values()]
        for active in active_jobs:
            for parameter in active.trained:  # what starts at zero lets no gradient through
                with torch.random.fork_rng(), torch.no_grad():
                    torch.manual_seed(parameter.numel())
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        assert scheduler._step(active_jobs) == active_jobs
        return {
            f"{active.job.name}: {name}": torch.zeros_like(p) if p.grad is None else p.grad
            for active in active_jobs
            for name, p in active.adapter.trained()
        }


@pytest.mark.parametrize("kind", ["llama", "gemma3", "bert", "gpt2", "t5", "bart", "opt"])
def test_a_step_of_many_jobs_has_the_gradients_of_the_plain_model(kind: str) -> None:
    found, expected = (gradients_of_a_step(kind, fast) for fast in (True, False))
    assert found.keys() == expected.keys()
    assert all(gradient.any() or "bias" in name for name, gradient in expected.items())
    assert_close(found, expected, GRADIENT, at="gradient of")


def test_and_when_layers_are_recomputed() -> None:
    found, expected = (gradients_of_a_step("llama", fast, gradient_checkpointing=True) for fast in (True, False))
    assert_close(found, expected, GRADIENT, at="gradient of")


def test_and_in_half_precision() -> None:
    """As near to the same weights' gradients in full precision as they are without: single numbers are noise."""
    rounded = tiny("llama", "cls", num_labels=2).bfloat16().float()
    exact = gradients_of_a_step("llama", False, model=rounded)
    errors = []
    for fast in (True, False):
        found = gradients_of_a_step("llama", fast, precision="bf16")
        errors.append([float((found[n] - g).norm() / g.norm()) for n, g in exact.items() if g.norm() > 0])
    (most, mean), (most_without, mean_without) = ((max(each), sum(each) / len(each)) for each in errors)
    assert most < 2 * most_without < 0.4 and mean < 1.5 * mean_without, errors


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_norms_of_half_precision_round_no_more_than_the_models_own(kind: str) -> None:
    model = tiny(kind).bfloat16().requires_grad_(False)
    norms = FrozenNorms(Common(Base.of(model)))
    module = norms.norms[0][0]
    module.weight += 0.3 * torch.randn_like(module.weight)
    full = deepcopy(module).float()
    with norms:
        pass  # the weight is read where they are entered
    x = torch.randn(200, len(module.weight)).bfloat16().requires_grad_()
    gradient = torch.randn_like(x)

    def results(module: nn.Module, x: Tensor, gradient: Tensor) -> list[Tensor]:
        y = module(x)
        return [y.detach(), *torch.autograd.grad(y, x, gradient)]

    exact = results(full, x.detach().float().requires_grad_(), gradient.float())
    plain = results(module, x, gradient)
    with norms:
        found = results(module, x, gradient)
    for ours, theirs, expected in zip(found, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype == torch.bfloat16
        assert float((ours - expected).norm()) <= 1.01 * float((theirs - expected).norm())


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_norms_are_recognised_and_equal(kind: str) -> None:
    model = tiny(kind)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.weight.data += 0.3 * torch.randn_like(module.weight)
    norms = FrozenNorms(Common(Base.of(model)))
    kinds = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    assert len(norms.norms) == len(kinds) > 0
    for module in kinds:
        module.requires_grad_(False)
        x = torch.randn(3, 5, len(module.weight), requires_grad=True)
        gradient = torch.randn_like(x)
        plain = module(x)
        (expected,) = torch.autograd.grad(plain, x, gradient)
        with norms:
            y = module(x)
            (found,) = torch.autograd.grad(y, x, gradient)
        assert_close(y, plain)
        assert_close(found, expected, GRADIENT)


def test_a_norm_of_another_formula_is_left_alone() -> None:
    class StrangeRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.abs().mean(-1, keepdim=True) * self.weight

    model = tiny("llama")
    before = len(FrozenNorms(Common(Base.of(model))).norms)
    model.model.norm = StrangeRMSNorm()
    assert len(FrozenNorms(Common(Base.of(model))).norms) == before - 1


@pytest.mark.skipif(not onednn.available(), reason="this torch has no oneDNN")
class TestCopies:
    """Weights in oneDNN's own layout."""

    def layer(self) -> tuple[nn.Linear, Fast]:
        torch.manual_seed(0)
        return fast_layer(torch.randn(64, 32), torch.randn(64))

    def check(self, layer: nn.Linear, fast: Fast) -> None:
        x = torch.randn(3, 5, 32, requires_grad=True)
        gradient = torch.randn(3, 5, 64)
        with fast.batch(Layout(5, [0] * 3, [5] * 3, [-1] * 3, CPU)):
            y = layer(x)
            (found,) = torch.autograd.grad(y, x, gradient)
        assert_close(y, F.linear(x, layer.weight, layer.bias))
        assert_close(found, gradient @ layer.weight)

    def test_every_frozen_layer_has_its_own_until_it_is_left(self) -> None:
        layer, fast = self.layer()
        with fast:
            weights = sum(module.weight.nbytes for module in fast.products.layers)
            assert fast.take(8 * weights) == 2 * weights
            assert set(fast.products.copies) == {id(module) for module in fast.products.layers}
            assert fast.take() == 0  # there already
            copies = fast.products.copies[id(layer)]
            assert torch.equal(copies.forward.to_dense(), layer.weight)
            self.check(layer, fast)
            # They are what is multiplied with.
            fast.products.copies[id(layer)] = zeros(copies)
            x = torch.ones(1, 1, 32, requires_grad=True)
            with fast.batch(Layout(1, [0], [1], [-1], CPU)):
                y = layer(x)
                assert torch.equal(y, layer.bias.expand(1, 1, -1))
                assert not torch.autograd.grad(y.sum(), x)[0].any()
        assert not fast.products.copies

    def test_none_where_there_is_no_room(self) -> None:
        _, fast = self.layer()
        weights = sum(module.weight.nbytes for module in fast.products.layers)
        assert fast.take(8 * weights - 1) == 0 and not fast.products.copies
        assert fast.accelerations.free() == 0
        assert fast.take() == fast.accelerations.free() == 2 * weights

    def test_none_where_memory_runs_out_on_the_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer, fast = self.layer()
        of = Copies.of

        def last_fails(weight: Tensor, wanted: Directions) -> Copies:
            if weight is fast.products.layers[-1].weight:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return of(weight, wanted)

        monkeypatch.setattr(Copies, "of", last_fails)
        with fast:
            assert fast.take() == 0 and not fast.products.copies
            self.check(layer, fast)

    def test_none_for_arithmetic_that_does_not_use_them(self) -> None:
        with JobScheduler(tiny("llama", "cls", num_labels=2), task()) as scheduler:
            scheduler.add([Job("lora", tz.LoRA(r=2), TrainSettings(epochs=1, precision="bf16"))])
            scheduler.run()
            assert not scheduler.step.accelerations.common.products.copies
        assert scheduler.results["lora"].status == "done"

    def test_none_in_another_precision(self) -> None:
        _, fast = self.layer()
        other = fast.products.layers[-1]
        other.weight.data = other.weight.data.half()
        fast.take()
        assert set(fast.products.copies) == {id(module) for module in fast.products.layers} - {id(other)}

    def test_those_of_a_trained_weight_are_not_read(self) -> None:
        layer, fast = self.layer()
        layer.weight.requires_grad_(True)
        with fast:
            fast.take()
            copies = fast.products.copies[id(layer)]
            fast.products.copies[id(layer)] = zeros(copies)
            self.check(layer, fast)

    def test_a_weight_changed_meanwhile_is_multiplied_as_it_is_now(self) -> None:
        layer, fast = self.layer()
        with fast, torch.no_grad():
            fast.take()
            layer.weight.mul_(2)
            with torch.enable_grad():
                self.check(layer, fast)
            layer.weight = nn.Parameter(torch.randn(64, 32), requires_grad=False)
            with torch.enable_grad():
                self.check(layer, fast)

    @pytest.mark.parametrize("limited", [False, True])
    def test_jobs_that_share_have_them_and_full_training_has_their_room(self, limited: bool) -> None:
        model, data = tiny("llama", "cls", num_labels=2), task()
        seen: list[tuple[str, bool, float]] = []

        class Watch(Silent):
            def job_started(self, job: Job, result: JobResult, steps: int) -> None:
                seen.append((job.name, bool(scheduler.step.accelerations.common.products.copies), scheduler.room))

        jobs = [
            Job("full", tz.Full(), TrainSettings(epochs=1)),
            Job("lora", tz.LoRA(r=2), TrainSettings(epochs=1)),
        ]
        with JobScheduler(model, data, observer=Watch(), memory=in_use(CPU) + 2**30 if limited else None) as scheduler:
            before = scheduler.room
            scheduler.add(jobs)
            scheduler.run()
            taken = 2 * sum(module.weight.nbytes for module in scheduler.step.accelerations.common.products.layers)
        assert [result.status for result in scheduler.results.values()] == ["done", "done"]
        assert seen == [("lora", True, before - taken), ("full", False, before)]

    @pytest.mark.parametrize("jobs", [1, 3])
    def test_they_go_before_a_job_is_refused(self, jobs: int) -> None:
        """A limit that holds the jobs alone, or copies and some of them."""
        model, data = tiny("llama", "cls", num_labels=2, intermediate_size=8), task()
        added = [Job(f"lora{i}", tz.LoRA(r=64, target_modules="all-linear"), TrainSettings()) for i in range(jobs)]
        with JobScheduler(model, data, memory=in_use(CPU) + 2**30) as scheduler:
            scheduler.add([Job("measured", added[0].method, TrainSettings())])
            scheduler._admit()
            (active,) = scheduler.active_jobs.values()
            assert active.need is not None
            needed = jobs * active.kept_bytes + active.need.alone
            taken = 2 * sum(module.weight.nbytes for module in scheduler.step.accelerations.common.products.layers)
        assert 4 * taken <= needed, "else no copies are made at all"
        with JobScheduler(model, data, memory=in_use(CPU) + 2**30) as scheduler:
            scheduler.room = needed + taken / 2
            scheduler.add(added)
            scheduler._admit()
            assert (
                len(scheduler.active_jobs) == jobs
                and not scheduler.step.accelerations.common.products.copies
                and scheduler.room == needed + taken / 2
            )

    def test_they_go_before_a_step_that_found_no_memory_is_made_smaller(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, data = tiny("llama", "cls", num_labels=2), task()
        with JobScheduler(model, data) as scheduler:
            losses, sizes = scheduler.step.losses, list[int]()

            def short(active_jobs: Any, batches: Any) -> Any:
                sizes.append(len(active_jobs))
                if scheduler.step.accelerations.common.products.copies:
                    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
                return losses(active_jobs, batches)

            monkeypatch.setattr(scheduler.step, "losses", short)
            scheduler.add([Job(f"lora{i}", tz.LoRA(r=2), TrainSettings(epochs=1)) for i in range(2)])
            scheduler.run()
        assert [result.status for result in scheduler.results.values()] == ["done", "done"]
        assert set(sizes) == {2} and not scheduler.step.accelerations.common.products.copies

    def test_none_on_a_machine_whose_memory_is_short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, data = tiny("llama", "cls", num_labels=2), task()
        with JobScheduler(model, data) as scheduler:
            taken = 2 * sum(module.weight.nbytes for module in scheduler.step.accelerations.common.products.layers)
            monkeypatch.setattr(onednn, "free", lambda: 4 * taken - 4)
            scheduler.add([Job("lora", tz.LoRA(r=2), TrainSettings(epochs=1))])
            scheduler.run()
            assert not scheduler.step.accelerations.common.products.copies
        assert scheduler.results["lora"].status == "done"


def zeros(copies: Copies) -> Copies:
    """Copies that are said to be of the same weight, and are zero."""
    forward, backward = (torch.zeros_like(w) for w in (copies.weight, copies.weight.t()))
    reorder = torch.ops.mkldnn._reorder_linear_weight
    return replace(copies, forward=reorder(forward), backward=reorder(backward))
