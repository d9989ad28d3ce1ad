"""Biases of attention as distances, which is what a GPU's kernels take, are the biases themselves."""

from __future__ import annotations

import pytest
import torch
from tiny import build_tiny, draw_noise, make_padded, shake

from d2v_ds.kernels.attention import Distance, distance_bias
from d2v_ds.model import encoder
from d2v_ds.model.data2vec import Data2Vec


def loss_and_gradients(model: Data2Vec, batch, noise_NJD) -> list[torch.Tensor]:
    model.zero_grad()
    output = model(batch, noise_NJD)
    output.loss.backward()
    return [output.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "overrides", [("@.extra_tokens=1",), ("@.alibi.per_layer=true", "@.alibi.per_head=false")]
)
def test_distances_and_made_biases_train_alike(monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]):
    """Loss and every gradient, the learned scale's too, on padded views with layers of prenet and body."""
    model = shake(build_tiny("audio", "@.prenet_depth=1", *overrides))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch, _ = make_padded(model, "audio", (13, 19, 7))
    noise_NJD = draw_noise(batch)
    made = loss_and_gradients(model, batch, noise_NJD)
    seen = []

    def keep_distance(distance: Distance) -> Distance:
        seen.append(distance)
        return distance

    monkeypatch.setattr(encoder, "distance_bias", keep_distance)
    passed = loss_and_gradients(model, batch, noise_NJD)
    assert seen and isinstance(distance_bias(seen[0]), torch.Tensor)
    assert model.encoders["audio"].context.alibi_scale.grad.abs().min() > 0
    for ours, theirs in zip(passed, made, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
