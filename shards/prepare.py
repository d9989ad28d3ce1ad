"""From a source to shards, whatever the source: list it, draw an order, pack, and say what was made.

Killed at any moment, the same command goes on where it was and writes the same bytes. What a run needs to go on lies
in `OUT/.prepare`, which is removed at the end; `manifest.json` is written last, so where it is, all is.

    d2v prepare folder photos/ --out shards/photos
    d2v prepare librispeech --out shards/librispeech --parts train-clean-5 dev-clean-2
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2v_ds.data.progress import ProgressLine, duration
from shards.listing import Listing, Part, Skipped, list_part, merge_parts, write_skipped
from shards.packing import (
    Shard,
    ensure_indexed,
    fingerprint,
    is_done,
    pack_shard,
    plan_shards,
    read_record,
    remove_unfinished,
)
from shards.pool import num_cores, run_jobs
from shards.writer import write_bytes

VERSION = 1
WORK = ".prepare"
SHARD_MIB = 256
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
LOCK_SECONDS = 5.0
"""How long to wait for the workers of a run that was just killed: they end by themselves."""

Say = Callable[[str], Any]


@dataclass(kw_only=True)
class Source:
    """What a preparer found, before anything is listed."""

    parts: list[Part]
    classes: list[str] | None = None
    """Names of the classes, in the order of the numbers in `cls`."""
    class_names: list[str] | None = None
    """What people call them, where `classes` are numbers of a catalogue."""
    origin: list[dict[str, Any]] = field(default_factory=list)
    """Archives with size and checksum, for the manifest."""
    notes: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Job:
    """One `d2v prepare`."""

    name: str
    """Begins the name of every shard."""
    out: Path
    settings: dict[str, Any]
    """All that the bytes depend on, besides the source; a run goes on only with the same."""
    find: Callable[[Job], Source]
    """Downloads and unpacks what it must, and says which parts there are."""
    seed: int = 0
    shard_bytes: int = SHARD_MIB << 20
    workers: int = field(default_factory=num_cores)
    say: Say = lambda line: None

    @property
    def work(self) -> Path:
        return self.out / WORK

    @property
    def scratch(self) -> Path:
        """For what is unpacked; removed at the end."""
        return self.work / "unpacked"

    def all_settings(self) -> dict[str, Any]:
        return {"name": self.name, "seed": self.seed, "shard_bytes": self.shard_bytes, **self.settings}


def prepare(job: Job) -> dict[str, Any]:
    """Makes the shards; gives the manifest.

    Raises ValueError if the source holds no sample, `out` holds something else, or the disk is full.
    """
    _check(job)
    if (job.out / "manifest.json").is_file():
        return _finished(job)
    try:
        job.work.mkdir(parents=True, exist_ok=True)
        with locked(job):
            return _prepare(job)
    except OSError as error:
        raise ValueError(_disk_message(job, error)) from error


def _check(job: Job) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", job.name):
        raise ValueError(
            f"name {job.name!r} begins the shards' names: letters, digits, _ and - only; set --name"
        )
    if job.shard_bytes < 1 << 10:
        raise ValueError(
            f"shards of {job.shard_bytes} bytes are too small; --shard-mib must be 0.001 or more"
        )
    if job.workers < 1:
        raise ValueError(f"--workers {job.workers} must be at least 1")
    if job.seed < 0 or job.seed >= 1 << 32:
        raise ValueError(f"--seed {job.seed} must be from 0 to {(1 << 32) - 1}")
    if job.out.exists() and not job.out.is_dir():
        raise ValueError(f"--out {job.out} is a file; give a folder")
    if not (job.work / "settings.json").is_file() and not (job.out / "manifest.json").is_file():
        refuse_others(job, set())


def _prepare(job: Job) -> dict[str, Any]:
    began = time.monotonic()
    if (job.out / "manifest.json").is_file():  # made while this run waited for the lock
        return _finished(job)
    _keep_settings(job)
    if not Listing.is_there(job.work):
        _list(job)
    listing = Listing(job.work)
    shards = plan_shards(listing, job.name, job.seed, job.shard_bytes)
    refuse_others(job, {shard.file for shard in shards})
    remove_unfinished(job.out, shards)
    _pack(job, listing, shards)
    manifest = _write_manifest(job, shards)
    shutil.rmtree(job.work)
    for line in _summary(job, manifest, time.monotonic() - began):
        job.say(line)
    return manifest


# ---- list ----


def _list(job: Job) -> None:
    job.scratch.mkdir(exist_ok=True)
    source = job.find(job)
    line = ProgressLine(len(source.parts), what="listed", unit="parts")
    run = functools.partial(_list_one, parts=source.parts, folder=job.work, scratch=job.scratch)
    for done, _ in enumerate(run_jobs(run, list(range(len(source.parts))), job.workers), 1):
        line.show(done)
    line.close()
    names = ("classes", "class_names", "origin", "notes")
    found = {name: getattr(source, name) for name in names}
    write_bytes(job.work / "source.json", lambda file: file.write(json.dumps(found).encode()))
    merge_parts(source.parts, job.work)


def _list_one(number: int, parts: list[Part], folder: Path, scratch: Path) -> int:
    return list_part(number, parts[number], folder, scratch)


# ---- pack ----


def _pack(job: Job, listing: Listing, shards: list[Shard]) -> None:
    records = job.work / "done"
    records.mkdir(exist_ok=True)
    missing = [shard for shard in shards if not is_done(shard, job.out, records)]
    total, left = (sum(shard.size for shard in some) for some in (shards, missing))
    free = shutil.disk_usage(job.out).free
    if left > free:
        job.say(f"warning: {left / 1e9:.1f} GB are to be written, and {job.out} has {free / 1e9:.1f} GB free")
    if len(missing) < len(shards):
        job.say(f"going on: {len(shards) - len(missing)} of {len(shards)} shards are there")
    done = total - left
    line = ProgressLine(max(total // 1_000_000, 1), done // 1_000_000, what="packed", unit="MB")
    import webdataset  # noqa: F401  # it brings torch: seconds here once, and not in each worker

    run = functools.partial(pack_shard, listing=listing, out=job.out, records=records)
    try:
        for shard in run_jobs(run, missing, job.workers):
            done += shard.size
            line.show(done // 1_000_000)
    finally:
        line.close()


# ---- what is there ----


def _write_manifest(job: Job, shards: list[Shard]) -> dict[str, Any]:
    records = job.work / "done"
    source = json.loads((job.work / "source.json").read_text())
    dropped = [Skipped(*item) for shard in shards for item in read_record(shard, records)["dropped"]]
    skipped = (job.work / "skipped.jsonl").read_bytes()
    if skipped or dropped:
        write_bytes(
            job.out / "skipped.jsonl", lambda file: (file.write(skipped), write_skipped(file, dropped))
        )
    else:  # one that an earlier run left would be taken for this one's; so below
        (job.out / "skipped.jsonl").unlink(missing_ok=True)
    for name in ("classes", "class_names"):
        if source.get(name) is not None:
            write_json(job.out / f"{name}.json", source[name])
        else:
            (job.out / f"{name}.json").unlink(missing_ok=True)
    splits = {}
    for split in dict.fromkeys(shard.split for shard in shards):
        own = [shard for shard in shards if shard.split == split]
        rows = [{"file": shard.file, **read_record(shard, records)} for shard in own]
        for row in rows:
            del row["dropped"]
        splits[split] = {
            "samples": sum(row["samples"] for row in rows),
            "bytes": sum(row["size"] for row in rows),
            "fingerprint": fingerprint([ensure_indexed(shard, job.out) for shard in own]),
            "shards": rows,
        }
    write_json(job.out / "_info.json", timm_info(splits))
    manifest = {
        "version": VERSION,
        "settings": job.all_settings(),
        "origin": source["origin"],
        "notes": source["notes"],
        "classes": len(source["classes"]) if source["classes"] is not None else None,
        "skipped": skipped.count(b"\n") + len(dropped),
        "splits": splits,
    }
    write_json(job.out / "manifest.json", manifest)
    return manifest


def timm_info(splits: dict[str, Any]) -> dict[str, Any]:
    """`_info.json` as timm's reader of WebDataset shards takes it: how many samples are in each file."""
    return {
        "splits": {
            split: {
                "name": split,
                "num_samples": what["samples"],
                "filenames": [row["file"] for row in what["shards"]],
                "shard_lengths": [row["samples"] for row in what["shards"]],
            }
            for split, what in splits.items()
        }
    }


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1) + "\n"
    write_bytes(path, lambda file: file.write(text.encode()))


def _summary(job: Job, manifest: dict[str, Any], seconds: float) -> Iterator[str]:
    for split, what in manifest["splits"].items():
        yield (
            f"{split}: {what['samples']} samples in {len(what['shards'])} shards, {what['bytes'] / 1e9:.3g} GB: "
            f"{job.out}/{job.name}-{split}-*.tar"
        )
    if manifest["classes"] is not None:
        yield f"{manifest['classes']} classes: {job.out}/classes.json"
    if manifest["skipped"]:
        reasons = Counter(
            json.loads(line)["reason"] for line in (job.out / "skipped.jsonl").read_bytes().splitlines()
        )
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(5))
        more = ", ..." if len(reasons) > 5 else ""
        yield f"{manifest['skipped']} left out ({why}{more}): {job.out}/skipped.jsonl lists each"
    yield from manifest["notes"]
    yield f"done in {duration(seconds)}"


# ---- the output folder ----


def refuse_others(job: Job, own: set[str]) -> None:
    """ValueError where the folder holds shards of something else, which a reader of `*.tar` would mix in."""
    others = sorted(path.name for path in job.out.glob("*.tar") if path.name not in own)
    if others:
        raise ValueError(
            f"--out {job.out} holds {len(others)} other tar files ({', '.join(others[:3])}), which would be mixed "
            "with the new ones; give an empty or a new folder"
        )


@contextmanager
def locked(job: Job) -> Iterator[None]:
    """One run at a time works in a folder; the lock goes with the process that holds it."""
    with (job.work / "lock").open("w") as file:
        until = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise ValueError(
                        f"another d2v prepare works in {job.out}; wait for it or stop it"
                    ) from error
                time.sleep(0.1)
        yield


def _keep_settings(job: Job) -> None:
    """Goes on with what is there if it was begun with these settings; begins again if no shard was written yet."""
    file = job.work / "settings.json"
    if file.is_file():
        before = json.loads(file.read_bytes())
        if before != json.loads(json.dumps(job.all_settings())):
            if any((job.work / "done").glob("*.json")):
                _refuse_different(job, before, "was begun")
            remove_listing(job)
    write_json(file, job.all_settings())


def remove_listing(job: Job) -> None:
    for path in sorted(
        job.work.iterdir(), key=lambda path: path.name == "settings.json"
    ):  # that of a listing last
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _finished(job: Job) -> dict[str, Any]:
    manifest = _read_manifest(job.out / "manifest.json")
    _refuse_different(job, manifest["settings"], "was made")
    for what in manifest["splits"].values():
        for row in what["shards"]:
            path = job.out / row["file"]
            if not path.is_file() or path.stat().st_size != row["size"]:
                raise ValueError(
                    f"{job.out}/manifest.json is there, but {path.name} is missing or of another size; remove the "
                    "folder, and the same command makes it again"
                )
    shutil.rmtree(job.work, ignore_errors=True)
    job.say(f"{job.out} is there already, complete and with these settings")
    return manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not all(
        isinstance(manifest.get(key), dict) for key in ("settings", "splits")
    ):
        raise ValueError(f"{path} is damaged or of another tool; give an empty or a new folder")
    return manifest


def _refuse_different(job: Job, before: dict[str, Any], verb: str) -> None:
    now = json.loads(json.dumps(job.all_settings()))
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if keys:
        differ = ", ".join(f"{key} {before.get(key)!r}, now {now.get(key)!r}" for key in keys)
        raise ValueError(
            f"{job.out} {verb} with other settings: {differ}. Give the same again, or another --out folder"
        )


def _disk_message(job: Job, error: OSError) -> str:
    if error.errno in FULL:
        return (
            f"the disk of {job.out} is full ({error.strerror}); what is there stays: make room, and the same command "
            "goes on"
        )
    return f"{error.filename or job.out}: {error.strerror or error}"
