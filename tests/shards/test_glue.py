"""`d2v prepare glue`: each task's own layout comes out as texts and labels; columns that do not fit are errors."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from glue_files import FOLDERS, contents, samples, write_task, write_tsv
from trees import all_bytes, prepare, read_shards, skipped

from d2v_ds.data import Corpus, expand_shards
from shards.glue import TASKS


def make(source: Path, task: str, out: Path, *more: object) -> str:
    status, said = prepare("glue", source, "--task", task, "--out", out, "--workers", 1, *more)
    assert status == 0, said
    return said


def refuse(source: Path, task: str, out: Path) -> str:
    status, said = prepare("glue", source, "--task", task, "--out", out, "--workers", 1)
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert not list(out.glob("*.tar"))
    return said


@pytest.mark.parametrize("task", TASKS)
def test_every_row_of_a_task_comes_out_with_its_texts_and_its_label(task, tmp_path):
    """Quotes, U+2028 and U+0085 are text; MRPC's byte order mark and MNLI's two development sets."""
    make(write_task(tmp_path / "glue", task), task, tmp_path / "out")
    splits = ["train", "val-matched", "val-mismatched"] if task == "mnli" else ["train", "val"]
    for split in splits:
        expected = samples(task, split, 6)
        assert contents(read_shards(tmp_path / "out", f"{task}-{split}-0*.tar")) == expected
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert list(manifest["splits"]) == splits and manifest["skipped"] == 0
    if task == "stsb":
        assert not (tmp_path / "out" / "classes.json").exists()
    else:
        assert tuple(json.loads((tmp_path / "out" / "classes.json").read_text())) == TASKS[task].classes


def test_what_training_reads_is_what_was_written_and_the_same_bytes_each_time(tmp_path):
    source = write_task(tmp_path / "glue", "rte", rows=40)
    for out in ("a", "b"):
        make(source / "RTE", "rte", tmp_path / out, "--shard-mib", 0.02)
    assert all_bytes(tmp_path / "a") == all_bytes(tmp_path / "b")
    shards = expand_shards(str(tmp_path / "a" / "rte-train-*.tar"))
    assert len(shards) > 1
    fields = {"text": "txt;json.text", "text_b": "json.text_b;", "label": "cls;json.label"}
    corpus = Corpus.open(shards, fields, progress=None)
    read = sorted(tuple(v.decode() for v in corpus.read(i).values()) for i in range(len(corpus)))
    assert read == sorted((s["text"], s["text_b"], str(s["label"])) for s in samples("rte", "train", 40))


def test_hugging_faces_parquet_gives_the_same_samples(tmp_path):
    for task in ("cola", "mnli", "stsb"):
        folder = tmp_path / "hub" / task
        folder.mkdir(parents=True)
        splits = {"train": "train", "validation": "val"}
        if task == "mnli":
            splits = {
                "train": "train",
                "validation_matched": "val-matched",
                "validation_mismatched": "val-mismatched",
            }
        for file, split in splits.items():
            some = samples(task, split, 6)
            columns = {name: [s[key] for s in some] for name, key in
                       zip(TASKS[task].parquet + ("label",), ("text", "text_b", "label") if "text_b" in some[0]
                           else ("text", "label"), strict=True)}  # fmt: skip
            for part in (0, 1):
                table = pa.table({name: values[part * 3 : part * 3 + 3] for name, values in columns.items()})
                pq.write_table(
                    table.append_column("idx", pa.array([0, 1, 2])),
                    folder / f"{file}-0000{part}-of-00002.parquet",
                )
        make(tmp_path / "hub", task, tmp_path / "out" / task)
        for split in splits.values():
            read = read_shards(tmp_path / "out" / task, f"{task}-{split}-0*.tar")
            assert contents(read) == samples(task, split, 6)


def test_shuffled_columns_with_a_header_are_read_by_name(tmp_path):
    for task, order in (
        ("stsb", [9, 7, 0, 1, 8, 2, 3, 4, 5, 6]),
        ("sst2", [1, 0]),
        ("mrpc", [3, 4, 0, 2, 1]),
    ):
        source = write_task(tmp_path / "glue", task)
        write_tsv(source / FOLDERS[task] / "train.tsv", task, samples(task, "train", 6), order)
        make(source, task, tmp_path / task)
        assert contents(read_shards(tmp_path / task, "*-train-0*.tar")) == samples(task, "train", 6)


def test_columns_that_do_not_fit_are_refused_with_the_list(tmp_path):
    """CoLA without a header, shuffled; a header without the label; no header; labels under another name's header."""
    cola = write_task(tmp_path / "glue", "cola")
    write_tsv(cola / "CoLA" / "train.tsv", "cola", samples("cola", "train", 6), [3, 1, 2, 0])
    assert "source (one word), label" in refuse(cola, "cola", tmp_path / "swapped")
    write_tsv(cola / "CoLA" / "train.tsv", "cola", samples("cola", "train", 6), [3, 0, 2, 1])
    assert (
        "source (one word), label (0 or 1), mark (* or nothing), sentence; it says: cola train 0"
        in refuse(cola, "cola", tmp_path / "a")
    )
    named = "label\tsentence\n" + "".join(f"{s['label']}\t{s['text']}\n" for s in samples("cola", "train", 6))
    (cola / "CoLA" / "train.tsv").write_text(named, encoding="utf-8")
    make(cola, "cola", tmp_path / "b")
    assert contents(read_shards(tmp_path / "b", "*-train-0*.tar")) == samples("cola", "train", 6)
    rte = write_task(tmp_path / "glue", "rte")
    train = rte / "RTE" / "train.tsv"
    lines = train.read_text(encoding="utf-8")
    train.write_text(lines.replace("\tlabel\n", "\tgold\n"), encoding="utf-8")
    assert "no column 'label'; its first line says 'index', 'sentence1', 'sentence2', 'gold'" in refuse(
        rte, "rte", tmp_path / "c"
    )
    train.write_text(lines.partition("\n")[2], encoding="utf-8")
    assert "no column 'sentence1', 'sentence2', 'label'" in refuse(rte, "rte", tmp_path / "d")
    train.write_text(lines.replace("sentence2\tlabel", "label\tsentence2"), encoding="utf-8")
    assert "must be one of entailment, not_entailment" in refuse(rte, "rte", tmp_path / "e")


def test_bad_labels_and_missing_files_are_errors_and_broken_rows_are_listed(tmp_path):
    stsb = write_task(tmp_path / "glue", "stsb")
    train = stsb / "STS-B" / "train.tsv"
    lines = train.read_text(encoding="utf-8")
    train.write_text(lines.replace("\t0.5\n", "\t7.5\n"), encoding="utf-8")
    assert "row 2: score '7.5' must lie in 0 to 5" in refuse(stsb, "stsb", tmp_path / "a")
    train.write_text(lines.replace("\t0.5\n", "\t\n"), encoding="utf-8")
    assert "row 2 has no label in 'score'" in refuse(stsb, "stsb", tmp_path / "b")
    (stsb / "STS-B" / "dev.tsv").unlink()
    assert "lacks dev.tsv" in refuse(stsb, "stsb", tmp_path / "c")
    assert "holds neither CoLA/ nor cola/" in refuse(stsb, "cola", tmp_path / "d")
    qqp = write_task(tmp_path / "glue", "qqp", rows=150)
    with (qqp / "QQP" / "train.tsv").open("a", encoding="utf-8") as file:
        file.write("9\t9\t9\tonly one question\n")
    make(qqp, "qqp", tmp_path / "e")
    assert list(skipped(tmp_path / "e").values()) == ["has 4 fields, not 6"]
    (qqp / "QQP" / "train.tsv").open("a").write("9\tx\n" * 5)
    assert "6 of 156 rows cannot be used; the last: row 156 has 2 fields" in refuse(
        qqp, "qqp", tmp_path / "f"
    )
