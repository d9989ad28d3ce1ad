"""An encoder's features: the same for a sample alone and in a padded batch, whatever the lengths; and its heads."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stores import MODALITIES, store
from torch import Tensor

from d2v_ds.convert import features
from d2v_ds.convert.features import Encoder, mean_pool
from d2v_ds.convert.load import build_encoder
from d2v_ds.modalities.audio import inputs as audio_inputs

RATE = 16_000
KINDS = (*MODALITIES, "audio_v1_tiny", "text_v1_tiny", "image_v1_tiny")


def build(name: str, *overrides: str, **options) -> Encoder:
    stored = store(name, *overrides, **options)
    (modality,) = stored.recipe.modalities
    return build_encoder(stored, modality, Path("memory"))


def noise(samples: int, seed: int = 0) -> Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


ITEMS = {
    # 25 ms to 20 s, and one that ends a sample before its next frame would begin
    "audio": [noise(400), noise(20 * RATE, 1), noise(719, 2), noise(720, 3), noise(5 * RATE, 4)],
    "text": [[0, 2], [0, *range(4, 66)], "seven", [0, 9, 2]],
    "image": [picture(1, 1), picture(900, 20), picture(32, 32), picture(3, 500)],
}


# ---- padding ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_gives_what_each_sample_alone_gives(kind):
    """Every layer, the output and the pooled features, to 1e-5 of values of size 1, in fp32; zeros at padding."""
    encoder = build(kind)
    items = ITEMS[encoder.modality]
    together = encoder.extract(items, all=True)
    lengths = set()
    for i, item in enumerate(items):
        alone = encoder.extract(item, all=True)
        tokens = alone.x.shape[1]
        lengths.add(tokens)
        assert not together.mask[i, :tokens].any() and together.mask[i, tokens:].all()
        for ours, theirs in zip([*together.layers, together.x], [*alone.layers, alone.x], strict=True):
            torch.testing.assert_close(ours[i, :tokens], theirs[0], rtol=1e-5, atol=1e-5)
            assert not ours[i, tokens:].any()
        torch.testing.assert_close(together.pooled[i], alone.pooled[0], rtol=1e-5, atol=1e-5)
        assert alone.x.std() > 0.1
    assert lengths == {"image": {16}, "audio": {1, 2, 249, 999}, "text": {2, 3, 5, 63}}[encoder.modality]


def test_the_order_and_company_of_a_batch_do_not_matter():
    encoder = build("text")
    items = ITEMS["text"]
    pooled, turned = (encoder.extract(x, all=True).pooled for x in (items, items[::-1]))
    torch.testing.assert_close(pooled, turned.flip(0), rtol=1e-5, atol=1e-5)


def test_the_output_of_a_body_with_norms_first_is_normed():
    """v1 images: `x` is the norm of the last layer; elsewhere it is the last layer."""
    encoder = build("image_v1_tiny")
    f = encoder.extract(ITEMS["image"], all=True)
    assert not torch.allclose(f.x, f.layers[-1], atol=1e-2)
    class_token = 1
    output = encoder.model.norm(
        encoder.model.encode(encoder.samples.pad(encoder.prepare(ITEMS["image"])))[0][-1]
    )
    torch.testing.assert_close(f.x, output[:, class_token:])


def test_features_are_of_the_models_dtype():
    """bf16 in, bf16 out, near the fp32 ones; pooling does not add to its error."""
    encoder = build("audio")
    sounds = [noise(RATE), noise(9000, 1)]
    exact = encoder.extract(sounds, all=True)
    low = encoder.to(torch.bfloat16).extract(sounds, all=True)
    assert {t.dtype for t in (low.x, low.pooled, *low.layers)} == {torch.bfloat16}
    assert (low.x.float() - exact.x).abs().mean() < 0.05
    torch.testing.assert_close(low.pooled.float(), mean_pool(low.x.float(), low.mask), rtol=1e-2, atol=1e-2)


# ---- long sound ----


def test_a_long_sound_goes_by_windows(monkeypatch, caplog):
    """As many frames as the whole; each window's are those of its stretch, normalised with the whole; a short one
    beside it is as it is alone. The log says it."""
    encoder = build("audio")
    long, short = noise(10 * RATE), noise(RATE // 2, 1)
    whole = encoder.extract(long)
    monkeypatch.setattr(audio_inputs, "WINDOW_SECONDS", 3.0)
    f = encoder.extract([long, short], all=True)
    assert "1 of 2 inputs: 10 s, encoded in 4 windows" in caplog.text
    assert f.x.shape[1] == whole.shape[1] and f.mask.sum(dim=1).tolist() == [0, f.x.shape[1] - 24]
    row = encoder.prepare(long)[0]
    windows = [encoder.run_batch([piece], ()).x[0] for piece in audio_inputs.pieces(encoder.samples, row)]
    assert len(windows) == 4
    torch.testing.assert_close(torch.cat(windows), f.x[0], rtol=1e-5, atol=1e-5)
    alone = encoder.extract(short, all=True)
    torch.testing.assert_close(f.x[1, :24], alone.x[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(f.pooled[1], alone.pooled[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(f.layers[-1], f.x) and not f.x[1, 24:].any()


def test_attention_sees_no_more_than_a_window():
    """So memory does not grow with the square of a sound's length."""
    seen = []
    encoder = build("audio", "body.depth=1", "@.target.top_k=1", "@.prenet_depth=0")
    encoder.model.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[1]))
    encoder.extract(torch.zeros(61 * RATE))
    assert len(seen) == 2 and max(seen) <= 2999


# ---- input that is wrong ----


def test_the_input_that_is_wrong_is_named():
    encoder = build("audio")
    with pytest.raises(ValueError, match="^input 2 of 3: waveform of shape .* at least 25 ms"):
        encoder.extract([noise(900), noise(900), noise(10)])
    with pytest.raises(ValueError, match="^waveform of shape"):
        encoder.extract(noise(10))


def test_a_text_that_was_cut_is_told(caplog):
    build("text").extract(["seven " * 100, "seven", "seven " * 100])
    assert "2 of 3 inputs: " in caplog.text and "tokens, cut to 64" in caplog.text


@pytest.mark.parametrize("kind", MODALITIES)
def test_an_encoder_can_be_copied_and_sent_to_another_process(kind):
    encoder = build(kind)
    expected = encoder.extract(ITEMS[kind][2])
    for again in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(again.extract(ITEMS[kind][2]), expected)


# ---- heads ----


@pytest.mark.parametrize("kind", ["image", "audio", "text", "image_v1_tiny"])
def test_logits_are_the_heads_on_the_features(kind):
    """Of a padded batch those of each alone."""
    encoder = build(kind, head=7)
    items = ITEMS[encoder.modality][2:]
    logits = encoder.logits(items)
    f = encoder.extract(items, all=True)
    assert torch.equal(logits, encoder.head(f.x, f.mask))
    for i, item in enumerate(items):
        alone = encoder.logits(item)[0]
        ours = logits[i, : len(alone)] if encoder.modality == "audio" else logits[i]
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5)
    assert logits.shape == ((len(items), f.x.shape[1], 7) if encoder.modality == "audio" else (len(items), 7))


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_prediction_is_the_most_likely_class(kind):
    """By its label, where labels are known; a single output is a number."""
    encoder = build(kind, head=5)
    items = ITEMS[kind]
    best = encoder.logits(items).argmax(dim=1).tolist()
    assert encoder.predict(items) == best
    encoder.head_config.labels = ("a", "b", "c", "d", "e")
    assert encoder.predict(items) == ["abcde"[i] for i in best]
    one = build(kind, head=1)
    assert one.predict(items) == pytest.approx(one.logits(items)[:, 0].tolist())


def test_ctc_reads_what_the_best_path_spells():
    """Repeats once, blanks never, `|` a space; padding adds nothing."""
    assert features.spell([0, 4, 4, 0, 4, 5, 5, 0]) == [4, 4, 5] and features.spell([]) == []
    encoder, sounds = build("audio", head=6), ITEMS["audio"][2:]
    numbers = encoder.predict(sounds)
    assert [encoder.predict(sound)[0] for sound in sounds] == numbers
    assert any(numbers) and not any(0 in path for path in numbers)
    labels = encoder.head_config.labels = ("<s>", "a", "|", "b", "c", "d")
    expected = ["".join(labels[i] for i in path).replace("|", " ").strip() for path in numbers]
    assert encoder.predict(sounds) == expected


def test_an_encoder_without_a_head_says_so():
    with pytest.raises(ValueError, match="has no fine-tuned head; use extract"):
        build("image").predict(picture(3, 3))


def test_mean_pooling_is_over_real_tokens_alone():
    x, mask = torch.randn(2, 5, 3), torch.tensor([[False] * 5, [False, False, True, True, True]])
    x[1, 2:] = math.inf
    x = x.masked_fill(mask[:, :, None], 0)
    torch.testing.assert_close(mean_pool(x, mask), torch.stack([x[0].mean(0), x[1, :2].mean(0)]))
