"""Small models of each modality, and batches for them made by hand."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from d2v_ds.modalities.build import build_model
from d2v_ds.model.batch import Batch, make_views
from d2v_ds.model.data2vec import Data2Vec
from d2v_ds.model.masking import draw_mask, pad_masks
from d2v_ds.recipe import load_recipe

MODALITIES = ("image", "audio", "text")
TOKENS = {"image": 16, "audio": 23, "text": 19}
PAD = 1
FIXED = (
    "body.dim=96",
    "body.depth=4",
    "body.heads=4",
    "@.clones=4",
    "@.target.top_k=4",
)  # as the tests count


def build_tiny(modality: str, *overrides: str, seed: int = 0) -> Data2Vec:
    """The model of the modality's tiny recipe; overrides may say `@.` for `modalities.<modality>.`."""
    full = [o.replace("@.", f"modalities.{modality}.") for o in (*FIXED, *overrides)]
    recipe = load_recipe(f"{modality}_tiny", full)
    torch.manual_seed(seed)
    return build_model(recipe.body, recipe.modalities)


def shake(model: Data2Vec, seed: int = 0) -> Data2Vec:
    """Moves every weight of student and teacher: fresh zero biases and equal halves hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def draw_source(modality: str, samples: int, tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if modality == "image":
        side = 8 * round(tokens**0.5)
        return torch.randn(samples, 3, side, side, generator=generator)
    if modality == "audio":
        return torch.randn(samples, 400 + 320 * (tokens - 1), generator=generator)
    return torch.randint(4, 1000, (samples, tokens), generator=generator)


def make_batch(model: Data2Vec, modality: str, samples: int = 3, seed: int = 0) -> Batch:
    """Whole samples of equal length with the recipe's masks."""
    config, tokens = model.configs[modality], TOKENS[modality]
    rng = np.random.default_rng(seed)
    masks = np.concatenate([draw_mask(rng, config.clones, tokens, config.mask) for _ in range(samples)])
    return Batch(
        modality, draw_source(modality, samples, tokens, seed), **make_views(torch.from_numpy(masks))
    )


def make_padded(
    model: Data2Vec, modality: str, lengths: tuple[int, ...], seed: int = 0
) -> tuple[Batch, list[Batch]]:
    """Samples of unequal length as one padded batch, and each alone, with the same masks."""
    config, longest = model.configs[modality], max(lengths)
    rng = np.random.default_rng(seed)
    masks = [draw_mask(rng, config.clones, tokens, config.mask) for tokens in lengths]
    sources = [draw_source(modality, 1, tokens, seed + i) for i, tokens in enumerate(lengths)]
    alone = [
        Batch(modality, source, **make_views(torch.from_numpy(mask)))
        for source, mask in zip(sources, masks, strict=True)
    ]
    fill = PAD if modality == "text" else 0
    width = max(source.shape[1] for source in sources)
    padded = torch.full((len(lengths), width), fill, dtype=sources[0].dtype)
    for row, source in zip(padded, sources, strict=True):
        row[: source.shape[1]] = source[0]
    padding = torch.arange(longest)[None] >= torch.tensor(lengths)[:, None]
    return Batch(modality, padded, padding, **make_views(torch.from_numpy(pad_masks(masks)))), alone


def draw_noise(batch: Batch, dim: int = 96, seed: int = 0) -> Tensor:
    """What stands at masked positions in the decoder, at std 1: large enough to be seen in predictions."""
    return torch.randn(*batch.masked_NJ.shape, dim, generator=torch.Generator().manual_seed(seed))
