"""Law: logits and gradients with and without each acceleration are equal, and the model is left as it was.

Every one in the registry, by itself (with what it is within), left out, and all of them, on every family: where it does
nothing it must change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AlbertConfig, AlbertForSequenceClassification, PreTrainedModel
from variants import attach, opened

import tanzaku as tz
from close import GRADIENT, assert_close
from models import batch, tiny
from tanzaku.core.manager import manager_of
from tanzaku.engine import gates, norms, onednn, packing, products
from tanzaku.engine.accelerations import ACCELERATIONS, Accelerations
from tanzaku.engine.layout import Layout
from tanzaku.engine.names import NAMES
from tanzaku.engine.onednn import Speeds, Times
from tanzaku.models.families import Base

KINDS = ["llama", "gemma3", "qwen2", "qwen3", "bert", "t5", "bart", "gpt2"]
PAYS = Times(torch=3, onednn=2, prepacked=1)
# Rows and their adapters: unequal lengths, one bare row, several methods, one of them on the upper layer alone.
ENTRIES = ["lora", "ia3", "prefix", "prompt", None, "top", "lora"]
METHODS: dict[str, Callable[[], tz.Method]] = {
    "lora": lambda: tz.LoRA(r=2, target_modules="all-linear"),
    "ia3": tz.IA3,
    "prefix": lambda: tz.PrefixTuning(num_virtual_tokens=2),
    "prompt": lambda: tz.PromptTuning(num_virtual_tokens=3),
    "top": lambda: tz.LoRA(r=2, layers_to_transform=[1]),
}


@pytest.fixture(autouse=True)
def _onednn_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever processor runs these tests: oneDNN is used wherever it can be."""
    monkeypatch.setattr(onednn, "speeds", lambda _kind: Speeds(PAYS, PAYS))


def alone(name: str) -> str:
    """The choice of this one, with what it is within."""
    within = NAMES[name]
    return name if within is None else f"{within},{name}"


@dataclass
class Rows:
    """A mixed batch as a task collates it."""

    inputs: dict[str, Tensor]
    lengths: list[int]
    decoder_lengths = [0] * 8  # a classifier's decoder reads what its encoder does
    decoder_width = 0

    @property
    def width(self) -> int:
        return self.inputs["input_ids"].shape[1]


class Mixed:
    """A model with adapters of several methods, and a batch that is routed to them and to none."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.base = model, Base.of(model)
        self.adapters = {
            name: opened(attach(model, make(), name, seed=seed), seed)
            for seed, (name, make) in enumerate(METHODS.items())
        }
        inputs = batch(model, rows=len(ENTRIES), length=11)
        self.rows = Rows(inputs, inputs["attention_mask"].sum(1).tolist())
        assert len(set(self.rows.lengths)) > 2

    def numbers(self, wanted: str, times: int = 1) -> dict[str, Tensor]:
        """Logits, and the gradient of all that is trained, of so many passes the last."""
        accelerations = Accelerations(self.base, wanted)
        options = {} if self.base.encoder_decoder else {"use_cache": False}
        if not hasattr(self.base.config, "use_cache"):
            options = {}
        trained = [(f"{name} {path}", p) for name, a in self.adapters.items() for path, p in a.trained()]
        rows = [None if name is None else self.adapters[name] for name in ENTRIES]
        with tz.route(self.model, ENTRIES):
            route = manager_of(self.model).route
            with accelerations:
                accelerations.take(math.inf)
                for _ in range(times):
                    with accelerations.batch(self.rows, rows, route):
                        logits = self.model(**self.rows.inputs, **options).logits
                        found = torch.autograd.grad(logits.square().sum(), [p for _, p in trained], allow_unused=True)
        names = [name for name, _ in trained]
        gradients = [torch.zeros_like(p) if g is None else g for (_, p), g in zip(trained, found, strict=True)]
        return {"logits": logits.detach(), **dict(zip(names, gradients, strict=True))}


@pytest.fixture(scope="module", params=KINDS)
def mixed(request: pytest.FixtureRequest) -> Iterator[tuple[Mixed, dict[str, Tensor]]]:
    subject = Mixed(tiny(request.param))
    expected = subject.numbers("none")
    assert all(expected[name].any() for name in expected if "bias" not in name)
    yield subject, expected


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert_close(found["logits"], expected["logits"], GRADIENT, at="logits")
    assert_close(found, expected, GRADIENT, at="gradient of")


@pytest.mark.parametrize("name", ACCELERATIONS)
def test_by_itself_it_changes_nothing(name: str, mixed: tuple[Mixed, dict[str, Tensor]]) -> None:
    """In the first pass, before the order of layers is known, and in the second."""
    subject, expected = mixed
    for times in (1, 2):
        assert_same(subject.numbers(alone(name), times), expected)


@pytest.mark.parametrize("name", [*ACCELERATIONS, "nothing"])
def test_left_out_it_changes_nothing(name: str, mixed: tuple[Mixed, dict[str, Tensor]]) -> None:
    subject, expected = mixed
    assert_same(subject.numbers("auto" if name == "nothing" else f"no-{name}", times=2), expected)


@pytest.mark.parametrize("wanted", [*map(alone, ACCELERATIONS), "auto"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "bert", "t5"])
def test_the_model_is_left_as_it_was(kind: str, wanted: str) -> None:
    subject = Mixed(tiny(kind))
    subject.numbers("none")  # what stands there for adapters stays until they go

    def state() -> Any:
        modules = {
            path: (
                {*module.__dict__} - {"forward"} if "forward" not in module.__dict__ else "another forward",
                *({*hooks} for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)),
            )
            for path, module in subject.model.named_modules()
        }
        return modules, subject.model.config.to_dict(), subject.model.config._attn_implementation

    before, tensors = state(), {name: p.clone() for name, p in subject.model.state_dict().items()}
    subject.numbers(wanted, times=2)
    assert state() == before
    assert all(torch.equal(p, tensors[name]) for name, p in subject.model.state_dict().items())
    with pytest.raises(RuntimeError, match="on the way"), broken(subject):
        subject.numbers(wanted)
    assert state() == before


@contextmanager
def broken(subject: Mixed) -> Iterator[None]:
    """A pass that ends with an error in the middle of the model."""

    def fail(*_: Any) -> None:
        raise RuntimeError("on the way")

    layers = [m for m in subject.base.backbone.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2]
    handle = layers[0][1].register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


# -- each is used where it says so, and where it is left out it is not

ALWAYS: Callable[..., bool] = lambda *_: True  # noqa: E731
# Name -> what it calls when it is at work, and in which of the calls it is.
WORK: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "packing": (packing.Packing, "attend", ALWAYS),
    "row_attention": (packing, "row_attention", ALWAYS),
    "last_token": (Layout, "places", lambda layout, depth=None, last=False: last),
    "skip_unneeded": (Layout, "places", lambda layout, depth=None, last=False: depth is not None),
    "onednn": (products, "multiply", lambda x, weight, bias, onednn, copy=None: onednn),
    "prepacked_weights": (products, "multiply", lambda x, weight, bias, onednn, copy=None: copy is not None),
    # To know a module they try it, without gradients.
    "norms": (norms, "_forward", lambda *_: torch.is_grad_enabled()),
    "gates": (gates, "_forward", lambda *_: torch.is_grad_enabled()),
}


@pytest.mark.parametrize("name", ACCELERATIONS)
def test_it_works_where_it_is_wanted_and_nowhere_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in ("onednn", "prepacked_weights") and not onednn.available():
        pytest.skip("this torch has no oneDNN")
    owner, attribute, at_work = WORK[name]
    own, calls = getattr(owner, attribute), []

    def spy(*args: Any, **kwargs: Any) -> Any:
        if at_work(*args, **kwargs):
            calls.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(owner, attribute, spy)
    subject = Mixed(tiny("gemma3"))  # whose rows are short beside its heads
    assert Accelerations(subject.base).members[name].possible
    counted = {}
    for wanted in ("auto", f"no-{name}", "none"):
        calls.clear()
        subject.numbers(wanted, times=2)
        counted[wanted] = len(calls)
    assert counted["auto"] > 0 == counted[f"no-{name}"] == counted["none"]


def test_in_a_padded_batch_too_the_last_layer_passes_on_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, seen = Mixed(tiny("llama")), list[int]()
    down = subject.model.model.layers[-1].mlp.down_proj
    down.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    subject.numbers("last_token")
    subject.numbers("none")
    assert seen == [1, 3 + 11]


# -- how deep a layer lies


def test_an_encoder_needs_no_gradient_for_what_the_decoder_trains() -> None:
    """Two stacks count their layers alike; what tells is which of them runs first."""
    model = tiny("t5", "cls")
    base = Base.of(model)
    methods = {side: tz.LoRA(r=2, target_modules=rf".*{side}\.block\.1.*\.q") for side in ("encoder", "decoder")}
    adapters = [opened(attach(model, method, side, seed=0)) for side, method in methods.items()]
    inputs = batch(model, rows=2)
    trained = [p for adapter in adapters for _, p in adapter.trained()]

    def gradients(wanted: str) -> tuple[list[Tensor], Accelerations]:
        accelerations = Accelerations(base, wanted)
        rows = Rows(inputs, inputs["attention_mask"].sum(1).tolist())
        with accelerations, tz.route(model, list(methods)):
            for _ in range(2):
                with accelerations.batch(rows, adapters, None):
                    loss = model(**inputs).logits.square().sum()
                    found = torch.autograd.grad(loss, trained)
        return list(found), accelerations

    expected, _ = gradients("none")
    found, accelerations = gradients("skip_unneeded")
    assert_close(found, expected, GRADIENT)
    encoder, decoder = (accelerations.depth(adapter) for adapter in adapters)
    assert 0 < encoder < decoder
    inside = [m for m in model.transformer.encoder.modules() if type(m) is torch.nn.Linear]
    assert inside and all(accelerations.common.order.depth(module) < decoder for module in inside)


def test_a_layer_that_runs_again_may_lie_below_whatever_is_trained() -> None:
    """ALBERT's layers share one module: what it trains last is read again by what ran before it."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0}
    config = AlbertConfig(vocab_size=128, num_hidden_layers=3, max_position_embeddings=64, **sizes, **rates)
    model = AlbertForSequenceClassification(config).eval()
    late = tz.LoRA(r=2, target_modules=["ffn_output"])
    adapters = [
        opened(attach(model, method, name, seed=0)) for name, method in {"late": late, "head": tz.Head()}.items()
    ]
    inputs = batch(model, rows=2)
    trained = [p for _, p in adapters[0].trained()]
    found = []
    for wanted in ("none", "skip_unneeded"):
        accelerations = Accelerations(Base.of(model), wanted)
        rows = Rows(inputs, inputs["attention_mask"].sum(1).tolist())
        with accelerations, tz.route(model, ["late", "head"]):
            for _ in range(2):
                with accelerations.batch(rows, adapters, None):
                    loss = model(**inputs).logits.square().sum()
                    gradients = torch.autograd.grad(loss, trained)
        found.append(list(gradients))
    assert_close(found[1], found[0], GRADIENT)
    assert all(g.any() for g in found[0])


def test_until_a_pass_was_seen_everything_needs_every_gradient() -> None:
    subject = Mixed(tiny("llama"))
    accelerations = Accelerations(subject.base)
    order, layers = accelerations.common.order, accelerations.common.products.layers
    assert {accelerations.depth(adapter) for adapter in subject.adapters.values()} == {-1}
    with torch.no_grad(), accelerations, accelerations.batch(subject.rows, [None] * len(ENTRIES), None):
        subject.model(**subject.rows.inputs)
    assert {accelerations.depth(adapter) for adapter in subject.adapters.values()} == {-1}, "no gradient, no order"
    with accelerations, accelerations.batch(subject.rows, [None] * len(ENTRIES), None):
        subject.model(**subject.rows.inputs, use_cache=False)
    depths = [order.depth(module) for module in layers]
    assert len(set(depths)) == len(layers) and depths == sorted(depths), "a llama runs as it is written"
    low = {name: accelerations.depth(adapter) for name, adapter in subject.adapters.items()}
    assert low["prompt"] == -1 < low["prefix"] < low["lora"] < low["ia3"] < low["top"] < depths[-1]
