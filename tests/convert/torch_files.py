"""Files of torch.save for the tests: small ones, old ones, and ones that torch.save would not write."""

from __future__ import annotations

import io
import sys
import types
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

FORMATS = ("zip", "legacy")


def save(path: Path, value: Any, format: str = "zip", protocol: int = 2) -> Path:  # noqa: A002
    torch.save(value, path, _use_new_zipfile_serialization=format == "zip", pickle_protocol=protocol)
    return path


def write_zip(path: Path, pickle: bytes, **records: bytes) -> Path:
    """An archive as torch.save lays it out, with any pickle; `records` are storages by their keys (d0=..., d1=...)."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/version", "3\n")
        for key, content in records.items():
            archive.writestr(f"archive/data/{key.removeprefix('d')}", content)
    return path


def write_legacy(path: Path, pickle: bytes) -> Path:
    """The old format with any pickle and no storages."""
    whole = io.BytesIO()
    torch.save({}, whole, _use_new_zipfile_serialization=False)
    empty_dict, head = b"\x80\x02}q\x00.", whole.getvalue()
    assert head.count(empty_dict) == 1
    path.write_bytes(head.replace(empty_dict, pickle))
    return path


def calling(module: str, name: str, *texts: str) -> bytes:
    """A pickle that calls a name with texts."""
    arguments = b"".join(b"X" + len(t).to_bytes(4, "little") + t.encode() for t in texts)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + arguments + b"tR."


@contextmanager
def modules(**classes: list[type]) -> Iterator[None]:
    """Puts classes into modules of these names (`__` for `.`) as long as something is saved, and takes them away."""
    made = {}
    for dotted, members in classes.items():
        name = dotted.replace("__", ".")
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            made.setdefault(".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
        for member in members:
            member.__module__, member.__qualname__ = name, member.__name__
            setattr(made[name], member.__name__, member)
    before = {name: sys.modules[name] for name in made if name in sys.modules}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]
        sys.modules.update(before)


def equal(ours: Any, theirs: Any) -> bool:
    """Nested dicts, lists and tensors, to the bit."""
    if isinstance(theirs, torch.Tensor):
        return (
            isinstance(ours, torch.Tensor)
            and ours.dtype == theirs.dtype
            and ours.shape == theirs.shape
            and torch.equal(ours.reshape(-1).view(torch.uint8), theirs.detach().reshape(-1).view(torch.uint8))
        )
    if isinstance(theirs, dict):
        return (
            isinstance(ours, dict)
            and list(ours) == list(theirs)
            and all(equal(ours[key], theirs[key]) for key in theirs)
        )
    if isinstance(theirs, (list, tuple)):
        return type(ours) is type(theirs) and len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return type(ours) is type(theirs) and ours == theirs
