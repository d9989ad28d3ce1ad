"""Every ZeRO stage, with and without offload, trains what plain torch trains; the EMA needs no communication."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from equality_cases import CASES, case_recipe, plain_loop  # noqa: E402

FP32 = [name for name, case in CASES.items() if case.precision == "fp32"]
BF16 = [name for name, case in CASES.items() if case.precision == "bf16"]
QUICK = ["zero3_low", "zero2_bf16", "zero3_bf16"]
"""The others, which take ten seconds each, run with --all."""


def each(names: list[str]) -> list:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    return plain_loop(case_recipe(CASES["zero0"]))


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, dict[str, torch.Tensor]]:
    out = tmp_path_factory.mktemp("equality")
    names = list(CASES) if request.config.getoption("--all") else QUICK
    run_ranks(Path(__file__).with_name("equality_ranks.py"), out, *names)
    return {name: load_file(out / f"{name}.safetensors") for name in names}


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("name", each(FP32))
def test_two_ranks_equal_a_plain_loop(name, results, reference):
    """Student, teacher and losses after 5 steps, per tensor: relative L2 of 1e-5."""
    ours = results[name]
    assert set(reference) <= set(ours)
    worst = {key: relative(ours[key], value) for key, value in reference.items() if value.norm() > 0}
    bad = {key: value for key, value in worst.items() if not value < 1e-5}
    assert not bad, (
        f"{len(bad)} of {len(worst)} tensors differ, the worst: {sorted(bad.items(), key=lambda i: -i[1])[:5]}"
    )


@pytest.mark.parametrize("name", each(list(CASES)))
def test_the_next_forward_uses_the_updated_teacher(name, results):
    """What a gather gives is the average, rounded to the compute dtype, above and below the threshold."""
    ours = results[name]
    dtype = torch.float32 if name in FP32 else torch.bfloat16
    for key in [k for k in ours if k.startswith("teacher.")]:
        used = ours["used." + key.removeprefix("teacher.")]
        assert torch.equal(used, ours[key].to(dtype).float()), key


def test_zero3_cases_have_parameters_on_both_sides_of_the_threshold(results):
    persistent, total = results["zero3_low"]["num_persistent"].tolist()
    assert 0 < persistent < total


@pytest.mark.parametrize("name", each([n for n in CASES if n.startswith("zero3")]))
def test_the_average_at_zero3_needs_no_collective(name, results):
    assert results[name]["num_collectives"].item() == 0


def test_the_counter_of_collectives_counts(results):
    """At ZeRO-1 and ZeRO-2 in bf16 the teacher is gathered once for each group and step."""
    for name in {"zero1_bf16", "zero2_bf16"} & results.keys():
        assert results[name]["num_collectives"].item() >= 5
    assert "zero2_bf16" in results


@pytest.mark.parametrize("name", each(list(CASES)))
def test_the_average_moves_as_the_fp32_formula_says(name, results):
    """tau * old + (1 - tau) * master in float64, at bf16 too; and it moves at tau = 0.9999, where bf16 would not."""
    assert results[name]["formula_error"].item() < 1e-6
    assert results[name]["moved_share"].item() > 0.5


@pytest.mark.parametrize("name", each(BF16))
def test_bf16_runs_learn_what_fp32_does(name, results, reference):
    """Losses of 5 steps within 3 %."""
    ours, theirs = results[name]["losses"], reference["losses"]
    assert ((ours - theirs).abs() <= 0.03 * theirs.abs()).all()
