"""Context-aware prompt tuning: where it starts, how far tokens move, and what is learnt of the context's answers."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import tanzaku as tz
from close import GRADIENT, assert_close
from interop.oracle import loss_of, scatter, whole_rows
from models import tiny

IDS, TYPES = [5, 9, 11, 7, 8, 6, 13, 14, 10], [1, 2, 3, 4, 4, 6, 7, 8, 0]
CONTEXT = {"cpt_token_ids": IDS, "cpt_tokens_type_mask": TYPES}
STAYS = torch.tensor([kind % 4 == 0 for kind in TYPES])


def moved(adapter):
    """How far each token is from where it started."""
    layer = dict(adapter.at())[""]
    return (layer.vectors() - layer.embedding.weight).detach().norm(dim=1)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
@torch.no_grad()
def test_it_starts_as_the_context_in_front_of_each_row(kind):
    model = tiny(kind, "lm")
    ids = whole_rows(model)["input_ids"]
    expected = model(input_ids=torch.cat([torch.tensor([IDS]).expand(len(ids), -1), ids], 1)).logits[:, len(IDS) :]
    tz.attach(model, tz.CPT(**CONTEXT), "a", seed=0)
    with tz.route(model, ["a"] * len(ids)):
        assert_close(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("head", ["lm", "cls"])
def test_training_stays_in_the_balls(head):
    model = tiny("llama", head)
    given = whole_rows(model)
    settings = {"opt_projection_epsilon": 0.8, "opt_projection_format_epsilon": 0.3, "modules_to_save": []}
    adapter = tz.attach(model, tz.CPT(**CONTEXT, **settings), "a", seed=0)
    share = math.sqrt(32 / 2048)
    radius = torch.tensor([{1: 0.3, 2: 0.8, 3: 0.3}.get(kind % 4, 0) * share for kind in TYPES])
    assert not moved(adapter).any()
    ((_, parameter),) = adapter.trained()
    optimizer = torch.optim.AdamW([parameter], lr=0.05)
    tz.activate(model, "a")
    for step in range(1, 5):
        loss = loss_of(model, given)
        loss = loss if head == "cls" else loss + adapter.method.penalty(adapter)
        loss.backward()
        assert (parameter.grad.abs().sum(1) == 0).tolist() == STAYS.tolist()
        optimizer.step()
        adapter.method.after_step(adapter, step)
        optimizer.zero_grad()
        assert_close(parameter.detach().norm(dim=1), radius)  # a step is longer than a ball is wide
    assert_close(moved(adapter), radius)


def test_a_move_beyond_its_ball_counts_as_the_nearest_within():
    """Its gradient, too, is the one there, as projected gradient descent has it; a trainer that calls no after_step
    computes no other thing."""
    model = tiny("llama", "lm")
    given = whole_rows(model)
    adapter = tz.attach(model, tz.CPT(**CONTEXT), "a", seed=0)
    ((_, parameter),) = adapter.trained()
    scatter([parameter])
    tz.activate(model, "a")
    found = []
    for _ in range(2):
        loss = loss_of(model, given)
        found.append((loss, torch.autograd.grad(loss, parameter)[0], parameter.detach().norm(dim=1).max()))
        adapter.method.after_step(adapter, 1)
    assert found[0][2] > 10 * found[1][2]
    assert_close(found[1][0], found[0][0])
    assert_close(found[1][1], found[0][1], GRADIENT)


@pytest.mark.parametrize("saved", [[], ["lm_head"]])
@pytest.mark.parametrize("active", [None, "a", "other"])
def test_the_answers_are_learnt_as_they_stand_before_every_row(saved, active):
    """By the adapter's own copies of modules, and whatever is active."""
    model = tiny("llama", "lm")
    given = whole_rows(model)["input_ids"]
    settings = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5, "modules_to_save": saved}
    adapter = tz.attach(model, tz.CPT(**CONTEXT, **settings), "a", seed=0)
    other = tz.attach(model, tz.LoRA(r=2), "other", seed=1)
    scatter([p for each in (adapter, other) for _, p in each.trained()])
    layer = next(layer for path, layer in adapter.at() if not path)
    whole = copy.deepcopy(model)
    if saved:
        whole.lm_head.weight.data = next(layer for path, layer in adapter.at() if path).own["weight"].detach()
    rows = torch.cat([layer.vectors().detach().expand(len(given), -1, -1), whole.get_input_embeddings()(given)], 1)
    with torch.no_grad():
        scores = whole(inputs_embeds=rows).logits
    weights = {3: 0.25 / 2, 4: 0.25 / 2, 7: 0.5}  # of two tokens each is half an answer; the last example counts most
    expected = [
        sum(w * F.cross_entropy(row[at - 1], torch.tensor(IDS[at])) for at, w in weights.items()) for row in scores
    ]
    tz.activate(model, active)
    penalty = adapter.method.penalty(adapter)
    assert penalty.requires_grad
    for each in expected:
        assert_close(penalty.detach(), each)
    with tz.route(model, ["other"] * 3 + [None]):
        assert_close(adapter.method.penalty(adapter).detach(), penalty.detach())


@pytest.mark.parametrize(
    ("kind", "head", "settings"),
    [
        ("llama", "cls", {}),
        ("llama", "base", {}),
        ("t5", "lm", {}),
        ("bart", "lm", {}),
        ("bert", "cls", {}),
        ("llama", "lm", {"cpt_tokens_type_mask": None}),
        ("llama", "lm", {"cpt_tokens_type_mask": [4, 1, 2, 3, 5, 6, 7, 1, 1]}),  # nothing foretells the first token
        ("llama", "lm", {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.0}),
    ],
)
def test_where_no_answer_is_learnt(kind, head, settings):
    model = tiny(kind, head)
    adapter = tz.attach(model, tz.CPT(**{**CONTEXT, **settings}), "a", seed=0)
    assert adapter.method.penalty(adapter) is None


def test_training_goes_on_from_a_file(tmp_path):
    model = tiny("llama", "lm")
    adapter = tz.attach(model, tz.CPT(**CONTEXT), "a", seed=0)
    scatter([p for _, p in adapter.trained()])
    tz.save(model, "a", tmp_path)
    again = tz.load(model, tmp_path, "b")
    layer, before = dict(again.at())[""], dict(adapter.at())[""]
    assert_close(layer.vectors(), before.vectors())
    assert [name for name, _ in again.trained()] == ["delta_embedding.weight"] and not moved(again).any()
    scatter([p for _, p in again.trained()])
    assert_close(moved(again), moved(adapter))  # the balls are as wide as they were


class Letters:
    """A tokenizer of letters, which begins a text with a token of its own if it is let."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}


def test_examples_are_read_text_by_text():
    method = tz.CPT.from_examples([("P:", "ab", "=", "x"), ["", "c", "=", "yz"]], Letters(), opt_projection_epsilon=0.5)
    assert "".join(map(chr, method.cpt_token_ids)) == "P:ab=xc=yz"
    assert method.cpt_tokens_type_mask == [1, 1, 2, 2, 3, 4, 6, 7, 8, 8]
    assert method.cpt_mask == [1] * 10 and method.num_virtual_tokens == 10 and method.opt_projection_epsilon == 0.5
    for wrong in (("P:", "ab", "x"), "P:ab"):
        with pytest.raises(tz.TanzakuError, match=r"cpt: found example .*, expected four texts"):
            tz.CPT.from_examples([wrong], Letters())


WRONG = {
    "nothing": (
        {"cpt_token_ids": None, "cpt_tokens_type_mask": None},
        "no cpt_token_ids, expected the tokens of a con",
    ),
    "an id": ({"cpt_token_ids": [*IDS[:-1], 100_000]}, "cpt_token_ids from 5 to 100000, expected 0 to"),
    "a number": ({"num_virtual_tokens": 4}, "num_virtual_tokens=4 with 9 cpt_token_ids, expected 9, or none said"),
    "lengths": ({"cpt_tokens_type_mask": [1, 2]}, "2 numbers in cpt_tokens_type_mask, expected 9, one for each"),
    "a type": ({"cpt_tokens_type_mask": [*TYPES[:-1], -3]}, "-3 in cpt_tokens_type_mask, expected 0 or more"),
    "a radius": ({"opt_projection_epsilon": -0.1}, "opt_projection_epsilon=-0.1, expected 0 or more"),
    "no move": (
        {"cpt_tokens_type_mask": [4] * 9},
        "a context of which no token may move, expected tokens of types 1 to",
    ),
    "a weighting": ({"opt_weighted_loss_type": "linear"}, "opt_weighted_loss_type is 'linear'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_settings_are_one_clear_line(name):
    settings, message = WRONG[name]
    with pytest.raises(tz.TanzakuError, match=message) as caught:
        tz.attach(tiny("llama", "lm"), tz.CPT(**{**CONTEXT, **settings}), "a")
    assert "\n" not in str(caught.value)
