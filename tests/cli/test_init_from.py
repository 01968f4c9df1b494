"""`init_from`: a candidate goes on from a saved adapter, on new rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_kit import ROWS, Tanzaku, assert_refused, results_of, write_tsv
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from close import RUN, close
from tanzaku.storage.store import checksum, read_meta


@pytest.fixture
def first(work: Path, tanzaku: Tanzaku) -> Path:
    """An adapter that was trained on other rows."""
    write_tsv(work / "old.tsv", [(f"of {text}", label) for text, label in ROWS])
    said = tanzaku("train", "recipe.yaml", "--train", "old.tsv", "--out", "first")
    assert said.code == 0, said.err
    return work / "first/adapters/lora"


def write_recipe(work: Path, *methods: Any, **changes: Any) -> None:
    found = yaml.safe_load((work / "recipe.yaml").read_text(encoding="utf-8"))
    (work / "recipe.yaml").write_text(yaml.safe_dump({**found, "methods": list(methods), **changes}), encoding="utf-8")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


STILL = ["--epochs", "1", "--learning-rate", "1e-12"]


@pytest.mark.parametrize("how", ["flag", "flag and method", "recipe"])
def test_it_begins_with_the_adapter(how: str, first: Path, work: Path, tanzaku: Tanzaku) -> None:
    if how == "recipe":
        write_recipe(work, {"lora": {"r": 2}, "init_from": "first/adapters/lora"})  # beside the recipe
    elif how == "flag":
        write_recipe(work)
    flags = [] if how == "recipe" else ["--init-from", "first/adapters/lora"]
    said = tanzaku("train", "recipe.yaml", *flags, *STILL, "--out", "run")
    assert said.code == 0, said.err
    assert "new head" not in said.out
    kept, found = tensors(first), tensors(work / "run/adapters/lora")
    assert kept.keys() == found.keys() and all(close(found[key], kept[key], RUN) for key in kept)
    expected = {"adapter": "lora", "sha256": checksum(first)}
    assert read_meta(work / "run/adapters/lora")["init_from"] == expected
    assert results_of(work / "run")["jobs"][0]["init_from"] == expected
    assert expected["sha256"] in (work / "run/adapters/lora/README.md").read_text(encoding="utf-8")
    said = tanzaku("train", "recipe.yaml", *flags, "--out", "more")
    assert said.code == 0, said.err
    assert not close(tensors(work / "more/adapters/lora"), kept, RUN)


def test_in_a_comparison_with_folds_and_search(first: Path, work: Path, tanzaku: Tanzaku) -> None:
    """Beside others; of what goes on, only the learning rate is drawn."""
    on = {"lora": None, "name": "on", "init_from": str(first)}
    write_recipe(work, on, {"lora": {"r": 2}}, {"ia3": None})
    options = ["--folds", "2", "--trials", "2", "--workers", "1", "--finalists", "3", "--out", "run"]
    said = tanzaku("compare", "recipe.yaml", *options)
    assert said.code == 0, said.err
    results = results_of(work / "run")
    [search] = [each for each in results["search"] if each["entry"] == "on"]
    assert search["space"].keys() == {"learning_rate"}
    [own] = [each for each in results["candidates"] if each["name"].startswith("on-")]
    assert own["method_settings"]["r"] == 2
    if own["adapter"]:
        assert read_meta(work / "run" / own["adapter"])["init_from"]["sha256"] == checksum(first)
    on["lora"] = {"r": {"grid": [2, 4]}}
    write_recipe(work, on)
    assert_refused(tanzaku("compare", "recipe.yaml"), "'on'", "r has a grid", "train section")
    write_recipe(work, {**on, "lora": None, "train": {"learning_rate": {"grid": [1e-3, 1e-2]}}})
    said = tanzaku("compare", "recipe.yaml", "--seeds", "2", "--workers", "1", "--out", "grid")
    assert said.code == 0 and len(results_of(work / "grid")["candidates"]) == 2, said.err


def test_interrupted_and_resumed(first: Path, work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    from tanzaku.cli.display import Display

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    flags = ["train", "recipe.yaml", "--init-from", "first/adapters/lora", "--out"]
    assert tanzaku(*flags, "whole").code == 0
    with monkeypatch.context() as patch:
        patch.setattr(Display, "epoch_done", stop)
        assert tanzaku(*flags, "run").code == 130
    shutil.copytree(first, "kept")
    about = json.loads((first / "tanzaku.json").read_text(encoding="utf-8"))
    (first / "tanzaku.json").write_text(json.dumps({**about, "meta": {**about["meta"], "max_length": 9}}))
    assert_refused(tanzaku("train", "--resume", "--out", "run"), "adapter of lora has changed")
    shutil.rmtree(first)
    shutil.copytree("kept", first)
    said = tanzaku("train", "--resume", "--out", "run")
    assert said.code == 0, said.err
    assert close(tensors(work / "run/adapters/lora"), tensors(work / "whole/adapters/lora"), RUN)


def test_other_labels_have_a_new_head(first: Path, work: Path, tanzaku: Tanzaku) -> None:
    kept = tensors(first)
    for rows, said_of in ((lambda label: label.upper(), "HARSH, MILD"), (lambda label: f"{label}{len(label)}", "")):
        for split in ("train", "valid", "test"):
            before = {"train": "", "valid": "the ", "test": "a "}[split]
            write_tsv(work / f"{split}.tsv", [(before + text, rows(label)) for text, label in ROWS])
        said = tanzaku("train", "recipe.yaml", "--init-from", first, *STILL, "--out", "run", "--overwrite")
        assert said.code == 0, said.err
        [line] = [line for line in said.out.splitlines() if "with a new head" in line]
        assert line.startswith("lora goes on from") and "labels harsh, mild" in line and said_of in line
        found = tensors(work / "run/adapters/lora")
        own = {key for key in found if key.endswith("score.weight")}
        assert own and not any(close(found[key], kept[key], RUN) for key in own)
        assert all(close(found[key], kept[key], RUN) for key in kept.keys() - own)


def test_from_another_task_and_from_hf_peft(first: Path, work: Path, tanzaku: Tanzaku, model_dir: Path) -> None:
    """Classes after tags, tags after classes, and an adapter of a language model, which has no head."""
    from peft import LoraConfig, get_peft_model

    line = json.dumps({"words": ["warm", "sea"], "tags": ["B-x", "O"]})
    Path("tags.jsonl").write_text(f"{line}\n{line.replace('warm', 'cold')}\n", encoding="utf-8")
    tags = ["train", "--model", model_dir, "--task", "tokens", "--train", "tags.jsonl", *STILL, "--out"]
    said = tanzaku(*tags, "tags", "--init-from", first)
    assert said.code == 0, said.err
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), LoraConfig(r=3, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(work / "theirs")
    for folder in (work / "tags/adapters/lora", work / "theirs"):
        said = tanzaku("train", "recipe.yaml", "--set", "lora.r=2", "--init-from", folder, *STILL, "--out", folder.name)
        if folder.name == "theirs":
            assert_refused(said, "r is 2", "has 3")
            write_recipe(work)
            said = tanzaku("train", "recipe.yaml", "--init-from", folder, *STILL, "--out", "from-theirs")
        assert said.code == 0, said.err
        assert "with a new head" in said.out
    kept, found = tensors(work / "theirs"), tensors(work / "from-theirs/adapters/lora")
    assert len(kept) > 3 and all(close(found[key], kept[key], RUN) for key in kept)
    config = json.loads((work / "from-theirs/adapters/lora/adapter_config.json").read_text(encoding="utf-8"))
    assert config["task_type"] == "SEQ_CLS"


def test_a_language_model_keeps_the_head_that_was_saved(work: Path, tanzaku: Tanzaku, model_dir: Path) -> None:
    """HF PEFT's, which says nothing of its rows: the head is the base's own, and what was trained of it is kept."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(work / "theirs")
    rows = "".join(json.dumps({"prompt": text, "completion": " warm"}) + "\n" for text, _ in ROWS)
    Path("rows.jsonl").write_text(rows, encoding="utf-8")
    flags = ["--model", model_dir, "--task", "generation", "--train", "rows.jsonl", *STILL, "--out", "run"]
    said = tanzaku("train", *flags, "--init-from", "theirs")
    assert said.code == 0 and "new head" not in said.out and "without its head" not in said.out, said.err
    kept, [folder] = tensors(work / "theirs"), (work / "run/adapters").iterdir()
    found = tensors(folder)
    assert any("lm_head" in key for key in kept)
    assert kept.keys() == found.keys() and all(close(found[key], kept[key], RUN) for key in kept)


def test_what_a_classifier_began_goes_on_without_its_head(first: Path, work: Path, tanzaku: Tanzaku) -> None:
    rows = "".join(json.dumps({"prompt": text, "completion": " warm"}) + "\n" for text, _ in ROWS)
    Path("rows.jsonl").write_text(rows, encoding="utf-8")
    model = yaml.safe_load(Path("recipe.yaml").read_text(encoding="utf-8"))["model"]
    flags = ["--model", model, "--task", "generation", "--train", "rows.jsonl", *STILL, "--out", "run"]
    said = tanzaku("train", *flags, "--init-from", first)
    assert said.code == 0, said.err
    assert "without its head: that one has labels harsh, mild, and these rows have completions" in said.out


def test_what_it_cannot_go_on_from(first: Path, work: Path, tanzaku: Tanzaku, model_dir: Path) -> None:
    def refused(*parts: str, flags: tuple[Any, ...] = (), start: Any = first) -> None:
        said = tanzaku("train", "recipe.yaml", "--init-from", start, *flags, "--out", "run")
        assert_refused(said, *parts)
        assert "model:" not in said.out and not Path("run").exists()

    refused("'lora'", "nowhere is no directory", start="nowhere")
    refused("'lora'", "has no adapter_config.json", "it is a model's", start=model_dir)
    refused("'ia3'", "its method is ia3", "adapter of lora", str(first), flags=("--method", "ia3"))
    refused("'lora'", "r is 4", "has 2", flags=("--set", "r=4"))
    refused("--init-from is of one candidate", flags=("--method", "lora", "--method", "ia3"))
    # Another base: of another kind, of another size, with other modules, with other weights.
    for change, found in (({"hidden_size": 8, "intermediate_size": 16}, "(2, 16), expected (2, 8)"), ({}, "")):
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig.from_pretrained(model_dir)
        config.update(change)
        shutil.copytree(model_dir, "other", dirs_exist_ok=True)
        torch.manual_seed(5)
        LlamaForCausalLM(config).save_pretrained("other")
        flags = ("--model", "other")
        if found:
            refused("'lora'", "does not fit this model", found, flags=flags)
        else:  # which only its weights tell
            said = tanzaku("train", "recipe.yaml", "--init-from", first, *flags, "--out", "run")
            assert_refused(said, "'lora'", "made for a base with other weights")
            assert not Path("run").exists()
    shutil.copytree(first, "broken")
    found = json.loads(Path("broken/adapter_config.json").read_text(encoding="utf-8"))
    Path("broken/adapter_config.json").write_text(json.dumps({**found, "target_modules": ["w_q"]}), encoding="utf-8")
    refused("'lora'", "w_q", start="broken")
    data = Path("broken/adapter_model.safetensors").read_bytes()
    Path("broken/adapter_model.safetensors").write_bytes(data[:-4] + b"\1\2\3\4")
    shutil.copy(first / "adapter_config.json", "broken")
    refused("'lora'", "damaged", start="broken")


def test_it_is_not_overwritten_by_the_run_that_reads_it(first: Path, tanzaku: Tanzaku) -> None:
    said = tanzaku("train", "recipe.yaml", "--init-from", first, "--out", "first", "--overwrite")
    assert_refused(said, "--overwrite would remove", "choose another --out")
    assert first.is_dir()


def test_what_is_made_of_others_is_not_gone_on_from(first: Path, work: Path, tanzaku: Tanzaku) -> None:
    two = {"lora": {"r": 3}, "name": "two"}
    write_recipe(work, {"lora": {"r": 2}}, two, {"average": None, "uses": ["lora", "two"]})
    said = tanzaku("compare", "recipe.yaml", "--seeds", "1", "--workers", "1", "--out", "made")
    assert said.code == 0, said.err
    write_recipe(work)
    said = tanzaku("train", "recipe.yaml", "--init-from", "made/adapters/average", "--out", "run")
    assert_refused(said, "average", "made of others")
