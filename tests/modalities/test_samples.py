"""From bytes in shards to batches: what is decoded, what is refused, what the draws decide."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import soundfile
import torch
import webdataset
from PIL import Image

from d2v_ds.data import Draw, Source
from d2v_ds.modalities import inputs, labelled
from d2v_ds.modalities.audio.samples import RATE, AudioSamples, crop, decode_sound, normalise, num_frames
from d2v_ds.modalities.build import build_model
from d2v_ds.modalities.image.samples import MAX_PIXELS, ImageSamples, crop_box, decode_image, least_side
from d2v_ds.modalities.source import (
    StreamConfig,
    count_mix,
    draw_views,
    generator,
    open_source,
    shard_pattern,
    train_patterns,
)
from d2v_ds.modalities.text import samples as text_samples
from d2v_ds.modalities.text.samples import BOS, EOS, PAD, TextSamples
from d2v_ds.recipe import load_recipe

TEXT = (
    "a river runs past the old mill and the miller counts sacks of grain while his daughter reads "
    "letters from far towns under trees that bend when wind comes over hills"
)
WORDS = TEXT.split()
FIXED = {
    "image": ("size=32", "patch=8", "clones=8", "mask.ratio=0.6"),
    "audio": ("clones=4", "mask.ratio=0.6", "data.max_seconds=1.0", "data.min_seconds=0.5"),
    "text": ("clones=4", "mask.ratio=0.48"),
}
OUR_IDS = {"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3}
BANDS = {"wav": 1e-4, "flac": 1e-4, "ogg": 0.05}  # 16 bits, 16 bits, lossy


def config_of(modality: str, *overrides: str) -> Any:
    """The tiny recipe's, with what these tests count on fixed."""
    full = [f"modalities.{modality}.{override}" for override in (*FIXED[modality], *overrides)]
    return load_recipe(f"{modality}_tiny", full).modalities[modality]


def draws_of(*seeds: int) -> list[Draw]:
    return [Draw(unit=i, epoch=0, seed=seed) for i, seed in enumerate(seeds)]


def write_shard(path: Path, extension: str, contents: list[bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with webdataset.TarWriter(str(path), mtime=0) as writer:
        for i, content in enumerate(contents):
            writer.write({"__key__": f"{i:05d}", extension: content})
    return path


def assert_equal_batches(first: Any, second: Any) -> None:
    for name in ("source", "mask_NT", "keep_NK", "masked_NJ", "restore_NT"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


# images


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str = "png") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and holds no pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "CMYK"])
def test_pictures_of_every_mode_become_rgb(mode: str) -> None:
    """Size and, where the mode has all colours, pixels stay."""
    image = picture(13, 7).convert(mode)
    decoded = decode_image(encoded(image, "tiff"))
    assert decoded.mode == "RGB" and decoded.size == (13, 7)
    assert (np.array(decoded) == np.array(image.convert("RGB"))).all()


def test_a_picture_of_16_bits_keeps_its_shades() -> None:
    """The upper 8 bits of a grey ramp."""
    ramp = np.linspace(0, 65_535, 64 * 64).astype(np.uint16).reshape(64, 64)
    decoded = np.array(decode_image(encoded(Image.fromarray(ramp))))
    assert np.abs(decoded.astype(int) - (ramp >> 8)[..., None]).max() <= 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage" * 50,
        encoded(picture(31, 24))[:-700],
        encoded(picture(31, 24), "jpeg")[:300],
        encoded(picture(31, 24))[:60] + b"\xff" * 40 + encoded(picture(31, 24))[100:],
        png_header(64, 64),
        b"DDS " + struct.pack("<I", 124) + bytes(120),
    ],
)
def test_bytes_that_are_no_whole_picture_are_an_error(data: bytes) -> None:
    """Empty, garbage, truncated, damaged, header only, of a kind that Pillow names and does not decode."""
    with pytest.raises(ValueError, match="undecodable image"):
        decode_image(data)


@pytest.mark.parametrize("form", ["png", "jpeg", "webp", "gif"])
def test_a_damaged_picture_is_decoded_or_a_value_error(form: str) -> None:
    """300 pictures with some wrong bytes: anything but a ValueError would end a run."""
    whole, rng = encoded(picture(31, 24), form), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        data = bytearray(whole[: rng.integers(len(whole) // 2, len(whole) + 1)])
        for place in rng.integers(0, min(len(data), 200), 3):
            data[place] = rng.integers(0, 256)
        try:
            assert decode_image(bytes(data)).mode == "RGB"
        except ValueError:
            refused += 1
    assert refused > 50


def test_a_picture_of_another_size_than_its_header_says_is_cropped_as_it_is() -> None:
    """An ICNS says 128 x 128 by the name of its entry; a crop beyond the 16 x 16 that it holds would end a run."""
    held = encoded(picture(16, 16))
    entry = b"ic07" + struct.pack(">I", 8 + len(held)) + held
    image = decode_image(b"icns" + struct.pack(">I", 8 + len(entry)) + entry)
    samples = ImageSamples(config_of("image", *FIXED["image"]), Path())
    assert image.size == (16, 16)
    assert samples.collate([image] * 8, draws_of(*range(8))).source.shape == (8, 3, 32, 32)


def test_postscript_is_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its member is called: `{} loop` has no end."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("it was run"))
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n%%EOF"
    with pytest.raises(ValueError, match="PostScript is a program"):
        decode_image(program)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (12_000, 12_000), (60_000, 60_000)])
def test_a_picture_above_the_limit_is_refused_by_its_header(width: int, height: int) -> None:
    """Without any pixel data: nothing was decoded."""
    assert width * height > MAX_PIXELS
    with pytest.raises(ValueError, match="limit|exceeds"):
        decode_image(png_header(width, height))


@pytest.mark.parametrize("size", [(97, 61), (61, 97), (500, 500), (3, 2), (1, 1)])
def test_a_crop_box_lies_inside_and_has_area_and_aspect_in_range(size: tuple[int, int]) -> None:
    """1,000 boxes; sides are whole pixels, so each bound gets half a pixel of room."""
    rng, (width, height) = np.random.default_rng(0), size
    boxes = {crop_box(size, (0.2, 1.0), (3 / 4, 4 / 3), rng) for _ in range(1000)}
    for left, upper, right, lower in boxes:
        w, h = right - left, lower - upper
        assert 0 <= left < right <= width and 0 <= upper < lower <= height
        assert (w + 0.5) * (h + 0.5) >= 0.2 * width * height
        assert (w - 0.5) / (h + 0.5) <= 4 / 3 and (w + 0.5) / (h - 0.5) >= 3 / 4
    if width > 50:
        assert len(boxes) > 900
        edges = np.array(list(boxes))
        assert edges[:, :2].min() == 0 and (edges[:, 2:].max(axis=0) == size).all()


def test_shares_and_aspects_of_crops_are_drawn_evenly() -> None:
    """Area share uniform in 0.2 .. 0.5 and log aspect uniform, where every box fits."""
    rng = np.random.default_rng(1)
    boxes = np.array([crop_box((1000, 1000), (0.2, 0.5), (3 / 4, 4 / 3), rng) for _ in range(4000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share, aspect = w * h / 1e6, np.log(w / h) / np.log(4 / 3)
    assert share.mean() == pytest.approx(0.35, abs=0.006) and share.std() == pytest.approx(
        0.3 / 12**0.5, rel=0.03
    )
    assert aspect.mean() == pytest.approx(0, abs=0.04) and aspect.std() == pytest.approx(3**-0.5, rel=0.03)
    assert (boxes[:, 0] / (1000 - w)).mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (2, 301)])
def test_a_picture_too_narrow_for_any_crop_gives_its_middle(size: tuple[int, int]) -> None:
    """The largest box of the nearest aspect, as RandomResizedCrop falls back to."""
    left, upper, right, lower = crop_box(size, (0.9, 0.99), (3 / 4, 4 / 3), np.random.default_rng(0))
    long, short = max(size), min(size)
    begin, end = (left, right) if size[0] == long else (upper, lower)
    assert min(right - left, lower - upper) >= 1 and max(right - left, lower - upper) <= round(short * 4 / 3)
    assert abs((begin + end) - long) <= 1


@pytest.mark.parametrize("ratio", [(0.2, 0.3), (2.5, 3.0)])
def test_a_crop_has_a_pixel_at_least(ratio: tuple[float, float]) -> None:
    for size in ((1, 1), (1, 500), (500, 1), (2, 1000)):
        left, upper, right, lower = crop_box(size, (0.2, 1.0), ratio, np.random.default_rng(0))
        assert 0 <= left < right <= size[0] and 0 <= upper < lower <= size[1]


@pytest.mark.parametrize(
    ("recipe", "setting", "message"),
    [
        ("image_tiny", "image.data.crop_ratio=[0, 1]", "two numbers above 0, the lower one first"),
        ("image_tiny", "image.data.crop_scale=[0.5, 0.2]", "two numbers above 0, the lower one first"),
        ("audio_tiny", "audio.data.max_seconds=0", "greater than 0"),
        ("audio_tiny", "audio.data.min_seconds=inf", "finite"),
    ],
)
def test_crops_that_cannot_be_are_refused_with_the_setting(recipe: str, setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"{setting.partition('=')[0]}.*{message}"):
        load_recipe(recipe, [f"modalities.{setting}"])


def test_sounds_may_be_taken_whole() -> None:
    recipe = load_recipe("audio_tiny", ["modalities.audio.data.max_seconds=inf"])
    assert AudioSamples(recipe.modalities["audio"], Path()).longest == 3600 * RATE


def test_the_scale_of_one_takes_the_whole_picture() -> None:
    """Whatever its aspect."""
    assert crop_box((90, 10), (1.0, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0)) == (0, 0, 90, 10)


@pytest.mark.parametrize(
    ("form", "size", "decoded"),
    [
        ("JPEG", (4000, 3000), (1000, 750)),
        ("JPEG", (1201, 1163), (601, 582)),
        ("JPEG", (1100, 1100), (1100, 1100)),
        ("JPEG", (5000, 440), (5000, 440)),
        ("PNG", (2400, 2400), (2400, 2400)),
    ],
)
def test_a_large_jpeg_is_decoded_to_the_crops_needed(
    form: str, size: tuple[int, int], decoded: tuple[int, int]
) -> None:
    """As few pixels as leave no crop below 224; the crops are those of the whole picture."""
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(file, form)
    samples = ImageSamples(load_recipe("image_base").modalities["image"], Path())
    corpus = labelled.Fields({"image": file.getvalue()})
    whole, read = samples.decode(corpus, 0), samples.read(corpus, 0)
    assert (whole.size, read.size) == (size, decoded)
    draws = draws_of(*range(4))
    crops = samples.pixels([read] * 4, draws)
    assert (crops - samples.pixels([whole] * 4, draws)).abs().mean() < 0.02 < crops.std()


@pytest.mark.parametrize(("scale", "ratio"), [((0.2, 1.0), (3 / 4, 4 / 3)), ((0.08, 0.1), (0.2, 6.0))])
def test_no_crop_is_less_than_was_decoded_for(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    for size in ((97, 61), (500, 20), (20, 500), (400, 400)):
        boxes = np.array([crop_box(size, scale, ratio, rng) for _ in range(300)])
        assert (boxes[:, 2:] - boxes[:, :2]).min() >= least_side(size, scale, ratio) - 1
    assert least_side((90, 50), (1.0, 1.0), ratio) == 50


def test_pixels_are_normalised_and_flipped_as_configured() -> None:
    """Whole picture: (pixel / 255 - mean) / std in each channel, mirrored left to right."""
    image = picture(32, 32)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.1, 0.2, 0.3])[:, None, None], torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    for flip in (0.0, 1.0):
        samples = ImageSamples(
            config_of("image", f"data.flip={flip}", "data.mean=[0.1,0.2,0.3]", "data.std=[0.5,0.6,0.7]"),
            Path(),
        )
        source = samples.collate([image], draws_of(1)).source[0]
        expected = (pixels - mean) / std
        torch.testing.assert_close(source, expected.flip(2) if flip else expected)
    torch.testing.assert_close(samples.prepare(image), expected)


def test_colours_change_within_their_range_and_only_where_asked() -> None:
    """Each of a grey picture's draws scales it by 1 - jitter to 1 + jitter; 0 leaves it, and the crop, as it is."""
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    plain, changed = (ImageSamples(config_of("image", f"data.jitter={j}"), Path()) for j in (0, 0.4))
    assert plain.recolour(grey, draws_of(1)[0]) is grey
    shades = [np.asarray(changed.recolour(grey, draw)).astype(int) for draw in draws_of(*range(200))]
    values = np.array([shade[0, 0, 0] for shade in shades])
    assert all((shade == shade[0, 0, 0]).all() for shade in shades)
    assert 59 <= values.min() < 64 and 136 < values.max() <= 141 and abs(values.mean() - 100) < 5
    again = changed.recolour(grey, draws_of(7)[0])
    assert np.array_equal(np.asarray(again), shades[7])


def test_jitter_changes_colours_and_contrast_and_no_place() -> None:
    """Of a picture of two colours: both move, differently in every channel, and the edge stays where it is."""
    halves = Image.new("RGB", (8, 8), (200, 60, 20))
    halves.paste((20, 60, 200), (4, 0, 8, 8))
    changed = ImageSamples(config_of("image", "data.jitter=0.4"), Path())
    for draw in draws_of(*range(20)):
        pixels = np.asarray(changed.recolour(halves, draw)).astype(int)
        assert (pixels[:, :4] == pixels[0, 0]).all() and (pixels[:, 4:] == pixels[0, 7]).all()
        assert pixels[0, 0, 0] > pixels[0, 7, 0] and pixels[0, 0, 2] < pixels[0, 7, 2]
    spread = [np.ptp(np.asarray(changed.recolour(halves, d))[0, 0].astype(int)) for d in draws_of(*range(50))]
    assert min(spread) < 140 < 210 < max(spread)  # 180 before: saturation, contrast and brightness


def test_an_image_batch_is_a_pure_function_of_its_draws() -> None:
    """Crop, flip and masks of a sample come from its own seed, whoever else is in the batch."""
    samples = ImageSamples(config_of("image", "data.crop_scale=[0.2,1.0]", "data.flip=0.5"), Path())
    images = [picture(60, 45, seed) for seed in range(3)]
    torch.manual_seed(0)
    first = samples.collate(images, draws_of(5, 6, 7))
    torch.manual_seed(1)
    assert_equal_batches(first, samples.collate(images, draws_of(5, 6, 7)))
    other = samples.collate(images, draws_of(5, 99, 7))
    swapped = samples.collate(images[::-1], draws_of(7, 6, 5))
    for i in range(3):
        rows = slice(8 * i, 8 * i + 8)
        is_same = i != 1
        assert torch.equal(first.source[i], other.source[i]) == is_same
        assert torch.equal(first.mask_NT[rows], other.mask_NT[rows]) == is_same
        assert torch.equal(first.source[i], swapped.source[2 - i])
    assert first.source.shape == (3, 3, 32, 32) and first.padding_BT is None
    assert (first.mask_NT.sum(dim=1) == 16 - int(16 * 0.4)).all() and first.mask_NT.shape == (24, 16)


# audio


def tone(samples: int, rate: int = RATE, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(samples) / rate)


def sound(samples: np.ndarray, rate: int = RATE, form: str = "wav", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=form, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("form", BANDS)
def test_sound_of_every_format_is_decoded(form: str) -> None:
    """At 16 kHz: the very length, and the samples as far as the format keeps them."""
    data = sound(tone(9001), form=form)
    waveform = decode_sound(data)
    assert waveform.shape == (9001,) and waveform.dtype == torch.float32
    assert np.abs(waveform.numpy() - tone(9001)).max() < BANDS[form]
    assert AudioSamples.measure({"audio": data}) == 9001


@pytest.mark.parametrize("form", BANDS)
def test_channels_are_averaged(form: str) -> None:
    """A tone on the left and none on the right is half a tone."""
    data = sound(np.stack([tone(4000), np.zeros(4000)], axis=1), form=form)
    assert np.abs(decode_sound(data).numpy() - tone(4000) / 2).max() < BANDS[form]
    assert AudioSamples.measure({"audio": data}) == 4000


@pytest.mark.parametrize(
    ("rate", "samples", "length"), [(8_000, 4001, 8002), (44_100, 30_011, 10_889), (48_000, 9001, 3001)]
)
@pytest.mark.parametrize("form", BANDS)
def test_other_rates_are_resampled_to_16_khz(rate: int, samples: int, length: int, form: str) -> None:
    """ceil(samples * 16000 / rate) of them, a tone at the same pitch; the measure is at most one less."""
    data = sound(tone(samples, rate), rate, form)
    waveform = decode_sound(data)
    assert len(waveform) == length
    middle = slice(200, length - 200)
    assert np.abs(waveform.numpy()[middle] - tone(length)[middle]).max() < BANDS[form] + 0.01
    assert 0 <= length - AudioSamples.measure({"audio": data}) <= 1


@pytest.mark.parametrize(
    "data", [b"", b"garbage" * 100, b"RIFF\0\0\0\0WAVE", sound(tone(500), form="flac")[:40]]
)
@pytest.mark.parametrize("read", [decode_sound, lambda data: AudioSamples.measure({"audio": data})])
def test_bytes_that_are_no_sound_are_an_error(read: Callable, data: bytes) -> None:
    """For the decoder and for the measure."""
    with pytest.raises(ValueError, match="undecodable sound"):
        read(data)


@pytest.mark.parametrize("read", [decode_sound, lambda data: AudioSamples.measure({"audio": data})])
def test_a_sound_whose_header_claims_weeks_is_an_error(read: Callable) -> None:
    """FLAC, 36 bits of length all set: 256 GiB in memory, and more than a uint32 column holds."""
    data = bytearray(sound(tone(8000), form="flac"))
    data[21] |= 0x0F
    data[22:26] = b"\xff" * 4
    with pytest.raises(ValueError, match="sound"):
        read(bytes(data))


def test_a_sound_without_samples_or_without_a_length_is_named(tmp_path: Path) -> None:
    """Whatever its rate; a stream of FLAC has no length in its header."""
    stream = bytearray(sound(tone(8000), form="flac"))
    stream[21] &= 0xF0
    stream[22:26] = bytes(4)
    for rate in (16_000, 44_100):
        with pytest.raises(ValueError, match="sound without samples"):
            decode_sound(sound(np.zeros(0), rate))
    with pytest.raises(ValueError, match="does not say how long it is"):
        decode_sound(bytes(stream))
    write_shard(tmp_path / "a.tar", "wav", [sound(tone(8000)), sound(np.zeros(0)), bytes(stream)])
    open_source("audio", config_of("audio", "data.shards=a.tar", "data.fields=wav"), str(tmp_path))
    (faults,) = tmp_path.glob("*.faults.jsonl")
    assert faults.read_text().count("without samples") == faults.read_text().count("how long") == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_sound_with_samples_that_are_not_finite_is_an_error(value: float) -> None:
    """A wav of floats can hold them."""
    samples = tone(8000)
    samples[7] = value
    with pytest.raises(ValueError, match="sound"):
        decode_sound(sound(samples, subtype="FLOAT"))


def test_normalised_sound_has_zero_mean_and_unit_variance() -> None:
    """Over the whole utterance, so loudness and offset do not matter."""
    waveform = torch.from_numpy(tone(5000)).float() + 0.3
    normed = normalise(waveform)
    assert abs(normed.mean().item()) < 1e-5
    assert normed.square().mean().item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(normed, normalise(3 * waveform - 1), rtol=1e-3, atol=1e-3)
    assert torch.isfinite(normalise(torch.zeros(400))).all()


def test_sounds_are_cropped_at_random_to_the_shortest_of_the_batch() -> None:
    """Crops are stretches of the sounds; masks have one count for the frames of that length."""
    config = config_of("audio")
    samples = AudioSamples(config, Path())
    sounds = [torch.arange(n, dtype=torch.float32) for n in (9000, 12_000, 15_999)]
    batch = samples.collate(sounds, draws_of(1, 2, 3))
    starts = batch.source[:, 0]
    assert torch.equal(batch.source, starts[:, None] + torch.arange(9000))
    assert starts[0] == 0 and 0 < starts[1] <= 3000 and 0 < starts[2] <= 6999
    frames = num_frames(9000, config.conv_layers)
    assert batch.mask_NT.shape == (12, frames) and (batch.mask_NT.sum(dim=1) == int(frames * 0.6)).all()
    assert batch.padding_BT is None


def test_a_crop_begins_anywhere_it_fits() -> None:
    """The first and the last place included, each as often: 5 of 7 samples begin at 0, 1 or 2."""
    rng = np.random.default_rng(0)
    crops = torch.stack([crop(torch.arange(7), 5, rng) for _ in range(900)])
    assert torch.equal(crops, crops[:, :1] + torch.arange(5))
    assert crops[:, 0].bincount().tolist() == pytest.approx([300] * 3, abs=4 * (900 * 2 / 9) ** 0.5)


def test_no_crop_is_longer_than_the_limit() -> None:
    """One second here; and a sound of just that length is taken whole."""
    samples = AudioSamples(config_of("audio"), Path())
    long = torch.arange(40_000, dtype=torch.float32)
    assert samples.collate([long, long], draws_of(1, 2)).source.shape == (2, 16_000)
    assert torch.equal(samples.collate([long[:16_000]], draws_of(1)).source[0], long[:16_000])


def test_an_audio_batch_is_a_pure_function_of_its_draws() -> None:
    """Crop and masks of a sound come from its own seed."""
    samples = AudioSamples(config_of("audio"), Path())
    sounds = [torch.arange(n, dtype=torch.float32) for n in (20_000, 30_000, 25_000)]
    torch.manual_seed(0)
    first = samples.collate(sounds, draws_of(5, 6, 7))
    torch.manual_seed(1)
    assert_equal_batches(first, samples.collate(sounds, draws_of(5, 6, 7)))
    other = samples.collate(sounds, draws_of(5, 99, 7))
    for i in range(3):
        rows, is_same = slice(4 * i, 4 * i + 4), i != 1
        assert torch.equal(first.source[i], other.source[i]) == is_same
        assert torch.equal(first.mask_NT[rows], other.mask_NT[rows]) == is_same


def test_short_and_broken_sounds_are_left_out_and_others_are_read_normalised(tmp_path: Path) -> None:
    """Below half a second by the header; what is read is whole, 16 kHz and normalised."""
    contents = [
        sound(tone(8000)),
        sound(tone(7999)),
        b"no sound",
        sound(tone(30_000, 44_100), 44_100, "flac"),
    ]
    write_shard(tmp_path / "a.tar", "wav", contents)
    source = open_source("audio", config_of("audio", "data.shards=a.tar", "data.fields=wav"), str(tmp_path))
    assert len(source.corpus) == 2 and source.corpus.lengths.all().tolist() == [8000, 10_884]
    waveform = source.samples.read(source.corpus, 1)
    assert len(waveform) == 10_885
    assert waveform.std(unbiased=False).item() == pytest.approx(1, abs=1e-3)


def test_sounds_of_less_than_two_frames_are_left_out_whatever_the_recipe_says(tmp_path: Path) -> None:
    """A run would end at the first batch of them: of no frame or one nothing is hidden."""
    write_shard(tmp_path / "a.tar", "wav", [sound(tone(n)) for n in (399, 400, 719, 720, 8000)])
    config = config_of("audio", "data.shards=a.tar", "data.fields=wav", "data.min_seconds=0")
    source = open_source("audio", config, str(tmp_path))
    assert source.corpus.lengths.all().tolist() == [720, 8000]
    batch = source.samples.collate([source.samples.read(source.corpus, 0)], draws_of(1))
    assert batch.mask_NT.shape == (4, 2)


# text


@pytest.fixture(scope="module")
def train_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, 9)) for _ in range(300)]

    def train(pieces: int = 50, **ids: int) -> bytes:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=pieces, minloglevel=2, **ids
        )
        return model.getvalue()

    return train


@pytest.fixture(scope="module")
def tokenizer(train_tokenizer: Callable[..., bytes]) -> bytes:
    return train_tokenizer(**OUR_IDS)


def document(seed: int, words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


@pytest.fixture
def folder(tmp_path: Path, tokenizer: bytes) -> Path:
    """Two shards of seven documents each, shorter and longer than a block, and the tokenizer beside them."""
    (tmp_path / "sentencepiece.model").write_bytes(tokenizer)
    for shard in range(2):
        texts = [document(10 * shard + i, words) for i, words in enumerate((1, 30, 2, 7, 50, 3, 11))]
        write_shard(tmp_path / f"{shard}.tar", "txt", [text.encode() for text in texts])
    return tmp_path


def open_text(folder: Path, *overrides: str) -> Source:
    return open_source(
        "text",
        config_of("text", "max_tokens=16", "vocabulary=50", "data.shards=*.tar", *overrides),
        str(folder),
    )


def expected_stream(tokenizer: bytes, shard: int) -> list[int]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    texts = [document(10 * shard + i, words) for i, words in enumerate((1, 30, 2, 7, 50, 3, 11))]
    return [token for text in texts for token in [*processor.encode(text), EOS]]


def test_blocks_are_consecutive_tokens_of_a_shard_after_a_begin_token(folder: Path, tokenizer: bytes) -> None:
    """Across documents, each closed by </s>; none spans two shards, the incomplete last one is left out."""
    source = open_text(folder)
    blocks = [source.samples.read(source.corpus, unit).tolist() for unit in range(source.size)]
    expected = []
    for shard in range(2):
        stream = expected_stream(tokenizer, shard)
        assert stream.count(EOS) == 7 and len(stream) % 15
        expected += [[BOS, *stream[i : i + 15]] for i in range(0, len(stream) - 14, 15)]
    assert blocks == expected


def test_a_document_of_many_blocks_goes_through_the_tokenizer_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is kept; where there is no room for it the blocks are the same."""
    source = open_text(folder)
    encode, calls = TextSamples.encode, []
    monkeypatch.setattr(TextSamples, "encode", lambda self, text: calls.append(text) or encode(self, text))
    kept = [source.samples.read(source.corpus, unit).tolist() for unit in range(source.size)]
    assert len(calls) == len(set(calls)) == 14
    monkeypatch.setattr(text_samples, "MAX_KEPT_TOKENS", 20)
    source = open_text(folder)
    assert [source.samples.read(source.corpus, unit).tolist() for unit in range(source.size)] == kept
    assert len(calls) > 28 and source.samples._kept_tokens <= 20


def test_a_batch_of_blocks_has_no_padding_and_exact_masks(folder: Path) -> None:
    """int(16 * 0.52) = 8 of 16 tokens are kept in every view."""
    source = open_text(folder)
    rows = [source.samples.read(source.corpus, unit) for unit in (0, 3)]
    batch = source.samples.collate(rows, draws_of(1, 2))
    assert torch.equal(batch.source, torch.from_numpy(np.stack(rows)))
    assert (
        batch.padding_BT is None and (batch.mask_NT.sum(dim=1) == 8).all() and batch.mask_NT.shape == (8, 16)
    )


def test_samples_are_padded_and_say_so(folder: Path, tokenizer: bytes) -> None:
    """One document each, cut to max_tokens; padding is PAD and marked; masks are those of each alone."""
    source = open_text(folder, "data.mode=samples")
    assert source.size == 14
    rows = [source.samples.read(source.corpus, unit) for unit in (0, 1, 3)]
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    whole = [
        [BOS, *processor.encode(document(seed, words)), EOS] for seed, words in ((0, 1), (1, 30), (3, 7))
    ]
    assert [row.tolist() for row in rows] == [ids[:16] for ids in whole]
    batch = source.samples.collate(rows, draws_of(1, 2, 3))
    lengths = torch.tensor([len(row) for row in rows])
    assert lengths[0] < 16 == lengths[1]
    assert torch.equal(batch.padding_BT, torch.arange(16)[None] >= lengths[:, None])
    assert (batch.source[batch.padding_BT] == PAD).all() and (batch.source[~batch.padding_BT] != PAD).all()
    for i, length in enumerate(lengths.tolist()):
        masked = batch.mask_NT[4 * i : 4 * i + 4, :length].sum(dim=1)
        assert (masked == length - int(length * 0.52)).all()


def test_a_text_batch_is_a_pure_function_of_its_draws(folder: Path) -> None:
    """Masks of a row come from its own seed."""
    source = open_text(folder)
    rows = [source.samples.read(source.corpus, unit) for unit in range(3)]
    first = source.samples.collate(rows, draws_of(5, 6, 7))
    torch.manual_seed(1)
    assert_equal_batches(first, source.samples.collate(rows, draws_of(5, 6, 7)))
    other = source.samples.collate(rows, draws_of(5, 99, 7))
    same = [torch.equal(first.mask_NT[4 * i : 4 * i + 4], other.mask_NT[4 * i : 4 * i + 4]) for i in range(3)]
    assert same == [True, False, True]


def test_lengths_of_documents_count_the_end_token(
    folder: Path, tokenizer: bytes, train_tokenizer: Callable[..., bytes]
) -> None:
    """And are kept under a name that changes with the tokenizer."""
    source = open_text(folder)
    assert source.corpus.lengths.all()[:7].sum() == len(expected_stream(tokenizer, 0))
    assert source.samples.measure({"text": b"the river"}) == len(source.samples.encode("the river"))
    (folder / "other.model").write_bytes(train_tokenizer(45, **OUR_IDS))
    other = TextSamples(config_of("text", "data.tokenizer=other.model"), folder)
    assert other.measure_name != source.samples.measure_name


@pytest.mark.parametrize("text", [b"", b"  \n ", b"\xff\xfe\xfd"])
def test_text_without_words_or_that_is_no_utf_8_is_an_error(folder: Path, text: bytes) -> None:
    """So such a document is left out and counted."""
    with pytest.raises(ValueError, match="without any text|utf-8"):
        open_text(folder).samples.measure({"text": text})


def test_a_prepared_text_is_what_a_sample_would_be(folder: Path) -> None:
    """<s>, ids, </s>, cut to max_tokens."""
    source = open_text(folder, "data.mode=samples")
    for unit, words in ((1, 30), (2, 2)):
        prepared = source.samples.prepare(document(unit, words)).tolist()
        assert prepared == source.samples.read(source.corpus, unit).tolist()
        assert source.samples.prepare(prepared).tolist() == prepared


def test_pairs_are_two_texts_with_two_ends_between_and_the_longer_is_cut(
    tmp_path: Path, tokenizer: bytes
) -> None:
    """Read, measured, prepared and given as a tuple alike; as many tokens of both as there is room for."""
    (tmp_path / "sentencepiece.model").write_bytes(tokenizer)
    texts = [("the river", "a stone"), ("the river", document(1, 40)), (document(2, 40), document(3, 40))]
    write_shard(tmp_path / "0.tar", "json", [json.dumps({"text": a, "b": b}).encode() for a, b in texts])
    source = open_text(tmp_path, "data.mode=samples", "data.pair=json.b")
    samples, corpus = source.samples, source.corpus
    of_one = open_text(tmp_path, "data.mode=samples").samples  # as imported weights have them
    for i, (a, b) in enumerate(texts):
        first, second = (samples.tokenizer.encode(text) for text in (a, b))
        whole = [BOS, *first, EOS, EOS, *second, EOS]
        assert corpus.lengths.of_unit(i) == len(whole) - 1
        row = samples.read(corpus, i).tolist()
        assert row == inputs("text").prepare(samples, (a, b)).row.tolist()
        assert row == inputs("text").prepare(of_one, (a, b)).row.tolist()
        assert row == inputs("text").prepare(samples, (a.encode(), b.encode())).row.tolist()
        assert samples.decode(corpus, i) == (a, b)
        if len(whole) <= 16:
            assert row == whole
            continue
        room = 12 - min(len(first), 6)
        assert row == [BOS, *first[:6], EOS, EOS, *second[:room], EOS] and len(row) == 16
    with pytest.raises(ValueError, match="reads pairs of texts"):
        inputs("text").prepare(samples, "one alone")
    with pytest.raises(ValueError, match="data.pair=json.b has no meaning with data.mode=blocks"):
        open_text(tmp_path, "data.pair=json.b")


def test_a_tokenizer_with_other_ids_is_an_error(folder: Path, train_tokenizer: Callable[..., bytes]) -> None:
    """Its own ids and the needed ones stand in the message, and how to train it."""
    (folder / "sentencepiece.model").write_bytes(train_tokenizer())
    with pytest.raises(
        ValueError, match=r"are \(1, -1, 2, 0\), must be \(0, 1, 2, 3\); train it with bos_id=0"
    ):
        open_text(folder)


def test_a_tokenizer_with_more_pieces_than_the_vocabulary_is_an_error(folder: Path) -> None:
    """By one; with just as many it is none."""
    open_text(folder, "vocabulary=50")
    with pytest.raises(ValueError, match="50 pieces, more than modalities.text.vocabulary=49"):
        open_text(folder, "vocabulary=49")


def test_a_tokenizer_that_is_no_sentencepiece_model_is_an_error(folder: Path) -> None:
    """The message names the file."""
    (folder / "sentencepiece.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="sentencepiece.model"):
        open_text(folder)


def test_a_missing_tokenizer_is_an_error(folder: Path) -> None:
    """The message says which setting names it."""
    with pytest.raises(
        ValueError, match="'nowhere.model' is neither.*set modalities.text.data.tokenizer=PATH"
    ):
        open_text(folder, "data.tokenizer=nowhere.model")


# what all share


@pytest.mark.parametrize("lengths", [(5000, 7333, 15_999), (8000, 8000)])
def test_padded_sounds_have_the_features_of_each_alone(lengths: tuple[int, ...]) -> None:
    """Of lengths that are no multiple of a frame; without any padding there is no mask."""
    recipe = load_recipe("audio_tiny")
    torch.manual_seed(0)
    model = build_model(recipe.body, recipe.modalities).eval()
    samples = AudioSamples(recipe.modalities["audio"], Path())
    sounds = [samples.prepare(torch.randn(n)) for n in lengths]
    batch = samples.pad(sounds)
    assert (batch.padding_BT is None) == (len(set(lengths)) == 1)
    with torch.no_grad():
        together = model.encode(batch)[0][-1]
        for row, one in zip(together, sounds, strict=True):
            alone = model.encode(samples.pad([one]))[0][-1][0]
            torch.testing.assert_close(row[: len(alone)], alone, rtol=1e-5, atol=1e-5)


def test_padded_texts_say_where_they_end(folder: Path) -> None:
    """Equal lengths have no mask."""
    samples = open_text(folder).samples
    rows = [samples.prepare([BOS, 7, EOS]), samples.prepare([BOS, 5, 6, 8, EOS])]
    batch = samples.pad(rows)
    assert batch.source.tolist() == [[BOS, 7, EOS, PAD, PAD], [BOS, 5, 6, 8, EOS]]
    assert batch.padding_BT.tolist() == [[False] * 3 + [True] * 2, [False] * 5]
    assert samples.pad(rows[:1]).padding_BT is None


@pytest.mark.parametrize("waveform", [torch.zeros(399), torch.zeros(2, 4000), torch.zeros(0)])
def test_a_waveform_without_a_frame_or_with_channels_is_an_error(waveform: torch.Tensor) -> None:
    """400 samples are one frame."""
    samples = AudioSamples(config_of("audio"), Path())
    with pytest.raises(ValueError, match="must be one-dimensional .* at least 25 ms"):
        samples.prepare(waveform)
    assert samples.prepare(torch.zeros(400)).shape == (400,)


def test_crops_and_masks_of_one_draw_use_random_numbers_of_their_own() -> None:
    """A purpose and a seed name a generator."""
    draw, other = draws_of(3, 4)

    def numbers(draw: Draw, purpose: str) -> list[float]:
        return generator(draw, purpose).random(4).tolist()

    assert numbers(draw, "crop") == numbers(draw, "crop")
    assert len({tuple(numbers(d, p)) for d in (draw, other) for p in ("crop", "mask")}) == 4


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("some/where", ["some/where/a-*.tar", "some/where/b.tar"]),
        ("x::y", ["x/a-*.tar", "x/b.tar", "y/a-*.tar", "y/b.tar"]),
        ("x/{00..03}.tar", "x/{00..03}.tar"),
        ("x/*", "x/*"),
        ("x::y/c.tar", "x::y/c.tar"),
    ],
)
def test_data_is_a_folder_or_a_pattern_of_its_own(data: str, expected: str | list[str]) -> None:
    """A folder takes the recipe's file names; a pattern replaces them."""
    assert shard_pattern(data, "a-*.tar::b.tar") == expected


def test_folders_of_a_list_take_the_recipes_file_names_beside_patterns_too(tmp_path: Path) -> None:
    """They gave all of their tars, of validation too."""
    for folder in ("x", "z"):
        (tmp_path / folder).mkdir()
    data = f"{tmp_path}/x::y/c.tar::{tmp_path}/z"
    assert train_patterns(data, "a-*.tar") == [f"{tmp_path}/x/a-*.tar", "y/c.tar", f"{tmp_path}/z/a-*.tar"]
    assert train_patterns("y/{0..3}.tar::y/c.tar", "a-*.tar") == ["y/{0..3}.tar", "y/c.tar"]


@pytest.mark.parametrize("unit", [1e-320, 1e-9, 1.0, 4e307])
def test_weights_count_by_their_ratio_however_large(unit: float) -> None:
    """Their sum overflowed."""
    weights = {"a": unit, "b": 4 * unit, "c": 3 * unit}
    config = StreamConfig(
        corpora=dict.fromkeys("abc", "*.tar"), weights=weights, micro_batches=8, mix_steps=1
    )
    assert count_mix({"x/a": 5, "x/b": 5, "x/c": 5}, config) == {"x/a": 1, "x/b": 4, "x/c": 3}


def test_lengths_of_other_members_are_measured_anew(folder: Path) -> None:
    """A caption in `txt` and another in `json`: each has a column of its own."""
    write_shard(folder / "0.tar", "txt", [b"the river", b"the old river and the town"])
    (folder / "1.tar").unlink()
    first = open_text(folder, "data.mode=samples")
    other = open_text(folder, "data.mode=samples", "data.fields=txt;json.text;text")
    assert first.samples.measure_name in other.samples.measure_name != first.samples.measure_name
    assert other.corpus.lengths.all().tolist() == first.corpus.lengths.all().tolist()


@pytest.mark.parametrize(
    ("modality", "ratio", "tokens", "said"),
    [
        ("image", 0.95, 16, "hides 16 of 16 tokens; .* lower it"),
        ("audio", 0.01, 34, "hides 0 of 34 tokens; .* raise it"),
        ("text", 0.99, 64, "hides 64 of 64 tokens; .* lower it"),
    ],
)
def test_a_mask_that_hides_all_or_nothing_is_an_error(
    modality: str, ratio: float, tokens: int, said: str
) -> None:
    config = config_of(modality, f"mask.ratio={ratio}", "mask.adjust=0")
    with pytest.raises(ValueError, match=f"modalities.{modality}.mask.ratio={ratio} {said}"):
        draw_views(draws_of(1, 2), [tokens] * 2, config)
