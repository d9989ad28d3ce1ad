"""Weights of any origin -> our export: one safetensors file, configuration, tokenizer and card.

Checkpoints of any number of ranks are put together without DeepSpeed or a GPU. `export` writes other libraries'
formats too, and calls nothing done that was not read back and compared.
"""

from __future__ import annotations

import json
import shutil
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
    "These weights were imported. Their licence is that of their source, which the file does not tell: look there "
    "before you share or sell anything made with them. Of the weights that Meta released, the README of fairseq's "
    "data2vec puts those of 2.0 for images under CC-BY-NC, as does that of the repository of v1 images."
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
) -> Path:
    """Writes what lies at `path` (anything that d2v_ds.load takes) into the folder `out`; returns it.

    `weights`: unsaid, the student's, or what is there; with format="fairseq", whose files hold both, everything.
    Raises ValueError for an unknown format, and for a model that the format cannot hold.
    """
    from d2v_ds.convert.load import choose_weights, read  # which reads what is written here

    path, out = Path(path), Path(out)
    check_format(format)
    if weights is None and format != "fairseq" and is_run(path):
        weights = "student"  # or the whole teacher would be read for nothing
    stored = read(path, weights)
    if weights is None and format != "fairseq" and stored.weights == "both":
        stored = choose_weights(stored, "student", path)
    if format == "safetensors":
        write_export(stored, out, find_checkpoint(path).loop["applied_steps"] if is_run(path) else None)
    elif format == "fairseq":
        from d2v_ds.convert.fairseq_file import read_fairseq, write_fairseq

        file = write_fairseq(stored, out)
        check_same(stored, read_fairseq(file), str(file))
        copy_tokenizer(stored, out)
        write_card(stored, out, f'd2v_ds.load("THIS_FOLDER/{file.name}")')
    elif format == "hf":
        from d2v_ds.convert.huggingface import write_huggingface

        write_huggingface(stored, out)
    else:
        from d2v_ds.convert.onnx import write_onnx

        write_onnx(stored, out)
    return out


def check_format(format: str) -> None:  # noqa: A002
    if format == "timm":
        raise ValueError(
            "format 'timm' cannot be: a stock timm ViT has its norms before attention and MLP, data2vec's blocks "
            "have them after, so the weights would load and give wrong results; use hf, onnx or safetensors"
        )
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}, must be one of {', '.join(FORMATS)}")


def is_run(path: Path) -> bool:
    return path.is_dir() and not (path / "config.json").is_file()


def write_export(stored: Stored, out: str | Path, applied_steps: int | None = None) -> Path:
    """Writes model.safetensors (fp32), config.json, the tokenizer and a README into `out`; returns the folder.

    What was written is read back and gives the same outputs to the bit, or RuntimeError says that it does not.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / ".tmp-model.safetensors"
    save_file(stored.tensors, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)  # safetensors makes files that only their owner reads
    temporary.replace(out / "model.safetensors")
    config = {
        "format": FORMAT,
        "version": 1,
        "origin": stored.origin,
        "weights": stored.weights,
        "step": stored.step,
        "applied_steps": stored.step if applied_steps is None else applied_steps,
        "head": None if stored.head is None else stored.head.model_dump(mode="json"),
        "recipe": stored.recipe.model_dump(mode="json"),
    }
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    copy_tokenizer(stored, out)
    write_card(stored, out, 'd2v_ds.load("THIS_FOLDER")')
    check_export(stored, out)
    return out


def check_export(stored: Stored, out: Path) -> None:
    from d2v_ds.convert.load import read

    again = read(out)
    changed = [
        name for name, tensor in stored.tensors.items() if not torch.equal(again.tensors[name], tensor)
    ]
    if changed:
        raise RuntimeError(
            f"{out} was written, but read back {', '.join(changed[:5])} are others: do not use it"
        )
    check_same(stored, again, str(out))


def tokenizers(run: Path) -> list[Path]:
    return sorted(run.glob("*.model"))


def copy_tokenizer(stored: Stored, out: Path) -> None:
    if stored.files is None or stored.files.resolve() == out.resolve():
        return
    for pattern in TOKENIZERS:
        for file in stored.files.glob(pattern):
            shutil.copyfile(file, out / file.name)


def write_card(stored: Stored, out: Path, load: str) -> None:
    (out / "README.md").write_text(card(stored, load), encoding="utf-8")


def card(stored: Stored, load: str) -> str:
    """A README: whose weights after how many steps on which data, how to use them, whose licence they have."""
    recipe = stored.recipe
    version = "1.0" if any(config.view == "masked" for config in recipe.modalities.values()) else "2.0"
    is_ours = stored.origin.startswith("run")
    steps = f" after {stored.step} steps" if stored.step is not None else ""
    data = f" on `{recipe.data}`" if is_ours else ""
    parameters = sum(tensor.numel() for tensor in stored.tensors.values()) / 1e6
    use = "features = encoder.extract(x)"
    if stored.head is not None:
        use += f"\nanswers = encoder.predict(x)  # {stored.head.kind}, {stored.head.outputs} outputs"
    return (
        f"# {recipe.name}\n\ndata2vec {version} weights ({stored.weights}){steps}{data}: "
        f"{', '.join(recipe.modalities)}, {parameters:.1f} M parameters, fp32. Origin: {stored.origin}.\n\n"
        f"```python\nimport d2v_ds\n\nencoder = {load}\n{use}\n```\n"
    ) + ("" if is_ours else f"\n## Licence\n\n{LICENCE}\n")
