"""Every spelling of the command line that the launchers and their documentation know."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from ranks import ROOT

from d2v_ds import cli
from d2v_ds.training import run
from d2v_ds.training.arguments import Arguments, build_parser, parse_arguments

CONFIG = "ds_configs/zero2.json"
DEFAULT = "multimodal_tiny"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", Arguments(DEFAULT, None, [], False)),
        ("--deepspeed", Arguments(DEFAULT, None, [], False)),
        (f"--deepspeed {CONFIG}", Arguments(DEFAULT, CONFIG, [], False)),
        (f"--deepspeed={CONFIG}", Arguments(DEFAULT, CONFIG, [], False)),
        ("--deepspeed zero1", Arguments(DEFAULT, "zero1", [], False)),
        (f"--deepspeed {CONFIG} seed=3", Arguments(DEFAULT, CONFIG, ["seed=3"], False)),
        ("--deepspeed seed=3", Arguments(DEFAULT, None, ["seed=3"], False)),
        (
            "--deepspeed seed=3 out=a --recipe image_tiny",
            Arguments("image_tiny", None, ["seed=3", "out=a"], False),
        ),
        ("seed=3 --deepspeed", Arguments(DEFAULT, None, ["seed=3"], False)),
        (
            "seed=3 --deepspeed --recipe image_tiny out=a",
            Arguments("image_tiny", None, ["seed=3", "out=a"], False),
        ),
        (f"--deepspeed_config {CONFIG}", Arguments(DEFAULT, CONFIG, [], False)),
        (f"--deepspeed --deepspeed_config {CONFIG}", Arguments(DEFAULT, CONFIG, [], False)),
        (f"--deepspeed --deepspeed_config {CONFIG} seed=3", Arguments(DEFAULT, CONFIG, ["seed=3"], False)),
        (f"--deepspeed {CONFIG} --deepspeed_config {CONFIG}", Arguments(DEFAULT, CONFIG, [], False)),
        (f"--local_rank=1 --deepspeed {CONFIG}", Arguments(DEFAULT, CONFIG, [], False)),
        ("--local-rank=1", Arguments(DEFAULT, None, [], False)),
        ("--local_rank 0 seed=3", Arguments(DEFAULT, None, ["seed=3"], False)),
        ("--recipe mine.yaml", Arguments("mine.yaml", None, [], False)),
        ("--recipe=mine.yaml a=1 --print-recipe b=2", Arguments("mine.yaml", None, ["a=1", "b=2"], True)),
        ("optim.lr=-1e-3 data=a::b", Arguments(DEFAULT, None, ["optim.lr=-1e-3", "data=a::b"], False)),
    ],
)
def test_a_spelling_parses(line, expected):
    assert parse_arguments(line.split()) == expected


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (
            "--deepspeed a.json --deepspeed_config b.json",
            ("a.json", "b.json", "contradict each other; give one"),
        ),
        ("--deepspeedd a.json", ("unknown option --deepspeedd", "--help")),
        ("--recip image_tiny", ("unknown option --recip",)),
        ("seed=3 --epochs=5", ("unknown option --epochs=5",)),
        ("--recipe", ("--recipe", "expected one argument")),
        ("--local_rank first", ("local_rank", "invalid int value")),
    ],
)
def test_a_wrong_spelling_is_an_error(line, parts, capsys):
    """Exit code 2, the argument, and no run."""
    with pytest.raises(SystemExit) as caught:
        parse_arguments(line.split())
    text = capsys.readouterr().err
    assert caught.value.code == 2 and all(part in text for part in parts), text


def help_of(argv: list[str], main, capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_tells_every_option_and_the_overrides(capsys):
    text = help_of(["--help"], run.main, capsys)
    for action in build_parser()._actions:
        assert all(option in text for option in action.option_strings)
    for key in ("key=value", "train.steps=", "optim.lr=", "data=", "out=", "precision=", "nearest"):
        assert key in text


def test_the_overrides_that_help_shows_exist(capsys):
    """Of multimodal_tiny."""
    from d2v_ds.config import dotted_keys
    from d2v_ds.recipe import load_recipe

    shown = re.findall(r"\b([a-z_.]+)=", help_of(["--help"], run.main, capsys).split("overrides:")[1])
    assert len(shown) >= 8 and set(shown) <= set(dotted_keys(load_recipe(DEFAULT)))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--deepspeed",
        f"--deepspeed {CONFIG} seed=3",
        f"--deepspeed_config {CONFIG}",
        "--deepspeed seed=3 --recipe image_tiny",
        "--local_rank=1 --print-recipe",
    ],
)
def test_the_console_command_takes_what_train_py_takes(line, monkeypatch):
    """What `d2v train` hands to the training is what `train.py` does."""
    seen: list[object] = []

    def parse(argv: list[str] | None, prog: str | None) -> Arguments:
        seen.append((parse_arguments(argv, prog), prog))
        raise ValueError("far enough")

    def caught(main, argv: list[str]) -> None:
        with pytest.raises(ValueError, match="far enough"):
            main(argv)

    monkeypatch.setattr(run, "parse_arguments", parse)
    caught(cli.main, ["train", *line.split()])
    caught(lambda argv: run.main(argv, prog="train.py"), line.split())
    (ours, our_name), (theirs, their_name) = seen
    assert ours == theirs and (our_name, their_name) == ("d2v train", "train.py")


def test_both_helps_differ_in_the_name_only(capsys):
    console = help_of(["train", "--help"], cli.main, capsys)
    script = help_of(["--help"], lambda argv: run.main(argv, prog="d2v train"), capsys)
    assert console == script and console.startswith("usage: d2v train")


def test_the_printed_recipe_is_the_resolved_one_and_loads_back(tmp_path, capsys):
    from d2v_ds.recipe import load_recipe

    assert run.main(["--print-recipe", "--recipe", "image_tiny", "optim.lr=1e-3"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(str(tmp_path / "printed.yaml")) == load_recipe("image_tiny", ["optim.lr=1e-3"])


def test_train_py_runs_from_any_folder(tmp_path):
    """As a real process; a mistake ends it with exit code 2 and one line."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "train.step=3"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert lines == ["error: unknown key 'train.step'; did you mean 'train.steps'?"]
    assert "Traceback" not in done.stderr
