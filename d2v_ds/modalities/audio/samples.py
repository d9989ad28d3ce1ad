"""Sound files in shards -> normalised 16 kHz mono crops of one length, with their masks."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from d2v_ds.data import Buckets, Corpus, Draw, Share, Volume
from d2v_ds.data.buckets import expected_extremes
from d2v_ds.modalities.audio.vocabulary import Vocabulary, open_vocabulary
from d2v_ds.modalities.source import StreamConfig, column_name, draw_views, generator, pad_stack, reason
from d2v_ds.model.batch import Batch
from d2v_ds.model.masking import draw_mask
from d2v_ds.model.tuned import Task, as_labels

RATE = 16_000
LOUDEST = 1e15  # of PCM of 32 bits: 2e9; squares of larger values, and their sum, leave fp32
MAX_TAPS = 10**8
UNKNOWN = 2**63 - 1  # frames that libsndfile gives where a FLAC says none
MAX_SECONDS = 3600  # a longer one, or a header that lies, would fill the memory of a worker
MAX_VALUES = 400_000_000  # of all channels, decoded: an hour of stereo at 48 kHz, 1.6 GB


class AudioData(StreamConfig):
    fields: str = "flac;wav;ogg;opus;mp3"
    """Extensions that hold the sound, best first."""
    max_seconds: PositiveFloat = 20.0
    """Longer sounds are cropped at random; then all of a micro-batch are cropped to its shortest."""
    min_seconds: float = Field(2.0, ge=0, allow_inf_nan=False)
    """Shorter sounds are left out, and those of less than two frames: a mask hides one and shows one."""
    batch_seconds: PositiveFloat | None = Field(None, allow_inf_nan=False)
    """A micro-batch holds sounds of like length, as many as number x longest <= this, and at most `batch`. None:
    `batch` of them, whatever their length."""

    @model_validator(mode="after")
    def holds_one(self) -> AudioData:
        if self.batch_seconds is not None and self.batch_seconds < self.max_seconds:
            raise ValueError(
                f"data.batch_seconds={self.batch_seconds:g} holds no sound of data.max_seconds={self.max_seconds:g}; "
                "raise it, or crop sounds to less"
            )
        return self


class AudioSamples:
    """Reads, resamples, normalises a whole utterance, crops."""

    def __init__(self, config: Any, folder: Path):
        self.config = config
        self.fields = {"audio": config.data.fields}
        self.measure_name = column_name("audio_samples", config.data)
        self.min_length = max(int(config.data.min_seconds * RATE), num_samples(2, config.conv_layers))

    @staticmethod
    def measure(fields: dict[str, bytes]) -> int:
        """Samples at 16 kHz, from the file's header."""
        frames, rate = sound_size(fields["audio"])
        return frames * RATE // rate

    def attach(self, corpus: Corpus) -> None:
        self.unit_starts = corpus.shard_starts

    @property
    def longest(self) -> int:
        return int(min(self.config.data.max_seconds, MAX_SECONDS) * RATE)

    def buckets(self, corpus: Corpus, shards: range) -> Buckets | None:
        data = self.config.data
        if data.batch_seconds is None:
            return None
        return Buckets(corpus.lengths, shards, int(data.batch_seconds * RATE), data.batch, self.longest)

    def volume(self, corpus: Corpus, share: Share, batch: int) -> Volume:
        """In seconds; a micro-batch is cropped to its shortest."""
        shards = corpus.lengths.shards_of(share.first, share.size)
        if share.buckets:
            stored, heard, _ = share.buckets.filling()
        else:
            counts = corpus.lengths.count(shards, self.longest)
            values = np.arange(len(counts))
            stored, heard = values @ counts, share.size * expected_extremes(values, counts, batch)[0]
        return Volume(
            "seconds",
            corpus.lengths.total(shards) / RATE,
            heard / share.batches(batch) / RATE,
            cropped=1 - heard / float(stored),
            budget=self.config.data.batch_seconds,
        )

    def whole_volume(self, corpus: Corpus, share: Share, batch: int) -> Volume:
        """In seconds, of sounds that are not cropped: a micro-batch is padded to its longest."""
        if share.buckets:
            stored, _, padded = share.buckets.filling()
        else:
            counts = corpus.lengths.count(corpus.lengths.shards_of(share.first, share.size), self.longest)
            values = np.arange(len(counts))
            stored, padded = values @ counts, share.size * expected_extremes(values, counts, batch)[1]
        return Volume(
            "seconds",
            float(stored) / RATE,
            float(stored) / share.batches(batch) / RATE,
            padding=1 - float(stored) / padded,
            budget=self.config.data.batch_seconds,
        )

    def label(self, corpus: Corpus, unit: int) -> str:
        return f"{corpus.key(unit)} {corpus.lengths.of_unit(unit) / RATE:.2f} s"

    def decode(self, corpus: Corpus, unit: int) -> Tensor:
        """One whole sample as `prepare` takes it."""
        return decode_sound(corpus.read(unit)["audio"])

    def raw(self, waveforms: list[Tensor]) -> Tensor:
        """Mean and spread over time of 40 log-mel bands, for a baseline; (N, 80)."""
        from torchaudio.transforms import MelSpectrogram

        mel = MelSpectrogram(RATE, n_fft=400, hop_length=160, n_mels=40)
        logs = [(mel(normalise(w)) + 1e-5).log() for w in waveforms]
        return torch.stack([torch.cat([x.mean(dim=1), x.std(dim=1)]) for x in logs])

    def read(self, corpus: Corpus, unit: int) -> Tensor:
        waveform = normalise(decode_sound(corpus.read(unit)["audio"]))
        if len(waveform) < self.min_length:
            raise ValueError(
                f"sound of {len(waveform)} samples is shorter than {self.min_length} "
                "although its header says more"
            )
        return waveform

    def collate(self, waveforms: list[Tensor], draws: list[Draw]) -> Batch:
        length = min(self.longest, *(len(w) for w in waveforms))
        crops = [crop(w, length, generator(d, "crop")) for w, d in zip(waveforms, draws, strict=True)]
        frames = num_frames(length, self.config.conv_layers)
        views = draw_views(draws, [frames] * len(draws), self.config)
        return Batch("audio", torch.stack(crops), **views)

    def parser(self, task: Task) -> Callable[[str], list[int]]:
        """Transcripts as numbers of CTC's symbols; ValueError for one that is empty or has unknown symbols."""
        return Transcripts(open_vocabulary(task.vocabulary, task.case) if task.vocabulary else
                           Vocabulary(task.labels, task.case), task.label)  # fmt: skip

    def check_pair(self, waveform: Tensor, label: Any, task: Task) -> None:
        """Raises ValueError for a sound that is longer than a micro-batch takes, or too short for its transcript."""
        if len(waveform) > self.longest:
            raise ValueError(
                f"sound of {len(waveform) / RATE:.1f} s is longer than data.max_seconds={self.longest / RATE:g}"
            )
        frames = num_frames(len(waveform), self.config.conv_layers)
        if task.head == "ctc" and frames < (needed := frames_needed(label)):
            raise ValueError(
                f"{frames} frames are too few for the {len(label)} symbols of the transcript, which need {needed}"
            )
        if frames < (1 if task.mask is None else 2):
            raise ValueError(
                f"sound of {len(waveform)} samples gives {frames} frames; a head needs 1, the spans of task.mask 2"
            )

    def collate_whole(
        self, waveforms: list[Tensor], draws: list[Draw], labels: list[Any], task: Task
    ) -> Batch:
        """Whole sounds, padded, with the frames that are masked, and their classes or transcripts."""
        batch = self.pad(waveforms)
        if task.mask is not None:
            frames = [num_frames(len(w), self.config.conv_layers) for w in waveforms]
            masks = [
                draw_mask(generator(d, "mask"), 1, n, task.mask)[0]
                for d, n in zip(draws, frames, strict=True)
            ]
            batch.mask_NT = torch.from_numpy(np.stack([np.pad(m, (0, max(frames) - len(m))) for m in masks]))
        if task.head == "ctc":
            batch.labels = pad_stack([torch.tensor(ids) for ids in labels], -1)[0]
        else:
            batch.labels = as_labels(labels, task.outputs)
        return batch

    def prepare(self, waveform: Tensor) -> Tensor:
        """One waveform at 16 kHz as a trained model sees it; (S,)."""
        waveform = torch.as_tensor(waveform, dtype=torch.float32)
        if waveform.ndim != 1 or num_frames(len(waveform), self.config.conv_layers) < 1:
            raise ValueError(
                f"waveform of shape {tuple(waveform.shape)} must be one-dimensional (16 kHz mono) and at "
                "least 25 ms long"
            )
        return normalise(waveform)

    def pad(self, waveforms: list[Tensor]) -> Batch:
        """One batch of unequal lengths; frames that a sample alone would not have are padding."""
        source, _ = pad_stack(waveforms, 0.0)
        frames = [num_frames(len(w), self.config.conv_layers) for w in waveforms]
        padding = torch.arange(max(frames))[None] >= torch.tensor(frames)[:, None]
        return Batch("audio", source, padding if bool(padding.any()) else None)


class Transcripts:
    """A vocabulary as the parser of labels."""

    def __init__(self, vocabulary: Vocabulary, where: str):
        self.vocabulary, self.where = vocabulary, where

    def __call__(self, text: str) -> list[int]:
        if not text:
            raise ValueError(
                f"no transcript: '{self.where}' is not in it, or empty; name its member or json key, task.label="
            )
        ids = self.vocabulary.encode(text)
        if not ids:
            raise ValueError(f"the transcript {text!r} of '{self.where}' has no symbol; leave the sample out")
        return ids


def frames_needed(ids: list[int]) -> int:
    """CTC writes a symbol a frame at most, and a blank between two that are equal."""
    return len(ids) + sum(a == b for a, b in pairwise(ids))


def num_frames(samples: int, conv_layers: tuple[tuple[int, int, int], ...]) -> int:
    """Frames that a waveform of this many samples gives: 400 -> 1, 16000 -> 49, 320000 -> 999."""
    for _, kernel, stride in conv_layers:
        samples = (samples - kernel) // stride + 1
    return max(samples, 0)


def num_samples(frames: int, conv_layers: tuple[tuple[int, int, int], ...]) -> int:
    """The fewest samples that give so many frames: 1 -> 400, 2 -> 720."""
    for _, kernel, stride in reversed(conv_layers):
        frames = (frames - 1) * stride + kernel
    return frames


def sound_size(data: bytes) -> tuple[int, int]:
    """(frames, rate) of a sound's header; ValueError if there is none, or it says nothing or more than MAX_SECONDS."""
    try:
        info = soundfile.info(io.BytesIO(data))
    except soundfile.LibsndfileError as error:
        raise ValueError(f"undecodable sound: {reason(error)}") from error
    if info.frames < 1:
        raise ValueError("sound without samples")
    if info.frames >= UNKNOWN:
        raise ValueError(
            "sound whose header does not say how long it is, as of a stream; encode it anew to a file"
        )
    if info.frames > MAX_SECONDS * info.samplerate:
        raise ValueError(
            f"sound of {info.frames / info.samplerate:.0f} s by its header is above the limit of "
            f"{MAX_SECONDS} s; cut it into pieces"
        )
    if info.frames * info.channels > MAX_VALUES:
        raise ValueError(
            f"sound of {info.frames / info.samplerate:.0f} s at {info.samplerate} Hz in {info.channels} channels by "
            f"its header is above the limit of {MAX_VALUES} values; cut it into pieces, or resample it"
        )
    return info.frames, info.samplerate


def decode_sound(data: bytes) -> Tensor:
    """Mono waveform at 16 kHz; ValueError if the bytes are no sound, or hold values that are not finite."""
    sound_size(data)
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"undecodable sound: {reason(error)}") from error
    if not len(samples):
        raise ValueError("sound without samples, although its header says some")
    waveform = torch.from_numpy(samples.mean(axis=1))
    if not bool(torch.isfinite(waveform).all()):
        raise ValueError("sound with samples that are not finite")
    return resample(waveform, rate)


def resample(waveform: Tensor, rate: int) -> Tensor:
    """At 16 kHz. ValueError for values and rates that cannot be computed with."""
    check_loudness(waveform)
    if rate == RATE:
        return waveform
    common = math.gcd(rate, RATE)
    if rate // common * (RATE // common) > MAX_TAPS:
        raise ValueError(
            f"a rate of {rate} has no common measure with {RATE}: the filter between them would fill the memory; "
            "resample it to a usual rate first, such as 44100 or 48000"
        )
    from torchaudio.functional import resample  # slow to import, and most corpora are at 16 kHz

    return resample(waveform, rate, RATE)


def check_loudness(waveform: Tensor) -> None:
    """ValueError if a finite waveform is too loud for its variance to be."""
    loudest = float(waveform.abs().max()) if waveform.numel() else 0.0
    if LOUDEST < loudest < math.inf:
        raise ValueError(
            f"waveform with values up to {loudest:.2g} is no sound: they must lie within -{LOUDEST:g}..{LOUDEST:g}; "
            "divide it by its largest"
        )


def normalise(waveform: Tensor) -> Tensor:
    """Zero mean and unit variance over the whole utterance, before any crop."""
    check_loudness(waveform)
    return F.layer_norm(waveform, waveform.shape)


def crop(waveform: Tensor, length: int, rng: np.random.Generator) -> Tensor:
    start = int(rng.integers(0, len(waveform) - length + 1))
    return waveform[start : start + length]
