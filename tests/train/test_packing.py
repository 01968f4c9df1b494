"""Packed batches: the numbers of the plain, padded model, and nothing left behind."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import transformers
from bench.zoo import LENGTHS, NAMES, SUBJECTS
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import tanzaku as tz
from close import GRADIENT, assert_close
from models import batch, tiny
from tanzaku.core.manager import manager_of
from tanzaku.core.routing import Cut, Ragged
from tanzaku.engine import products
from tanzaku.engine.acceleration import Common
from tanzaku.engine.accelerations import Accelerations
from tanzaku.engine.attention import RowAttention
from tanzaku.engine.layout import Layout
from tanzaku.engine.order import ABOVE
from tanzaku.engine.packing import Packing
from tanzaku.engine.skipping import SkipUnneeded
from tanzaku.engine.trim import LastToken
from tanzaku.models.families import Base
from tanzaku.tasks.task import Batch, Example
from tanzaku.train.results import Job
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings
from task_data import task
from tiers import costly

CPU = torch.device("cpu")
HUNG = {
    "lora": (tz.LoRA(r=2, target_modules="all-linear"), 0),
    "more lora": (tz.LoRA(r=2, target_modules="all-linear"), 0),
    "ia3": (tz.IA3(), 0),
    "prompt": (tz.PromptTuning(num_virtual_tokens=3), 3),
    "prefix": (tz.PrefixTuning(num_virtual_tokens=2), 0),
    "gated": (tz.LlamaAdapter(adapter_layers=1, adapter_len=3), 0),
    "head": (tz.Head(), 0),
}


def adapted(model: PreTrainedModel, names: list[str]) -> list[Any]:
    adapters = [tz.attach(model, HUNG[name][0], name.replace(" ", "-"), seed=n) for n, name in enumerate(names)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for adapter in adapters:
            for _, parameter in adapter.trained():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapters


def both(
    model: PreTrainedModel, names: list[str], rows: list[int], width: int | None = None
) -> tuple[list[Any], list[Any], list[int]]:
    """Logits and gradients of rows routed to these adapters, by the plain model and packed; and how many rows each
    layer's norm saw."""
    adapters = adapted(model, names)
    inputs = {key: value[:, :width] for key, value in batch(model, rows=len(rows)).items()}
    entries = [adapters[row].name for row in rows]
    lengths = inputs["attention_mask"].sum(1).tolist()
    virtual = [HUNG[names[row]][1] for row in rows]
    lead = max(virtual)
    base = Base.of(model)
    common = Common(base)
    assert Packing(common).possible  # it is tried the first time
    layout = Layout(
        lead + inputs["input_ids"].shape[1],
        [0] * len(virtual),
        [v + length for v, length in zip(virtual, lengths, strict=True)],
        [-1 for row in rows],  # gradients are needed everywhere
        CPU,
        packed=True,
    )
    trained = [p for adapter in adapters for _, p in adapter.trained()]
    seen: list[int] = []
    found = []
    for packed in (False, True):
        handle = base.attention()[0][1].register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(kwargs.get("hidden_states", *args[:1]).shape[0]), with_kwargs=True
        )
        with ExitStack() as stack:
            stack.enter_context(tz.route(model, entries))
            if packed:
                route = manager_of(model).route
                members = [
                    stack.enter_context(kind(common)) for kind in (Packing, RowAttention, LastToken, SkipUnneeded)
                ]
                packing = members[0]
                assert isinstance(packing, Packing) and route is not None
                for member in members:
                    stack.enter_context(member.batch(layout, route))
            logits = model(**inputs, use_cache=False).logits
            read = logits if logits.dim() == 2 else own_tokens(model, logits)
            gradients = torch.autograd.grad(read.square().sum(), trained, allow_unused=True)
        handle.remove()
        found.append(
            [logits, *(torch.zeros_like(p) if g is None else g for p, g in zip(trained, gradients, strict=True))]
        )
    assert seen == [len(rows), sum(layout.lengths)]
    assert packing.layout is None and not packing._masks  # nothing of a batch is kept
    return found[0], found[1], seen


def own_tokens(model: PreTrainedModel, logits: torch.Tensor) -> torch.Tensor:
    """Logits of the rows' own tokens, which stand at the end where virtual ones are before them."""
    mask = batch(model, rows=len(logits))["attention_mask"].bool()
    return logits[:, -mask.shape[1] :][mask]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen2", "mistral"])
def test_logits_and_gradients_are_those_of_the_padded_batch(kind: str, attention: str) -> None:
    model = tiny(kind, attn_implementation=attention)
    expected, found, _ = both(model, list(HUNG), [0, 0, 1, 2, 3, 4, 5, 6])
    assert any(g.any() for g in expected[1:])
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, GRADIENT)


@pytest.mark.parametrize(
    ("kind", "head"),
    [("gpt2", "cls"), ("gpt2", "lm"), ("llama", "lm"), ("phi", "lm"), ("gpt_neox", "lm"), ("opt", "lm")],
)
def test_any_decoder_is_packed_with_any_head(kind: str, head: str) -> None:
    names = ["lora", "more lora", "prompt", "prefix"]
    expected, found, _ = both(tiny(kind, head), names, [0, 0, 1, 2, 3])
    if head == "lm":  # behind a row's last token the head has made numbers of nothing
        expected[0], found[0] = (own_tokens(tiny(kind, head), logits) for logits in (expected[0], found[0]))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, GRADIENT)


FEW = ["gpt_oss", "gemma2", "qwen3_moe", "olmo2", "granite_swa", "opt", "lfm2", "falcon_h1", "mamba", "llama4_text"]


@pytest.mark.parametrize("name", costly(FEW, sorted({s.name for s in SUBJECTS["causal LM"]} - {*FEW})))
def test_a_family_is_packed_where_that_changes_nothing(name: str) -> None:
    """Its windows are shorter than the longest row here."""
    try:
        model = NAMES[name].build()
    except ValueError as error:
        pytest.skip(str(error))
    accelerations = Accelerations(Base.of(model), "packing")
    if not accelerations.packs:
        return
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(8, 100, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    adapter = tz.attach(model, tz.LoRA(r=2, target_modules="all-linear", init_lora_weights=False), "lora", seed=0)
    rows = Batch({"input_ids": ids, "attention_mask": mask}, {}, [Example({"input_ids": range(n)}) for n in LENGTHS])
    found = []
    for packed in (False, True):
        with tz.route(model, ["lora", None, "lora", None]), accelerations, torch.no_grad():
            route = manager_of(model).route if packed else None
            with accelerations.batch(rows, [adapter, None, adapter, None], route):
                found.append(model(**rows.inputs, use_cache=False).logits[mask.bool()])
    assert_close(found[1], found[0], GRADIENT)


def test_most_families_of_decoders_are_packed() -> None:
    packed = {name for name in FEW if Packing(Common(Base.of(NAMES[name].build()))).possible}
    assert packed == {"gpt_oss", "gemma2", "qwen3_moe", "olmo2", "granite_swa", "opt"}


def test_a_model_is_tried_once_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, passes = tiny("gpt2", "lm").train(), []
    model.transformer.register_forward_pre_hook(lambda *_: passes.append(1))
    random = torch.get_rng_state()
    for _ in range(2):
        assert Packing(Common(Base.of(model))).possible
    assert len(passes) == 2, "once padded and once packed"
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "mistral"])
def test_rows_of_a_single_token(kind: str, attention: str) -> None:
    model = tiny(kind, attn_implementation=attention)
    expected, found, _ = both(model, list(HUNG), [0, 1, 2, 3, 4, 4, 5, 6], width=1)
    assert_close(list(found), list(expected), GRADIENT)  # some are zero but for rounding: attention to one key


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["lora", "prompt", "prefix", "gated"])
def test_a_window_that_is_shorter_than_the_rows(name: str, attention: str) -> None:
    model = tiny("mistral", sliding_window=3, attn_implementation=attention)
    expected, found, _ = both(model, [name, "ia3"], [0, 1, 0])
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, GRADIENT)
    wide = both(tiny("mistral", sliding_window=50, attn_implementation=attention), [name, "ia3"], [0, 1, 0])[0]
    assert not torch.allclose(wide[0], expected[0])


def test_one_adapter_for_all_rows_and_rows_that_are_scattered() -> None:
    for rows in ([0, 0, 0], [0, 1, 0, 1]):
        expected, found, _ = both(tiny("llama"), ["lora", "prompt"][: max(rows) + 1], rows)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, GRADIENT)


def test_in_the_last_layer_one_token_a_row_asks_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens: list[int] = []
    multiply = products.multiply
    monkeypatch.setattr(products, "multiply", lambda x, *rest: tokens.append(x.shape[0]) or multiply(x, *rest))
    *_, (rows, own) = both(tiny("llama"), ["prompt"], [0, 0, 0])
    # Forward and backward: keys and values of all tokens, and of one a row queries and what lies behind them.
    first, last = 7, 2
    assert tokens.count(own) == 2 * (first + last) and tokens.count(rows) == 2 * 5


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("llama")
    before = {path: dict(module.__dict__) for path, module in model.named_modules()}
    both(model, ["lora"], [0, 0])
    tz.detach(model, "lora")
    for path, module in model.named_modules():
        assert module.__dict__.keys() == before[path].keys(), path
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("kind", "head"), [("bert", "cls"), ("bert", "lm"), ("t5", "cls"), ("t5", "lm")])
def test_other_models_are_not_packed(kind: str, head: str) -> None:
    assert not Packing(Common(Base.of(tiny(kind, head)))).possible


def flash_on_cpu(seen: list[str]) -> Any:
    """What transformers takes in place of flash attention's kernels, computed by torch's own attention."""

    def one(q: Any, k: Any, v: Any, softmax_scale: float | None = None, causal: bool = False, **kwargs: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        ahead = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        mask = ahead if causal else None
        options: Any = {"attn_mask": mask, "scale": softmax_scale, "enable_gqa": True}
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    def plain(q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
        seen.append("plain")
        return one(q, k, v, **kwargs)

    def variable(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, **kwargs: Any) -> Any:
        seen.append("variable")
        parts = [
            x.tensor_split(at[1:-1].tolist()) for x, at in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
        ]
        return torch.cat([one(*(x[None] for x in row), **kwargs)[0] for row in zip(*parts, strict=True)])

    def loaded(implementation: str | None) -> Any:
        assert implementation == "flash_attention_2"
        utils = transformers.modeling_flash_attention_utils
        names = ("softmax_scale", "causal", "dropout_p", "window_size", "max_seqlen_q", "max_seqlen_k")
        supported = defaultdict(bool, dict.fromkeys(names, True))
        process = partial(utils._process_flash_attention_kwargs, supports_mapping=supported)
        return (plain, variable, None, utils._pad_input, utils._unpad_input), (process, process)

    return loaded


def test_flash_attention_has_rows_of_unequal_length_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own code, but for the kernels, which need a GPU: rows whose attention nothing changes are told
    apart by where they begin, and those with a prefix are padded."""
    expected = both(tiny("llama"), list(HUNG), [0, 0, 1, 2, 3, 4, 5, 6])[0]
    seen: list[str] = []
    monkeypatch.setattr(transformers.modeling_flash_attention_utils, "lazy_import_flash_attention", flash_on_cpu(seen))
    model = tiny("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    padded, found, _ = both(model, list(HUNG), [0, 0, 1, 2, 3, 4, 5, 6])
    assert "variable" in seen
    for a, b, c in zip(found, padded, expected, strict=True):
        assert_close(a, c, GRADIENT)
        assert_close(b, c, GRADIENT)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=5), st.integers(0, 3))
def test_ragged_rows_come_back_with_their_gradients(rows: list[tuple[int, int]], more: int) -> None:
    starts, lengths = [s for s, _ in rows], [n for _, n in rows]
    width = max(s + n for s, n in rows) + more
    ragged = Ragged.of(width, starts, lengths, CPU)
    x = torch.randn(sum(lengths), 2, requires_grad=True)
    padded = ragged.pad(x)
    token = 0
    for row, (start, length) in enumerate(rows):
        assert_close(padded[row * width + start :][:length], x[token : token + length])
        token += length
    weights = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((ragged.pack(padded * 2) * weights).sum(), x)
    assert_close(gradient, 2 * weights)


def test_lowest_layers_make_slices_where_rows_are_sorted_by_them() -> None:
    layout = Layout(4, [0, 0, 0], [3, 4, 2], [0, 1, ABOVE], CPU, packed=True)
    assert layout.places() is None
    assert layout.places(0) == slice(0, 3) and layout.places(1) == slice(0, 7)
    last = layout.places(1, last=True)
    assert isinstance(last, torch.Tensor) and last.tolist() == [2, 6]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), max_size=4), st.integers(0, 2), st.randoms())
def test_a_cut_tensor_is_put_together_again(gaps: list[tuple[int, int]], rest: int, random: Random) -> None:
    """Rows of some groups doubled, the others as they are; and each gets its own gradient."""
    groups, at = [], 0
    for gap, size in gaps:
        groups.append(slice(at + gap, at + gap + size))
        at += gap + size
    random.shuffle(groups)
    x = torch.randn(at + rest, 2, requires_grad=True)
    cut = Cut(x, groups)
    for rows, part in zip(groups, cut.parts, strict=True):
        assert torch.equal(part, x[rows])
    factor = torch.ones(at + rest, 1)
    for rows in groups:
        factor[rows] = 2
    y = cut.put([part * 2 for part in cut.parts])
    assert_close(y, x * factor)
    if len(x):
        weights = torch.randn_like(x)
        (gradient,) = torch.autograd.grad((y * weights).sum(), x)
        assert_close(gradient, weights * factor)


def test_a_job_whose_texts_end_with_the_padding_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the end of a text, too: the classifier reads the token before, packed or not."""
    data = task((4, 9, 3), train=6, end=0)
    train = TrainSettings(epochs=1, batch_size=3, learning_rate=0.01)
    found = []
    for packed in (True, False):
        if not packed:
            monkeypatch.setattr(Packing, "possible", property(lambda self: False))
        jobs = [Job("lora", tz.LoRA(r=2), train), Job("prompt", tz.PromptTuning(num_virtual_tokens=2), train)]
        results = train_jobs(tiny("llama", num_labels=2), data, jobs, out=tmp_path / str(packed))
        assert all(r.valid is not None for r in results)
        found.append([[r.epochs[0].train_loss, *(r.valid or {}).values()] for r in results])
    assert_close(found[0], found[1], GRADIENT)
