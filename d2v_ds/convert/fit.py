"""Do these tensors belong to the model that a recipe describes? Names and shapes are compared, nothing is guessed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from d2v_ds.modalities.build import build_model
from d2v_ds.model.data2vec import TEACHER
from d2v_ds.model.encoder import ModalityConfig
from d2v_ds.model.heads import HEAD, HeadConfig, build_head
from d2v_ds.model.layers import Body
from d2v_ds.recipe import Recipe

SHOWN = 20
MAX_LAYERS = 1000
MAX_DIM = 100_000
MAX_SIDE = 128
"""Patches in a row: 2048 pixels of 16."""


def shapes(recipe: Recipe, head: HeadConfig | None = None) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the recipe's model, teacher and head included; no storage is made.

    Raises ValueError if there is no such model.
    """
    with torch.device("meta"):
        try:
            model = build_model(recipe.body, recipe.modalities, recipe.fairseq_compat)
        except (RuntimeError, AssertionError) as error:  # sizes that torch cannot take
            raise ValueError(f"the configuration describes no model that can be: {error}") from error
        named = dict(model.named_parameters())
        if head is not None:
            parameters = build_head(head, recipe.body.dim).named_parameters()
            named |= {HEAD + name: parameter for name, parameter in parameters}
    return {name: tuple(parameter.shape) for name, parameter in named.items()}


def fit(
    recipe: Recipe,
    tensors: dict[str, Tensor],
    head: HeadConfig | None = None,
    unknown: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
    theirs: Callable[[str], list[str]] = lambda name: [name],
) -> dict[str, Tensor]:
    """The tensors of the recipe's model, fp32 and each with memory of its own.

    What only pre-training needs may be absent, each part as a whole: the teacher, a modality's decoder and, in a
    fine-tuned model, the mask embedding and BEiT's norm after the last block. A teacher's copies of what it reads
    from the student anyway are left out. `optional`: beginnings of names that this kind of file may lack besides.

    Raises ValueError with the list of what is missing, unexpected (the `unknown` names of the file too) or of
    another shape; `theirs` gives a tensor's names in the file.
    """
    expected = shapes(recipe, head)
    given = {name: tensor for name, tensor in tensors.items() if not is_live_copy(name, expected)}
    for part in (*optional_parts(recipe, head), *optional):
        if not any(name.startswith(part) for name in given):
            expected = {name: shape for name, shape in expected.items() if not name.startswith(part)}
    missing = [say for name in expected if name not in given for say in theirs(name)]
    unexpected = [*unknown, *(say for name in given if name not in expected for say in theirs(name))]
    odd = [
        f"{', '.join(theirs(name))} {tuple(given[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in given and tuple(given[name].shape) != shape
    ]
    problems = [("missing", missing), ("unexpected", unexpected), ("of another shape", odd)]
    if any(names for _, names in problems):
        said = "; ".join(f"{len(names)} {what}: {listed(names)}" for what, names in problems if names)
        raise ValueError(
            f"the tensors do not fit the model that the configuration describes: {said}; is the file complete, and "
            "of data2vec?"
        )
    return {name: owned(theirs(name)[0], given[name]) for name in expected}


def check_sizes(body: Body, configs: dict[str, ModalityConfig]) -> None:
    """ValueError for sizes that no model has: a damaged or malicious file must not fill the memory."""
    sizes = {"depth": (body.depth, MAX_LAYERS), "dim": (body.dim, MAX_DIM)}
    for name, config in configs.items():
        sizes |= {
            f"{name}.prenet_depth": (config.prenet_depth, MAX_LAYERS),
            f"{name}.decoder.layers": (config.decoder.layers, MAX_LAYERS),
            f"{name}.decoder.projection_layers": (config.decoder.projection_layers, MAX_LAYERS),
        }
        if name == "audio":
            sizes["audio.position_depth"] = (config.position_depth, MAX_LAYERS)
            sizes["audio.conv_layers"] = (len(config.conv_layers), MAX_LAYERS)
        if name == "image":
            sizes["image.size / patch"] = (config.size // max(config.patch, 1), MAX_SIDE)
    for key, (size, most) in sizes.items():
        if not 0 <= size <= most:
            raise ValueError(f"{key}={size} must lie in 0..{most}; is the configuration damaged?")


def is_live_copy(name: str, expected: dict[str, tuple[int, ...]]) -> bool:
    """The teacher's copy of a tensor that it does not own: ours reads the student's."""
    return name.startswith(TEACHER) and name not in expected and name.removeprefix(TEACHER) in expected


def optional_parts(recipe: Recipe, head: HeadConfig | None) -> list[str]:
    parts = [TEACHER, *(f"decoders.{name}." for name in recipe.modalities)]
    if head is not None:
        parts += ["norm.", *(f"encoders.{name}.context.mask_token" for name in recipe.modalities)]
    return parts


def owned(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} holds {tensor.dtype}, must be floating point")
    copy = tensor.detach().to(torch.float32).contiguous()
    return copy if copy.untyped_storage().nbytes() == copy.numel() * 4 else copy.clone()


def listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name if len(name) <= 200 else f"{name[:200]}..." for name in names[:SHOWN]) + more
