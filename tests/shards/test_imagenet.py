"""`d2v prepare imagenet`: tars of the published layout, folders of classes and parquet become the same samples."""

import io
import json

import numpy as np
import pyarrow
import pytest
from corpora import checksums, tar_of
from PIL import Image
from pyarrow import parquet
from scipy.io import savemat
from trees import all_bytes, prepare, read_shards, skipped, start_prepare, write_tree

from d2v_ds.data import Corpus, expand_shards
from shards.imagenet import DEVKIT, MD5, TRAIN, VAL
from shards.prepare import WORK

WNIDS = ("n01440764", "n01443537", "n02100735")
TRUTH = [1, 0, 2, 1, 0]
"""The class, as everyone counts, of each validation image."""
ILSVRC_ID = {0: 7, 1: 2, 2: 5}
"""Another count, that of the devkit."""


def picture(seed: int, ending: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (16 + seed % 5, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=ending)
    return file.getvalue()


TRAIN_IMAGES = {
    wnid: {f"{wnid}_{i * 37}.JPEG": picture(10 * n + i) for i in range(7)} for n, wnid in enumerate(WNIDS)
}
VAL_IMAGES = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": picture(90 + i) for i in range(5)}


def devkit(truth: bytes | None = None, meta: bytes | None = None) -> bytes:
    """meta.mat with three classes, given out of order, and a group of them; the truth by the devkit's numbers."""
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8")]
    rows = [(ILSVRC_ID[n], wnid, f"name {n}, other", 0) for n, wnid in reversed(list(enumerate(WNIDS)))]
    synsets = np.array([*rows, (1001, "n00001740", "entity", 3)], dtype=kinds)
    file = io.BytesIO()
    savemat(file, {"synsets": synsets.reshape(-1, 1)})
    if truth is None:
        truth = "".join(f"{ILSVRC_ID[n]}\n" for n in TRUTH).encode()
    folder = "ILSVRC2012_devkit_t12/data"
    files = {
        f"{folder}/meta.mat": file.getvalue() if meta is None else meta,
        f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth,
    }
    return tar_of(files, "w:gz")


@pytest.fixture(scope="module")
def tars() -> dict[str, bytes]:
    train = tar_of({f"{wnid}.tar": tar_of(images) for wnid, images in TRAIN_IMAGES.items()})
    return {TRAIN: train, VAL: tar_of(VAL_IMAGES), DEVKIT: devkit()}


def expected(with_val_labels: bool = True) -> dict[str, dict[str, dict[str, bytes]]]:
    train = {
        name[:-5]: {"jpg": content, "cls": b"%d" % n}
        for n, wnid in enumerate(WNIDS)
        for name, content in TRAIN_IMAGES[wnid].items()
    }
    val = {
        name[:-5]: {"jpg": content, **({"cls": b"%d" % n} if with_val_labels else {})}
        for (name, content), n in zip(VAL_IMAGES.items(), TRUTH, strict=True)
    }
    return {"train": train, "val": val}


def write_tars(tmp_path, tars):
    source = write_tree(tmp_path / "src", tars)
    return source, write_tree(tmp_path, {"sums": checksums(tars)}) / "sums"


def made(out) -> dict[str, dict[str, dict[str, bytes]]]:
    return {split: read_shards(out, f"imagenet-{split}-*.tar") for split in ("train", "val")}


def test_the_tars_of_image_net_become_shards_with_the_labels_of_the_devkit(tars, tmp_path):
    """Original bytes, and each class in its place."""
    source, sums = write_tars(tmp_path, tars)
    status, said = prepare(
        "imagenet", source, "--out", tmp_path / "out", "--checksums", sums, "--shard-mib", 0.01
    )
    assert status == 0, said
    assert made(tmp_path / "out") == expected()
    assert json.loads((tmp_path / "out/classes.json").read_text()) == list(WNIDS)
    assert json.loads((tmp_path / "out/class_names.json").read_text()) == [
        f"name {n}, other" for n in range(3)
    ]
    corpus = Corpus.open(expand_shards(f"{tmp_path}/out/*train*.tar"), {"image": "jpg;png"})
    assert len(corpus) == 21 and Image.open(io.BytesIO(corpus.read(3)["image"])).size[0] == 24
    origin = json.loads((tmp_path / "out/manifest.json").read_text())["origin"]
    assert [row["file"] for row in origin] == [TRAIN, VAL, DEVKIT]


def test_without_the_devkit_validation_images_have_no_labels_and_that_is_said(tars, tmp_path):
    source, sums = write_tars(tmp_path, {TRAIN: tars[TRAIN], VAL: tars[VAL]})
    status, said = prepare("imagenet", source, "--out", tmp_path / "out", "--checksums", sums)
    assert status == 0 and "validation images have no labels" in said, said
    assert made(tmp_path / "out") == expected(with_val_labels=False)


def test_a_devkit_that_is_damaged_or_of_other_tars_is_named(tars, tmp_path):
    """So is a number of an image that no label has: 0 took the last one's."""
    less = tar_of({f"{wnid}.tar": tar_of(TRAIN_IMAGES[wnid]) for wnid in WNIDS[:2]})
    for number, (files, words) in enumerate(
        [
            ({DEVKIT: devkit(meta=b"no matrix")}, "meta.mat or"),
            ({DEVKIT: devkit(b"7\nx\n")}, "is damaged: invalid literal"),
            ({DEVKIT: devkit(b"")}, "ground_truth.txt is empty"),
            ({DEVKIT: devkit(b"7\n99\n")}, f"1 classes that {TRAIN} lacks: number 99"),
            ({TRAIN: less}, f"1 classes that {TRAIN} lacks: n02100735"),
            ({VAL: tar_of({"ILSVRC2012_val_00000000.JPEG": b"x"})}, "labels, from number 1"),
        ]
    ):
        source, sums = write_tars(tmp_path / str(number), tars | files)
        status, said = prepare("imagenet", source, "--out", tmp_path / "out", "--checksums", sums)
        assert status == 2 and words in said, said


def test_members_of_the_tars_that_are_no_images_are_listed(tars, tmp_path):
    """Tars may also begin with a folder, as those that were packed again do."""
    inner = {f"train/{w}.tar": tar_of(images | {"README.txt": b"x"}) for w, images in TRAIN_IMAGES.items()}
    files = tars | {TRAIN: tar_of(inner), VAL: tar_of(VAL_IMAGES | {"notes.JPEG": b"x"})}
    source, sums = write_tars(tmp_path, files)
    status, said = prepare("imagenet", source, "--out", tmp_path / "out", "--checksums", sums)
    assert status == 0 and made(tmp_path / "out") == expected(), said
    assert skipped(tmp_path / "out") == {
        "README.txt": ".txt is no image of ImageNet's tars",
        "notes.JPEG": "has no number in its name, as images of ImageNet have",
    }
    assert json.loads((tmp_path / "out/classes.json").read_text()) == list(WNIDS)


def test_tars_with_another_md5_are_refused(tars, tmp_path):
    """The published ones are built in."""
    source, _ = write_tars(tmp_path, tars)
    status, said = prepare("imagenet", source, "--out", tmp_path / "out")
    assert status == 2 and MD5[TRAIN] in said


@pytest.mark.parametrize("at", ["outer", "inner"])
def test_a_damaged_tar_is_refused_and_loses_nothing_in_silence(tars, tmp_path, at):
    """A wrong bit in a header reads as the end of the archive."""
    damaged = bytearray(tars[TRAIN])
    second = damaged.index(b"n01443537.tar") if at == "outer" else damaged.index(b"n01443537_111.JPEG")
    damaged[second + 150] ^= 1
    source, sums = write_tars(tmp_path, {TRAIN: bytes(damaged)})
    status, said = prepare("imagenet", source, "--out", tmp_path / "out", "--checksums", sums)
    assert status == 2 and "damaged or truncated at byte" in said, said


def test_folders_of_classes_are_taken(tmp_path):
    """An empty image is left out and listed; files of other kinds too."""
    files = {f"train/{wnid}/{name}": c for wnid in WNIDS for name, c in TRAIN_IMAGES[wnid].items()}
    files |= {f"val/{WNIDS[n]}/{name}": c for n, (name, c) in zip(TRUTH, VAL_IMAGES.items(), strict=True)}
    source = write_tree(
        tmp_path / "src", files | {f"train/{WNIDS[0]}/x.JPEG": b"", f"train/{WNIDS[0]}/a.csv": b"1"}
    )
    status, said = prepare("imagenet", source, "--out", tmp_path / "out")
    assert status == 0, said
    assert made(tmp_path / "out") == expected()
    assert sorted(skipped(tmp_path / "out").values()) == [".csv is no image of ImageNet", "is empty"]
    other = write_tree(
        tmp_path / "other", {f"train/{name}/0.jpg": name for name in ("cat", "dog")} | {"train/1.jpg": "x"}
    )
    hidden, empty = other / "train/.ipynb_checkpoints", other / "train/eel"
    hidden.mkdir()
    empty.mkdir()
    status, said = prepare("imagenet", other, "--out", tmp_path / "three")
    assert status == 0 and set(read_shards(tmp_path / "three")) == {"cat/0", "dog/0"}, said
    assert json.loads((tmp_path / "three/classes.json").read_text()) == ["cat", "dog", "eel"]
    assert f"1 classes have no file in {other / 'train'}: eel" in said
    assert skipped(tmp_path / "three") == {
        str(hidden): "is hidden",
        str(other / "train/1.jpg"): "lies in no folder of a class",
    }
    (source / "val/n09999999").mkdir()
    status, said = prepare("imagenet", source, "--out", tmp_path / "two")
    assert status == 2 and "classes that train/ lacks: n09999999" in said


def write_tables(folder):
    """As Hugging Face's `datasets` writes them: two files for train, class names in the schema, test without labels."""
    rows = [
        {"image": {"bytes": content, "path": name}, "label": n}
        for n, wnid in enumerate(WNIDS)
        for name, content in TRAIN_IMAGES[wnid].items()
    ]
    val = [
        {"image": {"bytes": content, "path": name}, "label": n}
        for n, (name, content) in zip(TRUTH, VAL_IMAGES.items(), strict=True)
    ]
    unknown = [{"image": {"bytes": picture(200 + i, "PNG"), "path": None}, "label": -1} for i in range(2)]
    unknown.append({"image": {"bytes": b"no image", "path": "a.JPEG"}, "label": -1})
    features = {
        "info": {"features": {"label": {"names": ["tench", "goldfish", "poodle"], "_type": "ClassLabel"}}}
    }
    folder.mkdir(parents=True)
    for name, part in (
        ("train-00000-of-00002", rows[:9]),
        ("train-00001-of-00002", rows[9:]),
        ("validation-00000-of-00001", val),
        ("test-00000-of-00001", unknown),
    ):
        table = pyarrow.Table.from_pylist(part)
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        parquet.write_table(table, folder / f"{name}.parquet", row_group_size=4)


def test_parquet_files_of_hugging_face_are_taken(tmp_path):
    write_tables(tmp_path / "src/data")
    status, said = prepare("imagenet", tmp_path / "src", "--out", tmp_path / "out", "--workers", 2)
    assert status == 0, said
    assert made(tmp_path / "out") == expected()
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["tench", "goldfish", "poodle"]
    test = read_shards(tmp_path / "out", "imagenet-test-*.tar")
    assert test == {f"test-00000-of-00001-{i:06d}": {"png": picture(200 + i, "PNG")} for i in range(2)}
    assert list(skipped(tmp_path / "out").values()) == ["is empty, or neither JPEG, PNG nor WebP"]


def test_a_damaged_parquet_file_is_refused(tmp_path):
    """Cut, or overwritten in its pages, or in its footer."""
    write_tables(tmp_path / "src")
    path = tmp_path / "src/train-00000-of-00002.parquet"
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    broken = whole[:footer] + b"\xff" * 20 + whole[footer + 20 :]
    for content in (whole[:-100], whole[:40] + bytes(500) + whole[540:], broken):
        path.write_bytes(content)
        status, said = prepare("imagenet", tmp_path / "src", "--out", tmp_path / "out")
        assert status == 2 and f"{path} is damaged or no parquet file" in said, said


def write_rows(path, rows: list[dict], names: object = None):
    """A parquet file, with class names in its schema as `datasets` writes them, if they are given."""
    table = pyarrow.Table.from_pylist(rows)
    if names is not None:
        features = {"info": {"features": {"label": {"names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)


def row(label: object, seed: int = 0, path: str | None = None) -> dict:
    return {"image": {"bytes": picture(seed), "path": path}, "label": label}


def test_parquet_with_columns_that_hold_something_else_is_refused(tmp_path):
    for number, (rows, words) in enumerate(
        [
            ([row("cat")], "label holds 'cat', which is no whole number"),
            ([row(0.5)], "label holds '0.5'"),
            ([row(True)], "label holds 'True'"),
            ([row(0) | {"image": b"x"}], "image holds bytes, not bytes and path"),
            ([row(0), row(2)], "label holds 2, but it names 2 classes"),
        ]
    ):
        write_rows(tmp_path / str(number) / "train-0.parquet", rows, ["a", "b"])
        status, said = prepare("imagenet", tmp_path / str(number), "--out", tmp_path / "out")
        assert status == 2 and words in said, said


def test_class_names_are_those_of_any_file_and_rows_of_one_name_are_kept(tmp_path):
    """The test file comes first; schemas of another form name nothing."""
    write_rows(tmp_path / "src/test-0.parquet", [row(-1)], 5)
    write_rows(tmp_path / "src/train-0.parquet", [row(0, 1, "0.jpg"), row(1, 2, "0.jpg")], ["a", "b"])
    status, said = prepare("imagenet", tmp_path / "src", "--out", tmp_path / "out")
    assert status == 0 and json.loads((tmp_path / "out/classes.json").read_text()) == ["a", "b"], said
    train = read_shards(tmp_path / "out", "*train*.tar")
    assert train == {f"train-0-00000{i}": {"jpg": picture(i + 1), "cls": b"%d" % i} for i in range(2)}
    write_rows(tmp_path / "src/validation-0.parquet", [row(0)], ["b", "a"])
    status, said = prepare("imagenet", tmp_path / "src", "--out", tmp_path / "two")
    assert status == 2 and "name their classes differently" in said


@pytest.mark.slow
def test_killed_while_it_unpacks_parquet_and_packs_the_same_command_goes_on(tmp_path):
    """kill -9 when the first unpacked rows are there, and again when the first shard is."""
    write_tables(tmp_path / "src")
    settings = ("--workers", 2, "--shard-mib", 0.004)
    assert prepare("imagenet", tmp_path / "src", "--out", tmp_path / "whole", *settings)[0] == 0
    out = tmp_path / "out"
    for pattern in ((out / WORK / "unpacked", "*.rows*"), (out, "*.tar*")):
        running = start_prepare("imagenet", tmp_path / "src", "--out", out, *settings)
        while not list(pattern[0].glob(pattern[1])) and running.poll() is None:
            pass
        running.kill()
        running.communicate()
    assert prepare("imagenet", tmp_path / "src", "--out", out, *settings)[0] == 0
    assert all_bytes(out) == all_bytes(tmp_path / "whole")


def test_a_folder_without_imagenet_says_where_it_is_given(tmp_path):
    status, said = prepare("imagenet", tmp_path, "--out", tmp_path / "out")
    assert status == 2 and "given after registration" in said
