"""Every task through every verb: what stands in one file works in training, comparison, prediction and files."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from cli_kit import Tanzaku, assert_refused, results_of
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

import tanzaku as tz
from tanzaku import tasks
from tanzaku.models import loading
from tanzaku.tasks import TASKS

ROOT = Path(__file__).parents[2]

TEXTS = ["the warm rain of spring", "a cold wind of winter", "warm sea", "cold sea", "spring rain", "winter wind"]
TEXTS += ["the rain", "cold rain", "warm wind", "the cold spring", "a warm winter", "sea of rain"]
WARM = {"warm", "spring", "sea"}
CHOICES = (" warm sea", " cold")
KINDS = {"mild": WARM, "wet": {"sea", "rain"}}


def spans(text: str) -> list[dict[str, Any]]:
    found = []
    for word in text.split():
        start = text.index(word)
        if word in WARM | {"cold", "winter"}:
            kind = "warm" if word in WARM else "cold"
            found.append({"start": start, "end": start + len(word), "label": kind})
    return found


def row(task: str, text: str) -> dict[str, Any]:
    if task == "classification":
        return {"text": text, "label": "mild" if WARM & {*text.split()} else "harsh"}
    if task == "ordinal":
        return {"text": text, "label": len(WARM & {*text.split()})}
    if task == "multilabel":
        return {"text": text, "label": [name for name, of in KINDS.items() if of & {*text.split()}]}
    if task == "regression":
        return {"text": text, "label": 10.0 + 3 * len(WARM & {*text.split()}) - len(text.split())}
    if task == "tokens":
        return {"text": text, "spans": spans(text)}
    if task == "generation":
        return {"prompt": text, "completion": " mild" if WARM & {*text.split()} else " harsh"}
    if task == "seq2seq":
        return {"source": text, "target": "warm" if WARM & {*text.split()} else "a cold wind"}
    if task == "choice":
        return {"prompt": text, "choices": [*CHOICES], "label": int(not WARM & {*text.split()})}
    raise NotImplementedError(f"rows for the task {task!r}: add some here")


@pytest.fixture
def base_dir(task: str, model_dir: Path, bart_dir: Path) -> Path:
    """A model of the task's kind."""
    return bart_dir if task == "seq2seq" else model_dir


@pytest.fixture(params=sorted(TASKS))
def task(request: pytest.FixtureRequest, work: Path, model_dir: Path, bart_dir: Path) -> str:
    """A task's name; the current directory has train, valid and test rows of it, and a recipe."""
    name = str(request.param)
    for split, before in (("train", ""), ("valid", "the "), ("test", "of ")):
        lines = [json.dumps(row(name, before + text)) for text in TEXTS]
        Path(f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = Path("recipe.yaml").read_text(encoding="utf-8").replace(".tsv", ".jsonl")
    if name in ("generation", "seq2seq"):
        recipe = recipe.replace("data: {", "data: {max_new_tokens: 3, ", 1)
    if name == "seq2seq":
        recipe = recipe.replace(str(model_dir), str(bart_dir))
    if name == "choice":
        recipe = recipe.replace("data: {", f"data: {{choices: {[*CHOICES]}, ", 1)
    Path("recipe.yaml").write_text(f"task: {name}\n{recipe}", encoding="utf-8")
    return name


def run_first_program(card: str, model_dir: Path) -> None:
    program = card.split("```python\n")[1].split("```")[0]
    exec(program.replace("DIRECTORY", "run/adapters/lora").replace("BASE", str(model_dir)), made := {})
    assert tz.adapters(made["model"]) == ["mine"]


@pytest.mark.parametrize("task", ["tokens"], indirect=True)
def test_a_class_that_transformers_has_not(task: str, tanzaku: Tanzaku, model_dir: Path) -> None:
    """The card's program makes it as training did, and nothing is said of PEFT, which could not."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    config = Gemma3TextConfig(vocab_size=14, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    Gemma3ForCausalLM(config).save_pretrained("gemma")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_dir / name, "gemma")
    said = tanzaku("train", "recipe.yaml", "--model", "gemma", "--out", "run")
    assert said.code == 0, said.err
    card = Path("run/adapters/lora/README.md").read_text(encoding="utf-8")
    assert "PeftModel" not in card and "made by Tanzaku" in card
    run_first_program(card, Path("gemma"))


def test_train_predict_and_merge(task: str, tanzaku: Tanzaku, base_dir: Path) -> None:
    kind = TASKS[task]
    said = tanzaku("train", "recipe.yaml", "--out", "run")
    assert said.code == 0, said.err
    for metric in kind.metrics:
        assert metric.title in said.out
    [job] = results_of(Path("run"))["jobs"]
    assert job["status"] == "done" and len(job["predictions"]) == len(TEXTS)
    for figures in (job["valid"], job["test"]):
        assert figures.keys() == {metric.name for metric in kind.metrics} and math.isfinite(figures["loss"])
    card = Path("run/adapters/lora/README.md").read_text(encoding="utf-8")
    assert "tanzaku predict DIRECTORY" in card and all(metric.name in card for metric in kind.metrics)
    run_first_program(card, base_dir)

    for name in ("out.jsonl", "out.tsv", "out.parquet"):
        said = tanzaku("predict", "run/adapters/lora", "--data", "test.jsonl", "--out", name)
        assert said.code == 0, said.err
    lines = [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]
    about = json.loads(Path("run/adapters/lora/tanzaku.json").read_text(encoding="utf-8"))["meta"]
    own = kind.from_json(about, "")
    assert own.to_json().items() <= about.items()
    for line, prediction in zip(lines, job["predictions"], strict=True):
        assert close({key: line[key] for key in own.answer_keys}, own.answer(prediction))
    with Path("out.tsv").open(encoding="utf-8") as file:
        cells = list(csv.DictReader(file, delimiter="\t"))
    names = ["_".join(filter(None, (column.stem, column.part))) for column in own.columns()]
    assert all(names == list(cell)[-len(names) :] for cell in cells)

    said = tanzaku("merge", "run/adapters/lora", "--out", "merged")
    assert said.code == 0, said.err
    config = json.loads(Path("merged/config.json").read_text(encoding="utf-8"))
    own_class = kind.auto_class.replace("AutoModel", "Llama").replace(
        "LlamaForSeq2SeqLM", "BartForConditionalGeneration"
    )
    assert config["architectures"] == [own_class]
    assert own.left_in_config().items() <= config.items()
    assert own.caution() is None or own.caution() in said.err  # such as how numbers are to be turned back


def close(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    return bool(found == expected or (isinstance(expected, float) and abs(found - expected) < 1e-4))


@pytest.mark.parametrize("design", [["--folds", "3"], ["--seeds", "2"]])
def test_compare(task: str, design: list[str], tanzaku: Tanzaku) -> None:
    kind = TASKS[task]
    options = ["--method", "lora", "--method", "prompt_tuning", "--workers", "1", *design]
    said = tanzaku("compare", "recipe.yaml", *options, "--out", "run")
    assert said.code == 0, said.err
    results = results_of(Path("run"))
    assert results["design"]["metric"] == kind.rank_by
    for each in results["candidates"]:
        assert each["scores"].keys() == {metric.name for metric in kind.metrics}
        assert each["test"].keys() == each["scores"].keys() and each["mean"] is not None
        assert each["interval"] is not None
    [pair] = results["comparisons"]
    assert pair["p"] is not None
    page = Path("run/report.html").read_text(encoding="utf-8")
    best = next(metric for metric in kind.metrics if metric.name == kind.rank_by)
    assert f"By the mean {best.title}" in page and ("<caption>" in page) == bool(results["candidates"][0]["confusion"])
    again = tanzaku("compare", "--resume", "--out", "run")
    assert again.code == 0, again.err


def test_interrupted_and_resumed(task: str, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is cut off after its first epoch ends with the figures of one that was not."""
    from tanzaku.cli.display import Display

    whole = tanzaku("train", "recipe.yaml", "--out", "whole")
    assert whole.code == 0, whole.err

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Display, "epoch_done", stop)
        assert tanzaku("train", "recipe.yaml", "--out", "run").code == 130
    again = tanzaku("train", "--resume", "--out", "run")
    assert again.code == 0, again.err
    [expected], [found] = results_of(Path("whole"))["jobs"], results_of(Path("run"))["jobs"]
    assert close(found["valid"], expected["valid"]) and close(found["test"], expected["test"])


def test_check(task: str, tanzaku: Tanzaku, base_dir: Path) -> None:
    for model in ([], ["--model", str(base_dir)]):
        said = tanzaku("check", "train.jsonl", "valid.jsonl", "--task", task, *model)
        assert said.code == 0, said.err + said.out
        assert "the first rows" in said.out and "training" in said.out


def test_a_metric_of_another_task_is_refused(task: str, tanzaku: Tanzaku) -> None:
    other = next(m.name for kind in TASKS.values() for m in kind.metrics if m not in TASKS[task].metrics)
    if any(metric.name == other for metric in TASKS[task].metrics):
        other = "nothing"
    known = TASKS[task].metrics[1].name
    assert_refused(tanzaku("train", "recipe.yaml", "--metric", other), "--metric", other, known)
    assert_refused(tanzaku("compare", "recipe.yaml", "--rank-by", other), "--rank-by", other, known)


def test_a_flag_of_another_task_is_refused(task: str, tanzaku: Tanzaku) -> None:
    """It would be passed over in silence."""
    assert tanzaku("train", "recipe.yaml", "--out", "run").code == 0
    own = TASKS[task].overrides
    for flag in {name for kind in TASKS.values() for name in kind.overrides} - own.keys():
        said = tanzaku("predict", "run/adapters/lora", "--data", "test.jsonl", f"--{flag.replace('_', '-')}", "a,b")
        assert_refused(said, flag.replace("_", "-"), f"task {task}", "leave it out")


def test_class_weights_are_for_classes(task: str, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    if task not in ("classification", "ordinal"):
        monkeypatch.setattr(loading, "load_for", None)  # before the model is loaded
    said = tanzaku("train", "recipe.yaml", "--class-weights", "--out", "run")
    if task in ("classification", "ordinal"):
        assert said.code == 0, said.err
    else:
        assert_refused(said, "'lora': class_weights weighs classes", task, "it is of classification, ordinal")


def test_focal_loss_is_of_cross_entropies(task: str, tanzaku: Tanzaku) -> None:
    """And what is measured stays the loss itself: the first epoch's figures of one row a step are larger."""
    said = tanzaku("train", "recipe.yaml", "--focal-gamma", "2", "--out", "run")
    if not TASKS[task].has_focal:
        assert_refused(said, "focal_gamma is 2", task, "leave it out", "classification")
        return
    assert said.code == 0, said.err
    assert tanzaku("train", "recipe.yaml", "--out", "plain").code == 0
    [focal], [plain] = (results_of(Path(out))["jobs"] for out in ("run", "plain"))
    assert focal["epochs"][0]["train_loss"] < 0.7 * plain["epochs"][0]["train_loss"]
    assert focal["epochs"][0]["valid"]["loss"] > 0.7 * plain["epochs"][0]["valid"]["loss"]


def test_the_example_of_the_docs(
    work: Path, monkeypatch: pytest.MonkeyPatch, model_dir: Path, tanzaku: Tanzaku
) -> None:
    """As it is printed, it is compared and predicted with."""
    text = (ROOT / "docs/add_a_task.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    module = types.ModuleType("grading")
    monkeypatch.setitem(sys.modules, "grading", module)
    exec(code, module.__dict__)
    monkeypatch.setitem(tasks.TASKS, "grading", module.Grading)
    for split, before in (("train", ""), ("valid", "the ")):
        texts = [f"{before}{text}{' of' * at}" for at in range(3) for text in ("cold sea", "rain", "warm sea")]
        lines = [json.dumps({"text": text, "label": at % 3}) for at, text in enumerate(texts)]
        Path(f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    Path("recipe.yaml").write_text(
        f"model: {model_dir}\ntask: grading\ndata: {{train: train.jsonl, valid: valid.jsonl}}\n"
        "train: {epochs: 2, batch_size: 2, learning_rate: 1e-2}\nmethods: [lora, ia3]\n",
        encoding="utf-8",
    )
    said = tanzaku("compare", "recipe.yaml", "--workers", "1", "--seeds", "2", "--out", "run")
    assert said.code == 0, said.err
    results = results_of(Path("run"))
    assert results["design"]["metric"] == "exact"
    assert results["candidates"][0]["scores"].keys() == {"loss", "exact", "mae"}
    said = tanzaku("predict", f"run/{results['candidates'][0]['adapter']}", "--data", "valid.jsonl", "--out", "out.tsv")
    assert said.code == 0, said.err
    assert Path("out.tsv").read_text(encoding="utf-8").splitlines()[0] == "text\tlabel\tpredicted"


@pytest.mark.parametrize("task", ["generation"], indirect=True)
def test_text_is_written_for_some_rows_after_each_epoch_and_for_all_at_the_end(task: str, tanzaku: Tanzaku) -> None:
    said = tanzaku("train", "recipe.yaml", "--sample", "3", "--metric", "chrf", "--restore-best", "--out", "run")
    assert said.code == 0, said.err
    [job] = results_of(Path("run"))["jobs"]
    assert all(math.isfinite(epoch["valid"]["chrf"]) for epoch in job["epochs"]) and job["best_epoch"] is not None
    assert f"validation loss {job['valid']['loss']:.4f}"[:20] in said.out
    rows = [json.loads(line) for line in Path("valid.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [each["text"] for each in job["predictions"]]
    assert len(texts) == len(rows) and all(isinstance(text, str) for text in texts)


@pytest.mark.parametrize("task", ["generation"], indirect=True)
def test_no_room_to_write_is_told_before_training(task: str, tanzaku: Tanzaku) -> None:
    said = tanzaku("train", "recipe.yaml", "--max-new-tokens", "60", "--out", "run")
    assert_refused(said, "has a prompt of 6 tokens, and with 60 new ones", "--max-new-tokens 58")


@pytest.mark.parametrize("task", ["generation"], indirect=True)
def test_prompts_of_training_rows_may_be_long(task: str, tanzaku: Tanzaku) -> None:
    """Nothing is written for them, but where they are validation rows in turn."""
    path = Path("train.jsonl")
    path.write_text(path.read_text(encoding="utf-8") + json.dumps({"prompt": "sea " * 60, "completion": "wind"}) + "\n")
    flags = ["recipe.yaml", "--max-length", "64", "--max-new-tokens", "8", "--out", "run"]
    said = tanzaku("train", *flags)
    assert said.code == 0, said.err
    said = tanzaku("compare", *flags, "--overwrite", "--folds", "2")
    assert_refused(said, "train.jsonl row 13 has a prompt of 60 tokens, and with 8 new ones", "--max-new-tokens 4")


@pytest.mark.parametrize("task", ["generation"], indirect=True)
def test_references_that_are_longer_than_what_is_written(task: str, tanzaku: Tanzaku, model_dir: Path) -> None:
    path = Path("valid.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[4] = json.dumps({"prompt": "rain", "completion": "a cold wind of winter"})
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    says = "1 of 12 references of {}valid.jsonl have more than 3 tokens .*; the longest needs --max-new-tokens 5"
    said = tanzaku("train", "recipe.yaml", "--out", "run")
    assert said.code == 0 and re.search(says.format(r"\S*"), said.out), said.out + said.err
    said = tanzaku("check", "recipe.yaml", "--model", model_dir)
    assert re.search(says.format(r"\S*"), said.out), said.out


@pytest.mark.parametrize("task", ["generation"], indirect=True)
def test_what_goes_by_the_end_of_a_row_cannot_write(task: str, tanzaku: Tanzaku) -> None:
    options = ["--method", "reft", "--set", "suffix_positions=2", "--set", "prefix_positions=1"]
    said = tanzaku("train", "recipe.yaml", *options, "--out", "run")
    assert_refused(said, "suffix_positions=2 goes by where a row ends", "set it to 0")


@pytest.mark.parametrize("task", ["generation"], indirect=True)
def test_plain_text_is_compared_by_its_loss(task: str, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "valid", "test"):
        lines = [json.loads(line) for line in Path(f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        texts = "".join(json.dumps({"text": line["prompt"]}) + "\n" for line in lines)
        Path(f"{split}.jsonl").write_text(texts, encoding="utf-8")
    for verb, flags in (("compare", ["--rank-by", "chrf"]), ("compare", []), ("train", ["--metric", "chrf"])):
        with monkeypatch.context() as patch:
            patch.setattr(loading, "load_for", None)  # before the model is loaded
            said = tanzaku(verb, "recipe.yaml", *flags, "--out", "run")
        key = "rank_by" if verb == "compare" else "metric of candidate 'lora'"
        assert_refused(said, f"{key} is chrf, and these rows (text) have loss, perplexity, token_accuracy alone")
    options = ["--method", "lora", "--method", "ia3", "--workers", "1", "--rank-by", "loss"]
    said = tanzaku("compare", "recipe.yaml", *options, "--out", "run")
    assert said.code == 0, said.err
    assert "perplexity" in said.out


@pytest.mark.parametrize("task", ["generation"], indirect=True)
def test_conversations_are_looked_at(task: str, tanzaku: Tanzaku) -> None:
    for split in ("train", "valid", "test"):
        lines = [json.loads(line) for line in Path(f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        chats = [
            [{"role": "user", "content": line["prompt"]}, {"role": "assistant", "content": line["completion"]}]
            for line in lines
        ]
        Path(f"{split}.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats), encoding="utf-8")
    said = tanzaku("check", "train.jsonl", "valid.jsonl", "--task", task)
    assert said.code == 0 and "assistant" in said.out, said.err
    assert_refused(tanzaku("train", "recipe.yaml", "--out", "run"), "has no chat template", "prompt and completion")
    Path("odd.jsonl").write_text('{"messages": 7}\n{"prompt": 5}\n', encoding="utf-8")


@pytest.mark.parametrize("task", ["generation"], indirect=True)
def test_a_prompt_that_is_no_text(task: str, tanzaku: Tanzaku) -> None:
    assert tanzaku("train", "recipe.yaml", "--out", "run").code == 0
    Path("odd.jsonl").write_text('{"prompt": "a"}\n{"prompt": 5}\n', encoding="utf-8")
    said = tanzaku("predict", "run/adapters/lora", "--data", "odd.jsonl")
    assert_refused(said, "odd.jsonl row 2", "expected text")


@pytest.mark.parametrize("task", ["generation"], indirect=True)
def test_the_base_without_training_stands_beside_what_it_learns(task: str, tanzaku: Tanzaku, model_dir: Path) -> None:
    said = tanzaku("compare", "recipe.yaml", "--folds", "2", "--workers", "1", "--out", "run")
    assert said.code == 0, said.err
    results = results_of(Path("run"))
    base, metric = results["base"], results["design"]["metric"]
    assert base["scores"].keys() == results["candidates"][0]["scores"].keys()
    assert len(base["scores"][metric]) == results["design"]["runs"] == 2
    assert base["comparison"]["a"] == "the base" or base["comparison"]["b"] == "the base"
    assert "the base, not trained" in said.out and "Without training, the base has" in said.out
    assert len(results["rows"]["base"]) == len(TEXTS) and set(base["test"]) == set(base["scores"])

    # By transformers' own program: the base as it was given, one row at a time.
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = [json.loads(line) for line in Path("test.jsonl").read_text(encoding="utf-8").splitlines()]
    for line, found in zip(rows, results["rows"]["base"], strict=True):
        asked = tokenizer(line["prompt"], return_tensors="pt")["input_ids"]
        out = model.generate(asked, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, asked.shape[1] :]
        assert found["text"] == tokenizer.decode(out, skip_special_tokens=True).strip()

    state = Path("run/state/base.json")
    state.write_text(
        json.dumps({"predictions": [{**p, "text": "mild"} for p in json.loads(state.read_text())["predictions"]]})
    )
    said = tanzaku("compare", "--resume", "--out", "run")
    assert said.code == 0 and results_of(Path("run"))["base"]["scores"]["exact_match"] != base["scores"]["exact_match"]


@pytest.mark.parametrize("task", ["choice"], indirect=True)
def test_choices_by_an_encoder_decoder(task: str, tanzaku: Tanzaku, bart_dir: Path) -> None:
    """It is said to be one, since its rows have other tokens."""
    options = ["recipe.yaml", "--model", str(bart_dir), "--out", "run"]
    assert_refused(tanzaku("train", *options), "the model (bart) is an encoder-decoder; give --encoder-decoder")
    said = tanzaku("train", *options, "--encoder-decoder")
    assert said.code == 0, said.err
    [job] = results_of(Path("run"))["jobs"]
    said = tanzaku("predict", "run/adapters/lora", "--data", "test.jsonl", "--out", "out.jsonl")
    assert said.code == 0, said.err
    lines = [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]
    for line, prediction in zip(lines, job["predictions"], strict=True):
        assert line["predicted"] == max(prediction["scores"], key=prediction["scores"].get)
