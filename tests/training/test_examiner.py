"""The best checkpoint of a fine-tuning run stays."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from d2v_ds.recipe import load_recipe
from d2v_ds.training.examiner import Examiner
from d2v_ds.training.run import Run

BEST = {"step": 4, "wer": 0.5, "score": -0.5}


def examiner(recipe, fingerprint: str) -> Examiner:
    return Examiner(recipe, {"": (SimpleNamespace(fingerprint=fingerprint), [])})


@pytest.mark.parametrize("on_collapse", ["warn", "rollback"])
def test_the_best_checkpoint_stays_whatever_follows_a_collapse(tmp_path, on_collapse) -> None:
    recipe = load_recipe("finetune_audio_tiny", [f"health.on_collapse={on_collapse}", f"out={tmp_path}"])
    begun = {}
    run = SimpleNamespace(
        recipe=recipe, folder=tmp_path, step=8, saved=4, applied=8, first_step=0, updates_before=0, sources=[],
        watch=SimpleNamespace(is_firm=False), examiner=examiner(recipe, "a"), lr_scale=1.0, rollbacks=[],
        signals=SimpleNamespace(phase=""), watchdog=SimpleNamespace(wait_patiently=lambda what: None),
        saver=SimpleNamespace(begin=lambda step, loop, spared: begun.update(loop=loop, spared=spared())),
    )  # fmt: skip
    run.examiner.best = BEST
    Run.save(run)
    assert begun["spared"] == tmp_path / "step_00000004"
    assert begun["loop"]["best"] == BEST
