"""Ridge probes: exact leave-one-out, one definition for train and test, no direction below the precision of 16 bits."""

from __future__ import annotations

import io
import tarfile

import pytest
import torch
from ranks import SAMPLE

from d2v_ds.convert.consolidate import write_export
from d2v_ds.convert.stored import Stored
from d2v_ds.modalities.build import build_model
from d2v_ds.recipe import load_recipe
from d2v_ds.tasks.probe import PENALTIES, probe, ridge


def draw(samples: int, dim: int, seed: int, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (samples,), generator=g)
    centres = torch.randn(3, dim, generator=torch.Generator().manual_seed(0))
    return centres[labels] + noise * torch.randn(samples, dim, generator=g), labels


def fit(x: torch.Tensor, y: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    onehot = torch.nn.functional.one_hot(y, 3).double()
    mean = onehot.mean(0)
    weights = torch.linalg.solve(
        x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (onehot - mean)
    )
    return weights, mean


def test_the_penalty_is_the_one_that_leaving_each_sample_out_chooses():
    """Refitting without each sample in turn, features and mean as standardised on all, finds the same penalty."""
    x, y = draw(40, 15, 1, noise=3.0)
    test_x, test_y = draw(200, 15, 2, noise=3.0)
    accuracy, penalty = ridge(x, y, test_x, test_y)
    z = ((x - x.mean(0)) / x.std(0)).double()
    best = (-1.0, 0.0)
    for candidate in (p for p in PENALTIES if p >= 0.1):
        right = 0
        for i in range(len(z)):
            rest = torch.arange(len(z)) != i
            centred = torch.nn.functional.one_hot(y, 3).double()[rest]
            design = torch.cat([z[rest], torch.ones(len(z) - 1, 1, dtype=z.dtype)], dim=1)
            shrink = candidate * torch.eye(design.shape[1], dtype=z.dtype)
            shrink[-1, -1] = 0  # the intercept is not penalised
            weights = torch.linalg.solve(design.T @ design + shrink, design.T @ centred)
            right += int((torch.cat([z[i], torch.ones(1)]) @ weights).argmax() == y[i])
        best = max(best, (right / len(z), candidate))
    assert penalty == best[1]
    weights, mean = fit(z, y, penalty)
    test_z = ((test_x - x.mean(0)) / x.std(0)).double()
    assert accuracy == pytest.approx(((test_z @ weights + mean).argmax(1) == test_y).double().mean().item())


def test_a_direction_below_16_bits_is_read_only_if_asked_for():
    """Labels hidden in a difference of 1e-4 between two nearly equal features."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(2, (2000,), generator=g)
    base = torch.randn(2000, generator=g, dtype=torch.float64)
    x = torch.stack([base, base + 1e-4 * (2 * y - 1)], dim=1)
    hidden, _ = ridge(x[:1000], y[:1000], x[1000:], y[1000:])
    found, penalty = ridge(x[:1000], y[:1000], x[1000:], y[1000:], lowest_penalty=1e-8)
    rounded, _ = ridge(x[:1000].bfloat16().float(), y[:1000], x[1000:].bfloat16().float(), y[1000:], 1e-8)
    assert hidden < 0.6 < 0.95 < found and penalty < 0.1
    assert rounded < 0.6


def test_features_without_labels_in_them_score_chance():
    x, y = draw(600, 20, 3)
    accuracy, _ = ridge(torch.randn_like(x), y, *draw(600, 20, 4))
    assert accuracy < 0.42


def test_what_cannot_be_probed_is_an_error_that_says_why(tmp_path, monkeypatch):
    """Not a number that says nothing, nor a traceback from linear algebra."""
    recipe = load_recipe("image_tiny", ["body.dim=48", "body.depth=2", "modalities.image.target.top_k=2"])
    model = build_model(recipe.body, recipe.modalities, has_teacher=False)
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    write_export(Stored(recipe, tensors, "run, step_00000001", step=1, weights="student"), tmp_path / "model")
    shards = {"train": SAMPLE / "multimodal-train-000000.tar", "test": SAMPLE / "multimodal-val-000000.tar"}
    for name, chosen in (("three", "1 2 3"), ("one", "1"), ("bad", "1 2")):
        with tarfile.open(shards["train"]) as source, tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            members = {member.name: source.extractfile(member).read() for member in source}
            for key in sorted({member.partition(".")[0] for member in members}):
                if members[f"{key}.cls"].decode() not in chosen.split():
                    continue
                for kind in ("png", "cls"):
                    content = b"no picture" if (name, kind) == ("bad", "png") else members[f"{key}.{kind}"]
                    info = tarfile.TarInfo(f"{key}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    nan = torch.full((1, 2, 48), torch.nan)
    monkeypatch.setattr("d2v_ds.tasks.probe.layer_means", lambda encoder, items, batch: nan)
    for changed, said in (
        ({"test": shards["train"]}, "both name .*; what is fitted on says nothing when it is tested on"),
        ({"train": tmp_path / "one.tar"}, r"one.tar holds one class alone \(1\)"),
        ({"train": tmp_path / "three.tar"}, r"classes \[0, 4, 5, 6, 7, 8, 9\] of .* are not in .*three.tar"),
        ({"train": tmp_path / "bad.tar"}, "bad.tar:train-000.* cannot be used: undecodable image"),
        ({}, "random init: features are not finite; take weights of an earlier step"),
    ):
        with pytest.raises(ValueError, match=said):
            probe(tmp_path / "model", **{name: str(path) for name, path in (shards | changed).items()})
