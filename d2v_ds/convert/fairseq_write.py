"""A model of ours as a fairseq checkpoint, for those whose tools read nothing else.

Plain containers and tensors, so `torch.load(weights_only=True)` opens it. v1 images become a BEiT-like file.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_ds.convert import beit, fairseq, fairseq_v1, fairseq_vision
from d2v_ds.convert.fairseq_settings import (
    NAME_V1,
    refuse,
    refuse_eps,
    settings_v1,
    settings_v2,
    target_settings,
    task_settings,
)
from d2v_ds.convert.fairseq_training import their_training
from d2v_ds.convert.fairseq_tuned import TUNED, TUNED_IN_PLACE, Tuned
from d2v_ds.convert.names import Names
from d2v_ds.convert.stored import Stored
from d2v_ds.modalities.audio.vocabulary import MARK
from d2v_ds.modalities.image.net import sincos_positions
from d2v_ds.model.data2vec import TEACHER
from d2v_ds.model.heads import HEAD
from d2v_ds.recipe import Recipe

FILE = "checkpoint.pt"
DICTIONARY = "dict.ltr.txt"

log = logging.getLogger(__name__)


def write_fairseq(stored: Stored, out: str | Path) -> Path:
    """Writes `checkpoint.pt` into the folder `out`, and `dict.ltr.txt` of what CTC writes, and returns its path.

    Raises ValueError for what fairseq's models cannot hold, before anything is written.
    """
    checkpoint = to_dict(stored)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".tmp-{FILE}"
    torch.save(checkpoint, temporary)
    temporary.replace(out / FILE)
    if stored.head is not None and stored.head.kind == "ctc" and stored.head.labels:
        write_dictionary(stored.head.labels, out / DICTIONARY)
    return out / FILE


def write_dictionary(symbols: tuple[str, ...], path: Path) -> None:
    """A symbol and a count a line, but for the first four, which every dictionary of fairseq has: no text."""
    if not all(MARK.fullmatch(symbol) for symbol in symbols[:4]):
        log.warning(
            "what the CTC head writes is not in the export: of fairseq's dictionaries the first four symbols are "
            "<s>, <pad>, </s> and <unk>, here they are %s; format safetensors keeps them",
            ", ".join(symbols[:4]),
        )
        return
    path.write_text("".join(f"{symbol} 1\n" for symbol in symbols[4:]), encoding="utf-8")


def to_dict(stored: Stored) -> dict[str, Any]:
    """The checkpoint: plain containers, numbers, texts and tensors."""
    recipe = stored.recipe
    views = {config.view for config in recipe.modalities.values()}
    if views == {"visible"}:
        model, state = settings_v2(recipe, has_teacher=stored.weights == "both"), state_v2(stored)
    elif len(recipe.modalities) == 1 and "image" in recipe.modalities:
        if recipe.body.norm_eps != fairseq_vision.EPS or stored.head is not None:
            return beit_dict(stored)
        model, state = vision(stored)
    elif len(recipe.modalities) == 1:
        model, state = settings_v1(recipe), state_v1(stored)
    else:
        raise ValueError(
            f"modalities {', '.join(recipe.modalities)} with view=masked in one model: fairseq has v1 models of one "
            "modality only; export to safetensors"
        )
    root = {
        "common": {"seed": recipe.seed},
        "task": task_settings(recipe),
        "criterion": {"_name": "model"},
        "model": model,
        **their_training(recipe),
    }
    if stored.head is not None:
        root, state = with_head(stored, root, state)
    history = {"criterion_name": "ModelCriterion", "optimizer_name": "FairseqAdam", "lr_scheduler_state": {}}
    updates = stored.step if stored.head is None else stored.head.updates
    return {
        "args": None,
        "cfg": root,
        "model": state,
        "criterion": None,
        "optimizer_history": [] if updates is None else [history | {"num_updates": updates}],
        "task_state": {},
        "extra_state": {},
        "last_optimizer_state": None,
    }


def split(stored: Stored) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Student, teacher (both under the student's names) and head (without `head.`)."""
    student, teacher, head = {}, {}, {}
    for name, tensor in stored.tensors.items():
        if name.startswith(TEACHER):
            teacher[name.removeprefix(TEACHER)] = tensor
        elif name.startswith(HEAD):
            head[name.removeprefix(HEAD)] = tensor
        else:
            student[name] = tensor
    return student, teacher, head


def translate(tensors: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Under their names; ValueError for a tensor that their model has no place for."""
    state = {}
    for name, tensor in tensors.items():
        theirs = names.theirs(name)
        if not theirs:
            raise ValueError(f"'{name}' has no place in fairseq's model; export to safetensors")
        parts = (tensor,) if len(theirs) == 1 else tuple(part.clone() for part in tensor.chunk(len(theirs)))
        state |= dict(zip(theirs, parts, strict=True))
    return state


def state_v2(stored: Stored) -> dict[str, Any]:
    student, teacher, _ = split(stored)
    state = translate_v2(student, stored.recipe)
    if teacher:
        average = translate_v2(teacher, stored.recipe)
        if is_encoder_only(stored.recipe):
            average = {
                name.removeprefix("blocks."): t for name, t in average.items() if "positions" not in name
            }
        state["_ema"] = average
    return state


def is_encoder_only(recipe: Recipe) -> bool:
    """The teacher is the blocks alone, and named relative to them."""
    return all(config.teacher == "blocks" for config in recipe.modalities.values())


def translate_v2(tensors: dict[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    state = translate(tensors, fairseq.NAMES)
    for name in list(state):
        if name.endswith(".alibi_scale"):  # (layers, heads) -> (layers, 1, heads, 1, 1)
            state[name] = state[name][:, None, :, None, None]
    if (
        "audio" in recipe.modalities and recipe.modalities["audio"].position_pre_norm
    ):  # one stack more around it
        nested = (r"(relative_positional_encoder)\.([1-9]\d*)\.0\.", r"\1.1.\2.0.")
        state = {re.sub(*nested, name): tensor for name, tensor in state.items()}
    if "image" in recipe.modalities:
        config = recipe.modalities["image"]
        positions = sincos_positions(recipe.body.dim, config.size // config.patch)[None]
        state["modality_encoders.IMAGE.fixed_positional_encoder.positions"] = positions
    return state


def state_v1(stored: Stored) -> dict[str, Any]:
    """The teacher's part of the file holds the live parts too, as fairseq's does; named relative to the encoder."""
    ((modality, _),) = stored.recipe.modalities.items()
    names = Names(fairseq_v1.PAIRS[modality])
    student, teacher, _ = split(stored)
    state: dict[str, Any] = translate(student, names)
    key, encoder = {
        "audio": ("_ema", "encoder."),
        "text": ("encoder._ema", "encoder.sentence_encoder."),
    }[modality]
    if modality == "text":
        state[fairseq_v1.VERSION] = torch.tensor([3.0])
    if teacher:
        live = {name: tensor for name, tensor in state.items() if name.startswith(encoder)}
        average = live | translate(teacher, names)
        state[key] = {name.removeprefix(encoder): tensor.clone() for name, tensor in average.items()}
    return state


def with_head(
    stored: Stored, root: dict[str, Any], state: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and tensors of fairseq's fine-tuned model around the pre-trained one."""
    is_v1_text = root["model"]["_name"] == NAME_V1["text"]
    name, tuned = next((name, t) for name, t in TUNED.items() if t.kind == stored.head.kind)
    head = translate(split(stored)[2], (TUNED_IN_PLACE if is_v1_text else tuned).head)
    if is_v1_text:
        return root, state | head
    root = root | {"model": {"_name": name, tuned.inner: root} | head_settings(stored, tuned)}
    return root, {tuned.prefix + key: tensor for key, tensor in state.items()} | head


def head_settings(stored: Stored, tuned: Tuned) -> dict[str, Any]:
    if tuned.kind == "image_classification":
        return {
            "num_classes": stored.head.outputs,
            "use_fc_norm": True,
            "prediction_mode": "MEAN_POOLING",
        }
    return {"pooler_activation_fn": "tanh"} if tuned.kind == "sentence_classification" else {}


def vision(stored: Stored) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and tensors of fairseq's port of v1 images, whose norms have another eps than BEiT's."""
    body, image = stored.recipe.body, stored.recipe.modalities["image"]
    refuse_unlike_beit(stored.recipe)
    refuse(image.mask.kind != "rectangle", f"modalities.image.mask.kind={image.mask.kind} must be rectangle")
    student, teacher, _ = split(stored)
    settings = target_settings(stored.recipe) | fairseq_vision.their_settings(body, image)
    return settings, fairseq_vision.their_state(student, teacher)


def refuse_unlike_beit(recipe: Recipe) -> None:
    image = recipe.modalities["image"]
    refuse(
        image.positions == "sincos" or image.extra_tokens != 1 or not recipe.body.norm_first,
        "a BEiT-like model has norms first, one class token and relative positions",
    )


def beit_dict(stored: Stored) -> dict[str, Any]:
    body, config = stored.recipe.body, stored.recipe.modalities["image"]
    refuse_eps("body.norm_eps", body.norm_eps, 1e-6)
    refuse_unlike_beit(stored.recipe)
    student, teacher, head = split(stored)
    checkpoint = {
        "model": beit.their_weights(student | {HEAD + name: tensor for name, tensor in head.items()})
    }
    if teacher:  # the whole model, as there: what the teacher does not own is the student's
        checkpoint["model_ema"] = {
            name: tensor.clone() for name, tensor in beit.their_weights(student | teacher).items()
        }
    checkpoint["args"] = {"imagenet_default_mean_and_std": config.data.mean != (0.5, 0.5, 0.5)}
    return checkpoint
