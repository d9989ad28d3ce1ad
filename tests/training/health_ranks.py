"""Health of six micro-batches, divided among ranks: health_ranks.py RESULT.json."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent))
from collapses import TOKENS, micro_batch, pad  # noqa: E402

from d2v_ds.training.health import Health  # noqa: E402

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    health = Health()
    for i in range(rank, 6, world):
        batch, output = micro_batch("healthy", samples=5, seed=i)
        if i % 2:
            batch, output = pad(batch, output, [TOKENS - 5 * j for j in range(5)])
        health.observe(batch, output)
    values = health.values()
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(values))
    dist.destroy_process_group()
    os._exit(0)
