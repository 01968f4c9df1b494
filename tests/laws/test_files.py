"""Law 5: what is saved comes back bit for bit, in another process too."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from variants import CASES, KINDS_BESIDE_LLAMA, VARIANTS, all_methods, all_variants, attached, bamboo, logits

import tanzaku as tz
from close import PASS, assert_close
from models import batch
from tanzaku.core.manager import manager_of
from tanzaku.methods import METHODS
from tanzaku.models.heads import heads_of
from tanzaku.storage.store import PARTS, entries, read_meta
from tiers import tiered

HERE = Path(__file__).parent
LLAMA = ("llama", "cls")
SAVED = [(*LLAMA, *case) for case in CASES] + [
    (kind, head, name, "default") for kind, head in KINDS_BESIDE_LLAMA for name in VARIANTS
]

# Builds every model anew, loads what the other process saved under two names each, and writes down what it computes.
READER = """
import json, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[2])
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from models import batch
from variants import bamboo, logits
import tanzaku as tz

root = Path(sys.argv[1])
found = {}
for number, (kind, head) in enumerate(json.loads(sys.argv[3])):
    model = bamboo(kind, head)
    for folder in sorted((root / f"{kind}-{head}").iterdir()):
        for again in ("one", "two"):
            tz.load(model, folder, f"{folder.name}-{again}")
        tz.save(model, f"{folder.name}-two", root / "again" / folder.parent.name / folder.name)
        for again in ("one", "two"):
            with torch.no_grad():
                found[f"{kind}-{head}/{folder.name}/{again}"] = logits(
                    model, [f"{folder.name}-{again}"] * 4, batch(model)
                ).contiguous()
        tz.detach(model)
save_file(found, root / "found.safetensors")
"""


@pytest.fixture(scope="module", params=tiered([[LLAMA], KINDS_BESIDE_LLAMA]), ids=["llama", "others"])
def written(request, tmp_path_factory):
    """What this process computed, and what a fresh one computes with the files, by model, adapter and name; and which
    files are not the same when the other one has written what it read."""
    root = tmp_path_factory.mktemp("saved")
    expected = {}
    models = request.param
    saved = [each for each in SAVED if each[:2] in models]
    for kind, head in models:
        model = bamboo(kind, head)
        for *where, name, variant in saved:
            if tuple(where) == (kind, head):
                label = f"{name}-{variant}"
                attached(model, name, variant, label)
                with torch.no_grad():
                    expected[f"{kind}-{head}/{label}"] = logits(model, [label] * 4, batch(model))
                tz.save(model, label, root / f"{kind}-{head}" / label)
                tz.detach(model)
    paths = json.dumps([str(HERE), str(HERE.parent)])
    subprocess.run([sys.executable, "-c", READER, str(root), paths, json.dumps(models)], check=True, timeout=300)
    files = [path.relative_to(root) for path in root.glob("*/*/adapter_model.safetensors")]
    assert len(files) == len(saved) == len(expected)
    changed = [str(path) for path in files if (root / path).read_bytes() != (root / "again" / path).read_bytes()]
    return expected, load_file(root / "found.safetensors"), changed


@pytest.mark.slow
def test_a_fresh_process_reads_the_same_bits_and_computes_the_same(written):
    """Every method and setting, in every family, loaded twice under other names."""
    expected, found, changed = written
    assert len(found) == 2 * len(expected)
    for key, logits_ in found.items():
        assert_close(logits_, expected[key.rpartition("/")[0]], at=key)
    assert not changed


@all_variants
def test_saving_what_was_loaded_gives_the_same_file(name, variant, tmp_path):
    """Save, load, save: the same tensors under the same keys, and the same settings."""
    model, other = bamboo(), bamboo()
    attached(model, name, variant)
    tz.save(model, name, tmp_path / "a", meta={"labels": ["x", "y"]})
    tz.load(other, tmp_path / "a", "b")
    tz.save(other, "b", tmp_path / "b", meta=read_meta(tmp_path / "a"))
    assert {p.name for p in (tmp_path / "a").iterdir()} - {PARTS} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tanzaku.json",
    }
    files = {each.relative_to(tmp_path / "a") for each in (tmp_path / "a").rglob("*") if each.is_file()}
    assert files == {each.relative_to(tmp_path / "b") for each in (tmp_path / "b").rglob("*") if each.is_file()}
    for file in files:
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "a" / file).read_bytes(), file


@all_methods
def test_the_file_decides_not_the_model_it_is_loaded_into(name, tmp_path):
    """An adapter that was opened is told apart from a fresh one after loading."""
    model = bamboo()
    attached(model, name)
    inputs = batch(model)
    expected = logits(model, [name] * 4, inputs)
    tz.save(model, name, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    about = json.loads((tmp_path / "a" / "tanzaku.json").read_text())
    save_file({k: torch.zeros_like(t) for k, t in tensors.items()}, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "tanzaku.json").write_text(json.dumps({**about, "sha256": None}))
    tz.load(model, tmp_path / "a", "zeros")
    assert not torch.allclose(logits(model, ["zeros"] * 4, inputs), expected, atol=1e-3)
    assert_close(logits(model, [name] * 4, inputs), expected)


# -- what save_pretrained of a model with adapters writes


def test_the_adapter_below_a_saved_model_is_found(tmp_path):
    """Trainers write checkpoints by `save_pretrained`: `tanzaku.load` takes their directory."""
    model = bamboo()
    for name in ("ia3", "lora"):
        attached(model, name)
    tz.activate(model, "lora")
    model.save_pretrained(tmp_path / "one")
    assert tz.load(model, tmp_path / "one", "again").method.name == "lora"
    assert read_meta(tmp_path / "one") == {}
    # What a killed process was writing is no adapter.
    shutil.copytree(tmp_path / "one/tanzaku/lora", tmp_path / "one/tanzaku/.lora.abcdefgh.saving")
    tz.load(model, tmp_path / "one", "once-more")
    tz.activate(model, ("lora", "ia3"))
    model.save_pretrained(tmp_path / "two")
    with pytest.raises(tz.TanzakuError, match=r"has the adapters ia3, lora; load one, such as .*two/tanzaku/ia3"):
        tz.load(model, tmp_path / "two", "third")
    tz.activate(model, None)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(tz.TanzakuError, match="it is a model's, and no adapter was active when it was saved"):
        tz.load(model, tmp_path / "base", "third")
    assert "third" not in tz.adapters(model)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    where=st.sampled_from([LLAMA, ("bert", "cls"), ("t5", "cls"), ("gpt2", "lm"), ("gemma3", "cls"), ("bart", "lm")]),
    names=st.tuples(st.sampled_from(sorted(METHODS)), st.sampled_from(sorted(METHODS))),
    types=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16])] * 2),
)
@torch.no_grad()
def test_two_adapters_come_back_on_another_head_and_type(where, names, types, tmp_path_factory):
    """Alone and stacked, on a base of another type whose own head was drawn anew; their tensors bit for bit."""
    folder = tmp_path_factory.mktemp("pair")
    first, second = (bamboo(*where).to(dtype) for dtype in types)
    for part in heads_of(second):
        for name in part.parameters:
            second.get_parameter(name).normal_()
    labels = {f"{name}-{at}": name for at, name in enumerate(names)}
    for label, name in labels.items():
        attached(first, name, as_=label)
        tz.save(first, label, folder / label)
        tz.load(second, folder / label, label)
        exported = [{k: t for k, (t, _) in entries(manager_of(m).get(label)).items()} for m in (first, second)]
        assert exported[0].keys() == exported[1].keys()
        assert all(torch.equal(tensor, exported[1][key]) for key, tensor in exported[0].items())
    stacks = [(label,) for label in labels]
    if all(METHODS[name].shares_batch for name in names):
        stacks.append(tuple(labels))
    inputs = batch(first)
    half = torch.bfloat16 in types
    for stack in stacks:
        found, expected = (logits(model, [stack] * 4, inputs).float() for model in (second, first))
        assert_close(found, expected, 2**5 if half else PASS, dtype=torch.bfloat16 if half else None)
