"""What the kernels' tests share: Triton's interpreter in a child process, bytes counted there, compilers' reports.

Triton reads TRITON_INTERPRET when it is imported (its own tl.sum is decorated then), and any module may have
imported it before a test. So one child process runs all interpreted cases of a file: that file as a script.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

CAPABILITIES = (80, 90, 100)


def run_interpreted(path: str) -> Any:
    """What the file prints, as JSON, when it runs as a script under the interpreter on one thread."""
    pytest.importorskip("triton")
    search = os.pathsep.join(filter(None, sys.path))
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, path]
    child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=Path.cwd())
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def print_results(results: Any) -> None:
    """The child's half of `run_interpreted`."""
    json.dump(results, sys.stdout)


def prepare_interpreter() -> None:
    """Lets kernels loop to a value (numpy 2.4 no longer makes the interpreter's one-element arrays integers) and
    multiply bf16 (it takes the bits for integers)."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, multiply = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def multiply_in_fp32(self, a, b, *rest):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return multiply(self, a, b, *rest)

    def patch_index_too(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_index_too
    interpreter.InterpreterBuilder.create_dot = multiply_in_fp32


@contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """Bytes that the interpreted kernels of this block ask memory for: loads and stores, masked lanes left out."""
    from triton.runtime.interpreter import InterpreterBuilder

    counts = {"read": 0, "written": 0}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self, ptrs, mask, *rest):
        counts["read"] += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return load(self, ptrs, mask, *rest)

    def counted_store(self, ptrs, value, mask, *rest):
        counts["written"] += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return store(self, ptrs, value, mask, *rest)

    InterpreterBuilder.create_masked_load = counted_load
    InterpreterBuilder.create_masked_store = counted_store
    try:
        yield counts
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """In place of a kernel's `_allocate`: an element that is not written is seen."""
    value = torch.nan if dtype.is_floating_point else 0  # a rank of 0 where none belongs
    return torch.full(tuple(shape), value, dtype=dtype, device=device)


@dataclass
class Compiled:
    """What a kernel became on one GPU."""

    registers: int
    """Of a thread."""
    stack: int
    """Bytes of a thread, where spilled registers lie; also arrays with computed indices."""
    shared: int
    """Bytes of a program."""
    num_warps: int
    loads: list[str]
    """Widths of the reads of global memory, in the order of the code: "v4.b32" and "16" (asynchronous) are 16
    bytes."""
    stores: list[str]
    ptx: str

    def __str__(self) -> str:
        return f"{self.registers} registers, {self.stack} B stack, {self.shared} B shared, loads {set(self.loads)}"

    def check(self, shared_limit: int) -> None:
        assert self.stack == 0, f"spills: {self}"
        assert self.registers * 32 * self.num_warps <= 65536, f"too many registers to start: {self}"
        assert self.shared <= shared_limit, f"too much shared memory: {self}"


SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that a program may have."""


def compile_for(
    kernel: Callable,
    types: dict[str, str],
    constants: dict[str, Any],
    aligned: list[str | tuple[str, int]],
    capability: int,
    folder: Path,
    **options: int,
) -> Compiled:
    """Ahead of time, without a GPU, as a launch would specialise it.

    `types` of the arguments that are no int32; `aligned`: those divisible by 16, (name, i) for one of a tuple.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    paths = [(names.index(a),) if isinstance(a, str) else (names.index(a[0]), a[1]) for a in aligned]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items() if name in names},
        {path: [["tt.divisibility", 16]] for path in paths if signature[names[path[0]]] != "constexpr"},
    )
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(done.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    ptx = done.asm["ptx"]
    plain = re.findall(r"ld\.global(?:\.\w+::\w+)*\.(\S+)", ptx)
    copied = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*\],\s*(0x\w+|\d+)", ptx)
    stores = re.findall(r"st\.global\.(\S+)", ptx)
    loads = plain + [str(int(width, 0)) for width in copied]
    return Compiled(registers, stack, done.metadata.shared, done.metadata.num_warps, loads, stores, ptx)


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Compiled]:
    """`compile_for` with a cache of its own; import it into a test file to use it."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter is on")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))

    def compile_here(*args: Any, **options: Any) -> Compiled:
        return compile_for(*args, folder=tmp_path, **options)

    return compile_here
