"""Adapters' directories that are hostile or odd: every verb that reads them refuses them at once, in one line."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_kit import ROWS, Tanzaku, assert_refused, write_tsv
from safetensors.torch import load_file, save_file

from tanzaku.cli import main

CONFIG, TENSORS, META = "adapter_config.json", "adapter_model.safetensors", "tanzaku.json"


@pytest.fixture(scope="module")
def trained(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    write_tsv(folder / "train.tsv", ROWS)
    common = ["--model", str(model_dir), "--train", str(folder / "train.tsv"), "--epochs", "1"]
    assert main(["train", *common, "--method", "lora", "--set", "r=2", "--out", str(folder / "run")]) == 0
    return folder / "run" / "adapters" / "lora"


@pytest.fixture
def lora(work: Path, trained: Path) -> Path:
    return Path(shutil.copytree(trained, work / "lora"))


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


IN_PLACE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pipe": (os.mkfifo, "is a pipe; expected a file"),
    "device": (_link("/dev/zero"), "is a link to /dev/zero, a device; expected a file"),
    "dangling": (_link("/nowhere/at/all"), "is a link to /nowhere/at/all, which is not there; expected a file"),
    "loop": (lambda path: path.symlink_to(path.name), "cannot be read: a link that leads back to itself"),
    "folder": (Path.mkdir, "is a directory; expected a file"),
}
VERBS = {
    "predict": ["--data", "test.tsv"],
    "merge": ["--out", "merged"],
    "export": ["--out", "x.gguf"],
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", [CONFIG, TENSORS, META])
@pytest.mark.parametrize("kind", IN_PLACE)
def test_no_file_in_the_place_of_one(lora: Path, tanzaku: Tanzaku, verb: str, name: str, kind: str) -> None:
    make, says = IN_PLACE[kind]
    (lora / name).unlink()
    make(lora / name)
    began = time.monotonic()
    assert_refused(tanzaku(verb, "lora", *VERBS[verb]), f"lora/{name} {says}")
    assert time.monotonic() - began < 20


def test_links_to_files_are_read(lora: Path, tanzaku: Tanzaku) -> None:
    expected = tanzaku("predict", "lora", "--data", "test.tsv").out
    for name in (CONFIG, TENSORS, META):  # as the Hub's cache has them
        (lora / name).rename(lora.parent / name)
        (lora / name).symlink_to(f"../{name}")
    assert tanzaku("predict", "lora", "--data", "test.tsv").out == expected != ""


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", [CONFIG, TENSORS, META])
def test_a_pointer_or_a_page_in_the_place_of_a_file(lora: Path, tanzaku: Tanzaku, verb: str, name: str) -> None:
    for content, says in (
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "is a pointer of Git LFS"),
        ("<!doctype html>\n<title>Sign in</title>", "is a web page"),
    ):
        (lora / name).write_text(content, encoding="utf-8")
        assert_refused(tanzaku(verb, "lora", *VERBS[verb]), f"lora/{name} {says}")


META_SAYS: dict[str, tuple[dict[str, Any], str]] = {
    "objects as labels": ({"labels": [{"a": 1}, {"b": 2}]}, "meta.labels is [{'a': 1}, {'b': 2}], expected two names"),
    "numbers as labels": ({"labels": [0, 1]}, "meta.labels is [0, 1], expected two names or more"),
    "one label": ({"labels": ["a"]}, "meta.labels is ['a'], expected two names or more"),
    "a text as labels": ({"labels": "ab"}, "meta.labels is 'ab', expected two names or more"),
    "a label twice": ({"labels": ["a", "a"]}, "meta.labels has 'a' twice, expected each label once"),
    "max_length true": ({"max_length": True}, "meta.max_length is True, expected 1 to"),
    "max_length 0": ({"max_length": 0}, "meta.max_length is 0, expected 1 to"),
    "max_length huge": ({"max_length": 10**30}, "meta.max_length is 1000000"),
    "max_length text": ({"max_length": "8"}, "meta.max_length is '8', expected 1 to"),
    "a number as text": ({"text": 3}, "meta.text is 3, expected a name"),
    "a list as pair": ({"text_pair": ["a"]}, "meta.text_pair is ['a'], expected a name"),
    "a number as model": ({"model": 3}, "meta.model is 3, expected a name"),
    "precision": ({"precision": "fp8"}, "meta.precision is 'fp8', expected fp32, bf16, fp16"),
}


@pytest.mark.parametrize("name", META_SAYS)
def test_what_tanzaku_json_says(lora: Path, tanzaku: Tanzaku, name: str) -> None:
    meta, says = META_SAYS[name]
    about = json.loads((lora / META).read_text(encoding="utf-8"))
    about["meta"] |= meta
    (lora / META).write_text(json.dumps(about), encoding="utf-8")
    assert_refused(tanzaku("predict", "lora", "--data", "test.tsv"), f"lora/{META}: {says}")
    if "labels" in meta:
        for verb in ("merge", "export"):
            assert_refused(tanzaku(verb, "lora", *VERBS[verb]), f"lora/{META}: {says}")


@pytest.mark.parametrize(
    ("number", "says"), [(99, "upgrade"), (0, "reads 1 to 2"), ("2", "reads 1 to 2"), (True, "format is True")]
)
def test_format(lora: Path, tanzaku: Tanzaku, number: Any, says: str) -> None:
    about = json.loads((lora / META).read_text(encoding="utf-8"))
    (lora / META).write_text(json.dumps({**about, "format": number}), encoding="utf-8")
    for verb in VERBS:
        assert_refused(tanzaku(verb, "lora", *VERBS[verb]), f"lora/{META}: format is {number!r}", says)


@pytest.mark.parametrize("rank", [10**7, 10**9, 10**12, 2**63, 10**30])
def test_sizes_that_no_machine_has(lora: Path, tanzaku: Tanzaku, rank: int) -> None:
    config = json.loads((lora / CONFIG).read_text(encoding="utf-8"))
    (lora / CONFIG).write_text(json.dumps({**config, "r": rank}), encoding="utf-8")
    for verb in ("predict", "merge"):
        said = tanzaku(verb, "lora", *VERBS[verb])
        assert_refused(said, f"lora/{CONFIG}: r={rank}: its settings ask for a tensor of", "too large")


def test_numbers_too_large_to_merge(lora: Path, tanzaku: Tanzaku) -> None:
    tensors = load_file(lora / TENSORS)
    save_file({k: t * 1e30 if "lora" in k else t for k, t in tensors.items()}, lora / TENSORS, {"format": "pt"})
    about = json.loads((lora / META).read_text(encoding="utf-8"))
    (lora / META).write_text(json.dumps({**about, "sha256": None}), encoding="utf-8")
    said = tanzaku("merge", "lora", "--out", "merged")
    assert_refused(said, "train it anew")
    assert "load the base" not in said.err
