"""A checkpoint folder is whole or named as damaged, stays in its run folder, and is read piece by piece."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2v_ds.engine.checkpoint import (
    Checkpoint,
    checkpoints,
    commit,
    damage,
    make_folder,
    newest,
    point_to,
    recover,
    refuse_links,
    write_json,
    write_manifest,
    write_rank,
)
from d2v_ds.engine.saver import prune, remove_leftovers
from d2v_ds.engine.tensor_file import TensorFile, open_new, write_tensors

SHAPE = (5, 7)
WHOLE = torch.arange(35, dtype=torch.float32)


def write_step(run: Path, step: int, cuts: tuple[int, ...] = (0, 13, 35)) -> Path:
    """A committed checkpoint of one parameter `w` in as many rank files as there are stretches."""
    run.mkdir(exist_ok=True)
    temporary, final = run / f".tmp-step_{step:08d}", run / f"step_{step:08d}"
    make_folder(temporary)
    files = [
        write_rank(temporary, rank, {f"weight|w|{a}": WHOLE[a:b] + step})
        for rank, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False))
    ]
    files.append(write_json(temporary / "loop.json", {"step": step, "skipped_steps": 0, "loss_scaler": {}}))
    parameters = {"w": {"shape": list(SHAPE), "trainable": True}}
    write_manifest(temporary, {"step": step, "world_size": 2, "parameters": parameters, "files": files})
    commit(temporary, final)
    return final


FILES = ("rank_00000.safetensors", "rank_00001.safetensors", "loop.json", "manifest.json")


# ---- damage ----


def test_a_checkpoint_as_it_was_written_is_whole(tmp_path):
    final = write_step(tmp_path / "run", 3)
    assert damage(final) is None and newest(tmp_path / "run") == (final, [])
    assert (tmp_path / "run" / "latest").read_text() == final.name
    assert {p.name for p in (tmp_path / "run").iterdir()} == {final.name, "latest"}


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_noticed_and_named(name, tmp_path):
    """The first and last bits and 200 others; the one before is taken."""
    run = tmp_path / "run"
    before, last = write_step(run, 3), write_step(run, 6)
    content = (last / name).read_bytes()
    size = 8 * len(content)
    for bit in [*range(32), *range(size - 32, size), *random.Random(1).sample(range(size), min(200, size))]:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (last / name).write_bytes(flipped)
        problem = damage(last)
        if problem is None:  # a manifest's line break or space may become another: it says the same
            assert name == "manifest.json" and json.loads(flipped) == json.loads(content), bit
        else:
            assert str(last) in problem and name in problem, (bit, problem)
    (last / name).write_bytes(content[: len(content) // 2] + b"\xff" * (len(content) - len(content) // 2))
    found, problems = newest(run)
    assert found == before and len(problems) == 1 and name in problems[0]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["truncated", "empty", "missing", "longer", "a folder"])
def test_a_file_that_is_not_as_written_is_named_and_the_one_before_taken(how, name, tmp_path):
    run = tmp_path / "run"
    before, last = write_step(run, 3), write_step(run, 6)
    content = (last / name).read_bytes()
    (last / name).unlink()
    if how == "a folder":
        (last / name).mkdir()
    elif how != "missing":
        (last / name).write_bytes({"truncated": content[:-1], "empty": b"", "longer": content + b"\0"}[how])
    found, problems = newest(run)
    assert found == before and len(problems) == 1 and str(last) in problems[0] and name in problems[0]


def test_a_file_that_the_manifest_does_not_name_is_not_read(tmp_path):
    """Nor one outside the folder that it does."""
    final = write_step(tmp_path / "run", 3)
    save_file({"weight|w|0": torch.zeros(35)}, final / "rank_00007.safetensors")
    assert torch.equal(Checkpoint(final).tensor("w"), (WHOLE + 3).view(SHAPE))
    manifest = json.loads((final / "manifest.json").read_text())
    manifest["files"][0]["name"] = "../secret"
    (final / "manifest.json").unlink()
    write_manifest(final, {k: v for k, v in manifest.items() if k not in ("sha256", "version")})
    assert "names ../secret, which is not a file in the folder" in damage(final)


def test_checkpoints_of_the_first_version_are_read(tmp_path):
    """Their manifests have no hash of their own; those of a later version are refused."""
    final = write_step(tmp_path / "run", 3)
    manifest = json.loads((final / "manifest.json").read_text())
    del manifest["sha256"]
    (final / "manifest.json").write_text(json.dumps(manifest | {"version": 1}))
    assert damage(final) is None and torch.equal(
        Checkpoint(final).read("weight", "w", 10, 9), WHOLE[10:19] + 3
    )
    (final / "manifest.json").write_text(json.dumps(manifest | {"version": 3}))
    assert "of version 3" in damage(final)


def test_a_damaged_latest_is_repaired_and_told(tmp_path):
    """One that lags behind by a checkpoint, as a kill leaves it, is repaired in silence."""
    run = tmp_path / "run"
    write_step(run, 3)
    final = write_step(run, 6)
    for said, told in ((b"step_0000\xff", "step_0000\\xff"), (b"", ""), (b"step_00000003", None)):
        (run / "latest").write_bytes(said)
        assert point_to(run, final) == told
        assert (run / "latest").read_text() == final.name
    (run / "latest").unlink()
    assert point_to(run, final) == "" and (run / "latest").read_text() == final.name


# ---- which stay ----


def test_a_checkpoint_that_makes_way_for_another_is_never_lost(tmp_path):
    """Killed between the two renames, it gets its name back; after both, the new one has it."""
    run = tmp_path / "run"
    final = write_step(run, 3)
    final.rename(run / f".tmp-replaced-{final.name}")
    recover(run)
    assert newest(run) == (final, []) and not list(run.glob(".tmp-*"))
    before = (final / "loop.json").stat().st_mtime_ns
    write_step(run, 3)
    assert newest(run) == (final, []) and (final / "loop.json").stat().st_mtime_ns > before
    assert not list(run.glob(".tmp-*"))


def test_the_last_k_and_every_nth_stay(tmp_path):
    run = tmp_path / "run"
    for step in range(2, 22, 2):
        write_step(run, step)
        prune(run, keep=2, keep_every=8)
    assert [int(p.name[5:]) for p in checkpoints(run)] == [20, 18, 16, 8]
    assert {p.name for p in run.iterdir()} == {"latest", *(p.name for p in checkpoints(run))}


def test_leftovers_of_a_kill_are_removed(tmp_path):
    """Half-written, half-deleted, and a pointer; nothing else."""
    run = tmp_path / "run"
    final = write_step(run, 3)
    for name in (".tmp-step_00000006", ".tmp-old-step_00000001"):
        (run / name).mkdir()
        (run / name / "rank_00000.safetensors").write_bytes(b"half")
    (run / ".tmp-latest").write_text("step")
    remove_leftovers(run)
    assert {p.name for p in run.iterdir()} == {"latest", final.name}


# ---- links ----


@pytest.mark.parametrize(
    "name",
    [
        "latest",
        "metrics.jsonl",
        ".tmp-step_00000009",
        "step_00000009",
        "step_00000003/rank_00000.safetensors",
        "tensorboard",
        "tensorboard/events",
        ".tmp-latest",
    ],
)
def test_a_link_in_a_run_folder_is_refused_by_name(name, tmp_path):
    """And nothing is written or deleted where it points."""
    run, outside = tmp_path / "run", tmp_path / "outside"
    write_step(run, 3)
    outside.mkdir()
    (outside / "precious").write_text("mine")
    path = run / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(outside)
    with pytest.raises(ValueError, match=r"is a symbolic link .*outside.*own folder alone; remove") as error:
        refuse_links(run)
    assert str(path) in str(error.value)
    remove_leftovers(run)
    assert (outside / "precious").read_text() == "mine" and path.is_symlink()


def test_a_run_folder_may_be_a_link(tmp_path):
    (tmp_path / "big_disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "big_disk")
    write_step(tmp_path / "run", 3)
    refuse_links(tmp_path / "run")
    refuse_links(tmp_path / "absent")


def test_a_link_that_appears_during_a_run_is_not_followed(tmp_path):
    """Neither a file, nor the temporary folder, nor a checkpoint that is to make way."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    run = tmp_path / "run"
    final = write_step(run, 3)
    (run / "file").symlink_to(outside / "new")
    with pytest.raises(FileExistsError):
        open_new(run / "file")
    (run / ".tmp-step_00000009").symlink_to(outside)
    with pytest.raises(ValueError, match="symbolic link"):
        make_folder(run / ".tmp-step_00000009")
    shutil.rmtree(final)
    final.symlink_to(outside)
    (run / "whole").mkdir()
    with pytest.raises(ValueError, match="symbolic link"):
        commit(run / "whole", final)
    assert [p.name for p in outside.iterdir()] == ["precious"]


# ---- files ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_written_piece_by_piece_is_what_the_library_reads(dtype, tmp_path):
    """Scalars and empty tensors too; and any stretch of it is read back."""
    rng = torch.Generator().manual_seed(1)
    shapes = {"a": (3, 5), "scalar": (), "none": (0,), 'odd "name"|0': (7,)}
    tensors = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    record = write_tensors(tmp_path / "x.safetensors", tensors.items(), shapes, dtype)
    assert record["bytes"] == (tmp_path / "x.safetensors").stat().st_size
    theirs, ours = load_file(tmp_path / "x.safetensors"), TensorFile(tmp_path / "x.safetensors")
    assert ours.names() == list(shapes) and theirs.keys() == shapes.keys()
    for name, tensor in tensors.items():
        assert torch.equal(theirs[name], tensor.to(dtype)) and torch.equal(ours.read(name), theirs[name])
    assert torch.equal(ours.read("a", 4, 6), tensors["a"].to(dtype).view(-1)[4:10])
    save_file(tensors, tmp_path / "y.safetensors")
    theirs = TensorFile(tmp_path / "y.safetensors")
    assert all(torch.equal(theirs.read(name), tensor) for name, tensor in tensors.items())
