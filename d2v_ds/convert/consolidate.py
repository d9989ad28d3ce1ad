"""Weights of any origin -> our export: safetensors, configuration, tokenizer and card.

Checkpoints of any number of ranks are put together without DeepSpeed or a GPU, tensor by tensor, so in the memory of
the largest one. `export` writes other libraries' formats too, and calls nothing done that was not read back and
compared.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from d2v_ds.convert.check import check_same
from d2v_ds.convert.folder import FORMAT, TOKENIZERS, check_out, staged
from d2v_ds.convert.sharded import SHARD_BYTES, Shapes, parse_dtype, write_weights
from d2v_ds.convert.stored import Stored
from d2v_ds.engine.checkpoint import Checkpoint, damage, newest
from d2v_ds.engine.saver import folder_name
from d2v_ds.model.data2vec import TEACHER
from d2v_ds.recipe import Recipe

OWN_HEADS = ("attentive_classification", "utterance_classification")
"""Of which neither transformers nor fairseq has one."""
FORMATS = ("safetensors", "hf", "fairseq", "onnx")
Weights = Literal["student", "teacher", "both"]
log = logging.getLogger(__name__)
LICENCE = (
    "These weights were imported: they have the licence of their source, which the file does not tell. If Meta "
    "released them: fairseq's README puts pre-trained models under MIT, but the README of its data2vec those of "
    "images under CC-BY-NC, and so does the repository of v1 images. If they are of somebody else, look there."
)


def find_checkpoint(run: Path) -> Checkpoint:
    """The newest whole checkpoint of a run folder, of a fine-tuned one the best, or the checkpoint folder itself."""
    if (run / "manifest.json").is_file():
        problem = damage(run)
        if problem:
            raise ValueError(f"{problem}; give another step_* folder, or the run for the newest whole one")
        return Checkpoint(run)
    best = best_checkpoint(run)
    found, problems = (best, []) if best else newest(run)
    if found is not None and problems:
        log.warning("%s; taking %s", "; ".join(problems), found.name)
    if found is None:
        why = "; ".join(problems) or "it has no step_* folder"
        raise ValueError(
            f"{run} holds no checkpoint: {why}; give a run folder (checkpoints/NAME) or a step_* folder"
        )
    return Checkpoint(found)


def best_checkpoint(run: Path) -> Path | None:
    """What best.json of a fine-tuned run names, if it is there and whole; a warning if it is not."""
    if not (run / "best.json").is_file():
        return None
    try:
        best = run / folder_name(json.loads((run / "best.json").read_bytes())["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{run}/best.json is damaged, so which checkpoint is the best is not known; name one, {run}/step_*, or "
            "delete it for the newest"
        ) from error
    problem = damage(best) if best.is_dir() else f"{best} is not there"
    if problem is None:
        return best
    log.warning("best.json names %s as the best checkpoint, but %s; taking the newest", best.name, problem)
    return None


def collect_weights(checkpoint: Checkpoint, weights: Weights) -> dict[str, Tensor]:
    """fp32 tensors by name. `teacher` gives the teacher under the student's names, with the student's own
    tensors where the teacher has none (a live feature extractor); `both` keeps the prefix `teacher.`."""
    return {name: checkpoint.tensor(theirs) for name, theirs in choose_names(checkpoint, weights).items()}


def choose_names(checkpoint: Checkpoint, weights: Weights) -> dict[str, str]:
    """{name in the export: name in the checkpoint}."""
    if weights not in ("student", "teacher", "both"):
        raise ValueError(f"weights={weights!r} must be student, teacher or both")
    names = checkpoint.names()
    if weights == "both":
        return {name: name for name in names}
    owned = {name for name in names if name.startswith(TEACHER)} if weights == "teacher" else set()
    return {
        name: TEACHER + name if TEACHER + name in owned else name
        for name in names
        if not name.startswith(TEACHER)
    }


def export(
    path: str | Path,
    out: str | Path,
    weights: Weights | None = None,
    format: str = "safetensors",  # noqa: A002
    modality: str | None = None,
    dtype: str = "fp32",
) -> Path:
    """Writes what lies at `path` (anything that d2v_ds.load takes) into the folder `out`; returns it.

    `weights`: unsaid, the student's, or what is there; with format="fairseq", whose files hold both, everything.
    `modality`: which one of a joint model, for hf and onnx, which hold one. `dtype`: fp32, bf16 or fp16, of format
    safetensors. Raises ValueError for an unknown format, and for a model that the format cannot hold.
    """
    from d2v_ds.convert.load import choose_weights, read  # which reads what is written here

    path, out = Path(path), Path(out)
    check_format(format, modality)
    check_out(out, format)
    parse_dtype(dtype)
    if format != "safetensors" and dtype != "fp32":
        raise ValueError(
            f"dtype={dtype} is for format safetensors; {format} is written in fp32, leave it out"
        )
    if format == "safetensors" and is_run(path) and checkpoints_in(path):
        return export_run(path, out, weights or "student", dtype)
    if weights is None and format != "fairseq" and is_run(path):
        weights = "student"  # or the whole teacher would be read for nothing
    stored = read(path, weights)
    if weights is None and format != "fairseq" and stored.weights == "both":
        stored = choose_weights(stored, "student", path)
    check_head(stored, format, path)
    if format == "safetensors":
        write_export(stored, out, dtype)
    elif format == "fairseq":
        write_checked_fairseq(stored, out)
    elif format == "hf":
        from d2v_ds.convert.huggingface import write_huggingface

        write_huggingface(stored, out, modality=modality, weights=weights)
    else:
        from d2v_ds.convert.onnx import write_onnx

        write_onnx(stored, out, modality=modality, weights=weights)
    return out


def check_head(stored: Stored, format: str, path: Path) -> None:  # noqa: A002
    """Raises ValueError for a head that the format has no place for."""
    if stored.head is not None and stored.head.kind in OWN_HEADS and format in ("hf", "fairseq"):
        raise ValueError(
            f"{path} has a head of kind {stored.head.kind}, which {format} cannot hold; use format safetensors or onnx"
        )


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


def export_run(path: Path, out: Path, weights: Weights, dtype: str, shard_bytes: int = SHARD_BYTES) -> Path:
    """A checkpoint's weights, without more of them in memory than one tensor."""
    checkpoint = find_checkpoint(path)
    names = choose_names(checkpoint, weights)
    shapes = {name: checkpoint.shape(theirs) for name, theirs in names.items()}
    stored = describe_run(checkpoint, weights)
    with staged(out, "safetensors") as folder:
        write_weights(
            folder, shapes, lambda name: checkpoint.tensor(names[name]), parse_dtype(dtype), shard_bytes
        )
        write_rest(stored, folder, shapes, dtype, checkpoint.loop["applied_steps"])
    return out


def describe_run(checkpoint: Checkpoint, weights: Weights) -> Stored:
    """All of a stored model but its tensors."""
    recipe = Recipe(**checkpoint.loop["recipe"])
    head = recipe.task.head_config if recipe.task else None
    return Stored(
        recipe,
        {},
        f"run, {checkpoint.folder.name}",
        files=checkpoint.folder.parent,
        step=checkpoint.loop["step"] + checkpoint.loop.get("updates_before", 0),
        weights=weights,
        head=None if head is None else head.model_copy(update={"updates": checkpoint.loop["step"]}),
    )


def write_export(stored: Stored, out: str | Path, dtype: str = "fp32") -> Path:
    """Writes the weights, config.json, the tokenizer and a README into `out`; returns the folder.

    It is read back first and, in fp32, gives the same outputs to the bit, or nothing is written (RuntimeError).
    """
    out = Path(out)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.tensors.items()}
    with staged(out, "safetensors") as folder:
        write_weights(folder, shapes, stored.tensors.__getitem__, parse_dtype(dtype))
        write_rest(stored, folder, shapes, dtype, stored.step)
        check_export(stored, folder, parse_dtype(dtype))
    return out


def checkpoints_in(path: Path) -> bool:
    return (path / "manifest.json").is_file() or any(path.glob("step_*"))


def write_rest(stored: Stored, folder: Path, shapes: Shapes, dtype: str, applied_steps: int | None) -> None:
    """What belongs to the weights."""
    config = {
        "format": FORMAT,
        "version": 1,
        "origin": stored.source,
        "weights": stored.weights,
        "dtype": dtype,
        "step": stored.step,
        "applied_steps": applied_steps,
        "head": None if stored.head is None else stored.head.model_dump(mode="json"),
        "recipe": stored.recipe.model_dump(mode="json"),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    copy_tokenizer(stored, folder)
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    (folder / "README.md").write_text(
        card(stored, 'd2v_ds.load("THIS_FOLDER")', parameters, dtype), encoding="utf-8"
    )


def check_export(stored: Stored, out: Path, dtype: torch.dtype) -> None:
    from d2v_ds.convert.load import read

    again = read(out)
    changed = [
        name
        for name, tensor in stored.tensors.items()
        if not torch.equal(again.tensors[name], tensor.to(dtype).float())
    ]
    if changed:
        raise RuntimeError(f"what was written gives others for {', '.join(changed[:5])}")
    if dtype == torch.float32:
        check_same(stored, again)


def write_checked_fairseq(stored: Stored, out: Path) -> Path:
    from d2v_ds.convert.fairseq_file import read_fairseq, write_fairseq

    with staged(out, "fairseq") as folder:
        file = write_fairseq(stored, folder)
        check_same(stored, read_fairseq(file))
        copy_tokenizer(stored, folder)
        write_card(stored, folder, f'd2v_ds.load("THIS_FOLDER/{file.name}")')
    return out


def tokenizers(run: Path) -> list[Path]:
    return sorted(run.glob("*.model"))


def copy_tokenizer(stored: Stored, out: Path) -> None:
    for pattern in TOKENIZERS if stored.files else ():
        for file in stored.files.glob(pattern):
            shutil.copyfile(file, out / file.name)


def write_card(stored: Stored, out: Path, load: str) -> None:
    (out / "README.md").write_text(card(stored, load), encoding="utf-8")


def card(stored: Stored, load: str, parameters: int | None = None, dtype: str = "fp32") -> str:
    """A README: whose weights after how many steps on which data, how to use them, whose licence they have."""
    recipe = stored.recipe
    version = "1.0" if any(config.view == "masked" for config in recipe.modalities.values()) else "2.0"
    steps = f" after {stored.step} steps" if stored.step is not None else ""
    data = f" on `{recipe.data}`" if stored.is_own_run else ""
    if parameters is None:
        parameters = sum(tensor.numel() for tensor in stored.tensors.values())
    use = "features = encoder.extract(x)"
    if stored.head is not None:
        use += f"\nanswers = encoder.predict(x)  # {stored.head.kind}, {stored.head.outputs} outputs"
    return (
        f"# {recipe.name}\n\ndata2vec {version} weights ({stored.weights}){steps}{data}: "
        f"{', '.join(recipe.modalities)}, {parameters / 1e6:.1f} M parameters, {dtype}. Origin: {stored.source}.\n\n"
        f"```python\nimport d2v_ds\n\nencoder = {load}\n{use}\n```\n"
    ) + ("" if stored.is_own_run else f"\n## Licence\n\n{LICENCE}\n")
