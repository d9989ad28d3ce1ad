"""The loss at masked positions: every path against float64, value and gradient; its bytes; what it compiles to."""

import importlib.util
import sys
from typing import NamedTuple

import pytest
import torch
from machine import (
    CAPABILITIES,
    SHARED_LIMIT,
    Compiled,
    compiler,  # noqa: F401  (a fixture)
    counted_bytes,
    poisoned,
    prepare_interpreter,
    print_results,
    run_interpreted,
)
from torch import Tensor

from d2v_ds.kernels import regression
from d2v_ds.kernels.regression import gather_targets, regress, regress_reference, regress_triton


class Case(NamedTuple):
    B: int
    M: int
    T: int
    J: int
    D: int
    dtype: str = "float32"
    beta: float = 0.0
    counted: bool = False
    targets: str = "float32"


SHAPES = [(1, 1, 3, 1, 1), (2, 3, 13, 5, 37), (3, 2, 67, 29, 257), (1, 8, 11, 7, 512), (2, 2, 5, 5, 8)]
KINDS = [
    ("float32", 0.0, False, "float32"),
    ("bfloat16", 0.0, True, "float32"),
    ("float16", 0.7, True, "float32"),
    ("float32", 2.0, False, "bfloat16"),
]
CASES = [Case(*shape, *kind) for shape in SHAPES for kind in KINDS]


def make_inputs(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Where a position does not count, prediction and target are NaN."""
    generator = torch.Generator().manual_seed(case.T * 1000 + case.D)
    B, M, T, J, D = case[:5]
    pred_NJD = torch.randn(B * M, J, D, generator=generator)
    targets_BTD = torch.randn(B, T, D, generator=generator)
    masked_NJ = torch.rand(B * M, T, generator=generator).argsort(dim=1)[:, :J]
    counted_NJ = None
    if case.counted:
        counted_NJ = torch.rand(B * M, J, generator=generator) < 0.7
        pred_NJD[~counted_NJ] = torch.nan
    pred_NJD = pred_NJD.to(getattr(torch, case.dtype))
    targets_BTD = targets_BTD.to(getattr(torch, case.targets))
    moved = [None if x is None else x.to(device) for x in (pred_NJD, targets_BTD, masked_NJ, counted_NJ)]
    return moved[0].requires_grad_(), *moved[1:]


def expected(case: Case, pred_NJD: Tensor, targets_BTD: Tensor, masked_NJ: Tensor, counted_NJ: Tensor | None):
    """The definition in float64: the sum times 0.3 and its gradient times 2."""
    d = pred_NJD.detach().double().cpu() - gather_targets(targets_BTD, masked_NJ).double().cpu()
    if case.beta == 0:
        value, slope = d.square(), 2 * d
    else:
        small = d.abs() < case.beta
        value = torch.where(small, d.square() / (2 * case.beta), d.abs() - case.beta / 2)
        slope = torch.where(small, d / case.beta, d.sign())
    if counted_NJ is not None:
        value, slope = (torch.where(counted_NJ.cpu()[..., None], x, 0.0) for x in (value, slope))
    return 0.3 * value.sum(), 0.6 * slope


def errors(make, case: Case, device: str = "cpu") -> list[float]:
    """Of the value, relative, and of the gradient, in steps of its dtype; NaN counts."""
    inputs = make_inputs(case, device)
    value, slope = expected(case, *inputs)
    got = make(*inputs, beta=case.beta, scale=0.3)
    assert got.dtype == torch.float32 and got.shape == ()
    (got * 2).backward()
    grad = inputs[0].grad
    assert grad.dtype == inputs[0].dtype
    step = torch.finfo(grad.dtype).eps * slope.abs().clamp(min=1e-3)
    worst = ((grad.double().cpu() - slope).abs() / step).max()
    return [float((got.double().cpu() - value).abs() / value.abs().clamp(min=1e-3)), float(worst)]


def assert_close(both: list[float]) -> None:
    """The interpreter cuts bf16 off where a GPU rounds: one step."""
    assert both[0] < 2e-6 and both[1] <= 4.0, both


def bytes_of(dtype: str) -> dict[str, list[int]]:
    """Read and written, forward and backward, of a shape that fills whole tiles."""
    inputs = make_inputs(Case(2, 4, 16, 8, 512, dtype))
    counts = {}
    with counted_bytes() as forward:
        loss = regress_triton(*inputs)
        counts["forward"] = [forward["read"], forward["written"]]
    with counted_bytes() as backward:
        loss.backward()
        counts["backward"] = [backward["read"], backward["written"]]
    return counts


@pytest.fixture(scope="module")
def interpreted() -> dict:
    return run_interpreted(__file__)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernel_equals_float64(case, interpreted):
    """NaN fails too: no element of the gradient is left unwritten, none that does not count is read."""
    assert_close(interpreted["errors"][str(case)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernel_moves_what_its_docstring_counts(dtype, interpreted):
    """Each prediction and each target once a pass, the gradient once; besides that positions and partial sums."""
    elements, size = 8 * 8 * 512, {"bfloat16": 2, "float32": 4}[dtype]
    positions = 8 * 64 * 2  # int64, once for each of the 2 blocks of channels
    forward, backward = (interpreted["bytes"][dtype][name] for name in ("forward", "backward"))
    assert forward == [(size + 4) * elements + positions, 4 * 512 * 8]  # 8 programs
    assert backward[1] == size * elements
    assert backward[0] - (size + 4) * elements - positions <= 4 * 16  # the loss' gradient, a program


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_equals_float64(case):
    """What does not count may be NaN."""
    for make in (regress, regress_reference):
        assert_close(errors(make, case))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_kernel_equals_float64(case, monkeypatch):
    monkeypatch.setattr(regression, "_allocate", poisoned)
    assert_close(errors(regress, case, device="cuda"))


def test_module_works_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("regression_without_triton", regression.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert_close(errors(module.regress, CASES[4]))


PRED, TARGETS, MASKED = torch.zeros(4, 2, 3), torch.zeros(2, 5, 3), torch.zeros(4, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "beta", "message"),
    [
        (
            (PRED[:, :1], TARGETS, MASKED, None),
            0.0,
            r"shape \(4, 1, 3\), and must have \(4, 2, 3\).*; predict",
        ),
        ((PRED, TARGETS[..., :2], MASKED, None), 0.0, r"shape \(4, 2, 3\), and must have \(4, 2, 2\)"),
        ((PRED[:3], TARGETS, MASKED[:3], None), 0.0, r"3 views are no multiple of 2 samples; give"),
        ((PRED, TARGETS[:0], MASKED, None), 0.0, r"4 views are no multiple of 0 samples; give"),
        ((PRED, TARGETS, MASKED, MASKED[:, :1] > 0), 0.0, r"counted_NJ has shape \(4, 1\).*\(4, 2\)"),
        ((PRED, TARGETS, MASKED, None), -1.0, r"beta is -1\.0.*; set loss\.beta"),
    ],
)
@pytest.mark.parametrize("make", [regress, regress_reference, regress_triton])
def test_what_does_not_fit_is_an_error(make, arguments, beta, message):
    with pytest.raises(ValueError, match=message):
        make(*arguments, beta=beta)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("name", ["_sum_kernel", "_gradient_kernel"])
def test_kernels_compile_to_wide_loads_without_spills(name, counted, capability, compiler):  # noqa: F811
    types = {
        "pred": "*bf16", "targets": "*fp32", "masked": "*i64", "partial": "*fp32", "factor": "*fp32",
        "d_pred": "*bf16", "beta": "fp32",
    }  # fmt: skip
    types |= {"counted": "*u8"} if counted else {}
    constants = {"SQUARED": True, "ROWS": regression.ROWS, "BLOCK_D": regression.BLOCK_D}
    constants |= {} if counted else {"counted": None}
    kernel = getattr(regression, name)
    types = {k: v for k, v in types.items() if k in kernel.arg_names}
    aligned = [a for a in ("pred", "targets", "masked", "d_pred", "partial", "D") if a in kernel.arg_names]
    done: Compiled = compiler(kernel, types, constants, aligned, capability, num_warps=regression.NUM_WARPS)
    print(done, done.loads, done.stores)
    done.check(SHARED_LIMIT[capability])
    assert done.loads.count("v4.b32") >= 4, (
        done.loads
    )  # 8 predictions and 8 targets a thread and step, at least
    assert "v4.b32" in done.stores or name == "_sum_kernel"


if __name__ == "__main__":
    torch.set_num_threads(1)
    prepare_interpreter()
    regression._allocate = poisoned
    results = {str(case): errors(regress_triton, case) for case in CASES}
    print_results({"errors": results, "bytes": {dtype: bytes_of(dtype) for dtype in ("bfloat16", "float32")}})
