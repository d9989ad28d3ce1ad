"""ImageNet-1k, from what its owners give after registration; nothing is downloaded here.

    d2v prepare imagenet FOLDER --out shards/imagenet

FOLDER holds one of these, all of it copied as it is:
- ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, as image-net.org gives them, checked by their published md5; with
  ILSVRC2012_devkit_t12.tar.gz beside them, validation images have labels and classes have names. They are read in
  place: nothing is unpacked.
- train/<class>/*.JPEG and val/<class>/*.JPEG; or train/ alone.
- Parquet files of Hugging Face: train-*.parquet, validation-*.parquet, here or in data/.

A sample is `jpg` and `cls`, the place of its class among all, sorted by WordNet's id, as everyone counts them.
Licence: image-net.org's terms, for research and education.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.archives import Member, list_tar, unpack
from shards.download import check, read_checksums
from shards.folder import give, look_at, walk
from shards.listing import Found, Part, Skipped, Stored, make_key, stamp_file
from shards.parquet import class_names, read_rows, split_of
from shards.prepare import Job, Source

TRAIN, VAL, DEVKIT = (
    "ILSVRC2012_img_train.tar",
    "ILSVRC2012_img_val.tar",
    "ILSVRC2012_devkit_t12.tar.gz",
)
MD5 = {
    TRAIN: "1d675b47d978889d74fa0da5fadfb00e",
    VAL: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT: "fa75699e90414af021442c21a62c3abf",
}
VAL_NUMBER = re.compile(r"_(\d+)$", re.ASCII)
IS_UNIQUE = re.compile(r"n\d{8}_|ILSVRC")
"""Names of ImageNet's own files; of others, as 0.jpg, each class may have one."""
MAGIC = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, metavar="FOLDER", help="tars, folders of classes, or parquet files"
    )
    parser.add_argument(
        "--checksums",
        type=Path,
        default=None,
        metavar="FILE",
        help="a file of md5sum or sha256sum to check the tars against, in place of the published ones",
    )


def make_job(arguments: argparse.Namespace) -> Job:
    source = Path(os.path.abspath(arguments.source.expanduser()))
    if not source.is_dir():
        raise ValueError(f"{source} is no folder; give the one that holds {TRAIN}, train/ or parquet files")
    settings = {"made by": "d2v prepare imagenet", "source": str(source)}
    find = functools.partial(find_parts, source=source, sums=arguments.checksums)
    return Job(name="imagenet", out=arguments.out.expanduser(), settings=settings, find=find)


def find_parts(job: Job, source: Path, sums: Path | None) -> Source:
    """By what the folder holds."""
    tables = sorted([*source.glob("*.parquet"), *source.glob("data/*.parquet")])
    if (source / TRAIN).is_file() or (source / VAL).is_file():
        return find_tars(job, source, sums)
    if tables:
        return find_tables(tables)
    if (source / "train").is_dir():
        return find_folders(source)
    raise ValueError(
        f"{source} holds neither {TRAIN}, nor train/<class>/, nor parquet files; ImageNet is given after registration "
        "by image-net.org, and by huggingface.co/datasets/ILSVRC/imagenet-1k"
    )


# ---- the tars of image-net.org ----


def find_tars(job: Job, source: Path, sums: Path | None) -> Source:
    """A part for each class, whose images are a tar inside the tar; and the validation images."""
    published = read_checksums(sums) if sums else {name: f"md5:{value}" for name, value in MD5.items()}
    there = [source / name for name in MD5 if (source / name).is_file()]
    origin, notes, parts = [], [], []
    for path in there:
        check(path, published.get(path.name), job.work / "verified", job.say)
        row = {"file": path.name, "size": path.stat().st_size, "checksum": published.get(path.name)}
        origin.append(row)
    synsets, truth = read_devkit(source / DEVKIT, job.scratch) if (source / DEVKIT) in there else ({}, [])
    if (source / TRAIN) in there:
        inner = sorted(list_tar(source / TRAIN), key=lambda member: member.name)
        wnids = [member.name.rpartition("/")[2].removesuffix(".tar") for member in inner]
        for number, member in enumerate(inner):
            listed = functools.partial(list_class, member=member, cls=str(number))
            parts.append(Part(member.name, listed, f"{stamp_file(source / TRAIN)} {member.name}"))
    else:
        wnids = sorted(wnid for wnid, _ in synsets.values())
    words = dict(synsets.values())
    names = [words.get(wnid, wnid) for wnid in wnids] if words else None
    if (source / VAL) in there:
        labels = number_truth(truth, synsets, wnids)
        if not labels:
            notes.append(f"validation images have no labels: {DEVKIT}, which holds them, is not in {source}")
        listed = functools.partial(list_val, archive=source / VAL, labels=labels)
        parts.append(Part(VAL, listed, f"{stamp_file(source / VAL)} {labels}"))
    return Source(parts=parts, classes=wnids or None, class_names=names, origin=origin, notes=notes)


def number_truth(truth: list[int], synsets: dict[int, tuple[str, str]], wnids: list[str]) -> list[str]:
    """The label of each validation image. ValueError where train lacks its class."""
    numbers = {wnid: str(place) for place, wnid in enumerate(wnids)}
    wanted = [synsets[place][0] if place in synsets else f"number {place}" for place in truth]
    unknown = sorted({wnid for wnid in wanted if wnid not in numbers})
    if unknown:
        raise ValueError(
            f"{DEVKIT} labels validation images with {len(unknown)} classes that {TRAIN} lacks: "
            f"{', '.join(unknown[:5])}; get both again, or leave {VAL} out of the folder"
        )
    return [numbers[wnid] for wnid in wanted]


def list_class(scratch: Path, member: Member, cls: str) -> Iterator[Found | Skipped]:
    for image in list_tar(Path(member.name), member.where):
        yield make_found(image, "train", cls)


def list_val(scratch: Path, archive: Path, labels: list[str]) -> Iterator[Found | Skipped]:
    """The label of ILSVRC2012_val_00000001.JPEG is the first."""
    for image in list_tar(archive):
        number = VAL_NUMBER.search(stem_of(image.name))
        if number is None:
            yield Skipped(image.name, "has no number in its name, as images of ImageNet have")
            continue
        if labels and not 0 < int(number[1]) <= len(labels):
            raise ValueError(
                f"{archive} holds {image.name}, but the devkit has {len(labels)} labels, from number 1; get both again"
            )
        yield make_found(image, "val", labels[int(number[1]) - 1] if labels else None)


def make_found(image: Member, split: str, cls: str | None) -> Found | Skipped:
    if not image.where.size:
        return Skipped(image.name, "is empty")
    ending = os.path.splitext(image.name)[1].lower()
    if ending not in (".jpeg", ".jpg"):
        return Skipped(image.name, f"{ending} is no image of ImageNet's tars")
    members: dict[str, Stored | str] = {"jpg": image.where}
    if cls is not None:
        members["cls"] = cls
    return Found(make_key(stem_of(image.name)), split, members)


def stem_of(name: str) -> str:
    return os.path.splitext(name.rpartition("/")[2])[0]


def read_devkit(archive: Path, scratch: Path) -> tuple[dict[int, tuple[str, str]], list[int]]:
    """(ILSVRC's number -> (WordNet's id, words) of the classes; the number of each validation image)"""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    members = {member.name.rpartition("/")[2]: member.where for member in list_tar(unpack(archive, scratch))}
    meta, truth = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
    if not {meta, truth} <= members.keys():
        raise ValueError(f"{archive} lacks {meta} or {truth}; get it again")
    try:
        synsets = loadmat(io.BytesIO(read_member(members[meta])), squeeze_me=True)["synsets"]
        classes = {
            int(row["ILSVRC2012_ID"]): (str(row["WNID"]), str(row["words"]))
            for row in synsets
            if int(row["num_children"]) == 0  # others are groups of classes
        }
        numbers = [int(line) for line in read_member(members[truth]).split()]
    except (MatReadError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{archive}: {meta} or {truth} is damaged: {error}; get it again") from error
    if not numbers:
        raise ValueError(f"{archive}: {truth} is empty; get it again")
    return classes, numbers


def read_member(where: Stored) -> bytes:
    with open(where.file, "rb") as file:
        file.seek(where.offset)
        return file.read(where.size)


# ---- folders of classes ----


def find_folders(source: Path) -> Source:
    """A part for each class of train/ and of val/."""
    wnids = sorted(
        path.name for path in (source / "train").iterdir() if path.is_dir() and not is_hidden(path)
    )
    empty = [wnid for wnid in wnids if not holds_something(source / "train" / wnid)]
    parts, notes = [], []
    loose: list[Skipped] = []
    for folder in ("train", "val"):
        files, known = [], set()
        for path in sorted((source / folder).glob("*")):
            if is_hidden(path):
                loose.append(Skipped(str(path), "is hidden"))
                continue
            known.add(path.name) if path.is_dir() else files.append(path)
        if known:  # else all are, and a note says so
            loose += [Skipped(str(path), "lies in no folder of a class") for path in files]
        if folder == "val" and not known and (source / folder).is_dir():
            notes.append(f"{source / folder} is left out: its images are not in folders of classes")
        unknown = sorted(known - set(wnids))
        if unknown:
            raise ValueError(f"{source / folder} has classes that train/ lacks: {', '.join(unknown[:5])}")
        for number, wnid in enumerate(wnids):
            place = source / folder / wnid
            if place.is_dir():
                listed = functools.partial(list_folder, folder=place, split=folder, cls=str(number))
                parts.append(Part(f"{folder}/{wnid}", listed, f"{place} {place.stat().st_mtime_ns} {number}"))
    if empty:
        notes.append(f"{len(empty)} classes have no file in {source / 'train'}: {', '.join(empty[:5])}")
    parts.append(Part("loose", functools.partial(give, others=loose), str(loose)))
    return Source(parts=parts, classes=wnids, notes=notes)


def is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def holds_something(folder: Path) -> bool:
    """Without listing all of it; nothing may be read of a folder without permission."""
    try:
        with os.scandir(folder) as entries:
            return any(True for _ in entries)
    except OSError:
        return False


def list_folder(scratch: Path, folder: Path, split: str, cls: str) -> Iterator[Found | Skipped]:
    """The images of one class."""
    bad: list[Skipped] = []
    for path in walk(folder, bad):
        ending = os.path.splitext(path)[1].lower()
        ending = {".jpeg": "jpg"}.get(ending, ending[1:])
        try:
            if ending not in MAGIC.values():
                raise ValueError(f".{ending} is no image of ImageNet")
            where = look_at(path)
        except ValueError as error:
            bad.append(Skipped(path, str(error)))
            continue
        name = stem_of(path)
        if not IS_UNIQUE.match(name):
            name = os.path.splitext(os.path.relpath(path, folder.parent))[0]
        yield Found(make_key(name), split, {ending: where, "cls": cls})
    yield from bad


# ---- parquet ----


def find_tables(tables: list[Path]) -> Source:
    """A part for each file."""
    named = {path: names for path in tables if (names := class_names(path, "label"))}
    for path, names in named.items():
        first, classes = next(iter(named.items()))
        if names != classes:
            raise ValueError(f"{first} and {path} name their classes differently; give files of one data set")
    classes = next(iter(named.values()), None)
    parts = [
        Part(
            path.name,
            functools.partial(list_table, path=path, classes=classes),
            f"{path} {stamp_file(path)}",
        )
        for path in tables
    ]
    origin = [{"file": path.name, "size": path.stat().st_size, "checksum": None} for path in tables]
    return Source(parts=parts, classes=classes, origin=origin)


def list_table(scratch: Path, path: Path, classes: list[str] | None) -> Iterator[Found | Skipped]:
    """The rows of a file: `image` is {bytes, path}, `label` a number, negative where it is not told."""

    def split_image(row: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        image, label = row["image"] or {}, row["label"]
        if not isinstance(image, dict):
            raise ValueError(
                f"{path}: its column image holds {type(image).__name__}, not bytes and path as Hugging Face writes it"
            )
        if not isinstance(label, int | None) or isinstance(label, bool):
            raise ValueError(f"{path}: its column label holds {str(label)[:40]!r}, which is no whole number")
        if classes and label is not None and label >= len(classes):
            raise ValueError(f"{path}: its column label holds {label}, but it names {len(classes)} classes")
        content = image.get("bytes") or b""
        ending = next((ending for magic, ending in MAGIC.items() if content.startswith(magic)), None)
        return content, {"ending": ending, "path": image.get("path"), "label": label}

    for row in read_rows(path, scratch, ["image", "label"], split_image):
        if row.values["ending"] is None:
            yield Skipped(f"{path}, row {row.number}", "is empty, or neither JPEG, PNG nor WebP")
            continue
        members: dict[str, Stored | str] = {row.values["ending"]: row.where}
        if row.values["label"] is not None and row.values["label"] >= 0:
            members["cls"] = str(row.values["label"])
        name = stem_of(row.values["path"] or "")
        if not IS_UNIQUE.match(name):
            name = f"{path.stem}-{row.number:06d}"
        yield Found(make_key(name), split_of(path), members)
