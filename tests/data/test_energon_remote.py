"""What `.nv-meta/split.yaml` excludes is excluded at a URL too, whatever the server does."""

import json
from pathlib import Path

import pytest
from bad_server import Site, serve
from layouts import energon

from d2v_ds.cli import main
from d2v_ds.data import Corpus, expand_shards, folders
from d2v_ds.data import remote as remotes
from d2v_ds.data.index import ensure_index
from d2v_ds.data.remote import Remote, RemoteError, reading
from d2v_ds.modalities.source import shard_pattern

SPLIT = ".nv-meta/split.yaml"
EVERY = "all/my%20set/shards/shard_{000..003}.tar"


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remotes, "FIRST_WAIT", 0.02)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return energon(tmp_path / "all" / "my set", shards=4)


@pytest.fixture
def site(root: Path) -> Site:
    return Site({}, respond=lambda path, _: answer(root.parents[1], path))


def answer(top: Path, path: str) -> bytes | None:
    file = top / path.replace("%20", " ")
    return file.read_bytes() if file.is_file() else None


def exclude(root: Path, *entries: str) -> None:
    file = root / SPLIT
    first, rest = file.read_text().split("\n", 1)
    assert first.startswith("exclude:")
    file.write_text(f"exclude: {json.dumps(entries)}\n{rest}")


def keys(data: str, cache: Path, shards: str = "*.tar", **settings) -> list[str]:
    with reading(Remote(cache=str(cache), **{"retry_minutes": 0.01, **settings})):
        paths = expand_shards(shard_pattern(data, shards))
        corpus = Corpus.open(paths, {"field": "jpg"}, workers=1, progress=None)
    assert all(corpus.read(i)["field"] for i in range(len(corpus)))
    return [corpus.key(i) for i in range(len(corpus))]


def named(shard: int, *left: int) -> list[str]:
    return [f"shard_{shard:03d}.tar:{100 * shard + i:06d}" for i in left]


def test_the_folder_is_its_part_train_and_shards_by_name_are_without_what_is_excluded(
    root, site, tmp_path, caplog
):
    """As local ones; a folder needs no listing; each file is asked for once a minute."""
    exclude(root, "shards/shard_000.tar/00000{1,4}", "shards/shard_001.tar")
    train = named(0, 0, 2, 3, 5) + named(2, *range(6))
    with serve(site) as url:
        assert keys(f"{url}/all/my%20set", tmp_path / "cache") == train == keys(str(root), tmp_path)
        assert keys(f"{url}/{EVERY}", tmp_path / "cache") == train + named(3, *range(6))
        assert "excluded by .nv-meta/split.yaml" in caplog.text
        assert sorted(path for path in site.asked if path.endswith(SPLIT)) == [
            SPLIT,
            f"all/{SPLIT}",
            f"all/my%20set/{SPLIT}",
            f"all/my%20set/shards/{SPLIT}",
        ]


def test_a_list_that_changes_is_noticed_and_one_that_is_away_is_what_it_was(
    root, site, tmp_path, caplog, monkeypatch
):
    exclude(root, "shards/shard_000.tar/000001")
    with serve(site) as url:
        data = f"{url}/all/my%20set/shards/shard_000.tar"
        assert keys(data, tmp_path / "cache") == named(0, 0, 2, 3, 4, 5)
        exclude(root, "shards/shard_000.tar/000002")
        assert keys(data, tmp_path / "cache") == named(0, 0, 2, 3, 4, 5)
        monkeypatch.setattr(folders, "SECONDS_FRESH", 0)
        assert keys(data, tmp_path / "cache") == named(0, 0, 1, 3, 4, 5)
        exclude(root)
        site.is_away = True
        caplog.clear()
        assert keys(data, tmp_path / "cache") == named(0, 0, 1, 3, 4, 5)
        assert f"{SPLIT} said last is taken" in caplog.text
        site.is_away = False
        assert keys(data, tmp_path / "cache") == named(0, *range(6))


def test_a_server_that_never_said_what_is_excluded_is_an_error(root, site, tmp_path):
    exclude(root, "shards/shard_000.tar/000001")
    with serve(site) as url:
        data, cache = f"{url}/all/my%20set/shards/shard_000.tar", tmp_path / "cache"
        with reading(Remote(cache=str(cache))):
            ensure_index(expand_shards(data), workers=1, progress=None)
        site.is_away = True
        with pytest.raises(RemoteError, match=f"{SPLIT} cannot be read, tried for"):
            keys(data, cache, retry_minutes=0.002)


def test_which_rows_are_excluded_is_known_without_fetching_the_tar_again(root, site, tmp_path):
    exclude(root, "shards/shard_000.tar/000001")
    with serve(site) as url:
        data = f"{url}/all/my%20set/shards/shard_00{{0,1}}.tar"
        keys(data, tmp_path / "cache")
        for tar in (tmp_path / "cache").glob("*/*.tar"):
            tar.unlink()
        site.asked.clear()
        with reading(Remote(cache=str(tmp_path / "cache"))):
            corpus = Corpus.open(expand_shards(data), {"field": "jpg"}, workers=1, progress=None)
        assert len(corpus) == 11 and not site.asked


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("shards/shard_000.tar/000001.jpg", "'000001.jpg' for one; its first is '000000'"),
        ("shard_000.tar/000001", "excludes 'shard_000.tar', or .* as 'shards/shard_000.tar'"),
        ("000001", "excludes '000001', which is neither a shard"),
    ],
)
def test_a_list_that_is_not_understood_names_the_url(entry, message, root, site, tmp_path):
    exclude(root, entry)
    with serve(site) as url:
        with pytest.raises(ValueError, match=message) as error:
            keys(f"{url}/all/my%20set/shards/shard_000.tar", tmp_path / "cache")
        assert f"{url}/all/my%20set/{SPLIT}" in str(error.value)


@pytest.mark.parametrize("content", ["exclude: [unclosed\nsplit_parts: {", "- a list"])
def test_a_split_that_cannot_be_read_is_an_error(content, root, site, tmp_path):
    (root / SPLIT).write_text(content)
    with serve(site) as url, pytest.raises(ValueError, match="so what it excludes is not known"):
        keys(f"{url}/all/my%20set", tmp_path / "cache")


def test_a_page_that_says_there_is_nothing_is_no_list(root, site, tmp_path):
    """Some servers answer 200 to everything; a script that gives tars has no folder."""
    tars = {
        path: root.joinpath("shards/shard_000.tar").read_bytes() for path in ("a/b.tar", "get?name=c.tar")
    }
    site.respond = lambda path, _: tars.get(path, b"\n<!DOCTYPE html><title>404</title>")
    with serve(site) as url:
        assert len(keys(f"{url}/a/b.tar", tmp_path / "cache")) == 6
        site.asked.clear()
        assert len(keys(f"{url}/get?name=c.tar", tmp_path / "cache", shards="x")) == 6
        assert not [path for path in site.asked if "nv-meta" in path]


def test_verify_compares_with_counts_above_the_shards(root, site, tmp_path, capsys):
    file = root / ".nv-meta/.info.yaml"
    file.write_text(file.read_text().replace("001.tar: 6", "001.tar: 5"))
    with serve(site) as url:
        assert main(["verify", f"{url}/{EVERY}", "--cache", str(tmp_path / "cache")]) == 1
    assert "it has 6 samples, .nv-meta/.info.yaml says 5" in capsys.readouterr().out


def test_above_a_repository_or_a_bucket_nothing_is_looked_for():
    def above(url: str) -> list[str]:
        return list(map(str, folders.RemoteFolder(url, Remote()).with_parents()))

    assert above("hf://datasets/owner/name@main/a") == [
        "hf://datasets/owner/name@main/a",
        "hf://datasets/owner/name@main",
    ]
    assert above("hf://owner/name") == ["hf://owner/name"]
    assert above("s3://bucket/a/b") == ["s3://bucket/a/b", "s3://bucket/a", "s3://bucket"]
    assert above("https://host:8000/a")[-1] == "https://host:8000"
