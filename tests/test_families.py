"""The table of names: each family's defaults match its models, and positions are numbered as the model numbers them."""

import re
from types import SimpleNamespace

import peft
import pytest
import torch
from bench import zoo
from torch import nn
from transformers import AutoModelForCausalLM

import tanzaku as tz
from close import assert_close, close
from models import KINDS, batch, tiny
from tanzaku.core.manager import manager_of
from tanzaku.methods import METHODS
from tanzaku.models.families import Base, table

TEXT = [kind for kind in KINDS if kind not in ("vit", "clip", "whisper")]


def head_of(kind):
    return {"clip": "base", "whisper": "lm"}.get(kind, "cls")


def run(model, entries, **inputs):
    with torch.no_grad(), tz.route(model, entries):
        out = model(**inputs)
    return next(out[key] for key in ("logits", "logits_per_text", "last_hidden_state") if key in out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["lora", "adalora", "ia3"])
def test_default_targets(kind, name):
    """Every family has defaults for these methods, they match, and they change the logits of routed rows alone."""
    model = tiny(kind, head_of(kind))
    adapter = tz.attach(model, METHODS[name](), "x", seed=0)
    inputs = batch(model)
    base = run(model, [None] * 4, **inputs)
    with torch.no_grad():
        for _, parameter in adapter.trained():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    if kind == "clip":  # logits of all pairs: rows are not independent
        assert not close(run(model, ["x"] * 4, **inputs), base)
        return
    mixed = run(model, ["x", None, "x", None], **inputs)
    assert_close(mixed[[1, 3]], base[[1, 3]])
    assert not close(mixed[[0, 2]], base[[0, 2]])


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("clip", "deberta-v2")])
@pytest.mark.parametrize(
    "method",
    [tz.PrefixTuning(num_virtual_tokens=3), tz.LlamaAdapter(adapter_len=3, adapter_layers=1)],
    ids=lambda m: m.name,
)
def test_attention_sites(kind, method):
    """Attention is found and reached in every family whose attention goes through transformers' interface."""
    model = tiny(kind, head_of(kind))
    adapter = tz.attach(model, type(method).from_settings(method.settings()), "x", seed=0)
    with torch.no_grad():
        for _, parameter in adapter.trained():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    inputs = batch(model)
    base = run(model, [None] * 4, **inputs)
    mixed = run(model, ["x", None, "x", None], **inputs)
    assert_close(mixed[[1, 3]], base[[1, 3]])
    assert not close(mixed[[0, 2]], base[[0, 2]])
    assert_close(run(model, ["x"] * 4, **inputs)[[0, 2]], mixed[[0, 2]])


@pytest.mark.parametrize("kind", TEXT)
def test_token_sites(kind):
    """Virtual tokens equal tokens: a prompt of the model's own vectors is that text in front of the row."""
    model = tiny(kind, "lm" if kind in ("t5", "bart") else "cls")
    adapter = tz.attach(model, tz.PromptTuning(num_virtual_tokens=3), "x")
    front = torch.tensor([[7, 8, 9]])
    table_ = model.get_input_embeddings()
    with torch.no_grad():
        dict(adapter.named_parameters())["prompt_embeddings"].copy_(table_(front)[0])
    inputs = batch(model, padding=None)
    whole = torch.cat([front.expand(4, -1), inputs["input_ids"]], 1)
    if kind in ("bert", "roberta", "deberta-v2"):
        # These read the first of the row's own tokens, not the prompt's: compared by what precedes the head.
        with torch.no_grad():
            expected = model.base_model(whole)[0][:, 3:]
            with tz.route(model, ["x"] * 4):
                found = model.base_model(**inputs)[0]
    else:
        expected = run(model, [None] * 4, **{**inputs, "input_ids": whole})
        found = run(model, ["x"] * 4, **inputs)
    assert_close(found, expected)


def test_every_family_is_a_model_type():
    """Keys of the table are names that transformers knows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    for kind in table():
        assert kind in CONFIG_MAPPING_NAMES or kind in CONFIG_MAPPING, kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_and_the_structure_agree(kind):
    """What the table names in a role is what a pass finds in that role."""
    base = Base.of(tiny(kind, head_of(kind)))
    assert base.family is not None and base.structure.ran
    heads = tuple(f"{name}." for name in base.head_names())
    paths = [path for path, _ in base.model.named_modules() if not path.startswith(heads)]
    for role in ("query", "key", "value", "out", "gate", "up", "down"):
        name = getattr(base.family, role)
        found = set(base.structure.roles.get(role, []))
        named = {path for path in paths if name and path.endswith(f".{name}")}
        if role == "down":  # the ends of some encoders' names are those of another role, too, as in HF PEFT
            named -= set(base.structure.roles["out"])
        # A model without its other half has no such layer, and gates are named apart in some families alone.
        assert named == found or (role in ("gate", "up") and named < found), role


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("clip", "deberta-v2")])
def test_attention_is_where_the_table_says(kind):
    """A pass finds the attention modules that the table names, in the order of their layers, with their shapes."""
    base = Base.of(tiny(kind, head_of(kind)))
    named = [layer for layer in base._named_attention() if not base.encoder_decoder or ".decoder." in f".{layer.path}."]
    layers = base.attention_layers()
    assert [layer.path for layer in layers] == [layer.path for layer in named]
    assert {(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in (*layers, *named)} == {
        (named[0].kv_heads, named[0].key_dim, named[0].value_dim)
    }
    assert not any(layer.cross or layer.shared for layer in layers)


PEFT = {
    "lora": peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    "adalora": peft.utils.constants.TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING,
    "ia3": peft.utils.constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
}
FEEDFORWARD = peft.utils.constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING


@pytest.mark.parametrize(  # PEFT's (IA)3 names experts of Mixtral that are no modules any more
    "method, kind", [(m, k) for m in PEFT for k in sorted(PEFT[m]) if k in zoo.NAMES and (m, k) != ("ia3", "mixtral")]
)
@pytest.mark.filterwarnings("ignore:.*table of families names no layers")
def test_defaults_are_those_of_peft(method, kind):
    """Where HF PEFT has default targets, ours are the same modules, whether by table or by structure."""
    model = zoo.NAMES[kind].build()
    base = Base.of(model)
    adapter = tz.attach(model, METHODS[method](), "x")
    skip = adapter.method.copied(base)
    theirs = [path for path, _ in base.targets(PEFT[method][kind], skip=skip)]
    assert [path for path, _ in base.targets(adapter.method.target_modules, skip=skip)] == theirs
    if method == "ia3":
        inner = FEEDFORWARD[kind]
        expected = [path for path, _ in base.targets(inner)] if inner else []
        ours = adapter.method.feedforward_modules
        assert ([path for path, _ in base.targets(ours)] if ours else []) == expected


# Model type -> default LoRA and (IA)3 targets by structure, and those scaled at their input.
FOUND = {
    "qwen3_moe": (["q_proj", "v_proj"], ["k_proj", "v_proj"], []),  # fused experts are no modules
    "deepseek_v3": (["q_b_proj", "kv_b_proj"], ["kv_b_proj", "down_proj"], ["down_proj"]),
    "falcon": (["query_key_value"], ["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "mamba": (["in_proj"], ["in_proj"], []),
    "jamba": (["q_proj", "v_proj", "in_proj"], ["k_proj", "v_proj", "down_proj", "in_proj"], ["down_proj"]),
    "falcon_h1": (["q_proj", "v_proj", "in_proj"], ["k_proj", "v_proj", "down_proj", "in_proj"], ["down_proj"]),
    "olmo_hybrid": (
        ["q_proj", "v_proj", "linear_attn.k_proj"],
        ["k_proj", "v_proj", "linear_attn.q_proj", "down_proj"],
        ["down_proj"],
    ),
    "distilbert": (["q_lin", "v_lin"], ["k_lin", "v_lin", "lin2"], ["lin2"]),
    "mpnet": (["q", "v"], ["k", "v", "output.dense"], ["output.dense"]),
    "fnet": (["intermediate.dense", "output.dense"], ["output.dense"], ["output.dense"]),
    "xlnet": (["layer_1", "layer_2"], ["layer_2"], ["layer_2"]),
    "prophetnet": (["query_proj", "value_proj"], ["key_proj", "value_proj", "output"], ["output"]),
    "umt5": (["q", "v"], ["k", "v", "wo"], ["wo"]),
    "swin": (["q_proj", "v_proj"], ["k_proj", "v_proj", "fc2"], ["fc2"]),
    "convnext": (["pwconv1", "pwconv2"], ["pwconv2"], ["pwconv2"]),
    "camembert": (
        ["query", "value"],
        r"(|.*\.)(layer\.\d+\.attention\.self\.(key|value)|encoder\.layer\.\d+\.output\.(dense))",
        r"(|.*\.)layer\.\d+\.output\.(dense)",
    ),
}


@pytest.mark.parametrize("kind", FOUND)
def test_targets_by_structure(kind):
    """Layers are found by what they do, said to the user, and the adapter changes the rows that are routed to it."""
    lora, ia3, inner = FOUND[kind]
    model = zoo.NAMES[kind].build()
    said = f"the table of families names no layers of {kind!r}; a pass over made-up inputs gave target_modules="
    with pytest.warns(UserWarning, match=re.escape(said)):
        adapters = [tz.attach(model, tz.LoRA(), "lora", seed=0), tz.attach(model, tz.IA3(), "ia3", seed=0)]
    expected = lora if isinstance(lora, str) else set(lora)
    got = adapters[0].method.target_modules
    assert got == expected if isinstance(expected, str) else expected <= set(got)
    got = adapters[1].method
    assert got.target_modules == ia3 if isinstance(ia3, str) else set(ia3) <= set(got.target_modules)
    assert got.feedforward_modules == inner
    inputs = zoo.batch_of(zoo.NAMES[kind].rows(model), 0, "right")
    with torch.no_grad():
        bare = model(**inputs).logits
    for adapter in adapters:
        with torch.no_grad():
            for _, parameter in adapter.trained():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            with tz.route(model, [adapter.name] * 4):
                assert not close(model(**inputs).logits, bare)


@pytest.mark.parametrize("kind", ["gemma3", "llava", "qwen3_vl"])
@pytest.mark.filterwarnings("ignore:.*table of families names no layers")
def test_towers_are_left_alone(kind):
    """In a model that reads images as vectors, default targets and attention lie in its language model; a user's own
    names match everywhere."""
    model = zoo.NAMES[kind].build()
    for method in (
        tz.LoRA(),
        tz.AdaLoRA(),
        tz.IA3(),
        tz.PrefixTuning(),
        tz.LlamaAdapter(adapter_layers=1),
        tz.BitFit(bias_scope="add"),
        tz.LNTuning(),
    ):
        adapter = tz.attach(model, method, method.name)
        paths = [path for path, _ in adapter.at() if path]
        assert paths and all(".language_model." in f".{path}." for path in paths)
    named = tz.attach(model, tz.LoRA(target_modules="all-linear"), "named")
    assert any(".language_model." not in f".{path}." for path, _ in named.at())


@pytest.mark.filterwarnings("ignore:.*table of families names no layers")
def test_looking_at_a_model_leaves_it_as_it_was():
    """A pass changes no mode, no tensor, no hook, no configuration and no random number."""
    model = zoo.NAMES["swin"].build().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = [sorted(vars(module)) for module in model.modules()]
    config, state = model.config.to_dict(), torch.get_rng_state()
    assert Base.of(model).structure.ran
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.config.to_dict() == config and torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:.*table of families names no layers")
def test_a_model_without_numbers_is_looked_at_alike():
    """On the meta device and in half precision the same layers are found."""
    found = [Base.of(zoo.NAMES["bamba"].build()).structure.roles]
    with torch.device("meta"):
        found.append(Base.of(AutoModelForCausalLM.from_config(zoo.config_of("bamba"))).structure.roles)
    found.append(Base.of(zoo.NAMES["bamba"].build().to(torch.bfloat16)).structure.roles)
    assert found[0]["mixer"] and found[1] == found[0] and found[2] == found[0]


class Strange(nn.Module):
    """A model that no made-up input fits."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(model_type="strange")
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*size) for name, size in {**_ATTENTION, **_FEED_FORWARD}.items()})
            for _ in range(2)
        )
        self.out = nn.Linear(8, 3)

    def forward(self, points):
        raise ValueError("expected points")


_ATTENTION = {"q_proj": (8, 8), "k_proj": (8, 4), "v_proj": (8, 4), "o_proj": (8, 8)}
_FEED_FORWARD = {"gate_proj": (8, 16), "up_proj": (8, 16), "down_proj": (16, 8)}


def test_names_and_shapes_where_no_pass_is_possible():
    """A model that does not run on made-up inputs has its layers found by name."""
    model = Strange()
    with pytest.warns(UserWarning, match="names and shapes gave"):
        adapter = tz.attach(model, tz.IA3(), "x")
    assert adapter.method.target_modules == ["k_proj", "v_proj", "down_proj"]
    assert adapter.method.feedforward_modules == ["down_proj"]


def test_a_model_without_such_layers():
    """A model in which no role is found says what its layers are, and what to set."""
    strange = nn.Sequential(nn.Sequential(nn.Conv1d(4, 4, 1)))
    with pytest.raises(tz.TanzakuError, match=r"no default target_modules for lora.*its layers are Conv1d.*candidates"):
        tz.attach(strange, tz.LoRA(), "x")
    resnet = zoo.NAMES["resnet"].build()
    with pytest.raises(tz.TanzakuError, match=r"no default target_modules for adalora.*its layers are Conv2d"):
        tz.attach(resnet, tz.AdaLoRA(), "x")
    with pytest.warns(UserWarning, match="convolution"):
        adapter = tz.attach(resnet, tz.LoRA(), "x")
    assert all(isinstance(resnet.get_submodule(p), nn.Conv2d) for p, _ in adapter.at() if p.startswith("resnet"))
    with pytest.raises(tz.TanzakuError, match=r"'all-linear' matches nothing.*no linear layer outside of its head"):
        tz.attach(resnet, tz.LoRA(target_modules="all-linear"), "y")


@pytest.mark.parametrize("kind, why", {"gptj": "GPTJAttention itself", "mamba": "has no attention layer"}.items())
def test_attention_that_cannot_be_reached_says_why(kind, why):
    with pytest.raises(tz.TanzakuError, match=why):
        tz.attach(zoo.NAMES[kind].build(), tz.PrefixTuning(), "x")


@pytest.mark.parametrize("kind", ["deepseek_v3", "gemma4_text", "gemma3n_text", "jetmoe", "zamba2"])
def test_keys_and_values_of_their_own_size(kind):
    """Prefixes and prompts have the size of each layer's keys and values, whatever makes those."""
    model = zoo.NAMES[kind].build()
    base = Base.of(model)
    layers = base.attention_layers()
    prefix = tz.attach(model, tz.PrefixTuning(num_virtual_tokens=3), "prefix", seed=0)
    numbers = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers)
    assert dict(prefix.trained()).popitem()[1].numel() == 3 * numbers
    tz.attach(model, tz.LlamaAdapter(adapter_layers=len(layers)), "prompts", seed=0)
    ids = torch.arange(10, 17)[None]
    with torch.no_grad():
        bare = model(ids).logits
        for name in ("prefix", "prompts"):
            adapter = dict(manager_of(model).adapters)[name]
            for _, parameter in adapter.trained():
                parameter.add_(torch.randn_like(parameter))
            with tz.route(model, [name]):
                assert not close(model(ids).logits, bare)
