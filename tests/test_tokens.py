"""Where virtual tokens stand, on models of every kind: a row of a batch gets what it gets alone."""

import copy
import pickle
import threading

import pytest
import torch
from bench.zoo import SUBJECTS, batch_of
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, DynamicCache, MambaConfig, StaticCache

import tanzaku as tz
from close import GRADIENT, assert_close, close
from models import batch, tiny
from tanzaku.core import caches, layout, tokens
from tanzaku.core.manager import manager_of
from tanzaku.core.positions import numbering
from tanzaku.models.families import Base

FAMILIES = {subject.name: subject for group in SUBJECTS.values() for subject in group}
# One of each kind: windows, chunks, ALiBi, state spaces, convolutions, per-layer embeddings, positions by mask and by
# column; then encoders with positions by ids, narrow embeddings, poolers of one vector, blocks, dimensions turned
# around; encoders that are told positions; images between the tokens.
DECODERS = ["mistral", "gemma3n_text", "gemma4_text", "llama4_text", "gpt_oss", "mpt", "bloom", "opt", "biogpt"]
RECURRENT = ["mamba", "mamba2", "qwen3_next", "lfm2", "falcon_h1", "jamba", "granitemoehybrid"]
ENCODERS = [
    "camembert",
    "mpnet",
    "esm",
    "albert",
    "electra",
    "rembert",
    "mobilebert",
    "big_bird",
    "longformer",
    "xlnet",
]
ENCODERS += ["roformer", "modernbert", "deberta"]
PAIRS = ["pegasus", "marian", "prophetnet", "longt5", "m2m_100"]
IMAGES = ["gemma3", "qwen2_5_vl", "qwen3_vl"]
LEFT = {"xlnet", *DECODERS, *RECURRENT, "longt5", "m2m_100", *IMAGES} - {"biogpt"}  # bases that allow padding there


@torch.no_grad()
def adapted(model, *methods):
    """Adapters a, b, ... with weights of their own."""
    for seed, method in enumerate(methods):
        adapter = tz.attach(model, method, "abcd"[seed], seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for _, parameter in adapter.trained():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def prompted(name, **settings):
    return adapted(
        FAMILIES[name].build(), tz.PromptTuning(num_virtual_tokens=3), tz.PTuning(num_virtual_tokens=1, **settings)
    )


@torch.no_grad()
def run(model, inputs, entries):
    with tz.route(model, entries):
        return model(**inputs).logits


def rows_of(subject, model):
    rows = subject.rows(model)
    if subject.name == "mobilebert":  # pads reach its tokens also without virtual ones
        rows = [{key: value[:, :3] for key, value in row.items()} for row in rows]
    return rows


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", [*DECODERS, *RECURRENT, *ENCODERS, *PAIRS, *IMAGES])
def test_a_row_of_a_batch_gets_what_it_gets_alone(name, side):
    """Rows of unequal length with 3, 1 and no virtual tokens, padded on either side."""
    if (side == "left" and name not in LEFT) or (side == "right" and name == "xlnet"):
        pytest.skip("padding there changes what the base gives")
    subject, model = FAMILIES[name], prompted(name)
    rows, entries = rows_of(subject, model), ["a", None, "b", "a"]
    pad = model.config.get_text_config().pad_token_id or 0
    found = run(model, batch_of(rows, pad, side), entries)
    different = 0
    for number, (row, entry) in enumerate(zip(rows, entries, strict=True)):
        expected, own = run(model, row, [entry]), found[number : number + 1]
        if own.dim() == 3 and "decoder_input_ids" not in row:
            length = row["input_ids"].shape[1]
            own = own[:, :length] if side == "right" else own[:, own.shape[1] - length :]
        assert_close(own, expected)
        different += not close(expected, run(model, row, [None]))
    assert different == 3


@pytest.mark.parametrize("name", [*DECODERS, *RECURRENT, *ENCODERS, *PAIRS, *IMAGES])
def test_gradients_of_a_batch_are_those_of_its_rows(name):
    """Whatever a model does with what stands in for a shorter row's missing virtual tokens, such as divide by it."""
    subject, model = FAMILIES[name], prompted(name)
    row = rows_of(subject, model)[0]
    two = {key: torch.cat([value, value]) for key, value in row.items()}
    entries, adapters = ["a", "b"], [manager_of(model).get(each) for each in "ab"]

    def gradients(inputs, routed):
        model.zero_grad()
        with tz.route(model, routed):
            logits = model(**inputs).logits
        (logits * torch.linspace(0.5, 1.5, logits.shape[-1])).square().sum().backward()
        return [None if p.grad is None else p.grad.clone() for a in adapters for _, p in a.trained()]

    together = gradients(two, entries)
    alone = [gradients(row, [entry]) for entry in entries]
    for found, a, b in zip(together, *alone, strict=True):
        expected = a if b is None else b
        assert (found is None) == (expected is None)
        if found is not None:
            assert_close(found, expected, GRADIENT)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
@pytest.mark.parametrize("name", ["mistral", "gpt2", "mamba", "mamba2", "qwen3_next", "qwen3_vl", "opt", "bloom"])
def test_text_is_written_as_alone_and_without_a_cache(name, options):
    """A mixed batch padded on the left, with a cache, beams and guesses: each row writes what it writes alone."""
    if "prompt_lookup_num_tokens" in options and name not in ("mistral", "gpt2"):
        pytest.skip("transformers takes back no steps of this model, or not with images")
    subject, model = FAMILIES[name], prompted(name)
    rows = subject.rows(model)
    entries = ["a", None, "b", "a"]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
    if "prompt_lookup_num_tokens" in options:
        together = None
    else:
        with tz.route(model, entries):
            together = model.generate(**batch_of(rows, 0, "left"), **settings)[:, -5:]
    for number, (row, entry) in enumerate(zip(rows, entries, strict=True)):
        with tz.route(model, [entry]):
            alone = model.generate(**row, **settings)[0, -5:]
            plain = {k: v for k, v in settings.items() if k != "prompt_lookup_num_tokens"}
            assert torch.equal(alone, model.generate(**row, **plain, use_cache=False)[0, -5:])
        assert together is None or torch.equal(together[number], alone)


def test_virtual_tokens_of_a_short_row_stay_in_its_window():
    """What the prompt adds is the same beside a row that is longer than the window, with a prefix in the batch, too."""
    model = adapted(
        tiny("mistral", "lm", sliding_window=4),
        tz.PromptTuning(num_virtual_tokens=2),
        tz.PrefixTuning(num_virtual_tokens=2),
    )
    ids, mask = torch.randint(3, 99, (4, 12)), torch.ones(4, 12, dtype=torch.long)
    mask[:2, :9] = 0
    entries = ["a", "b", "a", "b"]
    for cache in (False, True):
        with torch.no_grad(), tz.route(model, entries):
            found = model(input_ids=ids, attention_mask=mask, use_cache=cache).logits
        for row, entry in enumerate(entries):
            own = mask[row].bool()
            assert_close(found[row, own], run(model, {"input_ids": ids[row : row + 1, own]}, [entry])[0])


# -- layouts


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=4),
    st.booleans(),
)
def test_layouts(rows, end):
    """Every token keeps its order, virtual ones stand directly before a row's first token, and all can be undone."""
    width, length = max(c for c, _, _ in rows), max(left + n for _, left, n in rows)
    if not width:
        return
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for row, (_, left, n) in enumerate(rows):
        mask[row, left : left + n] = 1
    counts = [c for c, _, _ in rows]
    place = layout.at_the_end if end else layout.in_front
    lay = place(counts, mask, length, mask.device)
    own = torch.arange(1, length + 1).expand(len(rows), -1) * mask
    slots = -torch.arange(1, width + 1).expand(len(rows), -1) * lay.real
    joined = lay.join(slots, own)
    assert torch.equal(lay.cut(joined), own)
    for (count, left, n), row in zip(rows, joined.tolist(), strict=True):
        text = [x for x in row if x]
        assert text == [*range(-(width - count) - 1, -width - 1, -1), *range(left + 1, left + n + 1)]
        start = row.index(text[0])
        assert row[start : start + len(text)] == text
        if count and not end:
            assert start == 0
        if end and left + n == length:
            assert row[-1] == length
    vectors = torch.randn(len(rows), width, 2)
    replaced = lay.replace(vectors, torch.zeros(len(rows), lay.columns + 1, 2))
    assert replaced[:, -1].eq(0).all() and torch.equal(replaced[:, :-1].ne(0).all(-1), lay.of_slots)


# -- positions


@pytest.mark.parametrize(
    ("name", "kind", "first"),
    [
        ("llama", "column", 0),
        ("opt", "mask", 0),
        ("biogpt", "column", 0),  # its embedding takes a mask, and is never given one
        ("camembert", "ids", 2),
        ("nystromformer", "column", 2),
        ("bloom", "none", 0),
        ("mamba", "none", 0),
        ("roformer", "unknown", 0),
        ("bart", "told", 0),
    ],
)
def test_how_a_model_numbers_positions_is_seen_at_work(name, kind, first):
    model = FAMILIES[name].build()
    base = Base.of(model)
    stack = model.get_encoder() if base.encoder_decoder else base.backbone
    found = numbering(stack, base)
    assert (found.kind, found.first) == (kind, first)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_positions_that_are_given(name):
    """Those of a row's own tokens are the caller's; virtual tokens come before them."""
    model = prompted(name)
    row = FAMILIES[name].rows(model)[1]
    short = {**row, "position_ids": torch.arange(row["input_ids"].shape[1])[None]}
    assert_close(run(model, short, ["a"]), run(model, row, ["a"]))
    padded = batch_of(FAMILIES[name].rows(model), 0, "left")
    padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    found = run(model, padded, ["b", "a", None, "a"])
    assert_close(found[1:2, -row["input_ids"].shape[1] :], run(model, row, ["a"]))


@pytest.mark.parametrize("name", ["camembert", "m2m_100", "pegasus", "opt", "bert"])
def test_prefixes_of_unequal_length(name):
    """A prefix shifts positions by its own length, whatever numbers them."""
    subject = FAMILIES[name]
    try:
        model = adapted(subject.build(), tz.PrefixTuning(num_virtual_tokens=2), tz.PrefixTuning(num_virtual_tokens=5))
    except tz.TanzakuError as refused:
        pytest.skip(str(refused))
    rows, entries = subject.rows(model), ["a", None, "b", "a"]
    found = run(model, batch_of(rows, model.config.pad_token_id, "right"), entries)
    for number, (row, entry) in enumerate(zip(rows, entries, strict=True)):
        own = found[number : number + 1]
        if own.dim() == 3 and "decoder_input_ids" not in row:
            own = own[:, : row["input_ids"].shape[1]]
        assert_close(own, run(model, row, [entry]))


# -- caches


def test_a_later_turn_goes_on_with_the_cache_of_an_earlier_one():
    model = adapted(tiny("llama", "lm"), tz.PromptTuning(num_virtual_tokens=4), tz.PromptTuning(num_virtual_tokens=2))
    ids = torch.randint(3, 99, (1, 6))
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with tz.route(model, ["a"]):
        first = model.generate(input_ids=ids, return_dict_in_generate=True, **settings)
        turn = torch.cat([first.sequences, torch.tensor([[20, 21, 22]])], 1)
        expected = model.generate(input_ids=turn, **settings)
        kept = [copy.deepcopy(first.past_key_values), pickle.loads(pickle.dumps(first.past_key_values))]
        for cache in (*kept, first.past_key_values):
            assert cache.get_seq_length() == turn.shape[1] - 4  # of the text; the last token was never read
            assert caches.length(cache) == turn.shape[1]
            assert torch.equal(model.generate(input_ids=turn, past_key_values=cache, **settings), expected)
    more = torch.tensor([[5]])
    with torch.no_grad():
        with pytest.raises(tz.TanzakuError, match="begins with 4 virtual tokens is read without them"):
            model(input_ids=more, past_key_values=first.past_key_values)
        with tz.route(model, ["b"]), pytest.raises(tz.TanzakuError, match="another route, with 4 virtual tokens"):
            model(input_ids=more, past_key_values=first.past_key_values)
        bare = model(input_ids=ids, use_cache=True).past_key_values
        with tz.route(model, ["a"]), pytest.raises(tz.TanzakuError, match="read without the 4 virtual tokens"):
            model(input_ids=more, past_key_values=bare)


def test_a_text_is_read_in_parts():
    """Token by token with a cache of the caller's own, in a mixed batch that is padded on the left."""
    model = prompted("mistral")
    rows, entries = FAMILIES["mistral"].rows(model), ["a", None, "b", "a"]
    inputs = batch_of(rows, 0, "left")
    expected = run(model, inputs, entries)
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad(), tz.route(model, entries):
        for part in torch.arange(10).split([8, 1, 1]):
            given = {
                "input_ids": inputs["input_ids"][:, part],
                "attention_mask": inputs["attention_mask"][:, : part[-1] + 1],
            }
            found.append(model(**given, past_key_values=cache).logits)
    real = inputs["attention_mask"].bool()
    assert_close(torch.cat(found, 1)[real], expected[real])
    with torch.no_grad(), tz.route(model, entries), pytest.raises(tz.TanzakuError, match="a row is padding alone"):
        cache = DynamicCache(config=model.config)
        for part in torch.arange(10).split([5, 5]):
            given = {
                "input_ids": inputs["input_ids"][:, part],
                "attention_mask": inputs["attention_mask"][:, : part[-1] + 1],
            }
            model(**given, past_key_values=cache)


# -- several texts in a row


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_each_of_several_texts_in_a_row_has_its_prompt(kind):
    model = adapted(tiny(kind, "lm"), tz.PromptTuning(num_virtual_tokens=3), tz.PromptTuning(num_virtual_tokens=1))
    ids = torch.randint(3, 99, (3, 7))
    at = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6]])
    entries = ["a", "b", None]
    with torch.no_grad(), tz.route(model, entries):
        found = model(input_ids=ids, position_ids=at, use_cache=False).logits
        with pytest.raises(tz.TanzakuError, match="use_cache=False"):
            model(input_ids=ids, position_ids=at)
        with pytest.raises(tz.TanzakuError, match="cu_seq_lens_q"):
            model(input_ids=ids, position_ids=at, use_cache=False, cu_seq_lens_q=torch.tensor([0, 7]))
    for row, texts in enumerate([[(0, 4), (4, 7)], [(0, 2), (2, 4), (4, 7)], [(0, 7)]]):
        for start, stop in texts:
            alone = run(model, {"input_ids": ids[row : row + 1, start:stop]}, [entries[row]])
            assert_close(found[row, start:stop], alone[0])


# -- what comes out


def test_states_attentions_and_routers_count_the_rows_own_tokens():
    model = adapted(
        FAMILIES["mixtral"].build(), tz.PromptTuning(num_virtual_tokens=3), tz.PromptTuning(num_virtual_tokens=1)
    )
    model.set_attn_implementation("eager")
    rows = FAMILIES["mixtral"].rows(model)
    inputs = batch_of(rows, 0, "left")
    asked = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    with torch.no_grad(), tz.route(model, ["a", None, "b", "a"]):
        out = model(**inputs, **asked, labels=inputs["input_ids"])
    assert out.loss.isfinite()
    assert [x.shape[:2] for x in out.hidden_states] == [(4, 10)] * 3
    assert [x.shape for x in out.attentions] == [(4, 4, 10, 10)] * 2
    assert [x.shape for x in out.router_logits] == [(40, 4)] * 2
    with torch.no_grad(), tz.route(model, ["a"]):
        alone = model(**rows[3], **asked)
    for found, expected in zip(out.hidden_states, alone.hidden_states, strict=True):
        assert_close(found[3:, 5:], expected)
    for found, expected in zip(out.attentions, alone.attentions, strict=True):
        assert_close(found[3:, :, 5:, 5:], expected)


@pytest.mark.parametrize("name", ["albert", "electra"])
def test_narrow_embeddings(name, tmp_path):
    """Vectors are as wide as the embedding, in files, too; the classifier reads the first own token."""
    model = adapted(FAMILIES[name].build(), tz.PromptTuning(num_virtual_tokens=3, modules_to_save=[]))
    tokens = manager_of(model).get("a")
    (layer,) = [s for path, s in tokens.at() if path == ""]
    assert layer.vectors().shape == (3, 24) and tokens.method.token_dim == 24
    row = FAMILIES[name].rows(model)[0]
    with torch.no_grad():
        embeds = torch.cat([layer.vectors()[None], model.get_input_embeddings()(row["input_ids"])], 1)
        backbone = model.base_model
        states = backbone(inputs_embeds=embeds).last_hidden_state[:, 3:]
        if name == "albert":
            expected = model.classifier(torch.tanh(backbone.pooler(states[:, 0])))
        else:
            expected = model.classifier(states)
    assert_close(run(model, row, ["a"]), expected)
    tz.save(model, "a", tmp_path)
    tz.load(model, tmp_path, "again")
    assert_close(run(model, row, ["again"]), expected)


# -- what has no place for them


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("whisper", "WhisperEncoder of model type 'whisper' reads input_features, no token ids"),
        ("clip", "model type 'clip' reads no token ids"),
        ("convnext", "model type 'convnext' reads no token ids"),
        ("funnel", r"FunnelBaseModel makes \(.*\) hidden states of 13 tokens"),
    ],
)
def test_models_without_a_place(name, match):
    with pytest.raises(tz.TanzakuError, match=match):
        model = prompted(name)
        run(model, FAMILIES[name].rows(model)[0], ["a"])


@pytest.mark.parametrize("name", ["convbert", "fnet", "nystromformer", "rwkv"])
def test_fillers_that_would_be_seen(name):
    """Rows with the same number of virtual tokens are right; others are refused, where padding is no secret."""
    model = prompted(name)
    row = FAMILIES[name].rows(model)[0]
    two = {key: torch.cat([value, value]) for key, value in row.items()}
    assert_close(run(model, two, ["a", "a"])[:1], run(model, row, ["a"]))
    with pytest.raises(tz.TanzakuError, match="the same number of virtual tokens"):
        run(model, two, ["a", None])
    if name == "rwkv":
        found = run(model, {**two, "use_cache": False}, ["a", None])
        assert_close(found[1:], run(model, row, [None]))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "qwen2"])
@pytest.mark.parametrize("method", [tz.PrefixTuning(num_virtual_tokens=3), tz.LlamaAdapter(adapter_layers=1)], ids=str)
def test_a_cache_with_room_left_is_not_looked_into(kind, method):
    """A static cache has more keys than a first pass has queries."""
    model = adapted(tiny(kind, "lm"), method)
    ids = torch.randint(3, 99, (2, 6), generator=torch.Generator().manual_seed(0))
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=20)
    with torch.no_grad(), tz.route(model, ["a", None]):
        expected, found = model(ids).logits, model(ids, past_key_values=static).logits
    assert_close(found, expected)
    with tz.route(model, ["a"]):
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        grown, fixed = (model.generate(ids[:1], **options, **more) for more in ({}, {"cache_implementation": "static"}))
    assert grown.tolist() == fixed.tolist()


def test_other_refusals():
    model = adapted(tiny("llama", "lm"), tz.PromptTuning(num_virtual_tokens=2))
    ids = torch.randint(3, 99, (2, 4))
    with torch.no_grad(), tz.route(model, ["a"]):
        with pytest.raises(tz.TanzakuError, match=r"2D attention mask of ones and zeros .* found 4D"):
            model(input_ids=ids, attention_mask=torch.zeros(2, 1, 4, 4))
        with pytest.raises(tz.TanzakuError, match="static cache"):
            model.generate(input_ids=ids, cache_implementation="static", max_new_tokens=3, pad_token_id=0)
        cache = model(input_ids=ids).past_key_values
        with pytest.raises(tz.TanzakuError, match="attention_mask has 7 columns, expected 5"):
            model(input_ids=ids[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 7))
    xlnet = prompted("xlnet")
    row = FAMILIES["xlnet"].rows(xlnet)[0]
    with tz.route(xlnet, ["a"]), pytest.raises(tz.TanzakuError, match="no place in what XLNetModel does with mems"):
        xlnet(**row, mems=[None])


# -- where it runs


@pytest.mark.parametrize("kind", ["llama", "bert", "gemma3"])
@pytest.mark.parametrize("entries", [["a"] * 4, ["a", "b", None, "a"]], ids=str)
def test_fake_tensors(kind, entries):
    """Nothing is read off a tensor, forward and backward."""
    model = adapted(tiny(kind), tz.PromptTuning(num_virtual_tokens=3), tz.PTuning(num_virtual_tokens=2))
    inputs = batch(model, padding="left")
    with tz.route(model, entries), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = model(**{key: mode.from_tensor(value) for key, value in inputs.items()}).logits
        assert out.shape == (4, 3)
        out.sum().backward()


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("padding", ["left", None])
def test_one_graph(kind, padding):
    model = adapted(tiny(kind, "cls"), tz.PromptTuning(num_virtual_tokens=3), tz.PromptTuning(num_virtual_tokens=1))
    inputs = batch(model, padding=padding)
    torch._dynamo.reset()
    for entries in (["a"] * 4, ["a", "b", None, "a"]):
        with torch.no_grad(), tz.route(model, entries):
            fast = torch.compile(model, backend="eager", fullgraph=True)(**inputs).logits
        assert_close(fast, run(model, inputs, entries))


@pytest.mark.parametrize("kind", ["llama", "gemma3", "t5"])
def test_a_pass_asks_for_nothing_that_is_known_of_other_models(kind, monkeypatch):
    """They come and go while it is compiled, and its guards would fail: how positions are numbered is known before."""
    model = adapted(tiny(kind, "lm"), tz.PromptTuning(num_virtual_tokens=3), tz.PrefixTuning(num_virtual_tokens=1))
    inputs = batch(model, padding="right")

    def asked(*_):
        raise AssertionError("in a pass")

    with torch.no_grad(), tz.route(model, ["a", "b", None, "a"]):
        monkeypatch.setattr(tokens, "numbering", asked)
        model(**inputs)


def test_a_pass_that_failed_and_threads_do_not_meet():
    model = adapted(tiny("llama", "lm"), tz.PromptTuning(num_virtual_tokens=3), tz.PromptTuning(num_virtual_tokens=1))
    inputs = batch(model)
    wanted = {name: run(model, inputs, [name] * 4) for name in "ab"}
    handle = model.model.layers[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, inputs, ["a"] * 4)
    handle.remove()
    wrong = []

    def work(name):
        for _ in range(10):
            found = run(model, inputs, [name] * 4)
            wrong.extend([] if close(found, wanted[name]) else [name])

    threads = [threading.Thread(target=work, args=(name,)) for name in "abab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert_close(run(model, inputs, [None] * 4), model(**inputs).logits)


def test_a_state_space_reads_its_prompt_once():
    config = MambaConfig(vocab_size=120, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4)
    model = adapted(AutoModelForCausalLM.from_config(config).eval(), tz.PromptTuning(num_virtual_tokens=3))
    ids = torch.randint(3, 99, (1, 5))
    with torch.no_grad(), tz.route(model, ["a"]):
        first = model(input_ids=ids, use_cache=True)
        second = model(input_ids=ids[:, :1], cache_params=first.cache_params, use_cache=True)
        whole = model(input_ids=torch.cat([ids, ids[:, :1]], 1)).logits
    assert_close(second.logits[:, -1], whole[:, -1])


@pytest.mark.parametrize("method", [tz.PromptTuning(num_virtual_tokens=2), tz.PrefixTuning(num_virtual_tokens=2)])
@torch.no_grad()
def test_positions_end_where_a_table_that_keeps_rows_for_padding_does(method):
    """RoBERTa's first token has the position behind the padding token's id, so its table has less room than rows."""
    model = adapted(tiny("roberta"), method)
    room = model.config.max_position_embeddings - model.config.pad_token_id - 1
    ids = torch.randint(5, 50, (2, room), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    with tz.route(model, ["a", "a"]):
        alone = model(input_ids=ids[:, :-2], attention_mask=mask[:, :-2]).logits
        for length in (room - 1, room):
            with pytest.raises(tz.TanzakuError, match=f"{length} tokens and 2 virtual tokens .* {room} positions"):
                model(input_ids=ids[:, :length], attention_mask=mask[:, :length])
        ids[:, -2:], mask[:, -2:] = model.config.pad_token_id, 0
        assert_close(model(input_ids=ids, attention_mask=mask).logits, alone)  # padding takes none
