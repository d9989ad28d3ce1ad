"""Tar shards -> index -> plan -> bytes -> micro-batches of this rank, as a pure function of (seed, step).

`index` finds and reads samples, `plan` says which go where, `loader` brings them; what a sample means is the
modality's matter. The room knows no modality, no model and no DeepSpeed. `loader` is imported when it is first
used: finding and indexing shards needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from d2v_ds.data.blocks import TextBlocks
from d2v_ds.data.buckets import Buckets
from d2v_ds.data.index import (
    BrokenShards,
    Corpus,
    CorruptSample,
    ShardIndex,
    build_index,
    ensure_index,
    expand_shards,
)
from d2v_ds.data.permutation import permute, seed_of
from d2v_ds.data.plan import Draw, Plan, Share, Stream, deal
from d2v_ds.data.windows import Windows

if TYPE_CHECKING:
    from d2v_ds.data.loader import DataError, Fault, FaultLog, MicroBatch, Samples, Source, StepLoader, Volume

__all__ = [
    "BrokenShards",
    "Buckets",
    "Corpus",
    "CorruptSample",
    "DataError",
    "Draw",
    "Fault",
    "FaultLog",
    "MicroBatch",
    "Plan",
    "Samples",
    "ShardIndex",
    "Share",
    "Source",
    "StepLoader",
    "Stream",
    "TextBlocks",
    "Volume",
    "Windows",
    "build_index",
    "deal",
    "ensure_index",
    "expand_shards",
    "permute",
    "seed_of",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'd2v_ds.data' has no attribute '{name}'")
    return getattr(import_module("d2v_ds.data.loader"), name)
