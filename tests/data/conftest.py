"""Shards as webdataset writes them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from tars import payload


@pytest.fixture
def write_shards(tmp_path: Path) -> Callable[..., list[Path]]:
    def write(shards: int = 3, samples: int = 7, folder: str = "shards") -> list[Path]:
        (tmp_path / folder).mkdir(exist_ok=True)
        paths = [tmp_path / folder / f"train-{shard:06d}.tar" for shard in range(shards)]
        for shard, path in enumerate(paths):
            with webdataset.TarWriter(str(path), mtime=0) as writer:
                for sample in range(samples):
                    key = f"part/{shard}-{sample:05d}"
                    writer.write({"__key__": key, "bin": payload(shard, sample), "cls": b"%d" % sample})
        return paths

    return write
