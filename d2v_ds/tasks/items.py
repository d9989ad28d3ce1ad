"""What lies in some data, in a fixed order: samples of tar shards, or files of a folder, as bytes with their names."""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from d2v_ds.data import Corpus, expand_shards
from d2v_ds.modalities import inputs
from d2v_ds.modalities.labelled import text_of

Content = bytes | tuple[bytes, bytes]
"""Of a file or member, or of the two that a pair of texts is."""


PAIR = "json.text_b"
"""Where `d2v prepare` writes the second text."""


class Name(NamedTuple):
    """What an item is called."""

    key: str
    """A sample's key, or a file's path inside the folder."""
    shard: str | None = None

    @property
    def full(self) -> str:
        return self.key if self.shard is None else f"{self.shard}:{self.key}"


class Items(Protocol):
    """Items by number; the order depends on the data alone."""

    fingerprint: str
    """Equal for equal data."""
    words: str
    """What was found, for people."""
    has_labels: bool

    def __len__(self) -> int: ...

    def name(self, i: int) -> Name: ...

    def read(self, i: int) -> tuple[Content, str]:
        """The bytes and the label, empty where there is none; ValueError if they cannot be read."""


def open_items(data: str | Path, modality: str, samples: Any, label: str) -> Items:
    """The items of one modality: a folder with tars or a pattern of tars is shards; any other folder, with the folders
    in it, one file, or a pattern of such is files.

    Raises ValueError if nothing of the modality is there.
    """
    path, text = Path(data).expanduser(), str(data)
    if path.is_dir() and not any(path.glob("*.tar")):
        return FileItems(path, find_files(path, modality))
    if path.is_file() and path.suffix != ".tar":
        if not is_of(path.name, modality):
            raise ValueError(f"{path} is no {modality} file: {known(modality)} are")
        return FileItems(path.parent, [path.name])
    if not path.exists() and not set(text) & set("*?{:[") and path.suffix != ".tar":
        raise ValueError(
            f"{path} does not exist; give a folder of files, or shards: a folder, a{{000..123}}.tar, *.tar"
        )
    matches = sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else []
    if any(is_of(name, modality) for name in matches):
        return FileItems(Path(), [name for name in matches if is_of(name, modality)])
    return ShardItems(text, samples, label)


def paired(samples: Any, shards: str | Path) -> Any:
    """Samples of text as these shards have them: with the second text if there is one; others as they are."""
    if not hasattr(samples, "with_pair") or samples.config.data.pair is not None:
        return samples
    has_pair = ShardItems(str(shards), samples, PAIR).read(0)[1]
    return samples.with_pair(PAIR) if has_pair else samples


class ShardItems:
    """Samples of shards in stored order. A sample may have a label."""

    def __init__(self, shards: str, samples: Any, label: str):
        paths = expand_shards(shards)
        self.parts = list(samples.fields)
        self.corpus = Corpus.open(paths, {**samples.fields, "label": f"{label};"}, progress=None)
        self.has_labels = bool(label)
        self.fingerprint = self.corpus.fingerprint
        self.words = f"{len(self.corpus)} samples in {len(paths)} shards"
        if self.corpus.skipped:
            self.words += (
                f" ({self.corpus.skipped} more have no {samples.fields[self.parts[0]]}, or are excluded)"
            )

    def __len__(self) -> int:
        return len(self.corpus)

    def name(self, i: int) -> Name:
        shard, _, key = self.corpus.key(i).partition(":")
        return Name(key, shard)

    def read(self, i: int) -> tuple[Content, str]:
        fields = self.corpus.read(i)
        content = tuple(fields[part] for part in self.parts)
        try:
            label = text_of(fields["label"])
        except ValueError as error:
            raise self.corpus.corrupt(i, str(error)) from error
        return content[0] if len(content) == 1 else content, label


class FileItems:
    """Files of a folder, by their paths in it."""

    has_labels = False

    def __init__(self, folder: Path, names: list[str]):
        self.folder, self.names = folder, names
        digest = hashlib.sha256()
        for name in names:
            digest.update(os.fsencode(f"{name}\0{(folder / name).stat().st_size}\n"))
        self.fingerprint = digest.hexdigest()
        self.words = f"{len(names)} files" + (f" in {folder}" if folder != Path() else "")

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> Name:
        return Name(self.names[i])

    def read(self, i: int) -> tuple[bytes, str]:
        try:
            return (self.folder / self.names[i]).read_bytes(), ""
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from error


def find_files(folder: Path, modality: str) -> list[str]:
    """Paths inside the folder of all files of the modality, sorted; hidden ones are left out."""
    found, others = [], Counter[str]()
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            if is_of(name, modality):
                found.append((Path(where) / name).relative_to(folder).as_posix())
            else:
                others[Path(name).suffix.lower() or name] += 1
    if not found:
        seen = ", ".join(f"{suffix} ({count})" for suffix, count in others.most_common(8)) or "nothing"
        raise ValueError(f"{folder} holds no {modality} file ({known(modality)}) and no *.tar, but {seen}")
    return sorted(found)


def is_of(name: str, modality: str) -> bool:
    return Path(name).suffix.lower().removeprefix(".") in inputs(modality).EXTENSIONS


def known(modality: str) -> str:
    return ", ".join(f".{extension}" for extension in inputs(modality).EXTENSIONS)
