"""An ONNX model, run in onnxruntime, gives our features at any batch size and length."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import ROOT
from stores import store, store_joint

import d2v_ds
from d2v_ds.convert import onnx as exporter
from d2v_ds.convert.load import Encoder, build_encoder
from d2v_ds.convert.onnx import CHECKED, TOLERANCE, TRACED, Graph, check, open_session, write_onnx
from d2v_ds.convert.single import single
from d2v_ds.convert.stored import Stored

pytestmark = pytest.mark.slow
for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def stored() -> Stored:
    """Speech with a CTC head, ALiBi and a prenet block."""
    return store("audio", head=6)


@pytest.fixture(scope="module")
def folder(stored, tmp_path_factory) -> Path:
    return write_onnx(stored, tmp_path_factory.mktemp("onnx") / "of_audio")


@pytest.fixture(scope="module")
def encoder(stored) -> Encoder:
    return build_encoder(single(stored), "audio", Path("memory"))


def waves(*seconds: float) -> list[np.ndarray]:
    rng = np.random.default_rng(len(seconds))
    return [rng.standard_normal(round(16_000 * s)).astype("float32") * 0.1 for s in seconds]


def run(folder: Path, sounds: list[np.ndarray]) -> list[np.ndarray]:
    """As the folder's README says, padded."""
    normal = [(x - x.mean()) / np.sqrt(x.var() + 1e-5) for x in sounds]
    longest = max(map(len, normal))
    values = np.stack([np.pad(x, (0, longest - len(x))) for x in normal])
    mask = np.stack([np.arange(longest) < len(x) for x in normal]).astype("int64")
    return open_session(folder / "model.onnx").run(None, {"input_values": values, "attention_mask": mask})


@pytest.mark.parametrize("seconds", [(0.5,), (2.0,), (0.3, 1.2, 0.9), (0.4,) * 5], ids=str)
def test_raw_sound_gives_our_features_at_any_batch_size_and_length(seconds, folder, encoder):
    """And pooled features and logits; to 1e-4."""
    sounds = waves(*seconds)
    hidden, pooled, logits = map(torch.from_numpy, run(folder, sounds))
    ours = encoder.extract(sounds, all=True)
    real = ~ours.mask
    assert (ours.x[real] - hidden[real]).abs().max() < TOLERANCE
    assert (ours.pooled - pooled).abs().max() < TOLERANCE
    assert (encoder.logits(sounds)[real] - logits[real]).abs().max() < TOLERANCE


def test_padding_changes_nothing(folder):
    sounds = waves(0.3, 1.2, 0.9)
    together = run(folder, sounds)
    for row, sound in enumerate(sounds):
        hidden, pooled, _ = run(folder, [sound])
        assert np.abs(together[0][row, : hidden.shape[1]] - hidden[0]).max() < 1e-5
        assert np.abs(together[1][row] - pooled[0]).max() < 1e-5


def test_batches_that_are_compared_differ_from_the_traced_one():
    """In number of samples and in length, shorter and longer; one of them has no padding."""
    assert not {len(tokens) for tokens in CHECKED} <= {len(TRACED)}
    assert min(map(min, CHECKED)) < min(TRACED) and max(map(max, CHECKED)) > max(TRACED)
    assert any(len(set(tokens)) == 1 for tokens in CHECKED)


def test_a_model_that_gives_other_outputs_is_no_export(stored, folder):
    """One number moved by a hundredth is found."""
    alone = replace(stored, tensors={name: tensor.clone() for name, tensor in stored.tensors.items()})
    graph = Graph(build_encoder(single(alone), "audio", Path("memory"))).eval()
    assert check(graph, folder / "model.onnx", single(stored)) < TOLERANCE
    with torch.no_grad():
        graph.model.blocks[0].attn.proj.bias[0] += 0.01
    with pytest.raises(RuntimeError, match="other outputs than ours: .* differs by .*nothing was kept"):
        check(graph, folder / "model.onnx", single(stored))


def test_the_folder_says_what_it_holds(folder):
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "config.json", "README.md"}
    config = json.loads((folder / "config.json").read_text())
    assert config["modality"] == "audio" and config["weights"] == "student" and config["step"] == 120
    assert config["head"]["kind"] == "ctc" and config["difference"] < TOLERANCE
    card = (folder / "README.md").read_text()
    assert "weights (student) after 120 steps" in card and 'InferenceSession("model.onnx")' in card
    with pytest.raises(ValueError, match="has neither format 'd2v_ds' nor a model_type"):
        d2v_ds.load(folder)


def test_the_guides_and_the_cards_lines_run(folder, encoder):
    """docs/export.md, and the README of the folder."""
    guide = (ROOT / "docs" / "export.md").read_text()
    for text in (guide, (folder / "README.md").read_text()):
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        code = next(block for block in blocks if "InferenceSession" in block)
        path = "FOLDER/model.onnx" if text is guide else "model.onnx"
        (x,) = waves(0.5)
        names = {"waveform": x, "x": x}
        exec(code.replace(path, str(folder / "model.onnx")), names)
        given = torch.from_numpy(names["last_hidden_state"])
        assert (given - encoder.extract(x)).abs().max() < TOLERANCE


def test_a_joint_model_must_say_which_modality(tmp_path):
    with pytest.raises(ValueError, match="the model has image, audio, text, .* say which, modality='image'"):
        write_onnx(store_joint(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_an_error_that_says_how_to_get_it():
    with pytest.raises(ValueError, match=r"needs no_such_package: pip install 'd2v_ds\[onnx\]'"):
        exporter.require("onnx", "no_such_package")


VARIANTS = [
    ("image",),
    ("text",),
    ("audio", "@.alibi.per_layer=true", "@.extra_tokens=2"),
    ("audio", "fairseq_compat=true"),
    ("audio_v1_tiny",),
    ("text_v1_tiny",),
    ("image_v1_tiny",),
]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", VARIANTS, ids=" ".join)
@pytest.mark.parametrize("head", [0, 5])
def test_every_kind_of_model_is_written(overrides, head, tmp_path):
    """Writing compares outputs by itself."""
    out = write_onnx(store(*overrides, head=head), tmp_path / "out", weights="teacher" if not head else None)
    assert json.loads((out / "config.json").read_text())["difference"] < TOLERANCE


@pytest.mark.slow
def test_large_weights_lie_beside_the_graph(tmp_path, monkeypatch):
    """And are found there after the folder has moved."""
    monkeypatch.setattr(exporter, "LARGE", 0)
    stored = store("text")
    out = write_onnx(stored, tmp_path / "out").rename(tmp_path / "moved")
    assert (out / "model.onnx.data").stat().st_size > (out / "model.onnx").stat().st_size
    graph = Graph(build_encoder(single(stored), "text", out)).eval()
    assert check(graph, out / "model.onnx", single(stored)) < TOLERANCE
