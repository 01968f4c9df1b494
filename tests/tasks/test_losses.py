"""Focal loss, by hand and by the paper's formula."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from close import assert_close
from tanzaku.tasks.classification import Classification
from tanzaku.tasks.losses import focal
from tanzaku.tasks.task import Batch, Example

TASK = Classification(("a", "b"))


def batch(targets: list[int], gammas: list[float]) -> Batch:
    examples = [Example({"input_ids": [5]}, *each[:1], focal=each[1]) for each in zip(targets, gammas, strict=True)]
    return Batch({}, {"target": torch.tensor(targets)}, examples)


def test_by_hand() -> None:
    """Probabilities of what is right of 0.9, 0.5 and 0.1: by gamma 2 their cross entropies count 1, 25 and 81 parts of
    a hundred. (The paper's figure: sure rows count a hundred times less.)"""
    logits = torch.tensor([[math.log(9), 0.0], [1.0, 1.0], [math.log(9), 0.0]])
    found = TASK.score(SimpleNamespace(logits=logits), batch([0, 1, 1], [2.0] * 3))
    assert found.tolist() == pytest.approx([0.01 * 0.105360516, 0.25 * 0.693147181, 0.81 * 2.302585093], rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_is_the_papers_formula_with_its_slope(gamma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(16, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(3, (16,), generator=generator)
    share = logits.softmax(1)[range(16), targets]
    expected = -((1 - share) ** gamma) * share.log()
    found = focal(-logits.log_softmax(1)[range(16), targets], batch(targets.tolist(), [gamma] * 16))
    assert_close(found, expected)
    [a], [b] = (torch.autograd.grad(each.sum(), logits, retain_graph=True) for each in (found, expected))
    assert_close(a, b)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 2.0])
def test_a_row_that_is_certain_has_a_slope(gamma: float) -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    found = TASK.score(SimpleNamespace(logits=logits), batch([0, 0], [gamma, gamma]))
    found.sum().backward()
    assert found.tolist() == pytest.approx([0.0, 200.0])
    assert logits.grad is not None and logits.grad.isfinite().all() and logits.grad[1, 1] > 0.9


def test_rows_of_jobs_have_powers_of_their_own() -> None:
    losses = torch.tensor([[0.5, 0.0], [0.5, 2.0]])
    found = focal(losses, batch([0, 0], [0.0, 3.0]))
    wrong = 1 - torch.exp(-losses[1])
    assert_close(found, torch.stack([losses[0], losses[1] * wrong**3]))
