"""Law 8: the laws hold under padding on either side, half precision, checkpointing, training mode and generate()."""

import pytest
import torch
from variants import (
    all_kinds,
    all_variants,
    assert_equal_gradients,
    assert_isolated,
    attached,
    bamboo,
    by_kind,
    full_bamboo,
    gradients,
    logits,
    losses,
    plain_logits,
    rows_of,
    sharing,
)

import tanzaku as tz
from close import HALF, assert_close
from models import VOCAB, batch
from tanzaku.core.manager import manager_of
from tanzaku.methods import METHODS
from tanzaku.models import tree
from tiers import in_families

FAMILIES = [("llama", "cls"), ("bert", "cls"), ("t5", "lm"), ("bart", "lm"), ("gpt2", "lm"), ("gemma3", "cls")]
GENERATORS = ["llama", "gpt2", "gemma3", "opt", "t5", "bart"]
IN_FAMILIES = in_families(("kind", "head"), FAMILIES)


def mixed_route(name):
    """A small route: the method's rows beside bare rows and virtual tokens, or alone where it shares no batch."""
    return [name, None, "prompt_tuning-2", name] if METHODS[name].shares_batch else [name] * 4


# -- padding


@IN_FAMILIES
@pytest.mark.parametrize("padding", ["right", "left"])
@all_kinds
def test_padding(name, padding, kind, head):
    """Isolation, and a gradient for every trained parameter, with padding on either side."""
    model = full_bamboo(kind, head)
    entries = mixed_route(name)
    inputs = batch(model, padding=padding)
    assert_isolated(model, entries, inputs)
    adapter = manager_of(model).get(name)
    found = gradients(losses(logits(model, entries, inputs))[[0, 3]].sum(), adapter)
    assert all(g.any() for g in found.values())


@in_families(
    ("padding", "kind", "head"),
    [*(("right", *f) for f in FAMILIES), *(("left", kind, "lm") for kind in ("llama", "gpt2", "gemma3"))],
    by=1,
)
@pytest.mark.parametrize("name", by_kind(None), ids=str)
def test_padding_adds_nothing(name, padding, kind, head):
    """A padded row computes what it computes without its padding; on the left with positions, as generate() gives."""
    model = full_bamboo(kind, head)
    row = rows_of(batch(model, rows=2, padding=padding), [1])
    real = row["attention_mask"][0].bool()
    if padding == "left":
        row["position_ids"] = (row["attention_mask"].cumsum(1) - 1).clamp(min=0)
    short = {key: value[:, real] if value.shape[1] == len(real) else value for key, value in row.items()}
    with torch.no_grad():
        padded, bare = logits(model, [name], row), logits(model, [name], short)
    if padded.shape != bare.shape:
        padded = padded[:, real]
    assert_close(padded, bare)


# -- half precision


@IN_FAMILIES
@all_kinds
def test_bf16(name, kind, head):
    """On a base in bf16: parameters are fp32, rows agree with themselves alone, every parameter learns."""
    model = bamboo(kind, head).to(torch.bfloat16)
    adapter = attached(model, name)
    attached(model, "prompt_tuning", as_="prompt_tuning-2")
    assert {p.dtype for _, p in adapter.trained()} == {torch.float32}
    assert {p.dtype for p in tree.parameters(model)} == {torch.bfloat16}
    entries = mixed_route(name)
    inputs = batch(model)
    found = logits(model, entries, inputs)
    assert found.dtype == torch.bfloat16
    alone = logits(model, [name] * 2, rows_of(inputs, [0, 3]))
    assert_close(found[[0, 3]], alone, HALF)
    got = gradients(losses(found)[[0, 3]].sum(), adapter)
    assert all(g.any() and g.isfinite().all() for g in got.values())


@all_kinds
def test_autocast(name):
    """Under bf16 autocast on an fp32 base, as in mixed-precision training."""
    model = bamboo()
    adapter = attached(model, name)
    inputs = batch(model)
    expected = logits(model, [name] * 4, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model, [name] * 4, inputs)
    assert_close(found.float(), expected, HALF, dtype=torch.bfloat16)
    assert all(g.any() for g in gradients(losses(found).sum(), adapter).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@all_kinds
def test_model_moved_to_another_type_after_attaching(name, dtype):
    """`model.to(dtype)` moves the base, and the adapter still runs and learns."""
    model = bamboo()
    adapter = attached(model, name)
    model.to(dtype)
    loss = losses(logits(model, [name] * 4, batch(model))).sum()
    assert all(g.any() for g in gradients(loss, adapter).values())


# -- training mode and gradient checkpointing


@all_kinds
def test_training_mode(name):
    """The base's mode reaches the adapters and changes nothing while dropout is zero. What a method draws in training
    has a law of its own; here it is in evaluation what it was before."""
    model = bamboo()
    attached(model, name)
    attached(model, "prompt_tuning", as_="prompt_tuning-2")
    inputs = batch(model)
    expected = logits(model, mixed_route(name), inputs)
    model.train()
    if METHODS[name].draws:
        assert not torch.allclose(logits(model, mixed_route(name), inputs), expected)
        model.eval()
    assert_close(logits(model, mixed_route(name), inputs), expected)
    assert_isolated(model, mixed_route(name), inputs)


def checkpointed(model, name, entries, inputs, use_reentrant=False):
    """Gradients where the backward pass comes after the route ended and other routes came and went."""
    adapter = manager_of(model).get(name)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(3)  # of methods that draw
    if use_reentrant:  # which needs inputs that ask for a gradient
        model.enable_input_require_grads()
    try:
        loss = losses(logits(model, entries, inputs)).sum()
        with torch.no_grad():
            logits(model, [None] * len(entries), inputs)
            logits(model, [name], rows_of(inputs, [1]))
        if not use_reentrant:
            return gradients(loss, adapter)
        loss.backward()  # it knows no other way
        found = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in adapter.trained()}
        for _, parameter in adapter.trained():
            parameter.grad = None
        return found
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


@IN_FAMILIES
@all_kinds
def test_gradient_checkpointing(name, kind, head):
    """Layers that run again in the backward pass run under the route they first ran under."""
    model = full_bamboo(kind, head)
    entries = mixed_route(name)
    inputs = batch(model)
    model.train()
    torch.manual_seed(3)
    expected = gradients(losses(logits(model, entries, inputs)).sum(), manager_of(model).get(name))
    assert_equal_gradients(checkpointed(model, name, entries, inputs), expected)
    assert manager_of(model).route is None


@all_variants
def test_gradient_checkpointing_of_every_setting(name, variant):
    """The same for each method's settings, on LLaMA; dropout draws the same mask again."""
    model = bamboo()
    attached(model, name, variant)
    adapter = manager_of(model).get(name)
    inputs = batch(model)
    model.train()
    torch.manual_seed(3)
    expected = gradients(losses(logits(model, [name] * 4, inputs)).sum(), adapter)
    assert_equal_gradients(checkpointed(model, name, [name] * 4, inputs), expected)
    assert_equal_gradients(checkpointed(model, name, [name] * 4, inputs, use_reentrant=True), expected)


@all_kinds
def test_checkpointing_enabled_under_a_route(name):
    """As trainers do it: the adapter is active first, checkpointing comes after, and two losses share a backward."""
    model = bamboo()
    adapter = attached(model, name)
    tz.activate(model, name)

    def loss():
        torch.manual_seed(3)  # of methods that draw
        return sum(losses(plain_logits(model, batch(model, seed=seed))).sum() for seed in (1, 2))

    model.train()
    expected = gradients(loss(), adapter)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal_gradients(gradients(loss(), adapter), expected)
    late = loss()
    tz.activate(model, None)
    with pytest.raises((tz.TanzakuError, torch.utils.checkpoint.CheckpointError)):
        late.backward()
    tz.activate(model, name)
    late = loss()
    tz.activate(model, None)
    tz.activate(model, name)
    assert_equal_gradients(gradients(late, adapter), expected)


@all_kinds
def test_a_backward_pass_that_comes_too_late_says_so(name):
    """Of an adapter that is not active any more nothing requires a gradient, and none is passed over in silence."""
    model = bamboo()
    adapter = attached(model, name)
    tz.activate(model, name)
    loss = losses(plain_logits(model, batch(model))).sum()
    tz.activate(model, None)
    with pytest.raises(tz.TanzakuError, match="which is not active any more"):
        loss.backward()
    tz.activate(model, name)
    losses(plain_logits(model, batch(model))).sum().backward()
    assert all(p.grad is not None for _, p in adapter.trained())


# -- generate()


def prompt(model, rows=3, **options):
    inputs = batch(model, rows=rows, length=6, padding="left", **options)
    inputs.pop("decoder_input_ids", None)
    return inputs


def written(model, entries, inputs, **options):
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    with tz.route(model, entries):
        ids = model.generate(**inputs, **settings)
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    if start:
        times = len(ids) // len(inputs["input_ids"])
        assert torch.equal(ids[:, :start], inputs["input_ids"].repeat_interleave(times, 0))
    assert ids.max() < VOCAB and ids.min() >= 0
    return ids[:, start:]


@in_families("kind", GENERATORS)
@pytest.mark.parametrize("name", by_kind(None), ids=str)
def test_a_cache_changes_no_token(name, kind):
    """Greedy ids with the cache equal those without, and those that step-by-step argmax gives."""
    model = full_bamboo(kind, "lm")
    inputs = prompt(model)
    cached = written(model, [name] * 3, inputs)
    assert torch.equal(cached, written(model, [name] * 3, inputs, use_cache=False))
    if not model.config.is_encoder_decoder:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        for step in range(6):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            own = {"position_ids": positions} if kind in ("gpt2", "llama", "gemma3") else {}
            with torch.no_grad(), tz.route(model, [name] * 3):
                scores = model(input_ids=ids, attention_mask=mask, **own).logits[:, -1]
            scores[:, 2] = -torch.inf  # generate() forbids the end of the text before min_new_tokens
            assert torch.equal(scores.argmax(-1), cached[:, step])
            ids = torch.cat([ids, cached[:, step : step + 1]], 1)
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)


@in_families("kind", GENERATORS)
def test_adapters_write_differently(kind):
    """Routed rows differ from bare ones, or the equalities above would say little."""
    model = full_bamboo(kind, "lm")
    base = written(model, [None] * 3, prompt(model))
    same = [name for name in METHODS if torch.equal(written(model, [name] * 3, prompt(model)), base)]
    assert len(same) < len(METHODS) / 3, same


@in_families("kind", GENERATORS)
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"repetition_penalty": 1.3}], ids=str
)
def test_a_mixed_batch_writes_what_its_rows_write_alone(kind, options):
    """One row of every method and a bare one, by greedy search, beams and with a penalty of repetitions."""
    model = full_bamboo(kind, "lm")
    entries = [*sharing(), None]
    inputs = prompt(model, rows=len(entries))
    together = written(model, entries, inputs, **options)
    times = options.get("num_return_sequences", 1)
    assert len(together) == times * len(entries)
    for row, entry in enumerate(entries):
        alone = written(model, [entry], rows_of(inputs, [row]), **options)
        assert torch.equal(together[times * row : times * (row + 1), : alone.shape[1]], alone), entry


@in_families("kind", GENERATORS)
@all_kinds
def test_beams_and_penalties_and_sampling(name, kind):
    """Every method writes ids of the vocabulary under beams, sampling and a repetition penalty."""
    model = full_bamboo(kind, "lm")
    inputs = prompt(model, rows=2)
    beams = written(model, [name] * 2, inputs, num_beams=3)
    assert torch.equal(beams, written(model, [name] * 2, inputs, num_beams=3, use_cache=False))
    penalised = written(model, [name] * 2, inputs, repetition_penalty=1.3, no_repeat_ngram_size=2)
    assert penalised.shape[1] >= 6
    torch.manual_seed(0)
    several = written(model, [name] * 2, inputs, do_sample=True, num_return_sequences=3, top_k=20)
    assert len(several) == 6
    assert len({tuple(ids) for ids in several.tolist()}) > 1


@pytest.mark.parametrize("kind", GENERATORS)
def test_sampling_under_a_mixed_route(kind):
    """`num_return_sequences` expands a mixed route."""
    model = full_bamboo(kind, "lm")
    entries = [*sharing(), None]
    torch.manual_seed(0)
    ids = written(model, entries, prompt(model, rows=len(entries)), do_sample=True, num_return_sequences=2)
    assert len(ids) == 2 * len(entries)


@pytest.mark.parametrize("kind", GENERATORS)
def test_generation_leaves_no_trace(kind):
    """After generate() under a route the base writes what it wrote before."""
    model = full_bamboo(kind, "lm")
    before = written(model, [None] * 3, prompt(model))
    written(model, ["prompt_tuning", "prefix_tuning", "lora"], prompt(model))
    ids = model.generate(**prompt(model), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(ids[:, -before.shape[1] :], before)
