"""An adapter that is in force from its invocation on: HF PEFT's logits and texts, caches, padding, and other rows."""

import copy

import peft
import pytest
import torch
from transformers import DynamicCache

import tanzaku as tz
from close import RUN, assert_close
from interop.oracle import logits, reopened, scatter
from models import VOCAB, attach, batch, tiny
from tanzaku.core import caches
from tanzaku.core.manager import manager_of
from tanzaku.methods import METHODS
from tanzaku.train.results import Job
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings
from task_data import task

CALL = [7, 9]
ALORA = {"r": 2, "lora_alpha": 6, "alora_invocation_tokens": CALL, "target_modules": ["q_proj", "k_proj", "down_proj"]}


def opened(model, name="a", **settings):
    adapter = tz.attach(model, tz.LoRA(**{**ALORA, **settings}), name, seed=0)
    scatter([p for _, p in adapter.trained()])
    return adapter


def rows(model, padding):
    """Invoked early, twice, late, and not at all; no other row has the tokens one after another."""
    made = batch(model, length=11, padding=padding)
    ids, mask = made["input_ids"], made["attention_mask"]
    ids[ids == CALL[0]] = 11
    own = mask.bool()
    for row, places in enumerate(((1,), (1, 5), (4,))):
        first = int(own[row].int().argmax())
        for place in places:
            ids[row, first + place : first + place + 2] = torch.tensor(CALL)
    return made


@pytest.mark.parametrize("padding", ["right", "left"])
def test_logits_are_peft_s(padding, tmp_path):
    model = tiny("llama", "lm")
    config = peft.LoraConfig(**ALORA, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    scatter([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path / "theirs")
    tz.load(model, tmp_path / "theirs", "a")
    tz.activate(model, "a")
    given = rows(model, padding)
    expected = logits(theirs, given)
    assert_close(logits(model, given), expected)
    tz.save(model, "a", tmp_path / "ours")
    tz.detach(model)
    assert (logits(model, given) - expected).abs().max() > 0.1
    assert_close(logits(reopened(model, tmp_path / "ours"), given), expected)


@torch.no_grad()
def test_before_the_invocation_every_bit_is_the_base_s():
    model = tiny("llama", "lm")
    opened(model)
    given = rows(model, "right")
    bare = model(**given).logits
    with tz.route(model, ["a"] * 4):
        found = model(**given).logits
    for row, start in enumerate((1, 5, 4, 11)):
        assert torch.equal(found[row, :start], bare[row, :start])
        own = int(given["attention_mask"][row].sum())
        assert start == 11 or not torch.allclose(found[row, start:own], bare[row, start:own], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["right", "left"])
def test_rows_of_several_adapters_share_a_batch(padding):
    """Scattered, beside bare rows, virtual tokens and other invocations, each row is what it is alone."""
    model = tiny("llama", "lm")
    opened(model)
    opened(model, "other", alora_invocation_tokens=[7], target_modules=["v_proj"])
    tz.attach(model, tz.PromptTuning(num_virtual_tokens=3), "prompt", seed=0)
    given = rows(model, padding)
    entries = ["a", None, "other", "prompt", "a", ("prompt", "a"), "other", "a"]
    wide = {key: torch.cat([tensor, tensor.flip(0)]) for key, tensor in given.items()}
    with tz.route(model, entries):
        mixed = model(**wide).logits
    for row, entry in enumerate(entries):
        own = wide["attention_mask"][row].bool()
        with tz.route(model, [entry]):
            alone = model(input_ids=wide["input_ids"][row, own][None]).logits
        assert_close(mixed[row, own], alone[0])


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no-cache"])
def test_generated_texts_go_on_in_force(options):
    """Every token after the invocation is computed with the adapter, in rows of several adapters."""
    model = tiny("llama", "lm")
    opened(model)
    given = rows(model, "left")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    with tz.route(model, ["a", "a", None, "a"]):
        found = model.generate(**given, **options)
    for row, entry in enumerate(["a", "a", None, "a"]):
        own = given["attention_mask"][row].bool()
        text = given["input_ids"][row, own][None]
        with tz.route(model, [entry]):
            alone = model.generate(input_ids=text, attention_mask=torch.ones_like(text), **options)
            assert found[row, -6:].tolist() == alone[0, -6:].tolist()
            if "num_beams" not in options:  # what a pass over the whole text would choose
                said = model(input_ids=alone).logits[0, -7:-1].argmax(-1)
                assert said.tolist() == alone[0, -6:].tolist()


@torch.no_grad()
def test_what_is_noted_of_rows_follows_them():
    """Rows leave a cache beside which another method keeps one, and in which virtual tokens stand."""
    model = tiny("llama", "lm")
    opened(model)
    attach(model, METHODS["xlora"].from_settings({"adapters": ["lora-a", "lora-b"]}), "gated", seed=0)
    scatter([p for _, p in manager_of(model).get("gated").trained()])
    tz.attach(model, tz.PromptTuning(num_virtual_tokens=3), "prompt", seed=0)
    ids = torch.tensor([[3, *CALL, 12, 13, 14, 15, 16, 17, 18]] * 3 + [[*range(3, 13)]])
    ids[2] = ids[2].roll(2)
    entries, left = ["gated", "prompt", "a", None], [2, 1, 0]
    cache = DynamicCache(config=model.config)
    with tz.route(model, entries):
        model(input_ids=ids[:, :8], past_key_values=cache)
    caches.select(cache, left)
    for step in (8, 9):
        with tz.route(model, [entries[row] for row in left]):
            found = model(input_ids=ids[left, step : step + 1], past_key_values=cache).logits[:, 0]
        for at, row in enumerate(left):
            with tz.route(model, [entries[row]]):
                assert_close(found[at], model(input_ids=ids[row : row + 1, : step + 1]).logits[0, -1])


@torch.no_grad()
def test_a_text_in_parts_is_the_text_as_a_whole():
    """Invoked in the second part, with the base's own cache before it; a cache of unknown beginnings is an error."""
    model = tiny("llama", "lm")
    opened(model)
    ids = rows(model, "right")["input_ids"][2:3, :8]
    with tz.route(model, ["a"]):
        whole = model(input_ids=ids).logits
        cache = DynamicCache(config=model.config)
        first = model(input_ids=ids[:, :3], past_key_values=cache).logits
        second = model(input_ids=ids[:, 3:6], past_key_values=cache).logits
        third = model(input_ids=ids[:, 6:], past_key_values=cache).logits
        assert_close(torch.cat([first, second, third], 1), whole)
        unknown = model(input_ids=ids[:, :3]).past_key_values
        with pytest.raises(tz.TanzakuError, match="a cache does not tell where"):
            model(input_ids=ids[:, 3:], past_key_values=unknown)
        with pytest.raises(tz.TanzakuError, match="finds them among the ids"):
            model(inputs_embeds=model.get_input_embeddings()(ids))


def test_what_is_before_has_no_part_in_the_gradient():
    """A row that does not invoke the adapter trains nothing of it."""
    model = tiny("llama", "lm")
    adapter = opened(model)
    tz.activate(model, "a")
    given = rows(model, "right")
    out = model(**given).logits
    trained = [p for _, p in adapter.trained()]
    none = torch.autograd.grad(out[3].sum(), trained, retain_graph=True, allow_unused=True)
    assert not any(g is not None and g.any() for g in none)
    assert all(g.any() for g in torch.autograd.grad(out[0].sum(), trained))


@pytest.mark.parametrize("accelerations", ["auto", "none"])
def test_a_run_trains_it_as_alone(accelerations, tmp_path):
    """Packed rows beside another job's, and padded ones."""
    settings = TrainSettings(epochs=1, learning_rate=0.02, adam_epsilon=1e-3, batch_size=2, accelerations=accelerations)
    data = task((5, 7, 4), train=6)
    token = data.train.examples[0].inputs["input_ids"][1]
    jobs = [
        Job("a", tz.LoRA(r=2, alora_invocation_tokens=[token]), settings),
        Job("b", tz.LoRA(r=2), settings),
    ]
    results = train_jobs(tiny("llama", num_labels=2), data, jobs, out=tmp_path / "both")
    assert [(r.status, r.error) for r in results] == [("done", None)] * 2
    train_jobs(tiny("llama", num_labels=2), data, jobs[:1], out=tmp_path / "alone")
    one, other = tiny("llama", num_labels=2), tiny("llama", num_labels=2)
    found, alone = (
        {n: p.detach() for n, p in tz.load(m, tmp_path / folder / "adapters" / "a", "a").named_parameters()}
        for m, folder in ((one, "both"), (other, "alone"))
    )
    assert_close(found, alone, RUN)
    start = dict(tz.attach(other, jobs[0].method, "start", seed=settings.seed).named_parameters())
    moved = [name for name, p in found.items() if not torch.equal(p, start[name])]
    assert any("lora_B" in name for name in moved)


def test_it_is_no_change_of_weights(tmp_path):
    model = tiny("llama", "lm")
    opened(model)
    with pytest.raises(tz.TanzakuError, match="cannot be merged"):
        tz.merge(model, "a")
    with pytest.raises(tz.TanzakuError, match="plain LoRA alone"):
        tz.export_adapter(model, "a", tmp_path / "a.gguf")
    with pytest.raises(tz.TanzakuError, match="more than a product B A"):
        tz.combine(model, ["a"], "c")


@pytest.mark.parametrize(
    ("kind", "head", "settings", "match"),
    [
        ("bert", "cls", {"target_modules": ["query"]}, r"on a BertForSequenceClassification, expected a decoder"),
        ("t5", "lm", {"target_modules": ["q"]}, r"on a T5ForConditionalGeneration, expected a decoder"),
        ("llama", "lm", {"alora_invocation_tokens": []}, r"=\[\], expected one id or more"),
        ("llama", "lm", {"alora_invocation_tokens": [VOCAB]}, r"expected one id or more, from 0 to"),
        ("llama", "lm", {"use_dora": True}, r"with use_dora"),
        ("llama", "lm", {"init_lora_weights": "pissa"}, r"with 'pissa', expected another start"),
        ("llama", "lm", {"target_modules": ["embed_tokens"]}, r"a Embedding, with alora_invocation_tokens"),
    ],
)
def test_where_it_is_refused(kind, head, settings, match):
    with pytest.raises(tz.TanzakuError, match=match):
        tz.attach(tiny(kind, head), tz.LoRA(**{**ALORA, **settings}), "a")


@pytest.mark.parametrize("use_cache", [True, False])
def test_beside_a_prompt_it_begins_where_it_begins_alone(use_cache):
    """Virtual tokens of another row, and what fills this one up beside them, are no tokens of its text."""
    model = tiny("llama", "lm")
    opened(model)
    tz.attach(model, tz.PromptTuning(num_virtual_tokens=5), "p", seed=1)
    ids = torch.tensor([[3, *CALL, 8, 4], [5, 6, 9, 4, 3]])
    with torch.no_grad():
        with tz.route(model, ["a", "p"]):
            beside = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=use_cache).logits
        with tz.route(model, ["a"]):
            alone = model(input_ids=ids[:1], attention_mask=torch.ones_like(ids[:1]), use_cache=use_cache).logits
    assert_close(beside[0], alone[0])


def test_a_cache_keeps_it_with_rows_that_are_reordered():
    """Beam search and its like change the order of a cache's rows; what is cut off a cache does not count."""
    cache, values = DynamicCache(), torch.tensor([3, 5])
    cache.update(torch.zeros(2, 1, 4, 2), torch.zeros(2, 1, 4, 2), 0)
    caches.note(cache, "_begins", values)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert caches.noted(cache, "_begins").tolist() == [5, 3]
    cache.batch_repeat_interleave(2)
    assert caches.noted(cache, "_begins").tolist() == [5, 5, 3, 3]
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert caches.noted(cache, "_begins").tolist() == [5, 3]
