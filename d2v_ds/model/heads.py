"""Heads that fine-tuning puts on an encoder: image classes, CTC letters, sentence classes."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from d2v_ds.config import Config


class HeadConfig(Config):
    """Which head stands on the encoder, and how wide it is."""

    kind: Literal["image_classification", "ctc", "sentence_classification"]
    outputs: PositiveInt
    """Classes, or letters with the blank."""
    labels: tuple[str, ...] | None = None
    """What each output means, where it is known."""
