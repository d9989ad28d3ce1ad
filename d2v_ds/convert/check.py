"""Whether a model that was written gives, read back, the outputs of the one it was written from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from d2v_ds.convert.stored import Stored
from d2v_ds.modalities.build import build_model
from d2v_ds.model.batch import Batch
from d2v_ds.model.data2vec import Data2Vec
from d2v_ds.model.encoder import ModalityConfig
from d2v_ds.model.heads import HEAD, build_head

SECONDS = 0.6


def check_same(written: Stored, again: Stored) -> None:
    """RuntimeError if outputs on noise differ in any bit."""
    ours, theirs = outputs(written), outputs(again)
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"what was written gives {', '.join(theirs)} instead of {', '.join(ours)}")
    for name, x in ours.items():
        if not torch.equal(x, theirs[name]):
            difference = (
                (x - theirs[name]).abs().max().item() if x.shape == theirs[name].shape else float("inf")
            )
            raise RuntimeError(
                f"what was written gives {name} that differ by {difference:.2e}; nothing is kept"
            )


@torch.no_grad()
def outputs(stored: Stored) -> dict[str, Tensor]:
    """What the student (or whose weights these are) makes of noise: features of each modality, logits of the head."""
    model = bare_model(stored)
    found = {}
    for name, config in stored.recipe.modalities.items():
        layers, _ = model.encode(probe(name, config))
        x_BTD = layers[-1][:, config.extra_tokens :]
        found[f"{name} features"] = x_BTD
        if stored.head is not None:
            head = build_head(stored.head, stored.recipe.body.dim)
            head.load_state_dict(
                {k.removeprefix(HEAD): t for k, t in stored.tensors.items() if k.startswith(HEAD)}
            )
            found["logits"] = head(x_BTD)
    return found


def bare_model(stored: Stored) -> Data2Vec:
    """The student with the stored tensors as they are, not copied; parts that they lack have no storage."""
    recipe = stored.recipe
    with torch.device("meta"):
        model = build_model(recipe.body, recipe.modalities, recipe.fairseq_compat, has_teacher=False)
    names = {name for name, _ in model.named_parameters()}
    tensors = {name: tensor for name, tensor in stored.tensors.items() if name in names}
    model.load_state_dict(tensors, strict=False, assign=True)
    if "norm.weight" not in tensors:
        model.norm = nn.Identity()
    return model.eval()


def probe(name: str, config: ModalityConfig) -> Batch:
    """Two samples of noise."""
    rng = torch.Generator().manual_seed(1)
    if name == "image":
        source = torch.randn(2, config.channels, config.size, config.size, generator=rng)
    elif name == "audio":
        source = torch.randn(2, int(16_000 * SECONDS), generator=rng)
    else:
        source = torch.randint(4, config.vocabulary, (2, min(16, config.max_tokens)), generator=rng)
    return Batch(name, source)
