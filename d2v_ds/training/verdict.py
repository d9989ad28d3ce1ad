"""What the numbers of health mean, in a word: is this modality learning, or how does it fail?

Thresholds are set by runs (docs/health.md): every shipped tiny recipe of 2.0 stays on the healthy side of each of them
from its first step to its last, and runs that are known to fail do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["healthy", "position-only", "constant", "low-rank", "diverging"]

LEAST_CONTENT = 0.03
LEAST_ENCODER_CONTENT = 0.002
"""The student's output is mostly position for a while in healthy runs of speech, down to 0.04."""
LEAST_TOKEN_SPREAD = 4e-3
"""Rounding to bf16 alone puts tokens that are all alike 0.001 to 0.002 apart; the student's output in healthy runs of
speech goes down to 0.014 for a while."""
LEAST_RANK = 8.0
LEAST_ENCODER_RANK = 3.0
LEAST_EXPLAINED = -50.0
"""A fresh network's is -2 to -15: the more layers are averaged, the less their mean varies."""


@dataclass(frozen=True)
class Finding:
    """A verdict on one modality with the numbers that it rests on."""

    verdict: Verdict
    because: str = ""


HEALTHY = Finding("healthy")


def judge(values: Mapping[str, float], margin: float = 1.0) -> Finding:
    """The verdict on one modality's numbers, named as d2v_ds.training.health names them, without the modality.

    The first that fits: what is constant has no content and no rank either, and targets, of which all else follows,
    come before the student. `margin`: how many times the least content and spread it takes to be healthy.
    """
    numbers = {key: value for key, value in values.items() if not key.endswith(("content", "rank"))}
    odd = [key for key, value in numbers.items() if not math.isfinite(value)]
    if odd:
        return Finding("diverging", f"{odd[0]} is {values[odd[0]]}")
    for place, least in (("", LEAST_CONTENT), ("encoder_", LEAST_ENCODER_CONTENT)):
        key = f"{place}token_spread"
        if values[key] < margin * LEAST_TOKEN_SPREAD:
            return Finding("constant", f"{key} {values[key]:.1e} is below {LEAST_TOKEN_SPREAD:g}")
        if values["explained"] < LEAST_EXPLAINED:
            return Finding("diverging", f"explained {values['explained']:.1f} is below {LEAST_EXPLAINED:g}")
        key = f"{place}content"
        if values[key] < margin * least:  # not a number (every position was seen once) says nothing
            return Finding("position-only", f"{key} {values[key]:.4f} is below {least:g}")
    for key, least in (("rank", LEAST_RANK), ("encoder_rank", LEAST_ENCODER_RANK)):
        if values[key] < least:
            return Finding("low-rank", f"{key} {values[key]:.1f} is below {least:g}")
    return HEALTHY


class Watch:
    """The verdicts of a run so far. One counts when `patience` looks in a row were sick, or were healthy."""

    def __init__(self, patience: int):
        self.patience = patience
        self.latest: dict[str, Finding] = {}
        """Of the last look, by modality."""
        self.since: dict[str, int] = {}
        """Looks in a row that were as healthy, or as sick, as the last."""
        self.told: dict[str, Verdict] = {}
        self.is_firm = False
        """Every modality was healthy in the last look, with twice the content and spread that it takes: a place to go
        back to."""
        self.step = 0
        """Of the last look, which saw the weights as they were before that step."""

    def look(self, health: Mapping[str, float], step: int = 0) -> dict[str, Finding]:
        """Judges every modality of `health` (NAME/number); those whose verdict has changed."""
        changed, self.is_firm, self.step = {}, True, step
        for name in sorted({key.split("/")[0] for key in health}):
            prefix = f"{name}/"
            values = {k.removeprefix(prefix): v for k, v in health.items() if k.startswith(prefix)}
            finding = judge(values)
            self.is_firm &= judge(values, margin=2.0).verdict == "healthy"
            is_well = finding.verdict == "healthy"
            was_well = name in self.latest and self.latest[name].verdict == "healthy"
            self.since[name] = self.since.get(name, 0) + 1 if is_well == was_well else 1
            self.latest[name] = finding
            if self.since[name] >= self.patience and finding.verdict != self.told.get(name, "healthy"):
                self.told[name] = finding.verdict
                changed[name] = finding
        return changed

    def verdicts(self) -> dict[str, str]:
        """Of the last look, in a word, by modality."""
        return {name: finding.verdict for name, finding in self.latest.items()}

    def sick(self) -> dict[str, Finding]:
        """Modalities whose verdict counts and is not healthy."""
        return {
            name: finding
            for name, finding in self.latest.items()
            if finding.verdict != "healthy" and self.told.get(name, "healthy") != "healthy"
        }
