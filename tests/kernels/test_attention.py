"""Attention over kept tokens: reference and kernels against float64, dropout, bytes, and what they compile to."""

import dataclasses
import importlib.util
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
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

from d2v_ds.kernels import attention
from d2v_ds.kernels.attention import (
    Distance,
    attend,
    attend_reference,
    attend_triton,
    distance_bias,
    make_bias,
)


@dataclasses.dataclass(frozen=True)
class Case:
    N: int
    T: int
    H: int
    C: int
    extra: int = 0
    padding: str = "none"  # or "tail": rows of different length; "full": and the last has no real token
    dtype: str = "float32"
    is_shared: bool = False  # positions of all rows alike
    is_single: bool = False  # one scale for all heads
    far: int = 1  # factor on positions

    def __str__(self) -> str:
        return "-".join(str(value) for value in dataclasses.astuple(self))


CASES = [
    Case(1, 1, 1, 16),
    Case(2, 7, 3, 24, extra=1, padding="tail"),
    Case(2, 37, 2, 80, padding="full"),
    Case(1, 67, 2, 16, extra=2, is_shared=True),
    Case(3, 33, 1, 64, extra=1, is_shared=True, is_single=True, padding="tail"),
    Case(1, 19, 2, 128, far=1000),
    Case(2, 37, 3, 24, padding="full", dtype="bfloat16", is_single=True),
    Case(1, 131, 2, 64, extra=1, dtype="bfloat16", padding="tail"),
    Case(2, 41, 1, 80, dtype="float16"),
    Case(1, 17, 2, 8, dtype="float16", extra=3, is_shared=True),
]


@dataclasses.dataclass
class Inputs:
    qkv: Tensor
    scale: Tensor  # of each head or of all, a leaf
    slopes_H: Tensor
    positions_NK: Tensor
    padding_NT: Tensor | None
    d_out: Tensor

    def distance(self, extra: int) -> Distance:
        return Distance(self.scale.clamp(min=0) * self.slopes_H, self.positions_NK, extra)


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Random rows; original positions with gaps; one scale below 0, where the bias and its gradient stop."""
    generator = torch.Generator().manual_seed(case.T * 100 + case.C)
    N, T, H, C, E = case.N, case.T, case.H, case.C, case.extra
    qkv = torch.randn(N, T, 3, H, C, generator=generator)
    scale = torch.rand(1 if case.is_single else H, generator=generator) + 0.1
    if len(scale) > 2:
        scale[1] = -0.5
    slopes_H = 2.0 ** -torch.arange(1, H + 1)
    rows = 1 if case.is_shared else N
    orders = [torch.randperm(2 * T, generator=generator)[: T - E].sort().values for _ in range(rows)]
    padding_NT = None
    if case.padding != "none":
        lengths = [max(1, T - n * 3 - 2) for n in range(N)]
        lengths[-1] = {"tail": 1, "full": 0}[case.padding]
        padding_NT = (torch.arange(T)[None] >= torch.tensor(lengths)[:, None]).to(device)
    return Inputs(
        qkv.to(device, getattr(torch, case.dtype)).requires_grad_(),
        scale.to(device).requires_grad_(),
        slopes_H.to(device),
        torch.stack(orders).to(device) * case.far,
        padding_NT,
        torch.randn(N, T, H, C, generator=generator).to(device, getattr(torch, case.dtype)),
    )


def expected(case: Case, inputs: Inputs, kept: Tensor | None = None, dropout: float = 0.0) -> list[Tensor]:
    """Output and gradients by the definition in float64; `kept` (N, H, T, T) says what dropout leaves."""
    qkv = inputs.qkv.detach().double().requires_grad_()
    scale = inputs.scale.detach().double().requires_grad_()
    q, k, v = (qkv[:, :, part].transpose(1, 2) for part in range(3))
    places = F.pad(inputs.positions_NK.double(), (case.extra, 0))
    distance_NTT = (places[:, :, None] - places[:, None, :]).abs()
    distance_NTT[:, : case.extra], distance_NTT[:, :, : case.extra] = 0, 0
    strength_H = scale.clamp(min=0) * inputs.slopes_H.double()
    bias = -strength_H[None, :, None, None] * distance_NTT[:, None]
    if inputs.padding_NT is not None:  # so low that nothing else counts: a row of padding alone is even
        bias = bias.masked_fill(inputs.padding_NT[:, None, None, :], -1e30)
    weights = torch.softmax(q @ k.transpose(-1, -2) / case.C**0.5 + bias, dim=-1)
    if kept is not None:
        weights = weights * kept / (1 - dropout)
    out = (weights @ v).transpose(1, 2)
    out.backward(inputs.d_out.double())
    return [out.detach(), qkv.grad, scale.grad]


def results_of(function, case: Case, inputs: Inputs) -> list[Tensor]:
    out = function(inputs.qkv, inputs.distance(case.extra), inputs.padding_NT)
    out.backward(inputs.d_out)
    return [out.detach(), inputs.qkv.grad, inputs.scale.grad]


def error(ours: list[Tensor], truth: list[Tensor]) -> float:
    """The worst of output and gradients, relative to the largest value of each; NaN if there is one."""
    errors = [
        (x.double() - y.double()).abs().max() / y.abs().max().clamp(min=1e-2)
        for x, y in zip(ours, truth, strict=True)
    ]
    return float(torch.stack(errors).max())  # torch's max keeps NaN


def tolerance(case: Case) -> float:
    if case.dtype == "float32":  # at positions to 40,000 a step of an fp32 logit is 4e-3
        return 2e-5 if case.far == 1 else 2e-4
    return {"bfloat16": 3e-2, "float16": 4e-3}[case.dtype]


def kernel_error(case: Case, device: str = "cpu") -> float:
    """Of the kernels, every buffer full of NaN before they write."""
    inputs = make_inputs(case, device)
    plain, attention._allocate = attention._allocate, poisoned
    try:
        ours = results_of(lambda qkv, d, padding: attend_triton(qkv, d, padding, 0.0), case, inputs)
    finally:
        attention._allocate = plain
    return error(ours, expected(case, inputs))


def weights_of(case: Case, inputs: Inputs, dropout: float, seed: int) -> Tensor:
    """The weights as they are after dropout (N, H, T, T): values that are one-hot show them. Needs T <= C."""
    qkv = inputs.qkv.detach().clone()
    qkv[:, :, 2] = torch.eye(case.T, case.C, device=qkv.device)[None, :, None]
    seeds = torch.tensor([seed], device=qkv.device)
    out = attend_triton(qkv, inputs.distance(case.extra), inputs.padding_NT, dropout, seeds)
    return out.detach().transpose(1, 2)[..., : case.T]


DROPPED = Case(2, 41, 2, 48, extra=1, padding="tail", far=0)  # no distance: no weight is 0 but by dropout


def dropout_facts(device: str = "cpu", rates: tuple[float, ...] = (0.1, 0.6)) -> dict:
    """Of what dropout does: the error of output and gradient given what it kept, and statistics of that."""
    inputs = make_inputs(DROPPED, device)
    facts = {}
    for dropout in rates:
        seed = 2**40 + 7
        weights = weights_of(DROPPED, inputs, dropout, seed)
        kept = weights != 0
        seeds = torch.tensor([seed], device=device)
        inputs.qkv.grad = inputs.scale.grad = None
        ours = results_of(lambda qkv, d, p: attend_triton(qkv, d, p, dropout, seeds), DROPPED, inputs)  # noqa: B023
        truth = expected(DROPPED, inputs, kept, dropout)
        real = ~inputs.padding_NT[:, None, None, :].expand_as(kept)
        alone = weights_of(DROPPED, inputs, dropout, seed + 1) != 0
        facts[str(dropout)] = {
            "error": error(ours[:2], truth[:2]),
            "dropped": 1 - float(kept[real].float().mean()),
            "count": int(real.sum()),
            "is_repeated": bool(torch.equal(weights, weights_of(DROPPED, inputs, dropout, seed))),
            "agreement": float((kept == alone)[real].float().mean()),
            "heads": float((kept[:, 0] == kept[:, 1])[real[:, 0]].float().mean()),
            "rows": float((kept[0] == kept[1])[real[0] & real[1]].float().mean()),
            "neighbours": float((kept[..., 1:8] == kept[..., :7])[:1].float().mean()),
        }
    return facts


def bytes_of(case: Case) -> dict:
    """What the kernels ask memory for, forward and backward."""
    inputs = make_inputs(case)
    distance = inputs.distance(0)._replace(positions_NK=inputs.positions_NK.int())
    with counted_bytes() as forward:
        out = attend_triton(inputs.qkv, distance, None, 0.0)
    with counted_bytes() as backward:
        out.backward(inputs.d_out)
    return {"forward": forward, "backward": backward}


COUNTED = Case(2, 67, 2, 24, dtype="float16")


@pytest.fixture(scope="module")
def interpreted() -> dict:
    return run_interpreted(__file__)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernels_equal_float64(case, interpreted):
    """Output and gradients for q, k, v and the scale; NaN fails too: no element is left unwritten."""
    assert interpreted["errors"][str(case)] < tolerance(case)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_kernels_equal_float64(case):
    assert kernel_error(case, "cuda") < tolerance(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_equals_float64(case):
    """The slow truth is true."""
    inputs = make_inputs(case)
    ours = results_of(lambda qkv, d, padding: attend_reference(qkv, d, padding, 0.0), case, inputs)
    assert error(ours, expected(case, inputs)) < tolerance(case)


def check_dropout(facts: dict) -> None:
    for rate, fact in ((float(key), value) for key, value in facts.items()):
        sigma = (rate * (1 - rate) / fact["count"]) ** 0.5
        by_chance = rate**2 + (1 - rate) ** 2
        assert fact["error"] < 2e-5
        assert fact["is_repeated"]
        assert abs(fact["dropped"] - rate) < 4 * sigma
        for pair in ("agreement", "heads", "rows", "neighbours"):
            assert abs(fact[pair] - by_chance) < 0.06, pair


def test_interpreted_dropout_is_right_in_forward_and_backward(interpreted):
    """Given what forward dropped, output and gradients are float64's; as many as asked; nothing is drawn twice."""
    check_dropout(interpreted["dropout"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_dropout_is_right_in_forward_and_backward():
    check_dropout(dropout_facts("cuda"))


def test_kernels_move_the_bytes_that_their_grids_imply(interpreted):
    """Keys and values once for each tile of queries, queries once for each tile of keys; all else once. Nothing
    grows with T * T."""
    case, element = COUNTED, 2
    heads, T = case.N * case.H, case.T
    token, word = T * case.C * element, 4  # of one head: a tensor of tokens; an fp32 or int32
    tiles = attention.tile_shapes(case.C, torch.float16)
    forward, for_queries, for_keys = (
        -(-T // size) for size in (tiles[0].queries, tiles[1].queries, tiles[2].keys)
    )

    def places(count: int) -> int:  # a tile's own positions, all positions again for each, and the strength
        return word * (T + count * T + count)

    read = heads * (token + forward * 2 * token + places(forward))
    assert interpreted["bytes"]["forward"] == {"read": read, "written": heads * (token + 2 * T * word)}
    read = heads * (3 * token + for_queries * 2 * token + 2 * T * word + places(for_queries))
    read += heads * (2 * token + for_keys * (2 * token + 3 * T * word) + places(for_keys))
    written = heads * (3 * token + T * word + for_queries * word)
    assert interpreted["bytes"]["backward"] == {"read": read, "written": written}


def test_what_backward_keeps_is_linear_in_tokens(monkeypatch):
    """Every buffer of forward and backward: at most a constant number of values a token."""
    shapes = []

    def recorded(shape, dtype, device):
        shapes.append(shape)
        return torch.zeros(tuple(shape), dtype=dtype, device=device)

    monkeypatch.setattr(attention, "_allocate", recorded)
    for name in ("_forward_kernel", "_query_gradient_kernel", "_key_gradient_kernel"):
        kernel = getattr(attention, name)
        launch = {"__getitem__": lambda self, grid: lambda *args, **meta: None}
        monkeypatch.setattr(attention, name, type("Launch", (), launch)())
        assert kernel is not None
    pytest.importorskip("triton")
    sums = []
    for T in (500, 1000):
        shapes.clear()
        inputs = make_inputs(Case(1, T, 2, 16))
        attend_triton(inputs.qkv, inputs.distance(0), None, 0.0).backward(inputs.d_out)
        sums.append(sum(torch.Size(shape).numel() for shape in shapes))
    assert len(shapes) == 5
    assert sums[1] < 2.02 * sums[0]


def test_rows_and_heads_may_pass_what_the_second_axis_of_a_grid_holds(monkeypatch):
    """65,535, on every GPU; the first holds 2**31 - 1."""
    pytest.importorskip("triton")
    grids = []

    class Launch:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **meta: None

    for name in ("_forward_kernel", "_query_gradient_kernel", "_key_gradient_kernel"):
        monkeypatch.setattr(attention, name, Launch())
    inputs = make_inputs(Case(2**15, 1, 2, 8, dtype="bfloat16"))
    attend_triton(inputs.qkv, inputs.distance(0), None, 0.0).backward(inputs.d_out)
    assert grids == [(2**16,)] * 3


def test_without_a_bias_it_is_torchs_own():
    """To the bit, with and without padding."""
    inputs = make_inputs(Case(2, 13, 2, 16, padding="tail"))
    q, k, v = inputs.qkv.permute(2, 0, 3, 1, 4)
    plain = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    assert torch.equal(attend(inputs.qkv, None, None, 0.0), plain)
    mask = ~inputs.padding_NT[:, None, None]
    masked = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    assert torch.equal(attend(inputs.qkv, None, inputs.padding_NT, 0.0), masked)


def test_cpu_makes_the_bias_once_for_all_layers():
    """So that what many layers add is one tensor; on a GPU it stays a distance."""
    inputs = make_inputs(Case(2, 13, 2, 16, extra=1))
    bias = distance_bias(inputs.distance(1))
    assert torch.equal(bias, make_bias(inputs.distance(1)))
    assert bias.shape == (2, 2, 13, 13)
    assert torch.equal(attend(inputs.qkv, bias, None, 0.0), attend(inputs.qkv, inputs.distance(1), None, 0.0))


def test_module_works_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("attention_without_triton", attention.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    inputs = make_inputs(Case(2, 13, 2, 16))
    assert not module.has_kernel(inputs.qkv)
    distance = module.Distance(*inputs.distance(0))
    assert torch.equal(
        module.attend(inputs.qkv, distance, None, 0.0), attend(inputs.qkv, inputs.distance(0), None, 0.0)
    )


GOOD = {
    "qkv": torch.zeros(2, 5, 3, 2, 16),
    "bias": Distance(torch.ones(2), torch.arange(5)[None], 0),
    "padding_NT": torch.zeros(2, 5, dtype=torch.bool),
    "dropout": 0.0,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(2, 5, 96)}, r"qkv has shape \(2, 5, 96\).*\(N, T, 3, H, C\); view"),
        ({"dropout": 1.0}, r"dropout is 1\.0.* 0\.\.1 .*; set"),
        ({"padding_NT": torch.zeros(2, 4).bool()}, r"bool \(2, 4\).*\(2, 5\); pass"),
        ({"padding_NT": torch.zeros(2, 5)}, r"torch\.float32 .*must be torch\.bool"),
        (
            {"bias": Distance(torch.ones(2), torch.arange(5)[None], 1)},
            r"1 extra tokens do not fit .*T=5.*; pass",
        ),
        ({"bias": Distance(torch.ones(3), torch.arange(5)[None], 0)}, r"strengths \(3,\).*H=2; pass"),
    ],
)
@pytest.mark.parametrize("function", [attend, attend_reference, attend_triton])
def test_bad_argument_says_value_rule_and_remedy(function, change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        function(*(GOOD | change).values())


# C, dtype, extra tokens, has padding, has dropout: the recipes, then others
COMPILED = [
    (64, "bf16", 0, False, False),
    (64, "bf16", 0, True, True),
    (80, "fp16", 1, True, True),
    (64, "fp32", 0, True, True),
]
KERNELS = {
    "forward": (attention._forward_kernel, 0),
    "queries": (attention._query_gradient_kernel, 1),
    "keys": (attention._key_gradient_kernel, 2),
}


def compile_kernel(compiler, name: str, shape: tuple, capability: int) -> Compiled:  # noqa: F811
    C, dtype, extra, has_padding, has_dropout = shape
    kernel, index = KERNELS[name]
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    meta = attention._meta(attention.tile_shapes(C, torch_dtype)[index], C, extra, torch_dtype)
    options = {option: meta.pop(option) for option in ("num_warps", "num_stages")}
    types = {argument: f"*{dtype}" for argument in ("qkv", "out", "d_out", "d_qkv")}
    types |= {argument: "*fp32" for argument in ("statistics", "delta", "d_strength", "strength")}
    types |= {"positions": "*i32", "padding": "*u8", "seed": "*i64", "scale": "fp32", "rescale": "fp32"}
    absent = {} if has_padding else {"padding": None}
    absent |= {} if has_dropout else {"seed": None}
    aligned = [n for n in kernel.arg_names if types.get(n, "").startswith("*") and n != "padding"]
    return compiler(kernel, types, meta | absent, aligned, capability, **options)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("shape", "capability"),
    [(shape, c) for shape in COMPILED for c in CAPABILITIES if shape in COMPILED[:2] or c == 90],
    ids=str,
)
def test_kernel_compiles_without_spills(shape, name, capability, compiler):  # noqa: F811
    """Ahead of time; tokens are read 16 bytes a thread, into registers or asynchronously into shared memory."""
    done = compile_kernel(compiler, name, shape, capability)
    print(done, dict(Counter(done.stores)))
    done.check(SHARED_LIMIT[capability])
    widths = Counter(done.loads)
    assert widths["v4.b32"] + widths["16"] >= 3
    assert not {"b16", "v2.b16", "v4.b16", "v2.b32"} & set(done.loads)  # b32, 4: positions, statistics
    assert "v4.b32" in done.stores and "b16" not in done.stores


if __name__ == "__main__":
    torch.set_num_threads(1)
    prepare_interpreter()
    errors = {str(case): kernel_error(case) for case in CASES}
    print_results({"errors": errors, "dropout": dropout_facts(rates=(0.4,)), "bytes": bytes_of(COUNTED)})
