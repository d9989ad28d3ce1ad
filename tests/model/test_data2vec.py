"""Student and teacher: who owns what, what each may see, where gradients go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny import MODALITIES, TOKENS, build_tiny, draw_noise, make_batch, shake
from torch import Tensor, nn

from d2v_ds.kernels.targets import make_targets
from d2v_ds.model.batch import Batch, make_views
from d2v_ds.model.data2vec import Data2Vec
from d2v_ds.model.layers import draw_layerdrop

DROPOUTS = (
    "body.encoder_dropout=0.3",
    "body.attention_dropout=0.3",
    "body.activation_dropout=0.3",
    "body.post_mlp_dropout=0.3",
    "body.input_dropout=0.3",
    "body.drop_path=[0.1,0.3]",
    "body.layerdrop=0.5",
    "@.prenet_depth=1",
    "@.prenet_dropout=0.3",
    "@.prenet_drop_path=[0.3,0.3]",
    "@.prenet_layerdrop=0.5",
    "@.decoder.input_dropout=0.3",
)
OWNED = {
    "full": ("encoders.{m}.local.", "encoders.{m}.context.", "blocks."),
    "context": ("encoders.{m}.context.", "blocks."),
    "blocks": ("blocks.",),
}


def one_view(modality: str, source: Tensor, masked: list[int]) -> Batch:
    """One mask for all samples."""
    mask = torch.zeros(TOKENS[modality], dtype=torch.bool)
    mask[masked] = True
    return Batch(modality, source, **make_views(mask.expand(source.shape[0], -1)))


def local_of(model: Data2Vec, batch: Batch) -> Tensor:
    return model.encoders[batch.modality].local(batch.source)


def executed_blocks(blocks: nn.ModuleList, run: Callable[[], object]) -> list[int]:
    seen: list[int] = []
    handles = [block.register_forward_hook(lambda *_, i=i: seen.append(i)) for i, block in enumerate(blocks)]
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("scope", OWNED)
def test_the_teacher_is_an_exact_frozen_copy_of_what_its_scope_names(modality: str, scope: str) -> None:
    """Each scope owns its parts whole, nothing else, and never the decoder; memory is its own."""
    model = build_tiny(modality, f"@.teacher={scope}", "@.prenet_depth=1")
    prefixes = tuple(prefix.format(m=modality) for prefix in OWNED[scope])
    expected = {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    followed = list(model.followed())
    assert {name for name, _, _ in followed} == expected
    assert {name for name, _ in model.named_parameters() if name.startswith("teacher.")} == {
        f"teacher.{name}" for name in expected
    }
    for _, student, teacher in followed:
        assert torch.equal(student, teacher) and student.data_ptr() != teacher.data_ptr()
        assert not teacher.requires_grad and student.requires_grad


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_teacher_stays_in_eval_mode(modality: str) -> None:
    """After train(), eval() and train() again, and after train() of the module that holds it."""
    model = build_tiny(modality)
    outer = nn.ModuleList([model])
    for switch in (model.train, model.eval, model.train, outer.train):
        switch()
        assert not any(module.training for module in model.teacher.modules())
    assert all(module.training for module in model.encoders.modules())


@pytest.mark.parametrize("modality", MODALITIES)
def test_targets_have_no_dropout_and_leave_the_student_in_training_mode(modality: str) -> None:
    """Every dropout, drop path and layer drop on: the student's output changes, the targets do not."""
    model = build_tiny(modality, *DROPOUTS).train()
    batch = make_batch(model, modality)
    local = local_of(model, batch).detach()
    first, again = model.make_targets(batch, local), model.make_targets(batch, local)
    assert torch.equal(first, again)
    student = [module for part in (model.encoders, model.blocks, model.decoders) for module in part.modules()]
    assert all(module.training for module in student)
    assert not torch.equal(model.see_views(batch, local), model.see_views(batch, local))
    assert torch.equal(first, model.eval().make_targets(batch, local))


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_gradient_reaches_every_trainable_parameter_and_none_reaches_the_teacher(modality: str) -> None:
    """Prenet blocks included; none is zero everywhere."""
    model = build_tiny(modality, "@.prenet_depth=1").train()
    out = model(make_batch(model, modality))
    (out.loss / out.sample_size).backward()
    missing = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any() or not torch.isfinite(p.grad).all())
    ]
    assert not missing, missing
    assert all(p.grad is None for p in model.teacher.parameters())
    assert not out.target_NJD.requires_grad and not out.targets_BTD.requires_grad


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_loss_at_given_noise_is_the_same_to_the_bit(modality: str) -> None:
    """And differs at other noise, which is drawn anew when none is given."""
    model = build_tiny(modality).train()
    batch = make_batch(model, modality)
    noise = draw_noise(batch)
    assert torch.equal(model(batch, noise).loss, model(batch, noise).loss)
    assert not torch.equal(model(batch, noise).loss, model(batch, 2 * noise).loss)
    assert not torch.equal(model(batch).loss, model(batch).loss)


def test_noise_has_the_configured_spread_and_zero_means_none() -> None:
    """The decoder's input at masked positions: N(0, 0.01) by default."""
    seen: list[Tensor] = []
    for overrides in ((), ("@.mask.noise_std=0",)):
        model = build_tiny("text", *overrides)
        batch = make_batch(model, "text")
        model.decoders["text"].register_forward_hook(lambda _, args, __: seen.append(args[0]))
        model(batch)
    masked = batch.mask_NT
    assert seen[0][masked].std().item() == pytest.approx(0.01, rel=0.02)
    assert not seen[1][masked].any() and seen[1][~masked].any()


def test_the_student_does_not_see_masked_patches_and_the_teacher_does() -> None:
    """New pixels in all masked patches: same student output, same predictions, other targets."""
    model = shake(build_tiny("image")).eval()
    masked = [0, 3, 5, 6, 9, 10, 15]
    source = make_batch(model, "image").source
    other = source.clone()
    for patch in masked:
        row, column = 8 * (patch // 4), 8 * (patch % 4)
        other[:, :, row : row + 8, column : column + 8] += 1.0
    check_visibility(model, *(one_view("image", pixels, masked) for pixels in (source, other)))
    other[:, :, 8:10, 0:2] += 1.0  # patch 4 is visible
    assert_student_differs(model, *(one_view("image", pixels, masked) for pixels in (source, other)))


def test_the_student_does_not_see_masked_ids_and_the_teacher_does() -> None:
    """New ids at all masked positions, the first one included."""
    model = shake(build_tiny("text")).eval()
    masked = [0, 2, 3, 8, 11, 18]
    source = make_batch(model, "text").source
    other = source.clone()
    other[:, masked] = 4 + (other[:, masked] + 7) % 900
    check_visibility(model, *(one_view("text", ids, masked) for ids in (source, other)))
    other[:, 1] += 1
    assert_student_differs(model, *(one_view("text", ids, masked) for ids in (source, other)))


def check_visibility(model: Data2Vec, batch: Batch, other: Batch) -> None:
    noise = draw_noise(batch)
    seen, seen_other = (model.see_views(b, local_of(model, b)) for b in (batch, other))
    assert torch.equal(seen, seen_other)
    out, out_other = model(batch, noise), model(other, noise)
    assert torch.equal(out.pred_NJD, out_other.pred_NJD)
    assert (out.target_NJD - out_other.target_NJD).abs().max() > 0.1


def assert_student_differs(model: Data2Vec, batch: Batch, other: Batch) -> None:
    seen, seen_other = (model.see_views(b, local_of(model, b)) for b in (batch, other))
    assert (seen - seen_other).abs().max() > 1e-3


def test_masked_frames_do_not_reach_the_student_through_the_positional_convolutions() -> None:
    """Of the local features: neighbouring frames share waveform samples."""
    model = shake(build_tiny("audio")).eval()
    batch = one_view("audio", make_batch(model, "audio").source, [0, 4, 5, 6, 7, 13, 22])
    local = local_of(model, batch)
    other = local + 3.0 * batch.mask_NT[:, :, None]
    context = model.encoders["audio"].context
    seen, seen_other = (context(features, batch, True)[0] for features in (local, other))
    assert torch.equal(seen, seen_other)
    whole, whole_other = (context(features, batch, False)[0] for features in (local, other))
    assert (whole - whole_other).abs().max() > 0.1
    other[:, 1, 0] += 1.0  # frame 1 is visible
    assert not torch.equal(seen, context(other, batch, True)[0])


@pytest.mark.parametrize("modality", MODALITIES)
def test_each_view_sees_what_a_batch_of_it_alone_sees(modality: str) -> None:
    """Sample i and view j are row i * M + j, in inputs, predictions and targets."""
    model = shake(build_tiny(modality)).eval()
    batch = make_batch(model, modality)
    noise = draw_noise(batch)
    out = model(batch, noise)
    for row in (0, 1, batch.clones, batch.mask_NT.shape[0] - 1):
        sample = row // batch.clones
        alone = Batch(modality, batch.source[sample : sample + 1], **make_views(batch.mask_NT[row : row + 1]))
        one = model(alone, noise[row : row + 1])
        torch.testing.assert_close(out.pred_NJD[row], one.pred_NJD[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.target_NJD[row], one.target_NJD[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scope", OWNED)
def test_which_local_features_the_teacher_reads_follows_its_scope(scope: str) -> None:
    """`full` embeds the source itself; the others take what the student embedded."""
    model = build_tiny("audio", f"@.teacher={scope}")
    batch = make_batch(model, "audio")
    local = local_of(model, batch).detach()
    same = torch.equal(model.make_targets(batch, local), model.make_targets(batch, local.flip(1)))
    assert same == (scope == "full")


def test_targets_average_the_last_k_shared_blocks_and_no_prenet_block() -> None:
    """The mean of instance-normalised outputs of the last 2 of 4, then layer norm, class token left out."""
    model = shake(build_tiny("image", "@.target.top_k=2", "@.prenet_depth=2")).eval()
    batch = make_batch(model, "image")
    local = local_of(model, batch)
    with torch.no_grad():
        outputs, ffns = model.teach(batch, local)
    assert len(outputs) == len(ffns) == 4
    for source, layers in (("ffn", ffns), ("block", outputs)):
        model.configs["image"].target.source = source
        normed = [nn.functional.instance_norm(x[:, 1:].transpose(1, 2)).transpose(1, 2) for x in layers[-2:]]
        expected = nn.functional.layer_norm(sum(normed) / 2, (96,))
        torch.testing.assert_close(model.make_targets(batch, local), expected, rtol=1e-4, atol=1e-4)
    assert (make_targets(ffns[-1:], skip=1) - make_targets(ffns[-2:], skip=1)).abs().max() > 0.1


def test_shuffled_targets_are_the_next_samples_targets() -> None:
    """The control that leaves nothing about a sample to be learned."""
    plain, shuffled = build_tiny("image"), build_tiny("image", "@.target.shuffle=true")
    batch = make_batch(plain, "image")
    noise = draw_noise(batch)
    out, control = plain(batch, noise), shuffled(batch, noise)
    assert torch.equal(control.targets_BTD[1], out.targets_BTD[0])
    assert torch.equal(control.targets_BTD[0], out.targets_BTD[2])
    assert torch.equal(control.pred_NJD, out.pred_NJD)
    rows = torch.arange(12)[:, None]
    assert torch.equal(control.target_NJD, out.targets_BTD[(rows // 4 - 1) % 3, batch.masked_NJ])


def test_the_loss_is_a_sum_over_masked_tokens_and_channels() -> None:
    """sqrt(D) x MSE a token for images and sound, D x MSE for text; tokens of all views count."""
    for modality in MODALITIES:
        model = build_tiny(modality, "@.loss.cls_weight=0")
        batch = make_batch(model, modality)
        out = model(batch)
        scale = 1.0 if modality == "text" else 96**-0.5
        expected = (out.pred_NJD - out.target_NJD).double().square().sum().item() * scale
        assert out.loss.item() == pytest.approx(expected, rel=1e-5)
        assert out.sample_size.item() == batch.mask_NT.sum().item()


def test_the_class_tokens_loss_is_weighted_by_the_tokens_of_the_pass() -> None:
    """Against the mean of all the sample's targets, from the encoder's output, for every view."""
    model = build_tiny("image")
    batch = make_batch(model, "image")
    out = model(batch)
    cls = model.see_views(batch, local_of(model, batch))[:, 0]
    mean = out.targets_BTD.mean(dim=1).repeat_interleave(4, dim=0)
    expected = 0.01 * out.sample_size * (cls - mean).square().sum() / 96**0.5
    assert out.losses["cls"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert out.loss.item() == pytest.approx((out.losses["cls"] + out.losses["regression"]).item(), rel=1e-6)


def test_the_class_tokens_weight_stays_whatever_the_micro_batch_if_its_rows_are_told() -> None:
    """A step's loss of 4 samples in one pass, in two or in four; else it falls with the rows of a pass."""

    def step(model: Data2Vec, passes: int) -> float:
        whole, n = make_batch(model, "image", samples=4), 4 // passes
        outputs = [
            model(Batch("image", whole.source[i : i + n], **make_views(whole.mask_NT[4 * i : 4 * (i + n)])))
            for i in range(0, 4, n)
        ]
        return (sum(o.losses["cls"] for o in outputs) / sum(o.sample_size for o in outputs)).item()

    told, plain = build_tiny("image", "@.loss.cls_rows=256"), build_tiny("image")
    one = step(plain, 1)
    assert [step(plain, passes) for passes in (2, 4)] == pytest.approx([one / 2, one / 4], rel=1e-4)
    assert [step(told, passes) for passes in (1, 2, 4)] == pytest.approx([one * 256 / 16] * 3, rel=1e-4)


@pytest.mark.parametrize("modality", MODALITIES)
def test_layer_drop_is_a_function_of_the_batchs_seed(modality: str) -> None:
    """Same seed, same blocks, whatever else is random; other seeds, others; none is dropped in eval mode."""
    model = build_tiny(modality, "body.layerdrop=0.5").train()
    batch = make_batch(model, modality)

    def run(seed: int) -> list[int]:
        local = local_of(model, batch)
        return executed_blocks(
            model.blocks, lambda: model.see_views(replace(batch, layerdrop_seed=seed), local)
        )

    kept = []
    for seed in range(8):
        torch.manual_seed(seed)
        first = run(seed)
        assert first == run(seed)
        assert first == [i for i, drop in enumerate(draw_layerdrop(4, 0.5, seed, "body")) if not drop]
        kept.append(tuple(first))
    assert len(set(kept)) > 3
    fewest = kept.index(min(kept, key=len))
    assert len(kept[fewest]) < 4 and model.eval() and run(fewest) == [0, 1, 2, 3]


def test_layer_drop_of_prenet_blocks_has_draws_of_its_own() -> None:
    """And its own rate."""
    model = build_tiny("image", "@.prenet_depth=3", "@.prenet_layerdrop=0.5").train()
    context, batch = model.encoders["image"].context, make_batch(model, "image")
    local = local_of(model, batch)
    for seed in range(6):
        seeded = replace(batch, layerdrop_seed=seed)
        drops = draw_layerdrop(3, 0.5, seed, "prenet")
        assert executed_blocks(context.blocks, lambda b=seeded: context(local, b, True)) == [
            i for i, drop in enumerate(drops) if not drop
        ]
        assert executed_blocks(model.blocks, lambda b=seeded: model.see_views(b, local)) == [0, 1, 2, 3]
    assert any(draw_layerdrop(3, 0.5, s, "prenet") != draw_layerdrop(3, 0.5, s, "body") for s in range(6))


def test_layer_drop_drops_at_its_rate() -> None:
    """2,000 seeds of 4 layers; rates 0 and 1 are none and all."""
    drops = [drop for seed in range(2000) for drop in draw_layerdrop(4, 0.05, seed, "body")]
    assert sum(drops) / len(drops) == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / 8000) ** 0.5)
    assert (
        draw_layerdrop(3, 0.0, 1, "body") == [False] * 3 and draw_layerdrop(3, 1.0, 1, "body") == [True] * 3
    )


def test_one_ema_step_moves_the_teacher_by_its_share_and_copies_what_is_frozen() -> None:
    """teacher + (1 - tau) (student - teacher); the student stays."""
    model = shake(build_tiny("audio", "@.alibi.learned=false"))
    before = {name: (s.clone(), t.clone()) for name, s, t in model.followed()}
    model.follow(0.9)
    for name, student, teacher in model.followed():
        old_student, old_teacher = before[name]
        assert torch.equal(student, old_student)
        expected = old_student if name.endswith("alibi_scale") else 0.9 * old_teacher + 0.1 * old_student
        torch.testing.assert_close(teacher, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("top_k", [0, 5])
def test_more_target_layers_than_shared_blocks_are_an_error(top_k: int) -> None:
    """Prenet blocks do not help."""
    with pytest.raises(ValueError, match=f"modalities.image.target.top_k={top_k} must lie in 1..4"):
        build_tiny("image", f"@.target.top_k={top_k}", "@.prenet_depth=2")
