"""Fresh models: fully initialised, with the published spreads (tests/test_recipe_models.py: their sizes)."""

from __future__ import annotations

import pytest
import torch
from tiny import MODALITIES, build_tiny, make_batch
from torch import nn

from d2v_ds.modalities.build import build_model
from d2v_ds.model.data2vec import Data2Vec
from d2v_ds.model.layers import Body
from d2v_ds.recipe import load_recipe


def released(modality: str, **changes: int) -> Data2Vec:
    """A released base model; each of `changes` goes to the body if it has that field, else to the modality."""
    recipe = load_recipe(f"{modality}_base")
    config = recipe.modalities[modality]
    for key, value in changes.items():
        setattr(recipe.body if key in Body.model_fields else config, key, value)
    config.target.top_k = min(config.target.top_k, recipe.body.depth)
    return build_model(recipe.body, recipe.modalities)


@pytest.mark.parametrize("modality", MODALITIES)
def test_fresh_weights_are_all_initialised(modality: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is filled with NaN first, and none is left."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    assert nn.Linear.__init__.__globals__["torch"].empty(1).isnan()
    model = build_tiny(modality, "@.prenet_depth=1")
    bad = [
        name
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if not torch.isfinite(tensor).all()
    ]
    assert not bad, bad


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_fresh_model_is_a_function_of_the_seed(modality: str) -> None:
    """Equal on all ranks that seed alike."""
    first, again, other = (build_tiny(modality, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.fixture(scope="module")
def base_width() -> dict[str, Data2Vec]:
    """Base models with one block in the body and one before it, and a small vocabulary."""
    torch.manual_seed(0)
    small = {"depth": 1, "prenet_depth": 1}
    return {
        "image": released("image", **small),
        "audio": released("audio", **small),
        "text": released("text", **small, vocabulary=2000),
    }


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("encoders.image.context.extra_tokens", 1.0),
        ("encoders.image.local.proj.weight", 0.0361),
        ("encoders.image.local.proj.bias", 0.0208),
        ("decoders.image.proj.weight", 0.0208),
        ("decoders.image.blocks.1.conv.weight", (3 * 48 * 9) ** -0.5),
        ("encoders.audio.local.convs.0.weight", (2 / 10) ** 0.5),
        ("encoders.audio.local.convs.2.weight", 0.0361),
        ("encoders.audio.local.convs.6.weight", (2 / 1024) ** 0.5),
        ("encoders.audio.local.proj.weight", 0.0255),
        ("encoders.audio.local.proj.bias", 0.0255),
        ("encoders.audio.context.conv_positions.convs.0.conv.weight", (3 * 48 * 19) ** -0.5),
        ("decoders.audio.proj.weight", 0.0295),
        ("decoders.audio.blocks.0.conv.weight", (3 * 48 * 7) ** -0.5),
        ("encoders.text.local.tokens.weight", 0.02),
        ("encoders.text.local.positions.weight", 0.02),
        ("decoders.text.proj.0.weight", 0.02),
        ("decoders.text.proj.2.weight", 0.02),
        ("decoders.text.blocks.0.conv.weight", (3 * 768 * 9) ** -0.5),
    ],
)
def test_fresh_weights_have_the_published_spread(
    base_width: dict[str, Data2Vec], name: str, std: float
) -> None:
    """Standard deviation within 1 % and the error of so many numbers; mean near 0."""
    weight = base_width[name.split(".")[1]].get_parameter(name)
    number = weight.numel()
    assert weight.std().item() == pytest.approx(std, rel=0.01 + 4 * (2 * number) ** -0.5)
    assert abs(weight.mean().item()) < 5 * std * number**-0.5


@pytest.mark.parametrize("modality", MODALITIES)
def test_all_linears_of_blocks_are_bert_like_and_norms_are_neutral(
    base_width: dict[str, Data2Vec], modality: str
) -> None:
    """N(0, 0.02) and zero biases, in the body and in prenet blocks; norms are 1 and 0; ALiBi's scale is 1."""
    model = base_width[modality]
    linears = [
        m
        for blocks in (model.blocks, model.encoders[modality].context.blocks)
        for m in blocks.modules()
        if isinstance(m, nn.Linear)
    ]
    assert len(linears) == 8
    for linear in linears:
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.01) and not linear.bias.any()
        assert linear.weight.abs().max() > 0.06  # normal, not uniform
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        assert (norm.weight == 1).all() and not norm.bias.any()
    if modality == "audio":
        assert (model.encoders["audio"].context.alibi_scale == 1).all()


def test_uniform_and_normal_weights_are_told_apart(base_width: dict[str, Data2Vec]) -> None:
    """Largest value: sqrt(3) standard deviations of a uniform weight, more than 4 of a normal one."""
    names = {
        "encoders.image.local.proj.weight": True,
        "encoders.audio.local.proj.weight": True,
        "decoders.audio.proj.weight": True,
        "decoders.image.proj.weight": True,
        "encoders.audio.local.convs.2.weight": False,
        "decoders.text.proj.2.weight": False,
    }
    for name, is_uniform in names.items():
        weight = base_width[name.split(".")[1]].get_parameter(name)
        largest = (weight.abs().max() / weight.std()).item()
        assert largest == pytest.approx(3**0.5, rel=0.02) if is_uniform else largest > 4, name


def test_padding_rows_of_embeddings_and_text_decoder_biases_are_zero(base_width: dict[str, Data2Vec]) -> None:
    """Row 1 of tokens and positions; 514 rows of positions for 512 tokens."""
    model = base_width["text"]
    local, proj = model.encoders["text"].local, model.decoders["text"].proj
    assert local.positions.weight.shape == (514, 768)
    for table in (local.tokens.weight, local.positions.weight):
        assert not table[1].any() and table[[0, 2]].any(dim=1).all()
    assert not proj[0].bias.any() and not proj[2].bias.any()


@pytest.mark.parametrize(
    ("settings", "zero"),
    [(("zero", 2), [True, True]), (("normal", 2), [False, False]), (("first_zero", 3), [True, False, False])],
)
def test_extra_tokens_start_as_configured(settings: tuple[str, int], zero: list[bool]) -> None:
    """Zero, N(0, 1), or the first zero and the others N(0, 1)."""
    model = build_tiny("image", f"@.extra_tokens_init={settings[0]}", f"@.extra_tokens={settings[1]}")
    tokens = model.encoders["image"].context.extra_tokens[0]
    assert [not token.any() for token in tokens] == zero
    for token in tokens[[not z for z in zero]]:
        assert token.std().item() == pytest.approx(1, rel=0.3)


def test_targets_of_a_fresh_image_model_have_a_spread_near_1() -> None:
    """Mean over channels of the standard deviation over masked tokens: layer norm comes last."""
    model = build_tiny("image")
    targets = model(make_batch(model, "image", samples=8)).target_NJD.flatten(0, 1)
    assert (targets.var(dim=0) + 1e-6).sqrt().mean().item() == pytest.approx(1, abs=0.02)
