"""Any tree of images, sounds and texts, or a table of them, as shards.

    d2v prepare folder photos/ --out shards/photos                       every image, sound and text below photos/
    d2v prepare folder photos/ --out shards/photos --labels folder       photos/<class>/...: the class is the label
    d2v prepare folder clips.csv --out shards/clips --val 0.05           columns path, label, text, split, ...
    d2v prepare folder train.tsv --out shards/clips                      fairseq's manifest: the root, then path, frames

Files of one name and different endings make one sample (a.jpg, a.txt, a.json), as in WebDataset's tars; two images of
one name are two samples. Files are copied as they are. Whatever is left out stands in `skipped.jsonl`, with the reason.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import io
import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from shards.listing import Found, Part, Skipped, Stored, draw_split, make_key
from shards.prepare import Job, Source
from shards.rows import LONGEST_FIELD, read_line

MODALITIES = {
    "image": ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm"),
    "audio": ("flac", "wav", "ogg", "opus", "mp3", "aiff", "aif", "au"),
    "text": ("txt",),
}
READ = {"image": "jpg;jpeg;png;webp", "audio": "flac;wav;ogg;opus;mp3", "text": "txt"}
"""What recipes read where nothing is said."""
SIDECARS = ("json", "cls")
"""Endings of what goes with a sample, but makes none alone."""
MODALITY_OF = {ending: modality for modality, endings in MODALITIES.items() for ending in endings}
TABLES = (".csv", ".tsv", ".jsonl")
PATH_COLUMNS = (
    "path",
    "file",
    "file_name",
    "filename",
    "filepath",
    "audio_filepath",
    "image",
    "audio",
    "wav",
)
TEXT_COLUMNS = ("text", "transcript", "caption")
PART_SAMPLES = 5000


class Item(NamedTuple):
    """A sample to be: files to be looked at, and texts that are known."""

    key: str
    files: list[tuple[str, str]]
    """(extension, path)"""
    texts: dict[str, str]
    split: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="a folder, or a .csv, .tsv or .jsonl table"
    )
    parser.add_argument(
        "--modality",
        nargs="+",
        action="extend",
        choices=tuple(MODALITIES),
        help="take only these (default: all that is there)",
    )
    parser.add_argument(
        "--labels",
        choices=("none", "folder"),
        default="none",
        help="folder: the first folder below SOURCE is the class; a table has labels in its column `label`",
    )
    parser.add_argument(
        "--val", type=float, default=0.0, help="share of samples for the split `val` (default: 0)"
    )
    parser.add_argument(
        "--root", type=Path, default=None, help="paths of a table begin here (default: beside it)"
    )
    for column, names in (("path", PATH_COLUMNS), ("text", TEXT_COLUMNS), ("label", ("label",))):
        parser.add_argument(
            f"--{column}-column", help=f"column of a table (default: {' or '.join(names[:3])})"
        )


def make_job(arguments: argparse.Namespace) -> Job:
    source = Path(os.path.abspath(arguments.source.expanduser()))  # a run may go on from another folder
    if not source.exists():
        raise ValueError(f"{source} is not there; give a folder, or a table ending in {', '.join(TABLES)}")
    if not 0 <= arguments.val < 1:
        raise ValueError(f"--val {arguments.val} must be a share from 0 to below 1")
    out = arguments.out.expanduser()
    refuse_meaningless(source, arguments)
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"--out {out} lies inside {source}, which would become part of its own shards")
    arguments.modality = arguments.modality or list(MODALITIES)
    keys = ("labels", "modality", "val", "path_column", "text_column", "label_column")
    settings = {
        "made by": "d2v prepare folder",
        "source": str(source),
        "root": str(arguments.root) if arguments.root else None,
        **{key: getattr(arguments, key) for key in keys},
    }
    find = find_files if source.is_dir() else find_rows
    return Job(
        name=make_name(source),
        out=out,
        settings=settings,
        find=functools.partial(find, source=source, arguments=arguments),
    )


def refuse_meaningless(source: Path, arguments: argparse.Namespace) -> None:
    """ValueError for an option of tables where the source is a folder, or of folders where it is a table."""
    of_tables = ("root", "path_column", "text_column", "label_column")
    given = [name for name in of_tables if getattr(arguments, name) is not None]
    if source.is_dir() and given:
        raise ValueError(
            f"--{given[0].replace('_', '-')} is for a table, and {source} is a folder; leave it out"
        )
    if not source.is_dir() and arguments.labels == "folder":
        raise ValueError(
            f"--labels folder is for a folder, and {source} is a file; labels of a table stand in a column: "
            "--label-column"
        )


def make_name(source: Path) -> str:
    """The source's own name, of letters and digits; not one that a split's pattern (*train*.tar) would find in the
    shards of all splits."""
    name = plain(source.resolve().stem)
    return "data" if not name or any(split in name for split in ("train", "val", "test")) else name


def plain(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in text).strip("-")


# ---- a tree ----


def find_files(job: Job, source: Path, arguments: argparse.Namespace) -> Source:
    """Every file below a folder, those of one name together; nothing is opened yet."""
    files, others = [], []
    for path in walk(source, others):
        ending = ending_of(path)
        if ending in SIDECARS or MODALITY_OF.get(ending) in arguments.modality:
            files.append(path)
        else:
            known = f"is {MODALITY_OF[ending]}, not taken" if ending in MODALITY_OF else "is of no known kind"
            others.append(Skipped(path, f".{ending} {known}" if ending else f"without ending {known}"))
    items = list(group_files(files, source, others))
    classes = None
    if arguments.labels == "folder":
        classes = add_folder_labels(items, source, others)
    return finish(job, items, others, classes, arguments.val)


def walk(folder: Path, others: list[Skipped]) -> Iterator[str]:
    """Paths of all files below, sorted; links are followed, but never into a folder that they lie in."""

    def descend(path: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in above:
                others.append(Skipped(path, "is a link to a folder above it"))
                return
            entries = sorted(os.scandir(path), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            others.append(Skipped(path, f"folder cannot be read: {error.strerror}"))
            return
        for entry in entries:
            if entry.name.startswith("."):
                others.append(Skipped(entry.path, "is hidden"))
            elif leads_to_folder(entry):
                yield from descend(entry.path, (*above, (status.st_dev, status.st_ino)))
            else:
                yield entry.path

    yield from descend(str(folder), ())


def leads_to_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def ending_of(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()


def group_files(files: list[str], root: Path, others: list[Skipped]) -> Iterator[Item]:
    """Files of one name make a sample; two of one modality make two, whose keys have their endings."""
    groups: dict[str, list[str]] = {}
    for path in files:
        groups.setdefault(os.path.splitext(path)[0], []).append(path)
    for stem, paths in groups.items():
        main = [path for path in paths if ending_of(path) in MODALITY_OF]
        if not main:
            others.extend(
                Skipped(path, f".{ending_of(path)} goes with no image, sound or text") for path in paths
            )
            continue
        name = os.path.relpath(stem, root)
        kinds = [MODALITY_OF[ending_of(path)] for path in main]
        endings = [ending_of(path) for path in paths]
        if len(set(kinds)) == len(kinds) and len(set(endings)) == len(endings):
            yield Item(make_key(name), [(ending_of(path), path) for path in paths], {})
            continue
        for path in main:
            yield Item(make_key(os.path.relpath(path, root)), [(ending_of(path), path)], {})
        others.extend(
            Skipped(path, "belongs to one of several files of one name, it is not said to which")
            for path in paths
            if path not in main
        )


def add_folder_labels(items: list[Item], root: Path, others: list[Skipped]) -> list[str]:
    """`cls` of every sample: the place of its first folder among all of them, sorted; the folders."""
    folders = [Path(os.path.relpath(item.files[0][1], root)).parts[:-1] for item in items]
    classes = sorted({parts[0] for parts in folders if parts}, key=os.fsencode)
    number = {name: str(place) for place, name in enumerate(classes)}
    for place, parts in reversed(list(enumerate(folders))):
        if not parts:
            others.extend(
                Skipped(path, "lies in no folder, so it has no label") for _, path in items[place].files
            )
            del items[place]
            continue
        own = [file for file in items[place].files if file[0] == "cls"]
        others.extend(Skipped(path, "is a label, but that of its folder was asked for") for _, path in own)
        items[place].files[:] = [file for file in items[place].files if file not in own]
        items[place].texts["cls"] = number[parts[0]]
    return classes


# ---- a table ----


def find_rows(job: Job, source: Path, arguments: argparse.Namespace) -> Source:
    """The samples that a table lists."""
    rows, root = read_table(source)
    if not rows:
        raise ValueError(f"{source} holds no row; give a table with a header, and a line for each sample")
    root = Path(os.path.abspath(arguments.root or root))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path, text, label = (
        choose_column(given, names, columns, source)
        for given, names in (
            (arguments.path_column, PATH_COLUMNS),
            (arguments.text_column, TEXT_COLUMNS),
            (arguments.label_column, ("label",)),
        )
    )
    if path is None and text is None:
        raise ValueError(
            f"{source} has the columns {', '.join(columns)}: none says where files are ({', '.join(PATH_COLUMNS)}) or "
            f"holds text ({', '.join(TEXT_COLUMNS)}); name one by --path-column or --text-column"
        )
    labels, classes = read_labels([row.get(label) for row in rows] if label else [])
    taken = {path, text, "split", "key", *([label] if labels else [])}
    stems: dict[str, set[str]] = {}
    for row in rows:
        file = str(row.get(path) or "")
        if MODALITY_OF.get(ending_of(file)) in arguments.modality:
            stems.setdefault(os.path.splitext(file)[0], set()).add(file)
    others: list[Skipped] = []
    items = []
    for number, row in enumerate(rows):
        extra = {name: value for name, value in row.items() if name not in taken}
        texts = {}
        if text and row.get(text) not in (None, "", []):
            if "text" in arguments.modality:
                texts["txt"] = as_text(row[text], f"{source}: row {number + 1}")
            else:
                others.append(Skipped(str(source), f"row {number + 1}: its {text} is text, not taken"))
        if labels and labels[number] is not None:
            texts["cls"] = labels[number]
        if extra:
            texts["json"] = json.dumps(extra)
        file = str(root / str(row[path])) if path and row.get(path) not in (None, "") else None
        if file and ending_of(file) in texts:
            raise ValueError(
                f"{source}: row {number + 1} names the file {row[path]} and has a {text} too; a sample has one text: "
                "leave one of them out"
            )
        if file and MODALITY_OF.get(ending_of(file)) not in arguments.modality:
            others.append(Skipped(file, f"row {number + 1}: .{ending_of(file)} is of no kind that is taken"))
            if ending_of(file) not in MODALITY_OF or "txt" not in texts:
                continue
        if not file and "txt" not in texts:
            others.append(Skipped(str(source), f"row {number + 1} has neither a file nor text"))
            continue
        given = row.get("key")
        if given in (None, ""):
            given = f"{number:09d}"
            if file:
                stem = os.path.splitext(str(row[path]))[0]
                given = stem if len(stems.get(stem, ())) < 2 else str(row[path])  # two files of one name
        split = str(row["split"]) if row.get("split") not in (None, "") else None
        is_taken = file and MODALITY_OF.get(ending_of(file)) in arguments.modality
        items.append(Item(make_key(str(given)), [(ending_of(file), file)] if is_taken else [], texts, split))
    if arguments.val and items and all(item.split for item in items):
        raise ValueError(
            f"--val {arguments.val} has no meaning: every row of {source} has a split; leave it out"
        )
    refuse_splits(items)
    return finish(job, items, others, classes, arguments.val)


def read_table(path: Path) -> tuple[list[dict[str, Any]], Path]:
    """The rows of a table, and the folder in which relative paths begin."""
    kind = path.suffix.lower()
    if kind not in TABLES:
        raise ValueError(f"{path} is neither a folder nor a table; a table ends in {', '.join(TABLES)}")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    lines = content.split("\n")  # not splitlines: U+2028, U+0085 and others stand inside captions
    if kind == ".jsonl":
        return [
            read_line(path, number, line) for number, line in enumerate(lines, 1) if line.strip()
        ], path.parent
    if kind == ".tsv" and "\t" not in lines[0] and "\t" in content:
        root, *rest = lines  # fairseq: the root, then path and frames
        return [{"path": line.split("\t")[0].strip("\r")} for line in rest if line], path.parent / root.strip(
            "\r"
        )
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    try:
        if kind == ".tsv":  # quotes and single carriage returns mean nothing
            rows = [line.split("\t") for line in (line.removesuffix("\r") for line in lines) if line]
        else:
            rows = [row for row in reader if row]
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: {error}; close each quote, and write one inside a field twice"
        ) from error
    names, *rows = rows or [[]]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} has the column {', '.join(twice)} twice; it must be clear which is meant")
    for number, row in enumerate(rows, 2):
        if len(row) != len(names):
            raise ValueError(
                f"{path}: row {number} has more or fewer fields than the header; correct or remove it"
            )
    return [dict(zip(names, row, strict=True)) for row in rows], path.parent


def as_text(value: Any, where: str) -> str:
    """A text; several of one file, in a list, become its lines, as where shards are read."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n".join(value)
    if isinstance(value, (list, dict)):
        raise ValueError(f"{where}: text {str(value)[:60]} is neither a text nor a list of them; correct it")
    return str(value)


def choose_column(given: str | None, names: Iterable[str], columns: list[str], source: Path) -> str | None:
    if given is not None and given not in columns:
        raise ValueError(f"{source} has no column {given!r}, but {', '.join(columns)}")
    return given or next((name for name in names if name in columns), None)


def read_labels(values: list[Any]) -> tuple[list[str | None], list[str] | None]:
    """(numbers as text, class names): whole numbers stay as they are, names are numbered in sorted order.

    Other numbers and lists are no classes: nothing is given, and the column goes into `json`.
    """
    values = [None if isinstance(value, str) and not value.strip() else value for value in values]
    known = [value for value in values if value is not None]
    if not known or any(isinstance(value, (list, dict, float)) for value in known):
        return [], None
    if all(is_number(value, int) for value in known):
        return [None if value is None else str(int(value)) for value in values], None
    if all(is_number(value, float) for value in known):
        return [], None
    classes = sorted({str(value) for value in known})
    number = {name: str(place) for place, name in enumerate(classes)}
    return [None if value is None else number[str(value)] for value in values], classes


def is_number(value: Any, kind: type) -> bool:
    try:
        kind(value)
    except ValueError:
        return False
    return not isinstance(value, bool) and "_" not in str(value)  # Python reads a class 1_0 as 10


def refuse_splits(items: list[Item]) -> None:
    for item in items:
        if item.split is not None and (not item.split or plain(item.split) != item.split):
            raise ValueError(f"split {item.split!r} becomes part of file names: letters, digits and - only")


# ---- both ----


def finish(
    job: Job, items: list[Item], others: list[Skipped], classes: list[str] | None, val: float
) -> Source:
    """Parts of some thousand samples each, and last what was left out already."""
    parts = []
    for start in range(0, len(items), PART_SAMPLES):
        some = items[start : start + PART_SAMPLES]
        stamp = hashlib.sha256(repr((some, val, job.seed)).encode("utf-8", "surrogateescape")).hexdigest()
        listed = functools.partial(list_items, items=some, val=val, seed=job.seed)
        parts.append(Part(f"{start}", listed, stamp))
    stamp = hashlib.sha256(repr(others).encode("utf-8", "surrogateescape")).hexdigest()
    parts.append(Part("others", functools.partial(give, others=others), stamp))
    return Source(parts=parts, classes=classes, notes=make_notes(items))


def give(scratch: Path, others: list[Skipped]) -> list[Skipped]:
    return others


def make_notes(items: list[Item]) -> list[str]:
    """How many of each modality were listed, left out or not, and what a recipe must be told to read them."""
    endings = Counter(e for item in items for e in {*(ending for ending, _ in item.files), *item.texts})
    notes = []
    for modality, known in MODALITIES.items():
        counts = {ending: endings[ending] for ending in known if endings[ending]}
        if counts:
            listed = ", ".join(f"{count} {ending}" for ending, count in counts.items())
            notes.append(f"{modality}: {listed} in the source")
        unread = [ending for ending in counts if ending not in READ[modality].split(";")]
        if unread:
            fields = ";".join([READ[modality], *unread])
            notes.append(f"to read {', '.join(unread)}: modalities.{modality}.data.fields='{fields}'")
    return notes


def list_items(scratch: Path, items: list[Item], val: float, seed: int) -> Iterator[Found | Skipped]:
    """Sizes of the files of these samples; samples with a file that cannot be read or is empty are left out."""
    for item in items:
        members: dict[str, Stored | str] = {}
        bad = None
        for ending, path in item.files:
            try:
                members[ending] = look_at(path)
            except ValueError as error:
                bad = Skipped(path, str(error))
        if bad:
            yield bad
            yield from (
                Skipped(path, f"goes with {bad.file}, which is left out")
                for _, path in item.files
                if path != bad.file
            )
            continue
        members |= {name: text for name, text in item.texts.items() if name not in members}
        yield Found(item.key, item.split or draw_split(item.key, seed, val), members)


def look_at(path: str) -> Stored:
    """A whole file. ValueError if it is none, is empty, or may not be read."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(error.strerror) from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is no plain file")
    if not status.st_size:
        raise ValueError("is empty")
    if not os.access(path, os.R_OK):
        raise ValueError("may not be read")
    return Stored(path, 0, status.st_size, True)
