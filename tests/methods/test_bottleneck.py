"""Bottleneck adapters: where they stand in pre-LN and post-LN models, and what each setting computes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tanzaku as tz
from close import GRADIENT, assert_close, close
from models import KINDS, batch, tiny
from tanzaku.core.manager import manager_of
from tanzaku.methods.bottleneck import STYLES, BottleneckLayer
from tanzaku.methods.invertible import Coupling, Inverse

TEXT = [kind for kind in KINDS if kind not in ("clip", "whisper")]


def layers_of(adapter: tz.Adapter) -> dict[str, BottleneckLayer]:
    return {path: layer for path, layer in adapter.at() if isinstance(layer, BottleneckLayer)}


@torch.no_grad()
def stirred(adapter: tz.Adapter, seed: int = 0) -> tz.Adapter:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in adapter.trained():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapter


def attached(model: nn.Module, name: str = "a", seed: int = 0, **settings: Any) -> tz.Adapter:
    method = tz.BottleneckAdapter(**{"reduction_factor": 8, "modules_to_save": [], **settings})
    return stirred(tz.attach(model, method, name, seed=seed), seed)


def run(model: nn.Module, entries: list[Any], **inputs: Tensor) -> Tensor:
    with tz.route(model, entries):
        out = model(**inputs)
    found = out.last_hidden_state if "last_hidden_state" in out else out.logits
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", TEXT)
def test_every_family(kind: str, style: str) -> None:
    """Rows routed to it change, and are in a mixed batch what they are alone; bare rows stay."""
    model = tiny(kind, "base")
    side_by_side = kind in ("phi", "gpt_neox") and style == "parallel"
    if side_by_side:
        with pytest.raises(tz.TanzakuError, match="beside which attention adds to the same residual stream"):
            attached(model, style=style)
        return
    adapter = attached(model, style=style)
    each = 2 * (2 if style == "houlsby" else 1) * (2 if kind in ("t5", "bart") else 1)
    assert len(layers_of(adapter)) == each
    inputs = batch(model)
    with torch.no_grad():
        base, alone = run(model, [None] * 4, **inputs), run(model, ["a"] * 4, **inputs)
        mixed = run(model, ["a", None, "a", None], **inputs)
    assert_close(mixed[[1, 3]], base[[1, 3]])
    assert_close(mixed[[0, 2]], alone[[0, 2]])
    assert not close(alone, base)


# -- every setting, against the sublayer written out


class Written:
    """A BERT's feed-forward block, or a LLaMA's, written out with a bottleneck, as the Adapters library's settings
    say what it is."""

    def __init__(self, layer: BottleneckLayer, settings: dict[str, Any]):
        self.layer, self.settings = layer, settings

    def b(self, x: Tensor) -> Tensor:
        layer = self.layer
        z = x if layer.norm_before is None else layer.norm_before(x)
        z = layer.act(z @ layer.down.weight.T + layer.down.bias) @ layer.up.weight.T + layer.up.bias
        z = z * layer.scaling
        if layer.gate is not None:
            z = z * torch.sigmoid(x @ layer.gate.weight.T + layer.gate.bias).mean(dim=1, keepdim=True)
        return z

    def stream(self, h: Tensor, r: Tensor, norm: nn.Module | None) -> Tensor:
        get = self.settings.get
        last = self.layer.norm_after or (lambda z: z)
        if get("is_parallel"):
            z = last(self.b(r)) + h
        else:
            x = residual = h
            if get("original_ln_before"):
                total = h + r
                x = total if norm is None else norm(total)
                residual = {True: h, "post_add": total, False: x}[get("residual_before_ln", True)]
            inside = get("adapter_residual_before_ln")
            z = last(self.b(x) + residual) if inside else last(self.b(x)) + residual
        if not get("original_ln_after", True):
            return z
        return z + r if norm is None else norm(z + r)


COMBINATIONS = [
    {"original_ln_before": before, "original_ln_after": after, "residual_before_ln": residual}
    | ({"ln_after": True, "adapter_residual_before_ln": inside} if inside is not None else {})
    for before, after, residual, inside in itertools.product(
        (True, False), (True, False), (True, False, "post_add"), (None, False, True)
    )
    if before or residual is True
] + [
    {"is_parallel": True},
    {"is_parallel": True, "original_ln_after": False},
    {"is_parallel": True, "ln_before": True, "ln_after": True, "scaling": 3.0},
    {"ln_before": True, "scaling": "learned"},
    {"scaling": "channel", "use_gating": True, "original_ln_before": True},
    {"use_gating": True, "is_parallel": True},
]


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("settings", COMBINATIONS, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()))
def test_every_setting_computes_what_its_name_says(kind: str, settings: dict[str, Any]) -> None:
    model, inputs = tiny(kind, "base"), batch(tiny(kind, "base"), padding=None)
    settings = {"original_ln_before": False, **settings}
    adapter = attached(model, non_linearity="gelu", **settings)
    with torch.no_grad():
        found = run(model, ["a"] * 4, **inputs)
        written = iter([Written(layer, settings) for layer in layers_of(adapter).values()])
        plain = tiny(kind, "base")
        if kind == "bert":
            for block in plain.encoder.layer:
                block.forward = _bert(block, next(written))
        else:
            for block in plain.layers:
                block.forward = _llama(block, next(written))
        expected = plain(**inputs).last_hidden_state
    assert_close(found, expected, 2**9)


def _bert(block: Any, written: Written) -> Any:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        attended = block.attention(hidden_states, *args, **kwargs)
        r = attended[0] if isinstance(attended, tuple) else attended
        h = block.output.dense(block.intermediate(r))
        return written.stream(h, r, block.output.LayerNorm)

    return forward


def _llama(block: Any, written: Written) -> Any:
    def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        r = hidden_states + block.self_attn(hidden_states=block.input_layernorm(hidden_states), **kwargs)[0]
        return written.stream(block.mlp(block.post_attention_layernorm(r)), r, None)

    return forward


# -- invertible adapters


@pytest.mark.parametrize("kind", [k for k in TEXT if k not in ("vit", "deberta-v2")])
def test_what_is_moved_on_the_way_in_is_moved_back_before_the_head(kind: str) -> None:
    model = tiny(kind, "lm")
    adapter = attached(model, inv_adapter="nice")
    inputs = batch(model)
    coupling = next(layer for _, layer in adapter.at() if isinstance(layer, Coupling))
    x = torch.randn(2, 3, 32)
    assert_close(coupling.back(coupling.there(x)), x)
    assert not close(coupling.there(x), x)
    with torch.no_grad():
        alone, base = run(model, ["a"] * 4, **inputs), run(model, [None] * 4, **inputs)
        mixed = run(model, ["a", None, "a", None], **inputs)
    assert_close(mixed[[0, 2]], alone[[0, 2]])
    assert_close(mixed[[1, 3]], base[[1, 3]])
    paths = [path for path, layer in adapter.at() if isinstance(layer, Inverse)]
    assert [model.get_submodule(path) for path in paths] == [model.get_output_embeddings()]


def test_of_a_stack_the_last_is_undone_first() -> None:
    """With nothing between the way in and the way back, a stack of two is no change."""
    model = tiny("llama", "lm", num_hidden_layers=1)
    options = {"output_adapter": False, "mh_adapter": True, "leave_out": [0], "inv_adapter": "nice"}
    for seed, name in enumerate("ab"):
        attached(model, name, seed, **options)
    block, norm = model.model.layers[0], model.model.norm
    block.forward = lambda hidden_states, **_: hidden_states
    norm.forward = lambda hidden_states: hidden_states
    inputs = batch(model)
    with torch.no_grad():
        base = run(model, [None] * 4, **inputs)
        for stack in ("a", "b", ("a", "b"), ("b", "a")):
            assert_close(run(model, [stack] * 4, **inputs), base, 2**10)


# -- layers that are left out


@pytest.mark.parametrize("style", STYLES)
def test_layers_that_are_left_out_have_no_parameters(style: str) -> None:
    model = tiny("t5", "lm")
    adapter = attached(model, style=style, leave_out=[0, 3])
    assert all(".block.0." not in f".{path}" or "decoder" in path for path in layers_of(adapter))
    assert {layer.site.number for layer in layers_of(adapter).values()} == {1, 2}


@pytest.mark.parametrize("style", STYLES)
def test_adapters_that_are_dropped_in_prediction_are_trained(style: str, tmp_path) -> None:
    """With `drop_layers` a trained adapter predicts as one that never had these layers; in training it has them."""
    model, inputs = tiny("llama", "base"), batch(tiny("llama", "base"))
    method = tz.BottleneckAdapter(style=style, reduction_factor=8)
    stirred(tz.attach(model, method, "whole", seed=1), 1)
    tz.save(model, "whole", tmp_path / "a")
    dropped = tz.BottleneckAdapter(style=style, reduction_factor=8, drop_layers=1)
    tz.load(model, tmp_path / "a", "dropped", method=dropped)
    short = tz.BottleneckAdapter(style=style, reduction_factor=8, leave_out=[0])
    with pytest.warns(UserWarning, match="unexpected"):
        tz.load(model, tmp_path / "a", "short", method=short, strict=False)
    with torch.no_grad():
        assert_close(run(model, ["dropped"] * 4, **inputs), run(model, ["short"] * 4, **inputs))
        assert_close(run(model, ["dropped", "whole"] * 2, **inputs)[0], run(model, ["short"] * 4, **inputs)[0])
        model.train()
        assert_close(run(model, ["dropped"] * 4, **inputs), run(model, ["whole"] * 4, **inputs))


def test_a_width_by_layer() -> None:
    adapter = attached(tiny("llama", "base"), reduction_factor={"0": 16, "default": 4})
    assert [layer.down.weight.shape[0] for layer in layers_of(adapter).values()] == [2, 8]
    narrow = attached(tiny("llama", "base"), reduction_factor=1e9)
    assert [layer.down.weight.shape[0] for layer in layers_of(narrow).values()] == [1, 1]


# -- the stream, noted at one module and taken at another


@pytest.mark.parametrize("settings", [{"style": "parallel"}, {"style": "parallel", "mh_adapter": True}])
@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_an_adapter_in_several_stacks_of_a_batch(kind: str, settings: dict[str, Any]) -> None:
    model = tiny(kind, "base")
    attached(model, "a", **settings)
    attached(model, "b", seed=1, **settings)
    entries = ["a", ("a", "b"), ("b", "a"), "b", None, ("a", "b")]
    inputs = batch(model, rows=6)
    with torch.no_grad():
        mixed = run(model, entries, **inputs)
        for row, each in enumerate(entries):
            assert_close(mixed[row], run(model, [each] * 6, **inputs)[row], at=each)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_checkpointed_layers_note_it_again(kind: str) -> None:
    model = tiny(kind, "cls")
    adapter = attached(model, style="parallel", mh_adapter=True)
    attached(model, "b", seed=1, style="parallel")
    inputs, entries = batch(model), ["a", "b", "a", None]

    def gradients() -> list[Tensor]:
        loss = run(model, entries, **inputs).square().sum()
        return list(torch.autograd.grad(loss, [p for _, p in adapter.trained()]))

    model.train()
    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(gradients(), expected, GRADIENT)


def test_nothing_is_kept_when_a_pass_is_over() -> None:
    from tanzaku.core import taps

    model = tiny("llama", "base")
    attached(model, style="parallel")
    run(model, ["a"] * 4, **batch(model))
    assert taps._notes.get() is None


def test_what_never_read_says_so() -> None:
    model = tiny("llama", "base")
    attached(model, style="parallel", leave_out=[1])
    block = model.layers[0]

    def past_the_norm(hidden_states: Tensor, **kwargs: Any) -> Tensor:  # as a kernel that fuses it would be
        r = hidden_states + block.self_attn(hidden_states=block.input_layernorm(hidden_states), **kwargs)[0]
        return r + block.mlp(block.post_attention_layernorm.forward(r))

    block.forward = past_the_norm
    with pytest.raises(tz.TanzakuError, match="read nothing in this pass"):
        run(model, ["a"] * 4, **batch(model))


# -- what cannot be


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"style": "housby"}, r"found style='housby' .did you mean 'houlsby'"),
        ({"non_linearity": "prelu"}, "found non_linearity='prelu'"),
        ({"reduction_factor": 0}, "found reduction_factor=0, expected a number above 0"),
        (
            {"reduction_factor": {"0": 4}},
            "expected a number above 0, or one for each layer, as layer 1, or by 'default'",
        ),
        (
            {"reduction_factor": 1e-9},
            "found reduction_factor=1e-09, which makes a bottleneck of more than 65,536 features",
        ),
        ({"reduction_factor": 5e-324}, "found reduction_factor=5e-324, which makes a bottleneck"),
        (
            {"inv_adapter": "nice", "inv_adapter_reduction_factor": 1e-9},
            "found inv_adapter_reduction_factor=1e-09, which makes a bottleneck",
        ),
        ({"leave_out": [2]}, r"found leave_out=\[2\], expected numbers of layers, 0 to 1"),
        ({"leave_out": [0, 1]}, "found no site"),
        ({"scaling": "big"}, "found scaling='big'"),
        ({"residual_before_ln": "post"}, "found residual_before_ln='post'"),
        ({"init_weights": "zero"}, "found init_weights='zero'"),
        ({"dropout": 1.0}, "found dropout=1.0"),
        ({"inv_adapter": "glow"}, "found inv_adapter='glow', expected 'nice', or None"),
        ({"output_adapter": False}, "found a LlamaModel without any adapter"),
        ({"output_adapter": False, "cross_adapter": True}, "found a LlamaModel without cross"),
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    model = tiny("llama", "base")
    with pytest.raises(tz.TanzakuError, match=said):
        tz.attach(model, tz.BottleneckAdapter(**settings))
    assert manager_of_or_none(model) is None


def manager_of_or_none(model: nn.Module) -> Any:
    return manager_of(model) if tz.adapters(model) else None


def test_cross_attention() -> None:
    adapter = attached(tiny("t5", "lm"), style="houlsby", cross_adapter=True)
    kinds = [layer.site.kind for layer in layers_of(adapter).values() if layer.site.number == 2]
    assert kinds == ["attention", "cross", "feed_forward"]


@pytest.mark.parametrize("init", ["bert", "houlsby"])
def test_other_beginnings_are_near_the_base(init: str) -> None:
    model, inputs = tiny("llama", "base"), batch(tiny("llama", "base"))
    tz.attach(model, tz.BottleneckAdapter(init_weights=init), "a", seed=0)
    with torch.no_grad():
        found, base = run(model, ["a"] * 4, **inputs), run(model, [None] * 4, **inputs)
    assert not torch.equal(found, base)
    assert float((found - base).abs().max()) < 0.05


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_stack_of_a_prefix_and_parallel_adapters_trains_together(kind, tmp_path):
    """MAM adapters (arXiv 2110.04366): both learn of one loss, what a row gets is what it was trained as, and the two
    directories bring it back."""
    model = tiny(kind, "cls")
    made = [
        tz.attach(model, tz.PrefixTuning(num_virtual_tokens=3), "prefix", seed=0),
        tz.attach(model, tz.BottleneckAdapter(style="parallel", modules_to_save=[]), "parallel", seed=0),  # one head
    ]
    tz.activate(model, ["prefix", "parallel"])
    inputs = batch(model)
    labels = torch.arange(len(inputs["input_ids"])) % 2
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(12):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        assert all(p.grad is not None for adapter in made for _, p in adapter.trained())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    stack: Any = ("prefix", "parallel")
    with torch.no_grad():
        trained = model(**inputs).logits
        routed = run(model, [stack] * len(labels), **inputs)
    assert_close(routed, trained)
    fresh = tiny(kind, "cls")
    for adapter in made:
        tz.save(model, adapter.name, tmp_path / adapter.name)
        tz.load(fresh, tmp_path / adapter.name, adapter.name)
    assert_close(run(fresh, [stack] * len(labels), **inputs), trained)
