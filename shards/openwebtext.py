"""OpenWebText: 8 million documents of the web, downloaded, checked and made into shards of plain text.

    d2v prepare openwebtext --out shards/openwebtext             12.9 GB of Zenodo, 46 GB of shards
    d2v prepare openwebtext FILE_OR_FOLDER --out DIR             openwebtext.tar.xz, *_data.xz, or parquet files

Zenodo's archive is a tar of 20,610 tars, xz inside xz. Hugging Face's copy is parquet with a column `text`. A sample
is one document, `txt`, as it is published, and knows no tokenizer. One in 2,000 is for validation, drawn from its key.
Licence: CC0 for the collection; the documents are their authors'.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.archives import Member, list_tar, unpack
from shards.download import Remote, check, fetch_all, read_checksums
from shards.librispeech import add_download_arguments, check_downloads
from shards.listing import Found, Part, Skipped, Stored, draw_split, make_key, stamp_file
from shards.parquet import read_rows
from shards.prepare import Job, Source

ARCHIVE = "openwebtext.tar.xz"
URL = "https://zenodo.org/records/3834942/files"
SHA256 = "9fe39d154c5bc67da8c359415372b79510eb1e2edb0d035fe4f7fc3a732b9336"
VAL_SHARE = 0.0005


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, nargs="?", metavar="SOURCE", help=f"{ARCHIVE}, or a folder (default: download)"
    )
    parser.add_argument(
        "--val",
        type=float,
        default=VAL_SHARE,
        help=f"share of documents for the split `val` (default: {VAL_SHARE})",
    )
    add_download_arguments(parser, f"where {ARCHIVE} lies, tried before Zenodo")


def make_job(arguments: argparse.Namespace) -> Job:
    check_downloads(arguments)
    source = Path(os.path.abspath(arguments.source.expanduser())) if arguments.source else None
    if source and not source.exists():
        raise ValueError(f"{source} is not there; give {ARCHIVE} or a folder, or nothing to download it")
    if not 0 <= arguments.val < 1:
        raise ValueError(f"--val {arguments.val} must be a share from 0 to below 1")
    settings = {
        "made by": "d2v prepare openwebtext",
        "source": str(source) if source else None,
        "val": arguments.val,
    }
    find = functools.partial(find_parts, source=source, arguments=arguments)
    return Job(name="openwebtext", out=arguments.out.expanduser(), settings=settings, find=find)


def find_parts(job: Job, source: Path | None, arguments: argparse.Namespace) -> Source:
    """A part for each inner archive, or for each parquet file."""
    remote = make_remote(arguments)
    if source is None:
        downloads = arguments.downloads or job.out / "downloads"
        [source] = fetch_all([remote], downloads, job.work / "verified", job.say)
    elif source.is_dir() and (source / ARCHIVE).is_file():
        source = source / ARCHIVE
    draw = functools.partial(draw_split, seed=job.seed, val=arguments.val)
    if source.is_file() and not is_archive(source.name) and source.suffix != ".parquet":
        check(source, remote.checksum, job.work / "verified", job.say)
        job.say("unpacking the outer archive")
        plain = unpack(source, job.scratch)
        inner = sorted(
            (member for member in list_tar(plain) if is_archive(member.name)), key=lambda member: member.name
        )
        origin = [{"file": source.name, "size": source.stat().st_size, "checksum": remote.checksum}]
        stamp = stamp_file(source)
    else:
        paths = [source] if source.is_file() else sorted(filter(Path.is_file, source.rglob("*")))
        tables = [path for path in paths if path.suffix == ".parquet"]
        if tables:
            return find_tables(tables, draw)
        inner = [Member(str(path), whole(path)) for path in paths if is_archive(path.name)]
        origin, stamp = [], ""
    if not inner:
        raise ValueError(f"{source} holds neither {ARCHIVE}, nor archives *_data.xz, nor parquet files")
    parts = []
    for member in inner:
        own = stamp or stamp_file(Path(member.where.file))
        listed = functools.partial(list_archive, member=member, draw=draw)
        parts.append(Part(member.name, listed, f"{own} {member.name} {arguments.val} {job.seed}"))
    return Source(parts=parts, origin=origin)


def make_remote(arguments: argparse.Namespace) -> Remote:
    places = [*([arguments.mirror.rstrip("/")] if arguments.mirror else []), URL]
    checksum = f"sha256:{SHA256}"
    if arguments.checksums:
        checksum = read_checksums(arguments.checksums).get(ARCHIVE)
    return Remote(ARCHIVE, tuple(f"{place}/{ARCHIVE}" for place in places), checksum)


def is_archive(name: str) -> bool:
    return name.endswith(("_data.xz", "_data.tar", "_data"))


def whole(path: Path) -> Stored:
    return Stored(str(path), 0, path.stat().st_size)


def list_archive(scratch: Path, member: Member, draw: Any) -> Iterator[Found | Skipped]:
    """The documents of one inner archive, with its name in their keys."""
    subset = make_key(Path(member.name).name.partition("_data")[0])
    plain = unpack(Path(member.name), scratch, member.where)
    inside = member.where if plain == Path(member.name) else whole(plain)
    for document in list_tar(Path(member.name), inside):
        key = f"{subset}/{make_key(os.path.splitext(os.path.basename(document.name))[0])}"
        if not document.where.size:
            yield Skipped(f"{member.name}/{document.name}", "is empty")
        else:
            yield Found(key, draw(key), {"txt": document.where})


def find_tables(tables: list[Path], draw: Any) -> Source:
    """A part for each file; folders below the one that holds all belong to keys."""
    root = os.path.commonpath([path.parent for path in tables])
    parts = [
        Part(
            path.name,
            functools.partial(
                list_table, path=path, name=make_key(str(path.relative_to(root).with_suffix(""))), draw=draw
            ),
            f"{path} {stamp_file(path)} {draw.keywords}",
        )
        for path in tables
    ]
    origin = [{"file": path.name, "size": path.stat().st_size, "checksum": None} for path in tables]
    return Source(parts=parts, origin=origin)


def list_table(scratch: Path, path: Path, name: str, draw: Any) -> Iterator[Found | Skipped]:
    """The rows of a parquet file, whose column `text` holds a document each."""

    def split_row(row: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        if not isinstance(row["text"], str | None):
            raise ValueError(f"{path}: its column text holds {str(row['text'])[:40]}, which is no text")
        return (row["text"] or "").encode(), {}

    for row in read_rows(path, scratch, ["text"], split_row):
        key = f"{name}/{row.number:07d}"
        if row.where.size:
            yield Found(key, draw(key), {"txt": row.where})
        else:
            yield Skipped(f"{path}, row {row.number}", "is empty")
