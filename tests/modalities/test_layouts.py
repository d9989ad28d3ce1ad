"""Shards as other tools write them, from `data=` to batches and to runs, one sample feeding one or two modalities."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from layouts import clap, energon, img2dataset, timm, wenet
from ranks import SAMPLE
from runs import MODALITIES, Command, read_rows, start_all

from d2v_ds.cli import main
from d2v_ds.data import Plan, StepLoader
from d2v_ds.modalities.source import open_source
from d2v_ds.recipe import load_recipe

CAPTIONS = [
    "modalities.text.data.mode=samples",
    f"modalities.text.data.tokenizer={SAMPLE / 'sentencepiece.model'}",
]
STEPS = 2
WRITE = {"timm": timm, "laion": img2dataset, "clap": clap, "aishell": wenet, "energon": energon}
RUNS = {
    "timm": ({"image": 8}, "{}/timm/imagenet1k-train-{{0000..0001}}.tar", []),
    "laion": ({"image": 8, "text": 8}, "{}/laion/{{00000..00001}}.tar", CAPTIONS),
    "clap": ({"audio": 4, "text": 4}, "{}/clap", [*CAPTIONS, "modalities.text.data.fields=json.text"]),
    "aishell": ({"audio": 8, "text": 8}, "{0}/aishell/shards_000000000.tar::{0}/aishell/*1.tar", CAPTIONS),
    "energon": ({"image": 6, "text": 6}, "{}/energon", CAPTIONS),
}
"""name -> (batch of each modality: half of the samples, `data`, what else is set)"""


def settings(root: Path, name: str) -> list[str]:
    wanted, data, more = RUNS[name]
    left_out = [f"modalities.{other}=null" for other in ("image", "audio", "text") if other not in wanted]
    sizes = [
        f"modalities.{m}.data.{key}" for m, b in wanted.items() for key in (f"batch={b}", "micro_batches=2")
    ]
    return [
        *sizes,
        *[f"modalities.{m}.data.shards=*.tar" for m in wanted],
        *(["modalities.audio.data.min_seconds=0.1"] if "audio" in wanted else []),
        *more,
        f"data={data.format(root)}",
        *left_out,
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layouts of others")
    for name, write in WRITE.items():
        write(root / name)
    return root


@pytest.mark.parametrize("name", RUNS)
def test_a_step_over_all_of_it_has_every_sample_once_in_each_of_its_modalities(name, root):
    recipe = load_recipe("multimodal_tiny", settings(root, name))
    assert recipe.modalities.keys() == RUNS[name][0].keys()
    sources = [open_source(n, config, recipe.data) for n, config in recipe.modalities.items()]
    plan = Plan(recipe.seed, [source.stream for source in sources])
    units: dict[str, list[int]] = {source.name: [] for source in sources}
    for micro_batch in next(iter(StepLoader(sources, plan, 0, 1, 0, 1))):
        assert not micro_batch.faults
        draws = plan.draws(0, micro_batch.modality, micro_batch.index)
        assert len(micro_batch.batch.source) == len(draws)
        units[micro_batch.modality] += [draw.unit for draw in draws]
    assert {n: sorted(own) for n, own in units.items()} == {
        n: list(range(2 * size)) for n, size in RUNS[name][0].items()
    }


def test_index_measures_what_a_run_wants_and_the_run_measures_nothing(root, tmp_path, capsys):
    folder = wenet(tmp_path / "shards")
    tokenizer = str(SAMPLE / "sentencepiece.model")
    assert main(["index", str(folder), "--workers", "1", "--tokenizer", tokenizer]) == 0
    assert "measured audio_samples of 2 shards" in capsys.readouterr().out
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sum(name.endswith(".npy") for name in before) == 6
    own = [f"data={folder}", "modalities.audio.data.fields=flac;wav;ogg;opus;mp3"]  # as audio_base has it
    recipe = load_recipe("multimodal_tiny", [*settings(root, "aishell"), *own])
    for name, config in recipe.modalities.items():
        open_source(name, config, recipe.data)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert capsys.readouterr().out == ""
    assert main(["index", str(folder), "--text", "txt"]) == 2
    assert main(["index", str(folder), "--tokenizer", str(folder / "none")]) == 2


@pytest.mark.slow
def test_each_of_them_trains_and_pairs_train_jointly(root, tmp_path):
    """img2dataset: image and caption; WeNet: sound and transcript; finite losses of both to the last step."""
    steps = [f"train.steps={STEPS}", "body.depth=1", *[f"modalities.{m}.target.top_k=1" for m in MODALITIES]]
    done = start_all(
        tmp_path, {name: Command(tmp_path / name, [*steps, *settings(root, name)]) for name in RUNS}
    )
    for name, (wanted, _, _) in RUNS.items():
        assert done[name]["code"] == 0, done[name]["err"]
        last = read_rows(tmp_path / name)[-1]
        assert last["step"] == STEPS
        assert {m for m in ("image", "audio", "text") if f'"{m}' in json.dumps(last)} == set(wanted)
        assert (tmp_path / name / "latest").read_text() == f"step_{STEPS:08d}"
