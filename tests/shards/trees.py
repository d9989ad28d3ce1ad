"""What the tests of preparers share: small trees of files, runs of the command, and what stands in shards."""

import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from ranks import ROOT

from shards.command import main


def write_tree(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def noise(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def write_images(root: Path, count: int = 60) -> Path:
    """`count` files of 100 to 6,000 bytes in three folders, with names of all sorts."""
    names = ["plain-{}.jpg", "with space {}.png", "dots.v2.{}.jpg", "f\u00fcnf \u6f22{}.webp", "CAPS{}.JPEG"]
    return write_tree(
        root,
        {
            f"{'abc'[i % 3]}/{names[i % 5].format(i)}": noise(i, 100 + 5900 * ((i * 7) % count) // count)
            for i in range(count)
        },
    )


def prepare(*arguments: object) -> tuple[int, str]:
    """(exit status, what was said) of `d2v prepare ...` in this process."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main([str(argument) for argument in arguments])
    return status, said.getvalue()


def start_prepare(*arguments: object, env: dict[str, str] | None = None) -> subprocess.Popen:
    """`d2v prepare ...` as a process of its own."""
    command = [sys.executable, "-m", "shards.command", *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def read_shards(out: Path, pattern: str = "*.tar") -> dict[str, dict[str, bytes]]:
    """key -> its members, of all shards; a key that comes twice fails."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob(pattern)):
        own: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.rpartition("/")[2].partition(".")
                folder = member.name.rpartition("/")[0]
                name = f"{folder}/{key}" if folder else key
                own.setdefault(name, {})[extension] = tar.extractfile(member).read()
        assert not own.keys() & samples.keys()
        samples |= own
    return samples


def all_bytes(out: Path) -> dict[str, bytes]:
    """Every file that a run leaves, by its name; without what it downloaded."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and "downloads" not in path.parts
    }


def skipped(out: Path) -> dict[str, str]:
    """file -> reason of everything that was left out."""
    lines = map(json.loads, (out / "skipped.jsonl").read_text().splitlines())
    return {line["file"]: line["reason"] for line in lines}
