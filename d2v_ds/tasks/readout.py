"""Trained readouts of frozen features: a linear layer on pooled ones, or attention pooling and one on tokens.

Features are standardised by the training part. Learning rate and weight decay are chosen on a tenth of the training
part, then the readout is trained on all of it; the test part is looked at once. The attentive probe is one block of
cross-attention with a learned query, as in V-JEPA (arXiv:2404.08471, section 4.3) without its MLP.
N samples, B of a batch, T tokens, D features, H heads, C classes.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_ds.tasks.knn import count_classes

RATES = (1e-3, 3e-3, 1e-2)
DECAYS = (1e-4, 1e-1)
HELD_OUT = 0.1
"""Of the training part, to choose by."""
HEAD_DIM = 64

Batch = tuple[Tensor, Tensor | None]
"""Features (B, D), or tokens (B, T, D) and True where there is none."""


class LinearReadout(nn.Module):
    def __init__(self, mean_D: Tensor, std_D: Tensor, classes: int):
        super().__init__()
        self.register_buffer("mean", mean_D)
        self.register_buffer("std", std_D)
        self.proj = nn.Linear(len(mean_D), classes)

    def forward(self, x_BD: Tensor, padding: None = None) -> Tensor:
        return self.proj((x_BD - self.mean) / self.std)


class AttentiveReadout(nn.Module):
    """A learned query attends to all tokens of a sample; its answer is read linearly."""

    def __init__(self, mean_D: Tensor, std_D: Tensor, classes: int):
        super().__init__()
        dim = len(mean_D)
        self.register_buffer("mean", mean_D)
        self.register_buffer("std", std_D)
        self.num_heads = max(h for h in range(1, max(1, dim // HEAD_DIM) + 1) if dim % h == 0)
        self.query = nn.Parameter(torch.zeros(dim))  # at first the mean over tokens
        self.key, self.value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, classes)

    def forward(self, x_BTD: Tensor, padding_BT: Tensor) -> Tensor:
        x_BTD = (x_BTD - self.mean) / self.std
        batch, tokens, _ = x_BTD.shape
        k, v = (
            f(x_BTD).view(batch, tokens, self.num_heads, -1).transpose(1, 2) for f in (self.key, self.value)
        )
        q = self.query.view(1, self.num_heads, 1, -1).expand(batch, -1, -1, -1)
        pooled = F.scaled_dot_product_attention(
            q, k, v, attn_mask=~padding_BT[:, None, None]
        )  # (B, H, 1, D/H)
        return self.proj(pooled.flatten(1))


class Vectors:
    """Pooled features, (N, D) fp32."""

    build = LinearReadout

    def __init__(self, x_ND: Tensor):
        self.x = x_ND

    def moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.x[rows].mean(0), self.x[rows].std(0).clamp(min=1e-6)

    def batch(self, rows: Tensor) -> Batch:
        return self.x[rows], None


@dataclass
class Tokens:
    """Tokens of every sample, fp16 in a temporary file that goes with the process."""

    dim: int
    lengths: list[int] = field(default_factory=list)
    file: Any = field(default_factory=tempfile.TemporaryFile)
    build = AttentiveReadout

    def add(self, x_TD: Tensor) -> None:
        """ValueError if they do not fit into 16 bits."""
        half = x_TD.half().cpu().numpy()
        if not np.isfinite(half).all():
            raise ValueError("features are not finite in 16 bits: this model's cannot be probed attentively")
        self.lengths.append(len(half))
        self.file.write(half.tobytes())

    def close(self) -> None:
        """All are there; they are read from here on."""
        self.file.flush()
        self.stored = np.memmap(self.file, np.float16, "r", shape=(sum(self.lengths), self.dim))
        self.ends = np.cumsum(self.lengths)

    def sample(self, i: int) -> Tensor:
        return torch.from_numpy(self.stored[self.ends[i] - self.lengths[i] : self.ends[i]].astype(np.float32))

    def moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        count, total, squares = 0, 0, 0
        for i in rows.tolist():
            x = self.sample(i).double()
            count, total, squares = count + len(x), total + x.sum(0), squares + x.square().sum(0)
        mean = total / count
        return mean.float(), (squares / count - mean.square()).clamp(min=1e-12).sqrt().float()

    def batch(self, rows: Tensor) -> Batch:
        some = [self.sample(i) for i in rows.tolist()]
        padding = torch.ones(len(some), max(map(len, some)), dtype=torch.bool)
        for row, x in zip(padding, some, strict=True):
            row[: len(x)] = False
        return nn.utils.rnn.pad_sequence(some, batch_first=True), padding


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long a readout is trained."""

    epochs: int | None = None
    """None: 50, and 300 steps or more."""
    batch: int = 256
    seed: int = 0


def readout(
    train: Vectors | Tokens,
    labels_N: Tensor,
    test: Vectors | Tokens,
    test_labels_N: Tensor,
    training: Training,
    device: torch.device,
    say: Callable[[str], Any] = lambda line: None,
) -> dict[str, float]:
    """Test accuracy, and what was chosen: `lr`, `weight_decay`, and the accuracy they had on the part held out."""
    labels_N, test_labels_N = count_classes(labels_N, test_labels_N)
    generator = torch.Generator().manual_seed(training.seed)
    order = torch.randperm(len(labels_N), generator=generator)
    held_out, rest = order.tensor_split([max(1, round(HELD_OUT * len(order)))])
    if len(rest) < 2:
        raise ValueError(f"{len(order)} samples to fit on are too few to hold one out; give 3 or more")
    classes = int(labels_N.max()) + 1
    tried = []
    for rate in RATES:
        for decay in DECAYS:
            model = fit(train, labels_N, rest, classes, rate, decay, training, device)
            found = score(model, train, labels_N, held_out, training.batch, device)
            tried.append((found, -rate, -decay))
            say(f"lr {rate:g}, weight decay {decay:g}: {found:.4f} of the part held out")
    found, rate, decay = max(tried)  # of equals the gentler
    model = fit(train, labels_N, order, classes, -rate, -decay, training, device)
    accuracy = score(model, test, test_labels_N, torch.arange(len(test_labels_N)), training.batch, device)
    return {"accuracy": accuracy, "lr": -rate, "weight_decay": -decay, "held_out": found}


def fit(
    features: Vectors | Tokens,
    labels_N: Tensor,
    rows: Tensor,
    classes: int,
    rate: float,
    decay: float,
    training: Training,
    device: torch.device,
) -> nn.Module:
    """AdamW with a warm-up of a tenth and half a cosine; every epoch in an order of its own."""
    generator = torch.Generator().manual_seed(training.seed)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(training.seed)
        model = features.build(*features.moments(rows), classes).to(device)
    nn.init.zeros_(model.proj.weight)
    nn.init.zeros_(model.proj.bias)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=decay)
    per_epoch = -(-len(rows) // training.batch)
    steps = max(50 * per_epoch, 300) if training.epochs is None else training.epochs * per_epoch
    chosen: list[Tensor] = []
    for step in range(steps):
        chosen = chosen or list(rows[torch.randperm(len(rows), generator=generator)].split(training.batch))
        some = chosen.pop()
        warm = min(1.0, (step + 1) / max(1, steps // 10))
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = F.cross_entropy(model(*moved(features.batch(some), device)), labels_N[some].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def score(
    model: nn.Module,
    features: Vectors | Tokens,
    labels_N: Tensor,
    rows: Tensor,
    batch: int,
    device: torch.device,
) -> float:
    right = 0
    for some in rows.split(batch):
        logits = model(*moved(features.batch(some), device))
        right += int((logits.argmax(1).cpu() == labels_N[some]).sum())
    return right / len(rows)


def moved(batch: Batch, device: torch.device) -> Batch:
    x, padding = batch
    return x.to(device), None if padding is None else padding.to(device)
