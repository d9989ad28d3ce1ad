"""The model computes what the reference implementation computed, on recorded tensors and numbers."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2v_ds.engine.ema import anneal
from d2v_ds.modalities.audio.net import CONV_LAYERS
from d2v_ds.modalities.audio.samples import num_frames
from d2v_ds.modalities.image.net import sincos_positions
from d2v_ds.model.layers import alibi_slopes
from d2v_ds.recipe import Optim
from d2v_ds.training.schedule import learning_rate

TESTS = Path(__file__).resolve().parents[1]
GOLDEN = TESTS / "golden"
SCRIPT = TESTS.parent / "scripts" / "check_golden.py"
CASES = ("image_cb4", "audio_cb4", "text_cb4", "v1_audio")
INPUTS = {"source", "mask", "padding_mask", "dec_noise"}
QUANTITIES = {"image_cb4": 200, "audio_cb4": 200, "text_cb4": 200, "v1_audio": 150}
MISC = json.loads((GOLDEN / "misc.json").read_text())


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_golden", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_golden"] = module  # its dataclass looks its own module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(script: ModuleType) -> dict[str, tuple]:
    """The case and its compared rows, by name."""
    cases = {name: script.read_case(GOLDEN / f"{name}.json") for name in CASES}
    return {name: (case, list(case.rows())) for name, case in cases.items()}


def copy_case(name: str, folder: Path, weight: str | None = None) -> Path:
    """A copy of a case in `folder`, with one number of one weight moved by 0.1."""
    for suffix in (".json", ".weights.safetensors", ".tensors.safetensors"):
        shutil.copy(GOLDEN / (name + suffix), folder)
    if weight:
        path = folder / f"{name}.weights.safetensors"
        weights = load_file(path)
        weights[weight].view(-1)[0] += 0.1
        save_file(weights, path)
    return folder


def run_main(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["check_golden.py", *map(str, arguments)])
    return script.main()


@pytest.mark.parametrize("name", CASES)
def test_every_quantity_is_within_tolerance(results: dict[str, tuple], name: str) -> None:
    """Local features, encoder, decoder, teacher, targets, losses, gradients, features, one EMA step."""
    misses = [
        f"{row.quantity} is {row.error:.2g} of its tolerance"
        for row in results[name][1]
        if not row.error <= 1
    ]
    assert not misses, misses


@pytest.mark.parametrize("name", CASES)
def test_every_recorded_tensor_and_gradient_norm_is_compared(results: dict[str, tuple], name: str) -> None:
    """Left out are only the inputs and the fixed image positions, which we recompute."""
    case, rows = results[name]
    recorded = {
        key for key in case.tensors if key.split(".", 1)[-1] not in INPUTS and "fixed_positional" not in key
    }
    for batch, record in case.info["batches"].items():
        recorded |= {f"{batch}.grad_l2.{parameter}" for parameter in record["grad_l2"]}
        recorded |= {f"{batch}.loss_sums.{loss}" for loss in record["scalars"].get("loss_sums", ())}
        recorded |= {f"{batch}.{key}" for key in ("sample_size", "total_loss", "pred_var", "target_var")}
    assert len(recorded) > QUANTITIES[name]
    assert recorded <= {row.quantity for row in rows}


def test_every_gradient_of_the_model_is_among_the_recorded_ones(
    results: dict[str, tuple], script: ModuleType
) -> None:
    """So a parameter that the reference does not have cannot hide."""
    for case, _ in results.values():
        trainable = {name for name, p in case.build().named_parameters() if p.requires_grad}
        names = case.info["batches"]["b0"]["grad_l2"]
        if isinstance(case, script.CaseV1):  # its queries, keys and values are thirds of one of ours
            assert trainable == {script.fairseq_v1.our_name(name).name for name in names}
        else:
            assert trainable == {script.our_name(name) for name in names}


def test_the_script_prints_a_row_for_every_quantity(
    results: dict[str, tuple],
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """The whole folder, misc.json and masking_stats.json included: they are no cases."""
    assert run_main(script, monkeypatch, GOLDEN) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in CASES:
        mine = [line.split() for line in lines if line.startswith(name)]
        assert [words[1] for words in mine[:-1]] == [row.quantity for row in results[name][1]]
        assert all(words[-1] == "ok" for words in mine[:-1])
        assert mine[-1][1:] == [str(len(mine) - 1), "quantities,", "0", "out", "of", "tolerance"]
    assert [line for line in lines if not line.startswith(CASES)] == []


@pytest.mark.parametrize(
    ("name", "weight", "quantity"),
    [
        ("text_cb4", "blocks.1.mlp.fc1.bias", "b0.enc_out"),
        ("text_cb4", "_ema.2.attn.proj.weight", "b0.targets_full"),
        ("image_cb4", "modality_encoders.IMAGE.extra_tokens", "b0.enc_in"),
        ("audio_cb4", "modality_encoders.AUDIO.alibi_scale", "b0.enc_alibi_bias"),
        ("audio_cb4", "modality_encoders.AUDIO.decoder.blocks.1.0.bias", "b0.dec_out"),
        ("v1_audio", "mask_emb", "b0.enc_out"),
        ("v1_audio", "_ema.layer_norm.weight", "b0.y"),
    ],
)
def test_one_moved_weight_is_a_miss(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    name: str,
    weight: str,
    quantity: str,
) -> None:
    """Of student, teacher, modality encoder or decoder, and the quantity next to it says so."""
    assert run_main(script, monkeypatch, copy_case(name, tmp_path, weight)) == 1
    lines = capsys.readouterr().out.splitlines()
    verdicts = {line.split()[1]: line.split()[-1] for line in lines[:-1]}
    assert verdicts[quantity] == "MISS"
    assert verdicts["b0.sample_size"] == "ok"


@pytest.mark.slow
def test_the_exit_status_of_a_miss_is_1(tmp_path: Path) -> None:
    """As a process; --worst 2 keeps two rows and the summary."""
    folder = copy_case("text_cb4", tmp_path, "blocks.0.norm1.weight")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), "--worst", "2"], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["MISS", "MISS", "tolerance"]


def test_a_folder_without_a_case_is_an_error(script: ModuleType, tmp_path: Path) -> None:
    """A json alone is no case."""
    shutil.copy(GOLDEN / "misc.json", tmp_path)
    with pytest.raises(SystemExit, match="no case in"):
        script.find_cases(tmp_path)


@pytest.mark.parametrize("ours", [[1.0, math.nan], [1.0, math.inf], [1.0, 2.0, 3.0], [1.0, 2.1]])
def test_nan_infinity_a_wrong_shape_and_a_wrong_value_do_not_pass(
    script: ModuleType, ours: list[float]
) -> None:
    """The comparison itself; equal tensors do pass."""
    reference = torch.tensor([1.0, 2.0])
    assert script.compare("x", reference, reference, 1e-4, 1e-4).error == 0
    assert not script.compare("x", torch.tensor(ours), reference, 1e-4, 1e-4).error <= 1


@pytest.mark.parametrize("heads", sorted(MISC["alibi_slopes"]["by_heads"], key=int))
def test_alibi_slopes_are_the_recorded_ones(heads: str) -> None:
    """For powers of two and for 6 and 12 heads."""
    expected = torch.tensor(MISC["alibi_slopes"]["by_heads"][heads])
    torch.testing.assert_close(alibi_slopes(int(heads)), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "dim", "side"), [("dim16_grid2", 16, 2), ("dim8_grid3", 8, 3)])
def test_image_positions_are_the_recorded_ones(name: str, dim: int, side: int) -> None:
    """Columns in the first half of the channels, rows in the second."""
    expected = torch.tensor(MISC["sincos_2d"][name])
    torch.testing.assert_close(sincos_positions(dim, side), expected, rtol=0, atol=1e-6)


def test_image_positions_of_the_base_model_have_the_published_entries() -> None:
    """D = 768 on 14 x 14: patches 0, 1 (next column) and 14 (next row)."""
    positions = sincos_positions(768, 14)
    first = torch.tensor([0.84147, 0.81525, 0.78859])
    zeros, ones = torch.zeros(192), torch.ones(192)
    torch.testing.assert_close(positions[0], torch.cat([zeros, ones, zeros, ones]))
    torch.testing.assert_close(positions[1, :3], first, rtol=0, atol=1e-5)
    torch.testing.assert_close(positions[1, 384:], positions[0, 384:])
    torch.testing.assert_close(positions[14, 384:387], first, rtol=0, atol=1e-5)
    torch.testing.assert_close(positions[14, :384], positions[0, :384])


@pytest.mark.parametrize(
    ("samples", "frames"), [*MISC["audio_frames"].items(), ("399", 0), ("720", 2), ("64000", 199)]
)
def test_a_waveform_gives_the_recorded_number_of_frames(samples: str, frames: int) -> None:
    """The released feature extractor: receptive field 400, hop 320."""
    assert num_frames(int(samples), CONV_LAYERS) == frames


@pytest.mark.parametrize(
    ("name", "start", "end", "steps"),
    [
        ("image_base", 0.9998, 0.99999, 100_000),
        ("audio_base", 0.999, 0.99999, 75_000),
        ("text_base", 0.9999, 0.99999, 100_000),
        ("image_large", 0.9998, 1.0, 300_000),
    ],
)
def test_tau_follows_the_recorded_schedule(name: str, start: float, end: float, steps: int) -> None:
    """tau after n applied steps; the record's large images are annealed to 1."""
    for done, tau in MISC["ema_decay_schedule"][name].items():
        assert anneal(start, end, steps, int(done)) == pytest.approx(tau, rel=0, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "lr", "warmup", "total"),
    [
        ("image_base", 1e-3, 50_040, 375_300),
        ("audio_base", 7.5e-4, 8_000, 400_000),
        ("text_base", 2e-4, 4_000, 1_000_000),
    ],
)
def test_the_learning_rate_follows_the_recorded_schedule(
    name: str, lr: float, warmup: int, total: int
) -> None:
    """Rate of the step after n done ones: the first is 0; and 0 again at the end."""
    optim = Optim(lr=lr, warmup_steps=warmup)
    for done, rate in MISC["lr_schedule"][name].items():
        assert learning_rate(optim, int(done), total) == pytest.approx(rate, rel=1e-9, abs=1e-16)
    assert learning_rate(optim, total, total) == 0
