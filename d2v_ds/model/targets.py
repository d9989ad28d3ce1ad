"""What the student regresses: the mean of the teacher's last K layers, each normalised without affine."""

from __future__ import annotations

from typing import Literal

from d2v_ds.config import Config


class Target(Config):
    top_k: int = 8
    """Number of last shared blocks that are averaged; prenet blocks never count."""
    per_layer: Literal["instance", "layer", "batch", "none"] = "instance"
    """Norm of each layer: over time, over channels, or over batch and time."""
    final: tuple[Literal["layer", "instance"], ...] = ()
    """Norms of the average, in this order."""
    source: Literal["ffn", "block"] = "ffn"
    """Feed-forward outputs (before the residual), or block outputs."""
    shuffle: bool = False
    """Control experiment: each sample gets the target of another one of its micro-batch, so that nothing about
    its content can be learned."""
