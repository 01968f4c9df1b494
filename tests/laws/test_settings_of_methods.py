"""Settings: each has a type, and with none of them at zero does training go on for nothing."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from variants import CASES, all_methods, attach, bamboo, batch, method

import tanzaku as tz
from tanzaku.core.weights import WeightCopy
from tanzaku.methods import METHODS

# Of each of these some setting has the type, and none has that of all.
VALUES: tuple[Any, ...] = (None, True, 3, 1.5, 8.0, "8", b"8", ["?", 1.5], {"?": [object()]}, object())


@all_methods
def test_a_constructor_s_values_have_types(name):
    """As a recipe's: `r="8"`, `r=8.0` and `init_weights=1` are other things than they seem."""
    model = bamboo()
    for field in dataclasses.fields(METHODS[name]):
        wrong = [value for value in VALUES if not METHODS[name].takes(field.name, value)]
        assert wrong, field.name
        for value in wrong:
            with pytest.raises(tz.TanzakuError) as found:
                tz.attach(model, dataclasses.replace(method(name), **{field.name: value}), "x")
            said = str(found.value)
            assert f": {field.name} is " in said and said.endswith(f", expected {field.type}")


def zeros(name: str) -> list[tuple[str, Any]]:
    """(setting, zero) of every setting that may be a number, or a number by patterns."""
    out: list[tuple[str, Any]] = []
    for field in dataclasses.fields(METHODS[name]):
        takes = METHODS[name].takes
        fitting = [zero for zero in (0, 0.0) if takes(field.name, zero)]
        out += [(field.name, zero) for zero in fitting[:1]]
        if takes(field.name, {"?": 1}) and not takes(field.name, {"?": object()}):
            out.append((field.name, {".*": 0}))
    return out


def learns(model, adapter: tz.Adapter) -> bool:
    """Whether any parameter but those of a head has a gradient within two steps of training."""
    copied = {id(p) for _, layer in adapter.at() if isinstance(layer, WeightCopy) for p in layer.parameters()}
    own = [p for _, p in adapter.trained() if id(p) not in copied] or [p for _, p in adapter.trained()]
    inputs, labels = batch(model, rows=6), torch.arange(6) % 3
    tz.activate(model, adapter.name)
    model.train()
    adapter.method.prepare(adapter, 3)
    optimizer, moved = torch.optim.SGD(own, lr=0.05), False
    for step in (1, 2):
        F.cross_entropy(model(**inputs).logits, labels).backward()
        moved |= any(p.grad is not None and bool(p.grad.any()) for p in own)
        optimizer.step()
        adapter.method.after_step(adapter, step)
        optimizer.zero_grad()
    return moved


@pytest.mark.parametrize(
    ("name", "variant", "key", "zero"),
    [(*case, *each) for case in CASES for each in zeros(case[0])],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_nothing_is_trained_for_nothing(name, variant, key, zero):
    """At zero a setting is refused, or something is learnt all the same."""
    model = bamboo()
    try:
        adapter = attach(model, dataclasses.replace(method(name, variant), **{key: zero}), "x", seed=0)
        moved = learns(model, adapter)
    except tz.TanzakuError as error:
        assert "expected" in str(error)  # another kind of error is none of ours, and fails
    else:
        assert moved
