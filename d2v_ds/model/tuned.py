"""Fine-tuning: the encoder of a pre-trained student with a head on it, and the loss of what the head says.

No teacher, no decoder; masks only of speech, where a task asks for them.

B samples, T tokens, E extra tokens, D dim, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from d2v_ds.config import Config
from d2v_ds.model.batch import Batch
from d2v_ds.model.data2vec import Data2Vec
from d2v_ds.model.encoder import ModalityConfig, ModalityEncoder
from d2v_ds.model.heads import HeadConfig, build_head, init_head
from d2v_ds.model.layers import Body, draw_layerdrop, walk_blocks
from d2v_ds.model.masking import Mask, span_mask


class Task(Config):
    """What a fine-tuned model learns to say."""

    head: Literal[
        "image_classification",
        "attentive_classification",
        "sentence_classification",
        "utterance_classification",
        "ctc",
    ]
    outputs: PositiveInt
    """Classes; 1 = one number, regression."""
    labels: tuple[str, ...] | None = None
    """Names of the classes. A label may be one, unless it is a whole number that the head has: that is the number."""
    label: str = "cls;json.label"
    """Member, or key of a json member, that holds the label."""
    vocabulary: str | None = None
    """Of CTC: a fairseq dictionary (dict.ltr.txt) or a sentencepiece model (.model) in the place of `labels`."""
    case: Literal["keep", "upper", "lower"] = "keep"
    """Of CTC: how transcripts are written before they are spelt."""
    encoder: str | None = None
    """The recipe whose network is trained from random weights, if there is no `init`."""
    trained: Literal["all", "head"] = "all"
    """head: the encoder stays as it is, a linear probe."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Block i of n learns with decay^(n - i) of the learning rate; all that is no block with the whole of it."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Rate of the last block, from 0 in the first; 0 = as the recipe's body and modality say."""
    smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of a label that is spread over all classes."""
    freeze_steps: NonNegativeInt = 0
    """So many steps at the beginning train the head alone."""
    frozen_extractor: bool = False
    """The convolutions of a speech encoder stay as they are; the projection after them learns."""
    frozen_alibi: bool = False
    """ALiBi's scales stay as they are."""
    mask: Mask | None = None
    """Of speech: frames that are hidden, as noise of `noise_std`, or by v1's mask embedding."""
    channel_mask: Mask | None = None
    """Of speech: channels that are zero in all frames of a sample."""
    factor: float = 1.0
    """Of regression: labels are multiplied by it."""
    metrics: tuple[str, ...] = ("accuracy",)
    """What the model is scored by (d2v_ds.tasks.metrics); the best has the highest mean of them."""
    test: str | dict[str, str] | None = None
    """Labelled shards that the model is scored on: a pattern, inside the data folder or a path of its own; several by
    {name: pattern}."""
    test_every: NonNegativeInt = 0
    """Steps between two scores; 0 = at the end alone. The checkpoint with the best one stays."""

    @model_validator(mode="after")
    def consistent(self) -> Task:
        if self.labels is not None and len(self.labels) != self.outputs:
            raise ValueError(
                f"task.labels names {len(self.labels)} classes, task.outputs={self.outputs}; they must agree"
            )
        if self.head == "ctc" and self.labels is None:
            raise ValueError("task.head=ctc needs task.labels, the symbols, or a task.vocabulary")
        for key in ("mask", "channel_mask"):
            if (mask := getattr(self, key)) is not None and mask.kind != "span":
                raise ValueError(f"task.{key}.kind={mask.kind} must be span")
        if self.test_every and not self.test:
            raise ValueError(
                f"task.test_every={self.test_every} needs labelled shards: set task.test to a pattern, or "
                "task.test_every=0"
            )
        return self

    @property
    def head_config(self) -> HeadConfig:
        return HeadConfig(kind=self.head, outputs=self.outputs, labels=self.labels, factor=self.factor)

    def parse(self, text: str) -> float | int:
        """A label as the loss takes it; ValueError for one that the head cannot say."""
        if not text:
            raise ValueError(
                f"no label: '{self.label}' is not in it, or empty; name its member or json key, task.label="
            )
        if self.outputs == 1:
            if not math.isfinite(number := as_number(text)):
                raise ValueError(f"label {text!r} is no number, task.outputs=1 needs one")
            return number * self.factor
        number = int(text) if text.isascii() and text.isdigit() else -1
        if not 0 <= number < self.outputs and self.labels and text in self.labels:
            number = self.labels.index(text)
        if not 0 <= number < self.outputs:
            named = f", or one of {', '.join(self.labels[:8])}" if self.labels else ""
            raise ValueError(
                f"label {text!r} is no class: task.outputs={self.outputs} takes whole numbers 0 to {self.outputs - 1}"
                f"{named}; set task.outputs, or name another member or key, task.label="
            )
        return number


class Output(NamedTuple):
    """What one micro-batch gives; `loss` is a sum over samples."""

    loss: Tensor
    sample_size: Tensor
    losses: dict[str, Tensor]
    logits: Tensor


class Tuned(Data2Vec):
    """`forward(batch)` is one fine-tuning pass; parameters have the names of the pre-trained student's, and `head.`."""

    def __init__(
        self,
        body: Body,
        configs: dict[str, ModalityConfig],
        encoders: dict[str, ModalityEncoder],
        task: Task,
        fairseq_compat: bool = False,
    ):
        super().__init__(body, configs, encoders, {}, fairseq_compat)
        self.task = task
        for encoder in self.encoders.values():
            if task.mask is None:
                encoder.context.mask_token = None
        self.head = build_head(task.head_config, body.dim)

    def finish_init(self) -> None:
        """After the encoder's own initialisation."""
        init_head(self.head)
        for encoder in self.encoders.values():
            if self.task.frozen_extractor:
                encoder.local.convs.requires_grad_(False)
                encoder.local.norms.requires_grad_(False)
            if self.task.frozen_alibi and encoder.context.alibi:
                encoder.context.alibi_scale.requires_grad_(False)
        if self.task.trained == "head":
            self.requires_grad_(False)
            self.head.requires_grad_(True)

    def forward(self, batch: Batch, is_observed: bool = False) -> Output:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not batch.is_frozen):
            *_, (last, _) = self.walk(batch)
            x_BTD = self.norm(last)[:, self.configs[batch.modality].extra_tokens :]
        logits = self.head(x_BTD, batch.padding_BT)
        if self.task.head == "ctc":
            loss = ctc_loss(logits.float(), batch.labels, batch.padding_BT)
        else:
            loss = self.criterion(logits.float(), batch.labels)
        return Output(loss, loss.new_tensor(len(logits)), {}, logits.detach())

    def walk(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """As in pre-training, of whole samples, but with layer drop, and frames and channels hidden."""
        encoder = self.encoders[batch.modality]
        local_BTD = self.hide(encoder.local(batch.source), batch)
        x, biases, padding = encoder.context(local_BTD, batch, False)
        drops = draw_layerdrop(len(self.blocks), self.layerdrop * self.training, batch.layerdrop_seed, "body")
        yield from walk_blocks(self.blocks, x, biases, padding, drops, len(encoder.context.blocks))

    def hide(self, x_BTD: Tensor, batch: Batch) -> Tensor:
        """Masked frames become noise, or v1's embedding; masked channels are zero. Drawn from torch's generator of the
        CPU, which a run seeds for each micro-batch."""
        if batch.mask_NT is not None:
            instead = self.encoders[batch.modality].context.mask_token
            if instead is None:
                noise = torch.randn(x_BTD.shape, dtype=torch.float32).to(x_BTD.device)
                instead = self.task.mask.noise_std * noise
            x_BTD = torch.where(batch.mask_NT[:, :, None], instead.to(x_BTD.dtype), x_BTD)
        if self.task.channel_mask is not None and self.training:
            rng = np.random.default_rng(int(torch.randint(2**62, ())))
            hidden_BD = span_mask(rng, len(x_BTD), x_BTD.shape[2], self.task.channel_mask, least=0)
            x_BTD = x_BTD.masked_fill(torch.from_numpy(hidden_BD).to(x_BTD.device)[:, None], 0)
        return x_BTD

    def criterion(self, logits_BC: Tensor, labels: Tensor) -> Tensor:
        """Summed over samples: cross entropy of class ids (B) or shares (B, C), or squared error of numbers (B)."""
        if self.task.outputs == 1:
            return F.mse_loss(logits_BC[:, 0], labels.float(), reduction="sum")
        return F.cross_entropy(logits_BC, labels, reduction="sum", label_smoothing=self.smoothing(labels))

    def smoothing(self, labels: Tensor) -> float:
        """Shares are smooth already."""
        return 0.0 if labels.is_floating_point() else self.task.smoothing

    def followed(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """No teacher."""
        return iter(())

    def depth_of(self, name: str) -> int | None:
        """Which block, prenet ones first, a parameter is in; None for what is in none."""
        if name.startswith("blocks."):
            return self.prenet_depth + int(name.split(".")[1])
        _, _, inside = name.partition(".context.blocks.")
        return int(inside.split(".")[0]) if inside else None

    def lr_scale(self, name: str) -> float:
        """A parameter's share of the learning rate: decay^(n - i) for block i of n."""
        depth = self.depth_of(name)
        return (
            1.0 if depth is None else self.task.layer_decay ** (self.prenet_depth + len(self.blocks) - depth)
        )

    @property
    def prenet_depth(self) -> int:
        (encoder,) = self.encoders.values()
        return len(encoder.context.blocks)


def ctc_loss(logits_BTC: Tensor, labels_BL: Tensor, padding_BT: Tensor | None) -> Tensor:
    """Summed over samples; those too short for their labels count nothing (Graves et al., 2006); blank 0."""
    lengths = logits_BTC.new_full((len(logits_BTC),), logits_BTC.shape[1], dtype=torch.int64)
    if padding_BT is not None:
        lengths = (~padding_BT).sum(dim=1)
    is_label = labels_BL >= 0
    return F.ctc_loss(
        F.log_softmax(logits_BTC, dim=-1).transpose(0, 1),
        labels_BL[is_label],
        lengths,
        is_label.sum(dim=1),
        reduction="sum",
        zero_infinity=True,
    )


def as_number(text: str) -> float:
    """A label of a regression; NaN for what is none, as `1_0`, which Python takes for 10."""
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan


def as_labels(values: list[Any], outputs: int) -> Tensor:
    """(B): numbers of a regression, or ids of classes."""
    return torch.tensor(values, dtype=torch.float32 if outputs == 1 else torch.int64)
