"""GLUE's numbers of a model with a sentence head are those of its own predictions."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from glue_files import samples, write_task
from ranks import SAMPLE
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

import d2v_ds
from d2v_ds.cli import main
from d2v_ds.convert.consolidate import write_export
from d2v_ds.convert.stored import Stored
from d2v_ds.data import Corpus
from d2v_ds.modalities.build import build_model
from d2v_ds.model.heads import HEAD, HeadConfig, build_head
from d2v_ds.model.tuned import Task
from d2v_ds.recipe import load_recipe
from d2v_ds.tasks.glue import GLUE, evaluate_glue
from d2v_ds.tasks.probe import read_labels
from shards.command import main as prepare
from shards.glue import TASKS


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """An export of a tiny text model with a sentence head."""

    def export(
        outputs: int,
        labels: tuple[str, ...] | None = None,
        kind: str = "sentence_classification",
        task: Task | None = None,
    ) -> str:
        recipe = load_recipe("text_tiny", ["body.dim=48", "body.depth=2", "modalities.text.target.top_k=2"])
        recipe.task = task
        head = HeadConfig(kind=kind, outputs=outputs, labels=labels)
        torch.manual_seed(0)
        model = build_model(recipe.body, recipe.modalities, has_teacher=False)
        tensors = {name: p.detach() + 0.1 * torch.randn(p.shape) for name, p in model.named_parameters()}
        parameters = build_head(head, recipe.body.dim).named_parameters()
        tensors |= {HEAD + name: p.detach() + 0.3 * torch.randn(p.shape) for name, p in parameters}
        stored = Stored(
            recipe, tensors, "run, step_00000001", files=SAMPLE, head=head, step=1, weights="student"
        )
        folder = tmp_path_factory.mktemp("tuned")
        write_export(stored, folder)
        return str(folder)

    return export


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Shards of three tasks."""
    root = tmp_path_factory.mktemp("glue")
    for task in ("mnli", "mrpc", "stsb"):
        write_task(root / "raw", task, rows=20 if task != "stsb" else 10)
        assert (
            prepare(["glue", f"{root}/raw", "--task", task, "--out", f"{root}/{task}", "--workers", "1"]) == 0
        )
    return root


def pairs(task: str, split: str, rows: int) -> tuple[list[tuple[str, str]], list[float]]:
    some = samples(task, split, rows)
    return [(s["text"], s["text_b"]) for s in some], [s["label"] for s in some]


def test_every_task_of_glue_has_its_metrics():
    assert GLUE.keys() == TASKS.keys()


def test_scores_are_those_of_the_models_own_predictions(make, shards, tmp_path, capsys):
    two, number = make(2), make(1)
    texts, truth = pairs("mrpc", "val", 20)
    said = d2v_ds.load(two).predict(texts)
    out = tmp_path / "new" / "mrpc.json"
    assert main(["eval", "glue", two, str(shards / "mrpc"), "--out", str(out), "--batch", "7"]) == 0
    found = json.loads(out.read_text())
    accuracy = sum(a == b for a, b in zip(said, truth, strict=True)) / 20
    assert 0 < accuracy < 1
    assert found["accuracy"] == pytest.approx(accuracy) and found["f1"] == pytest.approx(
        f1_score(truth, said)
    )
    assert found["score"] == pytest.approx((accuracy + found["f1"]) / 2) and found["samples"] == 20
    assert f"{accuracy:.4f}" in capsys.readouterr().out
    texts, truth = pairs("stsb", "val", 10)
    said = d2v_ds.load(number).predict(texts)
    found = evaluate_glue(number, shards / "stsb", batch=3)
    assert found["pearson"] == pytest.approx(pearsonr(said, truth)[0], abs=1e-5)
    assert found["spearman"] == pytest.approx(spearmanr(said, truth)[0], abs=1e-5)


def test_mnli_is_measured_on_both_sets_with_classes_by_name(make, shards):
    """A head whose outputs stand in another order than the data's numbers."""
    names = ("contradiction", "entailment", "neutral")
    model = make(3, names)
    found = evaluate_glue(model, shards / "mnli")
    for part in ("matched", "mismatched"):
        texts, truth = pairs("mnli", f"val-{part}", 20)
        said = d2v_ds.load(model).predict(texts)
        right = [a == TASKS["mnli"].classes[int(b)] for a, b in zip(said, truth, strict=True)]
        assert found[f"accuracy_{part}"] == pytest.approx(sum(right) / 20)
    assert found["score"] == pytest.approx((found["accuracy_matched"] + found["accuracy_mismatched"]) / 2)


def test_a_run_is_measured_as_it_was_scored(make, shards, tmp_path):
    """By its own metrics, and on the first text alone where it learned that; other manifests say nothing."""
    table = tmp_path / "pairs.tsv"
    rows = [f"{'a b c' if i % 3 else 'x y z'} {i}\tsecond {7 * i}\t{i % 2}\n" for i in range(40)]
    table.write_text("text\ttext_b\tlabel\n" + "".join(rows))
    folder = tmp_path / "a[1]{b}"
    assert (
        prepare(["table", str(table), "--val-file", str(table), "--out", str(folder), "--workers", "1"]) == 0
    )
    task = load_recipe("finetune_text_tiny", ["task.metrics=[matthews]"]).task
    model, imported = make(2, task=task), make(2)
    said = d2v_ds.load(model).predict([row.split("\t")[0] for row in rows])
    found = evaluate_glue(model, folder)
    assert (
        found["score"]
        == found["matthews"]
        == pytest.approx(matthews_corrcoef([i % 2 for i in range(40)], said))
    )
    assert evaluate_glue(imported, folder, metrics=["matthews"])["matthews"] != found["matthews"]
    for content in ("[1]", '{"splits": 3}', "no JSON"):
        (folder / "manifest.json").write_text(content)
        assert evaluate_glue(model, folder)["samples"] == 80


def test_what_cannot_be_measured_is_an_error_that_says_why(make, shards, tmp_path):
    two, number = make(2), make(1)
    with pytest.raises(
        ValueError, match=r"label '2' of .* is no class of the model, whose classes are 0 to 1"
    ):
        evaluate_glue(two, shards / "mnli")
    with pytest.raises(
        ValueError, match="accuracy does not go with one output, a number; take of pearson, spearman"
    ):
        evaluate_glue(number, shards / "mrpc")
    with pytest.raises(ValueError, match="has no label: 'json.absent'"):
        evaluate_glue(two, shards / "mrpc", label="json.absent")
    for text in ("nan", "1_0"):
        for name in ("a.txt", "a.cls"):
            (tmp_path / name).write_text(text)
        with tarfile.open(tmp_path / f"{text}.tar", "w") as tar:
            for name in ("a.txt", "a.cls"):
                tar.add(tmp_path / name, name)
        with pytest.raises(ValueError, match=f"label '{text}' of .* is no number"):
            evaluate_glue(number, tmp_path / f"{text}.tar")
    with pytest.raises(ValueError, match="label b'1_0' of .* is no integer"):
        read_labels(Corpus.open([tmp_path / "1_0.tar"], {"text": "txt", "label": "cls"}), [0], "cls")
    with pytest.raises(ValueError, match="--task wnli is none of cola"):
        evaluate_glue(two, shards / "mrpc", task="wnli")
    with pytest.raises(ValueError, match="metric 'bleu' is not known"):
        evaluate_glue(two, shards / "mrpc", metrics=["bleu"])
    with pytest.raises(ValueError, match="use `d2v eval classify`"):
        evaluate_glue(make(2, kind="image_classification"), shards / "mrpc")
