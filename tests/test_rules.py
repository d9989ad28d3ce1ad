"""The rules of the house that a machine can check: who imports what, plain text, small files."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import ROOT

# A room may import those of a lower level and itself. recipe.py and modalities/ share one: recipes are written
# beside their modality, and a Recipe is made of the modalities' configs.
LEVELS = {
    "config": 0,
    "kernels": 1,
    "data": 1,
    "model": 2,
    "modalities": 3,
    "recipe": 3,
    "engine": 4,
    "convert": 5,
    "multi": 6,
    "tasks": 6,
    "training": 7,
    "cli": 8,
}
STRANGERS = [{"model", "data"}, {"kernels", "data"}]  # these never import each other
HOMES = {
    "deepspeed": ("d2v_ds/engine/",),
    "triton": ("d2v_ds/kernels/",),
    "webdataset": ("d2v_ds/data/", "shards/", "scripts/bench_loader.py"),
    "tarfile": ("d2v_ds/data/", "shards/"),
    "transformers": ("d2v_ds/convert/", "scripts/compare_methods.py"),
    "tokenizers": ("d2v_ds/convert/", "d2v_ds/modalities/text/", "shards/"),
    "onnxruntime": ("d2v_ds/convert/",),
}
SOURCES = sorted(
    path for folder in ("d2v_ds", "shards", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")
)
SOURCES += [ROOT / "train.py", ROOT / "setup.py"]
SHIPPED = {
    "d2v_ds/convert/huggingface/modeling_data2vec2.py"
}  # goes into folders of weights; nothing here imports it


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} imports relatively; write the whole name"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(dotted: str) -> str | None:
    """`model` of `d2v_ds.model.layers`; None for other packages and for d2v_ds itself."""
    package, _, rest = dotted.partition(".")
    return rest.split(".")[0] if package == "d2v_ds" and rest.split(".")[0] in LEVELS else None


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is no git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def python_of(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


# ---- imports ----


def test_every_room_has_a_level():
    """A new one is placed here first."""
    rooms = {p.stem for p in (ROOT / "d2v_ds").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__", "__pycache__"} == set(LEVELS)


def test_imports_run_downward():
    upward = []
    for path in (ROOT / "d2v_ds").rglob("*.py"):
        home = path.relative_to(ROOT / "d2v_ds").with_suffix("").parts[0]
        for other in {room(name) for name in imports(path)} - {None, home}:
            if home != "__init__" and (LEVELS[other] > LEVELS[home] or {home, other} in STRANGERS):
                upward.append(f"{name_of(path)} imports {other}")
    assert upward == []


def test_the_graph_of_imports_was_seen():
    """The test above looks at real edges: some that must be there are."""
    edges = {
        (name_of(path), room(name)) for path in (ROOT / "d2v_ds").rglob("*.py") for name in imports(path)
    }
    assert {
        ("d2v_ds/training/run.py", "engine"),
        ("d2v_ds/model/data2vec.py", "kernels"),
        ("d2v_ds/modalities/source.py", "data"),
        ("d2v_ds/cli.py", "training"),
    } <= edges


@pytest.mark.parametrize("package", HOMES)
def test_a_third_party_has_one_home(package):
    """Imports inside functions count; tests may look inside."""
    users = {
        name_of(path) for path in SOURCES if any(name.split(".")[0] == package for name in imports(path))
    }
    users = {name for name in users if not name.startswith("tests/")}
    assert users, f"nobody uses {package}: delete the rule"
    assert {name for name in users if not name.startswith(HOMES[package])} == set()


def test_nothing_of_the_package_imports_its_tests_or_scripts():
    """The command line alone knows the preparers of data."""
    for path in (ROOT / "d2v_ds").rglob("*.py"):
        others = {"tests", "scripts", "conftest"} | ({"shards"} if path.name != "cli.py" else set())
        assert not {name.split(".")[0] for name in imports(path)} & others


@pytest.mark.parametrize("module", ["d2v_ds", "d2v_ds.cli", "d2v_ds.training.arguments", "d2v_ds.config"])
def test_importing_a_light_module_imports_nothing_heavy(module):
    done = python_of(f"import sys, {module}; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert module in loaded and not loaded & {"torch", "deepspeed", "numpy", "matplotlib", "webdataset"}


def test_indexing_shards_and_the_help_of_preparers_need_no_torch():
    """It would take seconds of each command."""
    done = python_of("import sys, shards.command, d2v_ds.data.index; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert "numpy" in done.stdout.split() and not set(done.stdout.split()) & {"torch", "transformers"}


def test_importing_everything_imports_no_heavy_third_party():
    """They are imported when they are used, so a mistake is told in seconds, and most uses need none."""
    names = {name_of(path) for path in (ROOT / "d2v_ds").rglob("*.py")} - SHIPPED
    modules = [name[:-3].replace("/", ".") for name in sorted(names)]
    done = python_of(
        f"import sys, {', '.join(m.removesuffix('.__init__') for m in modules)}; print(*sys.modules)"
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "torch" in loaded and not loaded & {"deepspeed", "transformers", "onnx", "onnxruntime"}


def test_public_names_are_there():
    """And an unknown one lists them."""
    done = python_of(
        "import d2v_ds; print(*(getattr(d2v_ds, n).__name__ for n in d2v_ds.__all__ if n[0] != '_')); "
        "d2v_ds.lod"
    )
    assert set(done.stdout.split()) >= {"load", "train", "Recipe", "Data2Vec"}
    assert "module 'd2v_ds' has no attribute 'lod'; it has: " in done.stderr


# ---- commands ----


@pytest.mark.parametrize(
    "command", [[str(Path(sys.executable).with_name("d2v"))], [sys.executable, "-m", "d2v_ds.cli"]]
)
def test_the_console_command_tells_its_commands(command):
    done = subprocess.run(
        [*command, "--help"], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    for name in ("train", "export", "index", "recipes", "probe"):
        assert f"\n    {name} " in done.stdout


def test_the_recipes_are_listed_with_a_line_each(capsys):
    from d2v_ds.cli import main
    from d2v_ds.recipe import recipes

    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(recipes())
    assert all(len(line.split()) > 4 for line in lines)


# ---- files ----


def test_sources_are_ascii():
    suffixes = {".py", ".sh", ".json", ".toml", ".md", ".sbatch", ".yaml", ".yml", ".cfg", ".txt"}
    odd = [name_of(path) for path in tracked() if path.suffix in suffixes and not path.read_bytes().isascii()]
    assert odd == []


@pytest.mark.parametrize("path", [path for path in SOURCES if path.stat().st_size], ids=name_of)
def test_a_file_says_in_its_first_docstring_what_it_is(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring and docstring.splitlines()[0].strip()


def test_tracked_files_are_small():
    """At most 3 MB each; data are made, not committed."""
    files = tracked()
    assert len(files) > 50
    assert [name_of(path) for path in files if path.stat().st_size > 3_000_000] == []


def test_no_tracked_file_is_written_by_a_run():
    """Indexes beside shards, checkpoints and caches stay out."""
    bad = (".idx", ".npy", ".tar.json", ".pyc", ".pt", ".ckpt")
    assert [name_of(path) for path in tracked() if name_of(path).endswith(bad)] == []


def test_shipped_presets_are_plain_json_with_the_autos_of_a_preset():
    """Each sets what only the recipe knows to "auto"."""
    import json

    for path in (ROOT / "ds_configs").glob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        for key in (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
        ):
            assert config[key] == "auto", path.name
