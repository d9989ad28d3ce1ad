"""A step's number of targets, known before its forward passes, is what they report."""

from __future__ import annotations

import pytest
import torch

from d2v_ds.modalities.build import build_model
from d2v_ds.modalities.text.net import TextConfig
from d2v_ds.modalities.text.samples import PAD
from d2v_ds.model.batch import Batch, make_masked, make_views
from d2v_ds.model.decoder import DecoderConfig
from d2v_ds.model.layers import Body
from d2v_ds.model.masking import Mask
from d2v_ds.model.targets import Target
from d2v_ds.training.agreement import num_targets


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("view", ["visible", "masked"])
def test_targets_are_counted_as_the_forward_pass_counts_them(
    view: str, is_padded: bool, compat: bool
) -> None:
    """Ragged rows of v1, padded or not; padding counts for fairseq alone, fillers never."""
    torch.manual_seed(0)
    config = TextConfig(
        view=view, clones=1, vocabulary=51, max_tokens=20, teacher="blocks", mask=Mask(kind="random"),
        target=Target(top_k=1), decoder=DecoderConfig(dim=16, layers=0, groups=1),
    )  # fmt: skip
    model = build_model(Body(dim=16, depth=1, heads=2), {"text": config}, compat)
    source = torch.randint(4, 50, (3, 12))
    mask = torch.zeros(3, 12, dtype=torch.bool)
    for row, count in enumerate((5, 5, 5) if view == "visible" else (5, 2, 7)):
        mask[row, torch.randperm(12)[:count]] = True
    padding = None
    if is_padded:
        source[1, 8:] = PAD
        padding = source == PAD
        mask = mask & ~padding if view == "masked" else mask
    batch = Batch("text", source, padding, **(make_views if view == "visible" else make_masked)(mask))
    assert num_targets(batch, compat) == int(model(batch).sample_size)
