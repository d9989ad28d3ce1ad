"""What measures, embeds or learns from shards reads them from URLs too, in the cache that it is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from ranks import ROOT, SAMPLE
from runs import TINY, python, start

sys.path.insert(0, str(ROOT / "tests" / "data"))

from bad_server import Site, serve  # noqa: E402

from d2v_ds.cli import main  # noqa: E402

TRAIN, VAL = "multimodal-train-000000.tar", "multimodal-val-000000.tar"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An untrained image encoder: a run of one step."""
    out = tmp_path_factory.mktemp("model") / "run"
    settings = [
        *TINY[:1],
        "modalities.image.data.shards=multimodal-train-*.tar",
        "modalities.image.data.batch=2",
    ]
    settings += ["train.steps=1", "train.workers=0", f"out={out}"]
    start(python("train.py", "--deepspeed", "zero0", "--recipe", "image_tiny", *settings))
    return out


@pytest.fixture
def site() -> Site:
    return Site({name: (Path(SAMPLE) / name).read_bytes() for name in (TRAIN, VAL)})


def test_features_are_measured_and_embedded_from_urls(model, site, tmp_path, capsys) -> None:
    """The same numbers as from the disk; what was fetched lies where --cache says, once."""
    remote = ["--cache", str(tmp_path / "cache"), "--cache-gib", "0.5"]
    with serve(site) as url:
        command = [
            "eval",
            "ridge",
            str(model),
            f"{url}/{TRAIN}",
            "--test",
            f"{url}/{VAL}",
            "--label",
            "json.digit",
        ]
        assert main([*command, *remote, "--out", str(tmp_path / "remote.json")]) == 0
        assert main(["embed", str(model), f"{url}/{VAL}", *remote, "--out", str(tmp_path / "a.npy")]) == 0
        command = ["probe", str(model), "--train", f"{url}/{TRAIN}", "--test", f"{url}/{VAL}"]
        assert main([*command, "--label", "json.digit", *remote]) == 0
        site.is_away = True
        quick = ["--retry-minutes", "0.001", "--cache", str(tmp_path / "other")]
        assert main(["embed", str(model), f"{url}/{VAL}", *quick, "--out", str(tmp_path / "b.npy")]) == 1
    assert sorted(path.name for path in (tmp_path / "cache").glob("*/*.tar")) == [TRAIN, VAL]
    assert sorted(name for name in site.asked if name.endswith(".tar"))[:2] == [TRAIN, VAL]
    local = [
        "eval",
        "ridge",
        str(model),
        f"{SAMPLE}/{TRAIN}",
        "--test",
        f"{SAMPLE}/{VAL}",
        "--label",
        "json.digit",
    ]
    assert main([*local, "--out", str(tmp_path / "local.json")]) == 0
    assert main(["embed", str(model), f"{SAMPLE}/{VAL}", "--out", str(tmp_path / "b.npy")]) == 0
    rows = [json.loads((tmp_path / name).read_text())["rows"] for name in ("remote.json", "local.json")]
    assert rows[0] == rows[1]
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))


def test_a_tokenizer_is_learned_from_urls(tmp_path, capsys) -> None:
    site = Site({"text.tar": (Path(SAMPLE) / "text-train-000000.tar").read_bytes()})
    with serve(site) as url:
        options = ["--vocabulary", "400", "--cache", str(tmp_path / "cache")]
        learn = ["tokenizer", "train", f"{url}/text.tar", "--out", str(tmp_path / "a.model"), *options]
        assert main(learn) == 0
        absent = ["tokenizer", "train", f"{url}/absent.tar", "--out", str(tmp_path / "b.model"), *options]
        assert main(absent) == 1
    assert [path.name for path in (tmp_path / "cache").glob("*/*.tar")] == ["text.tar"]
    assert "absent.tar" in capsys.readouterr().err


def test_a_cache_of_no_size_is_refused_before_anything_is_read(capsys) -> None:
    assert main(["embed", "no-model", "no-data", "--out", "x.npy", "--cache-gib", "0"]) == 2
    assert "cache_gib" in capsys.readouterr().err
