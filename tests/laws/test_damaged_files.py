"""Law 5, the other side: a file that is not what it says is a clear error, and leaves the model as it was."""

import json
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from variants import all_methods, bamboo, hang, logits, plain_logits

import tanzaku as tz
from models import batch, tiny
from tanzaku.store import read_meta

CONFIG, TENSORS, META = "adapter_config.json", "adapter_model.safetensors", "tanzaku.json"


@pytest.fixture
def saved(tmp_path):
    model = bamboo()
    hang(model, "lora")
    return tz.save(model, "lora", tmp_path / "lora", meta={"task": "poems"})


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def assert_refused(folder, match, model=None):
    model = model or bamboo()
    before = plain_logits(model, batch(model))
    with pytest.raises(tz.TanzakuError, match=match) as caught:
        tz.load(model, folder, "x")
    assert "\n" not in str(caught.value)
    assert tz.adapters(model) == []
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(plain_logits(model, batch(model)), before)


# -- damaged tensors


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_truncated(saved, keep):
    """Cut at any place, the tensors are an error."""
    data = (saved / TENSORS).read_bytes()
    (saved / TENSORS).write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    assert_refused(saved, "is damaged")


@pytest.mark.parametrize("at", [0, 9, -3])
def test_one_byte_changed(saved, at):
    """A byte of the header or of the numbers is noticed."""
    data = bytearray((saved / TENSORS).read_bytes())
    data[at] ^= 0x55
    (saved / TENSORS).write_bytes(data)
    assert_refused(saved, "is damaged")


def test_numbers_of_another_file(saved):
    """A whole file in another's place is noticed."""
    tensors = load_file(saved / TENSORS)
    save_file({key: tensor * 2 for key, tensor in tensors.items()}, saved / TENSORS)
    assert_refused(saved, "checksum")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.pop(next(iter(t))), "missing"),
        (lambda t: t.update(strange=torch.zeros(1)), "unexpected strange"),
        (lambda t: t.update({k: x[:1].clone() for k, x in list(t.items())[:1]}), "expected"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_tensors_that_do_not_fit(saved, edit, match):
    """Missing, unexpected and mis-shaped tensors are errors, or warnings where strict is off."""
    tensors = load_file(saved / TENSORS)
    edit(tensors)
    save_file(tensors, saved / TENSORS)
    change(saved / META, sha256=None)
    assert_refused(saved, match)
    with pytest.warns(UserWarning, match=match):
        tz.load(bamboo(), saved, "x", strict=False)


def test_pickles_are_never_read(saved):
    """An adapter_model.bin is refused unread, whatever it holds."""

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was read",))

    (saved / TENSORS).unlink()
    (saved / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert_refused(saved, "a pickle, which is never read")
    (saved / TENSORS).write_bytes(pickle.dumps(Bomb()))
    assert_refused(saved, "is damaged")


# -- damaged configurations


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "{]", "[" * 100_000, "\x00", "NaN"])
@pytest.mark.parametrize("file", [CONFIG, META])
def test_a_json_that_is_no_object(saved, file, text):
    """Whatever is no JSON object is an error with the file's name."""
    (saved / file).write_text(text)
    assert_refused(saved, f"{file}.* is damaged")


def test_a_json_of_other_bytes(saved):
    """Bytes that are no text are an error with the file's name."""
    (saved / CONFIG).write_bytes(b"\xff\xfe{}")
    assert_refused(saved, f"{CONFIG}.* is damaged")


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
def test_a_missing_file(saved, file):
    """Either file missing is an error that names it."""
    (saved / file).unlink()
    assert_refused(saved, f"has no {file}")


def test_no_directory(saved, tmp_path):
    """A path that is missing or a file is an error that says what was expected."""
    assert_refused(tmp_path / "nothing", "is no directory")
    assert_refused(saved / CONFIG, "is no directory")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"peft_type": "LORRA"}, "peft_type is 'LORRA'; this version reads"),
        ({"peft_type": None}, "peft_type is None"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"use_dora": True}, "use_dora=True is a setting that this version does not know"),
        ({"r": 3}, "does not fit"),
        ({"r": "many"}, "r is 'many', expected int"),
        ({"r": 2.5}, "r is 2.5, expected int"),
        ({"lora_alpha": True}, "lora_alpha is True, expected float"),
        ({"r": -1}, "expected a rank"),
        ({"target_modules": ["nowhere"]}, "matches no module"),
        ({"target_modules": 5}, "target_modules is 5, expected list"),
        ({"target_modules": [1]}, "target_modules is .1., expected list"),
        ({"rank_pattern": 3}, "rank_pattern is 3, expected dict"),
        ({"modules_to_save": ["nowhere"]}, "matches no module"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(saved, values, match):
    """Settings from a file are checked as settings from code are."""
    change(saved / CONFIG, **values)
    assert_refused(saved, match)


# -- another base


@all_methods
def test_another_base(name, tmp_path):
    """Another family, other weights and other sizes are each told; bf16 of the same base is the same base."""
    model = bamboo()
    hang(model, name)
    tz.save(model, name, tmp_path / "a")
    assert_refused(tmp_path / "a", "made for a 'llama' model", tiny("mistral"))
    assert_refused(tmp_path / "a", "other weights", bamboo(seed=1))
    assert_refused(tmp_path / "a", "other weights|other layers", bamboo(hidden_size=64))
    half = bamboo().to(torch.bfloat16)
    tz.load(half, tmp_path / "a", "x")
    assert logits(half, ["x"] * 4, batch(half)).isfinite().all()


def test_another_base_is_a_warning_where_strict_is_off(saved):
    """Without strict the adapter is loaded with a warning."""
    with pytest.warns(UserWarning, match="other weights"):
        tz.load(bamboo(seed=1), saved, "x", strict=False)


def test_a_trained_head_is_no_other_base(tmp_path):
    """The head is drawn anew each time a base is loaded: it is the adapter's, so another one is no other base."""
    model, other = bamboo(), bamboo()
    with torch.no_grad():
        other.score.weight.normal_()
    for name in ("lora", "llama_adapter", "prompt_tuning"):
        hang(model, name)
        tz.save(model, name, tmp_path / name)
        tz.load(other, tmp_path / name, name)
        found = logits(other, [name] * 4, batch(other))
        assert torch.equal(found, logits(model, [name] * 4, batch(model))), name


# -- names, and saving over what is there


@pytest.mark.parametrize("name", ["../outside", "a/b", "..", ".hidden/x"])
def test_names_cannot_leave_the_directory(saved, tmp_path, name):
    """A name with a path in it is refused, on loading too, and nothing is written beside the directory."""
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(tz.TanzakuError, match="expected letters, digits"):
        tz.load(bamboo(), saved, name)
    with pytest.raises(tz.TanzakuError, match="no adapter named"):
        model = bamboo()
        tz.load(model, saved, "x")
        tz.save(model, name, tmp_path / "y")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_tensor_names_are_no_paths(saved, tmp_path):
    """A key of the file that looks like a path is an unexpected key."""
    tensors = {**load_file(saved / TENSORS), "../../x": torch.zeros(1)}
    save_file(tensors, saved / TENSORS)
    change(saved / META, sha256=None)
    assert_refused(saved, "unexpected")


def test_saving_over_an_adapter_replaces_it_whole(saved, tmp_path):
    """Nothing of the former adapter is left, no file beside it, and others in the directory above stay."""
    (tmp_path / "neighbour").write_text("here")
    (saved / "left-over.txt").write_text("old")
    model = bamboo()
    hang(model, "prompt_tuning")
    assert tz.save(model, "prompt_tuning", saved) == saved
    assert sorted(p.name for p in saved.iterdir()) == sorted([CONFIG, TENSORS, META])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lora", "neighbour"]
    other = bamboo()
    tz.load(other, saved, "x")
    assert torch.equal(logits(other, ["x"] * 4, batch(other)), logits(model, ["prompt_tuning"] * 4, batch(model)))
    assert read_meta(saved) == {}


def test_a_failed_save_changes_nothing(saved, monkeypatch):
    """Whatever fails while writing, the adapter there stays whole and nothing is left beside it."""
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    model = bamboo()
    hang(model, "ia3")

    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tanzaku.store.save_file", fail)
    with pytest.raises(tz.TanzakuError, match="No space left on device; nothing there was changed"):
        tz.save(model, "ia3", saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["lora"]


def test_saving_onto_a_file(saved):
    """A path that is a file is an error, and the file stays."""
    model = bamboo()
    hang(model, "ia3")
    with pytest.raises(tz.TanzakuError, match="is a file; expected a directory"):
        tz.save(model, "ia3", saved / CONFIG)
    assert (saved / CONFIG).is_file()


def test_meta(saved):
    """What save() was given comes back; a directory without it says so."""
    assert read_meta(saved) == {"task": "poems"}
    (saved / META).unlink()
    with pytest.raises(tz.TanzakuError, match=r"has no tanzaku\.json"):
        read_meta(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tz.load(bamboo(), saved, "x")  # as HF PEFT's directories have none
