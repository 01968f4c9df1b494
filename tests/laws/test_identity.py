"""Law 2: what starts as identity changes nothing, a bare row is the base's, and unused sites cost nothing."""

import pytest
import torch
from variants import (
    KINDS_BESIDE_LLAMA,
    all_methods,
    all_variants,
    attach,
    attached,
    bamboo,
    full_bamboo,
    keeps_shape,
    logits,
    method,
    plain_logits,
    sharing,
    starts_as_identity,
)

import tanzaku as tz
from close import assert_close, close
from models import batch
from tanzaku.core.manager import manager_of
from tanzaku.core.method import ModuleLayer, TokenLayer
from tanzaku.core.weights import WeightCopy
from tanzaku.methods import METHODS
from tanzaku.models import tree
from tiers import in_families

FAMILIES = [("llama", "cls"), *KINDS_BESIDE_LLAMA]


def hooked(model):
    """Paths of modules with any hook."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {path for path, m in tree.named_modules(model) if any(getattr(m, kind) for kind in kinds)}


def traces(model):
    """What a route may leave on modules beside hooks."""
    return {path: sorted(k for k in vars(m) if "tanzaku" in k) for path, m in tree.named_modules(model) if path}


def base_logits(kind="llama", head="cls", rows=4, **options):
    """What the model computes that never had an adapter."""
    model = bamboo(kind, head, attn_implementation="sdpa")
    return plain_logits(model, batch(model, rows=rows, **options))


@all_variants
def test_a_fresh_adapter_changes_no_logit(name, variant):
    """Adapters that add neither tokens nor positions start as identity, also beside bare rows."""
    model = bamboo()
    adapter = attach(model, method(name, variant), "fresh", seed=0)
    inputs, expected = batch(model), base_logits()
    found = logits(model, ["fresh"] * 4, inputs)
    if starts_as_identity(adapter):
        assert_close(found, expected)
        if METHODS[name].shares_batch:
            found = logits(model, ["fresh", None, "fresh", "fresh"], inputs)
            assert_close(found, expected)
    else:
        assert not torch.allclose(found, expected, atol=1e-3)  # or the law would test nothing


@in_families(("kind", "head"), KINDS_BESIDE_LLAMA)
@all_methods
def test_a_fresh_adapter_changes_no_logit_in_other_families(name, kind, head):
    """The same in other families; a LoRA of a head's neighbour must not touch the head, a copy must copy all of it."""
    model = bamboo(kind, head, attn_implementation="sdpa")
    adapter = attach(model, method(name), "fresh", seed=0)
    found, expected = logits(model, ["fresh"] * 4, batch(model)), base_logits(kind, head)
    if starts_as_identity(adapter):
        assert_close(found, expected)
    else:
        assert not close(found, expected)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "head"), FAMILIES)
def test_bare_rows_alone_are_the_base(kind, head):
    """A route of None computes what the model without adapters computes."""
    model = full_bamboo(kind, head)
    inputs, expected = batch(model), base_logits(kind, head)
    assert_close(plain_logits(model, inputs), expected)
    assert_close(logits(model, [None] * 4, inputs), expected)
    tz.activate(model, None)
    assert_close(plain_logits(model, inputs), expected)


@torch.no_grad()
@in_families(("kind", "head"), FAMILIES)
@pytest.mark.parametrize("name", sharing())
def test_bare_rows_in_a_mixed_batch_are_the_base(name, kind, head):
    """Beside adapters that add no token, and beside those that widen the batch."""
    model = full_bamboo(kind, head)
    entries = [name, None, f"{name}-2", None, None]
    found = logits(model, entries, batch(model, rows=5))[[1, 3, 4]]
    expected = base_logits(kind, head, rows=5)[[1, 3, 4]]
    assert_close(found, expected)


@all_variants
def test_no_route_no_trace(name, variant):
    """Attaching adds no hook, and detaching takes off all that a route added, in and after training too."""
    model = bamboo()
    before, keys = model.config._attn_implementation, list(vars(model))
    clean = traces(model)
    attached(model, name, variant)
    assert not hooked(model)
    model.train()
    with tz.route(model, [name] * 4):
        assert hooked(model) or traces(model) != clean
        model(**batch(model)).logits.sum().backward()
    tz.detach(model)
    assert not hooked(model)
    assert traces(model) == clean
    assert model.config._attn_implementation == before and list(vars(model)) == keys


def test_an_error_inside_a_route_leaves_no_trace():
    """Whatever fails within the block, nothing is in force after it and the model is the base again."""
    model = full_bamboo()
    with pytest.raises(ZeroDivisionError), tz.route(model, ["lora", "prefix_tuning"]):
        raise ZeroDivisionError
    with pytest.raises(tz.TanzakuError), tz.route(model, ["prompt_tuning", "full"]):
        pass
    with pytest.raises(tz.TanzakuError):
        logits(model, ["prompt_tuning", "full-2", None], batch(model))
    assert manager_of(model).route is None
    assert_close(plain_logits(model, batch(model)), base_logits())


@all_variants
def test_hooks_only_where_the_adapter_has_sites(name, variant):
    """A module that no adapter layer sits on has no hook; tokens, prefixes and what reads places take the backbone's
    entrance besides."""
    model = bamboo()
    adapter = attached(model, name, variant)
    sites = {path for path, layer in adapter.at() if isinstance(layer, ModuleLayer | WeightCopy)}
    attention = any(not isinstance(s, ModuleLayer | WeightCopy | TokenLayer) for _, s in adapter.at())
    manager = manager_of(model)
    attention |= any(isinstance(s, ModuleLayer) and s.reads_places for _, s in adapter.at())
    entrances = {manager.base.backbone} if attention or not keeps_shape(adapter) else set()
    if not keeps_shape(adapter):
        entrances.add(manager.base.embedding)
    if "" in sites:  # every weight: the whole model, and its backbone called by itself
        entrances.add(manager.base.backbone)
    allowed = sites | {path for path, m in model.named_modules() if m in entrances}
    with tz.route(model, [name]):
        assert hooked(model) <= allowed
        assert {p for p in sites if p} <= hooked(model)


def test_a_route_hangs_only_its_own_adapters():
    """Attached adapters that no route had yet cost the base nothing."""
    model = bamboo()
    attached(model, "lora", "default")
    attached(model, "prefix_tuning")
    attached(model, "prompt_tuning")
    own = {path for path, _ in manager_of(model).get("lora").at()}
    with tz.route(model, [None, None]):
        assert not hooked(model)
    with tz.route(model, ["lora", None]):
        assert hooked(model) == own | {""}  # where the rows of a batch are noted
        assert model.config._attn_implementation == "sdpa"
