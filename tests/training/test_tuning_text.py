"""Fine-tuning on texts: it learns what no constant answer gives, is measured alike in the loop and after it, and
mistakes are said before it begins."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from glue_files import write_task
from ranks import ROOT, SAMPLE
from runs import environment, python, start

import d2v_ds
from d2v_ds.convert.consolidate import write_export
from d2v_ds.convert.stored import Stored
from d2v_ds.data import Corpus, expand_shards
from d2v_ds.modalities.build import build_model
from d2v_ds.recipe import load_recipe
from d2v_ds.tasks.glue import GLUE, evaluate_glue
from d2v_ds.training.schedule import learning_rate
from shards.command import main as prepare

VALUES = {
    "cola": (16, 5_336, 320, 2),
    "mnli": (32, 123_873, 7_432, 3),
    "mrpc": (16, 2_296, 137, 2),
    "qnli": (32, 33_112, 1_986, 2),
    "qqp": (32, 113_272, 28_318, 2),
    "rte": (16, 2_036, 122, 2),
    "sst2": (32, 20_935, 1_256, 2),
    "stsb": (16, 3_598, 214, 1),
}
"""Sentences a step, steps, warm-up, outputs: as released."""


@pytest.mark.parametrize("task", VALUES)
def test_the_recipes_of_glue_have_the_released_values(task):
    recipe, (batch, steps, warmup, outputs) = load_recipe(f"finetune_text_{task}"), VALUES[task]
    data, optim = recipe.modalities["text"].data, recipe.optim
    assert (data.batch, data.batch_tokens, data.micro_batches) == (batch, 4400, 1)
    assert (recipe.train.steps, optim.warmup_steps, recipe.task.outputs) == (steps, warmup, outputs)
    assert (optim.betas, optim.eps, optim.weight_decay, optim.decay, optim.clip) == (
        (0.9, 0.98),
        1e-6,
        0.1,
        "all",
        0,
    )
    assert learning_rate(optim, warmup, steps) == optim.lr and learning_rate(optim, steps, steps) == 0
    middle = learning_rate(optim, (warmup + steps) // 2, steps)
    assert middle == pytest.approx(optim.lr / 2, rel=1e-3)
    assert (
        recipe.body.encoder_dropout == recipe.body.attention_dropout == 0.1 and recipe.task.layer_decay == 1
    )
    assert recipe.task.metrics == GLUE[task] and 9 <= steps / recipe.task.test_every <= 10
    assert (data.pair is None) == (task in ("cola", "sst2"))
    assert recipe.task.parse("1") == (0.2 if task == "stsb" else 1)


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Prose of two kinds with its kind; a small text model and one of images; GLUE's layout of two tasks."""
    folder = tmp_path_factory.mktemp("texts")
    for split in ("train", "val"):
        shards = expand_shards(str(SAMPLE / f"text-{split}-*.tar"))
        corpus = Corpus.open(shards, {"text": "txt", "source": "json.source"}, progress=None)
        rows = []
        for i in range(len(corpus)):
            fields = {name: value.decode() for name, value in corpus.read(i).items()}
            rows.append({"text": fields["text"][:400], "label": fields["source"].split("/")[0]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = ["table", f"{folder}/train.jsonl", "--val-file", f"{folder}/val.jsonl", "--workers", "1"]
    assert prepare([*table, "--out", f"{folder}/prose"]) == 0
    for modality in ("text", "image"):
        recipe = load_recipe(f"{modality}_tiny")
        torch.manual_seed(0)
        tensors = dict(build_model(recipe.body, recipe.modalities, has_teacher=False).named_parameters())
        stored = Stored(
            recipe,
            {name: tensor.detach() for name, tensor in tensors.items()},
            "run, step_00000001",
            files=SAMPLE,
            step=1,
            weights="student",
        )
        write_export(stored, folder / modality)
    for task in ("stsb", "cola"):
        write_task(folder / "glue", task, rows=11)
    assert (
        prepare(["glue", f"{folder}/glue", "--task", "stsb", "--out", f"{folder}/stsb", "--workers", "1"])
        == 0
    )
    rows = "".join(f"{i % 3}\ttext number {i}\n" for i in range(20))
    (folder / "bad.tsv").write_text(f"label\ttext\n{rows}")
    assert prepare(["table", f"{folder}/bad.tsv", "--out", f"{folder}/bad", "--workers", "1"]) == 0
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict]:
    """One after another in one process."""
    common = ["--deepspeed", "zero0", "precision=fp32", "train.workers=0", f"init={folder}/text"]
    prose = ["--recipe", "finetune_text_tiny", f"data={folder}/prose"]
    bad = ["--recipe", "finetune_text_tiny", f"data={folder}/bad", "task.test=null", "task.test_every=0"]
    runs = {
        "prose": [*prose],
        "stsb": [
            "--recipe", "finetune_text_stsb", f"data={folder}/stsb", "train.steps=6", "task.test_every=3",
            "train.save_every=3", "optim.warmup_steps=2", "train.log_every=1",
        ],
        "class out of range": [*bad, "task.outputs=2"],
        "one output": [*prose, "task.outputs=1"],
        "three outputs": [*prose, "task.outputs=3"],
        "other names": [*prose, "task.labels=['no', 'yes']"],
        "no label": [*bad, "task.label=json.absent"],
        "images": [*prose, f"init={folder}/image"],
    }  # fmt: skip
    listed = [
        {
            "name": name,
            "argv": [*common, *argv, f"out={folder}/runs/{name}"],
            "after": "",
            "env": {},
            "out": "",
        }
        for name, argv in runs.items()
    ]
    (folder / "commands.json").write_text(json.dumps(listed))
    start(python(ROOT / "tests/training/commands.py", folder / "commands.json", folder / "results.json"))
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_a_small_model_learns_which_document_prose_is_from(results, folder):
    """From fresh weights, far above always saying the larger class, 63 %; afterwards measured to the same numbers."""
    assert results["prose"]["code"] == 0, results["prose"]["err"]
    best = json.loads((folder / "runs/prose/best.json").read_text())
    labels = [json.loads(line)["label"] for line in (folder / "val.jsonl").read_text().splitlines()]
    chance = max(labels.count(label) for label in set(labels)) / len(labels)
    assert best["accuracy"] > chance + 0.2 and best["score"] == best["accuracy"]
    found = evaluate_glue(folder / "runs/prose", folder / "prose", metrics=["accuracy"], device="cpu")
    assert found["accuracy"] == best["accuracy"] and found["samples"] == len(labels)
    said = d2v_ds.load(folder / "runs/prose").predict(
        json.loads((folder / "val.jsonl").open().readline())["text"]
    )
    assert said[0] in ("stdlib", "topics")  # from the classes.json beside the shards


@pytest.mark.slow
def test_a_regression_of_pairs_is_scored_by_correlation(results, folder):
    assert results["stsb"]["code"] == 0, results["stsb"]["err"]
    best = json.loads((folder / "runs/stsb/best.json").read_text())
    found = evaluate_glue(folder / "runs/stsb", folder / "stsb", device="cpu")
    for name in ("pearson", "spearman", "score"):
        assert found[name] == pytest.approx(best[name], abs=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_without_the_files_it_was_started_from(results, folder, tmp_path):
    """Under another name, with `init` gone: by its own tokenizer. With another tokenizer it does not."""
    shutil.copytree(folder / "runs/stsb", tmp_path / "on")
    words = " ".join(f"word{i} of {i * i}" for i in range(300)).split()
    (tmp_path / "words.txt").write_text("\n".join(words))
    sentencepiece.SentencePieceTrainer.train(
        input=f"{tmp_path}/words.txt", model_prefix=f"{tmp_path}/other", vocab_size=40, minloglevel=2,
        bos_id=0, pad_id=1, eos_id=2, unk_id=3,
    )  # fmt: skip
    same = [
        "--recipe", "finetune_text_stsb", "--deepspeed", "zero0", "precision=fp32", f"data={folder}/stsb",
        "task.test_every=3", "train.save_every=3", "optim.warmup_steps=2", "train.log_every=1", "train.workers=0",
        f"out={tmp_path}/on", "train.steps=8",
    ]  # fmt: skip
    (folder / "text").rename(folder / "away")
    try:
        other = f"modalities.text.data.tokenizer={tmp_path}/other.model"
        said = start(python(ROOT / "train.py", *same, other), code=2).stderr
        done = start(python(ROOT / "train.py", *same)).stdout
    finally:
        (folder / "away").rename(folder / "text")
    assert (
        "modalities.text.data.tokenizer is not the one that" in said and f"give that of {tmp_path}/on" in said
    )
    assert "6 of 8 steps are done" in done and "finished 8 steps" in done
    new = [*same, other, f"init={folder}/text", f"out={tmp_path}/new", "train.steps=1"]
    assert "not read with the tokenizer of these weights" in start(python(ROOT / "train.py", *new)).stdout
    assert "not read with the tokenizer" not in results["stsb"]["out"]


@pytest.mark.slow
def test_mistakes_are_said_in_one_line_before_training(results, folder):
    hints = {
        "class out of range": "is no class: task.outputs=2 takes whole numbers 0 to 1",
        "one output": "accuracy does not go with one output, a number; take of pearson, spearman",
        "three outputs": "classes.json names 2 classes (stdlib, topics), task.outputs=3; set task.outputs=2",
        "other names": "names the classes stdlib, topics, task.labels no, yes: is it the data of another task?",
        "no label": "no label: 'json.absent' is not in it",
        "images": "holds image, the recipe finetune_text_tiny fine-tunes text",
    }
    for name, hint in hints.items():
        done = results[name]
        assert done["code"] == 2 and hint in done["err"] and done["err"].count("\n") == 1, (name, done)
        assert not list(folder.glob(f"runs/{name}/step_*"))


@pytest.mark.slow
def test_the_script_sweeps_and_goes_on_where_it_stopped(folder, tmp_path):
    """Two rates of CoLA in small; the second call does nothing but the table, another seed trains that alone."""
    venv = tmp_path / "venv"  # the python of this test, without installing anything
    (venv / "bin").mkdir(parents=True)
    wrapper = f'#!/bin/sh\n[ "$1 $2" = "-m pip" ] && exit 0\nexec {sys.executable} "$@"\n'
    (venv / "bin/python").write_text(wrapper)
    (venv / "bin/d2v").write_text(f'#!/bin/sh\nexec {sys.executable} -m d2v_ds.cli "$@"\n')
    for name in ("python", "d2v"):
        (venv / "bin" / name).chmod(0o755)
    out = tmp_path / "out"

    def call(**more: str) -> str:
        variables = {
            "D2V_VENV": str(venv),
            "INIT": f"{folder}/text",
            "GLUE": f"{folder}/glue",
            "OUT": str(out),
        }
        variables |= {"TASKS": "cola", "LRS": "1e-3 2e-3", "SEEDS": "1", **more}
        settings = ["train.steps=2", "task.test_every=1", "train.save_every=1", "optim.warmup_steps=0"]
        done = subprocess.run(
            ["bash", "scripts/finetune_glue.sh", *settings, "precision=fp32", "train.workers=0"],
            env=environment(**variables, PYTHON=sys.executable), cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "lr_1e-3_seed_1" in (said := call()) and "cola" in said and "average" in said
    found = json.loads((out / "glue.json").read_text())
    assert found["tasks"]["cola"]["median_by_lr"].keys() == {"0.001", "0.002"}
    shutil.rmtree(folder / "glue/CoLA")  # the shards are there
    said = call(SEEDS="1 2", LRS="1e-3")
    assert "lr_1e-3_seed_2" in said and "lr_1e-3_seed_1\n" not in said
    assert os.path.exists(out / "cola/lr_1e-3_seed_2/best.json")
