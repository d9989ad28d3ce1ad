"""Small models of every kind as they are stored, with random weights that hide no mistake."""

from __future__ import annotations

from dataclasses import replace

import torch
from ranks import SAMPLE

from d2v_ds.convert.stored import Stored
from d2v_ds.modalities.build import build_model
from d2v_ds.model.heads import HEAD, HeadConfig, build_head
from d2v_ds.recipe import Recipe, load_recipe

MODALITIES = ("image", "audio", "text")
KINDS = {"image": "image_classification", "audio": "ctc", "text": "sentence_classification"}
SMALL = ("body.dim=48", "body.heads=6", "body.depth=3", "@.target.top_k=2", "@.prenet_depth=1")


def random_weights(recipe: Recipe, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of the recipe's model, biases and norms moved too; the teacher's are others than the student's."""
    torch.manual_seed(seed)
    model = build_model(recipe.body, recipe.modalities, recipe.fairseq_compat)
    return {name: p.detach() + 0.1 * torch.randn(p.shape) for name, p in model.named_parameters()}


def store(name: str, *overrides: str, head: int = 0, seed: int = 0, **changes) -> Stored:
    """The model of a modality's tiny recipe, smaller and with a prenet block, or of a recipe by its name.

    Overrides may say `@.` for `modalities.<modality>.`. `head`: outputs of a fine-tuned head, which has no norm
    before it. `changes`: of what is stored.
    """
    modality = name.split("_")[0]
    wanted = (*SMALL, *overrides) if name == modality else overrides
    recipe_name = f"{name}_tiny" if name == modality else name
    recipe = load_recipe(recipe_name, [o.replace("@.", f"modalities.{modality}.") for o in wanted])
    tensors, config = random_weights(recipe, seed), None
    if head:
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("norm.")}
        config = HeadConfig(kind=KINDS[modality], outputs=head)
        parameters = build_head(config, recipe.body.dim).named_parameters()
        tensors |= {HEAD + key: p.detach() + 0.1 * torch.randn(p.shape) for key, p in parameters}
    stored = Stored(
        recipe, tensors, "run, step_00000120", files=SAMPLE, head=config, step=120, weights="both"
    )
    return replace(stored, **changes)


def store_joint() -> Stored:
    recipe = load_recipe("multimodal_tiny", ["body.dim=48", "body.heads=6"])
    return Stored(
        recipe,
        random_weights(recipe),
        "run, step_00000120",
        files=SAMPLE,
        step=120,
        weights="both",
    )
