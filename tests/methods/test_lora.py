"""LoRA's mathematics: y = W x + scaling B A x, for every kind of module and start."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tanzaku as tz
from close import GRADIENT, HALF, assert_close, close
from models import VOCAB, batch, tiny
from tanzaku.core.weights import BiasCopy
from tanzaku.methods.low_rank import low_rank


@torch.no_grad()
def opened(model, method, name="x"):
    adapter = tz.attach(model, method, name, seed=0)
    for _, parameter in adapter.trained():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return adapter


def layers(adapter):
    return {path: layer for path, layer in adapter.at() if not isinstance(layer, BiasCopy)}


class Plain(nn.Module):
    """No transformers model: a convolution, a grouped one, an embedding and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.table = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 6)

    def forward(self, pixels, ids):
        return self.grouped(F.relu(self.conv(pixels))), self.linear(self.table(ids))


def inputs(rows=3):
    torch.manual_seed(1)
    return torch.randn(rows, 3, 9, 9), torch.randint(0, 5, (rows, 2))


def run(model, entries):
    with torch.no_grad(), tz.route(model, entries):
        return model(*inputs())


@pytest.mark.parametrize("targets", [["conv"], ["grouped"], ["conv", "grouped"], ["table"], ["linear"], "table|linear"])
def test_plain_modules(targets):
    """Any torch module, with explicit targets: routed rows equal the merged module's, and bare rows the base's."""
    torch.manual_seed(0)
    model = Plain().eval()
    base = [x.clone() for x in model(*inputs())]
    opened(model, tz.LoRA(r=2, target_modules=targets, lora_alpha=6))
    mixed = run(model, ["x", None, "x"])
    tz.merge(model, "x")
    merged = model(*inputs())
    for found, own, changed in zip(mixed, base, merged, strict=True):
        assert_close(found[[0, 2]], changed[[0, 2]])
        assert_close(found[1], own[1])
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(merged, base, strict=True))


def test_the_formula_of_a_linear_layer():
    """The change is (alpha / r) B A x, whatever the number of dimensions in front."""
    model = Plain().eval()
    (layer,) = layers(opened(model, tz.LoRA(r=3, lora_alpha=5, target_modules=["linear"]))).values()
    x = torch.randn(2, 7, 4)
    with torch.no_grad():
        y = model.linear(x)
        found = layer.outputs(model.linear, x, y)
        a, b = layer.lora_A.weight, layer.lora_B.weight
        assert_close(found, y + 5 / 3 * torch.einsum("or,ri,bti->bto", b, a, x))


def test_vision_patches():
    """ViT's patch projection is a convolution, reached by name."""
    model = tiny("vit")
    opened(model, tz.LoRA(r=2, target_modules=["projection", "q_proj"]))
    given = batch(model)
    with torch.no_grad(), tz.route(model, ["x"] * 4):
        expected = model(**given).logits
    tz.merge(model, "x")
    assert_close(model(**given).logits, expected)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_embedding(kind):
    """An adapted embedding, scaled where its model scales, equals one with changed weights."""
    name = "wte" if kind == "gpt2" else "embed_tokens"
    model = tiny(kind)
    adapter = opened(model, tz.LoRA(r=2, target_modules=[name]))
    ((path, layer),) = layers(adapter).items() - {("score", layers(adapter).get("score"))}
    given = batch(model)
    with torch.no_grad(), tz.route(model, ["x"] * 4):
        expected = model(**given).logits
    with torch.no_grad():
        weight = model.get_submodule(path).weight
        weight.add_((layer.lora_embedding_B @ layer.lora_embedding_A).t() * layer.scaling)
        model.score.weight.copy_(dict(adapter.at())["score"].own["weight"])
    assert_close(model(**given).logits, expected)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", False], ids=str)
def test_starts(init):
    """How A and B are drawn: their product is zero at first, but with False; deviations are as documented."""
    model = tiny("llama", hidden_size=64)
    adapter = tz.attach(model, tz.LoRA(r=8, init_lora_weights=init, target_modules=["q_proj"]), "x", seed=0)
    layer = layers(adapter)["model.layers.0.self_attn.q_proj"]
    a, b = layer.lora_A.weight.detach(), layer.lora_B.weight.detach()
    assert a.any()
    assert b.any().item() == (init in (False, "orthogonal"))
    product = (b @ a).abs().max()
    assert (product > 1e-3) if init is False else (product < 1e-6)
    if init == "gaussian":
        assert abs(a.std() - 1 / 8) < 0.02
    elif init in (True, False):
        assert a.abs().max() <= 1 / math.sqrt(64)


@pytest.mark.parametrize(("use_rslora", "factor"), [(False, 16 / 4), (True, 16 / 2)])
def test_scaling(use_rslora, factor):
    """lora_alpha / r, or lora_alpha / sqrt(r); patterns change rank and alpha a module."""
    method = tz.LoRA(
        r=4,
        lora_alpha=16,
        use_rslora=use_rslora,
        rank_pattern={"layers.1.self_attn.q_proj": 9, "v_.*": 1},
        alpha_pattern={"q_proj": 36},
    )
    found = layers(tz.attach(tiny("llama"), method, "x"))
    at = {path.removeprefix("model.layers."): (s.r, s.scaling) for path, s in found.items() if path != "score"}
    root = (lambda r: math.sqrt(r)) if use_rslora else (lambda r: r)
    assert at == {
        "0.self_attn.q_proj": (4, 36 / root(4)),
        "1.self_attn.q_proj": (9, 36 / root(9)),
        "0.self_attn.v_proj": (1, 16),
        "1.self_attn.v_proj": (1, 16),
    }
    assert layers(tz.attach(tiny("llama"), tz.LoRA(r=4, lora_alpha=16, use_rslora=use_rslora), "x"))[
        "model.layers.0.self_attn.q_proj"
    ].scaling == pytest.approx(factor)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"layers_to_transform": 1}, "1.self_attn.q_proj 1.self_attn.v_proj"),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, "0.self_attn.q_proj 0.self_attn.v_proj"),
        ({"exclude_modules": ["v_proj"]}, "0.self_attn.q_proj 1.self_attn.q_proj"),
        ({"exclude_modules": r".*layers\.0\..*"}, "1.self_attn.q_proj 1.self_attn.v_proj"),
        ({"target_modules": r".*\.1\.mlp\.(up|down)_proj"}, "1.mlp.up_proj 1.mlp.down_proj"),
    ],
    ids=str,
)
def test_where(settings, expected):
    """Layers, patterns, exclusions and regular expressions choose the targets."""
    adapter = tz.attach(tiny("llama"), tz.LoRA(r=2, **settings), "x")
    assert {path for path in layers(adapter) if path != "score"} == {f"model.layers.{p}" for p in expected.split()}


@pytest.mark.parametrize("pattern", [None, "layers", ["h", "layers"]])
def test_experts_lie_in_layers(pattern):
    """Of several numbers in a path the first is the layer's, as in HF PEFT."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(3, 3)}) for _ in range(2))

    model = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(3))})
    method = tz.LoRA(target_modules=["up"], layers_to_transform=[1], layers_pattern=pattern)
    assert set(layers(tz.attach(model, method, "x"))) == {"layers.1.experts.0.up", "layers.1.experts.1.up"}


def test_all_linear_leaves_heads_out():
    """Every linear layer, but no head and no output embedding."""
    for kind, head, left in (("llama", "cls", "score"), ("llama", "lm", "lm_head"), ("gpt2", "lm", "lm_head")):
        model = tiny(kind, head)
        found = {p for p, s in tz.attach(model, tz.LoRA(r=1, target_modules="all-linear"), "x").at() if hasattr(s, "r")}
        kinds = ("Linear", "Conv1D")
        assert found == {p for p, m in model.named_modules() if type(m).__name__ in kinds and p != left}


@pytest.mark.parametrize(("bias", "expected"), [("none", 0), ("lora_only", 4), ("all", 14)])
def test_bias(bias, expected):
    """Which biases are trained: none, the targets', or all."""
    model = tiny("llama", attention_bias=True, mlp_bias=True)
    adapter = tz.attach(model, tz.LoRA(r=2, bias=bias), "x")
    found = [path for path, layer in adapter.at() if isinstance(layer, BiasCopy)]
    assert len(found) == expected


def test_biases_of_half_precision_are_trained_in_full():
    """As every other parameter, and they start as the base's."""
    model = tiny("llama", attention_bias=True).to(torch.bfloat16)
    for path, layer in tz.attach(model, tz.LoRA(r=2, bias="all"), "x").at():
        if isinstance(layer, BiasCopy):
            assert layer.bias.dtype == torch.float32
            assert torch.equal(layer.bias, model.get_submodule(path).bias.float())


def test_dropout_only_in_training():
    """Dropout draws anew in training and is off in evaluation; the base's own numbers are never dropped."""
    model = tiny("llama")
    opened(model, tz.LoRA(r=2, lora_dropout=0.5))
    tz.attach(model, tz.LoRA(r=2, lora_dropout=0.5), "fresh")
    given = batch(model)

    def out(name):
        with torch.no_grad(), tz.route(model, [name] * 4):
            return model(**given).logits

    assert_close(out("x"), out("x"))
    model.train()
    assert not close(out("x"), out("x"))
    assert_close(out("fresh"), out("fresh"))  # B is zero


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"r": 0}, "r=0, expected a rank of 1 or more"),
        ({"r": -2}, "expected a rank of 1 or more"),
        ({"bias": "some"}, "bias='some', expected 'none', 'all' or 'lora_only'"),
        ({"lora_dropout": 1.0}, "expected a probability"),
        ({"lora_dropout": -0.1}, "expected a probability"),
        ({"init_lora_weights": "gausian"}, "init_lora_weights='gausian', expected"),
        ({"r": 3, "init_lora_weights": "orthogonal"}, "even rank"),
        ({"target_modules": ["q_projj"]}, r"'q_projj' matches no module .*did you mean 'q_proj'.*candidates are"),
        ({"target_modules": ["q_proj", "nope"]}, "'nope' matches no module"),
        ({"target_modules": []}, "target_modules is empty; candidates are"),
        ({"target_modules": "("}, "no regular expression"),
        ({"target_modules": "q_proj"}, "matches no module"),
        ({"target_modules": ["input_layernorm"]}, "input_layernorm is a LlamaRMSNorm: expected a linear layer"),
        ({"exclude_modules": ["q_proj", "v_proj"]}, "all excluded"),
        ({"layers_to_transform": [0, 7]}, r"no layer 7; the targets lie in layers \[0, 1\]"),
        ({"rank_pattern": {"k_proj": 2}}, "pattern 'k_proj' that matches no target"),
        ({"rank_pattern": {"q_proj": 0}}, "r=0 for"),
        ({"modules_to_save": ["scoer"]}, r"'scoer' matches no module .*did you mean 'score'"),
    ],
    ids=str,
)
def test_mistakes(settings, match):
    """Each says what was found and what was expected, and attaches nothing."""
    model = tiny("llama")
    with pytest.raises(tz.TanzakuError, match=match):
        tz.attach(model, tz.LoRA(**settings), "x")
    assert tz.adapters(model) == []


def test_a_rank_for_groups():
    """A grouped convolution needs a rank that its groups can share."""
    with pytest.raises(tz.TanzakuError, match="r=3 for grouped, expected a multiple of its 2 groups"):
        tz.attach(Plain(), tz.LoRA(r=3, target_modules=["grouped"]), "x")


def test_unknown_architecture():
    """Without targets an unknown model lists what could be targeted."""
    with pytest.raises(tz.TanzakuError, match=r"set target_modules; candidates are conv, grouped, table, linear"):
        tz.attach(Plain(), tz.LoRA(r=2), "x")


def test_unknown_setting():
    """A misspelt setting gives the nearest known one."""
    with pytest.raises(tz.TanzakuError, match=r"no setting 'lora_alhpa' \(did you mean 'lora_alpha'\?\)"):
        tz.LoRA.from_settings({"lora_alhpa": 3})


# -- several at once, for unequal shares of rows


def several(sizes, *, tokens=1, scaled=False, seed=0):
    """x, y and matrices of an adapter for each share of rows, and its factors."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    x, y = drawn(sum(sizes), tokens, 6), drawn(sum(sizes), tokens, 5)
    a, b = [drawn(2, 6) for _ in sizes], [drawn(5, 2) for _ in sizes]
    return x, y, a, b, [drawn(2, 1) for _ in sizes] if scaled else []


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 3), st.booleans(), st.integers(0, 10**6))
def test_several_at_once_are_each_by_itself(sizes, tokens, scaled, seed):
    x, y, a, b, e = several(sizes, tokens=tokens, scaled=scaled, seed=seed)
    parts = zip(x.split(sizes), y.split(sizes), a, b, e or [torch.ones(2, 1)] * len(a), strict=True)
    expected = torch.cat([yi + 0.7 * F.linear(F.linear(xi, ai) * ei.view(-1), bi) for xi, yi, ai, bi, ei in parts])
    found = low_rank(x, y, tuple(sizes), a, b, 0.7, e)
    assert_close(found, expected)
    gradient, of = torch.randn_like(found), [x, y, *a, *b, *e]
    for one, two in zip(
        torch.autograd.grad(found, of, gradient), torch.autograd.grad(expected, of, gradient), strict=True
    ):
        assert_close(one, two)


def test_an_input_that_wants_no_gradient_gets_none():
    x, y, a, b, _ = several((1, 3))
    out = low_rank(x.detach(), y.detach(), (1, 3), a, b, 1.0)
    expected = torch.autograd.grad(low_rank(x, y, (1, 3), a, b, 1.0).sum(), [*a, *b])
    for one, two in zip(torch.autograd.grad(out.sum(), [*a, *b]), expected, strict=True):
        assert_close(one, two, GRADIENT)


def test_an_adapter_that_is_no_number_breaks_no_other():
    x, y, a, b, _ = several((2, 3))
    alone = torch.autograd.grad(low_rank(x, y, (2, 3), a, b, 1.0)[:2].sum(), [a[0], b[0]])
    with torch.no_grad():
        b[1].fill_(torch.nan)
        y[4] = torch.inf
    out = low_rank(x, y, (2, 3), a, b, 1.0)
    assert out[:2].isfinite().all() and not out[2:].isfinite().any()
    for one, two in zip(torch.autograd.grad(out[:2].sum(), [a[0], b[0]]), alone, strict=True):
        assert_close(one, two, GRADIENT)


def test_half_precision_is_as_for_equal_shares():
    x, y, a, b, _ = several((2, 3))
    low = low_rank(x, y.bfloat16(), (2, 3), a, b, 1.0)
    assert low.dtype == torch.bfloat16
    assert_close(low.float(), low_rank(x, y, (2, 3), a, b, 1.0), HALF, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        cast = low_rank(x, y.bfloat16(), (2, 3), a, b, 1.0)
    assert_close(cast.float(), low_rank(x, y, (2, 3), a, b, 1.0), HALF, dtype=torch.bfloat16)


# -- a vocabulary that is resized


ENDS = {
    "embedding": lambda: tz.LoRA(r=2, target_modules=["embed_tokens", "q_proj"]),
    "head": lambda: tz.LoRA(r=2, target_modules=["lm_head", "q_proj"]),
    "copy": lambda: tz.LoRA(r=2, modules_to_save=["embed_tokens"]),
    "full": tz.Full,
}


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("name", ENDS)
def test_resizing_under_an_adapter_of_the_embeddings_is_refused(name, tie):
    """Before anything changes; past the model's own function, where the sizes meet."""
    model = tiny("llama", "lm", tie_word_embeddings=tie)
    inputs = batch(model)
    tz.attach(model, ENDS[name](), "a", seed=0)
    tz.activate(model, "a")
    before = model(**inputs).logits
    with pytest.raises(tz.TanzakuError, match="a changed the embeddings as they are; detach a, resize, and attach"):
        model.resize_token_embeddings(VOCAB + 3)
    assert_close(model(**inputs).logits, before)
    if name in ("embedding", "copy", "full"):
        model.model.resize_token_embeddings(VOCAB + 3)
        with pytest.raises(tz.TanzakuError, match="detach it, resize, and attach it again"):
            model(**inputs)
    tz.detach(model)
    model.resize_token_embeddings(VOCAB + 5)
    tz.attach(model, ENDS[name](), "a", seed=0)
    tz.activate(model, "a")
    inputs["input_ids"][0, 0] = VOCAB + 4
    assert model(**inputs).logits.shape[-1] == VOCAB + 5


def test_resizing_under_other_adapters():
    """What an adapter computes of the tokens that were there stays the same, and the base stays frozen."""
    model = tiny("llama", "lm")
    adapter = tz.attach(model, tz.LoRA(r=2), "a", seed=0)
    with torch.no_grad():
        for _, parameter in adapter.trained():
            parameter.add_(0.1)
    tz.activate(model, "a")
    inputs = batch(model)
    before = model(**inputs).logits
    model.resize_token_embeddings(VOCAB + 3)
    assert_close(model(**inputs).logits[..., :VOCAB], before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"tanzaku.a.{n}" for n, _ in adapter.trained()
    }
