"""What the tests put into tars."""

import io
import tarfile
from pathlib import Path

import numpy as np


def payload(shard: int, sample: int) -> bytes:
    """The content of one sample: 0 to 1,500 bytes, so that some fill blocks exactly and some are empty."""
    size = (shard * 131 + sample * 257) % 1537
    return np.random.default_rng([shard, sample]).bytes(size)


def write_tar(path: Path, members: list[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
