"""Tar shards -> index -> plan -> bytes -> micro-batches of this rank, as a pure function of (seed, step).

`index` finds and reads samples, `plan` says which go where, `loader` brings them; what a sample means is the
modality's matter. The room knows no modality, no model and no DeepSpeed.
"""

from d2v_ds.data.index import (
    Corpus,
    CorruptSample,
    ShardIndex,
    build_index,
    ensure_index,
    expand_shards,
)
from d2v_ds.data.loader import DataError, Fault, FaultLog, MicroBatch, Samples, Source, StepLoader
from d2v_ds.data.plan import Draw, Plan, Stream, TextBlocks, permute, seed_of

__all__ = [
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
    "Source",
    "StepLoader",
    "Stream",
    "TextBlocks",
    "build_index",
    "ensure_index",
    "expand_shards",
    "permute",
    "seed_of",
]
