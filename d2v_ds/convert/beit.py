"""Names and sizes of data2vec v1 for images, whose original is a fork of BEiT (arXiv:2106.08254).

Its files hold no configuration: sizes are read off the tensors, and what no tensor tells (K, masks, loss, tau) is
what the released models were trained with.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from d2v_ds.convert.names import Names
from d2v_ds.modalities import config_class
from d2v_ds.modalities.image.net import relative_rows
from d2v_ds.model.decoder import DecoderConfig
from d2v_ds.model.encoder import ModalityConfig
from d2v_ds.model.layers import Body
from d2v_ds.model.loss import Loss
from d2v_ds.model.masking import Mask
from d2v_ds.model.targets import Target

NAMES = Names(
    [
        ("cls_token", "encoders.image.context.extra_tokens"),
        ("mask_token", "encoders.image.context.mask_token"),
        ("patch_embed.proj.{w}", "encoders.image.local.proj.{w}"),
        ("blocks.{i}.gamma_1", "blocks.{i}.scale1"),
        ("blocks.{i}.gamma_2", "blocks.{i}.scale2"),
        ("blocks.{i}.norm1.{w}", "blocks.{i}.norm1.{w}"),
        ("blocks.{i}.norm2.{w}", "blocks.{i}.norm2.{w}"),
        ("blocks.{i}.attn.qkv.{w}", "blocks.{i}.attn.qkv.{w}"),
        ("blocks.{i}.attn.q_bias", "blocks.{i}.attn.q_bias"),
        ("blocks.{i}.attn.v_bias", "blocks.{i}.attn.v_bias"),
        ("blocks.{i}.attn.proj.{w}", "blocks.{i}.attn.proj.{w}"),
        ("blocks.{i}.mlp.fc1.{w}", "blocks.{i}.mlp.fc1.{w}"),
        ("blocks.{i}.mlp.fc2.{w}", "blocks.{i}.mlp.fc2.{w}"),
        ("norm.{w}", "norm.{w}"),
        ("lm_head.{w}", "decoders.image.proj.{w}"),
        ("fc_norm.{w}", "head.norm.{w}"),
        ("head.{w}", "head.proj.{w}"),
    ]
)
MAX_SIDE = 64
"""Patches in a row: 1024 pixels of 16, whose index of pairs has 17 M entries."""
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
BLOCK_TABLE = "blocks.{}.attn.relative_position_bias_table"
TABLE = "encoders.image.context.relative_bias"
INDEX = re.compile(r"(rel_pos_bias|blocks\.\d+\.attn)\.relative_position_index")


def is_beit(state: dict[str, Any]) -> bool:
    """Whether these names are a BEiT-like model's."""
    return "cls_token" in state and "patch_embed.proj.weight" in state


def our_config(state: dict[str, Tensor]) -> tuple[Body, dict[str, ModalityConfig]]:
    """Our configuration of the model whose tensors these are.

    Raises ValueError, with what is missing or odd, if a size cannot be told from the tensors.
    """
    patch, dim = state["patch_embed.proj.weight"], state["cls_token"].shape[-1]
    depth = depth_of(state)
    if "pos_embed" in state:
        raise ValueError(
            "pos_embed: a model with absolute positions is no data2vec v1 model, which has relative ones"
        )
    tables = [state[name] for name in table_names(state, depth) if name in state]
    fc1 = state.get("blocks.0.mlp.fc1.weight")
    if not tables or fc1 is None:
        missing = BLOCK_TABLE.format(0) if fc1 is not None else "blocks.0.mlp.fc1.weight"
        raise ValueError(
            f"no {missing} or {SHARED_TABLE}: number of heads, image size or width cannot be told; is this a "
            "data2vec v1 vision model?"
        )
    if tables[0].ndim != 2:
        raise ValueError(
            f"a table of relative positions has shape {tuple(tables[0].shape)}, must be (rows, heads)"
        )
    rows, heads = tables[0].shape
    side = (math.isqrt(max(rows - 3, 0)) + 1) // 2
    if (2 * side - 1) ** 2 + 3 != rows or side > MAX_SIDE:
        raise ValueError(
            f"a table of {rows} relative positions is of no square grid of at most {MAX_SIDE} x {MAX_SIDE}: "
            "(2 * side - 1)^2 + 3 are expected, 732 for 14 x 14 patches"
        )
    if patch.ndim != 4 or patch.shape[2] != patch.shape[3] or patch.shape[0] != dim or dim % heads:
        raise ValueError(
            f"patches of shape {tuple(patch.shape)} with {heads} heads do not fit a width of {dim}: they must be "
            f"({dim}, channels, side, side), and heads must divide the width"
        )
    is_large = dim >= 1024
    body = Body(
        dim=dim,
        depth=depth,
        heads=heads,
        mlp_ratio=fc1.shape[0] / dim,
        norm_eps=1e-6,
        norm_first=True,
        layer_scale=(1e-5 if is_large else 1e-4) if "blocks.0.gamma_1" in state else None,
        qkv_bias="all" if "blocks.0.attn.qkv.bias" in state else "qv",
        attention_dropout=0.15 if is_large else 0.05,
        drop_path=(0.0, 0.2 if is_large else 0.25),
    )
    config = config_class("image")(
        view="masked",
        clones=1,
        size=side * patch.shape[2],
        patch=patch.shape[2],
        channels=patch.shape[1],
        positions="relative" if SHARED_TABLE in state else "relative_per_block",
        extra_tokens=state["cls_token"].shape[1],
        extra_tokens_init="small",
        mask=Mask(kind="rectangle", ratio=120 / 196, length=16),
        target=Target(top_k=min(6, depth), per_layer="layer", final=("layer",), source="block"),
        loss=Loss(beta=2.0, scale=1 / dim),  # the mean over elements
        decoder=DecoderConfig(dim=dim, layers=0, groups=1, projection_layers=1),
        teacher="full",
    )
    return body, {"image": config}


def depth_of(state: dict[str, Tensor]) -> int:
    """Blocks, numbered without a gap."""
    found = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    depth = next(i for i in range(len(found) + 1) if str(i) not in found)
    if depth < len(found):
        raise ValueError(f"has {len(found)} blocks, and none of number {depth}; is the file complete?")
    return depth


def table_names(state: dict[str, Tensor], depth: int) -> list[str]:
    return [SHARED_TABLE] if SHARED_TABLE in state else [BLOCK_TABLE.format(i) for i in range(depth)]


def our_weights(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A state dict under our names, and the names that belong to no part of the model.

    Raises ValueError if relative positions that the file holds are others than ours.
    """
    depth = depth_of(state)
    tables = table_names(state, depth)
    weights, unknown = {}, []
    for name, tensor in state.items():
        place = NAMES.ours(name)
        if place is not None:
            is_mask = name == "mask_token"
            weights[place.name] = tensor.reshape(-1) if is_mask else tensor
        elif INDEX.fullmatch(name):
            check_index(name, tensor)
        elif name not in tables:
            unknown.append(name)
    missing = [name for name in tables if name not in state]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}: every block must have a table, or all share one")
    weights[TABLE] = torch.stack([state[name] for name in tables])
    return weights, unknown


def check_index(name: str, index: Tensor) -> None:
    side = math.isqrt(max(index.shape[0] - 1, 0))
    if not torch.equal(index.long(), relative_rows(side, 1).long()):
        raise ValueError(
            f"{name} orders relative positions in another way than BEiT, so the tables do not fit"
        )


def their_names(name: str) -> list[str]:
    """BEiT's name of a tensor of ours; of the average, that in `model_ema`."""
    rest = name.removeprefix("teacher.")
    theirs = [SHARED_TABLE] if rest == TABLE else NAMES.theirs(rest) or [rest]
    return theirs if rest == name else [f"model_ema.{theirs[0]}"]


def their_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ours under BEiT's names; those that BEiT does not have raise ValueError."""
    state = {}
    for name, tensor in weights.items():
        if name == TABLE:
            layers = tensor.shape[0]
            names = [SHARED_TABLE] if layers == 1 else [BLOCK_TABLE.format(i) for i in range(layers)]
            state |= dict(zip(names, (table.clone() for table in tensor), strict=True))
            continue
        theirs = NAMES.theirs(name)
        if not theirs:
            raise ValueError(f"'{name}' has no place in a BEiT-like file")
        state[theirs[0]] = tensor.reshape(1, 1, -1) if theirs[0] == "mask_token" else tensor
    return state
