"""Adapters whose files were changed at random: an error of one line, or an adapter that is what the files say.

Never another exception, a hang, much memory, or a quiet load of something else. A file that fits may say other numbers
than it was saved with only where nothing tells them apart: without the checksum in tanzaku.json, as in PEFT's files.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import struct
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

import tanzaku as tz
from models import NEEDED, attach, tiny
from tanzaku.methods import METHODS
from tanzaku.storage.store import entries, read_meta
from tiers import costly

CONFIG, TENSORS, META = "adapter_config.json", "adapter_model.safetensors", "tanzaku.json"
SECONDS = 5.0  # a load takes a hundredth of one
SLOW = r"((.|\w)+)+[!?]"  # doubles its time with each character
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2, "rank_pattern": {"layers.1.self_attn.q_proj": 3}, "bias": "lora_only"},
    "adalora": {"init_r": 3, "target_r": 2},
    **NEEDED,
    "bottleneck": {"reduction_factor": {"0": 8, "default": 16}, "style": "parallel"},
    "compacter": {"reduction_factor": 4},
    "reft": {"r": 2, "full_form": True},
    "ln_tuning": {},
    "full": {},
}
# What is put in the place of a value, or of a part of it.
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 10**5, 10**9, 2**63, 10**30, 10**400, 0.5, -0.0, 1e300, float("nan"),
    float("inf"), "", "none", "all", "all-linear", "x", "q_proj", ".*", "(", "[", "*", "(?P<x>", "a{99999999999}",
    SLOW, r"(.*)*x", r"((a|b|.)+)+!", r"(model|layers|.|\.)+$!", "(x+x+)+y" * 3, "\n", "\x00", "\ud800", "\u202e",
    [], [[]], [None], [True], ["q_proj"], ["q_proj", 3], [10**9], {}, {"": ""}, {"(": 3}, {"q_proj": 10**9},
    {SLOW: 2}, {"layers.0.self_attn.q_proj": True},
]  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


values = st.one_of(
    st.sampled_from(ODD),
    st.sampled_from([50, 400, 900]).map(nested),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    ),
)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", num_labels=2, attention_bias=True)


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of every method."""
    out = {}
    for name, method in METHODS.items():
        adapter = attach(model, method.from_settings(SETTINGS.get(name, {})), name, seed=0)
        with torch.no_grad():
            for _, parameter in adapter.trained():
                parameter.add_(0.1)
        path = tz.save(model, name, tmp_path_factory.mktemp(name) / "a", meta={"labels": ["a", "b"]})
        out[name] = {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
        tz.detach(model)
    return out


def load(model: Any, folder: Path, files: dict[str, bytes], strict: bool = True) -> dict[str, Tensor] | None:
    """The tensors that are in force after loading, by their keys; None where it is refused."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name in {CONFIG, TENSORS, META} - files.keys():
        (folder / name).unlink(missing_ok=True)
    began = time.thread_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapter = tz.load(model, folder, "x", strict=strict)
        try:
            assert_settings_of_the_file(adapter.method.settings(), json.loads((folder / CONFIG).read_bytes()))
            found = {key: tensor.clone() for key, (tensor, _) in entries(adapter).items()}
        finally:
            tz.detach(model, "x")
    except tz.TanzakuError as error:
        text = str(error)
        assert "\n" not in text and text.encode("utf-8"), repr(text)
        assert len(text) < 2000, text
        found = None
    with contextlib.suppress(tz.TanzakuError):
        read_meta(folder)
    assert tz.adapters(model) == [] and all(p.requires_grad for p in model.parameters())
    assert time.thread_time() - began < SECONDS
    return found


# Read off the model, whatever a file says; or what loading itself decides.
DERIVED = ("inference_mode", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


def assert_settings_of_the_file(found: dict[str, Any], said: dict[str, Any]) -> None:
    """Every number, word and switch of the file is in force as it stands there."""
    for key, value in said.items():
        if key in found and key not in DERIVED and isinstance(value, bool | int | float | str):
            assert found[key] == value and isinstance(found[key], bool) == isinstance(value, bool), key


def tensors_of(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def assert_as_the_file_says(found: dict[str, Tensor], folder: Path) -> None:
    """Every tensor in force that the file has is the file's, and finite."""
    said = tensors_of(folder / TENSORS)
    for key, tensor in found.items():
        if key in said and said[key].shape == tensor.shape:
            assert said[key].is_floating_point() == tensor.is_floating_point()
            assert torch.equal(tensor.float(), said[key].float()), key


def without_checksum(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != META}


def fuzz(number: int) -> Any:
    return settings(
        max_examples=number,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def both(number: int, many: int) -> Any:
    """Some examples now, and many where all tests are run."""
    return pytest.mark.parametrize("examples", costly([number], [many]), ids=["some", "many"])


# -- the tensors' file


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Bits flipped, bytes cut, doubled, moved or put in; some of them in the header."""
    out = bytearray(data)
    header = min(len(out), 8 + struct.unpack("<Q", data[:8])[0])
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        end = draw.choice([8, header, header, len(out)])
        at = draw.randrange(max(1, min(end, len(out)))) if out else 0
        kind = draw.randrange(6)
        if kind == 0 and out:
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            del out[at : at + draw.choice([1, 2, 8, 100])]
        elif kind == 3:
            out[at:at] = draw.randbytes(draw.choice([1, 2, 8, 100]))
        elif kind == 4:
            out[at:at] = out[at : at + draw.choice([8, 50, 200])]
        else:
            out[at : at + 8] = struct.pack("<Q", draw.choice([0, 1, 2**20, 2**32, 2**62, 2**64 - 1]))
    return bytes(out)


@both(150, 2000)
def test_bytes_of_tensors(model: Any, saved: Any, tmp_path: Path, examples: int) -> None:
    @fuzz(examples)
    @given(st.integers(0, 2**32), st.sampled_from(list(METHODS)), st.booleans())
    def run(seed: int, name: str, checked: bool) -> None:
        files = dict(saved[name])
        before = files[TENSORS]
        files[TENSORS] = damaged(before, random.Random(seed))
        found = load(model, tmp_path, files if checked else without_checksum(files))
        if checked:
            assert found is None or files[TENSORS] == before
        elif found is not None:
            assert_as_the_file_says(found, tmp_path)

    run()


def rewritten(data: bytes, change: Any) -> bytes:
    """The file with its header changed, and the rest as it is."""
    size = struct.unpack("<Q", data[:8])[0]
    text = change(json.loads(data[8 : 8 + size]))
    header = (text if isinstance(text, str) else json.dumps(text)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


@both(150, 1500)
def test_headers_of_tensors(model: Any, saved: Any, tmp_path: Path, examples: int) -> None:
    """Other types, shapes, places and names; a name twice; values of another kind."""

    @fuzz(examples)
    @given(st.data(), st.sampled_from(list(METHODS)))
    def run(data: Any, name: str) -> None:
        def change(header: dict[str, Any]) -> Any:
            keys = sorted(key for key in header if key != "__metadata__")
            key = data.draw(st.sampled_from(keys))
            kind = data.draw(st.sampled_from(["dtype", "shape", "offsets", "rename", "twice", "value", "metadata"]))
            if kind == "dtype":
                kinds = ["F64", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "C64", "X", 3]
                header[key]["dtype"] = data.draw(st.sampled_from(kinds))
            elif kind == "shape":
                shape = header[key]["shape"]
                header[key]["shape"] = data.draw(
                    st.sampled_from([shape[::-1], [*shape, 1], shape[1:], [2**40, 2**40], [-1], [0], [10**30], "x"])
                )
            elif kind == "offsets":
                other = header[data.draw(st.sampled_from(keys))]["data_offsets"]
                header[key]["data_offsets"] = data.draw(st.sampled_from([other, other[::-1], [0, 2**62], [0, -1], []]))
            elif kind == "rename":
                new = data.draw(st.sampled_from([*keys, key.replace("lora_A", "lora_B"), "../x", "\n", "", key + "."]))
                header[new] = header.pop(key)
            elif kind == "twice":
                text = json.dumps(header)
                return text[:-1] + f", {json.dumps(key)}: {json.dumps(header[keys[0]])}}}"
            elif kind == "metadata":
                header["__metadata__"] = data.draw(values)
            else:
                header[key] = data.draw(values)
            return header

        files = dict(saved[name])
        try:
            files[TENSORS] = rewritten(files[TENSORS], change)
        except (ValueError, OverflowError, RecursionError):
            return
        assert load(model, tmp_path, files) is None or files[TENSORS] == saved[name][TENSORS]
        found = load(model, tmp_path, without_checksum(files))
        if found is not None:
            assert_as_the_file_says(found, tmp_path)

    run()


# -- the two objects


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    out = [at] if at else []
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            out += places(value[key], (*at, key))
    return out


def changed(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    value = copy.deepcopy(value)
    inner = value
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = new
    return value


def text_of(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


@both(250, 2500)
@pytest.mark.parametrize("file", [CONFIG, META])
def test_values_of_objects(model: Any, saved: Any, tmp_path: Path, file: str, examples: int) -> None:
    """A value of another kind or size, at any place: huge numbers, expressions that never end, deep nesting, nan."""

    @fuzz(examples)
    @given(st.data(), st.sampled_from(list(METHODS)), st.booleans())
    def run(data: Any, name: str, strict: bool) -> None:
        files = dict(saved[name])
        value = json.loads(files[file])
        for _ in range(data.draw(st.sampled_from([1, 1, 2]))):
            value = changed(value, data.draw(st.sampled_from(sorted(places(value), key=repr))), data.draw(values))
        files[file] = text_of(value)
        found = load(model, tmp_path, files, strict)
        if found is not None:
            assert_as_the_file_says(found, tmp_path)
            if strict:
                # What was loaded is what was saved: no setting made it another adapter's.
                first = tensors_of(tmp_path / TENSORS)
                assert found.keys() & first.keys(), "an adapter without any tensor of the file"

    run()


@both(100, 1000)
@pytest.mark.parametrize("file", [CONFIG, META])
def test_bytes_of_objects(model: Any, saved: Any, tmp_path: Path, file: str, examples: int) -> None:
    @fuzz(examples)
    @given(st.integers(0, 2**32), st.sampled_from(list(METHODS)))
    def run(seed: int, name: str) -> None:
        draw = random.Random(seed)
        files, out = dict(saved[name]), bytearray(saved[name][file])
        for _ in range(draw.choice([1, 1, 3])):
            at = draw.randrange(len(out)) if out else 0
            kind = draw.randrange(4)
            if kind == 0 and out:
                out[at] ^= 1 << draw.randrange(8)
            elif kind == 1:
                del out[at : at + draw.choice([1, 3, 10**6])]
            elif kind == 2:
                out[at:at] = draw.choice([b"9" * 5000, b"[" * 5000, b'{"r": 3, ', b"NaN", b"1e999", b"\xff", b'"'])
            else:
                out[at:at] = out[at : at + 30]
        files[file] = bytes(out)
        found = load(model, tmp_path, files)
        if found is not None:
            assert_as_the_file_says(found, tmp_path)

    run()


# -- found by the above, or known to be told


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("lora", {"r": 10**9}, "r"),
        ("lora", {"rank_pattern": {"q_proj": 10**9}}, "."),
        ("adalora", {"init_r": 10**9}, "."),
        ("prefix_tuning", {"num_virtual_tokens": 100}, "."),
        ("p_tuning", {"encoder_hidden_size": 10**9}, None),  # the file has what the network wrote
        ("lora", {"lora_alpha": float("nan")}, "lora_alpha=nan, expected a finite number"),
        ("lora", {"target_modules": "("}, "no regular expression"),
        ("lora", {"target_modules": SLOW}, "takes too long"),
        ("lora", {"exclude_modules": SLOW}, "takes too long"),
        ("lora", {"rank_pattern": {"(": 3}}, "no regular expression"),
        ("lora", {"rank_pattern": {SLOW: 3}}, "takes too long"),
        ("lora", {"layers_to_transform": [0], "layers_pattern": "("}, "no regular expression"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be(
    model: Any, saved: Any, tmp_path: Path, name: str, change: dict[str, Any], match: str | None
) -> None:
    files = dict(saved[name])
    files[CONFIG] = text_of({**json.loads(files[CONFIG]), **change})
    for each, content in files.items():
        (tmp_path / each).write_bytes(content)
    began = time.thread_time()
    if match is None:
        tz.load(model, tmp_path, "x")
        tz.detach(model, "x")
    else:
        with pytest.raises(tz.TanzakuError, match=match):
            tz.load(model, tmp_path, "x")
        assert tz.adapters(model) == []
    assert time.thread_time() - began < SECONDS


def test_a_name_twice_is_refused(model: Any, saved: Any, tmp_path: Path) -> None:
    """JSON does not say which of the two holds."""
    files = dict(saved["lora"])
    files[CONFIG] = files[CONFIG].replace(b'"r": 2', b'"r": 3, "r": 2')
    assert load(model, tmp_path, files) is None
