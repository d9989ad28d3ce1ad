"""Every command of docs/reproduce.md is one that this version takes: recipes, keys, options, scripts, parts of data."""

from __future__ import annotations

import re
import shlex

import pytest
from ranks import ROOT

from d2v_ds import cli
from d2v_ds.recipe import Recipe, load_recipe, recipes
from d2v_ds.training.arguments import parse_arguments
from shards import command

TEXT = (ROOT / "docs/reproduce.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines() if line.strip(" #")
]
COMMANDS = [words for words in COMMANDS if words]
TRAININGS = [words for words in COMMANDS if "train.py" in words]


def read(words: list[str]) -> Recipe:
    arguments = parse_arguments(words[words.index("train.py") + 1 :])
    assert (ROOT / "ds_configs" / f"{arguments.deepspeed}.json").is_file()
    return load_recipe(arguments.recipe, arguments.overrides)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_is_one_that_can_be_given(words):
    if "train.py" in words:
        assert words[0] == "deepspeed"
        read(words)
    elif words[:2] == ["d2v", "prepare"]:
        command.build_parser("d2v prepare").parse_args(words[2:])
    elif words[:2] == ["d2v", "tokenizer"]:
        assert words[2] in ("train", "import")
    elif words[0] == "d2v":
        cli.build_parser().parse_args(words[1:])
    else:
        settings = [word.partition("=")[0] for word in words if re.match("[A-Z]+=", word)]
        script = ROOT / words[len(settings) + 1]
        assert script.is_file()
        head = script.read_text("utf-8").partition("set -euo")[0]
        assert all(re.search(rf"^#   {name}\b", head, re.MULTILINE) for name in settings)


def test_what_is_fine_tuned_or_measured_was_made_above():
    """Runs that a command reads, unless it reads released weights."""
    made = set()
    for words in COMMANDS:
        keys = dict(word.split("=", 1) for word in words if "=" in word)
        read_from = (
            keys.get("init") or keys.get("INIT") or (words[3] if words[:2] == ["d2v", "eval"] else None)
        )
        assert read_from is None or read_from in made or read_from.endswith(".pt"), words
        if out := keys.get("out"):
            assert out not in made, f"{out} is written twice"
            made.add(out)


def test_every_recipe_that_a_row_names_has_a_command():
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and "`" in line]
    named = {name for line in rows for name in re.findall(r"`([a-z0-9_*]+)`", line)}
    commands = {read(words).name for words in TRAININGS}
    paths = {words[words.index("--recipe") + 1] for words in TRAININGS}
    scripts = (
        {"finetune_text_*"} if any("finetune_glue.sh" in " ".join(words) for words in COMMANDS) else set()
    )
    assert commands and named <= paths | scripts
    assert paths <= recipes().keys()


def test_no_expected_value_stands_without_its_source():
    rows = [line.split("|")[1:-1] for line in TEXT.splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) >= 20
    for *_, expected, source in rows:
        assert "not confirmed" in expected or re.search(r"\d\.\d", expected)
        marked = re.search(r"\[[APUC]\]", source) is not None
        assert marked == bool(re.search(r"\d\.\d|RoBERTa", expected)), (expected, source)


def test_released_weights_have_the_names_under_which_they_are_published():
    """As in the READMEs of fairseq's data2vec."""
    assert set(re.findall(r"\w+\.pt\b", TEXT)) - {"FILE.pt"} == {"base_imagenet_ft.pt", "vox_pretrained.pt"}
