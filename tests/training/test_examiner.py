"""The best checkpoint of a fine-tuning run: it stays, is known when the run goes on, and is one of these shards."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from d2v_ds.convert.consolidate import best_checkpoint
from d2v_ds.recipe import load_recipe
from d2v_ds.tasks.table import Bad
from d2v_ds.training import examiner as examiner_module
from d2v_ds.training import run as run_module
from d2v_ds.training.examiner import Examiner
from d2v_ds.training.run import Run

BEST = {"step": 4, "wer": 0.5, "score": -0.5}


def examiner(recipe, fingerprint: str) -> Examiner:
    return Examiner(recipe, {"": (SimpleNamespace(fingerprint=fingerprint), [])})


@pytest.mark.parametrize("on_collapse", ["warn", "rollback"])
def test_the_best_checkpoint_stays_whatever_follows_a_collapse(tmp_path, on_collapse, monkeypatch) -> None:
    monkeypatch.setattr(run_module, "places_to_go_back_to", lambda folder, before: [folder / "step_00000002"])
    (tmp_path / "step_00000004").mkdir()
    recipe = load_recipe("finetune_audio_tiny", [f"health.on_collapse={on_collapse}", f"out={tmp_path}"])
    begun = {}
    run = SimpleNamespace(
        recipe=recipe, folder=tmp_path, step=8, saved=4, applied=8, first_step=0, updates_before=0, sources=[],
        watch=SimpleNamespace(is_firm=False, step=7), examiner=examiner(recipe, "a"), lr_scale=1.0, rollbacks=[],
        signals=SimpleNamespace(phase=""), watchdog=SimpleNamespace(wait_patiently=lambda what: None),
        saver=SimpleNamespace(begin=lambda step, loop, spared: begun.update(loop=loop, spared=spared())),
    )  # fmt: skip
    run.examiner.best, run.spared = BEST, lambda: Run.spared(run)
    Run.save(run)
    names = ["step_00000004"] + ["step_00000002"] * (on_collapse == "rollback")
    assert begun["spared"] == [tmp_path / name for name in names]
    assert begun["loop"]["best"] == BEST and begun["loop"]["test"] == {"": "a"}


def test_a_best_checkpoint_that_is_gone_is_said(tmp_path, caplog) -> None:
    """By what reads the run, which takes the newest, and by the run that goes on."""
    (tmp_path / "best.json").write_text(json.dumps(BEST))
    assert best_checkpoint(tmp_path) is None
    assert "names step_00000004 as the best" in caplog.text and "not there; taking the newest" in caplog.text
    recipe, said = load_recipe("finetune_audio_tiny"), []
    again = examiner(recipe, "a")
    again.go_on(SimpleNamespace(folder=tmp_path, rank=0, say=said.append), {"best": BEST})
    assert again.best is None and "step_00000004, the best checkpoint, is not there any more" in said[0]


def test_a_run_that_goes_on_knows_its_best_unless_it_is_scored_on_others(tmp_path) -> None:
    recipe, said = load_recipe("finetune_audio_tiny"), []
    run = SimpleNamespace(folder=tmp_path, rank=0, say=said.append)
    (tmp_path / "best.json").write_text('{"step": 6')  # of a save that a kill ended
    with pytest.raises(ValueError, match="best.json is damaged.*; name one, .*step_.*, or delete it"):
        best_checkpoint(tmp_path)
    (tmp_path / "step_00000004").mkdir()
    for loop in ({"best": BEST}, {"best": BEST, "test": {"": "a"}}):
        same = examiner(recipe, "a")
        same.go_on(run, loop)
        assert same.best == BEST and json.loads((tmp_path / "best.json").read_text()) == BEST and not said
    other = examiner(recipe, "b")
    other.go_on(run, {"best": BEST, "test": {"": "a"}})
    assert other.best is None and "task.test is of other shards" in said[0]
    without = Examiner(recipe, None)
    without.go_on(run, {"best": BEST, "test": {"": "a"}})
    assert without.best == BEST


def test_test_samples_that_cannot_be_read_are_said(tmp_path, monkeypatch) -> None:
    """How many in the line of the score; if none can, the first and why."""
    recipe, said, bad = load_recipe("finetune_image_tiny"), [], Bad("a.tar:3", "undecodable image")
    run = SimpleNamespace(
        recipe=recipe, folder=tmp_path, rank=0, world=1, step=7, log=None, say=said.append, save=lambda: None,
        watchdog=SimpleNamespace(wait_patiently=lambda what: None), saver=SimpleNamespace(lost=()),
    )  # fmt: skip
    monkeypatch.setattr(examiner_module, "build_encoder", lambda run, samples: None)
    monkeypatch.setattr(examiner_module, "together", lambda work: work())
    monkeypatch.setattr(
        examiner_module.dist, "all_gather_object", lambda everyone, mine: everyone.__setitem__(0, mine)
    )
    right = torch.eye(10)[3]
    for rows, places in (([right], [1]), ([], [])):
        monkeypatch.setattr(
            examiner_module, "answers", lambda *a, found=(rows, places): a[4].append(bad) or found
        )
        items = SimpleNamespace(fingerprint="a", words="2 samples", has_labels=True)
        scored = Examiner(recipe, {"": (items, [5, 3])})
        if rows:
            scored.score(run)
            assert said == ["test at step 7: accuracy 1.0000  unreadable 1 (best)"]
            continue
        with pytest.raises(
            ValueError, match="none of 2 samples can be read; the first: a.tar:3: undecodable image"
        ):
            scored.score(run)
