"""What do shards hold? Their members, counts and lengths, and a picture of some samples.

The index counts; lengths and pictures come from samples spread evenly over all shards, of which headers alone are
read where that is enough. A member is known by what its bytes are, not by its name; none is ever unpickled.
"""

from __future__ import annotations

import io
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d2v_ds.data import ensure_index
from d2v_ds.data.parallel import Progress, map_shards
from d2v_ds.data.reader import CorruptSample, ShardReader
from d2v_ds.data.shard import ShardIndex
from d2v_ds.modalities.audio.samples import decode_sound, sound_size
from d2v_ds.modalities.image.samples import MAX_PIXELS, UNDECODABLE, decode_image

UNITS = {"image": "pixels a side (geometric mean)", "sound": "seconds", "text": "characters"}
NAMED = {"image": "jpg jpeg png webp", "sound": "flac wav ogg opus mp3", "text": "txt"}
"""What recipes take for an image, a sound or a text by its name."""
COLUMNS = 4
MAX_SHOWN = 300
"""Samples of a sheet: pictures have at most 65,535 rows of pixels, and a tile takes 208."""
MAX_ROWS = 310
MAX_TEXT = 1 << 20  # bytes; of a longer member the beginning is shown
_SHOWN_SECONDS = 60


def preview(
    paths: list[Path],
    out: Path,
    num_shown: int = 12,
    num_measured: int = 1000,
    workers: int | None = None,
    say: Progress | None = print,
) -> dict[str, Any]:
    """Writes the contact sheet and gives what was found; indexes what is not indexed.

    ValueError if `out` is no .png or cannot be written, or a number is below 1.
    """
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out} must end in .png")
    for name, value in (("--samples", num_shown), ("--measured", num_measured)):
        if value < 1:
            raise ValueError(f"{name} {value} must be 1 or more")
    if num_shown > MAX_SHOWN:
        raise ValueError(f"--samples {num_shown} must be at most {MAX_SHOWN}, which one picture has room for")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ValueError(f"--out {out} is a folder, or may not be written; give another name")
    indexes = ensure_index(paths, workers, say)
    starts = np.concatenate([[0], np.cumsum([index.num_samples for index in indexes])])
    chosen = spread(int(starts[-1]), max(num_measured, num_shown))
    shown = {int(chosen[i]) for i in spread(len(chosen), num_shown)}
    jobs = []
    for shard, index in enumerate(indexes):
        rows = chosen[(chosen >= starts[shard]) & (chosen < starts[shard + 1])] - starts[shard]
        if len(rows):
            jobs.append((index, rows.tolist(), {s - int(starts[shard]) for s in shown}))
    looked_at = [sample for found in map_shards(look, jobs, workers, say, "looked at") for sample in found]
    summary = summarise(indexes, looked_at)
    draw(summary, [sample for sample in looked_at if sample["is_shown"]], out)
    return summary | {"picture": str(out)}


def spread(total: int, number: int) -> np.ndarray:
    """At most `number` of range(total), evenly, the first and the last among them."""
    return np.unique(np.linspace(0, total - 1, min(number, total)).round().astype(np.int64))


def look(job: tuple[ShardIndex, list[int], set[int]]) -> list[dict[str, Any]]:
    """For each sample of a shard its key and its members: kind, length, and what is drawn of those that are shown."""
    index, samples, shown = job
    reader, found = ShardReader(index, {}), []
    for sample in samples:
        is_shown = sample in shown
        members, fault = {}, None
        try:
            for extension, content in reader.members(sample).items():
                members[extension] = recognise(content, is_shown)
                for kind, names in NAMED.items():
                    is_named = extension.lower() in names.split() and members[extension]["kind"] != kind
                    if is_named and not (kind == "text" and _is_utf8(content)):
                        members[extension]["fault"] = (
                            f".{extension} that is no {kind}: {members[extension]['what']}"
                        )
        except CorruptSample as error:
            fault = error.reason
        found.append({"key": reader.key(sample), "members": members, "fault": fault, "is_shown": is_shown})
    reader.close()
    return found


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def recognise(content: bytes, is_shown: bool) -> dict[str, Any]:
    """{kind, length, what, [picture | waveform | text]} of a member, by its bytes."""
    for look_as in (_as_image, _as_text, _as_sound):
        if found := look_as(content, is_shown):
            return found
    return {"kind": "bytes", "length": len(content), "what": f"{len(content)} bytes"}


def _as_image(content: bytes, is_shown: bool) -> dict[str, Any] | None:
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height, what = *image.size, f"{image.format} {image.mode}"
    except Image.DecompressionBombError:
        return {
            "kind": "image",
            "length": math.nan,
            "what": "image",
            "fault": f"above the limit of {MAX_PIXELS} pixels",
        }
    except (*UNDECODABLE, ValueError):
        return None
    found = {"kind": "image", "length": math.sqrt(width * height), "what": f"{what} {width}x{height}"}
    if width * height > MAX_PIXELS:
        return found | {"fault": f"above the limit of {MAX_PIXELS} pixels"}
    if is_shown:
        try:
            picture = decode_image(content)
        except ValueError as error:
            return found | {"fault": str(error)}
        picture.thumbnail((256, 256))
        found["picture"] = np.asarray(picture)
    return found


def _as_sound(content: bytes, is_shown: bool) -> dict[str, Any] | None:
    try:
        frames, rate = sound_size(content)
    except ValueError as error:
        if "undecodable" in str(error):
            return None
        return {"kind": "sound", "length": math.nan, "what": "sound", "fault": str(error)}
    found = {"kind": "sound", "length": frames / rate, "what": f"{rate} Hz, {frames / rate:.2f} s"}
    if is_shown:
        try:
            found["waveform"] = decode_sound(content).numpy()[: _SHOWN_SECONDS * 16_000]
        except ValueError as error:
            found["fault"] = str(error)
    return found


def _as_text(content: bytes, is_shown: bool) -> dict[str, Any] | None:
    try:
        text = content[:MAX_TEXT].decode()
    except UnicodeDecodeError as error:
        if len(content) <= MAX_TEXT or error.start < MAX_TEXT - 4:
            return None
        text = content[: error.start].decode()
    if any(ord(letter) < 32 and letter not in "\t\n\r\f" for letter in text[:1000]):
        return None
    length = int(
        (np.frombuffer(content, np.int8) > -65).sum()
    )  # all bytes but those that go on with a character
    found = {"kind": "text", "length": length, "what": f"{length} characters"}
    try:
        value = json.loads(content) if text[:1] in "{[" else None
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        found["what"] = "json: " + ", ".join(map(str, value))
    if is_shown:
        found["text"] = text[:600]
    return found


def summarise(indexes: list[ShardIndex], looked_at: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of all samples, and what those that were looked at are; JSON's own types."""
    total = sum(index.num_samples for index in indexes)
    counts: dict[str, int] = {}
    for index in indexes:
        for extension, count in index.extension_counts.items():
            counts[extension] = counts.get(extension, 0) + count
    members = {
        extension: {"samples": count} | _summarise_member(extension, looked_at)
        for extension, count in sorted(counts.items(), key=lambda item: -item[1])
    }
    return {
        "shards": len(indexes),
        "samples": total,
        "bytes": sum(index.size for index in indexes),
        "looked_at": len(looked_at),
        "members": members,
        "faults": [
            {"key": sample["key"], "reason": reason} for sample in looked_at for reason in _faults(sample)
        ],
    }


def _summarise_member(extension: str, looked_at: list[dict[str, Any]]) -> dict[str, Any]:
    seen = [sample["members"][extension] for sample in looked_at if extension in sample["members"]]
    if not seen:
        return {"kind": "unknown"}
    kinds = [member["kind"] for member in seen]
    kind = max(sorted(set(kinds)), key=kinds.count)
    same = [member for member in seen if member["kind"] == kind]
    lengths = np.array([member["length"] for member in same if math.isfinite(member["length"])])
    found = {"kind": kind, "example": same[0]["what"], "others": len(seen) - len(same)}
    if len(lengths):
        heights, edges = np.histogram(lengths, bins=12)
        found["lengths"] = {
            "unit": UNITS.get(kind, "bytes"),
            "min": float(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "max": float(lengths.max()),
            "edges": edges.tolist(),
            "counts": heights.tolist(),
        }
    return found


def _faults(sample: dict[str, Any]) -> list[str]:
    faults = [member["fault"] for member in sample["members"].values() if "fault" in member]
    return faults + ([sample["fault"]] if sample["fault"] else [])


def describe(found: dict[str, Any]) -> str:
    """The summary in lines for a terminal."""
    lines = [
        f"{found['samples']} samples in {found['shards']} shards, {found['bytes'] / 1e6:.1f} MB; "
        f"{found['looked_at']} looked at",
        "",
        f"{'member':16} {'samples':>9} {'share':>6}  kind",
    ]
    for extension, member in found["members"].items():
        share = f"{100 * member['samples'] / found['samples']:.0f} %"
        others = f" ({member['others']} of those looked at are not)" if member.get("others") else ""
        lines.append(
            f".{extension:15} {member['samples']:>9} {share:>6}  {member['kind']}"
            + (f", for example {member['example']}" if "example" in member else "")
            + others
        )
    for extension, member in found["members"].items():
        if _is_telling(member):
            lines += ["", *_histogram(extension, member["lengths"])]
    lines += [""] + [f"fault: {fault['key']}: {fault['reason']}" for fault in found["faults"][:20]]
    if len(found["faults"]) > 20:
        lines.append(f"and {len(found['faults']) - 20} more faults")
    return "\n".join([*lines, f"wrote {found['picture']}"])


def _histogram(extension: str, lengths: dict[str, Any]) -> list[str]:
    highest = max(lengths["counts"])
    head = (
        f".{extension} in {lengths['unit']}: {lengths['min']:.4g} to {lengths['max']:.4g}, "
        f"median {lengths['median']:.4g}, mean {lengths['mean']:.4g}"
    )
    rows = [
        f"{low:>10.4g} - {high:<10.4g} {'#' * round(40 * count / highest):40} {count}"
        for low, high, count in zip(lengths["edges"], lengths["edges"][1:], lengths["counts"], strict=False)
    ]
    return [head, *rows]


def draw(summary: dict[str, Any], samples: list[dict[str, Any]], out: Path) -> None:
    """A sheet with a row of histograms above, and a tile for each picture, waveform and text of the samples."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tiles = [tile for sample in samples for tile in _tiles(sample)]
    histograms = [(e, m["lengths"]) for e, m in summary["members"].items() if _is_telling(m)]
    above = -(-len(histograms) // COLUMNS)
    room = (MAX_ROWS - above) * COLUMNS
    if len(tiles) > room:
        tiles[room - 1 :] = [(f"{len(tiles) - room + 1} more have no room", {"text": ""})]
    rows = above + -(-len(tiles) // COLUMNS)
    width, height = 4 * COLUMNS, 2.6 * max(rows, 1)
    figure = Figure(
        figsize=(width, height)
    )  # NOTE no layout engine: its time grows with the square of the tiles
    figure.subplots_adjust(0.4 / width, 0.3 / height, 1 - 0.2 / width, 1 - 0.3 / height, 0.15, 0.25)
    FigureCanvasAgg(figure)
    axes = iter(figure.subplots(max(rows, 1), COLUMNS, squeeze=False).flat)
    for extension, lengths in histograms:
        axis = next(axes)
        axis.stairs(lengths["counts"], lengths["edges"], fill=True)
        axis.set_title(_drawable(f".{extension}: {lengths['unit']}").replace("$", r"\$"), fontsize=8)
        axis.tick_params(labelsize=7)
    for _ in range(-len(histograms) % COLUMNS):
        next(axes).axis("off")
    for title, content in tiles:
        _draw_tile(next(axes), title, content)
    for axis in axes:
        axis.axis("off")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # boxes stand for letters that no font has
        figure.savefig(out, dpi=80, metadata={"Software": None})


def _tiles(sample: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(title, what to draw) of each picture, waveform and fault of a sample, and one for all of its texts."""
    key, members = sample["key"], sample["members"]
    tiles = [(f"{key} .{e}", m) for e, m in members.items() if {"picture", "waveform", "fault"} & set(m)]
    tiles += [(key, {"fault": sample["fault"]})] if sample["fault"] else []
    texts = {e: m["text"] for e, m in members.items() if "text" in m}
    if texts:
        names = " ".join(f".{extension}" for extension in texts)
        tiles.append((f"{key} {names}", {"text": "\n".join(texts.values())}))
    return tiles


def _is_telling(member: dict[str, Any]) -> bool:
    """Whether its histogram is one of more than a single value, and not of notes about a sample."""
    if "lengths" not in member or member["example"].startswith("json"):
        return False
    return member["lengths"]["max"] > member["lengths"]["min"]


def _draw_tile(axis: Any, title: str, member: dict[str, Any]) -> None:
    title = _drawable(title if len(title) < 60 else "..." + title[-57:])
    axis.set_title(title.replace("$", r"\$"), fontsize=7)
    if "waveform" in member:
        seconds = np.arange(len(member["waveform"])) / 16_000
        axis.plot(seconds, member["waveform"], linewidth=0.3)
        axis.tick_params(labelsize=6)
        return
    axis.axis("off")
    if "picture" in member:
        axis.imshow(member["picture"])
        return
    text = f"FAULT: {member['fault']}" if "fault" in member else member["text"]
    text = "\n".join(map(_drawable, text.split("\n")))
    wrapped = "\n".join(line[i : i + 60] for line in text.splitlines() for i in range(0, len(line), 60))
    axis.text(
        0, 1, "\n".join(wrapped.splitlines()[:12]), fontsize=6, va="top", family=["monospace", "sans-serif"],
        parse_math=False, color="red" if "fault" in member else "black", transform=axis.transAxes,
    )  # fmt: skip


def _drawable(text: str) -> str:
    """Without what no font has: control characters, bytes of names that are no UTF-8."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
