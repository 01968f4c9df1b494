"""`tanzaku export`: GGUF files and a Modelfile, from adapters of Tanzaku's and of HF PEFT's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from cli_kit import Tanzaku, assert_refused

import tanzaku as tz
from llama_cpp import PROMPT, LlamaCpp, by_ollama, byte_level, continued, unspoken
from models import tiny
from tanzaku.cli import main


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer.save_pretrained(path)
    tiny("llama", "lm", vocab_size=len(tokenizer)).save_pretrained(path)
    return path


def saved(base: Path, path: Path, method: tz.Method) -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    adapter = tz.attach(model, method, "a", seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in adapter.trained():
        parameter.data.normal_(std=0.3, generator=generator)
    return tz.save(model, "a", path)


def expected(base: Path, adapter: Path) -> str:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    tz.load(model, adapter, "a")
    tz.activate(model, "a")
    return continued(model, byte_level(), PROMPT, 8)


def test_an_adapter_beside_its_base(base: Path, tmp_path: Path, tanzaku: Tanzaku) -> None:
    adapter = saved(base, tmp_path / "my adapter", tz.LoRA(r=2))
    out = tmp_path / "out"
    said = tanzaku("export", adapter, "--out", out, "--with-base", "--outtype", "f32")
    assert said.code == 0, said.err
    assert sorted(file.name for file in out.iterdir()) == ["Modelfile", "base.gguf", "my-adapter.gguf"]
    running = LlamaCpp(out / "base.gguf", out / "my-adapter.gguf")
    assert running.text(PROMPT, 8, unspoken(byte_level(), 320)) == expected(base, adapter)
    lines = (out / "Modelfile").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["FROM ./base.gguf", "ADAPTER ./my-adapter.gguf"]
    assert lines[-1] == 'PARAMETER stop "</s>"'
    # A second adapter shares the base that is there.
    other = saved(base, tmp_path / "other", tz.LoRA(r=3))
    before = (out / "base.gguf").stat().st_mtime_ns
    assert_refused(tanzaku("export", other, "--out", out, "--with-base"), "Modelfile", "--overwrite")
    assert tanzaku("export", other, "--out", out, "--with-base", "--overwrite").code == 0
    assert (out / "base.gguf").stat().st_mtime_ns == before and (out / "other.gguf").exists()


def test_merged(base: Path, tmp_path: Path, tanzaku: Tanzaku) -> None:
    adapter = saved(base, tmp_path / "ia3", tz.IA3())
    assert_refused(tanzaku("export", adapter, "--out", tmp_path / "a.gguf"), "ia3", "--merged")
    said = tanzaku("export", adapter, "--out", tmp_path / "a.gguf", "--merged", "--outtype", "f32")
    assert said.code == 0, said.err
    assert LlamaCpp(tmp_path / "a.gguf").text(PROMPT, 8, unspoken(byte_level(), 320)) == expected(base, adapter)
    assert "</s>" in gguf.GGUFReader(tmp_path / "a.gguf").fields["tokenizer.chat_template"].contents()
    assert tanzaku("export", adapter, "--out", tmp_path / "dir", "--merged").code == 0
    assert (tmp_path / "dir" / "Modelfile").read_text(encoding="utf-8").startswith("FROM ./ia3.gguf\nTEMPLATE ")


def test_an_adapter_of_peft(base: Path, tmp_path: Path, tanzaku: Tanzaku) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "peft")
    said = tanzaku("export", tmp_path / "peft", "--out", tmp_path / "p.gguf", "--model", base)
    assert said.code == 0, said.err
    assert len(gguf.GGUFReader(tmp_path / "p.gguf").tensors) == 4


def test_refused(base: Path, tmp_path: Path, work: Path, tanzaku: Tanzaku) -> None:
    adapter = saved(base, tmp_path / "lora", tz.LoRA(r=2))
    out = tmp_path / "a.gguf"
    assert_refused(tanzaku("export", tmp_path / "lorra", "--out", out), "there is no adapter", "did you mean 'lora'")
    assert_refused(tanzaku("export", adapter, "--out", out, "--outtype", "q4_k"), "'q4_k'", "f32, f16, bf16, q8_0")
    assert_refused(tanzaku("export", adapter, "--out", out, "--with-base"), "expected a directory")
    assert_refused(tanzaku("export", adapter, "--out", tmp_path / "d", "--with-base", "--merged"), "choose one")
    prompt = saved(base, tmp_path / "prompt", tz.PromptTuning(num_virtual_tokens=2))
    for flags in ([], ["--merged"]):
        assert_refused(tanzaku("export", prompt, "--out", out, *flags), "prompt_tuning", "no change of weights")
    assert tanzaku("train", "recipe.yaml", "--out", "run", "--epochs", "1").code == 0
    card = (work / "run" / "adapters" / "lora" / "README.md").read_text(encoding="utf-8")
    assert "| train | 6 | train.tsv |" in card and "| test | " in card and str(work) not in card
    for flags in ([], ["--merged"]):
        assert_refused(tanzaku("export", "run/adapters/lora", "--out", out, *flags), "no classification head")
    assert not out.exists()


# -- text that a run learnt to write, in llama.cpp

CHATS = {"Say hello.": "the old pond", "Where is it?": "under trees", "What sound?": "the sound of water"}
ROWS = {
    "pairs": [{"prompt": asked, "completion": f" {said}"} for asked, said in CHATS.items()],
    "chat": [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in CHATS.items()
    ],
}


@pytest.fixture(scope="module", params=ROWS)
def learnt(
    request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, list[str]]:
    """The shape of rows, the adapter that a run learnt on them, and what `tanzaku predict` writes with it."""
    work = tmp_path_factory.mktemp(request.param)
    for name, rows in (("train", ROWS[request.param]), ("asked", [_asked(row) for row in ROWS[request.param]])):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (work / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    flags = ["--model", base, "--task", "generation", "--train", work / "train.jsonl", "--method", "lora"]
    flags += ["--set", "r=16", "--set", "target_modules=all-linear", "--epochs", "150", "--learning-rate", "1e-2"]
    flags += ["--batch-size", "3", "--max-new-tokens", "16", "--out", work / "run", "--show", "0"]
    assert main(["train", *map(str, flags)]) == 0
    adapter = work / "run" / "adapters" / "lora"
    out = work / "written.jsonl"
    assert main(["predict", str(adapter), "--data", str(work / "asked.jsonl"), "--out", str(out)]) == 0
    written = [json.loads(line)["predicted"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert written == [*CHATS.values()]  # so it is not the base's
    return request.param, adapter, written


def _asked(row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": row["messages"][:1]} if "messages" in row else {"prompt": row["prompt"]}


def by_llama_cpp(running: LlamaCpp, shape: str) -> list[str]:
    """What is written for each row, by the chat template in the file where it is a conversation."""
    if shape == "pairs":
        return [running.text(asked, 16, []).strip() for asked in CHATS]
    return [running.chat([{"role": "user", "content": asked}], 16).strip() for asked in CHATS]


def test_an_adapter_writes_the_same_in_llama_cpp(
    learnt: tuple[str, Path, list[str]], tmp_path: Path, tanzaku: Tanzaku
) -> None:
    shape, adapter, written = learnt
    said = tanzaku("export", adapter, "--out", tmp_path, "--with-base")
    assert said.code == 0, said.err
    assert by_llama_cpp(LlamaCpp(tmp_path / "base.gguf", tmp_path / "lora.gguf"), shape) == written
    assert by_llama_cpp(LlamaCpp(tmp_path / "base.gguf"), shape) != written
    # As Ollama would write the prompt, by the Modelfile's template.
    text = (tmp_path / "Modelfile").read_text(encoding="utf-8")
    [template] = re.findall('TEMPLATE """(.*?)"""', text, re.S)
    if shape == "chat":
        running = LlamaCpp(tmp_path / "base.gguf", tmp_path / "lora.gguf")
        asked = [by_ollama(template, "", prompt) for prompt in CHATS]
        assert [running.text(prompt, 16, []).strip() for prompt in asked] == written


def test_a_merged_model_writes_the_same_in_llama_cpp(
    learnt: tuple[str, Path, list[str]], tmp_path: Path, tanzaku: Tanzaku
) -> None:
    """Merged while it is exported, or before, to a directory of its own."""
    shape, adapter, written = learnt
    assert tanzaku("export", adapter, "--out", tmp_path / "one.gguf", "--merged").code == 0
    assert tanzaku("merge", adapter, "--out", tmp_path / "plain").code == 0
    said = tanzaku("export", tmp_path / "plain", "--out", tmp_path / "two")
    assert said.code == 0, said.err
    assert sorted(file.name for file in (tmp_path / "two").iterdir()) == ["Modelfile", "plain.gguf"]
    assert (tmp_path / "two" / "Modelfile").read_text(encoding="utf-8").startswith("FROM ./plain.gguf\nTEMPLATE ")
    for file in (tmp_path / "one.gguf", tmp_path / "two" / "plain.gguf"):
        assert by_llama_cpp(LlamaCpp(file), shape) == written


def test_whole_models_that_are_refused(base: Path, tmp_path: Path, tanzaku: Tanzaku) -> None:
    out = tmp_path / "a.gguf"
    assert_refused(tanzaku("export", base, "--out", out, "--merged"), "--merged is for adapters", "a whole model")
    assert_refused(tanzaku("export", base, "--out", out, "--model", base), "--model is for adapters")
    tiny("llama", "cls", vocab_size=320).save_pretrained(tmp_path / "classifier")
    byte_level().save_pretrained(tmp_path / "classifier")
    assert_refused(tanzaku("export", tmp_path / "classifier", "--out", out), "no classification head")
    assert not out.exists()
