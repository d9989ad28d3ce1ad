"""Probes on the way: what they find, and that the run does not notice them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import SAMPLE
from runs import MODALITIES, Command, read_rows, start_all, without_timings, zero3_config

from d2v_ds.convert.load import load
from d2v_ds.data import Corpus, expand_shards
from d2v_ds.modalities.source import open_source
from d2v_ds.recipe import load_recipe
from d2v_ds.tasks.frozen import evaluate_frozen
from d2v_ds.tasks.probe import choose, layer_means, read_labels, ridge
from d2v_ds.tasks.spectrum import rankme
from d2v_ds.training.probing import Probes, build_encoder, view_means

PROBED = [
    "probe.every=1", "probe.train=multimodal-train-*.tar", "probe.test=multimodal-val-*.tar", "probe.samples=30",
    "train.steps=2", "train.save_every=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("probes")


def write_shard(path: Path, labels: list[str], garbled: int = -1) -> str:
    """Images of noise."""
    noise = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i, label in enumerate(labels):
            image = io.BytesIO()
            Image.fromarray(noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(image, "png")
            content = b"no image" if i == garbled else image.getvalue()
            for name, data in ((f"{i}.png", content), (f"{i}.cls", label.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path)


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict]:
    """With and without probes, at stage 0, and mistakes."""
    zero0 = ["--deepspeed", "zero0"]
    garbled = write_shard(folder / "garbled.tar", ["0", "1"] * 6, garbled=7)
    return start_all(
        folder,
        {
            "probed": Command(folder / "probed", [*zero0, *PROBED]),
            "plain": Command(folder / "plain", [*zero0, "train.steps=2", "train.save_every=2"]),
            "no shards": Command(folder / "none", [*zero0, *PROBED, "probe.test=absent-*.tar"]),
            "no labels": Command(folder / "none", [*zero0, *PROBED, "probe.train=text-train-*.tar"]),
            "words": Command(folder / "none", [*zero0, *PROBED, "probe.label=txt"]),
            "one class": Command(
                folder / "none",
                [*zero0, *PROBED, f"probe.train={write_shard(folder / 'mono.tar', ['3'] * 4)}"],
            ),
            "overlap": Command(folder / "none", [*zero0, *PROBED, "probe.test=multimodal-train-000000.tar"]),
            "garbled": Command(folder / "none", [*zero0, *PROBED, f"probe.test={garbled}"]),
        },
    )


@pytest.fixture(scope="module")
def odd(results: dict[str, dict], folder: Path) -> dict[str, dict]:
    """In bf16, and one whose features are no numbers."""
    zero0, garbled = ["--deepspeed", "zero0"], folder / "garbled.tar"
    noise = ["probe.samples=120", "train.steps=1"]
    for part in ("train", "test"):
        path = write_shard(folder / f"noise-{part}.tar", [str(i % 7) for i in range(120)])
        noise.append(f"probe.{part}={path}")
    return start_all(
        folder,
        {
            "bf16": Command(folder / "bf16", ["--deepspeed", "zero2", *PROBED, *noise, "precision=bf16"]),
            "diverged": Command(
                folder / "diverged",
                [
                    *zero0,
                    *PROBED,
                    *noise,
                    f"modalities.image.data.shards={garbled}",
                    "probe.batch=1",
                    "train.max_bad_share=1",
                    "optim.lr=1e30",
                    "optim.warmup_steps=0",
                    "train.steps=2",
                ],
            ),  # fmt: skip
        },
    )


def rows_of(run: Path) -> list[dict]:
    return read_rows(run, "probes.jsonl")


def test_losses_are_equal_to_the_bit_with_probes_and_without(results: dict, folder: Path) -> None:
    assert results["probed"]["code"] == results["plain"]["code"] == 0, results["probed"]["err"]
    for name in ("metrics.jsonl", "health.jsonl"):
        probed, plain = (without_timings(read_rows(folder / run, name)) for run in ("probed", "plain"))
        assert probed == plain and len(plain) == 2


def test_every_layer_of_student_and_teacher_stands_beside_both_baselines(results: dict, folder: Path) -> None:
    rows = rows_of(folder / "probed")
    found = {(r["step"], r["modality"], r["weights"], r["features"]) for r in rows}
    layers = ("layer 1", "layer 2", "all")
    baselines = {(0, m, "random init", f) for m in MODALITIES for f in layers} | {
        (0, m, "raw input", "raw") for m in MODALITIES
    }
    trained = {
        (s, m, w, f) for s in (1, 2) for m in MODALITIES for w in ("student", "teacher") for f in layers
    }
    assert found == baselines | trained and len(rows) == len(found)
    assert all(0 <= r["ridge"] <= 1 and set(r["knn"]) == {"10", "20"} for r in rows)
    assert all(r["rankme"] >= 1 for r in rows if r["features"].startswith("layer"))
    assert all(r["lidar"] >= 1 for r in rows if r["features"] == "layer 2")
    assert (folder / "probed" / "probes.png").stat().st_size > 10_000


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_the_last_probe_is_what_the_saved_weights_give(weights: str, results: dict, folder: Path) -> None:
    """The checkpoint of the same step, loaded, on the same samples."""
    encoder = load(folder / "probed", "image", weights)
    x, y = {}, {}
    for part, pattern in (("train", "multimodal-train-*.tar"), ("test", "multimodal-val-*.tar")):
        fields = {**encoder.samples.fields, "label": "cls;json.label"}
        corpus = Corpus.open(expand_shards(str(SAMPLE / pattern)), fields, progress=None)
        chosen = choose(len(corpus), 30)
        x[part] = layer_means(encoder, [encoder.samples.decode(corpus, i) for i in chosen])
        y[part] = read_labels(corpus, chosen, "label")
    row = next(
        r for r in rows_of(folder / "probed")
        if (r["step"], r["modality"], r["weights"], r["features"]) == (2, "image", weights, "layer 2")
    )  # fmt: skip
    found = {part: means[:, 1] for part, means in x.items()}
    assert row["rankme"] == pytest.approx(rankme(found["test"]), rel=1e-4)
    assert row["ridge"] == pytest.approx(
        ridge(found["train"], y["train"], found["test"], y["test"])[0], abs=0.05
    )


def test_mistakes_are_told_before_training(results: dict) -> None:
    mistakes = ("no shards", "no labels", "words", "one class", "overlap", "garbled")
    assert [results[name]["code"] for name in mistakes] == [2] * 6
    assert "probe.test=absent-*.tar" in results["no shards"]["err"]
    assert (
        "probe.train=text-train-*.tar" in results["no labels"]["err"]
        and "no 'label'" in results["no labels"]["err"]
    )
    assert "is no integer" in results["words"]["err"] and "probe.label" in results["words"]["err"]
    assert "mono.tar holds one class alone (3) in the 4 samples" in results["one class"]["err"]
    assert "both name" in results["overlap"]["err"] and "give other shards" in results["overlap"]["err"]
    assert "garbled.tar: garbled.tar:7 cannot be used: undecodable image" in results["garbled"]["err"]
    assert not any("step 1/" in results[name]["out"] for name in mistakes)
    with pytest.raises(ValueError, match="set probe.train"):
        load_recipe("image_tiny", ["probe.every=10"])


@pytest.mark.slow
def test_training_samples_that_cannot_be_read_are_left_out_of_lidar(odd: dict, folder: Path) -> None:
    """A batch of them alone too."""
    assert odd["diverged"]["code"] == 0, odd["diverged"]["err"]
    assert all(r["lidar"] >= 1 for r in rows_of(folder / "diverged") if r["features"] == "layer 2")


def test_samples_with_a_view_of_padding_alone_are_left_out_of_lidar(tmp_path: Path) -> None:
    """A text of a few tokens beside long ones: its views show none, of which the mean is not a number."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, text in enumerate(["word", "word " * 60, "word " * 70]):
            member = tarfile.TarInfo(f"{i}.txt")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    settings = ["mask.ratio=0.8", "data.mode=samples", f"data.tokenizer={SAMPLE / 'sentencepiece.model'}"]
    settings = [f"modalities.text.{setting}" for setting in ("data.shards=a.tar", *settings)]
    recipe = load_recipe("text_tiny", [f"data={tmp_path}", f"out={tmp_path / 'run'}", *settings])
    source = open_source("text", recipe.modalities["text"], recipe.data, None)
    run = SimpleNamespace(recipe=recipe, folder=tmp_path, device=torch.device("cpu"))
    views = view_means(build_encoder(run, source, None), source, [0, 1, 2], run.device)
    assert len(views) == 2 and views.isfinite().all()


@pytest.mark.slow
def test_features_that_are_not_finite_are_said_and_end_nothing(odd: dict, folder: Path) -> None:
    assert "image, student: features are not finite" in odd["diverged"]["out"]
    assert {r["step"] for r in rows_of(folder / "diverged")} == {0}
    with pytest.raises(ValueError, match="not finite; take weights of an earlier step"):
        evaluate_frozen(
            "knn", folder / "diverged", folder, "noise-train.tar", "noise-test.tar", modality="image"
        )


@pytest.mark.slow
def test_a_modality_without_labelled_samples_is_named(odd: dict) -> None:
    out = odd["bf16"]["out"]
    assert "audio is not probed: no sample of" in out and "image is not probed" not in out


def baselines(subset: str, *features: str, modality: str = "image") -> list[dict]:
    return [
        {"step": 0, "modality": modality, "subset": subset, "features": name,
         "weights": "raw input" if name == "raw" else "random init"}
        for name in features
    ]  # fmt: skip


WHOLE = ("layer 1", "all", "raw")


@pytest.mark.parametrize(
    ("kept", "goes_on", "is_missing"),
    [(("new", *WHOLE), True, False), (("new", *WHOLE), False, True), (("old", *WHOLE), True, True),
     (("new", "layer 1", "all"), True, True)],
    ids=["whole", "of another run", "of another subset", "cut short"],
)  # fmt: skip
def test_baselines_are_those_of_this_run_and_subset(
    kept: tuple[str, ...], goes_on: bool, is_missing: bool, tmp_path: Path
) -> None:
    """Else they are measured again, and what is left of them goes."""
    others = [*baselines("new", *WHOLE, modality="text"), baselines("old", "all")[0] | {"step": 5}]
    lines = [json.dumps(row) + "\n" for row in (*baselines(*kept), *others)]
    (tmp_path / "probes.jsonl").write_text("".join(lines))
    subset = SimpleNamespace(fingerprint="new", source=SimpleNamespace(samples=SimpleNamespace(raw=None)))
    run = SimpleNamespace(folder=tmp_path, saver=SimpleNamespace(last_good=tmp_path if goes_on else None))
    missing = Probes(load_recipe("image_tiny"), {"image": subset}).without_baselines(run)
    assert missing == ["image"] * is_missing
    assert rows_of(tmp_path) == [*([] if is_missing else baselines(*kept)), *others]


@pytest.mark.slow
def test_two_ranks_at_zero3_do_not_notice_and_find_the_same(folder: Path, results: dict) -> None:
    """Bit-equal losses with and without; accuracies of one rank at stage 0, up to rounding."""
    config = zero3_config(folder)
    both = start_all(
        folder,
        {
            "probed": Command(folder / "probed2", ["--deepspeed", config, *PROBED]),
            "plain": Command(
                folder / "plain2", ["--deepspeed", config, "train.steps=2", "train.save_every=2"]
            ),
        },
        ranks=2,
    )
    assert both["probed"]["code"] == both["plain"]["code"] == 0, both["probed"]["err"]
    for name in ("metrics.jsonl", "health.jsonl"):
        probed, plain = (without_timings(read_rows(folder / run, name)) for run in ("probed2", "plain2"))
        assert probed == plain
    one, two = ({(r["step"], r["modality"], r["weights"], r["features"]): r for r in rows_of(folder / run)}
                for run in ("probed", "probed2"))  # fmt: skip
    assert one.keys() == two.keys()
    for key, row in one.items():
        if "rankme" in row:
            assert two[key]["rankme"] == pytest.approx(row["rankme"], rel=1e-3), key


@pytest.mark.parametrize("weights", ["student", "teacher"])
@pytest.mark.parametrize("run", ["probed", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["ridge", "knn"])
def test_evaluating_the_saved_model_gives_the_numbers_of_the_last_probe(
    kind: str, run: str, weights: str, request: pytest.FixtureRequest, folder: Path
) -> None:
    """`d2v eval ridge|knn RUN DATA` on the same shards and number of samples; in bf16 too, whose checkpoint is fp32."""
    done = request.getfixturevalue("odd" if run == "bf16" else "results")[run]
    assert done["code"] == 0, done["err"]
    parts = {"train": "multimodal-train-*.tar", "test": "multimodal-val-*.tar", "samples": 30}
    if run == "bf16":
        parts = {"train": "noise-train.tar", "test": "noise-test.tar", "samples": 120}
    data = SAMPLE if run == "probed" else folder
    found = evaluate_frozen(
        kind, folder / run, data, **parts, modality="image", weights=weights, batch=32, device="cpu"
    )
    rows = [r for r in rows_of(folder / run) if r["step"] and r["modality"] == "image"]
    rows = [r for r in rows if r["weights"] == weights and r["step"] == rows[-1]["step"]]
    key = "accuracy" if kind == "ridge" else "knn"
    assert [r["features"] for r in found["rows"]] == [r["features"] for r in rows]
    assert [r[key] for r in found["rows"]] == [r[kind] for r in rows]
