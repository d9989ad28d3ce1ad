"""Fine-tuning on images as a whole: the same bits after an interruption and with scores, scores equal to `d2v eval`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import ROOT, SAMPLE
from runs import HALF, STEPS, python, read_rows, start, without_timings

from d2v_ds.convert.consolidate import export
from d2v_ds.convert.load import read
from d2v_ds.recipe import load_recipe, write_yaml
from d2v_ds.tasks.evaluate import evaluate

pytestmark = pytest.mark.slow

TEST = str(SAMPLE / "multimodal-val-*.tar")
SETTINGS = [
    "--recipe", "finetune_image_tiny", f"data={SAMPLE}", "modalities.image.data.shards=multimodal-train-*.tar",
    f"task.test={TEST}", "train.log_every=1", "train.workers=0",
]  # fmt: skip
SHORT = [
    f"train.steps={STEPS}", f"train.save_every={HALF}", "task.test_every=2", "modalities.image.data.batch=8",
    "modalities.image.data.micro_batches=2", "modalities.image.data.rand_augment=rand-m9-mstd0.5-inc1",
    "modalities.image.data.erase=0.25", "modalities.image.data.mixup=0.7", "modalities.image.data.cutmix=1",
    "body.drop_path=[0.0,0.3]", "optim.warmup_steps=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict]:
    """Runs and mistakes, one after another in one process."""
    pytest.importorskip("timm")
    recipe = load_recipe("finetune_image_tiny", [*SETTINGS[2:], *SHORT])
    untested = recipe.task.model_copy(update={"test": None, "test_every": 0})
    write_yaml(recipe.model_copy(update={"task": untested}), folder / "untested.yaml")
    zero0, zero3 = [*SETTINGS, *SHORT, "--deepspeed", "zero0"], [*SETTINGS, *SHORT, "--deepspeed", "zero3"]
    attentive = ["task.trained=head", "task.head=attentive_classification", f"init={folder / 'whole'}"]
    commands = {
        "whole": (zero0, ""),
        "resumed": (zero0, str(folder / "whole")),
        "untested": (["--recipe", str(folder / "untested.yaml"), "--deepspeed", "zero0"], ""),
        "attentive": ([*zero3, *attentive], ""),
        "bf16": ([*zero3, "precision=bf16", "optim.lr=2e-2", "modalities.image.data.mixup=0"], ""),
        "learns": ([*SETTINGS, "train.steps=200", "--deepspeed", "zero0"], ""),
        "no pictures": ([*zero0, "task.test=text-val-*.tar"], ""),
    }
    listed = [
        {"name": name, "argv": [*argv, f"out={folder / name}"], "after": after, "out": str(folder / name), "env": {}}
        for name, (argv, after) in commands.items()
    ]  # fmt: skip
    (folder / "commands.json").write_text(json.dumps(listed), encoding="utf-8")
    script = ROOT / "tests" / "training" / "commands.py", folder / "commands.json", folder / "results.json"
    start(python(*script))
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def assert_finished(results: dict[str, dict], *names: str) -> None:
    for name in names:
        assert results[name]["code"] == 0, results[name]["err"]


def test_a_resumed_run_has_the_same_losses_and_scores_to_the_bit(results, folder):
    """With drop path, RandAugment, erasing, mixup and CutMix; `best.json` too."""
    assert_finished(results, "whole", "resumed")
    whole, resumed = folder / "whole", folder / "resumed"
    assert without_timings(read_rows(whole)) == without_timings(read_rows(resumed))
    assert read_rows(whole, "scores.jsonl") == read_rows(resumed, "scores.jsonl")
    assert (whole / "best.json").read_bytes() == (resumed / "best.json").read_bytes()


def test_scoring_changes_nothing_of_a_run(results, folder):
    assert_finished(results, "whole", "untested")
    assert without_timings(read_rows(folder / "whole")) == without_timings(read_rows(folder / "untested"))


@pytest.mark.parametrize("name", ["whole", "attentive", "bf16"])
def test_the_last_score_is_what_eval_classify_gives(results, folder, name):
    """Of the checkpoint, and of its export; in bf16 too, where a checkpoint holds fp32 weights."""
    assert_finished(results, name)
    last = read_rows(folder / name, "scores.jsonl")[-1]
    checkpoint = folder / name / f"step_{STEPS:08d}"
    for model in (checkpoint, export(checkpoint, folder / f"{name}_export")):
        found = evaluate("classify", model, TEST, label="json.label")
        assert found["samples"] == 120
        assert found["accuracy"] == last["accuracy"]


def test_a_probe_trains_its_head_alone(results, folder):
    """Attention pooling at ZeRO-3, from a fine-tuned run, whose encoder stays to the bit."""
    assert_finished(results, "attentive")
    before, after = (read(folder / name).tensors for name in ("whole", "attentive"))
    own = {name for name in after if name.startswith("head.")}
    assert {n for n in after if n not in before or not torch.equal(before[n], after[n])} == own
    for format in ("hf", "fairseq"):  # noqa: A001
        with pytest.raises(ValueError, match="attentive_classification, which"):
            export(folder / "attentive", folder / format, format=format)


def test_a_short_run_tells_digits_apart(results, folder):
    """450 pictures, random weights: far above the 0.1 of chance; the best checkpoint is there."""
    assert_finished(results, "learns")
    best = json.loads((folder / "learns" / "best.json").read_text(encoding="utf-8"))
    assert best["accuracy"] > 0.25
    assert (folder / "learns" / f"step_{best['step']:08d}").is_dir()


def test_a_test_without_pictures_is_refused_before_training(results, folder):
    assert results["no pictures"]["code"] == 2
    assert "png" in results["no pictures"]["err"]
    assert not list((folder / "no pictures").glob("step_*"))
