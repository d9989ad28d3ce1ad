"""Numbers that say how good predictions are: those of GLUE, by scikit-learn and scipy.

N samples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor


def accuracy(said_N: np.ndarray, truth_N: np.ndarray) -> float:
    return float((said_N == truth_N).mean())


def f1(said_N: np.ndarray, truth_N: np.ndarray) -> float:
    """Of class 1 against class 0; 0 where it is neither said nor true."""
    from sklearn.metrics import f1_score

    return float(f1_score(truth_N, said_N, zero_division=0.0))


def macro_f1(said_N: np.ndarray, truth_N: np.ndarray) -> float:
    """Mean over the classes."""
    from sklearn.metrics import f1_score

    return float(f1_score(truth_N, said_N, average="macro", zero_division=0.0))


def matthews(said_N: np.ndarray, truth_N: np.ndarray) -> float:
    """Correlation of classes; 0 where all predictions, or all truths, are one class."""
    from sklearn.metrics import matthews_corrcoef

    if is_constant(said_N) or is_constant(truth_N):
        return 0.0
    return float(matthews_corrcoef(truth_N, said_N))


def pearson(said_N: np.ndarray, truth_N: np.ndarray) -> float:
    """0 where all predictions, or all truths, are equal."""
    from scipy.stats import pearsonr

    return 0.0 if is_constant(said_N) or is_constant(truth_N) else defined(pearsonr(said_N, truth_N)[0])


def spearman(said_N: np.ndarray, truth_N: np.ndarray) -> float:
    """0 where all predictions, or all truths, are equal."""
    from scipy.stats import spearmanr

    return 0.0 if is_constant(said_N) or is_constant(truth_N) else defined(spearmanr(said_N, truth_N)[0])


def is_constant(x_N: np.ndarray) -> bool:
    return len(x_N) < 2 or bool((x_N == x_N[0]).all())


def defined(value: float) -> float:
    return 0.0 if math.isnan(value) else float(value)


Metric = Callable[[np.ndarray, np.ndarray], float]
METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
OF_NUMBERS = ("pearson", "spearman")
"""The others are of classes."""


def check_metrics(names: tuple[str, ...], outputs: int, source: str) -> None:
    """Raises ValueError for metrics that are not known, or not of a head with so many outputs."""
    if not names:
        raise ValueError(f"{source} names no metric; there are {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            raise ValueError(f"{source}: metric {name!r} is not known; there are {', '.join(METRICS)}")
        if (name in OF_NUMBERS) != (outputs == 1):
            has = "one output, a number" if outputs == 1 else f"{outputs} classes"
            fitting = [other for other in METRICS if (other in OF_NUMBERS) == (outputs == 1)]
            raise ValueError(f"{source}: {name} does not go with {has}; take of {', '.join(fitting)}")
        if name == "f1" and outputs != 2:
            raise ValueError(f"{source}: f1 is of two classes, not of {outputs}; macro_f1 is of any number")


def measure(names: tuple[str, ...], logits_NC: Tensor, truth_N: Tensor) -> dict[str, float]:
    """Each metric of a head's outputs, and `score`, their mean, by which checkpoints are chosen.

    One output is a number, several are classes.
    """
    logits_NC, truth = logits_NC.double(), truth_N.double().numpy()
    is_number = logits_NC.shape[1] == 1
    said = (logits_NC[:, 0] if is_number else logits_NC.argmax(1)).numpy()
    if not is_number:
        truth = truth.astype(np.int64)
    found = {name: METRICS[name](said, truth) for name in names}
    return found | {"score": sum(found.values()) / len(found)}
