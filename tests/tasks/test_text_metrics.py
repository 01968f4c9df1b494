from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from tanzaku.errors import TanzakuError
from tanzaku.tasks import text_metrics
from tanzaku.tasks.metrics import interval_of
from tanzaku.tasks.task import Metric
from tanzaku.tasks.text_metrics import (
    BLEU,
    BLEU_CHARACTERS,
    CHRF,
    EXACT_MATCH,
    ROUGE_L,
    ROUGE_L_CHARACTERS,
    VALID_JSON,
    metric_from,
    user_metric,
    writing_of,
)

ALL = (CHRF, BLEU, BLEU_CHARACTERS, ROUGE_L, ROUGE_L_CHARACTERS, EXACT_MATCH, VALID_JSON)


class Characters:
    """A tokenizer as rouge-score takes one."""

    def tokenize(self, text: str) -> list[str]:
        return [each for each in text.lower() if not each.isspace()]


def rouge_l(texts: list[str], references: list[str], tokenizer: Any = None) -> float:
    scorer = RougeScorer(["rougeL"], tokenizer=tokenizer)
    pairs = zip(texts, references, strict=True)
    return float(np.mean([scorer.score(reference, text)["rougeL"].fmeasure for text, reference in pairs]))


def by_the_libraries(texts: list[str], references: list[str]) -> dict[str, float]:
    """By title."""
    return {
        "chrF": sacrebleu.corpus_chrf(texts, [references]).score / 100,
        "BLEU": sacrebleu.corpus_bleu(texts, [references]).score / 100,
        "BLEU (characters)": sacrebleu.corpus_bleu(texts, [references], tokenize="char").score / 100,
        "ROUGE-L": rouge_l(texts, references),
        "ROUGE-L (characters)": rouge_l(texts, references, Characters()),
        "exact match": float(np.mean([a.strip() == b.strip() for a, b in zip(texts, references, strict=True)])),
        "valid JSON": float(np.mean([text_metrics._is_json(text) for text in texts])),
    }


def figure(metric: Metric, texts: list[str], references: list[str]) -> float:
    return metric.statistics({"text": texts, "reference": references}).value()


# Words that come again, so that n-grams of every order match now and then, and anything at all.
WORDS = [
    "the",
    "The",
    "cat",
    "sat",
    "on",
    "mat,",
    "42",
    "it's",
    ".",
    "e.g.",
    "春の",
    "海",
    "終日",
    "のたり",
    "かな。",
    "é",
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join),
    st.lists(st.sampled_from(WORDS), max_size=12).map("".join),
    st.text(max_size=12),
    st.just(""),
)
ROWS = st.lists(st.one_of(st.tuples(TEXTS, TEXTS), TEXTS.map(lambda text: (text, text))), min_size=1, max_size=8)


@settings(deadline=None, max_examples=300)
@given(rows=ROWS)
def test_figures_are_those_of_the_libraries(rows: list[tuple[str, str]]) -> None:
    texts, references = map(list, zip(*rows, strict=True))
    expected = by_the_libraries(texts, references)
    assert {m.title: figure(m, texts, references) for m in ALL} == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(rows=ROWS, seed=st.integers(0, 10_000))
def test_drawn_anew_they_are_those_of_the_rows_drawn(rows: list[tuple[str, str]], seed: int) -> None:
    texts, references = map(list, zip(*rows, strict=True))
    n, rng = len(rows), np.random.default_rng(seed)
    draws = [rng.integers(n, size=n) for _ in range(3)]
    counts = np.stack([np.bincount(draw, minlength=n) for draw in draws], axis=1).astype(float)
    expected = [by_the_libraries([texts[i] for i in draw], [references[i] for i in draw]) for draw in draws]
    for metric in ALL:
        found = metric.statistics({"text": texts, "reference": references})
        assert found.known and len(found.rows) == n
        assert found.drawn(counts) == pytest.approx([each[metric.title] for each in expected], abs=1e-12)


def test_figures_of_whole_sentences() -> None:
    """What random words hardly reach: matches of every order, and a text that is shorter than its reference."""
    references = ["The quick brown fox jumps over the lazy dog.", "It's 3.14, isn't it?", "An apple a day."]
    texts = ["The quick brown fox jumped over a lazy dog!", "It's 3.14, is it not?", "An apple"]
    expected = by_the_libraries(texts, references)
    found = {m.title: figure(m, texts, references) for m in ALL}
    assert found == pytest.approx(expected, abs=1e-12)
    assert all(0.2 < found[m.title] < 0.9 for m in ALL[:5])


def test_the_figure_of_a_row_alone() -> None:
    rows = [("the warm rain", "a warm rain"), ("", "x"), ("春の海", "春の海"), ("cold", "of winter")]
    texts, references = map(list, zip(*rows, strict=True))
    for metric in ALL:
        found = metric.statistics({"text": texts, "reference": references}).by_row()
        alone = [by_the_libraries([text], [reference])[metric.title] for text, reference in rows]
        assert metric.by_row and found == pytest.approx(alone, abs=1e-12), metric.title


def test_a_share_of_rows_has_an_interval() -> None:
    records = {"text": ["a", " b\n", "{}", "c"], "reference": ["a", "b", "x", "C"]}
    assert EXACT_MATCH.statistics(records).value() == 0.5
    assert VALID_JSON.statistics(records).value() == 0.25
    for metric in ALL:
        assert (interval_of(metric, records) is not None) == metric.proportion


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"a": [1, 2.5e3, null, true, "é\\n"]}', True),
        (' "text" \n', True),
        ("-0", True),
        ("9" * 10_000, True),
        ("", False),
        ("NaN", False),
        ("[-Infinity]", False),
        ("{'a': 1}", False),
        ('{"a": 1,}', False),
        ('{"a": 1} and more', False),
        ('```json\n{"a": 1}\n```', False),
        ("[" * 100_000, False),
    ],
)
def test_what_json_is(text: str, valid: bool) -> None:
    assert figure(VALID_JSON, [text], [""]) == valid


@pytest.mark.parametrize(
    ("references", "writing"),
    [
        (["The cat sat on the mat.", "Le café est déjà fermé."], "latin"),
        (["春の海 終日のたり のたりかな"], "unspaced"),
        (["你好,世界", "Transformer 模型很大"], "unspaced"),
        (["안녕하세요 세계"], "unspaced"),
        (["สวัสดีชาวโลก"], "unspaced"),
        (["ラーメン", "ﾗｰﾒﾝ"], "unspaced"),
        (["Съешь ещё этих мягких французских булок"], "other"),
        (["Tôi không hiểu tiếng Việt của bạn ấy"], "other"),
        (["The word 海 means sea, and the word 山 means mountain."], "latin"),
        (["42", "", "{}"], "latin"),
        ([], "latin"),
    ],
)
def test_how_texts_are_written_decides_what_is_compared(references: list[str], writing: str) -> None:
    assert writing_of(references) == writing
    metrics = text_metrics.text_metrics(writing_of(references))
    titles = {"latin": ["BLEU", "ROUGE-L"], "other": ["BLEU", "ROUGE-L (characters)"]}
    assert [m.title for m in metrics[1:3]] == titles.get(writing, ["BLEU (characters)", "ROUGE-L (characters)"])
    assert [m.name for m in metrics] == [m.name for m in text_metrics.text_metrics()]


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("春の海ひねもすのたりかな", "春の海終日のたりのたりかな"),
        ("今天天气很好", "今天天气不好吗"),
        ("Съешь этих мягких булок", "Съешь ещё этих мягких французских булок"),
    ],
)
def test_texts_that_are_alike_have_figures_in_every_writing(text: str, reference: str) -> None:
    for metric in text_metrics.text_metrics(writing_of([reference]))[:3]:
        assert 0.1 < figure(metric, [text], [reference]) < 1, metric.title


def test_without_sacrebleu_there_is_a_line_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.helpers", None)
    for metric in (CHRF, BLEU):
        with pytest.raises(TanzakuError, match="pip install sacrebleu"):
            figure(metric, ["a"], ["a"])


def test_metrics_are_told_without_their_libraries() -> None:
    """A recipe names one before it waits for any."""
    code = "import sys, tanzaku.tasks.text_metrics; print({'sacrebleu', 'numpy', 'torch'} & sys.modules.keys())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


# -- a user's own


def written(folder: Path, code: str) -> Path:
    path = folder / "mine.py"
    path.write_text(code, encoding="utf-8")
    return path


RECORDS = {"text": ["a", "bb", "ccc"], "reference": ["x", "yy", "z"]}


def test_a_users_own_function_is_a_metric(tmp_path: Path) -> None:
    code = """
        from dataclasses import dataclass
        import numpy as np

        @dataclass
        class Ratio:
            value: float

        def length_ratio(text, reference):
            assert isinstance(text, str) and isinstance(reference, str)
            return np.float32(Ratio(len(text) / len(reference)).value)

        length_ratio.better, length_ratio.bounds = "lower", (0, float("inf"))
    """
    written(tmp_path, "\n".join(line[8:] for line in code.splitlines()))
    metric = user_metric("mine.py:length_ratio", tmp_path)
    assert (metric.name, metric.title, metric.sign, metric.bounded) == ("length_ratio", "length ratio", -1, False)
    found = metric.statistics(RECORDS)
    assert found.value() == pytest.approx((1 + 1 + 3) / 3)
    counts = np.array([[3, 0], [0, 1], [0, 2]], dtype=float)
    assert found.drawn(counts) == pytest.approx([1.0, (1 + 3 + 3) / 3])
    again = pickle.loads(pickle.dumps(metric))  # as another process has it
    assert again == metric and again.statistics(RECORDS).value() == found.value()
    told = metric_from(json.loads(json.dumps(metric.to_json())), "")
    assert replace(told, statistics=metric.statistics) == metric and told.to_json() == metric.to_json()
    with pytest.raises(TanzakuError, match="length_ratio is a function of whoever trained, and is not run again"):
        told.statistics(RECORDS)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "a b"},
        {"name": 3},
        {"better": "more"},
        {"bounds": [1, 0]},
        {"bounds": None},
        {"file": 1},
        {"sha256": 0},
    ],
)
def test_what_a_file_says_of_a_metric_is_checked(change: dict[str, Any]) -> None:
    about = {"name": "f", "better": "lower", "bounds": [0, None], "file": "mine.py", "sha256": "00"}
    assert metric_from(about, "").bounds == (0.0, math.inf)
    with pytest.raises(TanzakuError, match=r"^tanzaku.json: measured is .*, expected name, better"):
        metric_from({**about, **change}, "tanzaku.json: ")


def test_a_file_that_changes_during_a_run_is_noticed(tmp_path: Path) -> None:
    """In another process, say, that loads it later."""
    path = written(tmp_path, "def f(text, reference): return 1.0")
    first = user_metric("mine.py:f", tmp_path)
    path.write_text("def f(text, reference): return 2.0", encoding="utf-8")
    assert user_metric("mine.py:f", tmp_path).statistics(RECORDS).value() == 2.0
    text_metrics._loaded.cache_clear()
    with pytest.raises(TanzakuError, match=r"mine\.py has changed since the run began"):
        first.statistics(RECORDS)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "def f(text, reference):\n    raise KeyError('no\\nsuch')",
            r"f of mine\.py raised KeyError: .* \(line 2\) at row 1, of",
        ),
        (
            "def f(text, reference):\n    return 1 / (len(text) - 2)",
            r"\(line 2\) at row 2, of the text 'bb' and the reference 'yy'$",
        ),
        ("def f(text):\n    return 1.0", "raised TypeError: .*takes 1 positional argument.* at row 1, of"),
        ("def f(text, reference):\n    return None", r"returned None \(NoneType\) at row 1, .*; expected a number"),
        ("def f(text, reference):\n    return [1.0]", r"returned \[1.0\] \(list\) at row 1"),
        ("def f(text, reference):\n    return float('nan') if len(text) > 2 else 1", "returned nan at row 3"),
        ("def f(text, reference):\n    return float('inf')", "returned inf at row 1, .*; expected a finite number"),
        ("def f(text, reference):\n    return '1'", r"returned '1' \(str\)"),
        (
            "def f(text, reference):\n    return len(text)\nf.bounds = (0, 2)",
            "returned 3 at row 3, .*; expected 0 to 2, its",
        ),
    ],
)
def test_what_a_users_function_does_wrong_is_told(tmp_path: Path, code: str, message: str) -> None:
    written(tmp_path, code)
    metric = user_metric("mine.py:f", tmp_path)
    with pytest.raises(TanzakuError, match=message) as told:
        metric.statistics(RECORDS)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("mine.py", "found metric 'mine.py', expected a file and a function in it: my_file.py:function"),
        (":f", "expected a file and a function"),
        ("mine.py:f()", "expected a file and a function"),
        ("other.py:f", r"there is no .*other\.py; a metric's file is looked for from the recipe's folder"),
        ("mine.txt:f", r"mine\.txt is no Python file"),
        ("mine.py:similarty", r"has no function similarty \(did you mean 'similarity'\?\); it has similarity"),
        ("mine.py:number", "has no function number"),
        ("mine.py:chrf", "chrf is a metric already, as are loss, .*bleu.*; rename the function"),
        ("broken.py:f", r"broken\.py cannot be run: SyntaxError"),
        ("failing.py:f", r"failing\.py cannot be run: ModuleNotFoundError: No module named 'nothing_of_the_kind'"),
        ("leaving.py:f", r"leaving\.py cannot be run: SystemExit: 3"),
        ("folder.py:f", r"folder\.py is a directory; expected a file"),
        ("mine.py:least", "least.better is 'less', expected 'higher' or 'lower'"),
        ("mine.py:wide", r"wide.bounds is \(1, 0\), expected two numbers, as in \(0, 1\)"),
    ],
)
def test_a_function_that_is_not_there_is_told_at_once(tmp_path: Path, named: str, message: str) -> None:
    code = "number = 3\ndef similarity(text, reference): return 1.0\ndef chrf(a, b): return 1.0\n"
    code += "def least(a, b): return 1.0\ndef wide(a, b): return 1.0\nleast.better = 'less'\nwide.bounds = (1, 0)"
    written(tmp_path, code)
    for name, code in {"broken": "def f(:", "failing": "import nothing_of_the_kind", "leaving": "exit(3)"}.items():
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(TanzakuError, match=message) as told:
        user_metric(named, tmp_path)
    assert "\n" not in str(told.value)


def test_no_code_is_run_from_an_adapters_directory(tmp_path: Path) -> None:
    """Not by a link into it either."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    written(adapter, f"open({str(tmp_path / 'ran')!r}, 'w')\ndef f(text, reference): return 1.0")
    (tmp_path / "linked.py").symlink_to(adapter / "mine.py")
    for named in ("adapter/mine.py:f", "linked.py:f"):
        with pytest.raises(TanzakuError, match="stands in an adapter's directory, from which no code is run"):
            user_metric(named, tmp_path)
    assert not (tmp_path / "ran").exists()
