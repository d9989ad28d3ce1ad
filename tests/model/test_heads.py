"""Heads give what their formulas say, and padding does not speak."""

from __future__ import annotations

import pytest
import torch

from d2v_ds.model.heads import HeadConfig, build_head


def random_head(kind: str, outputs: int = 5, dim: int = 12) -> torch.nn.Module:
    torch.manual_seed(1)
    head = build_head(HeadConfig(kind=kind, outputs=outputs), dim)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head.double()


def test_an_image_head_reads_the_mean_of_the_patches() -> None:
    head, x = random_head("image_classification"), torch.randn(2, 7, 12, dtype=torch.double)
    mean = x.mean(dim=1)
    spread = ((mean - mean.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
    normed = (mean - mean.mean(-1, keepdim=True)) / (spread + 1e-6).sqrt() * head.norm.weight + head.norm.bias
    torch.testing.assert_close(head(x), normed @ head.proj.weight.T + head.proj.bias)


def test_a_sentence_head_reads_the_first_token_alone() -> None:
    """Whatever the others are, and whatever of them is padding."""
    head, x = random_head("sentence_classification"), torch.randn(2, 7, 12, dtype=torch.double)
    hidden = torch.tanh(x[:, 0] @ head.dense.weight.T + head.dense.bias)
    expected = hidden @ head.proj.weight.T + head.proj.bias
    x[:, 1:] = 3
    torch.testing.assert_close(head(x, torch.zeros(2, 7, dtype=torch.bool)), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_padded_frames_say_blank(dtype: torch.dtype) -> None:
    """Real frames are untouched; nothing is NaN in log-probabilities."""
    head = random_head("ctc").to(dtype)
    x, padding = torch.randn(2, 7, 12, dtype=dtype), torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    logits = head(x, padding)
    assert torch.equal(logits[0], head(x)[0]) and torch.equal(logits[1, :4], head(x)[1, :4])
    probabilities = logits.softmax(dim=-1)
    assert bool((probabilities[1, 4:, 0] == 1).all()) and bool((probabilities[1, 4:, 1:] == 0).all())
    assert bool(torch.isfinite(logits.float().log_softmax(dim=-1)).all())


def test_an_unknown_head_is_an_error() -> None:
    with pytest.raises(ValueError, match="kind"):
        HeadConfig(kind="detection", outputs=3)
    with pytest.raises(ValueError, match="outputs"):
        HeadConfig(kind="ctc", outputs=0)
