"""scripts/few_labels.py: what is labelled, what is tested, and how results are put together."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "few_labels.py"
spec = importlib.util.spec_from_file_location("few_labels", SCRIPT)
few_labels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(few_labels)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return few_labels.make_rows("image", tmp_path_factory.mktemp("digits"))


def test_all_digits_are_there_and_no_source_is_on_both_sides(rows):
    sources = {
        split: {r["path"].split("-")[1] for r in rows if r["split"] == split} for split in ("train", "test")
    }
    assert len(sources["train"]) == 1297 and len(sources["test"]) == 500
    assert not sources["train"] & sources["test"]


@pytest.mark.parametrize(("share", "count"), [(0.01, 13), (0.1, 130), (1.0, 1297)])
def test_a_share_of_the_labels_has_all_classes_alike(rows, share, count):
    picked = few_labels.pick(rows, share, seed=1)
    counts = [sum(row["label"] == digit for row in picked) for digit in range(10)]
    assert len(picked) == len({row["path"] for row in picked}) == count
    assert share == 1 or max(counts) - min(counts) <= 1
    assert all(row["split"] == "train" for row in picked)


def test_more_labels_hold_the_fewer_and_other_seeds_others(rows):
    few, more, others = (few_labels.pick(rows, *case) for case in ((0.01, 1), (0.1, 1), (0.01, 2)))
    assert {r["path"] for r in few} < {r["path"] for r in more}
    assert {r["path"] for r in few} != {r["path"] for r in others}


@pytest.mark.slow
def test_no_paragraph_of_the_test_is_pretrained_on(tmp_path):
    rows = few_labels.make_rows("text", tmp_path)
    texts = {split: {row["text"] for row in rows if row["split"] == split} for split in ("train", "test")}
    assert not texts["train"] & texts["test"] and len(texts["test"]) > 300
    assert {row["label"] for row in rows if row["split"] == "test"} == set(range(few_labels.MODULES))


def test_the_table_has_mean_and_spread_of_the_seeds(tmp_path):
    row = {"modality": "audio", "share": 0.1, "from": "random"}
    results = [row | {"seed": seed, "value": value} for seed, value in ((1, 0.5), (2, 0.7))]
    assert "| audio, wer | random | 0.600 +- 0.141 |" in few_labels.summarise(results, [0.1])
    few_labels.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
