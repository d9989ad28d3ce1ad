"""The batches of shards at hf:// and gs://, as the environment says where those are: read_stores.py CACHE RESULTS.json.

A process of its own, since huggingface_hub reads HF_ENDPOINT when it is imported.
"""

import json
import sys
from pathlib import Path

from test_remote import NAMES, batches, open_corpus, settings_of

from d2v_ds.data.remote import Missing, RemoteError, expand_url, reading

FOLDERS = {"hf": "hf://datasets/owner/name/in", "gs": "gs://bucket/in"}


def read(folder: str, cache: Path) -> dict[str, object]:
    settings = settings_of(cache)
    corpus = open_corpus(f"{folder}/{NAMES}", settings)
    found: dict[str, object] = {"batches": batches(corpus, workers=1), "fingerprint": corpus.fingerprint}
    with reading(settings):
        found["folder"], found["glob"] = expand_url(folder), expand_url(f"{folder}/*.tar")
        try:
            open_corpus(f"{folder}/absent.tar", settings)
        except RemoteError as error:
            found["absent"] = type(error) is Missing and str(error)
    return found


if __name__ == "__main__":
    results = {name: read(folder, Path(sys.argv[1]) / name) for name, folder in FOLDERS.items()}
    Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")
