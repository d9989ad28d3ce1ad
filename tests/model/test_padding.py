"""Padding changes nothing: a padded batch gives what its samples give alone (fairseq_compat=False)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import PAD, build_tiny, draw_noise, make_padded, shake
from torch import Tensor

from d2v_ds.model.batch import Batch, make_views
from d2v_ds.model.data2vec import Data2Vec

LENGTHS = (13, 19, 7, 3)
MODALITIES = ("audio", "text")


@pytest.fixture(scope="module", params=MODALITIES)
def modality(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(modality: str) -> Data2Vec:
    """With prenet blocks, and weights that are not the fresh ones: biases would hide a leak."""
    return shake(build_tiny(modality, "@.prenet_depth=1")).eval()


@pytest.fixture(scope="module")
def batches(model: Data2Vec, modality: str) -> tuple[Batch, list[Batch]]:
    return make_padded(model, modality, LENGTHS)


def local_of(model: Data2Vec, batch: Batch) -> Tensor:
    return model.encoders[batch.modality].local(batch.source)


@torch.no_grad()
def test_features_of_a_padded_batch_are_those_of_its_samples_alone(model: Data2Vec, batches: tuple) -> None:
    """Every block's output and feed-forward output at real tokens."""
    padded, alone = batches
    outputs, ffns = model.encode(padded)
    for i, (batch, tokens) in enumerate(zip(alone, LENGTHS, strict=True)):
        one_outputs, one_ffns = model.encode(batch)
        for ours, theirs in zip(outputs + ffns, one_outputs + one_ffns, strict=True):
            torch.testing.assert_close(ours[i, :tokens], theirs[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_targets_of_a_padded_batch_are_those_of_its_samples_alone(model: Data2Vec, batches: tuple) -> None:
    """Statistics over real tokens alone; padded rows are zero."""
    padded, alone = batches
    targets = model.make_targets(padded, local_of(model, padded))
    for i, (batch, tokens) in enumerate(zip(alone, LENGTHS, strict=True)):
        expected = model.make_targets(batch, local_of(model, batch))
        torch.testing.assert_close(targets[i, :tokens], expected[0], rtol=1e-5, atol=1e-4)
        assert not targets[i, tokens:].any()


@torch.no_grad()
def test_predictions_and_losses_of_a_padded_batch_are_those_of_its_samples_alone(
    model: Data2Vec, batches: tuple
) -> None:
    """Real masked tokens come first in every row; only they count, in the loss and in its number."""
    padded, alone = batches
    noise = draw_noise(padded)
    out = model(padded, noise)
    loss = size = 0.0
    for i, batch in enumerate(alone):
        clones, masked = batch.masked_NJ.shape
        rows = slice(i * clones, (i + 1) * clones)
        one = model(batch, noise[rows, :masked])
        torch.testing.assert_close(out.pred_NJD[rows, :masked], one.pred_NJD, rtol=1e-5, atol=1e-5)
        assert out.counts_NJ[rows, :masked].all() and not out.counts_NJ[rows, masked:].any()
        loss, size = loss + one.loss.item(), size + one.sample_size.item()
    assert out.loss.item() == pytest.approx(loss, rel=1e-5)
    assert out.sample_size.item() == size


@torch.no_grad()
def test_what_lies_in_padding_changes_neither_predictions_nor_loss(
    model: Data2Vec, batches: tuple, modality: str
) -> None:
    """Noise a hundred times as loud as the sound, ids of words, and other decoder noise there."""
    padded, _ = batches
    source = padded.source.clone()
    if modality == "audio":
        loud = 100.0 * torch.arange(source.shape[1]).sin()
        for row, tokens in zip(source, LENGTHS, strict=True):
            end = 400 + 320 * (tokens - 1)
            row[end:] = loud[end:]
    else:
        source[source == PAD] = 77
    assert not torch.equal(source, padded.source)
    noise = draw_noise(padded)
    out = model(padded, noise)
    dirty_noise = torch.where(out.counts_NJ[:, :, None], noise, 50.0)
    dirty = model(replace(padded, source=source), dirty_noise)
    real = out.counts_NJ
    torch.testing.assert_close(dirty.pred_NJD[real], out.pred_NJD[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dirty.target_NJD[real], out.target_NJD[real], rtol=1e-5, atol=1e-4)
    assert dirty.loss.item() == pytest.approx(out.loss.item(), rel=1e-5)


def test_gradients_of_a_padded_batch_are_the_sum_of_its_samples_gradients(
    model: Data2Vec, batches: tuple
) -> None:
    """Of every parameter, to 1e-4 of its norm."""
    padded, alone = batches
    noise = draw_noise(padded)
    model.zero_grad()
    model(padded, noise).loss.backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for i, batch in enumerate(alone):
        clones, masked = batch.masked_NJ.shape
        model(batch, noise[i * clones : (i + 1) * clones, :masked]).loss.backward()
    whole = torch.stack([g.norm() for g in together.values()]).norm()
    for name, gradient in together.items():
        error = (gradient - model.get_parameter(name).grad).norm()
        assert error < 1e-4 * gradient.norm() + 1e-6 * whole, name
    model.zero_grad()


def test_a_row_that_keeps_only_padding_has_a_finite_loss_and_gradient(model: Data2Vec, modality: str) -> None:
    """A sample of one token, which is masked: its views see nothing."""
    padded, _ = make_padded(model, modality, (9, 1))
    mask = padded.mask_NT.clone()
    mask[padded.clones :] = torch.arange(9) < mask[0].sum()
    model.zero_grad()
    out = model(replace(padded, **make_views(mask)))
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.zero_grad()


def test_a_row_that_keeps_only_padding_has_a_finite_gradient_in_bf16() -> None:
    """Sound, where an ALiBi bias in fp32 is added to bf16 logits."""
    model = build_tiny("audio").bfloat16()
    padded, _ = make_padded(model, "audio", (9, 1))
    mask = padded.mask_NT.clone()
    mask[padded.clones :] = torch.arange(9) < mask[0].sum()
    model(replace(padded, source=padded.source.bfloat16(), **make_views(mask))).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_the_mean_target_is_over_real_tokens(model: Data2Vec, batches: tuple) -> None:
    """What a class token would regress; of targets whose mean is not 0, as an instance norm's always is."""
    padded, _ = batches
    targets = 1 + torch.randn(len(LENGTHS), max(LENGTHS), 96, generator=torch.Generator().manual_seed(0))
    means = model.mean_target(padded, targets * ~padded.padding_BT[:, :, None])
    for i, tokens in enumerate(LENGTHS):
        expected = targets[i, :tokens].mean(dim=0).expand(padded.clones, -1)
        torch.testing.assert_close(means[i * padded.clones : (i + 1) * padded.clones], expected)


@torch.no_grad()
def test_fairseq_compat_counts_padding_as_the_original_does(modality: str) -> None:
    """So the two are told apart: padded tokens enter the loss and the statistics of targets."""
    model = shake(build_tiny(modality)).eval()
    padded, _ = make_padded(model, modality, LENGTHS)
    noise = draw_noise(padded)
    ours = model(padded, noise)
    model.fairseq_compat = True
    theirs = model(padded, noise)
    assert theirs.counts_NJ is None and theirs.sample_size.item() == padded.masked_NJ.numel()
    assert ours.sample_size.item() == ours.counts_NJ.sum().item() < theirs.sample_size.item()
    assert (ours.targets_BTD[2, :7] - theirs.targets_BTD[2, :7]).abs().max() > 0.01
