"""Batches arrive on the device as they were, in their order."""

from __future__ import annotations

import pytest
import torch

from d2v_ds.data import MicroBatch
from d2v_ds.engine.upload import uploaded
from d2v_ds.model.batch import Batch, make_views


def steps_of(count: int, width: int) -> list[list[MicroBatch]]:
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[:, 2:4] = True
    return [
        [
            MicroBatch(
                "audio",
                step,
                index,
                Batch("audio", torch.full((1, width), step + index / 10), **make_views(mask)),
            )
            for index in range(2)
        ]
        for step in range(count)
    ]


def test_on_a_cpu_nothing_is_read_ahead_or_copied() -> None:
    """A step is taken from the loader when it is asked for."""
    taken = []
    source = (taken.append(step[0].step) or step for step in steps_of(3, 5))
    for number, step in enumerate(uploaded(source, torch.device("cpu"), torch.float32)):
        assert taken == list(range(number + 1)) and step[0].batch.source.device.type == "cpu"
    assert taken == [0, 1, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_all_arrive_while_it_computes_and_no_memory_is_given_away_early() -> None:
    """Each batch is read by slow work on the computing stream, long after the next ones were copied."""
    device, width, sums = torch.device("cuda"), 1 << 20, []
    pinned = [[micro.pin_memory() for micro in step] for step in steps_of(20, width)]
    matrix = torch.randn(4096, 4096, device=device)
    for step in uploaded(pinned, device, torch.bfloat16):
        for _ in range(5):
            matrix @ matrix
        for micro in step:
            assert micro.batch.source.dtype == torch.bfloat16 and micro.batch.keep_NK.is_cuda
            sums.append((micro.step, micro.index, micro.batch.source.float().mean()))
        del step, micro
    found = [(step, index, round(mean.item(), 1)) for step, index, mean in sums]
    wanted = [
        (s, i, round(torch.tensor(s + i / 10).bfloat16().item(), 1)) for s in range(20) for i in range(2)
    ]
    assert found == wanted


def test_what_is_moved_is_all_of_a_batch() -> None:
    """Index lists and sources alike; what is no tensor goes along."""
    batch = steps_of(1, 7)[0][1].batch
    assert set(batch.tensors()) == {"source", "mask_NT", "keep_NK", "masked_NJ", "restore_NT"}
    moved = batch.to(torch.device("cpu"), torch.float64)
    assert moved.source.dtype == torch.float64 and torch.equal(moved.keep_NK, batch.keep_NK)
