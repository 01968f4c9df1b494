"""`tanzaku predict`: one adapter, many in one pass, and what it refuses."""

from __future__ import annotations

import csv
import errno
import importlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from cli_kit import ROWS, Said, Tanzaku, assert_refused, results_of, write_tsv
from safetensors.torch import load_file, save_file

from close import assert_close
from tanzaku.cli import main
from tanzaku.cli.adapters import names_of
from tanzaku.cli.output import Lines, Partial, Unwritten
from tanzaku.tasks import inference, stream

module = importlib.import_module("tanzaku.cli.predict")

TEXTS = ["the warm rain of spring", "sea", "a cold wind of the winter sea", "warm sea", "the cold wind", "rain"]
# Of each run: flags of its training.
RUNS = {
    "lora": ["--set", "r=2"],
    "ia3": [],
    "prompt_tuning": ["--set", "num_virtual_tokens=3", "--max-length", "3"],
    "full": ["--learning-rate", "1e-3"],
}


@pytest.fixture(scope="module")
def trained(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `lora/adapters/lora` and so on."""
    folder = tmp_path_factory.mktemp("trained")
    write_tsv(folder / "train.tsv", ROWS)
    common = ["--model", str(model_dir), "--train", str(folder / "train.tsv"), "--epochs", "1", "--batch-size", "1"]
    for name, flags in RUNS.items():
        rates = [] if "--learning-rate" in flags else ["--learning-rate", "0.1"]
        assert main(["train", *common, "--method", name, *flags, *rates, "--out", str(folder / name)]) == 0
    return folder


@pytest.fixture
def work(work: Path, trained: Path) -> Path:
    """The current directory, with `new.tsv` and an adapter in each of lora, ia3, prompt_tuning and full."""
    for name in RUNS:
        shutil.copytree(trained / name / "adapters" / name, work / name)
    (work / "new.tsv").write_text("text\n" + "".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    return work


def table(said: Said) -> list[dict[str, str]]:
    assert said.code == 0, said.err
    return list(csv.DictReader(said.out.splitlines(), delimiter="\t"))


def numbers(rows: list[dict[str, str]], whose: str = "") -> list[list[float]]:
    return [[float(row[f"p{whose}_{label}"]) for label in ("harsh", "mild")] for row in rows]


def change(adapter: Path, **meta: Any) -> None:
    about = json.loads((adapter / "tanzaku.json").read_text(encoding="utf-8"))
    about["meta"] |= meta
    (adapter / "tanzaku.json").write_text(json.dumps(about), encoding="utf-8")


# -- one adapter


def test_one_adapter(work: Path, tanzaku: Tanzaku) -> None:
    tanzaku("train", "recipe.yaml", "--out", "run")
    expected = results_of(work / "run")["jobs"][0]["predictions"]
    said = tanzaku("predict", "run/adapters/lora", "--data", "test.tsv")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("text\tlabel\tpredicted\tp_harsh\tp_mild\n")
    rows = table(said)
    assert [row["text"] for row in rows] == [f"a {text}" for text, _ in ROWS]
    for row, probabilities in zip(rows, expected, strict=True):
        found = [float(row["p_harsh"]), float(row["p_mild"])]
        assert_close(found, probabilities, scale=1)
        assert row["predicted"] == ["harsh", "mild"][found.index(max(found))]
    assert [row["label"] for row in rows] == [label for _, label in ROWS]
    said = tanzaku("predict", "run/adapters/lora", "--data", "test.tsv", "--out", "a.jsonl")
    assert (said.code, said.out, said.err) == (0, "", "6 rows written to a.jsonl\n")
    lines = [json.loads(line) for line in (work / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["predicted"] for line in lines] == [row["predicted"] for row in rows]
    for line, row in zip(lines, rows, strict=True):
        assert list(line) == ["text", "label", "predicted", "probabilities"] and list(line["probabilities"]) == [
            "harsh",
            "mild",
        ]
        assert f"{line['probabilities']['mild']:.6f}" == row["p_mild"]
    assert not list(work.glob(".*partial"))


# -- many adapters


def test_together_as_each_alone(work: Path, tanzaku: Tanzaku) -> None:
    said = tanzaku("predict", *RUNS, "--data", "new.tsv")
    together = table(said)
    assert list(together[0]) == ["text", *(c for n in RUNS for c in (f"predicted_{n}", f"p_{n}_harsh", f"p_{n}_mild"))]
    assert [row["text"] for row in together] == TEXTS
    assert said.err == (
        "full (full) changes every weight: it takes a pass of its own\n"
        "2 of 6 texts were cut at 3 tokens for prompt_tuning\n"
    )
    every = []
    for name in RUNS:
        alone = table(tanzaku("predict", name, "--data", "new.tsv"))
        assert [row[f"predicted_{name}"] for row in together] == [row["predicted"] for row in alone]
        for mine, theirs in zip(numbers(together, f"_{name}"), numbers(alone), strict=True):
            assert_close(mine, theirs, scale=1)
        every.append(numbers(alone))
    # They differ by far more than that, and so do the rows.
    for one, other in itertools.combinations(every, 2):
        assert max(abs(a[0] - b[0]) for a, b in zip(one, other, strict=True)) > 1e-3
    assert all(max(p)[0] - min(p)[0] > 1e-3 for p in every)


@pytest.mark.parametrize("size", [1, 4, 100])
def test_json_lines_of_any_batch_size(work: Path, tanzaku: Tanzaku, size: int) -> None:
    together = table(tanzaku("predict", *RUNS, "--data", "new.tsv"))
    assert tanzaku("predict", *RUNS, "--data", "new.tsv", "--batch-size", size, "--out", "a.jsonl").code == 0
    lines = [json.loads(line) for line in (work / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    for line, row in zip(lines, together, strict=True):
        assert list(line) == ["text", "adapters"] and list(line["adapters"]) == list(RUNS)
        assert line["text"] == row["text"]
        for name, found in line["adapters"].items():
            assert found["predicted"] == row[f"predicted_{name}"]
            expected = {label: float(row[f"p_{name}_{label}"]) for label in ("harsh", "mild")}
            assert_close(found["probabilities"], expected, scale=1)


ORDERS = [
    "lora ia3 full --data new.tsv --out x.tsv",
    "--adapters lora ia3 full --data new.tsv --out x.tsv",
    "--data new.tsv --adapters lora ia3 full --out x.tsv",
    "--data new.tsv --out x.tsv --adapters lora ia3 full",
    "--data new.tsv --adapters=lora ia3 full --batch-size 2 --out x.tsv",
    "--adapters lora --adapters ia3 --adapters full --data new.tsv --out x.tsv",
    "--adapters lora --data new.tsv ia3 --out x.tsv full",
    "lora --data new.tsv ia3 --out x.tsv full",
]


@pytest.mark.parametrize("words", ORDERS)
def test_adapters_may_stand_anywhere(work: Path, tanzaku: Tanzaku, words: str) -> None:
    assert tanzaku("predict", *words.split()).code == 0
    head = (work / "x.tsv").read_text(encoding="utf-8").splitlines()[0].split("\t")
    assert [name for name in head if name.startswith("predicted")] == [
        "predicted_lora",
        "predicted_ia3",
        "predicted_full",
    ]


def test_one_row_and_many_adapters(work: Path, tanzaku: Tanzaku) -> None:
    write_tsv(work / "new.tsv", [("warm sea", "")])
    together = table(tanzaku("predict", "--adapters", *RUNS, "--data", "new.tsv"))
    assert len(together) == 1
    for name in RUNS:
        alone = numbers(table(tanzaku("predict", name, "--data", "new.tsv")))
        assert_close(numbers(together, f"_{name}")[0], alone[0], scale=1)


def test_directories_of_one_name(work: Path, tanzaku: Tanzaku) -> None:
    for run, name in (("a", "lora"), ("b", "ia3")):
        shutil.copytree(work / name, work / run / "adapters" / "best")
    said = tanzaku("predict", "a/adapters/best", "b/adapters/best/", "--data", "new.tsv")
    rows = table(said)
    assert list(rows[0])[1::3] == ["predicted_a-best", "predicted_b-best"]
    assert said.err == "a-best is a/adapters/best\nb-best is b/adapters/best\n"
    for name, whose in (("lora", "_a-best"), ("ia3", "_b-best")):
        alone = numbers(table(tanzaku("predict", name, "--data", "new.tsv")))
        assert_close([p[0] for p in numbers(rows, whose)], [p[0] for p in alone], scale=1)


NAMES = [
    (["x/lora", "x/ia3"], ["lora", "ia3"]),
    (["a/adapters/lora", "b/adapters/lora", "a/adapters/ia3"], ["a-lora", "b-lora", "ia3"]),
    (["a/x/lora", "a/y/lora", "b/x/lora"], ["lora", "lora-2", "lora-3"]),
    (["a/lora", "b/lora", "c/b-lora"], ["a-lora", "b-lora", "b-lora-2"]),
    (["c/b-lora", "a/lora", "b/lora"], ["b-lora", "a-lora", "b-lora-2"]),
    (["/lora", "/a/lora"], ["lora", "lora-2"]),
    (["run 1/lora.v2", "run 2/lora.v2"], ["run-1-lora-v2", "run-2-lora-v2"]),
    (["x/俳句", "x/短歌"], ["adapter", "adapter-2"]),
    (["x/lora/..", "x/lora/."], ["x", "lora"]),
]


@pytest.mark.parametrize(("paths", "expected"), NAMES)
def test_names(paths: list[str], expected: list[str]) -> None:
    assert names_of([Path(path) for path in paths]) == expected


def test_the_directory_one_is_in_has_its_name(work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work / "lora")
    assert "predicted_lora\t" in tanzaku("predict", ".", "../ia3", "--data", "../new.tsv").out


# -- refusals


Prepare = Callable[[Path], object]


def _nothing(work: Path) -> None:
    pass


def _changed(name: str, **meta: Any) -> Prepare:
    return lambda work: change(work / name, **meta)


REFUSED: dict[str, tuple[Prepare, list[str], list[str]]] = {
    "none": (_nothing, [], ["no adapter is named", "--help"]),
    "missing": (_nothing, ["lorra"], ["no adapter lorra (did you mean 'lora'?)"]),
    "the second is missing": (_nothing, ["lora", "q"], ["no adapter q; . has full, ia3, lora, prompt_tuning"]),
    "missing folder": (_nothing, ["lora", "lorra/x"], ["no adapter lorra/x, nor a folder lorra (did you mean 'lora'"]),
    "file": (_nothing, ["lora", "new.tsv"], ["new.tsv", "is a file", "directory"]),
    "below a file": (_nothing, ["new.tsv/lora"], ["no adapter new.tsv/lora, nor a folder new.tsv"]),
    "no adapter": (lambda work: (work / "empty").mkdir(), ["lora", "empty"], ["empty has no adapter_config.json"]),
    "run": (
        lambda work: shutil.copytree(work / "lora", work / "run" / "adapters" / "lora"),
        ["run"],
        ["run holds a run", "run/adapters/lora"],
    ),
    "twice": (_nothing, ["lora", "ia3", "lora/"], ["lora is given twice"]),
    "twice by option": (_nothing, ["lora", "--adapters", "lora"], ["lora is given twice"]),
    "twice by a link": (
        lambda work: (work / "best").symlink_to("lora"),
        ["lora", "best"],
        ["lora and best are one adapter"],
    ),
    "other base": (
        _changed("ia3", model="other/model"),
        ["lora", "ia3"],
        ["different base models", "lora has '/", "ia3 has 'other/model'", "--model"],
    ),
    "other weights": (_nothing, ["lora", "ia3", "--model", "twin"], ["lora was made for", "other weights"]),
    "other labels": (
        _changed("ia3", labels=["harsh", "wild"]),
        ["lora", "ia3"],
        ["different labels", "lora has harsh, mild", "ia3 has harsh, wild", "they differ in mild, wild"],
    ),
    "labels in another order": (
        _changed("ia3", labels=["mild", "harsh"]),
        ["lora", "ia3"],
        ["different labels", "their order differs"],
    ),
    "other text": (
        _changed("ia3", text="poem"),
        ["lora", "ia3"],
        ["lora has 'text', ia3 has 'poem'", "say with --text"],
    ),
    "other pair": (
        _changed("ia3", text_pair="reply"),
        ["lora", "ia3"],
        ["lora has none, ia3 has 'reply'", "--text-pair"],
    ),
    "damaged": (
        lambda work: (work / "ia3" / "adapter_model.safetensors").write_bytes(b"x"),
        ["lora", "ia3"],
        ["ia3/adapter_model.safetensors is damaged"],
    ),
    "no labels": (_changed("ia3", labels=None), ["lora", "ia3"], ["ia3/tanzaku.json", "does not say its labels"]),
    "empty data": (lambda work: (work / "new.tsv").write_bytes(b""), ["lora", "ia3"], ["new.tsv is empty"]),
    "header alone": (lambda work: (work / "new.tsv").write_bytes(b"text\n"), ["lora", "ia3"], ["no rows"]),
    "missing data": (_nothing, ["lora", "--data", "nwe.tsv"], ["no file nwe.tsv", "did you mean 'new.tsv'"]),
    "missing column": (_nothing, ["lora", "ia3", "--text", "txt"], ["no column 'txt'"]),
    "columns of one name": (
        lambda work: [
            change((work / n).rename(work / m), labels=["1", "a_1"]) for n, m in (("lora", "x"), ("ia3", "x_a"))
        ],
        ["x", "x_a"],
        ["two columns would be 'p_x_a_1'", ".jsonl"],
    ),
    "suffix": (_nothing, ["lora", "ia3", "--out", "a.tvs"], ["did you mean '.tsv'", ".parquet", "--format"]),
    "no such folder": (_nothing, ["lora", "ia3", "--out", "no/a.tsv"], ["a directory that exists"]),
    "output is the input": (_nothing, ["lora", "ia3", "--out", "new.tsv"], ["choose another"]),
    "device": (_nothing, ["lora", "--device", "gpu"], ["'gpu'"]),
    "no model": (_nothing, ["lora", "ia3", "--model", "./gone"], ["no model at './gone'"]),
    "batch size": (_nothing, ["lora", "ia3", "--batch-size", "0"], ["--batch-size"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(work: Path, model_dir: Path, tanzaku: Tanzaku, name: str) -> None:
    prepare, args, says = REFUSED[name]
    if "twin" in args:
        twin(model_dir, work / "twin")
    prepare(work)
    before = {path: path.read_bytes() if path.is_file() else None for path in work.rglob("*")}
    data = [] if "--data" in args else ["--data", "new.tsv"]
    assert_refused(tanzaku("predict", *args, *data), *says)
    assert {path: path.read_bytes() if path.is_file() else None for path in work.rglob("*")} == before


def twin(model_dir: Path, path: Path) -> None:
    """A base of the same shape with other weights."""
    shutil.copytree(model_dir, path)
    weights = load_file(path / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, path / "model.safetensors", {"format": "pt"})


def test_flags_overrule_what_adapters_say(work: Path, model_dir: Path, tanzaku: Tanzaku) -> None:
    expected = table(tanzaku("predict", "lora", "ia3", "--data", "new.tsv"))
    change(work / "ia3", model="moved/away", text="poem")
    found = table(tanzaku("predict", "lora", "ia3", "--data", "new.tsv", "--model", model_dir, "--text", "text"))
    assert found == expected


# -- rows that come in and go out


FORMATS = ["tsv", "csv", "jsonl", "parquet"]


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of any format, with the columns of one adapter as TSV has them."""
    if path.suffix == ".parquet":
        rows = pyarrow.parquet.read_table(path).to_pylist()
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            row.update({f"p_{label}": p for label, p in (row.pop("probabilities") or {}).items()})
    else:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("large", [0, 2**23])
@pytest.mark.parametrize("into", FORMATS)
@pytest.mark.parametrize("of", FORMATS)
def test_every_column_is_kept(
    work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch, of: str, into: str, large: int
) -> None:
    monkeypatch.setattr(stream, "LARGE", large)
    lines = of in ("tsv", "csv") or into in ("tsv", "csv")
    rows = [{"id": n, "text": text, "note": 'a "b", c\u3000d'} for n, text in enumerate(TEXTS)]
    write(work / f"in.{of}", rows)
    expected = table(tanzaku("predict", "lora", "--data", "new.tsv"))
    said = tanzaku("predict", "lora", "--data", f"in.{of}", "--out", f"out.{into}")
    assert (said.code, said.err) == (0, f"6 rows written to out.{into}\n")
    found = read(work / f"out.{into}")
    assert [list(row) for row in found] == [["id", "text", "note", "predicted", "p_harsh", "p_mild"]] * 6
    for row, given, theirs in zip(found, rows, expected, strict=True):
        assert (row["text"], row["note"]) == (given["text"], given["note"])
        assert row["id"] == (str(given["id"]) if lines else given["id"])
        assert row["predicted"] == theirs["predicted"]
        assert_close([float(row[f"p_{x}"]) for x in ("harsh", "mild")], numbers([theirs])[0], scale=1)


def test_a_row_without_text_is_marked(work: Path, tanzaku: Tanzaku) -> None:
    texts = ["warm sea", "", "rain", "  ", None, "cold"]
    write(work / "in.jsonl", [{"n": n, "text": text} for n, text in enumerate(texts)])
    full = [row for row in enumerate(texts) if row[1] and row[1].strip()]
    write(work / "full.jsonl", [{"n": n, "text": text} for n, text in full])
    assert tanzaku("predict", "lora", "--data", "full.jsonl", "--out", "full.tsv").code == 0
    for name in ("out.tsv", "out.jsonl", "out.parquet"):
        said = tanzaku("predict", "lora", "--data", "in.jsonl", "--out", name)
        assert said.code == 0 and "3 of 6 rows have no text, so they have no answer" in said.err
        rows = read(work / name)
        assert len(rows) == 6
        assert [row["predicted"] or None for n, row in enumerate(rows) if n in (1, 3, 4)] == [None] * 3
    found = read(work / "out.tsv")
    assert found[1]["p_mild"] == ""
    assert [row for row in found if row["predicted"]] == read(work / "full.tsv")


def test_a_pair_keeps_both_texts(work: Path, tanzaku: Tanzaku) -> None:
    write(work / "in.csv", [{"text": "warm sea", "reply": "the rain"}, {"text": "cold", "reply": ""}])
    rows = table(tanzaku("predict", "lora", "--data", "in.csv", "--text-pair", "reply"))
    assert [row["reply"] for row in rows] == ["the rain", ""]
    assert rows[0]["predicted"] and not rows[1]["predicted"]  # half of a pair is none
    alone = table(tanzaku("predict", "lora", "--data", "in.csv"))
    assert alone[0]["p_mild"] != rows[0]["p_mild"]


def test_names_that_clash(work: Path, tanzaku: Tanzaku) -> None:
    assert tanzaku("predict", "lora", "--data", "new.tsv", "--out", "a.tsv").code == 0
    said = tanzaku("predict", "ia3", "--data", "a.tsv", "--out", "b.tsv")
    assert_refused(said, "a.tsv has a column 'predicted'", "--prefix new_")
    assert_refused(tanzaku("predict", "ia3", "--data", "a.tsv", "--json"), "has a column 'predicted'")
    rows = table(tanzaku("predict", "ia3", "--data", "a.tsv", "--prefix", "new_"))
    alone = table(tanzaku("predict", "ia3", "--data", "new.tsv"))
    for row, first, second in zip(rows, read(work / "a.tsv"), alone, strict=True):
        assert row == {**first, **{f"new_{key}": value for key, value in second.items() if key != "text"}}


def test_formats_of_standard_output(work: Path, tanzaku: Tanzaku) -> None:
    said = tanzaku("predict", "lora", "--data", "new.tsv", "--json")
    assert said.code == 0
    assert [json.loads(line)["text"] for line in said.out.splitlines()] == TEXTS
    assert tanzaku("predict", "lora", "--data", "new.tsv", "--format", "jsonl").out == said.out
    assert tanzaku("predict", "lora", "--data", "new.tsv", "--format", "csv").out.startswith("text,predicted,p_harsh")
    assert tanzaku("predict", "lora", "--data", "new.tsv", "--format", "csv", "--out", "x.dat").code == 0
    assert (work / "x.dat").read_text(encoding="utf-8").startswith("text,predicted,p_harsh")
    assert_refused(tanzaku("predict", "lora", "--data", "new.tsv", "--format", "parquet"), "needs --out")
    assert_refused(tanzaku("predict", "lora", "--data", "new.tsv", "--format", "jsonn"), "did you mean 'jsonl'")
    assert_refused(tanzaku("predict", "lora", "--data", "new.tsv", "--json", "--format", "tsv"), "one of the two")
    assert_refused(tanzaku("predict", "lora", "--data", "new.tsv", "--resume"), "--resume needs --out")


def test_output_is_utf8_whatever_the_terminal_speaks(work: Path) -> None:
    write(work / "in.tsv", [{"text": "warm sea", "note": "海"}])
    command = [sys.executable, "-m", "tanzaku", "predict", "lora", "--data", "in.tsv"]
    said = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)
    assert said.returncode == 0, said.stderr
    assert said.stdout.decode("utf-8").splitlines()[1].startswith("warm sea\t海\t")
    said = subprocess.run(["sh", "-c", f"{' '.join(command)} >&-"], capture_output=True, check=False)
    assert said.returncode == 2 and b"standard output is closed" in said.stderr


def test_nothing_is_overwritten_unasked(work: Path, tanzaku: Tanzaku) -> None:
    (work / "x.tsv").write_text("mine", encoding="utf-8")
    args = ["predict", "lora", "--data", "new.tsv", "--out", "x.tsv"]
    assert_refused(tanzaku(*args), "--out x.tsv is there already", "--overwrite")
    assert_refused(tanzaku(*args, "--resume"), "nothing to resume")
    assert (work / "x.tsv").read_text(encoding="utf-8") == "mine"
    assert tanzaku(*args, "--overwrite").code == 0
    assert len(read(work / "x.tsv")) == 6


def test_labels_do_not_reach_the_terminal_raw(work: Path, tanzaku: Tanzaku) -> None:
    change(work / "lora", labels=["a\x1b[31m", "b\tc\nd\x9b"])
    said = tanzaku("predict", "lora", "--data", "new.tsv")
    assert said.code == 0 and len(said.out.splitlines()) == 7
    assert said.out.startswith("text\tpredicted\tp_a\\x1b[31m\tp_b\\tc\\nd\\x9b\n")
    assert not set("\x1b\x9b") & set(said.out)
    said = tanzaku("predict", "lora", "--data", "new.tsv", "--json")
    assert not set("\x1b\x9b") & set(said.out)
    assert json.loads(said.out.splitlines()[0])["predicted"] in ("a\x1b[31m", "b\tc\nd\x9b")


def test_logits_that_are_not_finite(work: Path, tanzaku: Tanzaku) -> None:
    tensors = load_file(work / "lora" / "adapter_model.safetensors")
    tensors = {name: tensor * 1e30 if "lora" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, work / "lora" / "adapter_model.safetensors", {"format": "pt"})
    about = json.loads((work / "lora" / "tanzaku.json").read_text(encoding="utf-8"))
    about.pop("sha256")
    (work / "lora" / "tanzaku.json").write_text(json.dumps(about), encoding="utf-8")
    write_tsv(work / "in.tsv", [("", ""), ("warm sea", "")])
    for out in ([], ["--out", "x.tsv"], ["--out", "x.parquet"]):
        said = tanzaku("predict", "ia3", "lora", "--data", "in.tsv", *out)
        assert_refused(said, "lora gives in.tsv row 2 the logits nan", "expected finite numbers")
        assert said.out == "" and not [path for path in work.iterdir() if "x." in path.name]


def test_precision_is_that_of_training(work: Path, trained: Path, model_dir: Path, tanzaku: Tanzaku) -> None:
    train = ["train", "--model", model_dir, "--train", "train.tsv", "--epochs", "1", "--method", "lora"]
    assert tanzaku(*train, "--precision", "bf16", "--out", "half").code == 0
    about = json.loads((work / "half" / "adapters" / "lora" / "tanzaku.json").read_text(encoding="utf-8"))
    assert about["meta"]["precision"] == "bf16"
    half = tanzaku("predict", "half/adapters/lora", "--data", "new.tsv").out
    assert tanzaku("predict", "half/adapters/lora", "--data", "new.tsv", "--precision", "bf16").out == half
    full = tanzaku("predict", "half/adapters/lora", "--data", "new.tsv", "--precision", "fp32").out
    assert full != half
    # Beside an adapter of another precision each is computed in its own.
    together = table(tanzaku("predict", "ia3", "half/adapters/lora", "--data", "new.tsv"))
    alone = table(tanzaku("predict", "ia3", "--data", "new.tsv"))
    assert [row["p_ia3_mild"] for row in together] == [row["p_mild"] for row in alone]
    assert_refused(tanzaku("predict", "lora", "--data", "new.tsv", "--precision", "fp8"), "--precision is 'fp8'")


def test_an_open_precision_is_settled_for_the_whole_run(work: Path, model_dir: Path, tanzaku: Tanzaku) -> None:
    train = ["train", "--model", model_dir, "--train", "train.tsv", "--epochs", "1", "--method", "lora"]
    assert tanzaku(*train, "--precision", "auto", "--out", "open").code == 0
    about = json.loads((work / "open" / "adapters" / "lora" / "tanzaku.json").read_text(encoding="utf-8"))
    results = json.loads((work / "open" / "results.json").read_text(encoding="utf-8"))
    chosen = about["meta"]["precision"]
    assert chosen in ("bf16", "fp32") and results["recipe"]["train"]["precision"] == chosen
    assert tanzaku("predict", "open/adapters/lora", "--data", "new.tsv").code == 0


def test_adapters_of_hf_peft(work: Path, model_dir: Path, tanzaku: Tanzaku) -> None:
    expected = table(tanzaku("predict", "lora", "--data", "new.tsv"))
    (work / "lora" / "tanzaku.json").unlink()
    # The base's config has two labels, as transformers names them.
    found = table(tanzaku("predict", "lora", "--data", "new.tsv"))
    names = {"LABEL_0": "harsh", "LABEL_1": "mild"}
    assert [names[row["predicted"]] for row in found] == [row["predicted"] for row in expected]
    assert table(tanzaku("predict", "lora", "--data", "new.tsv", "--labels", "harsh,mild")) == expected
    assert_refused(tanzaku("predict", "lora", "--data", "new.tsv", "--labels", "a,b,c"), "2 labels", "--labels")
    assert_refused(tanzaku("predict", "lora", "--data", "new.tsv", "--labels", "a,a"), "each once")
    assert_refused(tanzaku("predict", "lora", "--data", "new.tsv", "--text", "poem"), "no column 'poem'")
    config = json.loads((work / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    for task in ("QUESTION_ANS", None):
        (work / "lora" / "adapter_config.json").write_text(json.dumps({**config, "task_type": task}), encoding="utf-8")
        assert_refused(tanzaku("predict", "lora", "--data", "new.tsv"), "expected task_type 'SEQ_CLS'")


class Clock:
    """Three seconds pass between two looks."""

    now = 0.0

    def monotonic(self) -> float:
        self.now += 3
        return self.now


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def told(terminal: bool, quiet: bool = False) -> str:
        monkeypatch.setattr(module.sys.stderr, "isatty", lambda: terminal)
        monkeypatch.setattr(module, "time", Clock())
        say = module._Progress(1200, quiet)
        for done in range(300, 1300, 100):  # 200 rows were there before
            say(done, 100)
        return capsys.readouterr().err

    assert told(False) == "600 of 1,200 rows, 33 rows/s\n1,000 of 1,200 rows, 33 rows/s\n"
    lines = told(True).split("\r\x1b[K")
    assert lines[1] == "300 of 1,200 rows, 33 rows/s" and lines[-1] == "1,200 of 1,200 rows, 33 rows/s\n"
    assert told(True, quiet=True) == ""


# -- stopping


def stops_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C in a window of two rows."""
    compute, calls = inference._records, []

    def stop(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return compute(*args)

    monkeypatch.setattr(inference, "WINDOW", 2)
    monkeypatch.setattr(inference, "_records", stop)


@pytest.mark.parametrize("kind", FORMATS)
def test_an_interrupted_file_goes_on(work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    out = f"x.{kind}"
    args = ["predict", "lora", "prompt_tuning", "--data", "new.tsv", "--batch-size", "2", "--out", out]
    write(work / "new.tsv", [{"n": n, "text": text} for n, text in enumerate([*TEXTS[:4], "", TEXTS[5]])])
    monkeypatch.setattr(inference, "WINDOW", 2)
    whole = tanzaku(*args[:-1], f"whole.{kind}")
    assert whole.code == 0
    before = sorted(work.rglob("*"))
    (work / out).write_text("mine", encoding="utf-8")
    with monkeypatch.context() as patch:
        stops_at(patch, 3)
        said = tanzaku(*args, "--overwrite")
        assert (said.code, said.err.count("\n")) == (130, 1)
        assert "4 of 6 rows are kept" in said.err and "--resume" in said.err
    assert (work / out).read_text(encoding="utf-8") == "mine"
    with (work / f".{out}.partial").open("ab") as file:
        file.write(b"half a ch")  # what a kill leaves
    other = [arg for arg in args if arg != "prompt_tuning"]
    assert_refused(tanzaku(*other, "--overwrite", "--resume"), "begun with another adapter", "same command")
    other = ["4" if arg == "2" else arg for arg in args]
    assert_refused(tanzaku(*other, "--overwrite", "--resume"), "begun with another", "same command")
    said = tanzaku(*args, "--overwrite", "--resume")
    assert said.code == 0 and said.err.startswith("going on after row 4 of 6\n"), said.err
    assert said.err.removeprefix("going on after row 4 of 6\n") == whole.err.replace("whole", "x")
    assert (work / out).read_bytes() == (work / f"whole.{kind}").read_bytes()
    (work / out).unlink()
    assert sorted(work.rglob("*")) == before


@pytest.mark.parametrize("place", ["rows", "journal"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_full_disk_keeps_what_is_written(
    work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch, kind: str, place: str
) -> None:
    """Whichever file the last block does not suffice for."""
    args = ["predict", "lora", "--data", "new.tsv", "--batch-size", "2", "--out", f"x.{kind}"]
    monkeypatch.setattr(inference, "WINDOW", 2)
    add, text, calls = os.fsync, Path.write_text, []

    def full(*given: Any, **more: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return (add if place == "rows" else text)(*given, **more)

    with monkeypatch.context() as patch:
        if place == "rows":
            patch.setattr("tanzaku.cli.output.os.fsync", full)
        else:
            patch.setattr(Path, "write_text", full)
        said = tanzaku(*args)
    assert_refused(said, f"cannot write x.{kind}: No space left", "free some space, then go on", "--resume")
    kept = int(re.findall(r"(\d) rows are kept", said.err)[0])
    assert kept in (2, 4) and not (work / f"x.{kind}").exists()
    assert_refused(tanzaku(*args), f"cut off after {kept} rows", "--resume", "--overwrite")
    assert tanzaku(*args, "--resume").code == 0 and tanzaku(*args[:-1], f"whole.{kind}").code == 0
    assert (work / f"x.{kind}").read_bytes() == (work / f"whole.{kind}").read_bytes()


def test_what_does_not_fit_is_said_once_more_by_nobody(tmp_path: Path) -> None:
    """The file's own buffer keeps what could not be written, and closing it would try again."""

    class Full(io.BytesIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            self.flush()

    form = Lines("tsv", ["text"])
    for keep in (True, False):
        partial = Partial(tmp_path / "x", form, {}, False, keep=keep)
        with pytest.raises(Unwritten, match="No space left"), partial as part:
            part.add([{"text": "a"}], {"rows": 1})
            part.file.close()
            part.file = Full()  # type: ignore[assignment]
            part.add([{"text": "b"}], {"rows": 2})
        left = sorted(path.name for path in tmp_path.iterdir())
        assert left == ([".x.partial", ".x.partial.json"] if keep else [])
        for name in left:
            (tmp_path / name).unlink()


def test_interrupted_before_the_first_rows(work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    stops_at(monkeypatch, 1)
    before = sorted(work.rglob("*"))
    said = tanzaku("predict", "lora", "--data", "new.tsv", "--out", "x.tsv")
    assert (said.code, said.err.count("\n")) == (130, 1) and "run the same command again" in said.err
    assert sorted(work.rglob("*")) == before
    # --resume may be said before there is anything to go on with.
    said = tanzaku("predict", "lora", "--data", "new.tsv", "--out", "x.tsv", "--resume")
    assert said.code == 0 and said.err.startswith("nothing of it is left to go on with: it begins anew\n")


def test_killed_and_resumed(work: Path) -> None:
    rows = [{"n": n, "text": TEXTS[n % 6] + " sea" * (n % 7)} for n in range(1500)]
    write(work / "many.csv", rows)
    command = [sys.executable, "-m", "tanzaku", "predict", "lora", "--data", "many.csv", "--batch-size", "1", "--out"]
    process = subprocess.Popen([*command, "x.csv"], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (work / ".x.csv.partial.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    refused = main([*command[3:], "x.csv", "--resume"])  # one process writes
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and refused == 2
    assert not (work / "x.csv").exists()
    assert main([*command[3:], "x.csv", "--resume"]) == 0
    assert main([*command[3:], "y.csv"]) == 0
    assert (work / "x.csv").read_bytes() == (work / "y.csv").read_bytes()
    assert [int(row["n"]) for row in read(work / "x.csv")] == list(range(1500))
    assert not [path for path in work.iterdir() if path.name.startswith(".")]


def test_a_reader_that_has_seen_enough(work: Path) -> None:
    write(work / "many.csv", [{"text": TEXTS[n % 6]} for n in range(3000)])
    command = f"{sys.executable} -m tanzaku predict lora --data many.csv | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=False)
    assert done.stdout == b"text\tpredicted\tp_harsh\tp_mild\n"
    # A slow machine says how far it is, and nothing is said of the reader.
    assert all(re.fullmatch(rb"\d+ of 3,000 rows, .*", line) for line in done.stderr.splitlines()), done.stderr


def test_encodings(work: Path, tanzaku: Tanzaku) -> None:
    """Found out or said, and written as UTF-8."""
    rows = "text\n" + "the poem\n" * 3 + "春はあけぼの、やうやう白くなりゆく\n"
    (work / "sjis.csv").write_bytes(rows.encode("cp932"))
    found = [tanzaku("predict", "lora", "--data", "sjis.csv", *more).out for more in ([], ["--encoding", "cp932"])]
    assert found[0] == found[1] and "春はあけぼの" in found[0]
    assert_refused(tanzaku("predict", "lora", "--data", "sjis.csv", "--encoding", "utf-8"), "--encoding")


# -- rows of standard input


def test_standard_input(work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = b"".join(b'{"id": %d, "text": "%s"}\n' % (n, text.encode()) for n, text in enumerate(TEXTS))
    (work / "new.jsonl").write_bytes(rows)
    for args in ([], ["--json"], ["--out", "x.csv"], ["--out", "x.jsonl"], ["--out", "x.parquet"]):
        said = {}
        for data in ("new.jsonl", "-"):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(rows)))
            found = tanzaku("predict", "lora", "prompt_tuning", "--data", data, *args)
            said[data] = (found.code, found.out, found.err, [path.read_bytes() for path in work.glob("x.*")])
            for path in work.glob("*x.*"):
                path.unlink()
        assert said["-"] == said["new.jsonl"]
        assert said["-"][0] == 0 and said["-"][1] + str(said["-"][3]) != "[]"


def test_standard_input_of_a_format_that_is_named(
    work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("text\n東京, sea\n".encode("cp932"))))
    said = tanzaku("predict", "lora", "--data", "-", "--data-format", "tsv", "--encoding", "cp932")
    assert [row["text"] for row in table(said)] == ["東京, sea"]
    assert_refused(tanzaku("predict", "lora", "--data", "-", "--data-format", "xml"), "--data-format is 'xml'")
    (work / "new.txt").write_bytes((work / "new.tsv").read_bytes())
    assert_refused(tanzaku("predict", "lora", "--data", "new.txt"), "no known suffix", "predict: --data-format")
    assert len(table(tanzaku("predict", "lora", "--data", "new.txt", "--data-format", "tsv"))) == len(TEXTS)


def test_rows_are_labelled_as_they_come(work: Path) -> None:
    command = [sys.executable, "-m", "tanzaku", "predict", "lora", "--data", "-", "--json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert run.stdin is not None and run.stdout is not None
        for text in ("sea", "rain"):  # each is answered while the pipe stays open
            run.stdin.write(json.dumps({"text": text}).encode() + b"\n")
            run.stdin.flush()
            assert json.loads(run.stdout.readline())["text"] == text
        run.stdin.close()
        assert run.stdout.read() == b"" and run.wait() == 0


LATER: dict[str, tuple[list[str], list[str]]] = {
    "another column": (['{"text": "a"}', '{"text": "b", "n": 1}'], ["row 2 has 'n'", "(text)", "give --json"]),
    "the name of a new column": (['{"text": "a"}', '{"text": "b", "predicted": 1}'], ["has a column 'predicted'"]),
    "no text": (['{"text": "a"}', '{"text": 3}'], ["row 2: column 'text' is 3 (int), expected text"]),
    "half a character": (['{"text": "a"}', '{"text": "\\ud83d"}'], ["row 2: column 'text' has half of a surrogate"]),
}


@pytest.mark.parametrize("name", LATER)
def test_rows_that_come_later(work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    lines, says = LATER[name]

    left = [f"{line}\n".encode() for line in lines]
    buffer = SimpleNamespace(read1=lambda size: left.pop(0) if left else b"")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=buffer, isatty=lambda: False))
    assert_refused(tanzaku("predict", "lora", "--data", "-", "--out", "x.tsv"), "standard input", *says)
    assert not list(work.glob("*x.tsv*")) and not list(work.glob(".*"))


OPEN = 'n,text\n1,sea\n2,rain\n3,"open\n4,wind\n'
LAST = "n,text\n1,sea\n2,rain\n3\n"
LONG = "n,text\n" + "".join(f'{n},"{chr(10).join(["sea"] * 6)}"\n' for n in range(8)) + "9\n"
SEPARATED = "n,text\n1,sea\u2028rain\n2\n3,wind\n"


@pytest.mark.parametrize(
    ("rows", "texts"),
    [
        (OPEN, ["sea", "rain"]),
        (LAST, ["sea", "rain"]),
        (LONG, ["\n".join(["sea"] * 6)] * 8),
        (SEPARATED, ["sea\u2028rain"]),
    ],
    ids=["an open quote", "the last row", "rows of several lines", "a separator in a text"],
)
def test_a_broken_row_is_told_however_rows_end(
    work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch, rows: str, texts: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(rows.encode())))
    said = tanzaku("predict", "lora", "--data", "-", "--json", "--data-format", "csv")
    assert [json.loads(line)["text"] for line in said.out.splitlines()] == texts
    assert_refused(said, "standard input")


@pytest.mark.parametrize("kind", ["json", "tsv", "csv"])
def test_rows_in_front_of_a_broken_one_are_answered(
    work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """All may have come at once."""
    rows = {
        "json": '{"text": "sea"}\n{"text": "rain"}\nnot json\n{"text": "wind"}\n',
        "tsv": "n\ttext\n1\tsea\n2\train\n3\n4\twind\n",
        "csv": "n,text\n1,sea\n2,rain\n3\n4,wind\n",
    }[kind]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(rows.encode())))
    said = tanzaku("predict", "lora", "--data", "-", "--json")
    assert [json.loads(line)["text"] for line in said.out.splitlines()] == ["sea", "rain"]
    assert_refused(said, "standard input line", "3" if kind == "json" else "4")


def test_what_cannot_be_of_standard_input(work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tanzaku("predict", "lora", "--data", "-", "--out", "x.tsv", "--resume")
    assert_refused(said, "--resume reads --data again", "give a file")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert_refused(tanzaku("predict", "lora", "--data", "-"), "standard input is empty")


def test_a_cut_off_run_on_standard_input_leaves_nothing(
    work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((work / "new.tsv").read_bytes())))
    monkeypatch.setattr(module._Progress, "__call__", interrupt)
    said = tanzaku("predict", "lora", "--data", "-", "--out", "x.tsv")
    assert (said.code, said.err) == (130, "tanzaku: interrupted; run the same command again\n")
    assert not list(work.glob("*x.tsv*")) and not list(work.glob(".*"))


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
