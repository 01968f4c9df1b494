"""Bad input: one line that says what was found and how to mend it, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_kit import Said, Tanzaku, assert_refused, write_tsv
from transformers import AutoConfig, AutoModel


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda work: (work / name).write_bytes(content)


def _nothing(work: Path) -> None:
    pass


ABSENT = "cuda" if sys.platform == "darwin" else "mps"
HEAD = b"text\tlabel\n"
BAD: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "missing data file": (_nothing, ["--train", "tarin.tsv"], ["no file tarin.tsv", "did you mean 'train.tsv'"]),
    "empty data file": (_write("train.tsv", b""), [], ["train.tsv is empty"]),
    "header alone": (_write("valid.tsv", HEAD), [], ["valid.tsv", "no rows"]),
    "missing column": (_nothing, ["--text", "txt"], ["no column 'txt'", "did you mean 'text'", "text, label"]),
    "missing label column": (_nothing, ["--label", "class"], ["no column 'class'", "text, label"]),
    "unseen label": (_write("valid.tsv", HEAD + b"rain\tsoft\n"), [], ["'soft' in valid.tsv row 1", "harsh, mild"]),
    "one class only": (_write("train.tsv", HEAD + b"rain\tmild\nsea\tmild\n"), [], ["only the label 'mild'"]),
    "no label": (_write("train.tsv", HEAD + b"rain\tmild\nsea\t\n"), [], ["train.tsv row 2 has no label"]),
    "broken line": (_write("train.tsv", HEAD + b"rain\n"), [], ["train.tsv line 2", "found 1, expected 2"]),
    "open quote": (_write("train.tsv", HEAD + b'"rain\tmild\n'), [], ["train.tsv line 2", "never closed"]),
    "text without tokens": (_write("test.tsv", HEAD + b"  \tmild\n"), [], ["test.tsv row 1", "no tokens"]),
    "wrong encoding": (
        _write("train.tsv", HEAD + "東京\tmild\n".encode("shift_jis")),
        [],
        ["train.tsv is not UTF-8 at line 2", "cp932 or cp1252", "--encoding"],
    ),
    "target that matches nothing": (_nothing, ["--set", "target_modules=[q_prj]"], ["'lora'", "q_prj"]),
    "rank 0": (_nothing, ["--set", "r=0"], ["r=0", "1 or more"]),
    "too many virtual tokens": (
        _nothing,
        ["--method", "prompt_tuning", "--set", "num_virtual_tokens=64"],
        ["64 virtual tokens", "64 positions"],
    ),
    "unknown method": (_nothing, ["--method", "lorra"], ["unknown method 'lorra'", "did you mean 'lora'"]),
    "unknown setting": (_nothing, ["--set", "rr=1"], ["no setting 'rr'", "did you mean 'r'"]),
    "bad value": (_nothing, ["--batch-size", "two"], ["--batch-size is 'two'", "integer"]),
    "unknown acceleration": (
        _nothing,
        ["--accelerations", "no-packing,no-nroms"],
        ["--accelerations: found 'no-nroms'", "auto, none", "packing, row_attention", "did you mean 'no-norms'"],
    ),
    "accelerations of two kinds": (
        _nothing,
        ["--accelerations", "packing,no-norms"],
        ["--accelerations: found 'packing' beside names with no-"],
    ),
    "an acceleration without the one it is within": (
        _nothing,
        ["--accelerations", "row_attention"],
        ["--accelerations: found row_attention without packing", "add packing"],
    ),
    "two methods": (_nothing, ["--method", "lora", "--method", "ia3"], ["one method", "lora, ia3", "compare"]),
    "no model": (_nothing, ["--model", "./nowhere"], ["no model at './nowhere'"]),
    "model without a tokenizer": (_nothing, ["--model", "bare"], ["'bare' has no tokenizer"]),
    "no room for text": (_nothing, ["--max-length", "0"], ["--max-length is '0'"]),
    "patience without validation": (
        lambda work: write_recipe(work, data={"train": "train.tsv"}),
        ["--patience", "1"],
        ["'lora'", "patience needs validation rows"],
    ),
    "output is a file": (_nothing, ["--out", "recipe.yaml"], ["recipe.yaml is a file"]),
    "output below a file": (_nothing, ["--out", "recipe.yaml/run"], ["cannot write recipe.yaml/run", "another --out"]),
    "device that is not there": (_nothing, ["--device", ABSENT], [f"device '{ABSENT}' is not there", "cpu"]),
}


def write_recipe(work: Path, **changes: Any) -> None:
    recipe = yaml.safe_load((work / "recipe.yaml").read_text(encoding="utf-8")) | changes
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


@pytest.mark.parametrize("name", BAD)
def test_bad_input(work: Path, model_dir: Path, tanzaku: Tanzaku, name: str) -> None:
    break_it, flags, says = BAD[name]
    shutil.copytree(model_dir, work / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    break_it(work)
    before = sorted(work.rglob("*"))
    assert_refused(tanzaku("train", "recipe.yaml", *flags), *says)
    assert sorted(work.rglob("*")) == before


def test_bad_data_is_told_before_anything_is_loaded(
    work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("tanzaku.models.loading.load_tokenizer", load)
    monkeypatch.setattr("tanzaku.models.loading.load_classifier", load)
    assert_refused(tanzaku("train", "recipe.yaml", "--out", "recipe.yaml"), "is a file")
    write_tsv(work / "test.tsv", [("rain", "soft")])
    assert_refused(tanzaku("train", "recipe.yaml"), "'soft'")


def test_the_last_candidate_is_checked_before_the_first_is_trained(work: Path, tanzaku: Tanzaku) -> None:
    flags = ["--method", "head", "--method", "lora", "--set", "lora.target_modules=[q_prj]"]
    said = tanzaku("compare", "recipe.yaml", *flags)
    assert_refused(said, "candidate 'lora'", "q_prj")
    assert "head" not in said.out


def test_a_run_is_not_overwritten_unless_asked(work: Path, tanzaku: Tanzaku) -> None:
    assert tanzaku("train", "recipe.yaml", "--out", "run").code == 0
    assert_refused(tanzaku("train", "recipe.yaml", "--out", "run"), "run is not empty", "--overwrite")
    said = tanzaku("train", "recipe.yaml", "--method", "head", "--out", "run", "--overwrite")
    assert (said.code, [path.name for path in (work / "run" / "adapters").iterdir()]) == (0, ["head"])
    (work / "mine").mkdir()
    (work / "mine" / "adapters").write_text("precious", encoding="utf-8")
    assert_refused(tanzaku("train", "recipe.yaml", "--out", "mine", "--overwrite"), "no run")
    assert (work / "mine" / "adapters").is_file()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_a_finished_run_whose_results_are_damaged_is_overwritten(work: Path, tanzaku: Tanzaku, content: bytes) -> None:
    assert tanzaku("train", "recipe.yaml", "--out", "run").code == 0
    (work / "run" / "results.json").write_bytes(content)
    said = tanzaku("train", "recipe.yaml", "--method", "head", "--out", "run", "--overwrite")
    assert (said.code, [path.name for path in (work / "run" / "adapters").iterdir()]) == (0, ["head"])
    (work / "mine").mkdir()
    (work / "mine" / "results.json").write_bytes(content)  # of another program
    said = tanzaku("train", "recipe.yaml", "--out", "mine", "--overwrite")
    assert_refused(said, "no run", "choose another --out, or empty it")
    assert (work / "mine" / "results.json").read_bytes() == content


def test_a_task_that_is_not_what_is_trained(work: Path, tanzaku: Tanzaku) -> None:
    for task in ("CAUSAL_LM", "FOO"):
        said = tanzaku("train", "recipe.yaml", "--set", f"task_type={task}", "--out", "run")
        assert_refused(said, f"candidate 'lora': task_type is '{task}'", "expected 'SEQ_CLS'")
    assert tanzaku("train", "recipe.yaml", "--set", "task_type=SEQ_CLS", "--out", "run").code == 0


def test_a_folder_of_something_else_is_spared_at_once(work: Path, tanzaku: Tanzaku) -> None:
    """And not first offered to be overwritten."""
    (work / "mine").mkdir()
    (work / "mine" / "letter.txt").write_text("dear", encoding="utf-8")
    said = tanzaku("train", "recipe.yaml", "--out", "mine")
    assert_refused(said, "mine holds files but no run; choose another --out")
    assert "--overwrite" not in said.err
    assert_refused(tanzaku("train", "recipe.yaml", "--out", "mine", "--overwrite"), "so --overwrite spares it")


def test_a_current_directory_that_is_gone(work: Path, tanzaku: Tanzaku) -> None:
    (work / "gone").mkdir()
    os.chdir(work / "gone")
    (work / "gone").rmdir()
    try:
        assert_refused(tanzaku("methods"), "the current directory is gone")
    finally:
        os.chdir(work)


@pytest.mark.parametrize(
    ("settings", "name", "expected"),
    [
        (
            {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            "春.tsv",
            "is not text in ascii, which this",
        ),
        ({"PYTHONUTF8": "1"}, os.fsdecode(b"a\xff.tsv"), "a\\xff.tsv is not text in utf-8"),
        ({"PYTHONOPTIMIZE": "2"}, "a.tsv", "Python leaves out docstrings (-OO"),
    ],
)
def test_surroundings_in_which_nothing_runs(settings: dict[str, str], name: str, expected: str) -> None:
    command = [sys.executable, "-m", "tanzaku", "check", name]
    said = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert_refused(Said(said.returncode, said.stdout, said.stderr), expected)


NUMBERS = {
    "warmup": (["inf", "nan", "-1"], "--warmup is"),
    "weight_decay": (["inf", "nan", "-1"], "--weight-decay is"),
    "learning_rate": (["inf", "nan", "0"], "--learning-rate is"),
    "max_grad_norm": (["inf", "nan"], "--max-grad-norm is"),
    "adam_epsilon": (["inf", "nan"], "--adam-epsilon is"),
    "adam_beta1": (["nan", "1"], "--adam-beta1 is"),
    "adam_beta2": (["nan", "1"], "--adam-beta2 is"),
    "seed": (["99999999999999999999", str(-(2**63)), "0.5"], "--seed is"),
}


@pytest.mark.parametrize("verb", ["train", "compare"])
@pytest.mark.parametrize(("key", "value"), [(key, value) for key, (values, _) in NUMBERS.items() for value in values])
def test_numbers_that_cannot_be(work: Path, tanzaku: Tanzaku, verb: str, key: str, value: str) -> None:
    says = NUMBERS[key][1]
    assert_refused(tanzaku(verb, "recipe.yaml", says.split()[0], value), says, "expected")
    recipe = yaml.safe_load((work / "recipe.yaml").read_text(encoding="utf-8"))
    number = float(value) if value in ("inf", "nan", "0.5") else int(value)
    write_recipe(work, train={**recipe["train"], key: number})
    assert_refused(tanzaku(verb, "recipe.yaml"), f"recipe.yaml: train.{key} is", "expected")


@pytest.mark.parametrize("rank", [10**7, 10**9, 10**13, 10**30])
def test_ranks_that_no_machine_has_room_for(
    work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr("tanzaku.engine.memory.free", lambda: 10**10)
    for verb in ("train", "compare"):
        said = tanzaku(verb, "recipe.yaml", "--set", f"r={rank}", "--out", "run")
        assert_refused(said, f"candidate 'lora': r={rank}: ")
        assert "GB" in said.err or "too large" in said.err
        assert not (work / "run").exists()


def test_other_sizes_that_no_machine_has_room_for(work: Path, tanzaku: Tanzaku) -> None:
    for method, key in (("p_tuning", "encoder_hidden_size"), ("llama_adapter", "adapter_len"), ("adalora", "init_r")):
        said = tanzaku("train", "recipe.yaml", "--method", method, "--set", f"{key}={10**15}")
        assert_refused(said, f"candidate '{method}': ", str(10**15))


def test_a_text_as_target_is_a_pattern(work: Path, tanzaku: Tanzaku) -> None:
    said = tanzaku("train", "recipe.yaml", "--set", "target_modules=q_proj")
    assert_refused(said, "'q_proj' matches no module", "a text is a pattern for a whole path, so write [q_proj]")
    assert "did you mean" not in said.err
    assert tanzaku("train", "recipe.yaml", "--set", "target_modules=[q_proj]").code == 0


def small(model_dir: Path, path: Path, kind: str, **settings: Any) -> Path:
    """A model of another kind with the tokenizer of the first."""
    shutil.copytree(model_dir, path, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 14, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **sizes | settings)
    AutoModel.from_config(config).save_pretrained(path)
    return path


# Kinds of positions, and how many tokens a row may have where the config says 8.
POSITIONS = {"llama": 8, "bert": 8, "gpt2": 8, "opt": 8, "roberta": 7}


@pytest.mark.parametrize("kind", POSITIONS)
def test_rows_longer_than_the_model_reads(work: Path, model_dir: Path, tanzaku: Tanzaku, kind: str) -> None:
    room = POSITIONS[kind]
    own = {"intermediate_size": 32, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 8}
    small(model_dir, work / "small", kind, **own)
    flags = ["train", "recipe.yaml", "--model", "small", "--out", "run", "--overwrite"]
    write_tsv(work / "valid.tsv", [("sea", "mild"), ("sea " * (room + 1), "harsh")])
    said = tanzaku(*flags, "--max-length", "99")
    assert_refused(said, f"valid.tsv row 2 has {room + 1} tokens at max_length 99, and the model {room} positions")
    assert f"use --max-length {room}" in said.err
    assert tanzaku(*flags, "--max-length", room).code == 0
    prompts = ["--method", "prompt_tuning", "--set", "num_virtual_tokens=3"]
    assert_refused(tanzaku(*flags, *prompts, "--max-length", room), "3 virtual ones", f"--max-length {room - 3}")
    said = tanzaku("predict", "run/adapters/lora", "--data", "valid.tsv", "--max-length", room + 1)
    assert_refused(said, f"valid.tsv row 2 has {room + 1} tokens", f"{room} positions")


def test_models_that_know_distances_alone_read_on(work: Path, model_dir: Path, tanzaku: Tanzaku) -> None:
    small(model_dir, work / "small", "t5", d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, n_positions=8)
    write_tsv(work / "train.tsv", [("sea " * 9, "mild"), ("cold " * 9, "harsh"), ("rain", "mild")])
    for name in ("valid", "test"):
        shutil.copy(work / "train.tsv", work / f"{name}.tsv")
    said = tanzaku("train", "recipe.yaml", "--model", "small", "--max-length", "12")
    assert "positions" not in said.err


def test_a_tokenizer_of_another_model(work: Path, model_dir: Path, tanzaku: Tanzaku) -> None:
    sizes = {"intermediate_size": 32, "max_position_embeddings": 64}
    small(model_dir, work / "small", "llama", vocab_size=9, **sizes)
    said = tanzaku("train", "recipe.yaml", "--model", "small")
    assert_refused(said, "train.tsv row 1 has token number 12, and the model knows 9 tokens", "tokenizer")


def test_trackers(work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    assert_refused(tanzaku("train", "recipe.yaml", "--tracker", "wandb"), "'wandb' is not installed: pip install wandb")
    assert_refused(tanzaku("train", "recipe.yaml", "--tracker", "comet_ml"), "pip install comet-ml")
    assert_refused(tanzaku("train", "recipe.yaml", "--tracker", "wandbb"), "did you mean 'wandb'", "tensorboard")


def test_labels_of_few_rows_in_folds(work: Path, tanzaku: Tanzaku) -> None:
    write_tsv(work / "train.tsv", [("sea", "mild"), ("rain", "mild"), ("cold sea", "mild"), ("wind", "harsh")])
    write_recipe(work, data={"train": "train.tsv"})
    said = tanzaku("compare", "recipe.yaml", "--folds", "2")
    assert_refused(said, "label 'harsh' has 1 row, too few for 2 folds; add rows of it, or leave it out")
    assert "model:" not in said.out  # which may take minutes
    texts = {"mild": ("sea", "warm sea"), "harsh": ("wind", "cold wind")}
    write_tsv(work / "train.tsv", [(text, label) for label, own in texts.items() for text in own])
    assert_refused(
        tanzaku("compare", "recipe.yaml", "--folds", "3", "--out", "other"), "has 2 rows", "use --folds 2 or fewer"
    )
    assert tanzaku("compare", "recipe.yaml", "--folds", "2", "--epochs", "1", "--seed", 2**40).code == 0


def test_default_layers_of_llama_adapter(work: Path, tanzaku: Tanzaku) -> None:
    assert tanzaku("train", "recipe.yaml", "--method", "llama_adapter", "--out", "run").code == 0
    config = (work / "run" / "adapters" / "llama_adapter" / "adapter_config.json").read_text(encoding="utf-8")
    assert json.loads(config)["adapter_layers"] == 2  # the model's
    said = tanzaku("train", "recipe.yaml", "--method", "llama_adapter", "--set", "adapter_layers=8")
    assert_refused(said, "adapter_layers=8", "1 to the model's 2")


def test_an_empty_name_has_no_neighbour(work: Path, tanzaku: Tanzaku) -> None:
    for flag in ("--out", "--model", "--train"):
        said = tanzaku("train", "recipe.yaml", flag, "")
        assert_refused(said, f"{flag} is '', expected a name")
        assert "did you mean" not in said.err
