"""The teacher's step: every path against float64, its bytes, and what the kernel compiles to."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from machine import (
    CAPABILITIES,
    SHARED_LIMIT,
    Compiled,
    compiler,  # noqa: F401  (a fixture)
    counted_bytes,
    print_results,
    run_interpreted,
)
from torch import Tensor

from d2v_ds.kernels import ema
from d2v_ds.kernels.ema import follow, follow_chunked, follow_reference, follow_triton

LENGTHS = [1, 7, 2048, 2049, 5003]
COPIES = [None, "bfloat16", "float16"]
TAUS = [0.0, 0.5, 0.9999]
CASES = [
    (length, shift, COPIES[i % 3], TAUS[(i + i // 3) % 3])
    for i, (length, shift) in enumerate((n, s) for n in LENGTHS for s in (0, 1, 3, 4))
]


def make_inputs(length: int, shift: int, copy: str | None, device: str = "cpu") -> tuple:
    """Views that begin `shift` values into their storage, so 4 or 2 bytes off a boundary; the copy is NaN."""
    generator = torch.Generator().manual_seed(length)
    average, master = (torch.randn(length + shift + 5, generator=generator).to(device) for _ in range(2))
    low = None if copy is None else torch.full_like(average, torch.nan, dtype=getattr(torch, copy))
    views = [None if x is None else x[shift : shift + length] for x in (average, master, low)]
    return (average, low, *views)


def error(step, length: int, shift: int, copy: str | None, tau: float, device: str = "cpu") -> float:
    """Largest error against float64; infinite if the surroundings change or the copy is not the average, rounded.

    The interpreter cuts bf16 off where a GPU rounds to nearest: there the copy may be one step away.
    """
    whole, whole_low, average, master, low = make_inputs(length, shift, copy, device)
    around = torch.cat([whole[:shift], whole[shift + length :]]).clone()
    expected = average.double() + (1 - tau) * (master.double() - average.double())
    before = master.clone()
    step(average, master, low, tau)
    worst = float((average.double() - expected).abs().max())
    if not torch.equal(torch.cat([whole[:shift], whole[shift + length :]]), around):
        return np.inf
    if not torch.equal(master, before):
        return np.inf
    if low is not None:
        steps = (low.double() - average.double()).abs() / (
            torch.finfo(low.dtype).eps * average.double().abs()
        )
        worst = max(worst, 0.0 if float(steps.max()) <= (1.0 if step is follow_triton else 0.5) else np.inf)
        outside = torch.cat([whole_low[:shift], whole_low[shift + length :]])
        worst = max(worst, 0.0 if bool(outside.isnan().all()) else np.inf)
    return worst


def bytes_of(copy: str | None) -> list[int]:
    _, _, average, master, low = make_inputs(5003, 0, copy)
    with counted_bytes() as counts:
        follow_triton(average, master, low, 0.99)
    return [counts["read"], counts["written"]]


@pytest.fixture(scope="module")
def interpreted() -> dict:
    return run_interpreted(__file__)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernel_equals_float64(case, interpreted):
    """NaN fails too: no element of the copy is left unwritten, none outside is touched."""
    assert interpreted["errors"][str(case)] < 1e-6


def test_kernel_moves_14_bytes_a_parameter_and_12_without_a_copy(interpreted):
    """Counted at the interpreter's loads and stores: each value once."""
    assert interpreted["bytes"]["bfloat16"] == [8 * 5003, 6 * 5003]
    assert interpreted["bytes"]["None"] == [8 * 5003, 4 * 5003]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_kernel_equals_float64(case):
    assert error(follow, *case, device="cuda") < 1e-6


@pytest.mark.parametrize("step", [follow_reference, follow_chunked, follow])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_equals_float64(case, step):
    assert error(step, *case) < 1e-6


def test_chunks_are_the_reference_to_the_bit(monkeypatch):
    """Also where a chunk ends."""
    monkeypatch.setattr(ema, "CHUNK", 100)
    results = []
    for step in (follow_reference, follow_chunked):
        _, _, average, master, low = make_inputs(5003, 1, "bfloat16")
        step(average, master, low, 0.97)
        results.append((average, low))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_small_step_is_not_lost_in_the_average():
    """1,000 steps of 1e-6 of the way: the copy alone would stay where it is."""
    average, master = torch.ones(8), torch.full((8,), 2.0)
    low = average.bfloat16()
    for _ in range(1000):
        follow(average, master, low, 1 - 1e-6)
    torch.testing.assert_close(average, torch.full((8,), 1.001), atol=1e-4, rtol=0)
    assert average.min() > 1.0009


def test_module_works_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("ema_without_triton", ema.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert error(module.follow, 7, 1, "bfloat16", 0.5) < 1e-6


FLAT = torch.zeros(6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FLAT, FLAT, None, 1.5), r"tau is 1\.5.* 0\.\.1; set"),
        ((FLAT.bfloat16(), FLAT, None, 0.5), r"average is torch\.bfloat16.*torch\.float32.*; pass"),
        ((FLAT, FLAT.double(), None, 0.5), r"master is torch\.float64.*torch\.float32.*; pass"),
        ((FLAT, FLAT, FLAT, 0.5), r"copy is torch\.float32.* bfloat16 or float16; pass None"),
        ((FLAT, FLAT[:5], None, 0.5), r"master has shape \(5,\).* one length; pass"),
        ((FLAT, FLAT, FLAT.half().view(2, 3), 0.5), r"copy has shape \(2, 3\)"),
        ((FLAT[::2], FLAT[::2], None, 0.5), r"average .*strides \(2,\).* contiguous"),
    ],
)
@pytest.mark.parametrize("step", [follow, follow_reference, follow_triton])
def test_bad_argument_says_value_rule_and_remedy(step, arguments: tuple[Tensor, ...], message: str):
    with pytest.raises(ValueError, match=message):
        step(*arguments)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("copy", [None, "*bf16", "*fp16"])
def test_kernel_compiles_to_wide_loads_without_spills(copy, capability, compiler):  # noqa: F811
    types = {"average": "*fp32", "master": "*fp32", "weight": "fp32"}
    types |= {} if copy is None else {"copy": copy}
    constants = {"BLOCK": ema.BLOCK} | ({"copy": None} if copy is None else {})
    aligned = ["average", "master", "copy"]
    done: Compiled = compiler(
        ema._follow_kernel, types, constants, aligned, capability, num_warps=ema.NUM_WARPS
    )
    print(done, done.loads, done.stores)
    done.check(SHARED_LIMIT[capability])
    assert "v4.b32" in done.loads and "v4.b32" in done.stores


if __name__ == "__main__":
    torch.set_num_threads(1)
    errors = {str(case): error(follow_triton, *case) for case in CASES}
    print_results({"errors": errors, "bytes": {str(copy): bytes_of(copy) for copy in (None, "bfloat16")}})
