"""A corpus of 100 million sounds, as far as an index knows them: scale.py FOLDER RESULTS.json.

Its tars and most sidecars are sparse, and shards share their columns of lengths, so it takes seconds and 4 MB of
disk. What is measured is one rank's process with all that a run would hold of the data, torch left out.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import zlib
from pathlib import Path

import numpy as np
from columns import librispeech

from d2v_ds.data import Buckets, Corpus, Plan, Share, Stream, TextBlocks, Windows, deal
from d2v_ds.data.shard import VERSION, npy_bytes

SHARDS, ROWS, COLUMNS = 1000, 100_000, 10
SIZE, SHA = 1 << 30, "5eed" * 16


def write_index(folder: Path) -> list[Path]:
    """What `d2v index` and a first measure leave of each shard."""
    stamp = np.array([int(SHA[:8], 16)], dtype=np.uint32)
    columns = [npy_bytes(np.append(librispeech(ROWS, seed), stamp)) for seed in range(COLUMNS)]
    tokens = [
        npy_bytes(np.append(np.random.default_rng(seed).integers(20, 2000, ROWS, dtype=np.uint32), stamp))
        for seed in range(COLUMNS)
    ]
    record = {
        "version": VERSION,
        "size": SIZE,
        "last_offset": SIZE - 4096,
        "last_header": zlib.crc32(bytes(512)),
        "samples": ROWS,
        "extensions": {"flac": ROWS},
        "members_sha256": SHA,
        "sidecars": {"members.npy": 26 * ROWS + 128, "idx": 8 * (ROWS + 1)},
    }
    paths = [folder / f"train-{shard:06d}.tar" for shard in range(SHARDS)]
    for shard, path in enumerate(paths):
        sizes = {"": SIZE} | {f".{name}": size for name, size in record["sidecars"].items()}
        for name, size in sizes.items():
            with open(f"{path}{name}", "wb") as file:
                file.truncate(size)
        Path(f"{path}.json").write_text(json.dumps(record), encoding="utf-8")
        for name, contents in (("audio_samples", columns), ("tokens", tokens)):
            file = Path(f"{path}.{name}.npy")
            if shard < COLUMNS:
                file.write_bytes(contents[shard])
            else:
                os.link(f"{paths[shard % COLUMNS]}.{name}.npy", file)
    return paths


def memory(key: str) -> int:
    """MB of this process: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(key)) // 1024


def measured(_: dict[str, bytes]) -> int:
    raise AssertionError("the columns are there")


def deals_out(plan: Plan, step: int, world: int) -> bool:
    """Whether all ranks run the same modalities in the same order, and together each micro-batch once."""
    ranks = [plan.items(step, rank, world) for rank in range(world)]
    orders = {tuple(name for name, _ in items) for items in ranks}
    dealt = [item for items in ranks for item in items]
    return len(orders) == 1 and len(set(dealt)) == len(dealt) and set(dealt) == set(plan.items(step, 0, 1))


def many_shards() -> Share:
    """100 million samples in 20,000 shards, read in windows of 45 GB."""
    starts = np.arange(0, 100_000_001, 5_000)
    sizes = np.full(20_000, 256 << 20)
    return Share(
        "windows", 0, 100_000_000, windows=Windows("windows", 45 << 30, range(20_000), sizes, starts)
    )


def in_windows(sounds: Corpus, buckets: Buckets) -> Share:
    sizes = np.array([index.size for index in sounds.indexes])
    windows = Windows("both", 45 << 30, range(SHARDS), sizes, sounds.shard_starts, buckets)
    return Share("both", 0, len(sounds), 1, buckets, windows)


def main(folder: Path, results: Path) -> None:
    paths = write_index(folder)
    open_with = functools.partial(Corpus.open, paths, {"audio": "flac"}, measured, progress=None)
    started = time.process_time()
    sounds, texts = open_with("audio_samples", 32_000), open_with("tokens", 1)
    buckets = Buckets(sounds.lengths, range(SHARDS), 1_000_000, 31, 320_000)
    parts = [
        Buckets(sounds.lengths, shards, 1_000_000, 31, 320_000) for shards in (range(100), range(100, SHARDS))
    ]
    blocks = TextBlocks.build(texts.lengths, 511)
    opened = time.process_time() - started
    ends = sounds.shard_starts[[0, 100, SHARDS]].tolist()
    counts = deal({"a": 1, "b": 2}, 100 * 4096)
    mix = tuple(
        Share(f"mixed/{name}", ends[i], ends[i + 1] - ends[i], counts[name], parts[i])
        for i, name in enumerate("ab")
    )
    streams = [
        Stream("audio", len(sounds), 31, 4096, (Share("audio", 0, len(sounds), 1, buckets),)),
        Stream("mixed", len(sounds), 31, 4096, mix),
        Stream("image", len(sounds), 16, 4096),
        Stream("text", len(blocks), 16, 4096),
        Stream("windows", 100_000_000, 16, 4096, (many_shards(),)),
        Stream("both", len(sounds), 31, 4096, (in_windows(sounds, buckets),)),
    ]
    plan, rng = Plan(3, streams), np.random.default_rng(0)
    times, steps = [], [0, 10**12, *rng.integers(0, 10**7, 40).tolist()]
    for step in steps:  # what one rank of 4,096 plans for a step
        started = time.process_time()
        for name, index in plan.items(step, int(rng.integers(4096)), 4096):
            draws = plan.draws(step, name, index)
            if name == "text":
                for draw in draws:
                    blocks.locate(draw.unit)
        times.append(time.process_time() - started)
    report = {
        "samples": len(sounds),
        "blocks": len(blocks),
        "open_seconds": opened,
        "milliseconds": sorted(1000 * t for t in times),
        "memory": memory("VmRSS"),
        "peak": memory("VmHWM"),
        "torch": "torch" in sys.modules,
        "worlds": {2**i: deals_out(plan, 10**6 + i, 2**i) for i in range(13)},
    }
    results.write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
