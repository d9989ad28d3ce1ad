"""A tar is indexed whole or refused with its fault named."""

import gzip
import io
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from tars import write_tar

from d2v_ds.data import build_index
from d2v_ds.data.scan import crc32_of

Writer = Callable[..., list[Path]]


def content_end(path: Path) -> int:
    return int(build_index(path).offsets()[-1])


def test_checksums_are_zlibs() -> None:
    content = bytes(range(256)) * 41
    assert all(crc32_of(content[:n]) == zlib.crc32(content[:n]) for n in (0, 1, 15, 16, 4_099, len(content)))
    assert crc32_of(content, crc32_of(b"before")) == zlib.crc32(b"before" + content)


def test_truncation_at_any_byte_is_an_error(write_shards: Writer) -> None:
    """Every block boundary and the bytes around it, up to the second zero block."""
    path = write_shards(shards=1, samples=5)[0]
    whole, end = path.read_bytes(), content_end(path)
    cuts = {cut + near for cut in range(0, end + 1024, 512) for near in (-1, 0, 1, 200)}
    for cut in sorted(cut for cut in cuts if 0 <= cut < end + 1024):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=f"truncated at byte {cut} "):
            build_index(path)


def test_truncation_of_padding_after_the_end_loses_nothing(write_shards: Writer) -> None:
    path = write_shards(shards=1, samples=5)[0]
    end = content_end(path)
    path.write_bytes(path.read_bytes()[: end + 1024])
    assert build_index(path).num_samples == 5


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_truncation_inside_a_long_name_is_an_error(tmp_path: Path, tar_format: int) -> None:
    members = [(f"{'long' * 40}{i}.txt", b"x" * 600) for i in range(3)]
    path = write_tar(tmp_path / "a.tar", members, tar_format)
    whole, end = path.read_bytes(), content_end(path)
    for cut in range(0, end + 1024, 256):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="truncated"):
            build_index(path)


def test_truncation_names_the_last_sample(write_shards: Writer) -> None:
    path = write_shards(shards=1, samples=5)[0]
    offset = int(build_index(path).offsets()[3])
    path.write_bytes(path.read_bytes()[:offset])
    with pytest.raises(ValueError, match=r"after sample 'part/0-00002' \(3 read\)"):
        build_index(path)


@pytest.mark.parametrize(
    ("fill", "message"), [(b"\0" * 512, "goes on after"), (b"\xff" * 512, "corrupt header")]
)
def test_a_bad_header_in_the_middle_is_an_error(write_shards: Writer, fill: bytes, message: str) -> None:
    """tarfile takes both for the end of the archive and drops the rest in silence."""
    path = write_shards(shards=1, samples=5)[0]
    offset = int(build_index(path).offsets()[2])
    whole = path.read_bytes()
    path.write_bytes(whole[:offset] + fill + whole[offset + 512 :])
    with pytest.raises(ValueError, match=f"{message}.* at byte {offset} after sample 'part/0-00001'"):
        build_index(path)


def test_one_bit_wrong_in_a_header_is_an_error(write_shards: Writer) -> None:
    path = write_shards(shards=1, samples=5)[0]
    offset = int(build_index(path).offsets()[2])
    whole = bytearray(path.read_bytes())
    whole[offset + 3] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=f"corrupt header at byte {offset}"):
        build_index(path)


def test_a_last_member_with_a_pax_size_below_zero_is_an_error(tmp_path: Path) -> None:
    """tarfile takes it for the end of the archive, after the member, and drops that in silence."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
        last = tarfile.TarInfo("b.txt")
        last.pax_headers, last.size = {"size": "-5"}, 5
        tar.addfile(last, io.BytesIO(b"lost?"))
    with pytest.raises(ValueError, match="a size below zero in the header"):
        build_index(tmp_path / "a.tar")


@pytest.mark.parametrize("garbage", [b"garbage", b"\0" * 700 + b"x"])
def test_bytes_after_the_end_are_an_error(write_shards: Writer, garbage: bytes) -> None:
    path = write_shards(shards=1, samples=2)[0]
    path.write_bytes(path.read_bytes() + garbage)
    with pytest.raises(ValueError, match="goes on after its end-of-archive"):
        build_index(path)


def test_two_tars_joined_are_an_error(write_shards: Writer) -> None:
    first, second = write_shards(shards=2, samples=2)
    first.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(ValueError, match="cannot be joined by cat"):
        build_index(first)


def test_a_tar_without_samples_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "empty.tar", [])
    names = ["README", ".hidden.jpg", "__meta__/a.json"]
    write_tar(tmp_path / "names.tar", [(name, b"x") for name in names])
    (tmp_path / "zero.tar").write_bytes(b"")
    for name, message in [
        ("empty", "or leave it out"),
        ("names", "no sample"),
        ("zero", "truncated at byte 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            build_index(tmp_path / f"{name}.tar")


def test_a_compressed_tar_is_an_error(write_shards: Writer) -> None:
    path = write_shards(shards=1)[0]
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match="compressed .gzip.*decompress"):
        build_index(path)


def test_a_file_that_is_no_tar_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 1000)
    with pytest.raises(ValueError, match="before any sample"):
        build_index(tmp_path / "a.tar")


def test_a_list_of_shards_is_told_from_a_truncated_one(tmp_path: Path) -> None:
    """As WeNet's `data.list`."""
    (tmp_path / "data.list").write_text("shards/a.tar\nshards/b.tar\n")
    with pytest.raises(ValueError, match="data.list lists shards and is none; .* joined by ::"):
        build_index(tmp_path / "data.list")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.txt", "b.txt", "a.txt"], "key 'a' comes a second time"),
        (["a.txt", "b.txt", "a.cls"], "key 'a' comes a second time"),
        (["a.txt", "a.txt"], "'a' has two members .txt"),
        (["a.txt", "a.TXT"], "'a' has two members .txt"),
    ],
)
def test_duplicates_are_an_error(tmp_path: Path, names: list[str], message: str) -> None:
    path = write_tar(tmp_path / "a.tar", [(name, b"x") for name in names])
    with pytest.raises(ValueError, match=message):
        build_index(path)


def test_links_are_an_error(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
        link = tarfile.TarInfo("b.txt")
        link.type, link.linkname = tarfile.LNKTYPE, "a.txt"
        tar.addfile(link)
    with pytest.raises(ValueError, match="'b.txt' is a link"):
        build_index(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", [b"Z", b"M"])
def test_a_member_with_bytes_that_is_no_plain_file_is_an_error(tmp_path: Path, kind: bytes) -> None:
    """Of a type that nobody knows, and a file's second part on another volume: readers pass over both in silence."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, type_ in (("0.txt", tarfile.REGTYPE), ("1.txt", kind), ("2.txt", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.size, info.type = 3, type_
            tar.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(ValueError, match=f"member '1.txt' at byte 1024 is of type '{kind.decode()}'"):
        build_index(path)


def test_failed_index_leaves_no_files(write_shards: Writer) -> None:
    path = write_shards(shards=1)[0]
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError):
        build_index(path)
    assert list(path.parent.iterdir()) == [path]
