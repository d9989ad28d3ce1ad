"""Numbers that are not finite: the step is skipped on all ranks or on none, at every stage and precision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run_ranks

STAGES = ("zero0", "zero1", "zero2", "zero3")
CASES = [f"{stage} {precision}" for precision in ("fp32", "bf16", "fp16") for stage in STAGES]
CASES += ["zero3_autocast fp32", "zero2_offload fp32", "zero2_offload bf16", "zero3_offload fp16"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("skips")
    run_ranks(Path(__file__).with_name("skip_ranks.py"), out, *CASES)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(case, out):
    """A NaN in one picture of rank 1, an infinite gradient, an infinite loss with a finite gradient: nothing changes,
    all stays finite, and the step after them is applied. What only looks for fp16's loss scale is not in a row."""
    result = json.loads((out / "results.json").read_text())[case]
    assert (
        result["dtype"]
        == {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}[case.split()[1]]
    )
    for rank in result["ranks"]:
        applied, changed, finite, counts, in_a_row = zip(*rank, strict=True)
        assert applied == (True, False, False, False, True)
        assert not any(changed[1:4]) and changed[4] and all(finite)
        assert counts == (1, 1, 1, 1, 2)
        assert in_a_row == ((0, 1, 1, 2, 0) if case.endswith("fp16") else (0, 1, 2, 3, 0))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_samples_of_a_skipped_step_are_written_down(case, out):
    """Of all ranks and micro-batches, with the losses; the one with the NaN is marked."""
    lines = (out / case.replace(" ", "_") / "skipped_steps.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [2, 3, 4]
    for row in rows:
        places = [(m["modality"], m["index"]) for m in row["micro_batches"]]
        assert places == [(name, index) for name in ("audio", "image", "text") for index in range(4)]
        assert all(len(m["samples"]) == 2 for m in row["micro_batches"])
        keys = {key for m in row["micro_batches"] if m["modality"] != "text" for key in m["samples"]}
        assert len(keys) > 8 and all(".tar:" in key for key in keys)
        assert (row["loss_scale"] is not None) == case.endswith("fp16")
    bad = [[(m["modality"], m["index"]) for m in row["micro_batches"] if not m["is_finite"]] for row in rows]
    assert len(bad[0]) == 1 and bad[0][0][0] == "image" and bad[0][0][1] % 2 == 1
    assert bad[1] == []
    assert bad[2] == [(name, index) for name in ("audio", "image", "text") for index in (1, 3)]
