"""How fast do samples come out of shards? Raw reading, webdataset and this loader, on shards that it makes itself.

    python scripts/bench_loader.py            # writes docs/benchmarks/loader.md and .json, in under 8 minutes

Every number is a process of its own, forked from one that has imported everything, that reads what the others read,
one reader after another, round after round; medians of --rounds, with the range. Shards lie in the page cache. CPU
time is that of the process, which keeps freed memory and freezes old objects as data workers do. `bytes`: samples of
5 kB, not decoded; `pread` reads them raw, one after another in a shuffled order, at offsets that it knows, and looks
at nothing; `pieces` reads the files from end to end in pieces of 1 MiB that it throws away: what the memory gives,
and no order of samples can. `jpeg`, `flac`: whole batches as a run has them, beside the decoder alone: the same files
from memory through the same decoding, cropping and normalising, without index, plan, batch or loader. `start`: from
the first line of a program that has imported everything to its first batch, with two workers.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import webdataset as wds
from PIL import Image

from d2v_ds.data import Corpus, Draw, Plan, Source, StepLoader, ensure_index
from d2v_ds.data.memory import keep_memory
from d2v_ds.modalities import config_class, samples_class
from d2v_ds.modalities.source import open_source

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = {"bytes": 40_000, "jpeg": 1_500, "flac": 600}
READERS = {
    "bytes": ("pieces", "pread", "webdataset", "d2v_ds"),
    "jpeg": ("decoder", "d2v_ds"),
    "flac": ("decoder", "d2v_ds"),
    "start": ("d2v_ds",),
}
MODALITY = {"jpeg": "image", "flac": "audio"}
BATCH = {"bytes": 64, "jpeg": 20, "flac": 12}


# ---- shards ----


def make_shards(folder: Path) -> None:
    rng = np.random.default_rng(0)
    makers: dict[str, Callable[[], bytes]] = {
        "bytes": lambda: rng.bytes(5_000),
        "jpeg": lambda: jpeg(rng),
        "flac": lambda: flac(rng),
    }
    for kind, make in makers.items():
        member = {"bytes": "bin", "jpeg": "jpg", "flac": "flac"}[kind]
        with wds.ShardWriter(
            str(folder / f"{kind}-%06d.tar"), maxsize=64 << 20, verbose=0, mtime=0
        ) as writer:
            for i in range(SAMPLES[kind]):
                writer.write({"__key__": f"{i:08d}", member: make()})


def jpeg(rng: np.random.Generator) -> bytes:
    """About as large as ImageNet's mean, 500 x 375 and 110 kB: smooth shapes and some noise."""
    small = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = (pixels + rng.integers(-24, 24, pixels.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=85)
    return file.getvalue()


def flac(rng: np.random.Generator) -> bytes:
    """10 s at 16 kHz."""
    t = np.arange(160_000) / 16_000
    sound = 0.3 * np.sin(2 * np.pi * rng.uniform(80, 800) * t) + 0.02 * rng.standard_normal(len(t))
    file = io.BytesIO()
    soundfile.write(file, sound, 16_000, format="FLAC")
    return file.getvalue()


# ---- readers, each in a process of its own ----


class Bytes:
    """Samples that nobody decodes."""

    fields = {"bin": "bin"}
    measure, measure_name, min_length = None, "", 0

    def __init__(self, corpus: Corpus):
        self.unit_starts = corpus.shard_starts

    def buckets(self, corpus: Corpus, shards: range) -> None:
        return None

    def read(self, corpus: Corpus, unit: int) -> bytes:
        return corpus.read(unit)["bin"]

    def collate(self, decoded: list[bytes], draws: list[Draw]) -> list[bytes]:
        return decoded


def source_of(kind: str, folder: Path) -> Source:
    if kind == "bytes":
        paths = sorted(folder.glob("bytes-*.tar"))
        corpus = Corpus.open(paths, Bytes.fields, progress=None)
        return Source("bytes", corpus, Bytes(corpus), BATCH[kind], 1)
    return open_source(MODALITY[kind], config_of(kind), f"{folder}/{kind}-*.tar")


def config_of(kind: str) -> Any:
    """The modality's own defaults, one view."""
    config = config_class(MODALITY[kind])(clones=1)
    config.data.batch, config.data.micro_batches = BATCH[kind], 1
    return config


def steps_of(source: Source, kind: str, workers: int = 0) -> Iterator[Any]:
    """One epoch."""
    plan = Plan(1, [source.stream])
    return iter(StepLoader([source], plan, 0, 1, 0, SAMPLES[kind] // BATCH[kind], workers))


def members(kind: str, folder: Path) -> list[bytes]:
    corpus = source_of(kind, folder).corpus
    return [next(iter(corpus.read(i).values())) for i in range(len(corpus))]


class Memory:
    """A corpus of one sample, read already."""

    def __init__(self, field: str, content: bytes):
        self.fields = {field: content}

    def read(self, unit: int) -> dict[str, bytes]:
        return self.fields


def read(reader: str, kind: str, folder: Path) -> dict[str, float]:
    """Seconds, CPU seconds and samples of one pass; what is prepared before does not count."""
    work: Callable[[], int]
    if reader == "pieces":
        paths = sorted(folder.glob(f"{kind}-*.tar"))
        work = lambda: sum(consume(path) for path in paths) and SAMPLES[kind]  # noqa: E731
    elif reader == "pread":
        spans = shuffled_spans(sorted(folder.glob(f"{kind}-*.tar")))
        work = lambda: sum(1 for file, size, offset in spans if os.pread(file, size, offset))  # noqa: E731
    elif reader == "webdataset":
        stream = wds.WebDataset([str(p) for p in sorted(folder.glob(f"{kind}-*.tar"))], shardshuffle=False)
        work = lambda: sum(1 for _ in stream)  # noqa: E731
    elif reader == "decoder":
        samples = samples_class(MODALITY[kind])(config_of(kind), folder)
        work = decoding(samples, kind, [Memory(next(iter(samples.fields)), c) for c in members(kind, folder)])
    else:
        steps = steps_of(source_of(kind, folder), kind)
        work = lambda: sum(BATCH[kind] * len(step) for step in steps)  # noqa: E731
    cpu, began = time.process_time(), time.perf_counter()
    count = work()
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu, "samples": count}


def decoding(samples: Any, kind: str, memory: list[Memory]) -> Callable[[], int]:
    """Decodes, crops and normalises each file by itself."""
    draws = [Draw(i, 0, i) for i in range(len(memory))]

    def image() -> int:
        for one, draw in zip(memory, draws, strict=True):
            samples.pixels([samples.read(one, 0)], [draw])
        return len(memory)

    def audio() -> int:
        for one in memory:
            samples.prepare(samples.read(one, 0))
        return len(memory)

    return image if kind == "jpeg" else audio


def consume(path: Path) -> int:
    total = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            total += len(piece)
    return total


def shuffled_spans(paths: list[Path]) -> list[tuple[int, int, int]]:
    """(open file, size, offset) of every member."""
    spans = []
    for path in paths:
        file, members = os.open(path, os.O_RDONLY), ensure_index([path], progress=None)[0].members()
        spans += [(file, int(row["size"]), int(row["offset"])) for row in members]
    random.Random(0).shuffle(spans)
    return spans


def time_start(folder: Path) -> dict[str, float]:
    began = time.perf_counter()
    steps = steps_of(source_of("jpeg", folder), "jpeg", workers=2)
    next(steps)
    seconds = time.perf_counter() - began
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {"seconds": seconds, "cpu": usage.ru_utime, "samples": BATCH["jpeg"]}


# ---- all of them ----


def run(reader: str, kind: str, folder: Path) -> dict[str, float]:
    """In a process of its own, forked from this one, which has imported everything."""
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, context, initializer=as_worker) as pool:
        task = (time_start, folder) if kind == "start" else (read, reader, kind, folder)
        return pool.submit(*task).result()


def as_worker() -> None:
    keep_memory()
    gc.freeze()


def summarise(rows: list[dict[str, float]]) -> dict[str, Any]:
    rates = [row["samples"] / row["seconds"] for row in rows]
    micros = [1e6 * row["cpu"] / row["samples"] for row in rows]
    return {
        "seconds": statistics.median(row["seconds"] for row in rows),
        "rate": statistics.median(rates),
        "rate_range": [min(rates), max(rates)],
        "cpu_us": statistics.median(micros),
        "cpu_us_range": [min(micros), max(micros)],
        "n": len(rows),
    }


def judge(found: dict[str, dict[str, Any]]) -> list[tuple[str, float, float, bool]]:
    """(what, measured, aim, whether the aim is reached)."""
    cpu = {name: value["cpu_us"] for name, value in found.items()}
    rate = {name: value["rate"] for name, value in found.items()}
    ours, start = "bytes, d2v_ds", found["start, d2v_ds"]["seconds"]
    rows = [
        ("samples a CPU-second, times webdataset's", cpu["bytes, webdataset"] / cpu[ours], 5.0, True),
        (
            "samples a second, of raw reading of the same samples",
            rate[ours] / rate["bytes, pread"],
            0.5,
            True,
        ),
        ("JPEG: CPU time, of the decoder's own", cpu["jpeg, d2v_ds"] / cpu["jpeg, decoder"], 1.1, False),
        ("FLAC: CPU time, of the decoder's own", cpu["flac, d2v_ds"] / cpu["flac, decoder"], 1.1, False),
        ("start to first batch, s", start, 0.3, False),
    ]
    return [(what, got, aim, got >= aim if is_least else got <= aim) for what, got, aim, is_least in rows]


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = ["| what | samples/s | range | CPU us a sample | range | n |", "|---|---|---|---|---|---|"]
    for name, row in found.items():
        rates, micros = row["rate_range"], row["cpu_us_range"]
        lines.append(
            f"| {name} | {row['rate']:,.0f} | {rates[0]:,.0f}-{rates[1]:,.0f} | {row['cpu_us']:,.1f} | "
            f"{micros[0]:,.1f}-{micros[1]:,.1f} | {row['n']} |"
        )
    lines += ["", "| aim | measured | wanted | reached |", "|---|---|---|---|"]
    lines += [f"| {w} | {got:.2f} | {aim:g} | {'yes' if ok else 'NO'} |" for w, got, aim, ok in judge(found)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder for loader.md and .json"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_shards(folder)
        for kind in SAMPLES:
            source_of(kind, folder)  # the index, and lengths
        rows: dict[str, list[dict[str, float]]] = {}
        for _ in range(arguments.rounds):
            for kind, readers in READERS.items():
                for reader in readers:
                    rows.setdefault(f"{kind}, {reader}", []).append(run(reader, kind, folder))
    found = {name: summarise(measured) for name, measured in rows.items()}
    print(table(found))
    arguments.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "rows": found,
    }
    (arguments.out / "loader.json").write_text(json.dumps(facts, indent=1) + "\n")
    about = __doc__.split("\n\n")[2]
    machine = f"{os.cpu_count()} cores, {platform.platform()}"
    head = f"# The loader\n\n`python scripts/bench_loader.py`, {machine}.\n\n{about}\n\n"
    (arguments.out / "loader.md").write_text(head + table(found) + "\n")


if __name__ == "__main__":
    main()
