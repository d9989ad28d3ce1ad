"""data2vec 1.0: the student sees all tokens with masks in place, and predicts with a projection."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from d2v_ds.modalities.audio.net import AudioConfig
from d2v_ds.modalities.build import build_model
from d2v_ds.modalities.image.net import ImageConfig, relative_rows
from d2v_ds.modalities.text.net import TextConfig
from d2v_ds.modalities.text.samples import PAD
from d2v_ds.model.batch import Batch, make_masked
from d2v_ds.model.data2vec import Data2Vec
from d2v_ds.model.decoder import DecoderConfig
from d2v_ds.model.layers import Body
from d2v_ds.model.loss import Loss
from d2v_ds.model.masking import Mask, draw_mask, fewest
from d2v_ds.model.targets import Target

DIM, HEADS, DEPTH = 32, 4, 3
CONVS = ((8, 10, 5), *[(8, 3, 2)] * 4, *[(8, 2, 2)] * 2)
MASK_ID = 100


def audio(**changes) -> AudioConfig:
    values = {
        "view": "masked", "clones": 1, "conv_layers": CONVS, "mask": Mask(kind="span", ratio=0.65, length=10),
        "target": Target(top_k=2), "decoder": DecoderConfig(layers=0), "teacher": "norm",
    }  # fmt: skip
    return AudioConfig(**(values | changes))


def text(**changes) -> TextConfig:
    values = {
        "view": "masked", "clones": 1, "vocabulary": MASK_ID + 1, "max_tokens": 64, "embed_dropout": 0.0,
        "mask": Mask(kind="token_span", ratio=0.35, length=4), "loss": Loss(beta=4.0, scale=1.0),
        "target": Target(top_k=2, per_layer="layer"), "decoder": DecoderConfig(dim=DIM, layers=0, projection_layers=2),
        "teacher": "blocks",
    }  # fmt: skip
    return TextConfig(**(values | changes))


def image(**changes) -> ImageConfig:
    values = {
        "view": "masked", "clones": 1, "size": 32, "patch": 4, "positions": "relative", "extra_tokens": 1,
        "extra_tokens_init": "small", "mask": Mask(kind="rectangle", ratio=0.6, length=4),
        "target": Target(top_k=2, per_layer="layer", final=("layer",), source="block"),
        "loss": Loss(beta=2.0, scale=1 / DIM), "decoder": DecoderConfig(layers=0), "teacher": "full",
    }  # fmt: skip
    return ImageConfig(**(values | changes))


def build(modality: str, seed: int = 0, compat: bool = False, **changes) -> Data2Vec:
    torch.manual_seed(seed)
    vision = {"norm_first": True, "layer_scale": 0.1, "qkv_bias": "qv", "norm_eps": 1e-6}
    body = Body(dim=DIM, depth=DEPTH, heads=HEADS, **(vision if modality == "image" else {}))
    config = {"audio": audio, "text": text, "image": image}[modality](**changes)
    return build_model(body, {modality: config}, compat)


def batch_of(model: Data2Vec, modality: str, samples: int = 3, seed: int = 0) -> Batch:
    g, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    tokens = {"audio": 49, "text": 40, "image": 64}[modality]
    source = {
        "audio": lambda: torch.randn(samples, 16000, generator=g),
        "text": lambda: torch.randint(4, MASK_ID, (samples, tokens), generator=g),
        "image": lambda: torch.randn(samples, 3, 32, 32, generator=g),
    }[modality]()
    config = model.configs[modality]
    masks = np.concatenate([draw_mask(rng, config.clones, tokens, config.mask) for _ in range(samples)])
    if config.mask.kind == "span":
        masks = fewest(masks, rng)
    return Batch(modality, source, **make_masked(torch.from_numpy(masks)))


def change(batch: Batch, where_BT: Tensor) -> Batch:
    """Another source at these tokens; of images and text only, whose tokens do not overlap."""
    source = batch.source.clone()
    if batch.modality == "text":
        source[where_BT] = (source[where_BT] + 7) % (MASK_ID - 4) + 4
    else:
        grid = where_BT.view(-1, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
        source = torch.where(grid, -source, source)
    return replace(batch, source=source)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_the_student_sees_nothing_of_masked_tokens_and_the_teacher_all(modality: str):
    """Predictions do not depend on what is masked, targets do; both depend on what is visible."""
    model = build(modality).eval()
    batch = batch_of(model, modality)
    out = model(batch)
    hidden, visible = model(change(batch, batch.mask_NT)), model(change(batch, ~batch.mask_NT))
    assert torch.equal(out.pred_NJD, hidden.pred_NJD)
    assert not torch.allclose(out.target_NJD, hidden.target_NJD, atol=1e-2)
    assert not torch.allclose(out.pred_NJD, visible.pred_NJD, atol=1e-3)
    assert not torch.allclose(out.target_NJD, visible.target_NJD, atol=1e-3)


def test_masked_frames_are_the_mask_embedding_before_the_positional_convolutions():
    """With the same features everywhere outside masks, any features inside give the same prediction."""
    model = build("audio").eval()
    batch = batch_of(model, "audio")
    local = model.encoders["audio"].local(batch.source)
    other = torch.where(batch.mask_NT[:, :, None], local + 5, local)
    assert torch.equal(model.see_views(batch, local), model.see_views(batch, other))
    with torch.no_grad():
        before = model.see_views(batch, local)
        model.encoders["audio"].context.mask_token += 1
    assert not torch.allclose(before, model.see_views(batch, local), atol=1e-3)


@pytest.mark.parametrize("modality", ["audio", "text", "image"])
def test_every_trainable_parameter_of_the_student_gets_a_gradient(modality: str):
    model = build(modality).train()
    out = model(batch_of(model, modality))
    (out.loss / out.sample_size).backward()
    missing = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert missing == []
    assert not any(p.requires_grad or p.grad is not None for p in model.teacher.parameters())


def test_what_the_teacher_owns_follows_the_scopes_of_v1():
    """Audio: layers and input norm, not the positional convolutions; text: layers; images: everything."""
    owned = {m: {name for name, _, _ in build(m).followed()} for m in ("audio", "text", "image")}
    blocks = {n for n, _ in build("audio").named_parameters() if n.startswith("blocks.")}
    assert owned["audio"] == blocks | {f"encoders.audio.context.norm.{k}" for k in ("weight", "bias")}
    assert owned["text"] == blocks
    everything = {n for n, p in build("image").named_parameters() if n.startswith(("encoders.", "blocks."))}
    assert owned["image"] == everything - {"encoders.image.context.mask_token"}
    positional = {n for n, _, _ in build("audio", teacher="context").followed()} - owned["audio"]
    assert positional and all(".conv_positions." in n for n in positional)


def test_a_live_part_of_the_teacher_is_the_students_own_and_has_no_dropout():
    model = build("text", embed_dropout=0.5).train()
    batch = batch_of(model, "text")
    assert torch.equal(model.make_targets(batch), model.make_targets(batch))
    before = model.make_targets(batch)
    with torch.no_grad():
        model.encoders["text"].local.tokens.weight.mul_(-1)
    assert not torch.allclose(before, model.make_targets(batch), atol=1e-2)
    assert model.encoders["text"].local.training


def test_the_released_text_teacher_sees_masked_tokens_only():
    """fairseq_compat brings the fault back: what is visible changes no target, and positions count masked tokens."""
    for compat in (False, True):
        model = build("text", compat=compat).eval()
        batch = batch_of(model, "text")
        changed = change(batch, ~batch.mask_NT)
        assert torch.equal(model(batch).target_NJD, model(changed).target_NJD) == compat
    alone = model.masked_alone(batch)
    assert torch.equal(alone.source == PAD, ~batch.mask_NT) and torch.equal(alone.padding_BT, ~batch.mask_NT)


def test_rows_with_fewer_masked_tokens_count_each_of_theirs_once():
    """The loss of a ragged batch is the sum of the losses of its samples alone."""
    model = build("text").eval()
    batch = batch_of(model, "text", samples=4)
    assert batch.counted_NJ is not None and batch.counted_NJ.sum() == batch.mask_NT.sum()
    together = model(batch)
    alone = [
        model(Batch("text", batch.source[i : i + 1], **make_masked(batch.mask_NT[i : i + 1])))
        for i in range(4)
    ]
    assert together.sample_size == batch.mask_NT.sum()
    torch.testing.assert_close(together.loss, sum(out.loss for out in alone), rtol=1e-5, atol=0)


def test_relative_positions_depend_on_the_distance_alone():
    """Spec of BEiT: (2 * 3 - 1)^2 + 3 rows; the class token has three of its own."""
    rows = relative_rows(3, 1)
    assert rows.shape == (10, 10) and int(rows.max()) == 27
    assert rows[0, 0] == 27 and set(rows[0, 1:].tolist()) == {25} and set(rows[1:, 0].tolist()) == {26}
    patches = rows[1:, 1:].reshape(3, 3, 3, 3)
    assert patches[0, 0, 1, 1] == patches[1, 1, 2, 2] != patches[1, 1, 0, 0]
    assert len(set(patches.flatten().tolist())) == 25


@pytest.mark.parametrize("positions, tables", [("relative", 1), ("relative_per_block", DEPTH)])
def test_relative_biases_reach_their_block(positions: str, tables: int):
    model = build("image", positions=positions).eval()
    context = model.encoders["image"].context
    assert context.relative_bias.shape == (tables, 15**2 + 3, HEADS)
    batch = batch_of(model, "image")
    before = model.encode(batch)[0]
    with torch.no_grad():
        context.relative_bias[-1].normal_()
    changed = [
        not torch.allclose(a, b, atol=1e-4) for a, b in zip(before, model.encode(batch)[0], strict=True)
    ]
    assert changed == ([True] * DEPTH if tables == 1 else [False] * (DEPTH - 1) + [True])


def test_pre_norm_blocks_keep_their_residual_and_start_near_the_identity():
    body = Body(dim=DIM, depth=2, heads=HEADS, norm_first=True, layer_scale=1e-4, qkv_bias="qv")
    model = build_model(body, {"image": image()}).eval()
    batch = batch_of(model, "image")
    outputs, _ = model.encode(batch)
    x, _, _ = model.encoders["image"].context(model.encoders["image"].local(batch.source), batch, False)
    torch.testing.assert_close(outputs[-1], x, rtol=0, atol=1e-3)
    assert not torch.equal(outputs[-1], x) and model.norm(outputs[-1]).std() > 0.5


def test_keys_have_no_bias_where_only_queries_and_values_have():
    body = Body(dim=DIM, depth=1, heads=HEADS, qkv_bias="qv")
    from d2v_ds.model.layers import Attention

    attention, plain = Attention(body), Attention(Body(dim=DIM, depth=1, heads=HEADS))
    with torch.no_grad():
        attention.q_bias.normal_(), attention.v_bias.normal_()
        plain.qkv.weight.copy_(attention.qkv.weight)
        plain.qkv.bias.copy_(torch.cat([attention.q_bias, torch.zeros(DIM), attention.v_bias]))
        plain.proj.load_state_dict(attention.proj.state_dict())
    x = torch.randn(2, 7, DIM)
    torch.testing.assert_close(attention(x, None, None), plain(x, None, None), rtol=1e-5, atol=1e-6)


def test_spans_have_the_stated_share_and_start_where_they_may():
    """p = 0.65, L = 10 masks 42-49 % of 500 frames (spec 5.5); token spans reach the end, audio's fit inside."""
    rng = np.random.default_rng(0)
    audio_mask = draw_mask(rng, 400, 500, Mask(kind="span", ratio=0.65, length=10))
    assert 0.42 < audio_mask.mean() < 0.52
    runs = np.diff(np.flatnonzero(np.diff(np.pad(audio_mask, ((0, 0), (1, 1))).ravel()))).tolist()[::2]
    assert min(runs) >= 10
    text_mask = draw_mask(rng, 400, 512, Mask(kind="token_span", ratio=0.35, length=4))
    assert 0.27 < text_mask.mean() < 0.33 and text_mask[:, -1].mean() > 0.15
    for tokens in range(2, 30):
        mask = draw_mask(rng, 20, tokens, Mask(kind="span", ratio=0.65, length=10))
        assert mask.any(axis=1).all() and not mask.all(axis=1).any()
    with pytest.raises(ValueError, match="too short for masked spans"):
        draw_mask(rng, 1, 1, Mask(kind="span", ratio=0.65, length=10))


def test_rectangles_mask_exactly_120_of_196_patches():
    rng = np.random.default_rng(0)
    mask = draw_mask(rng, 300, 196, Mask(kind="rectangle", ratio=120.5 / 196, length=16))
    assert (mask.sum(axis=1) == 120).all()
    grid = mask.reshape(-1, 14, 14)
    windows = grid[:, :-3, :-3] & grid[:, 3:, :-3] & grid[:, :-3, 3:] & grid[:, 3:, 3:]
    assert windows.sum(axis=(1, 2)).mean() > 30  # scattered tokens would give 121 * 0.61^4 = 17
    share = mask.mean(axis=0).reshape(14, 14)
    assert share[0, 0] < share[0, 7] < share[7, 7]  # rectangles lie inside, so borders are seen more often
