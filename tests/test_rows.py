"""Rows of several adapters at modules whose first dimension is no row, and targets that are of no use."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import tanzaku as tz
from close import GRADIENT, assert_close, close
from models import lively, tiny
from tanzaku.core import survey as survey_module
from tanzaku.core.manager import manager_of
from tanzaku.core.survey import survey
from tanzaku.methods import METHODS
from tanzaku.models.families import Base

_TEXT = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_XLNET = {"vocab_size": 120, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "pad_token_id": 0}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_buckets": 8}
_SWITCH = {
    **{"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
    **{"num_experts": 4, "expert_capacity": 64, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    **{"vocab_size": 120, "decoder_start_token_id": 0},
}
_MAMBA = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}

# What the first dimension is, instead of the row -> (model_type, settings, auto class, targets).
ODD: dict[str, tuple[str, dict[str, Any], Any, Any]] = {
    "tokens": ("xlnet", _XLNET, AutoModelForSequenceClassification, ["layer_1", "layer_2"]),
    "tokens of some layers": (
        "longformer",
        {**_TEXT, "attention_window": [4, 4], "pad_token_id": 1},
        AutoModelForSequenceClassification,
        ["query", "value", "dense"],
    ),
    "a table of positions": ("deberta-v2", {**_TEXT, **_DEBERTA}, AutoModelForSequenceClassification, "all-linear"),
    "tokens of an expert": ("switch_transformers", _SWITCH, AutoModelForSeq2SeqLM, "all-linear"),
    "positions": ("bert", _TEXT, AutoModelForSequenceClassification, ["position_embeddings", "query"]),
}


def made(kind: str, settings: dict[str, Any], auto: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **settings))
    lively(model)
    return model.eval()


def attached(model: nn.Module, targets: Any, names: str = "ab", **options: Any) -> nn.Module:
    """LoRA at these targets under each name, opened."""
    for seed, name in enumerate(names):
        adapter = tz.attach(model, tz.LoRA(r=2, target_modules=targets, **options), name, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, parameter in adapter.trained():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.mark.parametrize("what", ODD)
def test_each_row_gets_its_adapter_whatever_the_first_dimension_is(what: str) -> None:
    """Logits and gradients of rows in a mixed batch are those of the rows alone; lengths are multiples of the rows."""
    kind, settings, auto, targets = ODD[what]
    model = attached(made(kind, settings, auto), targets)
    ids = torch.arange(5, 37).view(4, 8)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)[:, :4]
    entries = ["a", "b", None, "a"]

    def out(route: list[Any], rows: list[int]) -> tuple[Tensor, list[Tensor | None]]:
        with tz.route(model, route):
            logits = (
                model(**{name: x[rows] for name, x in inputs.items()}, use_cache=False).logits
                if ("use_cache" in model.forward.__code__.co_varnames)
                else model(**{name: x[rows] for name, x in inputs.items()}).logits
            )
        own = [p for _, p in manager_of(model).get("a").trained()]
        at = [n for n, entry in enumerate(route) if entry == "a"]
        gradients = torch.autograd.grad(logits[at].pow(2).sum(), own, allow_unused=True) if at else []
        return logits.detach(), [*gradients]

    mixed, gradients = out(entries, [0, 1, 2, 3])
    for entry, rows in (("a", [0, 3]), ("b", [1]), (None, [2])):
        alone, own = out([entry] * len(rows), rows)
        assert_close(mixed[rows], alone)
        if entry == "a":
            for one, other in zip(gradients, own, strict=True):
                assert (one is None) == (other is None)
                if one is not None and other is not None:
                    assert_close(one, other, GRADIENT)
    assert not close(mixed[0], out([None], [0])[0][0])


def test_where_a_table_is_all_that_a_module_reads_the_message_names_it() -> None:
    model = attached(tiny("gpt2", "lm"), ["wpe"])
    ids = torch.arange(5, 13).view(2, 4)
    with (
        tz.route(model, ["a", "b"]),
        pytest.raises(tz.TanzakuError, match=r"transformer\.wpe reads .*route each alone"),
    ):
        model(input_ids=ids)
    with tz.route(model, ["a"]):
        model(input_ids=ids)


def test_what_would_run_once_for_each_adapter_has_no_cache() -> None:
    model = attached(
        made("jetmoe", {**_TEXT, "num_local_experts": 4, "kv_channels": 8}, AutoModelForCausalLM), "all-linear"
    )
    ids = torch.arange(5, 13).view(2, 4)
    with tz.route(model, ["a", "b"]):
        model(input_ids=ids, use_cache=False)


def test_modules_of_no_known_kind_learn_from_what_they_are_given() -> None:
    class First(nn.Module):
        """Tokens first, then rows."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    model = attached(nn.Sequential(First(), nn.Linear(6, 3)), ["inner", "1"])
    x = torch.randn(4, 4, 6)
    with torch.no_grad():
        with tz.route(model, ["a", "b", "b", None]):
            mixed = model(x)
        for row, entry in enumerate(["a", "b", "b", None]):
            with tz.route(model, [entry]):
                assert_close(mixed[row], model(x[row : row + 1])[0])


CHOOSERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "albert": {},
    "electra": {},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
}
CHOICES = [
    (kind, name)
    for kind in CHOOSERS
    for name in ("lora", "prefix_tuning", "llama_adapter")
    if name == "lora" or kind not in ("modernbert", "xlnet")
]


@pytest.mark.parametrize(("kind", "name"), CHOICES)
def test_a_batch_of_choices_is_its_rows_choices(kind: str, name: str) -> None:
    """A layer has a row's choices one after another; in XLNet, behind the tokens."""
    text = {k: v for k, v in _TEXT.items() if kind != "xlnet" or k != "max_position_embeddings"}
    model = AutoModelForMultipleChoice.from_config(AutoConfig.for_model(kind, **text, **CHOOSERS[kind])).eval()
    lively(model)
    settings: dict[str, Any] = {"prefix_tuning": {"num_virtual_tokens": 3}, "llama_adapter": {"adapter_layers": 1}}
    for seed, adapter in enumerate("ab"):
        attached = tz.attach(model, METHODS[name](**settings.get(name, {})), adapter, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for _, parameter in attached.trained():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    ids = torch.arange(5, 35).view(2, 3, 5)
    with torch.no_grad():
        with tz.route(model, ["a", "b"]):
            mixed = model(input_ids=ids).logits
        for row, name in enumerate("ab"):
            with tz.route(model, [name]):
                assert_close(mixed[row], model(input_ids=ids[row : row + 1]).logits[0])


# -- images that have places in the texts

_LM = {**_TEXT, "num_key_value_heads": 2, "max_position_embeddings": 256}
_EYE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def seeing(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "gemma3":
        text = {**_LM, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}
        config = Gemma3Config(
            text_config=text,
            vision_config={**_EYE, "image_size": 32, "patch_size": 8},
            mm_tokens_per_image=4,
            image_token_index=110,
        )
        model = Gemma3ForConditionalGeneration(config)
    elif kind == "llava":
        config = LlavaConfig(
            text_config={"model_type": "llama", **_LM},
            vision_config={"model_type": "clip_vision_model", **_EYE, "image_size": 16, "patch_size": 8},
            image_token_index=110,
            vision_feature_layer=-1,
        )
        model = LlavaForConditionalGeneration(config)
    else:
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        eye = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4}
        eye |= {"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
        tokens = {
            "image_token_id": 110,
            "video_token_id": 111,
            "vision_start_token_id": 112,
            "vision_end_token_id": 113,
        }
        config = Qwen2_5_VLConfig(text_config={**_LM, "rope_parameters": rope}, vision_config=eye, **tokens)
        model = Qwen2_5_VLForConditionalGeneration(config)
    lively(model)
    return model.eval()


def looked_at(kind: str, rows: list[list[tuple[int, int]]]) -> dict[str, Tensor]:
    """Rows with images of so many patches; where images are of one size, each has four places."""
    ids, pixels, grids = [], [], []
    generator = torch.Generator().manual_seed(len(rows[0]))
    for number, images in enumerate(rows):
        row = [5 + number]
        for height, width in images:
            if kind == "qwen":
                row += [112, *[110] * (height * width // 4), 113]
                pixels.append(torch.randn(height * width, 96, generator=generator))
                grids.append([1, height, width])
            else:
                side = 32 if kind == "gemma3" else 16
                row += [110] * 4
                pixels.append(torch.randn(1, 3, side, side, generator=generator))
        ids.append([*row, 8, 9 + number])
    width = max(map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    out = {"input_ids": padded, "attention_mask": (padded != 0).long()}
    if pixels:
        out["pixel_values"] = torch.cat(pixels)
    if grids:
        out["image_grid_thw"] = torch.tensor(grids)
    if kind == "gemma3":
        out["token_type_ids"] = (padded == 110).long()
    if kind == "qwen":
        out["mm_token_type_ids"] = (padded == 110).int()
    return out


@pytest.mark.parametrize("kind", ["gemma3", "llava", "qwen"])
@pytest.mark.parametrize("rows", [[[(8, 4), (4, 4)], []], [[], [(4, 8)]], [[(4, 4)], [(4, 8), (4, 4)]]], ids=str)
def test_an_image_goes_to_the_adapter_of_the_row_that_has_its_place(kind: str, rows: list[Any]) -> None:
    """Towers and projectors read images, in another number than the rows, and of unequal size."""
    model = attached(seeing(kind), "all-linear")
    inputs = looked_at(kind, rows)
    images = [(h * w if kind == "qwen" else 1) for row in rows for h, w in row]
    with torch.no_grad():
        with tz.route(model, ["a", "b"]):
            mixed = model(**inputs).logits
        start, first = 0, 0
        for row, name in enumerate("ab"):
            own = {key: x[row : row + 1] for key, x in inputs.items() if key not in ("pixel_values", "image_grid_thw")}
            length = int(own["attention_mask"].sum())
            own = {key: x[:, :length] for key, x in own.items()}
            number = len(rows[row])
            parts = sum(images[first : first + number])
            if number:
                own["pixel_values"] = inputs["pixel_values"][start : start + parts]
                if "image_grid_thw" in inputs:
                    own["image_grid_thw"] = inputs["image_grid_thw"][first : first + number]
            start, first = start + parts, first + number
            with tz.route(model, [name]):
                # Two models one after another.
                assert_close(mixed[row, :length], model(**own).logits[0], GRADIENT)


def test_images_whose_rows_are_not_known_are_refused_but_for_one_adapter() -> None:
    model = attached(seeing("llava"), "all-linear")
    inputs = looked_at("llava", [[(4, 4)], [(4, 4)]])
    embeds = {
        "inputs_embeds": model.get_input_embeddings()(inputs.pop("input_ids")),
        "pixel_values": inputs["pixel_values"],
    }
    embeds["inputs_embeds"][:, 1:5] = model.get_input_embeddings().weight[110]
    with tz.route(model, ["a", "b"]), pytest.raises(tz.TanzakuError, match="images of several rows"):
        model(**embeds)
    with tz.route(model, ["a"]):
        model(**embeds)


# -- targets that are of no use


def siglip() -> PreTrainedModel:
    model = SiglipVisionModel(SiglipVisionConfig(**_EYE, image_size=16, patch_size=8)).eval()
    lively(model)
    return model


NEVER = {
    "out_proj of nn.MultiheadAttention": (siglip, "out_proj", "pixel_values"),
    "dt_proj of Mamba": (lambda: made("mamba", _MAMBA, AutoModelForCausalLM), "dt_proj", "input_ids"),
    "dt_proj of FalconMamba": (lambda: made("falcon_mamba", _MAMBA, AutoModelForCausalLM), "dt_proj", "input_ids"),
}


@pytest.mark.parametrize("what", NEVER)
def test_a_module_that_never_runs_is_left_out_of_all_linear(what: str) -> None:
    """Every trained parameter has a gradient, and merged equals unmerged, before any pass, too."""
    make, name, key = NEVER[what]
    model = make()
    x = torch.randn(2, 3, 16, 16) if key == "pixel_values" else torch.arange(5, 21).view(2, 8)
    early = attached(copy.deepcopy(model), "all-linear", "a")
    attached(model, "all-linear", "a")
    adapter = manager_of(model).get("a")
    assert not any(path.endswith(f"head.attention.{name}" if name == "out_proj" else name) for path in adapter.paths)

    def out(model: Any) -> Tensor:
        result = model(**{key: x})
        return result.logits if "logits" in result else result.pooler_output

    with tz.route(model, ["a", "a"]):
        expected = out(model)
    expected.pow(2).sum().backward()
    assert [name for name, p in adapter.trained() if p.grad is None] == []
    tz.merge(early, "a")
    assert_close(out(early), expected)


def test_who_names_a_module_that_never_runs_is_told() -> None:
    model = made("mamba", _MAMBA, AutoModelForCausalLM)
    with pytest.raises(tz.TanzakuError, match="MambaMixer never runs its dt_proj"):
        tz.attach(model, tz.LoRA(r=2, target_modules=["dt_proj"]), "a")
    assert tz.adapters(model) == []
    with pytest.warns(UserWarning, match="MambaMixer never runs its dt_proj"):
        adapter = tz.attach(model, tz.LoRA(r=2, target_modules=["dt_proj", "in_proj"]), "a")
    assert all(path.endswith("in_proj") for path in adapter.paths)
    assert tz.count(model, "a").trainable == sum(p.numel() for _, p in adapter.trained())


def test_pefts_file_with_tensors_of_a_module_that_never_runs(tmp_path: Path) -> None:
    """PEFT attaches adapters there, too, to no effect."""
    import peft

    model = made("falcon_mamba", _MAMBA, AutoModelForCausalLM)
    base, ids = copy.deepcopy(model), torch.arange(5, 13).view(1, 8)
    config = peft.LoraConfig(r=2, target_modules=["dt_proj", "in_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="never runs its dt_proj"):
        tz.load(base, tmp_path, "a")
    with torch.no_grad(), tz.route(base, ["a"]):
        assert_close(base(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_on_the_meta_device_the_same_is_left_out() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **_MAMBA))
    adapter = tz.attach(model, tz.LoRA(r=2, target_modules="all-linear"), "a")
    assert not any("dt_proj" in path for path in adapter.paths)


def test_a_router_that_returns_scores_is_no_target() -> None:
    moe = {**_TEXT, "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    model = made("phimoe", moe, AutoModelForCausalLM)
    with pytest.raises(tz.TanzakuError, match="PhimoeTopKRouter returns more than the product with its weight"):
        tz.attach(model, tz.LoRA(r=2, target_modules=["router", "q_proj"]), "a")
    attached(model, "all-linear", "a")
    assert not any("router" in path for path in manager_of(model).get("a").paths)
    with torch.no_grad():
        ids = torch.arange(5, 13).view(2, 4)
        with tz.route(model, ["a"]):
            expected = model(input_ids=ids).logits
        tz.merge(model, "a")
        assert_close(model(input_ids=ids).logits, expected)


def test_a_linear_layer_in_other_words_stays_a_target() -> None:
    """Falcon's linear layers have a forward() of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = attached(made("falcon", _TEXT, AutoModelForCausalLM), ["query_key_value"], "a")
    assert len(manager_of(model).get("a").paths) == 2


@pytest.mark.parametrize("kind", ["opt", "bart"])
def test_positions_that_a_model_looks_up_for_itself(kind: str) -> None:
    """From a mask, or the text's length alone: A is looked up as the table is, and merging gives the same."""
    model = attached(tiny(kind, "lm"), ["embed_positions"])
    ids = torch.arange(5, 21).view(2, 8)
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3])}
    with torch.no_grad():
        base = model(**inputs).logits
        with tz.route(model, ["a"]):
            expected = model(**inputs).logits
        assert not close(expected, base)
        tz.merge(model, "a")
        assert_close(model(**inputs).logits, expected)


def test_tuples_and_named_arguments_are_changed_in_place() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, *, x: Tensor, flag: bool = True) -> tuple[str, tuple[Tensor, int]]:
            return "kept", (self.inner(x), 3)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            text, (y, number) = self.pair(x=x, flag=False)
            assert (text, number) == ("kept", 3)
            return y

    from tanzaku.core.in_force import InForce
    from tanzaku.core.method import ModuleLayer

    class Double(ModuleLayer):
        edits_input = True

        def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
            return 2 * x

        def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return y + 1

    model = Whole()
    tz.attach(model, tz.LoRA(r=1, target_modules=["inner"]), "a")
    manager, x = manager_of(model), torch.randn(2, 4)
    from tanzaku.core.routing import Route

    force = InForce(manager.base, Route.everywhere("a"), [[("pair", Double())]])
    manager.sites.ensure(force)
    manager.sites.put((force,))
    assert_close(model(x), model.pair.inner(2 * x) + 1)
    manager.sites.put(None)


# -- the survey


def test_a_survey_leaves_a_model_as_it_was() -> None:
    """Weights, modes, random state and hooks, also of a model in training."""
    model = tiny("bert").train()
    model.bert.encoder.layer[0].eval()
    modes = [m.training for m in model.modules()]
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    seen = survey(Base.of(model))
    assert seen.at("bert.encoder.layer.1.attention.self.query")
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert survey(Base.of(model)) is seen


def test_choices_that_did_not_change_are_the_rows_own() -> None:
    """Experts may be the same ones for another text, and are its tokens' all the same; a table is everyone's."""
    x, chosen, table = torch.randn(5 * 4, 3), torch.ones(5 * 4, 2, dtype=torch.long), torch.randn(7, 3)
    other = x.clone()
    other[4:8] += 1  # the tokens of row 1
    axes = _axes(*({"x": each, "chosen": chosen, "table": table} for each in (x, other)))
    assert [(axes[(name,)].dim, axes[(name,)].share) for name in ("x", "chosen")] == [(0, 4)] * 2
    assert axes[("table",)].dim is None


def _axes(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[Any, Any]:
    return survey_module._axes(*map(survey_module._sketches, (one, other)), survey_module.Row(1, 5))
