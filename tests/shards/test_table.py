"""`d2v prepare table`: own labelled texts of four kinds of file, classes and numbers; bad labels are errors."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from glue_files import contents
from trees import prepare, read_shards, skipped

ROWS = [
    {"text": f'a "quoted, text {i}', "text_b": f"b {i}\u0085", "label": ["yes", "no", "maybe"][i % 3]}
    for i in range(9)
]
CLASSES = ["maybe", "no", "yes"]
EXPECTED = [row | {"label": CLASSES.index(row["label"])} for row in ROWS]


def make(table: Path, out: Path, *more: object) -> list[dict]:
    status, said = prepare("table", table, "--out", out, "--workers", 1, *more)
    assert status == 0, said
    return contents(read_shards(out, "*-train-0*.tar"))


def refuse(table: Path, *more: object) -> str:
    status, said = prepare("table", table, "--out", table.parent / "refused", "--workers", 1, *more)
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        quote = (lambda t: '"' + str(t).replace('"', '""') + '"') if separator == "," else str
        lines = [list(rows[0]), *(list(row.values()) for row in rows)]
        path.write_text(
            "".join(separator.join(map(quote, line)) + "\r\n" for line in lines), encoding="utf-8"
        )
    return path


def test_every_kind_of_table_gives_the_same_samples(tmp_path):
    for kind in ("tsv", "csv", "jsonl", "parquet"):
        out = tmp_path / kind
        found = make(write(tmp_path / f"mine.{kind}", ROWS), out)
        assert [s | {"text_b": s["text_b"].strip()} for s in EXPECTED] == found
        assert json.loads((out / "classes.json").read_text()) == CLASSES
        assert [path.name for path in out.glob("*.tar")] == ["texts-train-000000.tar"]


def test_a_text_of_a_csv_may_be_longer_than_its_reader_takes_by_default(tmp_path):
    table = tmp_path / "mine.csv"
    table.write_text("text,label\n" + "x" * 200_000 + ",1\nshort,0\n")
    assert sorted(len(row["text"]) for row in make(table, tmp_path / "out")) == [5, 200_000]


def test_columns_classes_and_splits_are_as_they_are_named(tmp_path):
    rows = [{"stars": r["label"], "review": r["text"]} for r in ROWS]
    train, dev = write(tmp_path / "t.tsv", rows), write(tmp_path / "d.jsonl", rows[:4])
    named = ("--text-column", "review", "--label-column", "stars", "--classes", "no", "maybe", "yes")
    found = make(train, tmp_path / "out", *named, "--val-file", dev)
    assert found == [{"text": r["review"], "label": ["no", "maybe", "yes"].index(r["stars"])} for r in rows]
    assert contents(read_shards(tmp_path / "out", "*-val-0*.tar")) == found[:4]
    bare = tmp_path / "bare.tsv"
    bare.write_text("".join(f"{i % 2}\tx\ttext {i}\n" for i in range(40)), encoding="utf-8")
    found = make(bare, tmp_path / "bare", "--columns", "label", "other", "text", "--val", 0.3)
    held = contents(read_shards(tmp_path / "bare", "*-val-0*.tar"))
    assert 3 < len(held) < 25 and len(found) + len(held) == 40
    assert {s["label"] for s in found} == {0, 1} and not (tmp_path / "bare" / "classes.json").exists()


def test_numbers_are_kept_for_regression(tmp_path):
    rows = [{"text": f"t{i}", "label": i / 3 - 1} for i in range(6)]
    assert make(write(tmp_path / "n.parquet", rows), tmp_path / "n", "--regression") == rows
    found = make(write(tmp_path / "n.tsv", rows), tmp_path / "m", "--regression")
    assert [s["label"] for s in found] == [r["label"] for r in rows]
    assert "is no class; --regression takes numbers" in refuse(tmp_path / "n.parquet")
    for text in ("nan", "1_0"):
        rows[3]["label"] = text
        said = refuse(write(tmp_path / "b.tsv", rows), "--regression")
        assert f"row 4: label '{text}' is no number" in said


def test_what_does_not_fit_is_refused_in_one_line(tmp_path):
    table = write(tmp_path / "a.tsv", ROWS)
    said = refuse(table, "--label-column", "klass")
    assert "has no column 'klass'; its first line says 'text', 'text_b', 'label'" in said
    bad = [dict(row) for row in ROWS]
    bad[4]["label"] = ""
    assert "row 5 has no label in 'label'" in refuse(write(tmp_path / "b.tsv", bad))
    bad[4]["label"] = None
    assert "row 5 has no label in 'label'" in refuse(write(tmp_path / "b.jsonl", bad))
    dev = write(tmp_path / "dev.tsv", [ROWS[0] | {"label": "perhaps"}])
    assert "label 'perhaps' is none of the 3 classes of the train part: maybe, no, yes" in refuse(
        table, "--val-file", dev
    )
    bad[4]["label"] = " "
    assert "row 5 has no label in 'label'" in refuse(write(tmp_path / "b.tsv", bad))
    assert "has one class alone in 'label' (yes)" in refuse(write(tmp_path / "c.tsv", ROWS[:1]))
    bare = [row | {"label": ""} for row in ROWS]
    assert "b.tsv has no row with a label in 'label'; label them" in refuse(write(tmp_path / "b.tsv", bare))
    assert "contradict each other" in refuse(table, "--val", 0.1, "--val-file", table)
    assert "has 3 columns, but 2 names" in refuse(table, "--columns", "text", "label")
    assert "is not there" in refuse(tmp_path / "none.tsv")
    (tmp_path / "head.tsv").write_text("text\ttext_b\tlabel\n")
    assert "holds no row, its header alone" in refuse(table, "--val-file", tmp_path / "head.tsv")
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    assert "is damaged or no parquet file" in refuse(tmp_path / "x.parquet")
    for text, message in (
        ("[" * 100_000, "line 2 is no JSON (maximum recursion"),
        ('{"text": "\\ud800", "label": 1}', "line 2 has half of a pair of surrogates"),
        ('{"text": "b", "label": %s}' % ("1" * 5000), "line 2 is no JSON (Exceeds the limit"),
        ('{"text": "b", "label": 20000000}', "has the class 20000000 in 'label'"),
    ):
        (tmp_path / "d.jsonl").write_text('{"text": "a", "label": 0}\n' + text + "\n")
        assert message in refuse(tmp_path / "d.jsonl")
    (tmp_path / "d.jsonl").write_text('{"text": "a", "label": 1%s}\n' % ("0" * 400))
    assert "is no number, which regression needs" in refuse(tmp_path / "d.jsonl", "--regression")
    many = [{"text": "x" if i else " ", "label": i % 2} for i in range(150)]
    make(write(tmp_path / "m.jsonl", many), tmp_path / "many")
    assert list(skipped(tmp_path / "many").values()) == ["has no text in 'text'"]


def test_names_that_are_numbers_are_kept_where_they_are_not_those_of_the_classes(tmp_path):
    rows = [{"text": f"t{i}", "label": f"0{i + 1}"} for i in range(3)]
    table, stars = write(tmp_path / "stars.tsv", rows), tmp_path / "stars"
    assert [s["label"] for s in make(table, tmp_path / "plain")] == [1, 2, 3]
    assert not (tmp_path / "plain" / "classes.json").exists()
    assert [s["label"] for s in make(table, stars, "--classes", "3", "2", "1")] == [2, 1, 0]
    assert json.loads((stars / "classes.json").read_text()) == ["3", "2", "1"]
    assert "--classes names 1 twice" in refuse(table, "--classes", "1", "2", "1")
    rows[0]["label"] = "1000000000"
    said = refuse(write(tmp_path / "ids.tsv", rows))
    assert "has the class 1000000000 in 'label', and classes count from 0 to at most 9999" in said


def test_lines_of_json_that_lose_something_are_refused(tmp_path):
    table, one = tmp_path / "t.jsonl", '{"text": "a", "label": 1}\n'
    for line, said in (
        ('{"text": "a", "text_b": "b", "label": 0}', "row 2 has a 'text_b', which the first row has not"),
        ('{"text": "\\ud800", "label": 0}', "line 2 has half of a pair of surrogates"),
        ("[" * 100_000, "line 2 is no JSON (maximum recursion"),
    ):
        table.write_text(one + line)
        assert said in refuse(table)
