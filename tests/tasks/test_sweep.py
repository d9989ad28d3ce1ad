"""The best rate of a sweep is the one with the best median over seeds; runs without a result are named."""

import json
from pathlib import Path

import pytest

from d2v_ds.tasks.sweep import main, summarize


def write(folder: Path, task: str, scores: dict[tuple[str, int], float | None]) -> None:
    for (rate, seed), score in scores.items():
        run = folder / task / f"lr_{rate}_seed_{seed}"
        run.mkdir(parents=True)
        if score is not None:
            best = {"step": 10 * seed, "score": score, "accuracy": score + 0.1, "f1": score - 0.1}
            (run / "best.json").write_text(json.dumps(best))


def test_the_rate_with_the_best_median_is_chosen_and_its_median_given(tmp_path, capsys):
    """One lucky seed does not decide; of equal medians the lower rate does."""
    lucky = {
        ("1e-5", 1): 0.6,
        ("1e-5", 2): 0.62,
        ("1e-5", 3): 0.58,
        ("6e-5", 1): 0.2,
        ("6e-5", 2): 0.9,
        ("6e-5", 3): 0.5,
    }
    write(tmp_path, "mrpc", lucky)
    write(tmp_path, "rte", {("4e-5", 1): 0.7, ("2e-5", 1): 0.7, ("2e-5", 2): None})
    assert main([str(tmp_path)]) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "glue.json").read_text())
    mrpc, rte = found["tasks"]["mrpc"], found["tasks"]["rte"]
    assert (mrpc["lr"], mrpc["median"], mrpc["lowest"], mrpc["highest"], mrpc["seeds"]) == (
        1e-5,
        0.6,
        0.58,
        0.62,
        3,
    )
    assert mrpc["metrics"] == {"accuracy": pytest.approx(0.7), "f1": pytest.approx(0.5)}
    assert rte["lr"] == 2e-5 and found["missing"] == ["rte/lr_2e-5_seed_2"]
    assert found["average"] == pytest.approx(0.65)
    assert (
        "60.0" in printed
        and "65.0  of 2 tasks" in printed
        and "1 runs have no result: rte/lr_2e-5_seed_2" in printed
    )


def test_a_folder_without_results_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no TASK/lr_RATE_seed_N/best.json"):
        summarize(tmp_path)
