"""A checkpoint of any number of ranks -> one safetensors file, without DeepSpeed or a GPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from d2v_ds.engine.checkpoint import Checkpoint, newest
from d2v_ds.model.data2vec import TEACHER

FORMAT = "d2v_ds"
Weights = Literal["student", "teacher", "both"]


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


def export(run: str | Path, out: str | Path, weights: Weights = "student") -> Path:
    """Writes model.safetensors (fp32), config.json, what the input needs, and a README; returns the folder.

    At most one tensor more than the result is in memory.
    """
    run, out = Path(run), Path(out)
    checkpoint = find_checkpoint(run)
    tensors = collect_weights(checkpoint, weights)
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / ".tmp-model.safetensors"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)  # safetensors makes files that only their owner reads
    temporary.replace(out / "model.safetensors")
    config = {
        "format": FORMAT,
        "version": 1,
        "weights": weights,
        "step": checkpoint.loop["step"],
        "applied_steps": checkpoint.loop["applied_steps"],
        "recipe": checkpoint.loop["recipe"],
    }
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for file in tokenizers(checkpoint.folder.parent):
        shutil.copyfile(file, out / file.name)
    (out / "README.md").write_text(card(config, sum(t.numel() for t in tensors.values())), encoding="utf-8")
    return out


def tokenizers(run: Path) -> list[Path]:
    return sorted(run.glob("*.model"))


def card(config: dict[str, Any], parameters: int) -> str:
    recipe = config["recipe"]
    return (
        f"# {recipe['name']}\n\ndata2vec 2.0 weights ({config['weights']}) after {config['step']} steps on "
        f"`{recipe['data']}`: {', '.join(recipe['modalities'])}, {parameters / 1e6:.1f} M parameters, fp32.\n\n"
        '```python\nimport d2v_ds\n\nencoder = d2v_ds.load("THIS_FOLDER")\nfeatures = encoder.extract(x)\n```\n'
    )
