"""How LoRA's two matrices are trained: at rates of their own, or one of them alone."""

import pytest
import torch
from safetensors.torch import load_file

import tanzaku as tz
from close import RUN, assert_close
from interop.oracle import reopened
from models import batch, tiny
from tanzaku.core.adapter import Adapter
from tanzaku.methods.low_rank import low_rank
from tanzaku.train.results import Job
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings
from task_data import task

ONE_STEP = TrainSettings(epochs=1, learning_rate=1e-3, batch_size=6, warmup=0, schedule="constant", weight_decay=0)


def trained(settings, tmp_path, name="a", train=ONE_STEP):
    """How far one step of a run moves each tensor."""
    model, method = tiny("llama", num_labels=2), tz.LoRA(r=2, init_lora_weights=False, **settings)
    (result,) = train_jobs(model, task(train=6), [Job(name, method, train)], out=tmp_path)
    assert result.status == "done", result.error
    start = tz.attach(model, method, "start", seed=train.seed)
    found = load_file(tmp_path / "adapters" / name / "adapter_model.safetensors")
    moved = {n: (found[f"base_model.model.{n}"] - p.detach()).abs() for n, p in start.named_parameters()}
    return result, moved


def test_b_moves_faster_by_the_ratio(tmp_path):
    """A step of Adam is as long as the learning rate."""
    result, moved = trained({"loraplus_lr_ratio": 16.0}, tmp_path)
    for name, by in moved.items():
        expected = 16e-3 if "lora_B" in name else 1e-3
        assert by.median() == pytest.approx(expected, rel=0.05), name
    assert result.epochs[0].learning_rate == pytest.approx(1e-3)


def test_groups_are_for_any_optimizer():
    adapter = tz.attach(tiny("llama", "lm"), tz.LoRA(r=2, loraplus_lr_ratio=4.0), "a")
    groups = adapter.groups(0.5)
    assert {group["lr"]: len(group["params"]) for group in groups} == {0.5: 4, 2.0: 4}
    assert sum(len(group["params"]) for group in groups) == len(adapter.trained())
    assert isinstance(adapter, Adapter) and torch.optim.SGD(groups, lr=0.5)


def test_a_frozen_a_is_kept_and_saved(tmp_path):
    result, moved = trained({"freeze_a": True}, tmp_path)
    _, whole = trained({}, tmp_path, "b")
    for name, by in moved.items():
        assert by.any() == ("lora_A" not in name), name
        if "lora_A" not in name:
            assert_close(by, whole[name], RUN, scale=1e-1)
    model = tiny("llama", num_labels=2)
    tz.load(model, tmp_path / "adapters" / "a", "again")
    tz.activate(model, "again")
    given = batch(model)
    ours = model(**given).logits
    tz.detach(model)
    assert_close(reopened(model, tmp_path / "adapters" / "a")(**given).logits, ours)
    half = result.trainable_parameters
    assert half < tz.count(model, tz.attach(model, tz.LoRA(r=2), "x").name).trainable


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3)], ids=["equal", "unequal"])
def test_gradients_beside_frozen_matrices_are_the_same(sizes):
    """Where every A is frozen, and where one is."""
    torch.manual_seed(0)
    y, g = torch.randn(4, 5, 7), torch.randn(4, 5, 7)
    for frozen in ((), (0,), (0, 1)):
        x = torch.randn(4, 5, 6, requires_grad=True)
        a = [torch.randn(2, 6, requires_grad=at not in frozen) for at in range(2)]
        b = [torch.randn(7, 2, requires_grad=True) for _ in range(2)]
        wanted = [x, *b, *(each for each in a if each.requires_grad)]
        found = torch.autograd.grad(low_rank(x, y, sizes, a, b, 0.5), wanted, g)
        parts = zip(x.split(sizes), y.split(sizes), a, b, strict=True)
        plain = torch.cat([own + 0.5 * part @ down.t() @ up.t() for part, own, down, up in parts])
        assert_close(list(found), list(torch.autograd.grad(plain, wanted, g)))


def test_an_embedding_holds_what_starts_at_random():
    adapter = tz.attach(
        tiny("llama", "lm", tie_word_embeddings=False),
        tz.LoRA(r=2, freeze_a=True, target_modules=["embed_tokens"]),
        "a",
    )
    assert [name.rpartition(".")[2] for name, _ in adapter.trained()] == ["lora_embedding_A"]


def test_bad_settings_are_refused():
    with pytest.raises(tz.TanzakuError, match="found loraplus_lr_ratio=0, expected a number above 0"):
        tz.attach(tiny("llama"), tz.LoRA(loraplus_lr_ratio=0), "a")
    with pytest.raises(tz.TanzakuError, match="adalora: found freeze_a, expected LoRA"):
        tz.attach(tiny("llama"), tz.AdaLoRA(freeze_a=True), "a")
