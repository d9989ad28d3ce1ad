"""Weights of any origin -> our export: one safetensors file, configuration, tokenizer and card.

Checkpoints of any number of ranks are put together without DeepSpeed or a GPU. `export` writes other libraries'
formats too, and calls nothing done that was not read back and compared.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from d2v_ds.convert.check import check_same
from d2v_ds.convert.stored import Stored
from d2v_ds.engine.checkpoint import Checkpoint, newest
from d2v_ds.model.data2vec import TEACHER

FORMAT = "d2v_ds"
FORMATS = ("safetensors", "hf", "fairseq", "onnx")
Weights = Literal["student", "teacher", "both"]
TOKENIZERS = ("*.model", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "dict*.txt")
LICENCE = (
    "These weights were imported: they have the licence of their source, which the file does not tell. If Meta "
    "released them: fairseq's README puts pre-trained models under MIT, but the README of its data2vec those of "
    "images under CC-BY-NC, and so does the repository of v1 images. If they are of somebody else, look there."
)


def find_checkpoint(run: Path) -> Checkpoint:
    """The newest whole checkpoint of a run folder, or the checkpoint folder itself."""
    if (run / "manifest.json").is_file():
        return Checkpoint(run)
    found, problems = newest(run)
    if found is None:
        why = "; ".join(problems) or "it has no step_* folder"
        raise ValueError(
            f"{run} holds no checkpoint: {why}; give a run folder (checkpoints/NAME) or a step_* folder"
        )
    return Checkpoint(found)


def collect_weights(checkpoint: Checkpoint, weights: Weights) -> dict[str, Tensor]:
    """fp32 tensors by name. `teacher` gives the teacher under the student's names, with the student's own
    tensors where the teacher has none (a live feature extractor); `both` keeps the prefix `teacher.`."""
    if weights not in ("student", "teacher", "both"):
        raise ValueError(f"weights={weights!r} must be student, teacher or both")
    names = checkpoint.names()
    students = [name for name in names if not name.startswith(TEACHER)]
    if weights == "both":
        return {name: checkpoint.tensor(name) for name in names}
    if weights == "student":
        return {name: checkpoint.tensor(name) for name in students}
    owned = set(names)
    return {name: checkpoint.tensor(TEACHER + name if TEACHER + name in owned else name) for name in students}


def export(
    path: str | Path,
    out: str | Path,
    weights: Weights | None = None,
    format: str = "safetensors",  # noqa: A002
    modality: str | None = None,
) -> Path:
    """Writes what lies at `path` (anything that d2v_ds.load takes) into the folder `out`; returns it.

    `weights`: unsaid, the student's, or what is there; with format="fairseq", whose files hold both, everything.
    `modality`: which one of a joint model, for hf and onnx, which hold one. Raises ValueError for an unknown format,
    and for a model that the format cannot hold.
    """
    from d2v_ds.convert.load import choose_weights, read  # which reads what is written here

    path, out = Path(path), Path(out)
    check_format(format, modality)
    check_out(out)
    if weights is None and format != "fairseq" and is_run(path):
        weights = "student"  # or the whole teacher would be read for nothing
    stored = read(path, weights)
    if weights is None and format != "fairseq" and stored.weights == "both":
        stored = choose_weights(stored, "student", path)
    if format == "safetensors":
        write_export(stored, out, find_checkpoint(path).loop["applied_steps"] if is_run(path) else None)
    elif format == "fairseq":
        write_checked_fairseq(stored, out)
    elif format == "hf":
        from d2v_ds.convert.huggingface import write_huggingface

        write_huggingface(stored, out, modality=modality, weights=weights)
    else:
        from d2v_ds.convert.onnx import write_onnx

        write_onnx(stored, out, modality=modality, weights=weights)
    return out


def check_format(format: str, modality: str | None) -> None:  # noqa: A002
    if format == "timm":
        raise ValueError(
            "format 'timm' cannot be: a stock timm ViT has its norms before attention and MLP, data2vec's blocks "
            "have them after, so the weights would load and give wrong results; use hf, onnx or safetensors. Images "
            "of 1.0 have norms first, but relative positions and scaled branches, which of timm's models only Beit "
            "has: it loads the names that format fairseq writes (docs/export.md)"
        )
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}, must be one of {', '.join(FORMATS)}")
    if modality is not None and format in ("safetensors", "fairseq"):
        raise ValueError(
            f"modality={modality!r} is for hf and onnx; {format} holds all modalities of a model"
        )


def is_run(path: Path) -> bool:
    return path.is_dir() and not (path / "config.json").is_file()


def write_export(stored: Stored, out: str | Path, applied_steps: int | None = None) -> Path:
    """Writes model.safetensors (fp32), config.json, the tokenizer and a README into `out`; returns the folder.

    It is read back first and gives the same outputs to the bit, or nothing is written (RuntimeError).
    """
    out = Path(out)
    config = {
        "format": FORMAT,
        "version": 1,
        "origin": stored.source,
        "weights": stored.weights,
        "step": stored.step,
        "applied_steps": stored.step if applied_steps is None else applied_steps,
        "head": None if stored.head is None else stored.head.model_dump(mode="json"),
        "recipe": stored.recipe.model_dump(mode="json"),
    }
    with staged(out) as folder:
        save_file(stored.tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        copy_tokenizer(stored, folder)
        write_card(stored, folder, 'd2v_ds.load("THIS_FOLDER")')
        check_export(stored, folder)
    return out


def check_export(stored: Stored, out: Path) -> None:
    from d2v_ds.convert.load import read

    again = read(out)
    changed = [
        name for name, tensor in stored.tensors.items() if not torch.equal(again.tensors[name], tensor)
    ]
    if changed:
        raise RuntimeError(f"what was written gives others for {', '.join(changed[:5])}")
    check_same(stored, again)


def write_checked_fairseq(stored: Stored, out: Path) -> Path:
    from d2v_ds.convert.fairseq_file import read_fairseq, write_fairseq

    with staged(out) as folder:
        file = write_fairseq(stored, folder)
        check_same(stored, read_fairseq(file))
        copy_tokenizer(stored, folder)
        write_card(stored, folder, f'd2v_ds.load("THIS_FOLDER/{file.name}")')
    return out


def check_out(out: Path) -> None:
    """ValueError for a place where no export can lie: a file, below a file, or a run, which it would hide."""
    file = next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise ValueError(f"--out {out} cannot be a folder: {file} is a file; name another one")
    if any(out.glob("step_*")) or (out / "manifest.json").is_file():
        raise ValueError(f"--out {out} is a run; name another folder, such as {out / 'export'}")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside `out`; its files take their place there once all went well, or nothing does."""
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".tmp-") as temporary:
        yield Path(temporary)
        out.mkdir(exist_ok=True)
        for file in Path(temporary).iterdir():
            file.chmod(0o644)  # safetensors makes files that only their owner reads
            file.replace(out / file.name)


def tokenizers(run: Path) -> list[Path]:
    return sorted(run.glob("*.model"))


def copy_tokenizer(stored: Stored, out: Path) -> None:
    for pattern in TOKENIZERS if stored.files else ():
        for file in stored.files.glob(pattern):
            shutil.copyfile(file, out / file.name)


def write_card(stored: Stored, out: Path, load: str) -> None:
    (out / "README.md").write_text(card(stored, load), encoding="utf-8")


def card(stored: Stored, load: str) -> str:
    """A README: whose weights after how many steps on which data, how to use them, whose licence they have."""
    recipe = stored.recipe
    version = "1.0" if any(config.view == "masked" for config in recipe.modalities.values()) else "2.0"
    steps = f" after {stored.step} steps" if stored.step is not None else ""
    data = f" on `{recipe.data}`" if stored.is_own_run else ""
    parameters = sum(tensor.numel() for tensor in stored.tensors.values()) / 1e6
    use = "features = encoder.extract(x)"
    if stored.head is not None:
        use += f"\nanswers = encoder.predict(x)  # {stored.head.kind}, {stored.head.outputs} outputs"
    return (
        f"# {recipe.name}\n\ndata2vec {version} weights ({stored.weights}){steps}{data}: "
        f"{', '.join(recipe.modalities)}, {parameters:.1f} M parameters, fp32. Origin: {stored.source}.\n\n"
        f"```python\nimport d2v_ds\n\nencoder = {load}\n{use}\n```\n"
    ) + ("" if stored.is_own_run else f"\n## Licence\n\n{LICENCE}\n")
