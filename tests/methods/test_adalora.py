"""AdaLoRA's mathematics: the budget's schedule, pruning by importance, the penalty."""

import pytest
import torch
import torch.nn.functional as F

import tanzaku as tz
from close import RUN, assert_close
from models import batch, tiny
from tanzaku.methods.adalora import SvdDelta


def layers(adapter):
    return {path: s for path, s in adapter.at() if isinstance(s, SvdDelta)}


def train(model, adapter, steps):
    """Kept singular values after each step."""
    inputs, labels = batch(model, rows=6), torch.arange(6) % 3
    adapter.method.prepare(adapter, steps)
    optimizer = torch.optim.AdamW([p for _, p in adapter.trained()], lr=0.02)
    kept = []
    for step in range(1, steps + 1):
        with tz.route(model, [adapter.name] * 6):
            loss = F.cross_entropy(model(**inputs).logits, labels)
        (loss + adapter.method.penalty(adapter)).backward()
        optimizer.step()
        adapter.method.after_step(adapter, step)
        optimizer.zero_grad()
        kept.append(sum(int((s.lora_E != 0).sum()) for s in layers(adapter).values()))
    return kept


@pytest.mark.parametrize("target", [4, 2, 0.5, 1.75])
def test_budget_is_cubic(target):
    """Full until tinit, then target + (init - target) (1 - t)^3, and the target after total - tfinal."""
    method = tz.AdaLoRA(init_r=6, target_r=target, tinit=10, tfinal=20, deltaT=5, total_step=100)
    matrices = 8
    for step in range(1, 101):
        if step <= 10:
            expected = (6 * matrices, False)
        elif step > 80:
            expected = (int(target * matrices), True)
        else:
            left = ((80 - step) / 70) ** 3
            expected = (int((6 * matrices - target * matrices) * left + target * matrices + 1e-9), step % 5 == 0)
        budget, due = method.budget(step, matrices)
        assert (abs(budget - expected[0]) <= 1e-6, due) == (True, expected[1]), step
    assert method.budget(80, matrices)[0] == int(target * matrices)


def test_pruning_keeps_the_budget():
    """After each allocation just as many singular values are left as the schedule says, and no fewer come back."""
    model = tiny("llama")
    adapter = tz.attach(model, tz.AdaLoRA(init_r=4, target_r=1.5, tinit=2, tfinal=3, deltaT=2), "x", seed=0)
    kept = train(model, adapter, 14)
    method, matrices = adapter.method, len(layers(adapter))
    assert kept[:3] == [4 * matrices] * 3
    for step in (4, 6, 8, 10):
        assert kept[step - 1] == method.budget(step, matrices)[0], step
    assert kept[10:] == [int(1.5 * matrices)] * 4
    pattern = method.rank_pattern
    assert {p.removesuffix(".lora_E") for p in pattern} == layers(adapter).keys()
    assert sum(map(sum, pattern.values())) == int(1.5 * matrices)


def test_the_least_important_values_go():
    """Importance is sensitivity times uncertainty, of a value and on average of its vectors; the lowest are pruned."""
    model = tiny("llama")
    method = tz.AdaLoRA(init_r=3, target_r=1, tinit=0, tfinal=1, deltaT=1, total_step=3, beta1=0.6, beta2=0.7)
    adapter = tz.attach(model, method, "x", seed=0)
    generator = torch.Generator().manual_seed(0)
    for layer in layers(adapter).values():
        for parameter in (layer.lora_A, layer.lora_B, layer.lora_E):
            parameter.data = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    scores = {}
    for path, layer in layers(adapter).items():

        def importance(p):
            now = (p * p.grad).abs().detach()
            sensitivity = 0.4 * now
            return sensitivity * 0.3 * (now - sensitivity).abs()

        a, b, e = map(importance, (layer.lora_A, layer.lora_B, layer.lora_E))
        for rank in range(3):
            scores[path, rank] = (e[rank, 0] + a[rank].mean() + b[:, rank].mean()).item()
    adapter.method.prepare(adapter, 3)
    adapter.method.after_step(adapter, 1)
    budget = adapter.method.budget(1, len(layers(adapter)))[0]
    best = set(sorted(scores, key=scores.get, reverse=True)[:budget])
    kept = {(path, rank) for path, s in layers(adapter).items() for rank in range(3) if s.lora_E[rank] != 0}
    assert kept == best and 0 < len(kept) < len(scores)


def test_a_pruned_adapter_comes_back(tmp_path):
    """Ranks differ from module to module in the file; what is loaded computes the same and keeps the pattern."""
    model, other = tiny("llama"), tiny("llama")
    adapter = tz.attach(model, tz.AdaLoRA(init_r=4, target_r=1.5, tinit=1, tfinal=1, deltaT=1), "x", seed=0)
    train(model, adapter, 8)
    tz.save(model, "x", tmp_path / "x")
    loaded = tz.load(other, tmp_path / "x", "y")
    assert loaded.method.rank_pattern == adapter.method.rank_pattern
    inputs = batch(model)
    with torch.no_grad(), tz.route(model, ["x"] * 4), tz.route(other, ["y"] * 4):
        assert_close(model(**inputs).logits, other(**inputs).logits)


def test_settings_used_again_start_afresh():
    """A second run with the same settings does not begin with the first run's importance, and leaves them as given."""

    def run(method):
        model = tiny("llama")
        adapter = tz.attach(model, method, "x", seed=0)
        train(model, adapter, 4)
        return adapter.method

    method = tz.AdaLoRA(init_r=3, target_r=1)
    first, second = run(method), run(method)
    assert_close(second._sensitivity, first._sensitivity, RUN)
    assert method == tz.AdaLoRA(init_r=3, target_r=1)


def test_penalty():
    """The weight times the mean distance of A A^T and B^T B from the identity, over all matrices."""
    model = tiny("llama")
    adapter = tz.attach(model, tz.AdaLoRA(init_r=3, target_r=2, orth_reg_weight=0.7), "x", seed=0)
    total, count = 0.0, 0
    for layer in layers(adapter).values():
        for m in (layer.lora_A @ layer.lora_A.t(), layer.lora_B.t() @ layer.lora_B):
            total, count = total + torch.linalg.norm(m - torch.eye(3)), count + 1
    assert_close(adapter.method.penalty(adapter), 0.7 * total / count)
    adapter.method.orth_reg_weight = 0
    assert adapter.method.penalty(adapter) is None


def test_the_formula():
    """y + alpha / (r + 1e-5) B diag(E) A x, with the rank that PEFT divides by."""
    model = tiny("llama")
    adapter = tz.attach(model, tz.AdaLoRA(init_r=3, target_r=2, lora_alpha=16), "x", seed=0)
    layer = next(iter(layers(adapter).values()))
    x, y = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    with torch.no_grad():
        layer.lora_E.normal_()
        expected = y + x @ (layer.lora_A * layer.lora_E).t() @ layer.lora_B.t() * 16 / (3 + 1e-5)
        assert_close(layer.outputs(None or model, x, y), expected)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"init_r": 0}, "init_r=0"),
        ({"init_r": 2, "target_r": 3}, "target_r=3"),
        ({"target_r": 0}, "target_r=0"),
        ({"beta1": 1.0}, "beta1"),
        ({"target_modules": ["embed_tokens"]}, "an? Embedding|a matrix"),
    ],
    ids=str,
)
def test_mistakes(settings, match):
    """Ranks, betas and targets are checked."""
    with pytest.raises(tz.TanzakuError, match=match):
        tz.attach(tiny("llama"), tz.AdaLoRA(**settings), "x")


def test_no_steps_left_to_prune():
    """A warm-up and an end that leave no step between them are an error before training."""
    adapter = tz.attach(tiny("llama"), tz.AdaLoRA(tinit=5, tfinal=5), "x")
    with pytest.raises(tz.TanzakuError, match="tinit=5 and tfinal=5 with 10 steps"):
        adapter.method.prepare(adapter, 10)
