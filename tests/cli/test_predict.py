"""`tanzaku predict`: one adapter, many in one pass, and what it refuses."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_kit import ROWS, Said, Tanzaku, assert_refused, results_of, write_tsv

from close import assert_close
from tanzaku.cli import main
from tanzaku.cli.adapters import names_of
from tanzaku.tasks import inference

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
    assert said.out.startswith("text\tlabel\tp_harsh\tp_mild\n")
    rows = table(said)
    assert [row["text"] for row in rows] == [f"a {text}" for text, _ in ROWS]
    for row, probabilities in zip(rows, expected, strict=True):
        found = [float(row["p_harsh"]), float(row["p_mild"])]
        assert_close(found, probabilities, scale=1)
        assert row["label"] == ["harsh", "mild"][found.index(max(found))]
    said = tanzaku("predict", "run/adapters/lora", "--data", "test.tsv", "--out", "a.jsonl")
    assert (said.code, said.out, said.err) == (0, "", "6 rows written to a.jsonl\n")
    lines = [json.loads(line) for line in (work / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["label"] for line in lines] == [row["label"] for row in rows]
    for line, row in zip(lines, rows, strict=True):
        assert list(line) == ["text", "label", "probabilities"] and list(line["probabilities"]) == ["harsh", "mild"]
        assert f"{line['probabilities']['mild']:.6f}" == row["p_mild"]
    assert not list(work.glob(".*partial"))


# -- many adapters


def test_together_as_each_alone(work: Path, tanzaku: Tanzaku) -> None:
    said = tanzaku("predict", *RUNS, "--data", "new.tsv")
    together = table(said)
    assert list(together[0]) == ["text", *(c for n in RUNS for c in (f"label_{n}", f"p_{n}_harsh", f"p_{n}_mild"))]
    assert [row["text"] for row in together] == TEXTS
    assert said.err == (
        "2 of 6 texts were cut at 3 tokens for prompt_tuning\n"
        "full (full) changes every weight: it takes a pass of its own\n"
    )
    every = []
    for name in RUNS:
        alone = table(tanzaku("predict", name, "--data", "new.tsv"))
        assert [row[f"label_{name}"] for row in together] == [row["label"] for row in alone]
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
            assert found["label"] == row[f"label_{name}"]
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
    assert [name for name in head if name.startswith("label")] == ["label_lora", "label_ia3", "label_full"]


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
    assert list(rows[0])[1::3] == ["label_a-best", "label_b-best"]
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
    assert "label_lora\t" in tanzaku("predict", ".", "../ia3", "--data", "../new.tsv").out


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
    "no adapter": (lambda work: (work / "empty").mkdir(), ["lora", "empty"], ["empty has no tanzaku.json"]),
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
    "no labels": (_changed("ia3", labels=None), ["lora", "ia3"], ["ia3 does not say its labels"]),
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
    "suffix": (_nothing, ["lora", "ia3", "--out", "a.csv"], [".tsv or .jsonl"]),
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
    from safetensors.torch import load_file, save_file

    shutil.copytree(model_dir, path)
    weights = load_file(path / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, path / "model.safetensors", {"format": "pt"})


def test_flags_overrule_what_adapters_say(work: Path, model_dir: Path, tanzaku: Tanzaku) -> None:
    expected = table(tanzaku("predict", "lora", "ia3", "--data", "new.tsv"))
    change(work / "ia3", model="moved/away", text="poem")
    found = table(tanzaku("predict", "lora", "ia3", "--data", "new.tsv", "--model", model_dir, "--text", "text"))
    assert found == expected


# -- stopping


def test_interrupted_leaves_no_half_file(work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    compute, calls = inference._logits, []

    def stop(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            assert list(work.glob(".x.tsv.partial"))
            raise KeyboardInterrupt
        return compute(*args)

    monkeypatch.setattr(inference, "WINDOW", 2)
    monkeypatch.setattr(inference, "_logits", stop)
    (work / "x.tsv").write_text("mine", encoding="utf-8")
    before = sorted(work.rglob("*"))
    said = tanzaku("predict", "lora", "ia3", "--data", "new.tsv", "--batch-size", "2", "--out", "x.tsv")
    assert (said.code, said.err.count("\n")) == (130, 1) and "run the same command again" in said.err
    assert sorted(work.rglob("*")) == before and (work / "x.tsv").read_text(encoding="utf-8") == "mine"
