"""data2vec 2.0 (arXiv:2212.07525) and 1.0 (arXiv:2202.03555): student and teacher in one module.

Version 1.0 is the same method with `view="masked"`: the student sees all tokens, a learned embedding at the
masked ones, and its decoder is a projection without convolutions.

The student looks at M masked views, the teacher, an exponential moving average of the student, at the whole
sample; the loss compares them at the masked positions. One module holds both, so an engine that partitions
parameters partitions the teacher too; who owns the averaging is d2v_ds.engine.ema.

Shapes: B samples, M views, N = B * M, T tokens, K kept, J masked, E extra tokens, D dim.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from d2v_ds.kernels.regression import gather_targets, regress
from d2v_ds.kernels.targets import make_targets
from d2v_ds.model.batch import Batch
from d2v_ds.model.decoder import Decoder, fill_in
from d2v_ds.model.encoder import ModalityConfig, ModalityEncoder
from d2v_ds.model.layers import Body, build_blocks, draw_layerdrop, run_blocks, walk_blocks
from d2v_ds.model.loss import regression

TEACHER = "teacher."


class Observed(NamedTuple):
    """What else a look at the model's health needs; no gradient."""

    layers_BTD: Tensor
    """Mean of the layers that targets are made of, before any norm."""
    hidden_NKD: Tensor
    """The student's output for the tokens that it sees."""
    local_BTD: Tensor
    """The student's tokens of whole samples, before positions and context."""


class Output(NamedTuple):
    """What one micro-batch gives; `loss` is a sum, to be divided by the step's total `sample_size`."""

    loss: Tensor
    sample_size: Tensor
    """Masked tokens that count, over all views."""
    losses: dict[str, Tensor]
    """The summed parts of `loss` by name, detached."""
    pred_NJD: Tensor
    masked_NJ: Tensor
    counts_NJ: Tensor | None
    """Bool, which masked tokens count; None = all."""
    targets_BTD: Tensor
    """The targets of the whole samples, fp32."""
    observed: Observed | None
    """If `is_observed` was asked for."""

    @property
    def target_NJD(self) -> Tensor:
        """The targets at the masked positions of every view; a copy, so made when asked for."""
        return gather_targets(self.targets_BTD, self.masked_NJ)


class Data2Vec(nn.Module):
    """`forward(batch)` is one pre-training pass; `encode(batch)` gives features of whole samples."""

    def __init__(
        self,
        body: Body,
        configs: dict[str, ModalityConfig],
        encoders: dict[str, ModalityEncoder],
        decoders: dict[str, Decoder],
        fairseq_compat: bool = False,
    ):
        super().__init__()
        self.configs = configs
        self.layerdrop = body.layerdrop
        self.fairseq_compat = fairseq_compat
        self.encoders = nn.ModuleDict(encoders)
        self.input_dropout = nn.Dropout(body.input_dropout)
        self.blocks = build_blocks(body, body.depth, body.drop_path)
        self.norm = nn.LayerNorm(body.dim, eps=body.norm_eps) if body.norm_first else nn.Identity()
        self.decoders = nn.ModuleDict(decoders)
        for name, config in configs.items():
            if not 1 <= config.target.top_k <= body.depth:
                raise ValueError(
                    f"modalities.{name}.target.top_k={config.target.top_k} must lie in 1..{body.depth}, "
                    "the number of shared blocks; prenet blocks give no targets"
                )
            if config.loss.cls_weight and not config.extra_tokens:
                raise ValueError(
                    f"modalities.{name}.loss.cls_weight={config.loss.cls_weight} needs a class token; "
                    f"set modalities.{name}.extra_tokens=1, or the weight to 0"
                )
        self.teacher: nn.Module | None = None

    def build_teacher(self) -> None:
        """Makes the teacher an exact, frozen copy of the parts of the student it follows; call after init."""
        encoders = nn.ModuleDict()
        for name, config in self.configs.items():
            if config.teacher == "full":
                encoders[name] = copy.deepcopy(self.encoders[name])
            elif config.teacher in ("context", "norm"):
                encoders[name] = nn.ModuleDict({"context": copy.deepcopy(self.encoders[name].context)})
            if name in encoders:
                context = encoders[name]["context"] if config.teacher != "full" else encoders[name].context
                context.mask_token = None  # a teacher sees no mask
                if config.teacher == "norm":
                    context.conv_positions = None
        self.teacher = nn.ModuleDict({"encoders": encoders, "blocks": copy.deepcopy(self.blocks)})
        self.teacher.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Data2Vec:
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()  # a teacher has no dropout, whatever the engine asks for
        return self

    def forward(self, batch: Batch, noise_NJD: Tensor | None = None, is_observed: bool = False) -> Output:
        """Loss of one micro-batch. `noise_NJD` replaces the decoder's random input (tests)."""
        config = self.configs[batch.modality]
        encoder = self.encoders[batch.modality]

        # once a sample; where masks lie in the source itself (v1 text), student and teacher embed their own
        local_BTD = encoder.local(batch.source) if encoder.mask_id is None else None
        layers = self.teacher_layers(batch, local_BTD)  # teacher: whole, no grad
        targets_BTD = self.normalise_targets(batch, layers)
        observed_BTD = self.mean_layers(batch, layers) if is_observed else None
        del layers  # the student's pass needs the memory
        hidden_NED = self.see_views(batch, local_BTD)  # student: M masked views
        pred_NJD = self.predict(batch, hidden_NED, noise_NJD)  # decoder: masked positions

        counts_NJ = self.counted(batch)
        beta, factor = config.loss.beta, config.loss.factor(pred_NJD.shape[2])
        error = regress(pred_NJD, targets_BTD, batch.masked_NJ, counts_NJ, beta=beta, scale=factor)
        sample_size = (
            error.new_full((), batch.masked_NJ.numel()) if counts_NJ is None else counts_NJ.sum().float()
        )
        losses = {"regression": error}
        if config.loss.cls_weight:
            cls = regression(
                hidden_NED[:, config.extra_tokens - 1], self.mean_target(batch, targets_BTD), config.loss
            )
            correction = (config.loss.cls_rows or len(cls)) / len(cls)
            losses["cls"] = cls.sum() * (config.loss.cls_weight * correction) * sample_size
        loss = sum(losses.values())
        return Output(
            loss,
            sample_size,
            {k: v.detach() for k, v in losses.items()},
            pred_NJD.detach(),
            batch.masked_NJ,
            counts_NJ,
            targets_BTD,
            self.observe(batch, observed_BTD, hidden_NED, local_BTD) if is_observed else None,
        )

    def make_targets(self, batch: Batch, local_BTD: Tensor | None = None) -> Tensor:
        """The teacher's normalised mean of layers for whole samples; (B, T, D) fp32."""
        return self.normalise_targets(batch, self.teacher_layers(batch, local_BTD))

    @torch.no_grad()
    def teacher_layers(self, batch: Batch, local_BTD: Tensor | None = None) -> list[Tensor]:
        """The K outputs of the teacher that targets are made of, for whole samples; each (B, E + T, D)."""
        target = self.configs[batch.modality].target
        if self.fairseq_compat and self.encoders[batch.modality].mask_id is not None:
            batch = self.masked_alone(batch)
        outputs, ffns = self.teach(batch, local_BTD)
        return (ffns if target.source == "ffn" else outputs)[-target.top_k :]

    @torch.no_grad()
    def normalise_targets(self, batch: Batch, layers: list[Tensor]) -> Tensor:
        target = self.configs[batch.modality].target
        targets_BTD = make_targets(
            layers,
            per_layer=target.per_layer,
            final=target.final,
            skip=self.configs[batch.modality].extra_tokens,
            padding_BT=None if self.fairseq_compat else batch.padding_BT,
        )
        return targets_BTD.roll(1, dims=0) if target.shuffle else targets_BTD

    def mean_layers(self, batch: Batch, layers: list[Tensor]) -> Tensor:
        """(B, T, D) fp32, before any norm."""
        return sum(layer[:, self.configs[batch.modality].extra_tokens :].float() for layer in layers) / len(
            layers
        )

    @torch.no_grad()
    def observe(
        self, batch: Batch, layers_BTD: Tensor, hidden_NED: Tensor, local_BTD: Tensor | None
    ) -> Observed:
        """The student's own tokens are made here where a forward pass has no whole ones."""
        extra, encoder = self.configs[batch.modality].extra_tokens, self.encoders[batch.modality]
        if local_BTD is None:
            with asleep(encoder.local):
                local_BTD = encoder.local(batch.source)
        return Observed(layers_BTD, hidden_NED[:, extra:].detach(), local_BTD.detach())

    @torch.no_grad()
    def teach(self, batch: Batch, local_BTD: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """Every block's output and feed-forward output of the teacher; each (B, E + T, D)."""
        owned = self.teacher["encoders"]
        student, scope = self.encoders[batch.modality], self.configs[batch.modality].teacher
        encoder = owned[batch.modality] if scope != "blocks" else student
        if scope == "full":
            local_BTD = encoder.local(batch.source)
        elif local_BTD is None:
            with asleep(student.local):
                local_BTD = student.local(batch.source)
        if scope == "norm":
            local_BTD = student.context.add_conv_positions(local_BTD, batch.padding_BT)
        context = encoder["context"] if isinstance(encoder, nn.ModuleDict) else encoder.context
        with asleep(context):
            x, biases, padding = context(local_BTD.detach(), batch, False)
        blocks = self.teacher["blocks"]
        _, outputs, ffns = run_blocks(blocks, x, biases, padding, [False] * len(blocks), len(context.blocks))
        return outputs, ffns

    def masked_alone(self, batch: Batch) -> Batch:
        """What the released v1 text code gives its teacher: masked tokens, and padding everywhere else
        (a fault: the paper's teacher sees the whole text)."""
        source = batch.source.masked_fill(~batch.mask_NT, self.encoders[batch.modality].pad_id)
        return replace(batch, source=source, padding_BT=~batch.mask_NT)

    def see_views(self, batch: Batch, local_BTD: Tensor | None) -> Tensor:
        """The student's output for every view: on its visible tokens (N, E + K, D), or on all (N, E + T, D)."""
        encoder = self.encoders[batch.modality]
        if encoder.mask_id is not None:
            source_NT = batch.source.repeat_interleave(batch.clones, dim=0)
            local_BTD = encoder.local(source_NT.masked_fill(batch.mask_NT, encoder.mask_id))
        x, biases, padding = encoder.context(local_BTD, batch, True)
        drops = draw_layerdrop(len(self.blocks), self.layerdrop * self.training, batch.layerdrop_seed, "body")
        first_layer = len(encoder.context.blocks)
        x, _, _ = run_blocks(self.blocks, self.input_dropout(x), biases, padding, drops, first_layer)
        return self.norm(x)

    def predict(self, batch: Batch, hidden_NED: Tensor, noise_NJD: Tensor | None) -> Tensor:
        """Predictions at the masked positions; (N, J, D)."""
        config, decoder = self.configs[batch.modality], self.decoders[batch.modality]
        x = decoder.input_dropout(hidden_NED)[:, config.extra_tokens :]
        if config.view == "visible":
            if noise_NJD is None:
                noise_NJD = x.new_empty(*batch.masked_NJ.shape, x.shape[2])
                noise_NJD.normal_(0, config.mask.noise_std) if config.mask.noise_std else noise_NJD.zero_()
            x = fill_in(x, batch.restore_NT, noise_NJD)
        padding_NT = None
        if batch.padding_BT is not None and not self.fairseq_compat:
            padding_NT = batch.padding_BT.repeat_interleave(batch.clones, dim=0)
        return decoder(x, batch.masked_NJ, padding_NT)

    def counted(self, batch: Batch) -> Tensor | None:
        """Which of `masked_NJ` count: those that are no filler and no padding (fairseq counts padding)."""
        if batch.padding_BT is None or self.fairseq_compat:
            return batch.counted_NJ
        padding_NT = batch.padding_BT.repeat_interleave(batch.clones, dim=0)
        is_real_NJ = ~padding_NT.gather(1, batch.masked_NJ)
        return is_real_NJ if batch.counted_NJ is None else is_real_NJ & batch.counted_NJ

    def mean_target(self, batch: Batch, targets_BTD: Tensor) -> Tensor:
        """The class token's target: the mean over the sample's tokens, for every view; (N, D)."""
        if batch.padding_BT is None or self.fairseq_compat:
            mean_BD = targets_BTD.mean(dim=1)
        else:  # padded rows of the targets are zero
            mean_BD = targets_BTD.sum(dim=1) / (~batch.padding_BT).sum(dim=1, keepdim=True)
        return mean_BD.repeat_interleave(batch.clones, dim=0)

    def encode(self, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """Every shared block's output and feed-forward output on whole, unmasked samples; (B, E + T, D).

        Features are `norm` of the last output: the identity but for a body with norms first.
        """
        outputs, ffns = zip(*self.walk(batch), strict=True)
        return list(outputs), list(ffns)

    def walk(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """What `encode` gives, one block at a time: whoever needs the last alone holds the last alone."""
        encoder = self.encoders[batch.modality]
        x, biases, padding = encoder.context(encoder.local(batch.source), batch, False)
        drops = [False] * len(self.blocks)
        yield from walk_blocks(self.blocks, x, biases, padding, drops, len(encoder.context.blocks))

    def followed(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """(name, student parameter, teacher parameter) of everything the teacher owns."""
        student = dict(self.named_parameters())
        for name, parameter in student.items():
            if TEACHER + name in student:
                yield name, parameter, student[TEACHER + name]

    def lr_scale(self, name: str) -> float:
        """A parameter's share of the learning rate."""
        return 1.0

    @torch.no_grad()
    def follow(self, tau: float) -> None:
        """One EMA step on whole parameters, teacher += (1 - tau) * (student - teacher); frozen ones are copied.

        What a single process does; d2v_ds.engine.ema does the same on partitions.
        """
        for _, student, teacher in self.followed():
            teacher.lerp_(student, 1 - tau if student.requires_grad else 1.0)


@contextmanager
def asleep(module: nn.Module) -> Iterator[None]:
    """The module without dropout for a while: a part of the student that a teacher reads."""
    was_training = module.training
    module.eval()
    yield
    module.train(was_training)
