"""The teacher's targets: reference and kernels against float64, their bytes, and what they compile to."""

import dataclasses
import importlib.util
import itertools
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
    poisoned,
    prepare_interpreter,
    print_results,
    run_interpreted,
)
from torch import Tensor
from torch.nn import functional as F

from d2v_ds.kernels import targets
from d2v_ds.kernels.targets import has_kernel, make_targets, make_targets_reference, make_targets_triton


@dataclasses.dataclass(frozen=True)
class Case:
    B: int
    T: int
    D: int
    K: int
    per_layer: str = "instance"
    final: tuple[str, ...] = ()
    skip: int = 0
    padding: str = "none"  # or "tail": last sample has one real token; "full": last sample has none
    dtype: str = "float32"
    offset: float = 0.0  # added to every input
    out: str = "float32"
    views: int = 0  # of every sample, at a third of the positions; 0 = whole samples

    def __str__(self) -> str:
        return "-".join(str(value) for value in dataclasses.astuple(self))


SHAPES = [(1, 1, 8, 1), (2, 7, 37, 3), (3, 37, 8, 5), (2, 101, 37, 3), (1, 37, 96, 1), (2, 101, 96, 5)]
NORMS = [
    ("instance", ()),
    ("instance", ("layer",)),
    ("layer", ("instance",)),
    ("layer", ()),
    ("none", ()),
    ("none", ("layer", "instance")),
    ("instance", ("layer", "instance")),
]
DTYPES = ["float32", "bfloat16", "float16"]
GRID = [
    Case(*shape, *norms, skip=i % 2, padding=("none", "tail")[i // 2 % 2], dtype=DTYPES[i % 3])
    for i, (shape, norms) in enumerate(itertools.product(SHAPES, NORMS))
]
EDGES = [
    Case(2, 13, 8, 2, padding="full"),
    Case(2, 13, 8, 2, "layer", ("instance",), padding="full"),
    Case(2, 67, 8, 2, offset=1000.0),
    Case(2, 13, 67, 2, "layer", offset=1000.0),
    Case(1, 3, 2039, 2, "layer", ("instance",), dtype="bfloat16"),
    Case(2, 13, 37, 2, padding="tail", out="bfloat16"),
    Case(2, 13, 37, 2, "instance", ("layer", "instance"), dtype="float16", out="float16"),
    # Longer than one tile: the two-pass kernel, also for the final norm.
    Case(2, 1031, 19, 3, skip=1, dtype="bfloat16"),
    Case(2, 1031, 19, 2, "layer", ("instance",), padding="tail"),
    Case(2, 1031, 8, 2, padding="full", dtype="float16"),
    Case(1, 4093, 8, 2, offset=1000.0),
    Case(1, 1031, 5, 48, dtype="bfloat16"),
    # At the masked positions of all views: the one kernel, the long one, and after final norms.
    Case(2, 37, 19, 3, skip=1, views=3, dtype="bfloat16"),
    Case(3, 37, 8, 2, padding="tail", views=1),
    Case(2, 13, 37, 2, "layer", padding="full", views=2, out="bfloat16"),
    Case(2, 13, 37, 2, "instance", ("layer",), views=2, dtype="float16"),
    Case(2, 13, 8, 2, "none", ("layer", "instance"), padding="tail", views=4),
    Case(2, 1031, 8, 2, views=2, padding="tail"),
]
CASES = GRID + EDGES
SLICED = [
    Case(5, 13, 8, 2, "instance", ("layer", "instance"), padding="tail"),
    Case(5, 37, 19, 3, skip=1, padding="full", views=3, dtype="bfloat16"),
]


def make_inputs(case: Case, device: str = "cpu") -> tuple[list[Tensor], Tensor | None]:
    """K slices of one bigger tensor, so neither rows nor samples are adjacent; padded inputs are NaN."""
    generator = torch.Generator().manual_seed(case.T * 1000 + case.D)
    storage = torch.randn(case.B, case.K, case.skip + case.T + 2, case.D + 8, generator=generator) * 2
    storage += 0.5 + case.offset
    padding_BT = None
    if case.padding != "none":
        lengths = [max(1, case.T * 2 // 3)] * case.B
        lengths[-1] = {"tail": 1, "full": 0}[case.padding]
        padding_BT = torch.arange(case.T)[None] >= torch.tensor(lengths)[:, None]
        storage[:, :, case.skip : -2].masked_fill_(padding_BT[:, None, :, None], torch.nan)
    storage = storage.to(device, getattr(torch, case.dtype))
    layers = [storage[:, k, :-2, : case.D] for k in range(case.K)]
    return layers, None if padding_BT is None else padding_BT.to(device)


def draw_masked(case: Case, device: str = "cpu") -> Tensor | None:
    """A third of the positions of every view, others in each, in no order; (N, J)."""
    if case.views == 0:
        return None
    generator = torch.Generator().manual_seed(case.T)
    rows = [torch.randperm(case.T, generator=generator) for _ in range(case.B * case.views)]
    return torch.stack(rows)[:, : max(1, case.T // 3)].to(device)


def expected(case: Case, layers: list[Tensor], padding_BT: Tensor | None) -> np.ndarray:
    """The definition in float64, sample by sample, over the real tokens alone."""

    def normalize(x: np.ndarray, norm: str) -> np.ndarray:
        axes = {"instance": 0, "layer": 1}
        if norm == "none" or len(x) == 0:
            return x
        mean, variance = x.mean(axes[norm], keepdims=True), x.var(axes[norm], keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-5)

    result = np.zeros((case.B, case.T, case.D))
    for b in range(case.B):
        is_real = np.ones(case.T, dtype=bool) if padding_BT is None else ~padding_BT[b].cpu().numpy()
        inputs = [layer[b, case.skip :].double().cpu().numpy()[is_real] for layer in layers]
        mean = sum(normalize(x, case.per_layer) for x in inputs) / case.K
        for norm in case.final:
            mean = normalize(mean, norm)
        result[b, is_real] = mean
    masked_NJ = draw_masked(case)
    if masked_NJ is None:
        return result
    return np.stack([result[n // case.views][row] for n, row in enumerate(masked_NJ.numpy())])


def options(case: Case, padding_BT: Tensor | None, device: str = "cpu") -> dict:
    return dict(
        per_layer=case.per_layer,
        final=case.final,
        skip=case.skip,
        padding_BT=padding_BT,
        masked_NJ=draw_masked(case, device),
        dtype=getattr(torch, case.out),
    )


def tolerance(case: Case) -> float:
    if case.out != "float32":
        return 4 * torch.finfo(getattr(torch, case.out)).eps  # half a step of values below 8
    # At offset 1000 an fp32 input step is 6e-5; E[x^2] - E[x]^2 would be wrong by 6e-2 there.
    return 1e-3 if case.offset else 1e-5


def kernel_error(case: Case, device: str) -> float:
    """Largest error of the kernels against float64, every buffer full of NaN before they write."""
    layers, padding_BT = make_inputs(case, device)
    plain_allocate, targets._allocate = targets._allocate, poisoned
    try:
        target_BTD = make_targets_triton(layers, **options(case, padding_BT, device))
    finally:
        targets._allocate = plain_allocate
    return float(np.abs(target_BTD.double().cpu().numpy() - expected(case, layers, padding_BT)).max())


COUNTED = {
    "whole": Case(2, 37, 19, 5, skip=1, dtype="bfloat16"),
    "final": Case(2, 37, 19, 5, final=("layer",), dtype="bfloat16"),
    "long": Case(2, 1031, 19, 3, dtype="bfloat16"),
    "masked": Case(2, 37, 19, 5, dtype="bfloat16", views=4),
}


def bytes_of(case: Case) -> dict[str, int]:
    """What the kernels ask memory for."""
    layers, padding_BT = make_inputs(case)
    with counted_bytes() as counts:
        make_targets_triton(layers, **options(case, padding_BT))
    return counts


@pytest.fixture(scope="module")
def interpreted() -> dict:
    return run_interpreted(__file__)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernel_equals_float64(case: Case, interpreted: dict) -> None:
    """NaN fails too: no element is left unwritten, no padded input leaks."""
    assert interpreted["errors"][str(case)] < tolerance(case)


@pytest.mark.parametrize("name", COUNTED)
def test_kernels_move_the_bytes_that_their_docstring_says(name: str, interpreted: dict) -> None:
    """Each input once, the mean once; twice and statistics where the axis is long; a view's vectors once each."""
    case, word = COUNTED[name], 4
    elements = case.B * case.T * case.D
    read, written = 2 * case.K * elements, word * elements
    if name == "final":
        read, written = read + word * elements, 2 * written
    if name == "long":  # K means and K deviations are written once, and read for every tile of time
        block_t, _, _ = targets.tile_shape("instance", case.T, case.D, is_wide=False)
        statistics = 2 * word * case.B * case.K * case.D
        read, written = 2 * read + -(-case.T // block_t) * statistics, written + statistics
    if name == "masked":  # and where a position stands in each view's list, once for every tile of channels
        _, block_d, _ = targets.tile_shape("instance", case.T, case.D, is_wide=False)
        rows = case.B * case.views
        read, written = read + -(-case.D // block_d) * 2 * rows * case.T, word * rows * (case.T // 3) * case.D
        read, written = (
            read + 8 * rows * (case.T // 3),
            written + 2 * rows * (case.T + case.T // 3),
        )  # that list
    assert interpreted["bytes"][name] == {"read": read, "written": written}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_kernel_equals_float64(case: Case) -> None:
    """The same cases, compiled."""
    assert kernel_error(case, "cuda") < tolerance(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_equals_float64(case: Case) -> None:
    """The slow truth is true."""
    layers, padding_BT = make_inputs(case)
    target_BTD = make_targets_reference(layers, **options(case, padding_BT))
    assert target_BTD.dtype == getattr(torch, case.out)
    assert np.abs(target_BTD.double().numpy() - expected(case, layers, padding_BT)).max() < tolerance(case)


def test_batch_norm_is_over_real_tokens_of_all_samples() -> None:
    """Float64 statistics per channel over the rows that are not padded."""
    layers, padding_BT = make_inputs(Case(3, 11, 7, 2, padding="tail"))
    real = [layer[~padding_BT].double() for layer in layers]
    mean = sum((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() for x in real) / 2
    target_BTD = make_targets(layers, per_layer="batch", padding_BT=padding_BT)
    torch.testing.assert_close(target_BTD[~padding_BT].double(), mean, atol=1e-5, rtol=0)
    assert not target_BTD[padding_BT].any()


@pytest.mark.parametrize(("per_layer", "final"), [*NORMS, ("batch", ())])
def test_without_padding_equals_fairseq(per_layer: str, final: tuple[str, ...]) -> None:
    """The torch functions that fairseq calls, in its order, over all T."""

    def fairseq(x_BTD: Tensor, norm: str) -> Tensor:
        x_BDT = x_BTD.transpose(1, 2)
        if norm == "batch":
            return F.batch_norm(x_BDT, None, None, training=True).transpose(1, 2)
        if norm == "instance":
            return F.instance_norm(x_BDT).transpose(1, 2)
        return F.layer_norm(x_BTD, x_BTD.shape[-1:]) if norm == "layer" else x_BTD

    layers, _ = make_inputs(Case(3, 11, 7, 3, skip=1))
    mean_BTD = sum(fairseq(layer[:, 1:].float(), per_layer) for layer in layers) / 3
    for norm in final:
        mean_BTD = fairseq(mean_BTD, norm)
    target_BTD = make_targets(layers, per_layer=per_layer, final=final, skip=1)
    torch.testing.assert_close(target_BTD, mean_BTD, atol=2e-6, rtol=0)


def test_target_has_no_gradient_and_the_asked_dtype() -> None:
    """Called outside no_grad on inputs that want one."""
    layers = [torch.randn(2, 5, 7, requires_grad=True) for _ in range(2)]
    target_BTD = make_targets(layers, final=("layer",), dtype=torch.bfloat16)
    assert not target_BTD.requires_grad
    assert target_BTD.dtype == torch.bfloat16


def test_kernel_is_not_offered_where_it_would_be_wrong() -> None:
    """Unequal strides or dtypes, channels apart, and batch norm go to the reference, which takes them."""
    pytest.importorskip("triton")
    x_BTD = torch.randn(2, 5, 7)
    transposed_BTD = torch.randn(2, 7, 5).transpose(1, 2)
    assert has_kernel([x_BTD, x_BTD], "instance")
    assert not has_kernel([x_BTD, x_BTD], "batch")
    assert not has_kernel([x_BTD, torch.randn(2, 6, 7)[:, 1:]], "instance")
    assert not has_kernel([x_BTD, x_BTD.half()], "instance")
    assert not has_kernel([transposed_BTD, transposed_BTD], "instance")
    far_BTD = torch.empty_strided((2, 4096, 8), (8, 2**19, 1), device="meta")  # offsets beyond int32
    assert not has_kernel([far_BTD, far_BTD], "instance")
    assert make_targets([x_BTD, transposed_BTD]).shape == (2, 5, 7)


def test_samples_may_pass_what_the_second_axis_of_a_grid_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """65,535, on every GPU: several launches, of which each writes its own samples."""
    pytest.importorskip("triton")
    grids = []

    class Launch:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **meta: None

    for name in ("_norm_mean_kernel", "_long_instance_mean_kernel"):
        monkeypatch.setattr(targets, name, Launch())
    for T in (1, 1031):
        make_targets_triton([torch.empty(2**16, T, 19, device="meta")])
    assert grids == [(2, 65535), (2, 1)] * 2


@pytest.mark.parametrize("case", SLICED, ids=str)
def test_samples_in_several_launches_equal_float64(case: Case, interpreted: dict) -> None:
    """With padding and at the masked positions of views, too."""
    assert interpreted["sliced"][str(case)] < tolerance(case)


def test_tiles_are_smaller_where_elements_are_read_one_by_one() -> None:
    """By channels, by the stride of a token or by where a tensor begins."""
    x_BTD = torch.zeros(2, 5, 64)
    assert targets.is_wide([x_BTD, x_BTD[:, 1:]])
    shifted_BTD = torch.zeros(2 * 5 * 64 + 1)[1:].view(2, 5, 64)
    for layers in ([x_BTD[..., :63]], [torch.zeros(2, 5, 72)[..., :64]], [x_BTD, shifted_BTD]):
        assert not targets.is_wide(layers)


def test_module_works_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without the wheel has the reference."""
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("targets_without_triton", targets.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layers = [torch.randn(2, 5, 7) for _ in range(2)]
    assert not module.has_kernel(layers, "instance")
    assert torch.equal(module.make_targets(layers), make_targets_reference(layers))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_layer": "foo"}, r"per_layer is 'foo', not one of .*; use"),
        ({"final": ("batch",)}, r"final is \('batch',\), .* one of .*; use"),
        ({"layers": []}, r"layers has 0 tensors, .* at least 1; average"),
        ({"layers": [torch.zeros(2, 5, 7), torch.zeros(2, 5, 8)]}, r"layer 1 .*\(2, 5, 8\).* same .*; pass"),
        ({"layers": [torch.zeros(5, 7)]}, r"layer 0 .*\(5, 7\).*; pass"),
        ({"skip": 5}, r"skip is 5 of 5 tokens, .* remain; set skip to 0\.\.4"),
        ({"skip": -1}, r"skip is -1 of 5 tokens"),
        ({"skip": 1, "padding_BT": torch.zeros(2, 5).bool()}, r"\(2, 5\), .* \(2, 4\); pass"),
        ({"padding_BT": torch.zeros(2, 5)}, r"torch\.float32 .* must be torch\.bool"),
        (
            {"masked_NJ": torch.zeros(3, 1).long()},
            r"masked_NJ .*\(3, 1\), .* multiple of the 2 samples; pass",
        ),
        (
            {"layers": [torch.zeros(0, 5, 7)], "masked_NJ": torch.zeros(2, 1).long()},
            r"masked_NJ .*\(2, 1\), .* multiple of the 0 samples; pass",
        ),
    ],
)
@pytest.mark.parametrize("make", [make_targets, make_targets_reference, make_targets_triton])
def test_bad_option_says_value_rule_and_remedy(make, change: dict, message: str) -> None:
    """Each is a ValueError, before any work."""
    arguments = {"layers": [torch.zeros(2, 5, 7)] * 2} | change
    with pytest.raises(ValueError, match=message):
        make(arguments.pop("layers"), **arguments)


# norm, T, D, K, input dtype, has padding, at masked positions; the recipes, then the extremes
COMPILED = [
    ("instance", 196, 768, 10, "bf16", False, False),
    ("instance", 196, 768, 10, "bf16", False, True),
    ("layer", 196, 768, 1, "fp32", False, False),
    ("layer", 196, 768, 1, "fp32", False, True),
    ("instance", 999, 768, 8, "fp16", True, False),
    ("layer", 512, 1024, 24, "bf16", False, False),
    ("instance", 512, 1024, 1, "fp32", True, False),
    ("instance", 1024, 2048, 48, "fp32", True, False),
    ("layer", 3, 4096, 48, "fp32", True, False),
    ("none", 7, 37, 2, "bf16", True, True),
    ("instance", 4096, 2048, 48, "bf16", True, False),
    ("instance", 4096, 768, 24, "fp32", True, True),
    ("layer", 1, 1, 2, "fp32", False, False),
    # channels that no 16 bytes hold: read one by one
    ("instance", 37, 769, 10, "fp32", True, True),
    ("instance", 196, 769, 10, "bf16", False, False),
    ("instance", 999, 100, 8, "fp32", True, True),
    ("instance", 4093, 769, 2, "fp32", True, False),
]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("shape", COMPILED, ids=str)
def test_kernel_compiles_without_spills(shape: tuple, capability: int, compiler) -> None:  # noqa: F811
    """Ahead of time, without a GPU; as the launcher would specialise it."""
    done = compile_kernel(compiler, *shape, capability=capability)
    print(done)
    done.check(SHARED_LIMIT[capability])
    norm, T, D, K, *_ = shape
    if D % 16 == 0 and (norm != "instance" or T <= targets.MAX_TOKENS_IN_TILE):
        words = {"b8", "b16"}  # padding, ranks
        wide = {"v4.b32", "16"}  # into registers, or asynchronously into shared memory
        assert set(done.loads) - words <= wide, "an input is read in less than 16 bytes per thread"
        assert K == 1 or "16" in done.loads, "no layer is read while another is summed up"
        assert set(done.stores) == {"v4.b32"}


def compile_kernel(
    compiler,  # noqa: F811
    norm: str,
    T: int,
    D: int,
    K: int,
    dtype: str,
    has_padding: bool,
    has_ranks: bool,
    capability: int,
) -> Compiled:
    block_t, block_d, num_warps = targets.tile_shape(norm, T, D, is_wide=D % 16 == 0)
    is_long = norm == "instance" and T > targets.MAX_TOKENS_IN_TILE
    kernel = targets._long_instance_mean_kernel if is_long else targets._norm_mean_kernel
    constants = {
        "NUM_LAYERS": K,
        "NUM_TILES": -(-T // block_t),
        "AXIS": {"instance": 0, "layer": 1, "none": None}[norm],
        "BLOCK_T": block_t,
        "BLOCK_D": block_d,
        "NUM_STAGES": targets.count_stages(block_t * block_d * (4 if dtype == "fp32" else 2)),
    }
    types = {"layers": (f"*{dtype}",) * K, "padding": "*u8", "ranks": "*i16", "out": "*fp32"}
    types |= {"statistics": "*fp32", "eps": "fp32"}
    sizes = {"stride_b": (T + 1) * D, "stride_t": D, "T": T, "D": D}
    constants |= {name: size for name, size in sizes.items() if size == 1}
    constants |= {} if has_padding else {"padding": None}
    constants |= {} if has_ranks else {"ranks": None}
    aligned = [("layers", k) for k in range(K)] + ["out"]
    aligned += [name for name, size in sizes.items() if size % 16 == 0]
    return compiler(kernel, types, constants, aligned, capability, num_warps=num_warps)


def test_one_launch_makes_the_lists_of_ranks(compiler) -> None:  # noqa: F811
    """Filled and written by one program a row, of lists longer than its block as well."""
    types = {"masked": "*i64", "ranks": "*i16"}
    for capability in CAPABILITIES:
        done = compiler(targets._rank_kernel, types, {"BLOCK": 256}, ["masked"], capability, num_warps=4)
        done.check(SHARED_LIMIT[capability])
        assert "bar.sync" in done.ptx


if __name__ == "__main__":
    torch.set_num_threads(1)
    prepare_interpreter()
    errors = {str(case): kernel_error(case, "cpu") for case in CASES}
    results = {"errors": errors, "bytes": {name: bytes_of(case) for name, case in COUNTED.items()}}
    targets.MAX_SAMPLES = 2
    print_results(results | {"sliced": {str(case): kernel_error(case, "cpu") for case in SLICED}})
