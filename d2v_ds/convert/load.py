"""`d2v_ds.load(path)`: a trained model in three lines, from a run folder or an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from d2v_ds.convert.consolidate import FORMAT, collect_weights, find_checkpoint, tokenizers
from d2v_ds.modalities import samples_class
from d2v_ds.modalities.build import build_model
from d2v_ds.model.batch import Batch
from d2v_ds.model.data2vec import TEACHER, Data2Vec
from d2v_ds.recipe import Recipe


class Features(NamedTuple):
    x: Tensor
    """The last block's output without extra tokens, (B, T, D)."""
    layers: list[Tensor]
    """Every shared block's output without extra tokens, each (B, T, D)."""
    pooled: Tensor
    """Mean of `x` over real tokens, (B, D)."""
    mask: Tensor
    """Bool (B, T), True = padding."""


class Encoder(nn.Module):
    """A trained encoder of one modality; `extract(x)` takes raw input."""

    def __init__(self, model: Data2Vec, modality: str, samples: Any, recipe: Recipe):
        super().__init__()
        self.model, self.modality, self.samples, self.recipe = model, modality, samples, recipe

    @torch.no_grad()
    def extract(self, x: Any, all: bool = False) -> Tensor | Features:  # noqa: A002  (the public name)
        """Features (B, T, D) of raw input, or with `all` every layer, pooled features and the padding mask.

        `x`: one item or a list: PIL images (or tensors (3, H, W) already normalised), 16 kHz mono waveforms,
        texts or token ids. Unequal lengths are padded; padding changes nothing.
        """
        batch = self.batch(x)
        outputs, _ = self.model.eval().encode(batch)
        extra = self.model.configs[self.modality].extra_tokens
        layers = [layer[:, extra:] for layer in outputs]
        mask = batch.padding_BT
        if mask is None:
            mask = torch.zeros(layers[-1].shape[:2], dtype=torch.bool, device=layers[-1].device)
        if not all:
            return layers[-1]
        return Features(layers[-1], layers, mean_pool(layers[-1], mask), mask)

    def batch(self, x: Any) -> Batch:
        items = list(x) if is_several(x) else [x]
        prepared = [self.samples.prepare(item) for item in items]
        parameter = next(self.model.parameters())
        return self.samples.pad(prepared).to(parameter.device, parameter.dtype)


def mean_pool(x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    real = (~mask_BT).to(x_BTD.dtype)[:, :, None]
    return (x_BTD * real).sum(dim=1) / real.sum(dim=1)


def is_several(x: Any) -> bool:
    """A list or tuple of items, or a batch of images (B, 3, H, W) or of waveforms or ids (B, S)."""
    if isinstance(x, Tensor):
        return x.ndim in (2, 4)
    return isinstance(x, (list, tuple)) and not (x and isinstance(x[0], int))


def load(path: str | Path, modality: str | None = None, weights: str | None = None) -> Encoder:
    """The encoder stored at `path`: a run folder (its newest checkpoint), a step_* folder, or an export.

    `modality` is needed only if the model has several. `weights`: student or teacher; the student's where
    nothing is said, or what the export holds. Raises ValueError if nothing known is there.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"{path} does not exist; give a run folder such as checkpoints/image_base, or an export"
        )
    if (path / "config.json").is_file() and (path / "model.safetensors").is_file():
        recipe, tensors, files = read_export(path, weights)
    else:
        checkpoint = find_checkpoint(path)
        recipe = Recipe(**checkpoint.loop["recipe"])
        tensors, files = collect_weights(checkpoint, weights or "student"), checkpoint.folder.parent
    name = choose_modality(recipe, modality, path)
    model = build_model(recipe.body, recipe.modalities, recipe.fairseq_compat, has_teacher=False)
    model.load_state_dict({k: v for k, v in tensors.items() if not k.startswith(TEACHER)}, strict=True)
    config = recipe.modalities[name]
    found = tokenizers(files)
    if found and hasattr(config.data, "tokenizer"):
        config.data.tokenizer = str(found[0])
    return Encoder(model.eval(), name, samples_class(name)(config, files), recipe)


def read_export(path: Path, weights: str | None) -> tuple[Recipe, dict[str, Tensor], Path]:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{path}/config.json has format {config.get('format')!r}, must be {FORMAT!r}: "
            "it was not written by `d2v export`"
        )
    held, tensors = config["weights"], load_file(path / "model.safetensors")
    if held != "both" and weights not in (None, held):
        raise ValueError(
            f"{path} holds the {held}'s weights, not the {weights}'s; export the run with --weights {weights} or both"
        )
    if held == "both" and weights == "teacher":
        tensors |= {k.removeprefix(TEACHER): v for k, v in tensors.items() if k.startswith(TEACHER)}
    return Recipe(**config["recipe"]), tensors, path


def choose_modality(recipe: Recipe, modality: str | None, path: Path) -> str:
    names = list(recipe.modalities)
    if modality is None and len(names) > 1:
        raise ValueError(f"{path} holds {', '.join(names)}; say which: load(path, modality={names[0]!r})")
    if modality is not None and modality not in names:
        raise ValueError(f"{path} holds {', '.join(names)}, not {modality!r}")
    return modality or names[0]
