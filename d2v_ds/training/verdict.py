"""What the numbers of health mean, in a word: is this modality learning, or how does it fail?

Thresholds are set by runs (docs/health.md): every shipped tiny recipe stays on the healthy side of each of them from
its first step to its last, and runs that are known to fail do not.
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
LEAST_TOKEN_SPREAD = 1e-3
LEAST_RANK = 8.0
LEAST_ENCODER_RANK = 3.0
LEAST_EXPLAINED = -10.0


@dataclass(frozen=True)
class Finding:
    """A verdict on one modality with the numbers that it rests on."""

    verdict: Verdict
    because: str = ""


HEALTHY = Finding("healthy")


def judge(values: Mapping[str, float]) -> Finding:
    """The verdict on one modality's numbers, named as d2v_ds.training.health names them, without the modality.

    The first that fits: what is constant has no content and no rank either.
    """
    odd = [key for key, value in values.items() if not math.isfinite(value) and not key.endswith("content")]
    if odd:
        return Finding("diverging", f"{odd[0]} is {values[odd[0]]}")
    for key in ("token_spread", "encoder_token_spread"):
        if values[key] < LEAST_TOKEN_SPREAD:
            return Finding("constant", f"{key} {values[key]:.1e} is below {LEAST_TOKEN_SPREAD:g}")
    if values["explained"] < LEAST_EXPLAINED:
        return Finding("diverging", f"explained {values['explained']:.1f} is below {LEAST_EXPLAINED:g}")
    for key, least in (("content", LEAST_CONTENT), ("encoder_content", LEAST_ENCODER_CONTENT)):
        if values[key] < least:  # not a number (every position was seen once) says nothing
            return Finding("position-only", f"{key} {values[key]:.4f} is below {least:g}")
    for key, least in (("rank", LEAST_RANK), ("encoder_rank", LEAST_ENCODER_RANK)):
        if values[key] < least:
            return Finding("low-rank", f"{key} {values[key]:.1f} is below {least:g}")
    return HEALTHY
