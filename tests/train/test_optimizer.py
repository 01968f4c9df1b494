"""AdamW in one piece: the numbers of torch's, parameter by parameter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from close import GRADIENT, assert_close
from tanzaku.train import optimizer as module
from tanzaku.train.optimizer import FlatAdamW

SHAPES = [(3, 4), (5,), (1,), (2, 3, 2), (40, 30)]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in SHAPES]


def groups(of: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": of[::2], "weight_decay": 0.1}, {"params": of[1::2], "weight_decay": 0.0}]


def give(to: list[nn.Parameter], which: list[bool], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p, wanted in zip(to, which, strict=True):
        gradient = torch.randn(p.shape, generator=generator)
        p.grad = gradient if wanted else None


@pytest.fixture(params=[10**6, 500], ids=["all small", "one large"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL", request.param)


STEPS = st.lists(st.lists(st.booleans(), min_size=len(SHAPES), max_size=len(SHAPES)), min_size=1, max_size=5)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e3])
def test_it_is_torchs_adamw_with_clipping(max_norm: float) -> None:
    @settings(deadline=None, max_examples=25)
    @given(STEPS)
    def check(steps: list[list[bool]]) -> None:
        """Whatever has a gradient in which step."""
        ours, theirs = parameters(), parameters()
        flat = FlatAdamW(groups(ours), lr=0.1, betas=(0.9, 0.99), eps=1e-6, max_norm=max_norm)
        plain = torch.optim.AdamW(groups(theirs), lr=0.1, betas=(0.9, 0.99), eps=1e-6)
        for number, which in enumerate(steps):
            give(ours, which, number)
            give(theirs, which, number)
            if max_norm:
                nn.utils.clip_grad_norm_(theirs, max_norm)
            for group in (*flat.param_groups, *plain.param_groups):
                group["lr"] = 0.1 / (1 + number)  # as a schedule does
            flat.step()
            plain.step()
            for a, b in zip(ours, theirs, strict=True):
                assert_close(a, b, GRADIENT)
                if b.grad is None:
                    assert a.grad is None
                else:  # a method may look at the clipped gradients afterwards
                    assert_close(a.grad, b.grad)
                assert flat.state[a].keys() == plain.state[b].keys()
                for key in plain.state[b]:
                    assert_close(flat.state[a][key], plain.state[b][key], GRADIENT)
            flat.zero_grad()

    check()


def test_state_that_is_given_back_is_gone_on_from() -> None:
    """As a resumed job's is, and by torch's own way."""
    through = parameters()
    whole = FlatAdamW(groups(through), lr=0.1, betas=(0.9, 0.99), eps=1e-6, max_norm=1.0)
    for number in range(4):
        give(through, [True] * len(SHAPES), number)
        whole.step()
        if number == 1:
            kept, state = copy.deepcopy(through), copy.deepcopy(whole.state_dict())
            by_parameter = [{key: t.clone() for key, t in whole.state[p].items()} for p in through]
    for way in ("state_dict", "state"):
        resumed = copy.deepcopy(kept)
        again = FlatAdamW(groups(resumed), lr=0.1, betas=(0.9, 0.99), eps=1e-6, max_norm=1.0)
        if way == "state":
            for p, known in zip(resumed, by_parameter, strict=True):
                again.state[p] = {key: t.clone() for key, t in known.items()}
        else:
            give(resumed, [True] * len(SHAPES), 7)
            again.step()  # what it has by now is forgotten
            with torch.no_grad():
                for p, at in zip(resumed, kept, strict=True):
                    p.copy_(at)
            again.load_state_dict(state)
        for number in (2, 3):
            give(resumed, [True] * len(SHAPES), number)
            again.step()
        for a, b in zip(resumed, through, strict=True):
            assert_close(a, b, GRADIENT, at=way)


def test_changes_in_place_reach_what_is_updated() -> None:
    """Methods prune, and runs go back to their best weights."""
    ours = parameters()
    flat = FlatAdamW(groups(ours), lr=0.1, betas=(0.9, 0.99), eps=1e-6)
    give(ours, [True] * len(SHAPES), 0)
    flat.step()
    with torch.no_grad():
        ours[0].zero_()
    before = ours[2].detach().clone()
    give(ours, [True, False, True, False, False], 1)
    ours[0].grad = torch.ones(SHAPES[0])
    flat.step()
    assert 0 < float(ours[0].detach().abs().max()) < 0.2 and not torch.equal(
        ours[2], before
    )  # a step away from where it was put
