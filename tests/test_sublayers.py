"""Sublayers: attention and feed-forward are found with the residual stream around them, by what one pass does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from close import assert_close, close
from models import KINDS, batch, tiny
from tanzaku.errors import TanzakuError
from tanzaku.models.families import Base, Sublayer

_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def of_type(kind: str, **settings: object) -> PreTrainedModel:
    model = AutoModel.from_config(AutoConfig.for_model(kind, **{**_SMALL, **settings}))
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def sublayers(model: nn.Module) -> list[Sublayer]:
    return Base.of(model).sublayers()


# Kind -> the sublayers of one layer of its last stack.
POST = {"bert", "roberta", "deberta-v2", "bart"}
SIDE_BY_SIDE = {"phi", "gpt_neox"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_family(kind: str) -> None:
    model = tiny(kind, "base")
    found = sublayers(model)
    stacks = 2 if Base.of(model).encoder_decoder or kind == "clip" else 1
    assert [each.number for each in found] == sorted(each.number for each in found)
    assert {each.number for each in found} == set(range(2 * stacks))
    kinds = [each.kind for each in found if each.number == 2 * stacks - 1]
    assert kinds == ["attention", *(["cross"] if Base.of(model).encoder_decoder else []), "feed_forward"]
    for each in found:
        assert (each.norm is not None) == (kind in POST), each
        if kind in SIDE_BY_SIDE and each.kind == "feed_forward":
            assert each.residual is None, each
        else:
            assert each.residual is not None, each
        if each.kind == "feed_forward" and kind not in POST:
            assert each.end is not None, each


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("clip", "whisper")])
def test_the_sum_is_what_was_read_and_what_was_returned(kind: str) -> None:
    """With real weights: r, met at one module, and h, returned by another, add up to what the third has before it."""
    model, seen = tiny(kind, "base"), {}

    def noted(path: str, module: nn.Module):
        def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
            seen.setdefault(("read", path), x)

        def after(_: nn.Module, args: tuple, output: object) -> None:
            seen.setdefault(("returned", path), output if isinstance(output, torch.Tensor) else output[0])

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)

    found = sublayers(model)
    for path, module in model.named_modules():
        if path and path != "":
            noted(path, module)
    with torch.no_grad():
        model(**batch(model))
    checked = 0
    for each in found:
        where = ("read", each.norm) if each.norm else ("returned", each.end)
        if each.residual is None or where[1] is None:
            continue
        r, h, total = seen["read", each.residual], seen["returned", each.out], seen[where]
        if kind == "gemma3":  # a norm of its own stands between h and the sum
            assert not close(total.reshape(r.shape), r)
        else:
            assert_close(r.reshape(total.shape) + h.reshape(total.shape), total)
        checked += 1
    assert checked or kind in SIDE_BY_SIDE


def test_a_norm_that_reads_the_last_sum_does_not_make_a_model_post_ln() -> None:
    """OLMo 2 norms what a sublayer returns, and its last sum is read by the model's own norm alone."""
    found = sublayers(of_type("olmo2", eos_token_id=2))
    assert all(each.norm is None and each.residual for each in found)
    assert [each.end for each in found if each.kind == "feed_forward"] == ["layers.0", "layers.1"]


def test_a_first_layer_without_a_norm_of_its_own() -> None:
    """ModernBERT's first attention reads r itself; the sum goes on, so the norm behind it is the next sublayer's."""
    found = sublayers(
        of_type("modernbert", **dict.fromkeys(("bos_token_id", "eos_token_id"), 1), cls_token_id=1, sep_token_id=2)
    )
    assert found[0].norm is None
    assert found[0].residual == "layers.0.attn.Wqkv"


def test_modules_that_add_to_the_stream_themselves() -> None:
    found = sublayers(of_type("bloom", n_layer=2, n_head=4))
    assert [each.end for each in found[:2]] == ["h.0.self_attention", "h.0.mlp"]


def test_layers_that_are_shared_count_once() -> None:
    found = sublayers(of_type("albert", embedding_size=16))
    assert [(each.kind, each.number, each.norm is not None) for each in found] == [
        ("attention", 0, True),
        ("feed_forward", 0, True),
    ]


def test_a_model_without_any_says_so() -> None:
    with pytest.raises(TanzakuError, match="'mamba' has no attention or feed-forward layer"):
        sublayers(of_type("mamba", state_size=4))
