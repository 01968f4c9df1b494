"""Law 5, the other side: a file that is not what it says is a clear error, and leaves the model as it was."""

import json
import pickle
import sys
import warnings
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from variants import all_methods, attached, bamboo, logits, plain_logits

import tanzaku as tz
from close import assert_close
from models import batch, tiny
from tanzaku.storage.store import entries, read_meta

CONFIG, TENSORS, META = "adapter_config.json", "adapter_model.safetensors", "tanzaku.json"


@pytest.fixture
def saved(tmp_path):
    model = bamboo()
    attached(model, "lora")
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
    assert_close(plain_logits(model, batch(model)), before)


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
        (lambda t: t.update({k: x[:1].clone() for k, x in list(t.items())[:1]}), r"is \(1, .*\), expected \("),
        (lambda t: next(iter(t.values())).view(-1)[:1].fill_(float("nan")), "not finite"),
        (lambda t: next(iter(t.values())).view(-1)[:1].fill_(float("-inf")), "not finite"),
        (lambda t: t.update({k: x.long() for k, x in list(t.items())[:1]}), "is int64, expected floating point"),
    ],
    ids=["missing", "unexpected", "shape", "nan", "inf", "integers"],
)
def test_tensors_that_do_not_fit(saved, edit, match):
    """Missing, unexpected, mis-shaped and non-finite tensors are errors, or warnings where strict is off."""
    tensors = load_file(saved / TENSORS)
    edit(tensors)
    save_file(tensors, saved / TENSORS)
    change(saved / META, sha256=None)
    assert_refused(saved, match)
    with pytest.warns(UserWarning, match=match):
        tz.load(bamboo(), saved, "x", strict=False)


def test_what_does_not_fit_keeps_its_initial_value(saved):
    """Without strict every tensor that fits is read, and the warning names what is not."""
    tensors = load_file(saved / TENSORS)
    wrong, *right = [key for key in tensors if "lora_B" in key]
    tensors[wrong] = tensors[wrong][:, :1].clone()
    save_file(tensors, saved / TENSORS)
    change(saved / META, sha256=None)
    with pytest.warns(UserWarning, match=rf"{wrong} is .* keeps its initial value"):
        adapter = tz.load(bamboo(), saved, "x", strict=False)
    found = {key: tensor for key, (tensor, _) in entries(adapter).items()}
    assert not found[wrong].any()
    assert all(torch.equal(found[key], tensors[key]) for key in right)


def test_loading_draws_nothing(saved):
    """Loading leaves torch's random numbers where they were."""
    model = bamboo()
    before = torch.get_rng_state()
    tz.load(model, saved, "x")
    assert torch.equal(torch.get_rng_state(), before)


def test_pickles_are_never_read(saved):
    """An adapter_model.bin is refused unread, whatever it holds."""

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was read",))

    (saved / TENSORS).unlink()
    (saved / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert_refused(saved, "a pickle, which is never read")
    (saved / TENSORS).write_bytes(pickle.dumps(Bomb()))
    assert_refused(saved, "a Python pickle, which is never read")


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
        ({"lora_bias": True}, "lora_bias=True is a setting that this version does not know"),
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
    attached(model, name)
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


def test_another_architecture_is_named(saved):
    """An adapter of a classifier does not fit a language model: both are named, and strict=False reads what fits."""
    model = bamboo(head="lm")
    model.load_state_dict(bamboo().state_dict(), strict=False)
    assert_refused(saved, r"score.weight.*made for LlamaForSequenceClassification, and this is LlamaForCausalLM", model)
    with pytest.warns(UserWarning, match="unexpected"):
        tz.load(model, saved, "x", strict=False)
    other = tiny("mistral")
    with pytest.warns(UserWarning, match="made for a 'llama' model, and this one is 'mistral'"):
        tz.load(other, saved, "x", strict=False)
    assert logits(other, ["x"] * 4, batch(other)).isfinite().all()


@pytest.mark.parametrize(
    "tuned",
    ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias", "weight"],
)
def test_another_fine_tune_of_the_same_base(saved, tuned):
    """Weights that a short training run has moved a little are another base, whichever they are."""
    model = bamboo()
    moved = [(name, p) for name, p in model.named_parameters() if name.endswith(tuned) and "score" not in name]
    with torch.no_grad():
        for _, p in moved:
            p += 1e-4 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    assert moved
    assert_refused(saved, f"other weights .they differ at .*{moved[0][0]}", model)


@pytest.mark.parametrize("there", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("here", [torch.float32, torch.bfloat16, torch.float16])
def test_another_precision_is_no_other_base(tmp_path, there, here):
    """A base in another type, or rounded to it and back, is the same; a fine-tune in that type is not."""
    model = bamboo().to(there)
    attached(model, "lora")
    tz.save(model, "lora", tmp_path / "a")
    for same in (bamboo().to(here), bamboo().to(here).float()):
        tz.load(same, tmp_path / "a", "x")
    tuned = bamboo()
    with torch.no_grad():
        for p in tuned.parameters():
            p *= 1 + 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    assert_refused(tmp_path / "a", "other weights", tuned.to(here))


def test_a_quantised_base_is_no_other_base(saved, tmp_path):
    """The weights that are quantised tell nothing; the others still tell another base."""
    model, other = bamboo(), bamboo(seed=1)
    for module in [*model.model.layers.modules(), *other.model.layers.modules()]:
        if isinstance(module, torch.nn.Linear):
            whole = (module.weight.detach() * 100).to(torch.int8)
            module.weight = torch.nn.Parameter(whole, requires_grad=False)
    tz.load(model, saved, "x")
    tz.save(model, "x", tmp_path / "again")
    tz.load(bamboo(), tmp_path / "again", "x")
    with pytest.raises(tz.TanzakuError, match="other weights"):
        tz.load(other, saved, "x")


def test_a_base_whose_numbers_are_elsewhere_is_not_checked(saved):
    """On the meta device there is nothing to compare; the shapes still are."""
    with torch.device("meta"):
        model = type(bamboo())(bamboo().config)
    adapter = tz.load(model, saved, "x")
    assert {p.device.type for _, p in adapter.named_parameters()} == {"meta"}


def test_saving_while_merged_describes_the_base_itself(saved, tmp_path):
    """An adapter saved while one is merged is one for the base as it was."""
    model = bamboo()
    tz.load(model, saved, "x")
    tz.merge(model, "x")
    tz.save(model, "x", tmp_path / "again", meta={"task": "poems"})
    tz.load(bamboo(), tmp_path / "again", "x")
    tz.load(model, saved, "y")
    for file in (CONFIG, META, TENSORS):
        assert (tmp_path / "again" / file).read_bytes() == (saved / file).read_bytes(), file


@pytest.mark.parametrize("weights", [{"model.norm.weight": 5}, {"model.norm.weight": "x: y"}, [1]], ids=str)
def test_a_description_of_other_kinds(saved, weights):
    """A description of the base that is no shapes and numbers is an error with the file's name."""
    change(saved / META, base={"model_type": "llama", "weights": weights})
    assert_refused(saved, f"{META} is damaged")


def test_a_trained_head_is_no_other_base(tmp_path):
    """The head is drawn anew each time a base is loaded: it is the adapter's, so another one is no other base."""
    model, other = bamboo(), bamboo()
    with torch.no_grad():
        other.score.weight.normal_()
    for name in ("lora", "llama_adapter", "prompt_tuning"):
        attached(model, name)
        tz.save(model, name, tmp_path / name)
        tz.load(other, tmp_path / name, name)
        found = logits(other, [name] * 4, batch(other))
        assert_close(found, logits(model, [name] * 4, batch(model)), at=name)


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


PATHS = ["/etc/passwd", "../../etc/passwd", "~/.netrc"]


@pytest.mark.parametrize("path", PATHS)
def test_no_field_of_a_file_is_opened(saved, tmp_path, path):
    """Whatever path a field holds, loading opens the directory's own files and no other, and reads no tokenizer."""
    model = bamboo()
    attached(model, "prompt_tuning")
    folder = tz.save(model, "prompt_tuning", tmp_path / "prompt", meta={"labels": path})
    change(
        folder / CONFIG,
        base_model_name_or_path=path,
        revision=path,
        tokenizer_name_or_path=path,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="text",
        tokenizer_kwargs={"trust_remote_code": True, "vocab_file": path},
        inference_mode=False,
    )
    fresh = bamboo()
    with opened_files() as found:
        tz.load(fresh, folder, "x")
    outside = {name for name in found if str(tmp_path) in name or "passwd" in name or "netrc" in name}
    assert outside <= {str(folder / name) for name in (CONFIG, TENSORS, META)}
    assert_close(logits(fresh, ["x"] * 4, batch(fresh)), logits(model, ["prompt_tuning"] * 4, batch(model)))


_listeners: list[list[str]] = []


@contextmanager
def opened_files():
    """Names of the files that Python opens within the block."""
    if not _hooked:
        _hooked.append(True)
        sys.addaudithook(
            lambda event, args: [each.append(str(args[0])) for each in _listeners] if event == "open" else None
        )
    _listeners.append([])
    try:
        yield _listeners[-1]
    finally:
        _listeners.clear()


_hooked: list[bool] = []


def test_links(saved, tmp_path):
    """Files that are links are read, as the hub's cache has them; a directory that is one is written where it leads,
    and what its files led to stays."""
    elsewhere = tmp_path / "elsewhere"
    saved.rename(elsewhere)
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in (CONFIG, TENSORS, META):
        (linked / name).symlink_to(elsewhere / name)
    before = {p.name: p.read_bytes() for p in elsewhere.iterdir()}
    model = bamboo()
    tz.load(model, linked, "x")
    link = tmp_path / "link"
    link.symlink_to(linked)
    attached(model, "ia3")
    assert tz.save(model, "ia3", link) == link
    assert link.is_symlink()
    assert not any(p.is_symlink() for p in linked.iterdir())
    assert tz.load(bamboo(), link, "x").method.name == "ia3"
    assert {p.name: p.read_bytes() for p in elsewhere.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "link", "linked"]


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
    attached(model, "prompt_tuning")
    assert tz.save(model, "prompt_tuning", saved) == saved
    assert sorted(p.name for p in saved.iterdir()) == sorted([CONFIG, TENSORS, META, "README.md"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lora", "neighbour"]
    other = bamboo()
    tz.load(other, saved, "x")
    assert_close(logits(other, ["x"] * 4, batch(other)), logits(model, ["prompt_tuning"] * 4, batch(model)))
    assert read_meta(saved) == {}


def test_a_failed_save_changes_nothing(saved, monkeypatch):
    """Whatever fails while writing, the adapter there stays whole and nothing is left beside it."""
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    model = bamboo()
    attached(model, "ia3")

    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tanzaku.storage.store.save_file", fail)
    with pytest.raises(tz.TanzakuError, match="No space left on device; nothing there was changed"):
        tz.save(model, "ia3", saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["lora"]


def test_saving_onto_a_file(saved):
    """A path that is a file is an error, and the file stays."""
    model = bamboo()
    attached(model, "ia3")
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
