"""Law 5: what is saved comes back bit for bit, in another process too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from variants import CASES, KINDS_BESIDE_LLAMA, VARIANTS, all_methods, all_variants, bamboo, hang, logits

import tanzaku as tz
from models import batch
from tanzaku.store import read_meta

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
        for again in ("one", "two"):
            with torch.no_grad():
                found[f"{kind}-{head}/{folder.name}/{again}"] = logits(
                    model, [f"{folder.name}-{again}"] * 4, batch(model)
                ).contiguous()
        tz.detach(model)
save_file(found, root / "found.safetensors")
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(what this process computed, what a fresh one computes with the files) by model, adapter and name."""
    root = tmp_path_factory.mktemp("saved")
    expected = {}
    models = list(dict.fromkeys((kind, head) for kind, head, *_ in SAVED))
    for kind, head in models:
        model = bamboo(kind, head)
        for *where, name, variant in SAVED:
            if tuple(where) == (kind, head):
                label = f"{name}-{variant}"
                hang(model, name, variant, label)
                with torch.no_grad():
                    expected[f"{kind}-{head}/{label}"] = logits(model, [label] * 4, batch(model))
                tz.save(model, label, root / f"{kind}-{head}" / label)
                tz.detach(model)
    paths = json.dumps([str(HERE), str(HERE.parent)])
    subprocess.run([sys.executable, "-c", READER, str(root), paths, json.dumps(models)], check=True, timeout=300)
    return expected, load_file(root / "found.safetensors")


@pytest.mark.slow
def test_a_fresh_process_computes_the_same_bits(written):
    """Every method and setting, in every family, loaded twice under other names."""
    expected, found = written
    assert len(found) == 2 * len(expected) == 2 * len(SAVED)
    wrong = [key for key in found if not torch.equal(found[key], expected[key.rpartition("/")[0]])]
    assert not wrong


@all_variants
def test_saving_what_was_loaded_gives_the_same_file(name, variant, tmp_path):
    """Save, load, save: the same tensors under the same keys, and the same settings."""
    model, other = bamboo(), bamboo()
    hang(model, name, variant)
    tz.save(model, name, tmp_path / "a", meta={"labels": ["x", "y"]})
    tz.load(other, tmp_path / "a", "b")
    tz.save(other, "b", tmp_path / "b", meta=read_meta(tmp_path / "a"))
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tanzaku.json",
    }
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


@all_methods
def test_the_file_decides_not_the_model_it_is_loaded_into(name, tmp_path):
    """An adapter that was opened is told apart from a fresh one after loading."""
    model = bamboo()
    hang(model, name)
    inputs = batch(model)
    expected = logits(model, [name] * 4, inputs)
    tz.save(model, name, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    about = json.loads((tmp_path / "a" / "tanzaku.json").read_text())
    save_file({k: torch.zeros_like(t) for k, t in tensors.items()}, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "tanzaku.json").write_text(json.dumps({**about, "sha256": None}))
    tz.load(model, tmp_path / "a", "zeros")
    assert not torch.allclose(logits(model, ["zeros"] * 4, inputs), expected, atol=1e-3)
    assert torch.equal(logits(model, [name] * 4, inputs), expected)
