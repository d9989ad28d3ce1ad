"""LibriSpeech (OpenSLR 12), its mini parts (OpenSLR 31) and Libri-light's limited labels, as shards.

    d2v prepare librispeech --out shards/librispeech                          all seven parts, 60 GB
    d2v prepare librispeech --out DIR --parts train-clean-5 dev-clean-2       the mini parts, 0.5 GB
    d2v prepare librispeech --out DIR --parts limited-10m limited-1h          to fine-tune on 10 minutes, on 1 hour
    d2v prepare librispeech ARCHIVES --out DIR                                archives or folders that are there

A sample is one utterance: `flac` as it is published, and `txt`, its transcript as it is published: capitals and
apostrophes, no punctuation. The key is the utterance's name, <speaker>-<chapter>-<number>. Each part has shards of its
own, so `librispeech-train-*.tar` is all that is for training. The limited parts (arXiv:1912.07875, section 3) are
utterances of train-*: 10 minutes are a sixth of 1 hour, which is a tenth of 10 hours. Licence: CC BY 4.0.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from shards.archives import list_tar, unpack
from shards.download import Remote, check, fetch_all, read_checksums
from shards.folder import look_at, walk
from shards.listing import Found, Part, Skipped, Stored, stamp_file
from shards.prepare import Job, Source

MIRRORS = (
    "https://www.openslr.org/resources",
    "https://openslr.trmal.net/resources",
    "https://openslr.elda.org/resources",
)
MD5 = {  # OpenSLR's md5sum.txt
    "dev-clean": "42e2234ba48799c1f50f24a7926300a1",
    "dev-other": "c8d0bcc9cca99d4f8b62fcc847357931",
    "test-clean": "32fa31d27d2e1cad72775fee3f4849a9",
    "test-other": "fb5a50374b501bb3bac4815ee91d3135",
    "train-clean-100": "2a93770f6d5c6c964bc36631d331a522",
    "train-clean-360": "c0e676e450a7ff2f54aeade5171606fa",
    "train-other-500": "d1a0fd59409feb2c614ce4d30c387708",
}
MINI_MD5 = {
    "dev-clean-2": "6d7ab67ac6a1d2c993d050e16d61080d",
    "train-clean-5": "5df7d4e78065366204ca6845bb08f490",
}
LIMITED = {"limited-10m": "1h/0/", "limited-1h": "1h/", "limited-10h": "(1h|9h)/"}
"""Folders of the one archive that a part is made of."""
LIMITED_ARCHIVE = Remote(
    "librispeech_finetuning.tgz",
    ("https://dl.fbaipublicfiles.com/librilight/data/librispeech_finetuning.tgz",),
    "sha256:5d1efdc777b548194d7e09ba89126e2188026df9fd57aa57eb14408d2b2342af",  # as torchaudio has it
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        nargs="?",
        metavar="SOURCE",
        help="folder with <part>.tar.gz, librispeech_finetuning.tgz, or what they hold (default: download)",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        action="extend",
        choices=[*MD5, *MINI_MD5, *LIMITED],
        help="default: all but the mini and the limited parts",
    )
    mirror = "where /12/<part>.tar.gz and /librispeech_finetuning.tgz lie, tried before the known places"
    add_download_arguments(parser, mirror)


def add_download_arguments(parser: argparse.ArgumentParser, mirror: str) -> None:
    parser.add_argument(
        "--downloads", type=Path, default=None, help="folder for archives (default: OUT/downloads)"
    )
    parser.add_argument("--mirror", default=None, metavar="URL", help=mirror)
    parser.add_argument(
        "--checksums",
        type=Path,
        default=None,
        metavar="FILE",
        help="a file of md5sum or sha256sum to check archives against, in place of the published ones",
    )


def check_downloads(arguments: argparse.Namespace) -> None:
    """ValueError for what says how to download, beside a source that is there."""
    for name in ("downloads", "mirror"):
        if arguments.source and (value := getattr(arguments, name)):
            raise ValueError(
                f"--{name} {value} has no meaning beside {arguments.source}, which is not downloaded; leave one out"
            )


def make_job(arguments: argparse.Namespace) -> Job:
    check_downloads(arguments)
    source = Path(os.path.abspath(arguments.source.expanduser())) if arguments.source else None
    if source and not source.is_dir():
        raise ValueError(
            f"{source} is no folder; give the folder that holds the archives, or none to download them"
        )
    parts = list(dict.fromkeys(arguments.parts or MD5))
    settings = {"made by": "d2v prepare librispeech", "parts": sorted(parts)}
    find = functools.partial(find_parts, names=sorted(parts), source=source, arguments=arguments)
    return Job(name="librispeech", out=arguments.out.expanduser(), settings=settings, find=find)


def find_parts(job: Job, names: list[str], source: Path | None, arguments: argparse.Namespace) -> Source:
    """One part of the source for each part of the corpus."""
    remotes = {name: make_remote(name, arguments) for name in names}
    records = job.work / "verified"
    archives = {}
    if source is None:
        downloads = arguments.downloads or job.out / "downloads"
        wanted = list(dict.fromkeys(remotes.values()))  # limited parts are of one
        archives = dict(zip(wanted, fetch_all(wanted, downloads, records, job.say), strict=True))
    parts, origin = [], []
    for name in names:
        place = archives.get(remotes[name]) or find_part(source, name)
        record = {"part": name, "url": remotes[name].urls[0] if source is None else None}
        if place.is_dir():
            listed, stamp = functools.partial(list_folder, folder=place, split=name), str(place)
            origin.append(record | {"checksum": None})
        else:
            checksum = remotes[name].checksum
            if place.name != remotes[name].name:  # gunzipped: the published one is not of it
                checksum = (
                    read_checksums(arguments.checksums).get(place.name) if arguments.checksums else None
                )
            if source is not None:
                check(place, checksum, records, job.say)
            listed, stamp = functools.partial(list_archive, archive=place, split=name), stamp_file(place)
            origin.append(record | {"size": place.stat().st_size, "checksum": checksum})
        parts.append(Part(name, listed, f"{name} {stamp}"))
    return Source(parts=parts, origin=origin)


def make_remote(name: str, arguments: argparse.Namespace) -> Remote:
    own = [arguments.mirror.rstrip("/")] if arguments.mirror else []
    if name in LIMITED:
        file, urls, checksum = LIMITED_ARCHIVE
        urls = (*(f"{place}/{file}" for place in own), *urls)
    else:
        file, number = f"{name}.tar.gz", 31 if name in MINI_MD5 else 12
        urls = tuple(f"{place}/{number}/{file}" for place in (*own, *MIRRORS))
        checksum = f"md5:{(MD5 | MINI_MD5)[name]}"
    if arguments.checksums:
        checksum = read_checksums(arguments.checksums).get(file)
    return Remote(file, urls, checksum)


def find_part(source: Path, name: str) -> Path:
    """An archive or a folder of a part, at the usual places below `source`."""
    if name in LIMITED:
        folder = source / "librispeech_finetuning"
        places = [source / LIMITED_ARCHIVE.name, folder.with_suffix(".tar"), folder]
    else:
        places = [
            source / f"{name}.tar.gz",
            source / f"{name}.tar",
            source / "LibriSpeech" / name,
            source / name,
        ]
    for place in places:
        if place.exists():
            return place
    raise ValueError(
        f"{source} does not hold {name}: neither {', '.join(str(p.relative_to(source)) for p in places)}; name the "
        "parts that are there by --parts"
    )


def list_archive(scratch: Path, archive: Path, split: str) -> Iterator[Found | Skipped]:
    """The utterances of an archive that are of a part."""
    own = scratch / split  # several parts of one archive are listed at the same time
    own.mkdir(exist_ok=True)
    plain = unpack(archive, own)

    def files() -> Iterator[tuple[str, Stored]]:
        for member in list_tar(plain):
            if is_of(split, member.name):
                yield member.name, member.where

    return list_utterances(files(), split)


def list_folder(scratch: Path, folder: Path, split: str) -> Iterator[Found | Skipped]:
    """The utterances of an unpacked part."""
    bad: list[Skipped] = []

    def files() -> Iterator[tuple[str, Stored]]:
        for path in walk(folder, bad):
            if not is_of(split, path):
                continue
            try:
                yield path, look_at(path)
            except ValueError as error:
                bad.append(Skipped(path, str(error)))

    yield from list_utterances(files(), split)
    yield from bad


def is_of(split: str, name: str) -> bool:
    """Whether a file of an archive, or of a folder of its content, is of a part."""
    return split not in LIMITED or re.match(f"(.*/)?{LIMITED[split]}", name) is not None


def list_utterances(files: Iterable[tuple[str, Stored]], split: str) -> Iterator[Found | Skipped]:
    """Sounds with their transcripts, sorted by name; a line of `*.trans.txt` is `<name> <transcript>`."""
    sounds: dict[str, Stored] = {}
    texts: dict[str, str] = {}
    for name, where in files:
        base = name.rpartition("/")[2]
        if base.endswith(".flac"):
            key = base[: -len(".flac")]
            if not where.size:
                yield Skipped(name, "is empty")
            elif key in sounds:
                yield Skipped(name, f"key {key} is there already")
            else:
                sounds[key] = where
        elif base.endswith(".trans.txt"):
            for key, text in read_transcripts(name, where):
                if texts.setdefault(key, text) != text:
                    yield Skipped(f"{name}, {key}", "has another transcript already")
    for key in sorted(sounds):
        if key in texts:
            yield Found(key, split, {"flac": sounds[key], "txt": texts[key]})
        else:
            yield Skipped(f"{key}.flac", "has no transcript")
    for key in sorted(texts.keys() - sounds.keys()):
        yield Skipped(f"{key}.flac", "is named in the transcripts, but not there")


def read_transcripts(name: str, where: Stored) -> Iterator[tuple[str, str]]:
    with open(where.file, "rb") as file:
        file.seek(where.offset)
        content = file.read(where.size)
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 ({error}); get the archive again") from error
    for number, line in enumerate(lines, 1):
        key, _, text = line.removesuffix("\r").partition(" ")
        if text.strip():
            yield key, text
        elif line.strip():
            raise ValueError(
                f"{name}, line {number}: {line[:60]!r} is not `<utterance> <transcript>`; get the archive again"
            )
