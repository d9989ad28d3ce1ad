"""Which parameters are decayed, that those with a teacher stand apart, and what clipping does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from d2v_ds.engine.build import parameter_groups
from d2v_ds.engine.step import clip_gradients, finite_gradients
from d2v_ds.modalities.build import build_model
from d2v_ds.model.data2vec import Data2Vec
from d2v_ds.recipe import load_recipe


def build(name: str) -> Data2Vec:
    recipe = load_recipe(name)
    return build_model(recipe.body, recipe.modalities)


def decayed(model: Data2Vec, decay: str) -> dict[str, bool]:
    """Every trainable parameter once."""
    groups = parameter_groups(model, 0.3, decay)
    found = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == {id(p) for p in trained.values()}
    assert set(found.values()) <= {0.0, 0.3}
    return {name: found[id(p)] == 0.3 for name, p in trained.items()}


@pytest.mark.parametrize("name", ["multimodal_tiny", "audio_v1_tiny", "text_v1_tiny", "image_v1_tiny"])
def test_all_means_all(name):
    """As in fairseq's runs: biases, norms, class token and ALiBi scales too."""
    assert all(decayed(build(name), "all").values())


@pytest.mark.parametrize("name", ["multimodal_tiny", "audio_v1_tiny", "text_v1_tiny", "image_v1_tiny"])
def test_matrices_spares_vectors_biases_and_alibi_scales(name):
    for parameter, is_decayed in decayed(build(name), "matrices").items():
        is_vector = parameter.endswith((".bias", "_bias", "alibi_scale", "mask_token", "scale1", "scale2"))
        is_vector |= ".norm" in parameter or parameter.startswith("norm.")
        if "relative_bias" in parameter:  # a table, by position and head
            is_vector = False
        assert is_decayed != is_vector, parameter


@pytest.mark.parametrize(("decay", "number"), [("matrices", 4), ("all", 2)])
def test_parameters_with_a_teacher_have_groups_of_their_own(decay, number):
    model = build("multimodal_tiny")
    followed = {id(student) for _, student, _ in model.followed()}
    groups = parameter_groups(model, 0.3, decay)
    assert len(groups) == number
    for group in groups:
        assert len({id(p) in followed for p in group["params"]}) == 1


def test_compat_with_fairseq_decides_nothing_about_decay():
    recipes = [load_recipe("audio_tiny", [f"fairseq_compat={flag}"]) for flag in ("true", "false")]
    assert [recipe.optim.decay for recipe in recipes] == ["matrices", "matrices"]


@pytest.mark.parametrize("clip", [0.5, 100.0])
def test_gradients_are_clipped_as_torch_does_by_the_norm_that_was_measured(clip: float) -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    engine = SimpleNamespace(module=ours, gradient_clipping=lambda: clip)
    assert finite_gradients(engine)
    clip_gradients(engine)
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
    assert 0.5 < norm < 100 and engine._global_grad_norm == norm
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)
