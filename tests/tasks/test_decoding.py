"""What is written in a mixed batch with a cache is what each adapter writes alone, by whole texts without one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import tanzaku as tz
from close import PASS, tolerance
from models import VOCAB, attach, tiny
from tanzaku.core.manager import manager_of
from tanzaku.core.routing import Entry
from tanzaku.core.tokens import entrance_of
from tanzaku.errors import TanzakuError
from tanzaku.methods import METHODS
from tanzaku.models.families import Base
from tanzaku.tasks.decoding import NotWritten, Written, decode
from tanzaku.tasks.sampling import Decoding
from tiers import in_families

GENERATORS = ["llama", "gpt2", "gemma3", "opt", "t5", "bart"]
ENDS = [*range(2, VOCAB, 9)]  # tokens that end texts: so many that some end early, and rows leave the batch
LENGTHS = (3, 9, 5, 1, 7)


def prompts_of(lengths: Sequence[int] = LENGTHS, seed: int = 0, most: int = VOCAB) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, most, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def opened(adapter: tz.Adapter, seed: int = 0) -> tz.Adapter:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in adapter.trained():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2)
    return adapter


def adapted(kind: str = "llama", ends: Sequence[int] = (), **methods: tz.Method) -> PreTrainedModel:
    model = tiny(kind, "lm")
    for seed, (name, method) in enumerate(methods.items()):
        opened(attach(model, method, name, seed=seed), seed)
    if ends:
        model.generation_config.eos_token_id = list(ends)
    return model


@cache
def few(ends: bool = True) -> PreTrainedModel:
    """Adapters of each kind of site. It is shared: tests write with it and change nothing."""
    return adapted(
        "llama",
        ENDS if ends else (),
        lora=tz.LoRA(r=2),
        ia3=tz.IA3(),
        long=tz.PromptTuning(num_virtual_tokens=5),
        short=tz.PTuning(num_virtual_tokens=1),
        prefix=tz.PrefixTuning(num_virtual_tokens=3),
        full=tz.Full(),
    )


EVERYONE: list[Entry] = [None, "lora", "ia3", "long", "short", "prefix", "full", ("lora", "long"), ("prefix", "ia3")]


def ends_of(model: PreTrainedModel) -> set[int]:
    found: Any = model.generation_config.eos_token_id
    return {*found} if isinstance(found, list) else {found}


@torch.no_grad()
def scores(
    model: PreTrainedModel, entry: Entry, prompt: list[int], tokens: list[int], data: Mapping[str, int]
) -> Tensor:
    """(tokens + 1, vocabulary): of each new token and the one behind them, by one pass over the whole text."""
    context = {name: torch.tensor([value]) for name, value in data.items()}
    with tz.route(model, [entry], context) if tz.adapters(model) else nullcontext():
        if model.config.is_encoder_decoder:
            started = torch.tensor([[model.config.decoder_start_token_id, *tokens]])
            return model(input_ids=torch.tensor([prompt]), decoder_input_ids=started, use_cache=False).logits[0]
        return model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, len(prompt) - 1 :]


def assert_greedy(model: PreTrainedModel, written: Written, prompt: list[int], most: int, **data: int) -> None:
    """Each token is the likeliest by a pass without a cache, or as likely but for rounding."""
    said = [*written.tokens]
    each = scores(model, written.entry, prompt, said, data)
    allowed = tolerance(each, PASS)
    for at, token in enumerate(said):
        assert token not in ends_of(model), written
        assert each[at, token] >= each[at].max() - allowed, (written, at)
    if written.end == "end":
        assert each[-1, sorted(ends_of(model))].max() >= each[-1].max() - allowed, written
    assert len(said) < most if written.end == "end" else len(said) == most


def all_of(
    model: PreTrainedModel, prompts: Any, settings: Decoding, **options: Any
) -> dict[tuple[Entry, int], Written]:
    pad = model.config.pad_token_id
    return {(each.entry, each.row): each for each in decode(model, prompts, settings, pad, **options)}


# -- the law


@in_families("kind", GENERATORS)
@pytest.mark.parametrize("ends", [False, True])
def test_every_method_writes_in_one_batch_what_it_writes_alone(kind: str, ends: bool) -> None:
    """And without a cache; rows of unequal length, that end early or not, beside the base and a stack."""
    from laws.variants import attached, bamboo

    model = bamboo(kind, "lm")
    for name in METHODS:
        attached(model, name)
    if ends:
        model.generation_config.eos_token_id = ENDS
    prompts = prompts_of(LENGTHS[:3])
    entries: list[Entry] = [*METHODS, None, ("lora", "prompt_tuning")]
    data = {"task_ids": 0}
    found = all_of(model, dict.fromkeys(entries, prompts), Decoding(max_new_tokens=8), context=[data] * 3)
    assert len(found) == 3 * len(entries)
    for (_, row), written in found.items():
        assert_greedy(model, written, prompts[row], 8, **data)
    assert {each.end for each in found.values()} == ({"end", "length"} if ends else {"length"}) or not ends
    base = [found[None, row].tokens for row in range(3)]
    same = [entry for entry in METHODS if [found[entry, row].tokens for row in range(3)] == base]
    assert len(same) < 2 * len(METHODS) / 3, same


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_rows_of_any_batch(batch_size: int) -> None:
    model, prompts = few(), prompts_of()
    found = all_of(model, dict.fromkeys(EVERYONE, prompts), Decoding(max_new_tokens=12), batch_size=batch_size)
    for (_, row), written in found.items():
        assert_greedy(model, written, prompts[row], 12)
    assert {each.end for each in found.values()} == {"end", "length"}


ROWS = st.lists(st.integers(1, 12), min_size=1, max_size=4)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.dictionaries(st.sampled_from(EVERYONE), ROWS, min_size=1, max_size=5),
    seed=st.integers(0, 1000),
    most=st.integers(1, 16),
    batch_size=st.integers(1, 5),
)
def test_any_prompts_of_any_entries(rows: dict[Entry, list[int]], seed: int, most: int, batch_size: int) -> None:
    """Each entry with prompts of its own, and as many as it likes; results in the order of the rows."""
    model = few()
    prompts = {entry: prompts_of(lengths, seed + at) for at, (entry, lengths) in enumerate(rows.items())}
    settings_ = Decoding(max_new_tokens=most)
    found = list(decode(model, prompts, settings_, 0, batch_size=batch_size))
    order = [(row, entry) for row in range(4) for entry, some in prompts.items() if row < len(some)]
    assert [(each.row, each.entry) for each in found] == order
    for each in found:
        assert_greedy(model, each, prompts[each.entry][each.row], most)


def test_what_an_encoder_reads_begins_in_its_first_column() -> None:
    """BART counts columns: a row that is padded in front would be read elsewhere."""
    model = adapted("bart", ENDS, lora=tz.LoRA(r=2), prompt=tz.PromptTuning(num_virtual_tokens=3), ia3=tz.IA3())
    prompts = prompts_of()
    found = all_of(model, dict.fromkeys(["lora", None, "prompt", "ia3"], prompts), Decoding(max_new_tokens=6))
    for (_, row), written in found.items():
        assert_greedy(model, written, prompts[row], 6)


CALL = [7, 9]


def test_what_depends_on_where_a_text_began() -> None:
    """Methods whose layers remember the prompt go on from a cache with fewer rows as from their own."""
    alora = {"r": 2, "alora_invocation_tokens": CALL}
    model = adapted(
        "llama",
        ENDS,
        alora=tz.LoRA(**alora),
        xlora=METHODS["xlora"].from_settings({"adapters": ["lora-a", "lora-b"]}),
        other=tz.LoRA(**{**alora, "alora_invocation_tokens": [11]}),
        suffix=tz.ReFT(r=2, prefix_positions=1, suffix_positions=2),
        prompt=tz.PromptTuning(num_virtual_tokens=3),
    )
    entries: list[Entry] = ["alora", "xlora", "other", "suffix", "prompt", None, ("prompt", "alora")]
    prompts = [[*prompt[:2], *CALL, *prompt[2:], 11][: 4 + at] for at, prompt in enumerate(prompts_of((9,) * 5))]
    for order in (entries, entries[::-1]):
        found = all_of(model, dict.fromkeys(order, prompts), Decoding(max_new_tokens=12))
        assert {each.end for each in found.values()} == {"end", "length"}
        for (entry, row), written in found.items():
            if entry != "suffix":  # what is generated is not edited as an end of a text
                assert_greedy(model, written, prompts[row], 12)
                continue
            ids = torch.tensor([prompts[row]])
            with tz.route(model, [entry]):
                alone = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
            assert [t for t in alone.tolist() if t not in ENDS][: len(written.tokens)] == written.tokens


def test_adapters_read_data_of_their_rows() -> None:
    model = adapted("llama", ENDS, poly=tz.Poly(r=2, n_skills=3, n_tasks=3), lora=tz.LoRA(r=2))
    with torch.no_grad():
        for _, parameter in manager_of(model).get("poly").trained():
            parameter.mul_(5)
    prompts, data = [prompts_of((5,))[0]] * 6, [{"task_ids": row % 3} for row in range(6)]
    found = all_of(model, dict.fromkeys(["poly", "lora", None], prompts), Decoding(max_new_tokens=12), context=data)
    for (_, row), written in found.items():
        assert_greedy(model, written, prompts[row], 12, **data[row])
    assert len({tuple(found["poly", row].tokens) for row in range(3)}) > 1


@pytest.mark.parametrize("name", ["mistral", "mamba", "qwen3_next", "recurrent_gemma", "rwkv", "qwen3_vl", "bloom"])
def test_other_families(name: str) -> None:
    """Windows, states, what sees padding, images, distances."""
    from bench.zoo import SUBJECTS

    model = next(each for group in SUBJECTS.values() for each in group if each.name == name).build()
    tz.attach(model, tz.PromptTuning(num_virtual_tokens=3), "prompt", seed=0)
    opened(tz.attach(model, tz.LoRA(r=2, target_modules="all-linear"), "lora", seed=0))
    model.generation_config.eos_token_id = ENDS
    prompts = prompts_of((3, 7, 5), most=60)
    found = list(decode(model, dict.fromkeys(["prompt", "lora", None], prompts), Decoding(max_new_tokens=6), 0))
    for each in found:
        ids = torch.tensor([prompts[each.row]])
        with tz.route(model, [each.entry]):
            mask = torch.ones_like(ids)
            alone = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=False)
        tokens = alone[0, ids.shape[1] :].tolist()
        assert tokens[: len(each.tokens)] == each.tokens
        assert each.end == "length" or tokens[len(each.tokens)] in ENDS


# -- rows that ended


def passes_of(model: PreTrainedModel, run: Any) -> list[int]:
    """Rows of each pass."""
    rows: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        rows.append(len(kwargs["input_ids"]))

    hook = entrance_of(Base.of(model)).register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    try:
        run()
    finally:
        hook.remove()
    return rows


@pytest.mark.parametrize(
    "entries", [["lora", "ia3", None], ["long", "lora", None], ["lora", "long", "short", "prefix"]]
)
def test_rows_that_ended_leave_the_batch(entries: list[Entry]) -> None:
    """No pass has more than twice the rows that are still written, but for one that keeps the widest prompt's place."""
    model, prompts = few(), prompts_of((4,) * 16)
    found: dict[tuple[Entry, int], Written] = {}
    options = {"batch_size": 16}
    rows = passes_of(
        model,
        lambda: found.update(all_of(model, dict.fromkeys(entries, prompts), Decoding(max_new_tokens=40), **options)),
    )
    taken = [len(each.tokens) + (each.end == "end") for each in found.values()]
    assert len(rows) == max(taken)
    for step, count in enumerate(rows):
        assert count <= 2 * sum(each > step for each in taken) + 1
    assert rows[0] == len(taken) and rows[-1] < len(taken) / 2


def test_texts_are_told_as_they_are_written() -> None:
    model, prompts = few(), prompts_of()
    told: dict[tuple[Entry, int], list[int]] = {}
    at_once: list[int] = []

    def on_token(entry: Entry, row: int, token: int) -> None:
        told.setdefault((entry, row), []).append(token)

    results = decode(model, {"lora": prompts, None: prompts}, Decoding(max_new_tokens=9), 0, on_token=on_token)
    assert not told
    for each in results:
        at_once.append(len(told))
        assert told.get((each.entry, each.row), []) == each.tokens
    assert at_once[0] > 0


def test_first_results_come_before_the_last_rows_are_written() -> None:
    model, prompts = few(), prompts_of((3,) * 70)
    count = Counter[Entry]()
    results = decode(
        model, {"lora": prompts}, Decoding(max_new_tokens=2), 0, on_token=lambda entry, *_: count.update([entry])
    )
    next(results)
    early = count["lora"]
    rest = list(results)
    assert early < count["lora"] and len(rest) == 69


# -- where texts end


def characters(**options: Any) -> PreTrainedTokenizerFast:
    """A token a character, and a few of several."""
    words = ["<pad>", "<s>", "</s>", *(chr(33 + at) for at in range(VOCAB - 6)), "ab", "\n", "é#"]
    core = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<pad>"))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", **options)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000), length=st.integers(1, 3), start=st.integers(0, 10))
def test_a_text_ends_before_a_stop_string(seed: int, length: int, start: int) -> None:
    """A string that the text has, wherever tokens begin and end: the text is what stands before it first."""
    model, tokenizer, prompts = few(False), characters(), prompts_of((3, 5), seed)
    free = all_of(model, {"lora": prompts, None: prompts}, Decoding(max_new_tokens=14), tokenizer=tokenizer)
    whole = free["lora", 0].text(tokenizer)
    stop = whole[start : start + length] or "never"
    settings_ = Decoding(max_new_tokens=14, stop=(stop, "also never"))
    found = all_of(model, {"lora": prompts, None: prompts}, settings_, tokenizer=tokenizer)
    for key, each in found.items():
        full = free[key].text(tokenizer)
        assert each.text(tokenizer, settings_.stop) == full.partition(stop)[0]
        assert (each.end == "stop") == (stop in full)
        assert each.tokens == free[key].tokens[: len(each.tokens)]
        assert each.end != "stop" or stop not in tokenizer.decode(each.tokens[:-1], skip_special_tokens=True)


def test_a_tokenizers_own_end_ends_a_text() -> None:
    model, prompts = few(False), prompts_of((3,))
    free = all_of(model, {None: prompts}, Decoding(max_new_tokens=9))[None, 0]
    tokenizer = characters()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(free.tokens[4])
    found = all_of(model, {None: prompts}, Decoding(max_new_tokens=9), tokenizer=tokenizer)[None, 0]
    first = free.tokens.index(free.tokens[4])
    assert (found.tokens, found.end) == (free.tokens[:first], "end")


def test_of_a_checkpoints_settings_special_tokens_alone_are_used() -> None:
    prompts, settings_ = prompts_of((3, 5)), Decoding(max_new_tokens=9)
    model = adapted("llama", ENDS, lora=tz.LoRA(r=2))
    expected = all_of(model, {"lora": prompts, None: prompts}, settings_)
    asked = {"do_sample": True, "temperature": 3.0, "top_k": 2, "num_beams": 3, "repetition_penalty": 4.0}
    asked |= {
        "min_length": 20,
        "min_new_tokens": 9,
        "no_repeat_ngram_size": 1,
        "max_length": 4,
        "max_new_tokens": 2,
        "output_scores": True,
    }
    for key, value in asked.items():
        setattr(model.generation_config, key, value)
    assert all_of(model, {"lora": prompts, None: prompts}, settings_) == expected
    model.generation_config.suppress_tokens = [expected[None, 0].tokens[0]]
    assert all_of(model, {None: prompts}, settings_)[None, 0].tokens[0] != expected[None, 0].tokens[0]


# -- draws


@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 2**40), temperature=st.floats(0.3, 3), top_p=st.sampled_from([None, 0.6, 1.0]))
def test_a_rows_draws_are_its_own(seed: int, temperature: float, top_p: float | None) -> None:
    """Whatever stands beside it, in whatever batch, and where rows come in parts."""
    model, prompts = few(), prompts_of()
    settings_ = Decoding(max_new_tokens=6, temperature=temperature, top_p=top_p, seed=seed)
    together = all_of(model, dict.fromkeys(["lora", None, "long"], prompts), settings_, batch_size=5)
    alone = {
        (entry, row): all_of(model, {entry: [prompts[row]]}, settings_, numbers=[row])[entry, 0].tokens
        for entry in ("lora", None, "long")
        for row in range(len(prompts))
    }
    assert {key: each.tokens for key, each in together.items()} == alone


def test_draws_are_as_likely_as_they_should_be() -> None:
    """Of first tokens, against the softmax of scores; a share is off by 4 of its standard errors once in 16,000."""
    model, n = few(False), 1500
    prompt = prompts_of((4,))[0]
    logits = scores(model, "lora", prompt, [], {})[0].double()
    cases: list[tuple[dict[str, Any], Tensor]] = [({}, logits)]
    cases.append(({"top_k": 3}, logits.masked_fill(logits < logits.topk(3).values[-1], -math.inf)))
    for options, kept in cases:
        settings_ = Decoding(max_new_tokens=1, temperature=2.0, **options)
        found = all_of(model, {"lora": [prompt] * n}, settings_, batch_size=500)
        counts = Counter(each.tokens[0] if each.tokens else -1 for each in found.values())
        for token, share in enumerate((kept / 2).softmax(-1).tolist()):
            if token not in ends_of(model):
                assert abs(counts[token] - n * share) <= 4 * math.sqrt(n * share * (1 - share)) + 1, token


def test_seeds_and_narrow_draws() -> None:
    model, prompts = few(), prompts_of()

    def texts(**options: Any) -> list[list[int]]:
        return [
            each.tokens for each in all_of(model, {"lora": prompts}, Decoding(max_new_tokens=8, **options)).values()
        ]

    greedy = texts()
    assert texts(temperature=1.0, top_k=1) == texts(temperature=1.0, top_p=1e-6) == texts(temperature=1e-4) == greedy
    assert texts(temperature=2.0, seed=1) == texts(temperature=2.0, seed=1) != texts(temperature=2.0, seed=2)
    state = torch.get_rng_state()
    texts(temperature=2.0)
    assert torch.equal(torch.get_rng_state(), state)


# -- around it


def test_the_model_is_the_callers_again() -> None:
    """Between two results gradients and the route are as they were, and in the end nothing is left behind."""
    model, prompts = (
        adapted("llama", ENDS, lora=tz.LoRA(r=2), prompt=tz.PromptTuning(num_virtual_tokens=2)),
        prompts_of(),
    )
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        bare = model(ids).logits
    tz.activate(model, "lora")
    before = model(ids).logits
    for _ in decode(model, {"prompt": prompts, None: prompts}, Decoding(max_new_tokens=3), 0):
        assert torch.is_grad_enabled() and torch.equal(model(ids).logits, before)
    tz.detach(model)
    assert torch.equal(model(ids).logits, bare)


def test_a_model_without_adapters_writes_too() -> None:
    model, prompts = tiny("llama", "lm"), prompts_of()
    for (_, row), written in all_of(model, {None: prompts}, Decoding(max_new_tokens=6)).items():
        assert_greedy(model, written, prompts[row], 6)


def test_who_has_no_room_beside_others_has_a_batch_alone() -> None:
    """GPT-2 has 128 positions. A short prompt may have many virtual tokens, and a long one few."""
    model = adapted("gpt2", (), many=tz.PromptTuning(num_virtual_tokens=60), lora=tz.LoRA(r=2))
    prompts = {"many": prompts_of((4, 58)), "lora": prompts_of((118, 5))}
    assert "beside" not in str(all_of(model, prompts, Decoding(max_new_tokens=10)))
    for (entry, row), written in all_of(model, prompts, Decoding(max_new_tokens=10)).items():
        assert_greedy(model, written, prompts[str(entry)][row], 10)


BAD: list[tuple[Any, dict[str, Any], str]] = [
    ({}, {}, "there is nobody to write; expected prompts of at least one adapter, or of None, the base"),
    ({"lora": []}, {}, "adapter 'lora' has no prompts; expected at least one"),
    ({"lora": [[5], []]}, {}, "adapter 'lora': the prompt of row 2 has no tokens; expected at least one"),
    ({None: [[5, 128]]}, {}, "the base: the prompt of row 1 has token number 128, and the model knows 128 tokens"),
    ({None: [[5, -100]]}, {"numbers": [6]}, "the prompt of row 7 has token number -100"),
    ({"laro": [[5]]}, {}, "laro"),
    ({"lora": [[5] * 125]}, {}, "row 1 has 125 tokens, and with 4 new ones more than the model's 128 positions; "),
    ({"lora": [[5] * 125]}, {}, "max_new_tokens may be 3 at most"),
    ({"long": [[5] * 120]}, {}, "has 120 tokens and 5 virtual ones, and with 4 new ones more than .* may be 3 at most"),
    ({"prefix": [[5] * 122]}, {}, "has 122 tokens and 3 virtual ones, .* may be 3 at most"),
    ({None: [[5] * 128]}, {}, "positions; shorten it"),
    ({None: [[5]]}, {"batch_size": 0}, "batch_size is 0, expected at least 1"),
    ({None: [[5]] * 2}, {"context": [{"task_ids": 0}]}, "context is of 1 rows, expected one for each of 2"),
]


@pytest.mark.parametrize(("prompts", "options", "message"), BAD)
def test_what_cannot_be_written_is_told_at_once(prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TanzakuError, match=message):
        decode(few(), prompts, Decoding(max_new_tokens=4), 0, **options)


def test_as_much_as_fits_is_written() -> None:
    found = all_of(few(False), {"long": [[5] * 119], "prefix": [[5] * 121]}, Decoding(max_new_tokens=4))
    assert [len(each.tokens) for each in found.values()] == [4, 4]


def test_models_that_write_no_text() -> None:
    for model in (tiny("llama", "cls"), tiny("bert", "lm"), tiny("llama", "base"), tiny("vit", "cls")):
        with pytest.raises(
            TanzakuError, match=f"{type(model).__name__} writes no text; expected a model that AutoModel"
        ):
            decode(model, {None: [[5]]}, Decoding(), 0)
    with pytest.raises(TanzakuError, match="reads input_features and no token ids"):
        decode(tiny("whisper", "lm"), {None: [[5]]}, Decoding(), 0)
    with pytest.raises(TanzakuError, match="no tokenizer was given"):
        decode(few(), {None: [[5]]}, Decoding(stop=("x",)), 0)
    with pytest.raises(TanzakuError, match=r"max_new_tokens is 200, and the model has \d+ positions for them"):
        decode(tiny("bart", "lm"), {None: [[5]]}, Decoding(max_new_tokens=200), 1)
    with pytest.raises(TanzakuError, match=r"the prompt of row 1 has 300 tokens, and the model .* shorten it"):
        decode(tiny("bart", "lm"), {None: [[5] * 300]}, Decoding(), 1)


@torch.no_grad()
def test_scores_that_are_no_numbers_are_told_with_their_row() -> None:
    model = adapted("llama", (), lora=tz.LoRA(r=2), other=tz.LoRA(r=2))
    for _, parameter in manager_of(model).get("lora").trained():
        parameter.fill_(math.nan)
    with pytest.raises(
        NotWritten, match="adapter 'lora': the scores of token 1 of row 5 are nan, expected numbers"
    ) as told:
        list(decode(model, {"other": [[5], [6]], "lora": [[5], [6]]}, Decoding(), 0, numbers=[4, 5]))
    assert (told.value.entry, told.value.row) == ("lora", 0)
    assert len(list(decode(model, {"other": [[5], [6]], None: [[5]]}, Decoding(max_new_tokens=2), 0))) == 3


@pytest.mark.parametrize(
    "asked",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": 0, "temperature": 1.0},
        {"top_p": 0.0, "temperature": 1.0},
        {"top_p": 1.1, "temperature": 1.0},
        {"top_k": 5},
        {"top_p": 0.5},
        {"stop": ("a", "")},
        {"beams": 3},
    ],
)
def test_settings_are_checked(asked: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Decoding(**asked)
