"""Texts as users have them: strings, files, token ids -> ids from `<s>` to `</s>`. A str is a text, a Path a file.

A pair of texts is a tuple or list of two, inside the list of inputs: [("A", "B"), ("C", "D")].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2v_ds.modalities.prepared import (
    Prepared,
    as_bytes,
    as_tensor,
    describe,
    is_number,
    read_file,
    refuse_none,
    refuse_rate,
    split_batch,
)
from d2v_ds.modalities.text.samples import PAD, TextSamples

EXTENSIONS = ("txt", "text")


def listed(x: Any) -> list[Any]:
    """A str, a Path, bytes, a list of ids or ids (T,) is one text; (B, T) and other lists are several."""
    if isinstance(x, (Tensor, np.ndarray)):
        return split_batch(x, 1, "texts")
    if isinstance(x, (list, tuple)):
        return [x] if x and is_number(x[0]) else refuse_none(list(x), "texts")
    return [x]


def prepare(samples: TextSamples, item: Any, rate: int | None = None) -> Prepared:
    """One text as <s>, ids, </s>, a pair as <s>, ids, </s>, </s>, ids, </s>; (T,). Ids are taken as they are, without
    `<pad>` at their end.

    What is longer than the model reads is cut, with a notice.
    """
    refuse_rate(rate, "texts")
    limit = samples.config.max_tokens
    texts = as_texts(item)
    if samples.config.data.pair is not None and texts is not None and len(texts) == 1:
        raise ValueError(f"this model reads pairs of texts, {describe(item)} is one; give (A, B), in a list")
    if texts is not None:
        ids = samples.sequence(*texts)
        row = torch.tensor(samples.cut(ids, len(texts) == 2))
    else:
        ids = check_ids(as_tensor(item, "text or list of token ids"), samples.config.vocabulary)
        row = ids[:limit]
    return Prepared(row, None if len(ids) <= limit else f"{len(ids)} tokens, cut to {limit}")


def as_texts(item: Any) -> list[str | bytes] | None:
    """The text, or the two of a pair; None for anything else."""
    if isinstance(item, (list, tuple)) and len(item) == 2 and not any(map(is_number, item)):
        parts = [as_texts(part) for part in item]
        return None if any(part is None or len(part) != 1 for part in parts) else [part[0] for part in parts]
    item = read_file(item) if isinstance(item, Path) else as_bytes(item)
    return [item] if isinstance(item, (str, bytes)) else None


def check_ids(ids: Tensor, vocabulary: int) -> Tensor:
    if ids.is_floating_point() or ids.ndim != 1:
        raise ValueError(f"{describe(ids)} is no text; give a str, a Path, or whole token ids (T,)")
    ids = ids.long()
    if not len(ids) or bool((ids < 0).any()) or bool((ids >= vocabulary).any()):
        span = f"{int(ids.min())}..{int(ids.max())}" if len(ids) else "none"
        raise ValueError(
            f"token ids must lie in 0..{vocabulary - 1}, the model's vocabulary; there are {span}"
        )
    is_token = ids != PAD
    length = int(is_token.nonzero().max()) + 1 if bool(is_token.any()) else 0
    if not bool(is_token[:length].all()) or not length:
        raise ValueError(f"token ids may have <pad> ({PAD}) at their end alone, after at least one other")
    return ids[:length]


def pieces(samples: TextSamples, row: Tensor) -> list[Tensor]:
    return [row]


def num_tokens(samples: TextSamples, row: Tensor) -> int:
    return len(row)
