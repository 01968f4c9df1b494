"""(IA)3's mathematics: outputs at attention and inputs at the feed-forward are scaled."""

import pytest
import torch

import tanzaku as tz
from close import assert_close
from models import batch, tiny
from tanzaku.methods.ia3 import ScaleLayer


@torch.no_grad()
def opened(model, method):
    adapter = tz.attach(model, method, "x", seed=0)
    found = {path: layer for path, layer in adapter.at() if isinstance(layer, ScaleLayer)}
    for layer in found.values():
        layer.ia3_l.add_(torch.randn_like(layer.ia3_l) * 0.3)
    return found


def test_default_sites():
    """Keys and values are scaled at their output, down_proj at its input."""
    found = opened(tiny("llama"), tz.IA3())
    shapes = {path.removeprefix("model.layers.0."): tuple(s.ia3_l.shape) for path, s in found.items() if ".0." in path}
    assert shapes == {"self_attn.k_proj": (16, 1), "self_attn.v_proj": (16, 1), "mlp.down_proj": (1, 48)}


@pytest.mark.parametrize(("kind", "feedforward"), [("llama", "down_proj"), ("gpt2", "mlp.c_proj"), ("t5", "wo")])
def test_feedforward_scales_the_input(kind, feedforward):
    """y = W (l * x): the same as scaled columns of the weight; at any other target scaled rows and bias."""
    model = tiny(kind)
    found = opened(model, tz.IA3())
    inputs = batch(model)
    with torch.no_grad(), tz.route(model, ["x"] * 4):
        expected = model(**inputs).logits
    with torch.no_grad():
        for path, layer in found.items():
            module, factor = model.get_submodule(path), layer.ia3_l.flatten()
            rows_are_inputs = type(module).__name__ == "Conv1D"
            if path.endswith(feedforward):
                module.weight.mul_(factor[:, None] if rows_are_inputs else factor)
            else:
                module.weight.mul_(factor if rows_are_inputs else factor[:, None])
                if getattr(module, "bias", None) is not None:
                    module.bias.mul_(factor)
    assert_close(model(**inputs).logits, expected)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("inner", [True, False])
def test_grouped_convolutions(groups, inner):
    """Each group of output channels reads its own part of the input's, which merging knows."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(8, 16, 3, padding=1, groups=groups), torch.nn.ReLU(), torch.nn.Conv2d(16, 4, 1)
    )
    adapter = tz.attach(model, tz.IA3(target_modules=["0", "2"], feedforward_modules=["0"] if inner else []), "x")
    with torch.no_grad():
        for _, parameter in adapter.trained():
            parameter.uniform_(0.5, 1.5)
        x = torch.randn(2, 8, 5, 5)
        with tz.route(model, ["x"]):
            expected = model(x)
        assert not torch.allclose(model(x), expected, atol=1e-3)
        tz.merge(model, "x")
        assert_close(model(x), expected)


def test_random_start():
    """init_ia3_weights=False starts from normal numbers."""
    adapter = tz.attach(tiny("llama"), tz.IA3(init_ia3_weights=False), "x", seed=0)
    values = torch.cat([s.ia3_l.flatten() for _, s in adapter.at() if isinstance(s, ScaleLayer)])
    assert 0.8 < values.std() < 1.2


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"target_modules": ["k_proj"], "feedforward_modules": ["down_proj"]}, "expected a part of target_modules"),
        ({"target_modules": ["embed_tokens"]}, "an embedding"),
        ({"target_modules": ["keyy"]}, "'keyy' matches no module"),
        ({"target_modules": ["k_proj"], "feedforward_modules": ["nope"]}, "'nope' matches no module"),
    ],
    ids=str,
)
def test_mistakes(settings, match):
    """Feed-forward modules must be targets, and targets matrices."""
    with pytest.raises(tz.TanzakuError, match=match):
        tz.attach(tiny("llama"), tz.IA3(**settings), "x")
