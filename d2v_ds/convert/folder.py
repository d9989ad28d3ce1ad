"""The folder that an export is written into: whole or not at all, and of one export alone.

What was written is put together in a folder beside it and moves in once it was read back. An older export of the same
format goes, with all files that the format may write; a tokenizer, which may have been put there by hand, only if the
new export has its own. Of another format it is an error, since two formats in one folder are read as either.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d2v_ds.convert.sharded import WEIGHT_FILES

FORMAT = "d2v_ds"
TOKENIZERS = ("*.model", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "dict*.txt")
FILES = {
    "safetensors": (*WEIGHT_FILES, "config.json", "README.md"),
    "hf": (
        *(*WEIGHT_FILES, "config.json", "README.md"),
        *(
            "modeling_data2vec2.py",
            "preprocessor_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
        ),
    ),
    "fairseq": ("checkpoint.pt", "dict.ltr.txt", "README.md"),
    "onnx": ("model.onnx", "model.onnx.data", "config.json", "README.md"),
}
"""What each format may write, but for tokenizers."""


def format_of(folder: Path) -> str | None:
    """Of the export that lies there; None if there is none."""
    if (folder / "model.onnx").is_file():
        return "onnx"
    if (folder / "checkpoint.pt").is_file():
        return "fairseq"
    if not (folder / "config.json").is_file():
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return None
    if not isinstance(config, dict):
        return None
    return "safetensors" if config.get("format") == FORMAT else "hf" if "model_type" in config else None


def check_out(out: Path, format: str) -> None:  # noqa: A002
    """ValueError for a place where no export can lie: a file, below a file, a run, which it would hide, or an export
    of another format."""
    file = next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise ValueError(f"--out {out} cannot be a folder: {file} is a file; name another one")
    if any(out.glob("step_*")) or (out / "manifest.json").is_file():
        raise ValueError(f"--out {out} is a run; name another folder, such as {out / 'export'}")
    found = format_of(out)
    if found not in (None, format):
        raise ValueError(
            f"--out {out} holds an export of format {found}, and a folder holds one format: name another "
            f"folder, such as {out.with_name(f'{out.name}_{format}')}, or remove it first"
        )


@contextmanager
def staged(out: Path, format: str) -> Iterator[Path]:  # noqa: A002
    """A folder beside `out`, of its name; its files take their place there once all went well, or nothing does.
    Those of an older export of the format go."""
    check_out(out, format)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".tmp-") as temporary:
        folder = Path(temporary) / (out.name or "export")  # transformers names modules after the folder
        folder.mkdir()
        yield folder
        out.mkdir(exist_ok=True)
        has_tokenizer = bool(matches(folder, TOKENIZERS))
        old = matches(out, FILES[format] + (TOKENIZERS if has_tokenizer else ())) if format_of(out) else set()
        written = sorted(folder.iterdir())
        for file in old - {out / file.name for file in written}:
            file.unlink()
        for file in written:
            file.chmod(0o644)  # safetensors makes files that only their owner reads
            file.replace(out / file.name)


def matches(folder: Path, patterns: tuple[str, ...]) -> set[Path]:
    return {file for pattern in patterns for file in folder.glob(pattern)}
