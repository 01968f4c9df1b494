from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from tanzaku.compare.statistics import Comparison, Design, Ranking, Run, Scored, Standing, rank
from tanzaku.compare.verdict import against_base, sentences
from tanzaku.tasks.classification import Classification
from tanzaku.tasks.metrics import ACCURACY, ROC_AUC
from tanzaku.tasks.task import LOSS
from task_data import labelled

FOLDS = Design("folds", ROC_AUC, train_rows=400, valid_rows=100)
NOISE = np.array([0.02, -0.02, 0.01, -0.01, 0.0])


def folded(name: str, values: Sequence[float], parameters: int = 24_000) -> Scored:
    return Scored(name, [Run(0, fold, 0, float(value)) for fold, value in enumerate(values)], parameters)


def seeded(name: str, right: Sequence[int], parameters: int = 24_000) -> Scored:
    """A run for each seed, right in that many of 100 rows."""
    labels = np.arange(100) % 2
    runs = []
    for seed, count in enumerate(right):
        guess = np.where(np.arange(100) < count, labels, 1 - labels)
        probabilities = (np.eye(2)[guess] * 0.8 + 0.1).tolist()
        records = Classification(("a", "b")).recorded(probabilities, labelled(labels.tolist()))
        runs.append(Run(0, 0, seed, count / 100, ACCURACY.statistics(records)))
    return Scored(name, runs, parameters)


SPLIT = Design("split", ACCURACY, train_rows=300, valid_rows=100, strata=np.arange(100) % 2)


def verdict(scored: Sequence[Scored], design: Design = FOLDS, failed: dict[str, str] | None = None) -> list[str]:
    return sentences(rank(scored, design), design, failed)


LORA = folded("lora", 0.9 + NOISE, 1_500_000)
IA3 = folded("ia3", 0.89 - NOISE, 24_000)
ADALORA = folded("adalora", 0.88 + NOISE[::-1], 900_000)
HEAD = folded("head", 0.55 + NOISE[::-1], 3)
FULL = folded("full", 0.5 - NOISE, 5)
BEST = "lora has the best mean ROC-AUC, 0.900 (95% interval 0.871 to 0.929, 5 runs)."
CHOSEN = (
    "Of {} that could be the best these rows put it first, partly by luck: on others expect it to be somewhat worse."
)
# 0.02, -0.02, 0.01, -0.01, 0: variance 0.00025; (1/5 + 100/400) of it is a standard error of 0.010607, by 2.776 0.0294.


def once(each: Scored) -> Scored:
    return replace(each, runs=each.runs[:1])


def test_tied_cheapest_and_worse() -> None:
    assert verdict([LORA, IA3, ADALORA, FULL]) == [
        BEST,
        CHOSEN.format(3),
        "The data cannot tell lora from ia3 and adalora (each adjusted p is at least 0.05).",
        "A true difference of 0.091 is found in 80 of 100 such comparisons.",
        "Nothing cheaper is shown to be as good as lora: it trains 1,500,000 parameters.",
        "full is worse than lora by 0.400 (0.341 to 0.459, adjusted p below 0.001).",
    ]


def test_the_best_of_several_is_shown_by_rows_that_did_not_choose_it() -> None:
    ranking = rank([LORA, IA3, ADALORA], FOLDS)
    assert sentences(ranking, FOLDS, tested=0.8512)[1] == (
        "Of 3 that could be the best these rows put it first, partly by luck; "
        "on the test rows, which chose nothing, its adapter has 0.851."
    )
    assert sentences(ranking, FOLDS, tested=math.nan)[1] == CHOSEN.format(3)
    assert not any("by luck" in sentence for sentence in verdict([LORA, FULL, HEAD]))  # no other could have been it


def test_two_that_are_tied() -> None:
    assert verdict([replace(LORA, trainable_parameters=10), IA3]) == [
        BEST,
        CHOSEN.format(2),
        "The data cannot tell lora from ia3 (p 0.662).",
        "A true difference of 0.080 is found in 80 of 100 such comparisons.",
        "Of these, lora, the best, also is the cheapest: it trains 10 parameters.",
    ]


def test_what_is_cheaper_and_as_good_is_named() -> None:
    found = verdict([LORA, IA3], replace(FOLDS, margin=0.05))[-1]
    assert found == (
        "Of these, ia3 is the cheapest that is expected to lose no more than 0.05 against lora: "
        "it trains 24,000 parameters."
    )
    held = verdict([LORA, IA3], replace(FOLDS, margin=0.05, beside=("accuracy", "macro F1")))[-1]
    assert "no more than 0.05 against lora, in accuracy and macro F1 too: it trains" in held
    loss = replace(FOLDS, metric=LOSS, margin=0.1)
    assert "no more than 10% of it against" in verdict([IA3, replace(LORA, trainable_parameters=9)], loss)[-1]


def test_everyone_is_tied() -> None:
    scored = [folded(f"m{i}", 0.9 - i / 1000 + NOISE * (-1) ** i) for i in range(12)]
    assert verdict(scored)[2] == "The data cannot tell m0 from any of the other 11 (each adjusted p is at least 0.05)."
    assert verdict(scored[:3])[2] == "The data cannot tell m0 from m1 and m2 (each adjusted p is at least 0.05)."
    assert verdict([*scored[:8], FULL])[2].startswith("The data cannot tell m0 from m1, m2, m3, m4, m5 and 2 more (")


def test_one_stands_alone() -> None:
    assert verdict([LORA, FULL]) == [BEST, "full is worse than lora by 0.400 (0.341 to 0.459, p below 0.001)."]
    assert verdict([LORA, FULL, HEAD]) == [
        BEST,
        "head and full are worse than lora, by 0.350 to 0.400 (each adjusted p is below 0.05).",
    ]
    third = folded("none", 0.45 + NOISE)
    assert verdict([LORA, FULL, HEAD, third])[1].startswith("All 3 others are worse than lora, by 0.350 to 0.450 (")


def test_less_loss_is_better_in_words_too() -> None:
    design = replace(FOLDS, metric=LOSS)
    loss = [folded("lora", 0.4 + NOISE / 1000), folded("ia3", 0.4003 - NOISE / 1000)]
    assert verdict(loss, design) == [
        "lora has the best mean validation loss, 0.400 (95% interval 0.393 to 0.407, 5 runs).",
        "ia3 is worse than lora by 0.00030 (0.00024 to 0.00036, p below 0.001).",
    ]


def test_one_run_each_is_no_verdict() -> None:
    assert verdict([once(LORA), once(FULL)]) == [
        "lora has the best ROC-AUC, 0.920 (1 run).",
        CHOSEN.format(2),
        "One run each: what training anew would change is not known, so there is no verdict; "
        "measure with --seeds 3 or --folds 5.",
    ]
    assert verdict([seeded("lora", [90]), seeded("full", [40])], SPLIT) == [
        "lora has the best accuracy, 0.900 (other validation rows: 0.840 to 0.950, 1 run).",
        CHOSEN.format(2),
        "One run each: what training anew would change is not known and not in the interval, so there is no verdict; "
        "measure with --seeds 3 or --folds 5.",
    ]
    one_fold = [Scored(name, [Run(0, 0, seed, 0.5) for seed in range(2)], 1) for name in "ab"]
    assert verdict(one_fold)[2].startswith("Too few runs: ")


def test_one_candidate() -> None:
    figure = "lora is the only candidate: its mean ROC-AUC is 0.900 (95% interval 0.871 to 0.929, 5 runs)."
    assert verdict([LORA]) == [figure]
    assert verdict([LORA], failed={"ia3": "out of memory."}) == [
        figure,
        "ia3 (out of memory) failed and is not ranked.",
    ]
    first, second = verdict([seeded("lora", [90])], SPLIT)
    assert first == "lora is the only candidate: its accuracy is 0.900 (other validation rows: 0.840 to 0.950, 1 run)."
    assert second.startswith("One run: what training anew would change is not known and not in the interval, ")


def test_seeds_that_differ_much_hide_every_difference() -> None:
    assert verdict([seeded("a", [90, 88]), seeded("b", [80, 40])], SPLIT)[3] == (
        "With so few runs, hardly any difference would be found; more seeds or folds would help."
    )


def test_failures() -> None:
    assert verdict([LORA, FULL], failed={"p": "x", "q": "y"})[-1] == "p (x) and q (y) failed and are not ranked."
    assert verdict([LORA, FULL], failed=dict.fromkeys("pqr", "x"))[-1] == "p, q and r failed and are not ranked."
    assert sentences(None, FOLDS, {"lora": "out of memory"}) == [
        "No candidate finished, so there is no verdict.",
        "lora (out of memory) failed and is not ranked.",
    ]


def test_no_number() -> None:
    lost, gone = (folded(name, [math.nan] * 5) for name in ("lost", "gone"))
    assert verdict([LORA, FULL, lost])[-1] == "lost is ranked last: in a run, ROC-AUC was no number."
    assert verdict([LORA, lost, gone]) == [BEST, "gone and lost are ranked last: in a run, ROC-AUC was no number."]
    assert verdict([lost, gone]) == [
        "No candidate has a figure, so there is no verdict: in a run of each, ROC-AUC is no number."
    ]


@pytest.mark.parametrize(
    ("p", "words"), [(0.0004, "p below 0.001"), (0.0123, "p 0.012"), (0.04999, "p 0.04999"), (0.05, "p 0.05000")]
)
def test_p_shows_its_side_of_the_level(p: float, words: str) -> None:
    pair = Comparison("a", "b", 0.1, (0.01, 0.19), p, p, 0.1)
    standings = tuple(Standing(name, mean, None, 7) for name, mean in (("a", 0.9), ("b", 0.8)))
    tied = ("a",) if pair.told else ("a", "b")
    text = " ".join(sentences(Ranking(standings, (pair,), "a", tied, "a", 5), FOLDS))
    assert f"{words})" in text
    assert ("b is worse than a" in text) == pair.told == ("cannot tell" not in text)


@pytest.mark.parametrize("seed", range(5))
def test_every_candidate_is_spoken_of_once(seed: int) -> None:
    """As tied, worse, ranked last or failed, in a handful of short sentences."""
    rng = np.random.default_rng(seed)
    names = ["one", "two", "three", "four", "five"]
    scored = [folded(name, rng.uniform(0.3, 0.9) + rng.normal(size=5) / 50) for name in names]
    ranking = rank([*scored, folded("six", [math.nan] * 5)], FOLDS)
    found = sentences(ranking, FOLDS, {"seven": "out of memory"})
    assert 2 <= len(found) <= 8
    assert all(len(sentence) < 160 and sentence.endswith(".") for sentence in found)
    everyone = any("any of the other" in sentence for sentence in found) or any(
        sentence.startswith("All ") for sentence in found
    )
    for name in ["six", "seven", *([] if everyone else set(names) - {ranking.best})]:
        about = [s for s in found if re.search(rf"\b{name}\b", s) and not s.startswith(("Of these", "Nothing"))]
        assert len(about) == 1, name


def beside_base(best: Scored, base: Sequence[float], design: Design = FOLDS) -> str:
    ranking = rank([best, folded("the base", base, 0)], design)
    return against_base(ranking, ranking.comparisons[0], design)


def test_the_base_without_training() -> None:
    assert beside_base(LORA, 0.55 + NOISE[::-1]) == (
        "Without training, the base has 0.550; lora is better by 0.321 to 0.379 (p below 0.001)."
    )
    assert beside_base(LORA, 0.95 + NOISE) == (
        "Without training, the base has 0.950; lora is worse by 0.031 to 0.069 (p 0.002)."
    )
    assert re.fullmatch(
        r"Without training, the base has 0\.895, and the data cannot tell lora from it \(p 0\.\d+\)\.",
        beside_base(LORA, 0.895 - NOISE),
    )
    assert beside_base(once(LORA), [0.5]) == "Without training, the base has 0.500."
    assert "no figure" in beside_base(LORA, [math.nan] * 5)
