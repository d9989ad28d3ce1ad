"""Small folders of shards as other tools write them, with real images, sounds and texts."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

WORDS = [
    "a",
    "red",
    "dog",
    "runs",
    "over",
    "the",
    "green",
    "hill",
    "and",
    "looks",
    "at",
    "two",
    "birds",
    "far",
    "away",
]


def picture(seed: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40 + seed % 7, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def sound(seed: int, kind: str = "FLAC") -> bytes:
    wave = np.random.default_rng(seed).normal(0, 0.1, 8000 + 160 * (seed % 9)).astype(np.float32)
    soundfile.write(buffer := io.BytesIO(), wave, 16_000, format=kind)
    return buffer.getvalue()


def words(seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, 5 + seed % 9))


def write_tar(path: Path, members: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def timm(root: Path, shards: int = 2, samples: int = 8) -> Path:
    """`imagenet1k-train-0000.tar`, jpg, cls and json, and the counts in `_info.json`."""
    names = [f"imagenet1k-train-{shard:04d}.tar" for shard in range(shards)]
    for shard, name in enumerate(names):
        members = {}
        for i in range(samples):
            key, seed = f"n0{shard}_{i}", 100 * shard + i
            members |= {
                f"{key}.cls": f"{i % 3}",
                f"{key}.jpg": picture(seed),
                f"{key}.json": json.dumps({"label": i % 3, "width": 48}),
            }
        write_tar(root / name, members)
    split = {
        "name": "train",
        "num_samples": shards * samples,
        "filenames": names,
        "shard_lengths": [samples] * shards,
    }
    (root / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    return root


def img2dataset(root: Path, shards: int = 2, rows: int = 10) -> Path:
    """`00000.tar`, keys of nine digits; every fifth download failed: a row of the table, no member of the tar."""
    import pyarrow
    from pyarrow import parquet

    for shard in range(shards):
        members, table = {}, []
        for i in range(rows):
            key, seed = f"{shard:05d}{i:04d}", 100 * shard + i
            row = {
                "url": f"u/{key}",
                "caption": words(seed),
                "key": key,
                "status": "failed_to_download" if i % 5 == 4 else "success",
            }
            table.append(row)
            if row["status"] == "success":
                members |= {
                    f"{key}.jpg": picture(seed),
                    f"{key}.json": json.dumps(row | {"width": 48}),
                    f"{key}.txt": row["caption"],
                }
        write_tar(root / f"{shard:05d}.tar", members)
        parquet.write_table(pyarrow.Table.from_pylist(table), root / f"{shard:05d}.parquet")
        stats = {
            "count": rows,
            "successes": len(members) // 3,
            "failed_to_download": rows - len(members) // 3,
            "failed_to_resize": 0,
        }
        (root / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
    return root


def clap(root: Path, samples: int = 8) -> Path:
    """`0.tar`, flac and json, whose `text` is one or a list of them; `sizes.json` beside."""
    members = {}
    for i in range(samples):
        text = words(i) if i % 2 else [words(i), words(i + 50)]
        members |= {f"{i}.flac": sound(i), f"{i}.json": json.dumps({"text": text, "tag": ["dog", "hill"]})}
    write_tar(root / "0.tar", members)
    (root / "sizes.json").write_text(json.dumps({"0.tar": samples}))
    return root


def wenet(root: Path, shards: int = 2, samples: int = 8) -> Path:
    """`shards_000000000.tar`, wav and txt side by side, and `data.list` of paths."""
    for shard in range(shards):
        members = {}
        for i in range(samples):
            seed = 100 * shard + i
            members |= {f"BAC009S{seed:04d}.txt": words(seed), f"BAC009S{seed:04d}.wav": sound(seed, "WAV")}
        write_tar(root / f"shards_{shard:09d}.tar", members)
    (root / "data.list").write_text("".join(f"{path}\n" for path in sorted(root.glob("*.tar"))))
    return root


def energon(root: Path, shards: int = 3, samples: int = 6) -> Path:
    """`shards/shard_000.tar` with their `.tar.idx`, and `.nv-meta`, in which the last shard is for validation."""
    names = [f"shards/shard_{shard:03d}.tar" for shard in range(shards)]
    for shard, name in enumerate(names):
        members = {}
        for i in range(samples):
            seed = 100 * shard + i
            members |= {f"{seed:06d}.jpg": picture(seed), f"{seed:06d}.txt": words(seed)}
        path = write_tar(root / name, members)
        with tarfile.open(path) as tar:
            offsets = [member.offset for member in tar if member.name.endswith(".jpg")] + [tar.offset]
        path.with_suffix(".tar.idx").write_bytes(np.array(offsets, dtype="<u8").tobytes())
    meta = root / ".nv-meta"
    meta.mkdir()
    train = f"shards/shard_{{000..{shards - 2:03d}}}.tar"
    (meta / "split.yaml").write_text(
        f"exclude: []\nsplit_parts:\n  train:\n  - {train}\n  val:\n  - {names[-1]}\n"
    )
    (meta / ".info.yaml").write_text("shard_counts:\n" + "".join(f"  {name}: {samples}\n" for name in names))
    (meta / "dataset.yaml").write_text(
        "sample_type:\n  __module__: megatron.energon\n  __class__: CaptioningSample\n"
    )
    return root
