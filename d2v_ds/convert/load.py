"""`d2v_ds.load(path)`: a trained model in three lines, from whatever it is stored in.

`read(path)` finds out what lies there, and gives it whole; `load(path)` makes an encoder of it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2v_ds.convert.consolidate import (
    checkpoints_in,
    collect_weights,
    describe_run,
    find_checkpoint,
    tokenizers,
)
from d2v_ds.convert.features import Encoder, Features, mean_pool
from d2v_ds.convert.fit import fit
from d2v_ds.convert.folder import FORMAT
from d2v_ds.convert.sharded import read_weights
from d2v_ds.convert.stored import Stored
from d2v_ds.modalities import samples_class
from d2v_ds.modalities.build import build_model
from d2v_ds.modalities.text.samples import BOS, EOS, PAD
from d2v_ds.model.data2vec import TEACHER
from d2v_ds.model.heads import HEAD, HeadConfig, build_head
from d2v_ds.recipe import Recipe, validated

__all__ = ["Encoder", "Features", "load", "mean_pool", "read"]

ACCEPTED = (
    "a run folder (checkpoints/NAME), a step_* folder in one, an export of ours or of Hugging Face's (a folder with "
    "config.json), or a fairseq checkpoint (a .pt file)"
)

EXPORT = "export of "
FAIRSEQ = "checkpoint.pt"
"""In an export to fairseq."""

log = logging.getLogger(__name__)


def load(
    path: str | Path,
    modality: str | None = None,
    weights: str | None = None,
    fairseq_compat: bool | None = None,
    device: str | torch.device | None = None,
) -> Encoder:
    """The encoder stored at `path`: a run folder (its newest whole checkpoint, of a fine-tuned one the best), a step_*
    folder, an export, a fairseq checkpoint or a Hugging Face folder. `origin` and `repr` of it say which.

    `modality` is needed only if the model has several. `weights`: student or teacher; unsaid, the student's, or
    what the file holds. `fairseq_compat`: padding as the original has it, where it changes features (docs/use.md);
    unsaid, as the run's recipe says, and False for imported weights. `device`: unsaid, the CPU.

    Raises ValueError if nothing known is there, or not what was asked for.
    """
    path = Path(path).expanduser()
    where = None if device is None else check_device(device)
    stored = read(path, weights)
    if weights is None and stored.weights == "both":
        stored = choose_weights(stored, "student", path)
    name = choose_modality(stored.recipe, modality, path)
    encoder = build_encoder(stored, name, path, fairseq_compat).to(where)
    log.info("loaded %r", encoder)
    return encoder


def read(path: str | Path, weights: str | None = None) -> Stored:
    """Everything that is stored at `path`, or of it the student's or the teacher's `weights`.

    Raises ValueError that says what was found and what can be read, or whose weights there are.
    """
    path = Path(path).expanduser()
    if weights not in (None, "student", "teacher", "both"):
        raise ValueError(f"weights={weights!r} must be student, teacher or both")
    if not path.exists():
        raise ValueError(f"{path} does not exist; give {ACCEPTED}")
    if path.is_file():
        stored = read_file(path)
    elif (path / "config.json").is_file():
        stored = read_exported(path)
    elif (path / FAIRSEQ).is_file():
        stored = read_file(path / FAIRSEQ)
    elif checkpoints_in(path):
        stored = read_run(path, weights or "both")
    else:
        raise ValueError(f"{path} holds no checkpoint: {what_lies_in(path)}; give {ACCEPTED}")
    return stored if weights is None else choose_weights(stored, weights, path)


def read_run(path: Path, weights: str) -> Stored:
    checkpoint = find_checkpoint(path)
    return replace(describe_run(checkpoint, weights), tensors=collect_weights(checkpoint, weights))


def read_exported(path: Path) -> Stored:
    """A folder with a config.json, which says whose it is."""
    config = read_config(path)
    if config.get("format") == FORMAT:
        return read_export(path, config)
    if config.get("model_type") or config.get("architectures"):
        from d2v_ds.convert.huggingface import read_huggingface

        return read_huggingface(path)
    raise ValueError(
        f"{path}/config.json has neither format {FORMAT!r} nor a model_type, but "
        f"{', '.join(sorted(map(str, config))[:8]) or 'nothing'}; give {ACCEPTED}"
    )


def read_export(path: Path, config: dict[str, Any]) -> Stored:
    """Ours: config.json, the weights in any dtype, and what the input needs."""
    tensors = read_weights(path)
    recipe = validated(config["recipe"], f"{path}/config.json")
    head = HeadConfig(**config["head"]) if config.get("head") else None
    try:
        tensors = fit(recipe, tensors, head)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Stored(
        recipe,
        tensors,
        EXPORT + (config.get("origin") or f"run, step_{config['step']:08d}").removeprefix(EXPORT),
        files=path,
        head=head,
        step=config["step"],
        weights=config["weights"],
    )


def read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}/config.json is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{path}/config.json holds a {type(config).__name__}, must hold a model's configuration"
        )
    return config


def read_file(path: Path) -> Stored:
    if path.suffix in (".safetensors", ".json", ".model", ".onnx", ".yaml", ".yml"):
        raise ValueError(
            f"{path} is one file of several or no checkpoint; give the folder it lies in, {path.parent}, "
            f"if that is {ACCEPTED}"
        )
    from d2v_ds.convert.fairseq_file import read_fairseq

    return read_fairseq(path)


def what_lies_in(path: Path) -> str:
    names = sorted(p.name + "/" * p.is_dir() for p in path.iterdir())
    if not names:
        return "it is empty"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"it has no step_* folder and no config.json, but {', '.join(names[:5])}{more}"


def choose_weights(stored: Stored, weights: str, path: Path) -> Stored:
    """The student's or the teacher's alone, under the student's names; the student's own where the teacher has none."""
    held = stored.weights
    if weights == held:
        return stored
    if held != "both" and weights == "both":
        raise ValueError(
            f"{path} holds the {held}'s weights alone; of a run, export them with --weights both"
        )
    if held != "both":
        raise ValueError(
            f"{path} holds the {held}'s weights, not the {weights}'s; of a run, export them with "
            f"--weights {weights} or both"
        )
    teacher = {k.removeprefix(TEACHER): t for k, t in stored.tensors.items() if k.startswith(TEACHER)}
    tensors = {k: t for k, t in stored.tensors.items() if not k.startswith(TEACHER)}
    return replace(stored, tensors=tensors | teacher if weights == "teacher" else tensors, weights=weights)


def choose_modality(recipe: Recipe, modality: str | None, path: Path) -> str:
    names = list(recipe.modalities)
    if modality is None and len(names) > 1:
        raise ValueError(f"{path} holds {', '.join(names)}; say which: load(path, modality={names[0]!r})")
    if modality is not None and modality not in names:
        raise ValueError(f"{path} holds {', '.join(names)}, not {modality!r}")
    return modality or names[0]


def check_device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch's ways to say unknown, absent, not compiled in
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device {str(device)!r} cannot be used: {reason}; leave it out for the CPU"
        ) from error


def build_encoder(stored: Stored, name: str, path: Path, fairseq_compat: bool | None = None) -> Encoder:
    """The encoder of one modality: no teacher, no decoder, no mask embedding, not the other modalities."""
    recipe = stored.recipe
    config = recipe.modalities[name].model_copy(deep=True)
    compat = recipe.fairseq_compat if fairseq_compat is None else fairseq_compat
    with torch.device("meta"):  # no storage, no random numbers: every parameter is replaced
        model = build_model(recipe.body, {name: config}, compat, has_teacher=False)
    model.decoders = nn.ModuleDict()
    model.encoders[name].context.mask_token = None
    if "norm.weight" not in stored.tensors:  # of v1 images; classification has a norm of its own in its place
        model.norm = nn.Identity()
    assign(model, stored.tensors, path)
    head = None
    if stored.head is not None:
        with torch.device("meta"):
            head = build_head(stored.head, recipe.body.dim)
        assign(head, {k.removeprefix(HEAD): t for k, t in stored.tensors.items() if k.startswith(HEAD)}, path)
    return Encoder(
        model.eval(),
        name,
        build_samples(name, config, stored.files),
        beside(recipe, stored.files),
        origin=f"{path} ({stored.origin}; the {stored.weights}'s weights)",
        head=head,
        head_config=stored.head,
    )


def beside(recipe: Recipe, files: Path | None) -> Recipe:
    """The recipe with the copy of its `task.vocabulary` that lies beside the weights, if one does."""
    task = recipe.task
    if not (files and task and task.vocabulary and (own := files / Path(task.vocabulary).name).is_file()):
        return recipe
    return recipe.model_copy(update={"task": task.model_copy(update={"vocabulary": str(own)})})


def assign(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """The module's parameters become these tensors, without a copy."""
    names = [name for name, _ in module.named_parameters()]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of {len(names)} tensors: {', '.join(missing[:20])}")
    module.load_state_dict({name: tensors[name] for name in names}, assign=True)
    assert not any(buffer.is_meta for buffer in module.buffers()), "buffers must be made on the CPU"


def build_samples(name: str, config: Any, files: Path | None) -> Any:
    """What prepares input; text without a tokenizer takes ids alone."""
    if not hasattr(config.data, "tokenizer"):
        return samples_class(name)(config, files)
    found = tokenizers(files) if files else []
    if found:
        config.data.tokenizer = str(found[0])
    elif files and (files / "tokenizer.json").is_file() and not (files / "tokenizer_config.json").is_file():
        config.data.tokenizer = str(files / "tokenizer.json")  # of a run or an export of ours
    elif files and ((files / "tokenizer.json").is_file() or (files / "vocab.json").is_file()):
        return samples_class(name)(config, files, ForeignTokenizer(files))
    elif not Path(config.data.tokenizer).is_file():
        return samples_class(name)(config, files, NoTokenizer())
    return samples_class(name)(config, files)


class NoTokenizer:
    """Of weights that came without one."""

    def encode(self, text: str) -> list[int]:
        raise ValueError(
            "these weights came without a tokenizer, so text cannot be read; give token ids, with <s> (0) first and "
            "</s> (2) last, or put its sentencepiece.model beside the weights"
        )


class ForeignTokenizer:
    """The tokenizer of a Hugging Face folder, read when a text first needs it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def encode(self, text: str | bytes) -> list[int]:
        """Ids without <s> and </s>."""
        text = text.decode() if isinstance(text, bytes) else text
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    @cached_property
    def tokenizer(self) -> Any:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ValueError(
                f"the tokenizer of {self.folder} needs transformers (pip install 'd2v_ds[hf]'); or give token ids"
            ) from error
        # no code of the folder is run, and nobody is asked whether it may be
        tokenizer = AutoTokenizer.from_pretrained(str(self.folder), trust_remote_code=False)
        ids = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
        if ids != (BOS, PAD, EOS):
            raise ValueError(
                f"the tokenizer of {self.folder} has {ids} for <s>, <pad>, </s>, must have {(BOS, PAD, EOS)}: it is "
                "not the one of these weights; give token ids"
            )
        return tokenizer
