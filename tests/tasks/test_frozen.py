"""Readouts of frozen features: what they find, in shards of every modality; mistakes are said before the model runs."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from ranks import SAMPLE

from d2v_ds.cli import main
from d2v_ds.convert.consolidate import write_export
from d2v_ds.convert.stored import Stored
from d2v_ds.modalities.build import build_model
from d2v_ds.recipe import load_recipe
from d2v_ds.tasks.frozen import evaluate_frozen
from d2v_ds.tasks.readout import Tokens, Training, Vectors, readout
from shards.command import main as prepare

SPOKEN = {"train": "multimodal-train-000000.tar", "test": "multimodal-val-*.tar"}
TOP = [f"modalities.{name}.target.top_k=2" for name in ("audio", "image", "text")]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A small joint model as it was initialised."""
    recipe = load_recipe("multimodal_tiny", ["body.dim=48", "body.depth=2", *TOP])
    torch.manual_seed(recipe.seed)
    tensors = dict(build_model(recipe.body, recipe.modalities, has_teacher=False).named_parameters())
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    folder = tmp_path_factory.mktemp("model")
    write_export(
        Stored(recipe, tensors, "run, step_00000001", files=SAMPLE, step=1, weights="student"), folder
    )
    return str(folder)


def draw(seed: int, samples: int = 200) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Token sequences of unequal length; one token says the class, the others nothing."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (samples,), generator=g)
    rows = []
    for label in labels.tolist():
        x = torch.randn(int(torch.randint(3, 12, (1,), generator=g)), 16, generator=g)
        x[int(torch.randint(len(x), (1,), generator=g)), :5] = torch.tensor([8.0, *[0.0] * 4]).roll(0)
        x[x[:, 0] == 8.0, 1 + label] = 5.0
        rows.append(x)
    return rows, labels


@pytest.mark.slow
def test_attention_finds_the_token_that_says_the_class_where_the_mean_is_blurred():
    parts = {}
    for name, seed in (("train", 1), ("test", 2)):
        rows, labels = draw(seed)
        tokens = Tokens(16)
        for row in rows:
            tokens.add(row)
        tokens.close()
        parts[name] = tokens, torch.stack([row.mean(0) for row in rows]), labels
    fit, held = parts["train"], parts["test"]
    training = Training(epochs=70)
    attentive = readout(fit[0], fit[2], held[0], held[2], training, CPU)["accuracy"]
    linear = readout(Vectors(fit[1]), fit[2], Vectors(held[1]), held[2], training, CPU)["accuracy"]
    assert attentive > 0.95 and 0.5 < linear < attentive - 0.05


def test_a_readout_is_the_same_each_time_and_leaves_random_states_alone():
    rows, labels = draw(3, 60)
    x = Vectors(torch.stack([row.mean(0) for row in rows]))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    found = [readout(x, labels, x, labels, Training(epochs=3), CPU) for _ in range(2)]
    assert found[0] == found[1] and torch.equal(torch.rand(3), expected)
    with pytest.raises(ValueError, match="2 samples to fit on are too few to hold one out; give 3 or more"):
        readout(Vectors(x.x[:2]), torch.tensor([0, 1]), x, labels, Training(epochs=3), CPU)


@pytest.mark.parametrize("kind", ["knn", "ridge", "linear", "attentive"])
def test_every_kind_prints_a_table_and_writes_json(kind, model, tmp_path, capsys):
    modality = {"knn": "audio", "ridge": "text", "linear": "image", "attentive": "text"}[kind]
    out = tmp_path / "new" / "found.json"
    options = ["--samples", 40, "--modality", modality, "--out", out, "--device", "cpu"]
    options += ["--epochs", 1] if kind in ("linear", "attentive") else ["--baselines"]
    shards = [option for key, name in SPOKEN.items() for option in (f"--{key}", name)]
    assert main(["eval", kind, model, str(SAMPLE), *map(str, options), *shards]) == 0
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert found["task"] == kind and found["train"]["samples"] == found["test"]["samples"] == 40
    layers = {"linear": ["last", "all"], "attentive": ["last"]}.get(kind, ["layer 1", "layer 2", "all"])
    assert [r["features"] for r in found["rows"] if r["weights"] == "model"] == layers
    for row in found["rows"]:
        for value in row["knn"].values() if kind == "knn" else [row["accuracy"]]:
            assert 0 <= value <= 1 and f"{value:.4f}" in printed
    if kind in ("knn", "ridge"):  # what it was initialised with is its own random twin
        twin = [{**row, "weights": ""} for row in found["rows"] if row["weights"] == "random init"]
        assert twin == [{**row, "weights": ""} for row in found["rows"] if row["weights"] == "model"]


def test_what_cannot_be_evaluated_is_an_error_that_says_why(model):
    def refused(**options: object) -> str:
        with pytest.raises(ValueError) as error:
            evaluate_frozen("ridge", model, **{"data": SAMPLE, "modality": "image", **SPOKEN, **options})
        return str(error.value)

    assert "name labelled shards to test on with --test" in refused(data=SAMPLE / "*.tar", test=None)
    assert "is no integer; name another member or key" in refused(label="txt")
    assert "has no 'absent'" in refused(label="json.absent")
    assert "text-train" in refused(train="text-train-000000.tar")  # holds no image
    assert "both name" in refused(train="multimodal-*.tar")
    assert "nowhere" in refused(data=Path("nowhere"))
    assert "must be 1 or more" in refused(samples=0)
    assert "is a folder; name a file in it" in refused(out=SAMPLE)
    file = SAMPLE / "README.md"
    assert f"--out {file}/x.json cannot be written" in refused(out=file / "x.json")


def test_pairs_of_texts_are_read_as_pairs(model, tmp_path):
    """Which of 2 words the second text is decides the class; the first texts say nothing."""
    rows = [f"same words here\t{('yes', 'no')[i % 2]}\t{i % 2}\n" for i in range(30)]
    (tmp_path / "pairs.tsv").write_text("text\ttext_b\tlabel\n" + "".join(rows))
    prepared = [
        "table",
        f"{tmp_path}/pairs.tsv",
        "--out",
        f"{tmp_path}/shards",
        "--val",
        "0.4",
        "--workers",
        "1",
    ]
    assert prepare(prepared) == 0
    found = evaluate_frozen("ridge", model, tmp_path / "shards", modality="text", device="cpu")
    assert found["rows"][-1]["accuracy"] == 1


@pytest.mark.parametrize("kind", ["knn", "attentive"])
def test_samples_that_are_no_sound_or_too_short_are_named(kind, model, tmp_path):
    for part in ("train", "test"):
        with tarfile.open(tmp_path / f"a-{part}-000000.tar", "w") as tar:
            for i in range(14):
                waves = io.BytesIO()
                soundfile.write(
                    waves,
                    np.sin(np.arange(3000) * (i % 2 + 1) / 9)[: 50 if i == 3 else None],
                    16_000,
                    format="wav",
                )
                for name, content in (
                    (f"{i}.wav", b"noise" if i == 5 else waves.getvalue()),
                    (f"{i}.cls", b"%d" % (i % 2)),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    found = evaluate_frozen(kind, model, tmp_path, modality="audio", device="cpu", batch=5, epochs=1)
    assert found["train"]["samples"] == found["test"]["samples"] == 12
    names = [bad["key"] for bad in found["unreadable"]]
    assert sorted(names) == [f"a-{part}-000000.tar:{i}" for part in ("test", "train") for i in (3, 5)]
    assert "25 ms" in next(bad["reason"] for bad in found["unreadable"] if bad["key"].endswith(":3"))
