"""What predictions are worth: metrics of a classifier, its confusion matrix, and an interval for a share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, roc_auc_score
from torch import Tensor, float64
from torch.nn.functional import nll_loss

from tanzaku.errors import TanzakuError

Array = np.ndarray[Any, np.dtype[Any]]


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Figures of N predictions, computed in float64 on the CPU.

    Args:
        logits: [N, C], any float type.
        labels: [N], class ids from 0 to C - 1.

    Returns:
        ``loss``: mean cross entropy in nats, unweighted. ``accuracy``. ``roc_auc``: of the probability of
        label 1 for two classes; beyond, the mean over classes of one against the rest, without the classes
        that every row or no row belongs to; nan when none is left. ``macro_f1``: over the classes seen or
        predicted. All four are nan when a probability is.

    Raises:
        TanzakuError: no rows, fewer than two classes, or shapes or label ids that do not fit each other.
    """
    logits, labels = _checked(logits, labels)
    log_probabilities = logits.log_softmax(dim=1)
    if log_probabilities.isnan().any():
        return dict.fromkeys(("loss", "accuracy", "roc_auc", "macro_f1"), math.nan)
    truth, predicted = labels.numpy(), logits.numpy().argmax(axis=1)
    return {
        "loss": float(nll_loss(log_probabilities, labels)),
        "accuracy": float(accuracy_score(truth, predicted)),
        "roc_auc": _roc_auc(truth, log_probabilities.exp().numpy()),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0)),
    }


def _roc_auc(truth: Array, probabilities: Array) -> float:
    classes = probabilities.shape[1]
    positives = [1] if classes == 2 else range(classes)
    areas = [
        float(roc_auc_score(truth == label, probabilities[:, label]))
        for label in positives
        if 0 < (truth == label).sum() < len(truth)
    ]
    return sum(areas) / len(areas) if areas else math.nan


def confusion(logits: Tensor, labels: Tensor, num_labels: int) -> list[list[int]]:
    """Counts [true][predicted] of N rows; a row with a nan logit predicts nothing and is not counted."""
    logits, labels = _checked(logits, labels)
    if logits.shape[1] != num_labels:
        raise TanzakuError(f"logits have {logits.shape[1]} classes, expected num_labels {num_labels}")
    valid = ~logits.isnan().any(dim=1)
    if not valid.any():
        return [[0] * num_labels for _ in range(num_labels)]
    predicted = logits[valid].numpy().argmax(axis=1)
    counts: list[list[int]] = confusion_matrix(labels[valid].numpy(), predicted, labels=range(num_labels)).tolist()
    return counts


def _checked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the CPU, logits in float64."""
    if logits.ndim != 2 or labels.ndim != 1 or len(logits) != len(labels) or logits.shape[1] < 2:
        raise TanzakuError(
            f"logits {list(logits.shape)} and labels {list(labels.shape)} do not fit, "
            f"expected [N, C] and [N] with two classes or more"
        )
    if not len(labels):
        raise TanzakuError("there are no predictions to measure; expected at least one row")
    lowest, highest, classes = int(labels.min()), int(labels.max()), logits.shape[1]
    if lowest < 0 or highest >= classes:
        strange = lowest if lowest < 0 else highest
        raise TanzakuError(f"label id {strange} is outside the {classes} classes 0 to {classes - 1}")
    return logits.detach().cpu().to(float64), labels.detach().cpu().long()


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval (low, high) of the share ``successes / n``, which also holds near 0 and 1.

    Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    if not 0 <= successes <= n or n < 1:
        raise TanzakuError(f"found {successes} successes of {n}, expected 0 to n successes of at least one")
    if not 0 < confidence < 1:
        raise TanzakuError(f"confidence is {confidence}, expected a share between 0 and 1, such as 0.95")
    interval = binomtest(successes, n).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)
