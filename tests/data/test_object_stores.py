"""huggingface_hub and gcsfs themselves read shards from servers on localhost that fail and cut connections."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bad_server import Site, serve
from object_stores import Bucket, Hub
from read_stores import FOLDERS
from test_remote import local_batches

from d2v_ds.data import Corpus


@pytest.mark.slow
def test_hf_and_gs_give_the_same_batches_by_names_globs_and_folders(write_shards, tmp_path):
    """By the clients' own settings for where their servers are; each server fails twice and cuts two bodies."""
    local = write_shards(shards=5, samples=7)
    files = {f"in/{path.name}": path.read_bytes() for path in local}
    faults = {"errors": 2, "cut_after": 9000, "cuts": 2}
    sites = {"hf": Site({}, Hub(files), **faults), "gs": Site({}, Bucket(files), **faults)}
    with serve(sites["hf"]) as hub, serve(sites["gs"]) as bucket:
        subprocess.run(
            [sys.executable, Path(__file__).with_name("read_stores.py"), tmp_path, tmp_path / "found.json"],
            env=os.environ | {"HF_ENDPOINT": hub, "STORAGE_EMULATOR_HOST": bucket, "HF_HUB_OFFLINE": "0"},
            check=True,
            timeout=200,
        )
    corpus = Corpus.open(local, {"content": "bin", "label": "cls"}, progress=None, workers=1)
    expected = json.loads(json.dumps(local_batches(local)))
    for name, found in json.loads((tmp_path / "found.json").read_text(encoding="utf-8")).items():
        assert found["batches"] == expected and found["fingerprint"] == corpus.fingerprint
        assert found["folder"] == found["glob"] == [f"{FOLDERS[name]}/{path.name}" for path in local]
        assert f"{FOLDERS[name]}/absent.tar cannot be read" in found["absent"]
        assert sites[name].is_cut == 2 and sites[name].errors == 0
        assert not list((tmp_path / name).rglob("*.part"))
