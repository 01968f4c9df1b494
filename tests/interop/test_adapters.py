"""The Adapters library as the oracle: what it computed of tiny models, and the directories that it wrote.

It cannot be installed beside transformers 5, so its results are kept in tests/data; a folder like that of its cases, of
other models too, may be named in TANZAKU_ORACLE.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

import tanzaku as tz
from close import assert_close, close
from tanzaku.methods import METHODS
from tanzaku.methods.composed import ComposedLayer
from tanzaku.methods.fusion import FusionLayer
from tanzaku.models.families import Base

DATA = Path(__file__).parents[1] / "data"
FOLDER = Path(os.environ.get("TANZAKU_ORACLE") or DATA / "adapters")
CASES: list[dict[str, Any]] = json.loads((FOLDER / "index.json").read_text())
HUB = sorted(path for path in (DATA / "adapterhub").iterdir() if path.is_dir())
TOLERANCE = 1e-5


@cache
def folder_of(base: str, into: Path) -> Path:
    out = into / base
    out.mkdir(parents=True)
    shutil.copy(FOLDER / f"{base}-config.json", out / "config.json")
    shutil.copy(FOLDER / f"{base}-base.safetensors", out / "model.safetensors")
    return out


def model_of(base: str, into: Path) -> PreTrainedModel:
    """The case's model, without a pooler."""
    folder = folder_of(base, into)
    kind = AutoModel._model_mapping[type(AutoConfig.from_pretrained(folder))]
    options = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind.__init__).parameters else {}
    model = kind.from_pretrained(folder, **options)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def known(config: dict[str, Any]) -> bool:
    """Whether some method is that of a configuration of the library's."""
    for method in METHODS.values():
        settings = method.from_hub(config)
        if settings is not None:
            return settings.keys() <= method.check_names([]).keys()
    return False


def parts(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The configurations of a case's adapters by name."""
    config = case["adapter_config"]
    return config if all(isinstance(each, dict) for each in config.values()) else {"a": config}


def entry(case: dict[str, Any]) -> Any:
    """What a row of the case is routed to."""
    return tuple(parts(case)) if case["case"] == "stack" else "a"


SINGLE = [case for case in CASES if case["case"] not in ("fusion", "average")]
ROUTED = [case for case in SINGLE if all(map(known, parts(case).values()))]


def attach_all(model: PreTrainedModel, case: dict[str, Any], tensors: dict[str, Tensor], into: Path) -> None:
    """Load the case's adapters, through directories as the library would have written them."""
    for name, config in parts(case).items():
        folder = into / f"{case['file']}-{name}"
        folder.mkdir()
        own = {
            key.removeprefix("adapter."): tensor
            for key, tensor in tensors.items()
            if re.search(rf"\.(adapters|refts|invertible_adapters|shared_parameters)\.{name}\.", key)
        }
        save_file(own, folder / "adapter.safetensors")
        if case["case"] == "direft":
            config = {**config, "subtract_projection": False}  # which that library does not write
        about = {"config": config, "model_type": model.config.model_type, "name": name, "version": "adapters.1.3.0"}
        (folder / "adapter_config.json").write_text(json.dumps(about))
        tz.load(model, folder, name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("oracle")


@pytest.mark.parametrize("case", ROUTED, ids=lambda case: case["file"].removesuffix(".safetensors"))
def test_same_hidden_states(case: dict[str, Any], made: Path, tmp_path: Path) -> None:
    model, tensors = model_of(case["base"], made), load_file(FOLDER / case["file"])
    given = {key.removeprefix("input."): x for key, x in tensors.items() if key.startswith("input.")}
    attach_all(model, case, tensors, tmp_path)
    with torch.no_grad():
        bare = model(**given).last_hidden_state
        with tz.route(model, [entry(case)]):
            found = model(**given).last_hidden_state
        with tz.route(model, [entry(case), None]):
            mixed = model(**given).last_hidden_state
    assert (bare - tensors["output.without"]).abs().max() < TOLERANCE
    assert (found - tensors["output.with"]).abs().max() < TOLERANCE
    assert not close(found, bare)
    assert_close(mixed, torch.stack([found[0], bare[1]]))


COMPOSED = {kind: [case for case in CASES if case["case"] == kind] for kind in ("fusion", "average")}


def in_order(keys: Iterable[str]) -> list[str]:
    """Places of that library's tensors, as they are run."""
    return sorted(keys, key=lambda key: ("decoder." in key, [int(n) for n in re.findall(r"\.(\d+)\.", key)]))


@pytest.mark.parametrize("case", COMPOSED["fusion"], ids=lambda case: case["base"])
def test_a_fusion_has_its_hidden_states(case: dict[str, Any], made: Path, tmp_path: Path) -> None:
    """Its keys have a bias there, which adds the same to all scores and says nothing."""
    model, tensors = model_of(case["base"], made), load_file(FOLDER / case["file"])
    given = {key.removeprefix("input."): x for key, x in tensors.items() if key.startswith("input.")}
    attach_all(model, case, tensors, tmp_path)
    adapter = tz.attach(model, tz.AdapterFusion(adapters=[*parts(case)]), "fusion")
    places: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if found := re.fullmatch(r"(.*)\.adapter_fusion_layer\.[^.]+\.(.*)", key):
            places.setdefault(found[1] + ".", {})[found[2]] = tensor
    layers = [layer for _, layer in adapter.at() if isinstance(layer, FusionLayer)]
    for place, layer in zip(in_order(places), layers, strict=True):
        named = {name: tensor for name, tensor in places[place].items() if name != "key.bias"}
        layer.attention.load_state_dict(named)
    with torch.no_grad(), tz.route(model, ["fusion"]):
        found = model(**given).last_hidden_state
    with torch.no_grad(), tz.route(model, ["fusion", None]):
        mixed = model(**given).last_hidden_state
    assert (found - tensors["output.with"]).abs().max() < TOLERANCE
    assert_close(mixed, torch.stack([found[0], tensors["output.without"][1]]), 2**10)


@pytest.mark.parametrize("case", COMPOSED["average"], ids=lambda case: case["base"])
def test_its_averages_are_divided_once_more(
    case: dict[str, Any], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That library takes the mean of weighted results, of which the weights add up to one already, so what a sublayer
    and its adapters add to the residual stream is halved. Ours is the weighted sum; its half is theirs."""
    model, tensors = model_of(case["base"], made), load_file(FOLDER / case["file"])
    given = {key.removeprefix("input."): x for key, x in tensors.items() if key.startswith("input.")}
    attach_all(model, case, tensors, tmp_path)
    names = [*parts(case)]
    tz.attach(model, tz.Average(adapters=names, weights=[0.3, 0.7]), "average")
    assert not close(hidden(model, "average", given), tensors["output.with"])
    added: list[Tensor] = []
    sums = ComposedLayer._composed

    def halved(layer: Any, module: Any, args: Any, kwargs: Any, y: Tensor) -> Tensor:
        return y - added.pop() / 2 + (sums(layer, module, args, kwargs, y) - y) / 2

    for sublayer in Base.of(model).sublayers():
        if sublayer.kind == "feed_forward":
            out = model.get_submodule(sublayer.out)
            out.register_forward_hook(lambda _module, _args, output: added.append(output))
    monkeypatch.setattr(ComposedLayer, "_composed", halved)
    assert (hidden(model, "average", given) - tensors["output.with"]).abs().max() < TOLERANCE


def hidden(model: PreTrainedModel, name: str, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), tz.route(model, [name]):
        found = model(**given).last_hidden_state
    assert isinstance(found, Tensor)
    return found


# -- directories


def base_of(folder: Path, made: Path) -> PreTrainedModel:
    config = json.loads((folder / "adapter_config.json").read_text())
    kind = config["model_type"]
    out = made / f"hub-{kind}"
    if not out.exists():
        out.mkdir()
        shutil.copy(DATA / "adapters" / f"{kind}-config.json", out / "config.json")
        shutil.copy(DATA / "adapters" / f"{kind}-base.safetensors", out / "model.safetensors")
    cls = getattr(transformers, config["model_class"])
    options = {"add_pooling_layer": False} if kind == "bert" else {}
    model = cls.from_pretrained(out, **options)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


HELD = [folder for folder in HUB if known(json.loads((folder / "adapter_config.json").read_text())["config"])]
WHOLE = [folder for folder in HELD if "compacter" not in folder.name]


@pytest.mark.parametrize("folder", WHOLE, ids=lambda folder: folder.name)
def test_directories_come_back_bit_for_bit(folder: Path, made: Path, tmp_path: Path) -> None:
    model = base_of(folder, made)
    tz.load(model, folder, "a")
    tz.save(model, "a", tmp_path / "out", format="adapterhub")
    found, expected = (load_file(each / "adapter.safetensors") for each in (tmp_path / "out", folder))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    ours, theirs = (json.loads((each / "adapter_config.json").read_text()) for each in (tmp_path / "out", folder))
    assert {**ours, "model_name": ""} == theirs
    tz.load(model, tmp_path / "out", "again")
    given = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    with torch.no_grad():
        a, again = (_routed(model, name, given) for name in ("a", "again"))
    assert torch.equal(a, again)


@pytest.mark.parametrize("folder", [each for each in HELD if each not in WHOLE], ids=lambda folder: folder.name)
def test_a_compacter_of_a_bare_backbone_was_stored_without_its_rule(folder: Path, made: Path) -> None:
    """That library looks for a dot before the rule's key, which a bare backbone's has not."""
    with pytest.raises(tz.TanzakuError, match=r"missing base_model\.phm_rule"):
        tz.load(base_of(folder, made), folder, "a")


def _routed(model: PreTrainedModel, name: str, given: dict[str, Tensor]) -> Tensor:
    with tz.route(model, [name]):
        out = model(**given).last_hidden_state
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "BertForMaskedLM"])
def test_a_directory_of_a_backbone_fits_a_model_with_a_head(kind: str, made: Path, tmp_path: Path) -> None:
    """The file has no head, and the model's own is used; written again, names have the backbone's path before them."""
    folder = DATA / "adapterhub" / "bert-seq_bn"
    model = getattr(transformers, kind).from_pretrained(base_of(folder, made).name_or_path)
    if "Classification" in kind:
        with pytest.warns(UserWarning, match="the model's own is used"):
            adapter = tz.load(model, folder, "a")
    else:
        adapter = tz.load(model, folder, "a")
    theirs = load_file(folder / "adapter.safetensors")
    key = "encoder.layer.0.output.adapters.a.adapter_down.0.weight"
    weights = dict(adapter.named_parameters())
    assert any(torch.equal(theirs[key], each) for each in weights.values() if each.shape == theirs[key].shape)
    tz.save(model, "a", tmp_path / "out", format="adapterhub")
    assert {f"bert.{name}" for name in theirs} == load_file(tmp_path / "out" / "adapter.safetensors").keys()


def test_a_head_that_is_trained_along_is_said_to_be_left_out(made: Path, tmp_path: Path) -> None:
    name = base_of(DATA / "adapterhub" / "bert-seq_bn", made).name_or_path
    model = transformers.BertForSequenceClassification.from_pretrained(name)
    tz.attach(model, tz.BottleneckAdapter(), "a")
    with pytest.warns(UserWarning, match=r"classifier is trained along with .a., .* left out"):
        tz.save(model, "a", tmp_path / "out", format="adapterhub")
    assert not any("classifier" in key for key in load_file(tmp_path / "out" / "adapter.safetensors"))


def changed(folder: Path, into: Path, **settings: Any) -> Path:
    """A copy of a directory with other settings, or, by the names of its file's parts, another configuration."""
    shutil.copytree(folder, into)
    about = json.loads((into / "adapter_config.json").read_text())
    own = {key: settings.pop(key) for key in [*settings] if key in about}
    about["config"] |= settings
    (into / "adapter_config.json").write_text(json.dumps({**about, **own}))
    return into


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stochastic_depth": 0.5}, "stochastic_depth=0.5 is a setting that this version does not know"),
        ({"reduction_factor": 8}, r"is \(8, 32\), expected \(4, 32\)"),
        ({"non_linearity": "reluu"}, r"found non_linearity='reluu' .did you mean 'relu'"),
        ({"architecture": "lora"}, "an adapter of architecture 'lora', which this version does not know"),
        ({"leave_out": [1]}, r"unexpected encoder.layer.1.output.adapters.a.adapter_down.0.bias"),
        ({"mh_adapter": True}, "missing "),
        ({"model_type": "llama"}, "was made for a 'llama' model, and this one is 'bert'"),
        ({"hidden_size": 768}, "was made for a base of width 768, and this one's is 32"),
        ({"scaling": "much"}, "found scaling='much', expected a number, 'learned' or 'channel'"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_what_does_not_fit_is_said_in_a_line(settings: dict[str, Any], said: str, made: Path, tmp_path: Path) -> None:
    folder = DATA / "adapterhub" / "bert-seq_bn"
    model = base_of(folder, made)
    with pytest.raises(tz.TanzakuError, match=said) as error:
        tz.load(model, changed(folder, tmp_path / "x", **settings), "a")
    assert "\n" not in str(error.value)
    assert tz.adapters(model) == []


def test_damaged_tensors_are_said_in_a_line(made: Path, tmp_path: Path) -> None:
    folder = DATA / "adapterhub" / "bert-seq_bn"
    model = base_of(folder, made)
    copied = changed(folder, tmp_path / "x")
    (copied / "adapter.safetensors").write_bytes((folder / "adapter.safetensors").read_bytes()[:500])
    with pytest.raises(tz.TanzakuError, match=r"adapter\.safetensors is damaged"):
        tz.load(model, copied, "a")
    (copied / "adapter.safetensors").rename(copied / "pytorch_adapter.bin")
    with pytest.raises(tz.TanzakuError, match=r"has no adapter\.safetensors; pytorch_adapter\.bin is a pickle"):
        tz.load(model, copied, "a")


def test_a_method_that_the_library_does_not_have(made: Path, tmp_path: Path) -> None:
    model = base_of(DATA / "adapterhub" / "bert-seq_bn", made)
    tz.attach(model, tz.IA3(), "a")
    with pytest.raises(tz.TanzakuError, match="reads no adapter of ia3"):
        tz.save(model, "a", tmp_path / "out", format="adapterhub")
    with pytest.raises(tz.TanzakuError, match="found format='hub', expected 'peft' or 'adapterhub'"):
        tz.save(model, "a", tmp_path / "out", format="hub")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
