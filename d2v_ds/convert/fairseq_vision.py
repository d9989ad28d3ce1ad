"""fairseq's own port of data2vec v1 for images (`data2vec_vision`), in and out: BEiT's tensors under other names.

Its norms have eps 1e-5, its teacher may be the encoder alone (patches and class token are the student's then), and
its `final_proj` is trained by nothing: predictions are the encoder's output itself.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from d2v_ds.convert import beit
from d2v_ds.convert.fairseq import drawn, target_config
from d2v_ds.convert.fairseq_defaults import TARGET, merged
from d2v_ds.model.encoder import ModalityConfig
from d2v_ds.model.layers import Body
from d2v_ds.model.loss import Loss
from d2v_ds.model.masking import Mask

NAME = "data2vec_vision"
EPS = 1e-5
TUNED_NAME = "data2vec_image_classification"
DEFAULTS = TARGET | {
    "layer_scale_init_value": 1e-4,
    "num_mask_patches": 75,
    "min_mask_patches_per_block": 16,
    "max_mask_patches_per_block": 196,
    "image_size": 224,
    "patch_size": 16,
    "in_channels": 3,
    "shared_rel_pos_bias": True,
    "drop_path": 0.1,
    "attention_dropout": 0.0,
    "depth": 12,
    "embed_dim": 768,
    "num_heads": 12,
    "end_of_block_targets": True,
    "ema_transformer_only": True,
}
SIZES = ("depth", "embed_dim", "num_heads", "image_size", "patch_size", "in_channels")
RENAMED = [  # (its name, BEiT's), the first that fits
    (r"cls_emb", "cls_token"),
    (r"mask_emb", "mask_token"),
    (r"patch_embed\.conv\.(.+)", r"patch_embed.proj.\1"),
    (r"final_proj\.(.+)", r"lm_head.\1"),
    (r"encoder\.(blocks\.\d+\.mlp)\.0\.(.+)", r"\1.fc1.\2"),
    (r"encoder\.(blocks\.\d+\.mlp)\.2\.(.+)", r"\1.fc2.\2"),
    (r"encoder\.(.+)", r"\1"),
]
NAMED_BACK = [
    (r"cls_token", "cls_emb"),
    (r"mask_token", "mask_emb"),
    (r"patch_embed\.proj\.(.+)", r"patch_embed.conv.\1"),
    (r"lm_head\.(.+)", r"final_proj.\1"),
    (r"(blocks\.\d+\.mlp)\.fc1\.(.+)", r"encoder.\1.0.\2"),
    (r"(blocks\.\d+\.mlp)\.fc2\.(.+)", r"encoder.\1.2.\2"),
    (r"((?:blocks|rel_pos_bias|norm)\..+)", r"encoder.\1"),
]
AVERAGE = "_ema."


def renamed(name: str, pairs: list[tuple[str, str]]) -> str:
    for pattern, template in pairs:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(template)
    return name


def student_and_teacher(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both under BEiT's names; what the teacher has none of is the student's, as it was when the file was written."""
    student = {renamed(k, RENAMED): t for k, t in state.items() if not k.startswith(AVERAGE)}
    average = {k.removeprefix(AVERAGE): t for k, t in state.items() if k.startswith(AVERAGE)}
    is_whole = "cls_emb" in average
    teacher = {renamed(k if is_whole else f"encoder.{k}", RENAMED): t for k, t in average.items()}
    if teacher and not is_whole:
        live = ("cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias")
        teacher |= {name: student[name] for name in live if name in student}
    return student, teacher


def their_names(name: str) -> list[str]:
    """Its name of a tensor of ours; of the teacher's as of a whole model."""
    (theirs,) = beit.their_names(name.removeprefix("teacher."))
    return [(AVERAGE if name.startswith("teacher.") else "") + renamed(theirs, NAMED_BACK)]


def our_config(
    given: dict[str, Any], student: dict[str, Tensor]
) -> tuple[Body, dict[str, ModalityConfig], dict[str, Any]]:
    """Our configuration, and the `model` settings completed. Sizes are read off the tensors, as of every BEiT.

    Raises ValueError for settings that are no such model's, or that the tensors contradict.
    """
    cfg = merged(DEFAULTS, given, "model")
    body, configs = beit.our_config(student)
    image = configs["image"]
    found = (body.depth, body.dim, body.heads, image.size, image.patch, image.channels)
    for key, size in zip(SIZES, found, strict=True):
        if cfg[key] != size:
            raise ValueError(f"fairseq setting model.{key}={cfg[key]}, but the tensors are of {size}")
    body.norm_eps = EPS
    body.attention_dropout, body.drop_path = cfg["attention_dropout"], (0.0, cfg["drop_path"])
    if body.layer_scale is not None:
        body.layer_scale = cfg["layer_scale_init_value"]
    scale = cfg["loss_scale"] if (cfg["loss_scale"] or 0) > 0 else None
    image.loss = Loss(beta=cfg["loss_beta"], scale=scale)
    image.target = target_config(cfg, body.depth)
    ratio = cfg["num_mask_patches"] / (image.size // image.patch) ** 2
    image.mask = Mask(kind="rectangle", **drawn(ratio, cfg["min_mask_patches_per_block"]))
    return body, configs, cfg


def their_settings(body: Body, image: Any) -> dict[str, Any]:
    """The sizes and rates of its `model` section; targets, loss and decay are named alike in all of v1."""
    return {
        "_name": NAME,
        "layer_scale_init_value": body.layer_scale or 0.0,
        "num_mask_patches": round(image.mask.ratio * (image.size // image.patch) ** 2),
        "min_mask_patches_per_block": image.mask.length,
        "image_size": image.size,
        "patch_size": image.patch,
        "in_channels": image.channels,
        "shared_rel_pos_bias": image.positions == "relative",
        "drop_path": body.drop_path[1],
        "attention_dropout": body.attention_dropout,
        "depth": body.depth,
        "embed_dim": body.dim,
        "num_heads": body.heads,
        "ema_transformer_only": False,
    }


def their_state(student: dict[str, Tensor], average: dict[str, Tensor]) -> dict[str, Any]:
    """Tensors of ours as it holds them; the average, if there is one, as of the whole model."""
    state: dict[str, Any] = {renamed(k, NAMED_BACK): t for k, t in beit.their_weights(student).items()}
    if average:
        whole = beit.their_weights(student | average)
        state["_ema"] = {renamed(k, NAMED_BACK): t.clone() for k, t in whole.items()}
    return state
