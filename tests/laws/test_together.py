"""Law 1 where neighbours are computed together: adapters of one kind and shape, in one product for all, are what they
are one by one; and who is not like the others is not taken for it."""

import pytest
import torch
from variants import attach, attached, bamboo, batch, gradients, losses, opened

import tanzaku as tz
from close import GRADIENT, HALF, assert_close
from models import tiny
from tanzaku.core.manager import manager_of
from tanzaku.core.method import ModuleLayer
from tanzaku.methods.adalora import SvdDelta
from tanzaku.methods.boft import Butterfly
from tanzaku.methods.fourierft import FourierDelta
from tanzaku.methods.hra import Reflections
from tanzaku.methods.hyper import HyperLayer
from tanzaku.methods.ia3 import ScaleLayer
from tanzaku.methods.loha import HadamardDelta
from tanzaku.methods.lora_layers import LoraDelta
from tanzaku.methods.oft import BlockRotation
from tiers import in_families

LAYERS = {
    "lora": LoraDelta,
    "adalora": SvdDelta,
    "ia3": ScaleLayer,
    "loha": HadamardDelta,
    "oft": BlockRotation,
    "oft of one block": BlockRotation,
    "boft": Butterfly,
    "fourierft": FourierDelta,
    "hyper": HyperLayer,
    "hra": Reflections,
    "hra of orthogonal planes": Reflections,
}


@pytest.fixture
def together(monkeypatch):
    """Notes (what is edited, adapters, rows) of each time that several adapter layers are computed together."""
    seen = []

    nested = [False]

    def spied(layer, name, function):
        def spy(layers, sizes, module, x, *rest):
            if not nested[0] and len(layers) > 1:  # a rescaling of outputs is written as one of inputs
                seen.append((name.removeprefix("batched_"), len(layers), x.shape[0]))
            nested[0] = True
            out = function(layers, sizes, module, x, *rest)
            nested[0] = False
            return out

        monkeypatch.setattr(layer, name, staticmethod(spy))

    for layer in LAYERS.values():
        for name in ("batched_inputs", "batched_outputs"):
            if getattr(layer, name) is not getattr(ModuleLayer, name):
                spied(layer, name, getattr(layer, name))
    return seen


def method(name, **changes):
    return {
        "lora": lambda **c: tz.LoRA(**{"r": 2, **c}),
        "adalora": lambda **c: tz.AdaLoRA(**{"init_r": 3, "target_r": 2, **c}),
        "ia3": lambda **c: tz.IA3(**c),
        "loha": lambda **c: tz.LoHa(**{"r": 2, **c}),
        "oft": lambda **c: tz.OFT(**{"oft_block_size": 8, **c}),
        "oft of one block": lambda **c: tz.OFT(**{"oft_block_size": 8, "block_share": True, "coft": True, **c}),
        "boft": lambda **c: tz.BOFT(**{"boft_n_butterfly_factor": 2, **c}),
        "hra of orthogonal planes": lambda **c: tz.HRA(**{"r": 4, "apply_GS": True, **c}),
        "fourierft": lambda **c: tz.FourierFT(**{"n_frequency": 20, **c}),
        "hyper": lambda **c: tz.Hyper(**{"reduction_factor": 8, "embedding_dim": 6, "hidden_dim": 8, **c}),
        "hra": lambda **c: tz.HRA(**{"r": 4, **c}),
    }[name](**changes)


def several(model, methods):
    """Adapters `a`, `b`, ... with weights of their own."""
    return {name: opened(attach(model, m, name, seed=n), n) for n, (name, m) in enumerate(methods.items())}


def run(model, adapters, entries, inputs):
    """Logits, and the gradient of each adapter."""
    with tz.route(model, entries):
        out = model(**inputs).logits
    loss = losses(out).sum()
    return out.float(), {name: gradients(loss, a, retain=True) for name, a in adapters.items() if name in entries}


def one_by_one(monkeypatch, *args):
    with monkeypatch.context() as patch:
        for layer in LAYERS.values():
            patch.setattr(layer, "batch_key", lambda self, module: None)
        return run(*args)


def assert_same(found, expected):
    assert_close(found[0], expected[0])
    assert all(any(g.any() for g in wanted.values()) for wanted in expected[1].values())
    assert_close(found[1], expected[1], GRADIENT)


@pytest.mark.parametrize("rows", ["aabbcc", "abbbcc"])  # in equal shares and in others
@pytest.mark.parametrize("name", LAYERS)
@in_families("kind", ["llama", "gpt2", "bert", "gemma3", "t5"])
def test_neighbours_that_are_alike_are_computed_together(kind, name, rows, together, monkeypatch):
    model = bamboo(kind, "cls")
    adapters = several(model, {n: method(name) for n in "abc"})
    entries = [*rows]
    inputs = batch(model, rows=6)
    expected = one_by_one(monkeypatch, model, adapters, entries, inputs)
    assert not together
    found = run(model, adapters, entries, inputs)
    sites = [layer for _, layer in adapters["a"].at() if isinstance(layer, ModuleLayer)]
    edits = [edit for s in sites for edit in ("inputs", "outputs") if getattr(s, f"edits_{edit[:-1]}")]
    assert sorted(together) == sorted((edit, 3, 6) for edit in edits)
    assert_same(found, expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_on_a_base_of_half_precision(name, autocast, together, monkeypatch):
    """Adapters are in full precision there: the sum is rounded once, as one by one."""
    model = bamboo().to(torch.bfloat16)
    adapters = several(model, {n: method(name) for n in "ab"})
    entries, inputs = ["a", "a", "b", "b"], batch(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = one_by_one(monkeypatch, model, adapters, entries, inputs)
        found = run(model, adapters, entries, inputs)
    assert together
    assert_close(found[0], expected[0], HALF, dtype=torch.bfloat16)
    for adapter, wanted in expected[1].items():
        for key, gradient in wanted.items():
            assert float((found[1][adapter][key] - gradient).norm()) <= 0.05 * float(gradient.norm()) + 1e-6, key


UNLIKE = {
    "ranks": ({"a": ("lora", {"r": 2}), "b": ("lora", {"r": 3})}, "aabb"),
    "scales": ({"a": ("lora", {"r": 2}), "b": ("lora", {"r": 2, "lora_alpha": 4})}, "aabb"),
    "ranks of adalora": ({"a": ("adalora", {"init_r": 2}), "b": ("adalora", {"init_r": 3})}, "aabb"),
    "scales of adalora": ({"a": ("adalora", {}), "b": ("adalora", {"lora_alpha": 4})}, "aabb"),
    "methods": ({"a": ("lora", {"r": 3}), "b": ("adalora", {"init_r": 3, "lora_alpha": 3})}, "aabb"),
    "scattered rows": ({"a": ("lora", {}), "b": ("lora", {})}, "abab"),
    "not neighbours": ({"a": ("lora", {}), "b": ("lora", {})}, "a-b-"),
    "not neighbours, one kind between": ({"a": ("lora", {}), "b": ("ia3", {}), "c": ("lora", {})}, "abc-"),
    "ranks of loha whose square is no small one": ({"a": ("loha", {"r": 5}), "b": ("loha", {"r": 5})}, "aabb"),
    "dropout": ({"a": ("lora", {"lora_dropout": 0.5}), "b": ("lora", {"lora_dropout": 0.5})}, "aabb"),
    "dropout of loha": ({"a": ("loha", {"rank_dropout": 0.5}), "b": ("loha", {"rank_dropout": 0.5})}, "aabb"),
    "blocks of oft": ({"a": ("oft", {}), "b": ("oft", {"oft_block_size": 4})}, "aabb"),
    "series of oft": ({"a": ("oft", {}), "b": ("oft", {"use_cayley_neumann": False})}, "aabb"),
    "places of fourierft": ({"a": ("fourierft", {}), "b": ("fourierft", {"random_loc_seed": 3})}, "aabb"),
    "dropout of oft": ({"a": ("oft", {"module_dropout": 0.5}), "b": ("oft", {"module_dropout": 0.5})}, "aabb"),
    "dropout of adalora": ({"a": ("adalora", {"lora_dropout": 0.5}), "b": ("adalora", {"lora_dropout": 0.5})}, "aabb"),
    "sides": (
        {
            "a": ("ia3", {"target_modules": ["up_proj"], "feedforward_modules": ["up_proj"]}),
            "b": ("ia3", {"target_modules": ["up_proj"], "feedforward_modules": []}),
        },
        "aabb",
    ),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_who_is_not_like_its_neighbour_is_computed_by_itself(case, together):
    settings, rows = UNLIKE[case]
    model = bamboo()
    adapters = several(model, {n: method(name, **changes) for n, (name, changes) in settings.items()})
    if "dropout" in case:
        model.train()
    entries, inputs = [None if row == "-" else row for row in rows], batch(model)
    torch.manual_seed(0)
    out, found = run(model, adapters, entries, inputs)
    assert not together
    if "dropout" in case:
        model.eval()
        run(model, adapters, entries, inputs)
        assert together, "outside of training nothing is dropped"
        return
    for name, adapter in adapters.items():
        at = [row for row, entry in enumerate(entries) if entry == name]
        alone = run(model, {name: adapter}, [name], {key: value[at] for key, value in inputs.items()})
        assert_same((out[at], {name: found[name]}), alone)


def test_runs_of_neighbours_are_found_in_a_longer_batch(together, monkeypatch):
    """Two and two that are alike, with another rank, bare rows and a larger group between them."""
    model = bamboo()
    ranks = {"a": 2, "b": 2, "other": 4, "c": 2, "d": 2, "large": 2, "e": 2}
    adapters = several(model, {name: tz.LoRA(r=r, target_modules=["v_proj"]) for name, r in ranks.items()})
    entries = ["a", "b", "other", "c", "d", None, "e", "large", "large"]
    inputs = batch(model, rows=9)
    expected = one_by_one(monkeypatch, model, adapters, entries, inputs)
    found = run(model, adapters, entries, inputs)
    # Three runs in each of two layers, the last of one row and two.
    assert together == [("outputs", 2, 2), ("outputs", 2, 2), ("outputs", 2, 3)] * 2
    assert_same(found, expected)


def test_stacked_adapters_are_computed_by_themselves(together, monkeypatch):
    model = bamboo()
    adapters = several(model, {name: method("lora") for name in "abcd"})
    entries = [("a", "b"), ("a", "b"), ("c", "d"), ("c", "d")]
    with tz.route(model, entries):
        model(**batch(model))
    assert not together and len(adapters) == 4


def test_one_adapter_among_bare_rows_is_not_together_with_itself(together):
    model = bamboo()
    several(model, {"a": method("lora")})
    with tz.route(model, [None, "a", "a", None]):
        model(**batch(model))
    assert not together


def test_biases_and_copies_beside_them_stay_each_rows_own(together, monkeypatch):
    """Layers of other kinds at the same modules: biases are never together, whole modules neither."""
    model = bamboo()
    adapters = several(model, {n: tz.LoRA(r=2, bias="lora_only", modules_to_save=["score", "down_proj"]) for n in "ab"})
    entries, inputs = ["a", "a", "b", "b"], batch(model)
    assert_same(run(model, adapters, entries, inputs), one_by_one(monkeypatch, model, adapters, entries, inputs))
    assert not together, "an adapter layer and a bias at one module are two"


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_convolutions_are_computed_by_themselves(name, together, monkeypatch):
    model = tiny("vit", "cls")
    adapters = several(
        model,
        {
            n: tz.LoRA(r=2, target_modules=["projection"])
            if name == "lora"
            else tz.IA3(target_modules=["projection"], feedforward_modules=[])
            for n in "ab"
        },
    )
    inputs = batch(model)
    found = run(model, adapters, ["a", "a", "b", "b"], inputs)
    assert not together
    for n, at in (("a", [0, 1]), ("b", [2, 3])):
        alone = run(model, {n: adapters[n]}, [n], {key: value[at] for key, value in inputs.items()})
        assert_same((found[0][at], {n: found[1][n]}), alone)


def test_pruned_singular_values_stay_pruned(together):
    """AdaLoRA prunes each adapter by itself; what is together is of the first rank all the same."""
    model = bamboo()
    adapters = several(model, {n: method("adalora") for n in "ab"})
    for adapter, gone in zip(adapters.values(), (0, 2), strict=True):
        for _, layer in adapter.at():
            if isinstance(layer, SvdDelta):
                layer.mask = torch.arange(3) != gone
                with torch.no_grad():
                    layer.lora_E[gone] = 0.0
    inputs = batch(model)
    out, found = run(model, adapters, ["a", "a", "b", "b"], inputs)
    assert together
    for n, at in (("a", [0, 1]), ("b", [2, 3])):
        alone = run(model, {n: adapters[n]}, [n], {key: value[at] for key, value in inputs.items()})
        assert_same((out[at], {n: found[n]}), alone)


def test_a_batch_that_repeats_each_row_is_grouped_alike(together):
    """As beam search does: each entry stands for several rows of the batch."""
    model = bamboo()
    adapters = several(model, {n: method("lora") for n in "ab"})
    inputs = batch(model)
    expected = run(model, adapters, ["a", "a", "b", "b"], inputs)
    together.clear()
    found = run(model, adapters, ["a", "b"], inputs)
    assert together
    assert_same(found, expected)


def test_layers_without_a_formula_for_several_say_so():
    layer = ModuleLayer()
    assert layer.batch_key(torch.nn.Linear(2, 2)) is None
    for wrong in (
        lambda: layer.batched_inputs([layer], (1,), None, None),
        lambda: layer.batched_outputs([layer], (1,), *[None] * 3),
    ):
        with pytest.raises(TypeError, match="ModuleLayer defines no"):
            wrong()


def test_nothing_is_in_force_again(together):
    model = bamboo()
    attached(model, "lora")
    attached(model, "lora", as_="lora-2")
    with tz.route(model, ["lora", "lora-2"]):
        model(**batch(model, rows=2))
    assert together and manager_of(model).route is None
    tz.detach(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
