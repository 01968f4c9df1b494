"""`tanzaku merge`: plain model directories that transformers reads by itself."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from cli_kit import Tanzaku, assert_refused
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForCausalLM,
)

import tanzaku as tz
from close import GRADIENT, assert_close
from models import tiny
from tanzaku.models.loading import load_classifier

LABELS = ["mild", "harsh"]
TEXTS = ["warm rain of spring", "a cold wind"]


def classifier(model_dir: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return load_classifier(str(model_dir), len(LABELS), id2label=dict(enumerate(LABELS)), dtype=dtype)


@torch.no_grad()
def trained(model_dir: Path, out: Path, method: tz.Method, seed: int = 0, scale: float = 0.2) -> Path:
    """An adapter as `tanzaku train` leaves it, of a method that has moved from its start."""
    model = classifier(model_dir)
    adapter = tz.attach(model, method, "mine", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in adapter.trained():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    meta = {"model": str(model_dir), "labels": LABELS, "text": "text", "max_length": 8, "text_pair": None}
    return tz.save(model, "mine", out, meta=meta)


def logits_of(model: torch.nn.Module, where: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(where)
    with torch.no_grad():
        return model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits


def routed(model_dir: Path, adapter: Path) -> torch.Tensor:
    model = classifier(model_dir)
    tz.load(model, adapter, "mine")
    with tz.route(model, ["mine"] * len(TEXTS)):
        return logits_of(model, model_dir)


def read(out: Path) -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(out).eval()


def test_a_class_that_transformers_has_not(model_dir: Path, tmp_path: Path, tanzaku: Tanzaku) -> None:
    """Such as a token classifier made here of a decoder: what is merged could be loaded by nothing."""
    adapter = trained(model_dir, tmp_path / "adapter", tz.LoRA(r=2))
    about = json.loads((adapter / "tanzaku.json").read_text())
    about["base"]["architecture"] = "OddForTokenClassification"
    (adapter / "tanzaku.json").write_text(json.dumps(about))
    said = tanzaku("merge", adapter, "--out", tmp_path / "plain")
    assert_refused(said, "OddForTokenClassification, which transformers", "use it as an adapter")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize(
    "method", [tz.LoRA(r=2), tz.AdaLoRA(init_r=2, target_r=1), tz.IA3(), tz.Full(), tz.Head()], ids=lambda m: m.name
)
def test_transformers_reads_the_result(method: tz.Method, model_dir: Path, tmp_path: Path, tanzaku: Tanzaku) -> None:
    adapter = trained(model_dir, tmp_path / "adapter", method)
    said = tanzaku("merge", adapter, "--out", tmp_path / "deep" / "plain", "--max-shard-size", "5KB")
    assert said.code == 0, said.err
    out = tmp_path / "deep" / "plain"
    assert_close(logits_of(read(out), out), routed(model_dir, adapter))
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "mild", "1": "harsh"}
    assert config["dtype"] == "float32"
    assert not any(word in (out / "config.json").read_text() for word in ("tanzaku", "adapter", str(tmp_path)))
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert [entry.name for entry in out.parent.iterdir()] == ["plain"]


def test_a_run_is_no_adapter(work: Path, tanzaku: Tanzaku) -> None:
    assert tanzaku("train", "recipe.yaml", "--out", "run").code == 0
    for verb, args in (("merge", ["--out", "x"]), ("export", ["--out", "x.gguf"]), ("predict", ["--data", "test.tsv"])):
        assert_refused(
            tanzaku(verb, "run", *args), "run holds a run and is no adapter; its adapters are run/adapters/lora"
        )


def test_a_base_of_another_kind(work: Path, tanzaku: Tanzaku) -> None:
    assert tanzaku("train", "recipe.yaml", "--out", "run").code == 0
    tiny("gpt2", "lm").save_pretrained("gpt2")
    for verb, args in (("merge", ["--out", "x"]), ("export", ["--out", "x.gguf"])):
        said = tanzaku(verb, "run/adapters/lora", "--model", "gpt2", *args)
        assert_refused(said, "was made for a 'llama' model, and 'gpt2' is 'gpt2'", "(--model)")


def test_the_base_s_type_is_kept_and_what_that_costs_is_said(model_dir: Path, tmp_path: Path, tanzaku: Tanzaku) -> None:
    """A small change in a type of few digits is lost for a good part; in full it is kept."""
    half = tmp_path / "half"
    LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(half)
    adapter = trained(half, tmp_path / "adapter", tz.LoRA(r=2), scale=0.02)
    said = tanzaku("merge", adapter, "--out", tmp_path / "plain")
    assert said.code == 0 and "rounding to bfloat16 lost" in said.err and "--dtype float32" in said.err
    assert read(tmp_path / "plain").dtype == torch.bfloat16
    said = tanzaku("merge", adapter, "--out", tmp_path / "full", "--dtype", "float32")
    assert said.code == 0 and "lost" not in said.err
    expected = routed(half, adapter)
    assert_close(logits_of(read(tmp_path / "full"), half), expected)


@pytest.mark.parametrize("task", ["SEQ_CLS", "CAUSAL_LM", None])
def test_an_adapter_of_peft_s(task: str | None, model_dir: Path, tmp_path: Path, tanzaku: Tanzaku) -> None:
    """The base and the class come from its config, or from the base's own."""
    kind = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForCausalLM
    more = {"num_labels": 3} if task == "SEQ_CLS" else {}
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, task_type=task, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(kind.from_pretrained(model_dir, **more), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    said = tanzaku("merge", tmp_path / "adapter", "--out", tmp_path / "plain")
    assert said.code == 0, said.err
    plain = kind.from_pretrained(tmp_path / "plain")
    assert_close(logits_of(plain, tmp_path / "plain"), logits_of(theirs, model_dir))
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "plain").get_vocab()
        == AutoTokenizer.from_pretrained(model_dir).get_vocab()
    )


def test_a_vision_model(tmp_path: Path, tanzaku: Tanzaku) -> None:
    """The class is the one that the adapter was saved from; there is no tokenizer."""
    base = tiny("vit")
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    tz.attach(base, tz.LoRA(r=2, target_modules=["q_proj", "projection"], init_lora_weights=False), "mine")
    tz.save(base, "mine", tmp_path / "adapter")
    said = tanzaku("merge", tmp_path / "adapter", "--model", tmp_path / "base", "--out", tmp_path / "plain")
    assert said.code == 0, said.err
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad(), tz.route(base, ["mine"] * 2):
        expected = base(pixel_values=pixels).logits
        found = type(base).from_pretrained(tmp_path / "plain")(pixel_values=pixels).logits
    assert_close(found, expected)
    assert (tmp_path / "plain" / "preprocessor_config.json").is_file()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_quantised_base_becomes_plain(model_dir: Path, tmp_path: Path, tanzaku: Tanzaku) -> None:
    """What is written is the change on the values that the 4 bits stand for."""
    wide, packed = tmp_path / "wide", tmp_path / "packed"
    tiny("llama", "lm", vocab_size=len(AutoTokenizer.from_pretrained(model_dir)), hidden_size=64).save_pretrained(wide)
    four = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["score", "lm_head"])
    LlamaForCausalLM.from_pretrained(wide, quantization_config=four, dtype=torch.float32).save_pretrained(packed)
    for folder in (wide, packed):
        AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    adapter = trained(packed, tmp_path / "adapter", tz.LoRA(r=2))
    said = tanzaku("merge", adapter, "--out", tmp_path / "plain")
    assert said.code == 0, said.err
    found, expected = read(tmp_path / "plain"), classifier(packed)
    tz.load(expected, adapter, "mine")
    assert not hasattr(found.config, "quantization_config")
    tz.merge(expected, "mine", dequantize=True)
    for key, value in expected.state_dict().items():
        assert_close(found.state_dict()[key], value, GRADIENT, at=key)


def test_several_are_combined_first(model_dir: Path, tmp_path: Path, tanzaku: Tanzaku) -> None:
    """By default exactly: the logits of the weighted sum of both changes."""
    a = trained(model_dir, tmp_path / "a", tz.LoRA(r=2), seed=1)
    b = trained(model_dir, tmp_path / "b", tz.LoRA(r=3), seed=2)
    out = tmp_path / "plain"
    said = tanzaku("merge", a, b, "--weights", "0.7", "0.3", "--copies", "mean", "--out", out)
    assert said.code == 0, said.err
    model = classifier(model_dir)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    for name, path, weight in (("a", a, 0.7), ("b", b, 0.3)):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        tz.load(model, path, name)
        tz.merge(model, name)
        for key, value in model.state_dict().items():
            expected[key] += weight * (value - before[key])
        tz.unmerge(model)
    for key, value in read(out).state_dict().items():
        assert_close(value, expected[key])
    ties = ("--combine", "ties_svd", "--density", "0.5", "--copies", "b", "--svd-rank", "1", "--overwrite")
    said = tanzaku("merge", a, b, "--weights=1,-0.5", *ties, "--out", out)
    assert said.code == 0, said.err
    head = read(out).score.weight
    tz.load(model, b, "head")
    tz.merge(model, "head")
    assert_close(head, model.score.weight)


def test_ours_and_another_library_s(model_dir: Path, tmp_path: Path, tanzaku: Tanzaku) -> None:
    """PEFT names the kind of head, and not the class."""
    ours = trained(model_dir, tmp_path / "ours", tz.LoRA(r=2))
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(classifier(model_dir), config).save_pretrained(tmp_path / "theirs")
    args = ("merge", ours, tmp_path / "theirs", "--model", model_dir, "--out", tmp_path / "plain")
    assert_refused(tanzaku(*args), "each have their own score", "--copies ours, or --copies mean")
    assert_refused(tanzaku(*args, "--copies", "mean", "--weights", "0.7"), "--weights: found 1 weights for 2 adapters")
    assert tanzaku(*args, "--copies", ours).code == 0  # by the path that it was given by
    head = load_file(ours / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert_close(read(tmp_path / "plain").score.weight, head)


def test_refusals(model_dir: Path, tmp_path: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each, before anything is written."""
    a = trained(model_dir, tmp_path / "a", tz.LoRA(r=2), seed=1)
    b = trained(model_dir, tmp_path / "b", tz.LoRA(r=3), seed=2)
    prompt = trained(model_dir, tmp_path / "prompt", tz.PromptTuning(num_virtual_tokens=2))
    there = tmp_path / "there"
    there.mkdir()
    (there / "letter.txt").write_text("dear")
    out = ("--out", tmp_path / "out")
    for args, parts in [
        ((prompt, *out), ("prompt_tuning is no change of weights", "tanzaku predict")),
        ((a, "--out", there), ("there already", "--overwrite")),
        ((a, "--out", there, "--overwrite"), ("holds no model", "letter.txt")),
        ((a, "--out", a / "letter.txt" / ".." / ".." / "a", "--overwrite"), ("it would replace",)),
        ((a, "--out", tmp_path, "--overwrite"), ("it would replace",)),
        ((a, *out, "--dtype", "float23"), ("float23", "did you mean 'float32'")),
        ((a, *out, "--max-shard-size", "huge"), ("huge", "5GB")),
        ((a, b, *out, "--weights", "0.5"), ("1 weights for 2 adapters",)),
        ((a, b, *out, "--weights", "half"), ("'half'", "numbers")),
        ((a, b, *out), ("score", "mean")),
        ((a, b, *out, "--copies", "mean", "--combine", "tie"), ("'tie'", "did you mean 'ties'")),
        ((a, b, *out, "--copies", "mean", "--combine", "linear"), ("ranks 2, 3", "cat")),
        ((a, b, *out, "--copies", "mean", "--combine", "dare_ties_svd"), ("density",)),
        ((tmp_path / "c", *out), ("no adapter", "has a, b")),
        ((a, *out, "--model", tmp_path / "base"), ("no model",)),
        ((a,), ("--out",)),
        ((*out,), ("no adapter is named",)),
    ]:
        assert_refused(tanzaku("merge", *args), *parts)
    assert (there / "letter.txt").read_text() == "dear"
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000))
    assert_refused(tanzaku("merge", a, *out), "0.00 MB free", "0.07 GB")
    assert not (tmp_path / "out").exists()


def test_a_kill_leaves_the_old_model(model_dir: Path, tmp_path: Path, tanzaku: Tanzaku) -> None:
    """Killed when its files are written and not yet in place; the next run clears what it left."""
    adapter = trained(model_dir, tmp_path / "adapter", tz.LoRA(r=2))
    out = tmp_path / "plain"
    assert tanzaku("merge", adapter, "--out", out).code == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    program = (
        "import os, signal, sys, tanzaku.files.writing\n"
        "tanzaku.files.writing.replace_directory = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from tanzaku.cli import main\n"
        "main(sys.argv[1:])"
    )
    other = trained(model_dir, tmp_path / "other", tz.LoRA(r=2), seed=5)
    done = subprocess.run(
        [sys.executable, "-c", program, "merge", str(other), "--out", str(out), "--overwrite"],
        env=os.environ,
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert len(list(tmp_path.glob(".plain.*"))) == 1
    assert tanzaku("merge", other, "--out", out, "--overwrite").code == 0
    assert not list(tmp_path.glob(".plain.*"))
    assert_close(logits_of(read(out), out), routed(model_dir, other))


@pytest.mark.slow
def test_the_embedded_model(tmp_path: Path, tanzaku: Tanzaku) -> None:
    """A GGUF has no type of its own, so it is merged in full; its activations are beyond float16, and that is said."""
    adapter = trained(Path("embedded"), tmp_path / "adapter", tz.LoRA(r=2), scale=0.02)
    refused = tanzaku("merge", adapter, "--out", tmp_path / "half", "--dtype", "float16")
    assert refused.code == 2 and "'embedded' in float16 gives numbers that are not finite" in refused.err, refused.err
    assert not (tmp_path / "half").exists()


@pytest.mark.product
@pytest.mark.slow
def test_the_embedded_model_in_either_type(tmp_path: Path, tanzaku: Tanzaku) -> None:
    adapter = trained(Path("embedded"), tmp_path / "adapter", tz.LoRA(r=2), scale=0.02)
    said = tanzaku("merge", adapter, "--out", tmp_path / "brief", "--dtype", "bfloat16")
    assert said.code == 0 and "rounding to bfloat16 lost" in said.err, said.err
    assert read(tmp_path / "brief").dtype == torch.bfloat16
    assert tanzaku("merge", adapter, "--out", tmp_path / "full").code == 0
    full = read(tmp_path / "full")
    assert full.dtype == torch.float32
    model = classifier(Path("embedded"))
    tz.load(model, adapter, "mine")
    with tz.route(model, ["mine"] * len(TEXTS)):
        expected = logits_of(model, tmp_path / "full")
    assert_close(logits_of(full, tmp_path / "full"), expected, GRADIENT)
