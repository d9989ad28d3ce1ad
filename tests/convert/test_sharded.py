"""Exports of any size: tensor by tensor, in several files, in any dtype, and read back by whoever reads exports."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from synthetic import expected, write_synthetic

import d2v_ds
from d2v_ds.cli import main
from d2v_ds.convert.consolidate import export, export_run
from d2v_ds.convert.fit import shapes
from d2v_ds.convert.load import read
from d2v_ds.convert.sharded import DTYPES, INDEX, SINGLE, split
from d2v_ds.model.data2vec import TEACHER
from d2v_ds.recipe import Recipe, load_recipe
from d2v_ds.training.init import read_start

RANKS = 3


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("text_tiny")


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "run"
    write_synthetic(folder, recipe, RANKS)
    return folder


def whole(recipe: Recipe) -> dict[str, torch.Tensor]:
    return {name: expected(name, shape, RANKS) for name, shape in shapes(recipe).items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", ["student", "teacher", "both"])
def test_an_export_in_any_dtype_is_the_checkpoint_rounded(weights, dtype, run, recipe, tmp_path):
    out = export(run, tmp_path / "out", weights, dtype=dtype)
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    model = whole(recipe)
    tensors = load_file(out / SINGLE)
    if weights == "both":
        assert tensors.keys() == model.keys()
    else:
        assert tensors.keys() == {name for name in model if not name.startswith(TEACHER)}
    for name, tensor in tensors.items():
        own = TEACHER + name if weights == "teacher" and TEACHER + name in model else name
        assert torch.equal(tensor, model[own].to(DTYPES[dtype])), name
    stored = read(out)
    assert all(torch.equal(stored.tensors[name], tensors[name].float()) for name in stored.tensors)
    assert {t.dtype for t in stored.tensors.values()} == {torch.float32}
    assert dtype in (out / "README.md").read_text()


@pytest.mark.slow
def test_an_export_of_several_files_is_read_as_one_of_one(run, recipe, tmp_path):
    """By `load`, `init=` and the library's own reader; a later export leaves nothing of it behind."""
    one = export(run, tmp_path / "one", "both")
    out = export_run(run, tmp_path / "many", "both", "fp32", shard_bytes=40_000)
    index = json.loads((out / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert not (out / SINGLE).exists()
    assert index["metadata"]["total_size"] == sum(4 * t.numel() for t in whole(recipe).values())
    for name, file in index["weight_map"].items():
        with safe_open(out / file, framework="pt") as opened:
            assert torch.equal(opened.get_tensor(name), load_file(one / SINGLE)[name])
    a, b = read(one), read(out)
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(t, b.tensors[name]) for name, t in a.tensors.items())
    ids = torch.tensor([[0, 7, 9, 2]])
    assert torch.equal(d2v_ds.load(one).extract(ids), d2v_ds.load(out).extract(ids))
    started = read_start(recipe.model_copy(update={"init": str(out)}))
    assert all(torch.equal(t, whole(recipe)[name]) for name, t in started.student.items())
    export(run, out, "student")
    assert not list(out.glob("model-*")) and not (out / INDEX).exists() and (out / SINGLE).exists()


def test_a_file_that_is_absent_or_damaged_is_named(run, tmp_path):
    out = export_run(run, tmp_path / "many", "student", "fp32", shard_bytes=40_000)
    first = sorted(out.glob("model-*"))[0]
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{first.name} is damaged .*export it again"):
        read(out)
    first.unlink()
    with pytest.raises(ValueError, match=f"{first.name} is damaged .*No such file"):
        read(out)
    (out / INDEX).write_text('{"weight_map": {"a": "../secret"}}')
    with pytest.raises(ValueError, match="names files outside its folder"):
        read(out)


def test_files_are_filled_in_order_up_to_the_limit():
    sizes = {"a": (10,), "b": (10,), "c": (100,), "d": (1,), "e": ()}
    assert [list(g) for g in split(sizes, torch.float32, 80)] == [["a", "b"], ["c"], ["d", "e"]]
    assert [list(g) for g in split(sizes, torch.bfloat16, 1000)] == [list(sizes)]


def test_the_command_takes_a_dtype_for_its_own_format_alone(run, tmp_path, capsys):
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    assert {t.dtype for t in load_file(tmp_path / "out" / SINGLE).values()} == {torch.bfloat16}
    again = tmp_path / "again"  # of an export, too
    assert main(["export", str(tmp_path / "out"), "--out", str(again), "--dtype", "fp16"]) == 0
    assert {t.dtype for t in load_file(again / SINGLE).values()} == {torch.float16}
    assert main(["export", str(run), "--out", str(tmp_path / "x"), "--format", "hf", "--dtype", "bf16"]) == 2
    assert "dtype=bf16 is for format safetensors" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_damaged_step_folder_is_not_exported(run, recipe, tmp_path):
    final = write_synthetic(tmp_path / "run", recipe, 2)
    with (final / "rank_00001.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x55")
    with pytest.raises(ValueError, match="rank_00001.safetensors is damaged"):
        export(final, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_memory_is_that_of_a_tensor_not_of_the_model(tmp_path):
    """400 MB of weights of eight ranks, in less than 150 MB above what the imports take."""
    recipe = load_recipe("text_tiny", ["body.dim=512", "body.depth=32", "body.heads=8"])
    write_synthetic(tmp_path / "run", recipe, 8, teacher=False)
    code = (
        "import resource, sys; from d2v_ds.convert.consolidate import export; import d2v_ds.convert.load; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        f"export({str(tmp_path / 'run')!r}, {str(tmp_path / 'out')!r}, 'student', dtype='bf16'); "
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size = sum(p.stat().st_size for p in (tmp_path / "run").rglob("rank_*"))
    assert size > 400e6 and int(done.stdout) < 150, done.stdout


@pytest.mark.slow
def test_two_billion_parameters_of_eight_ranks_are_exported_within_two_gigabytes(tmp_path):
    """Teacher excluded, to spare the disk: 8 GB in, 4 GB out."""
    recipe = load_recipe("text_tiny", ["body.dim=2048", "body.depth=40", "body.heads=32"])
    assert sum(torch.Size(s).numel() for n, s in shapes(recipe).items() if not n.startswith(TEACHER)) > 2e9
    write_synthetic(tmp_path / "run", recipe, 8, teacher=False)
    command = ["-m", "d2v_ds.cli", "export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    subprocess.run([sys.executable, *command, "--dtype", "bf16"], check=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2e6  # KiB
    with safe_open(tmp_path / "out" / SINGLE, framework="pt") as file:
        name = "blocks.39.mlp.fc1.weight"
        name = name if name in file.keys() else next(n for n in file.keys() if n.startswith("blocks.39"))  # noqa: SIM118
        assert torch.equal(file.get_tensor(name), expected(name, shapes(recipe)[name], 8).bfloat16())


LIVE = [f"{stage}_{precision}" for stage in ("zero1", "zero2", "zero3") for precision in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("live")
    run_ranks(Path(__file__).with_name("live_ranks.py"), out, *LIVE)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("case", LIVE)
def test_an_export_equals_the_live_student_and_teacher(case, live, tmp_path):
    """fp32: the optimizer's masters and the average. In the precision of the run: what its forward passes use."""
    model = load_file(live / f"{case}.safetensors")
    exact = load_file(export(live / case, tmp_path / "fp32", "both") / SINGLE)
    compared = 0
    for key, value in model.items():
        kind, _, name = key.partition(".")
        if kind != "used":
            compared += 1
            assert torch.equal(value, exact[name if kind == "student" else TEACHER + name]), key
    assert compared > 100
    dtype = case.partition("_")[2]
    rounded = load_file(export(live / case, tmp_path / "own", "both", dtype=dtype) / SINGLE)
    used = {key.removeprefix("used."): value for key, value in model.items() if key.startswith("used.")}
    assert used.keys() == rounded.keys()
    assert all(torch.equal(value, rounded[name]) for name, value in used.items())
