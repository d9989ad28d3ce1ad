"""A file of torch.save is read to the bit, or refused with a ValueError: damaged, foreign and lying ones."""

from __future__ import annotations

import pickle
import random
import time
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import pretrained
from torch_files import FORMATS, equal, save, write_legacy, write_zip

from d2v_ds.convert.load import read
from d2v_ds.convert.unpickle import read_torch_file

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.uint16, torch.float8_e4m3fn,
]  # fmt: skip


def checkpoint() -> dict:
    """As fairseq nests it, small."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(7, 5, generator=generator)
    return {
        "args": None,
        "cfg": {"model": {"_name": "data2vec_multi", "depth": 2, "tau": 0.999, "names": ["a", "b"]}},
        "model": {
            "blocks.0.weight": weights.half(),
            "blocks.0.bias": torch.randn(11, generator=generator)[4:],
            "_ema": {"0.weight": weights, "0.bias": torch.arange(3)},
        },
        "extra_state": {"seconds": 1.5, "ids": (1, 2**40, -3), "raw": b"\x00\xff"},
    }


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_torch_file(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text
    return text.removeprefix(str(path))


# ---- whole files ----


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("format", FORMATS)
def test_a_checkpoint_is_read_to_the_bit(format, protocol, tmp_path):
    """Of every protocol that torch.save can write."""
    path = save(tmp_path / "a.pt", checkpoint(), format, protocol)
    assert equal(read_torch_file(path), checkpoint())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_every_dtype_and_layout_is_read(format, dtype, tmp_path):
    """Whole, transposed, cut, a scalar and empty ones."""
    values = torch.arange(24).reshape(4, 6).to(torch.float32).to(dtype)
    tensors = [values, values.t(), values[1:3, 2:], values[2, 3], values[:0], torch.empty(0, 3).to(dtype)]
    ours = read_torch_file(save(tmp_path / "a.pt", tensors, format))
    for a, b in zip(ours, tensors, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert equal(a.contiguous(), b.contiguous())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("view", [torch.conj, lambda c: torch.imag(c.conj())])
def test_a_tensor_whose_storage_holds_other_values_is_refused(format, view, tmp_path):
    """torch keeps a conjugate or negative as a flag beside the values, which must not be forgotten."""
    tensor = view(torch.tensor([1 + 2j, 3 - 4j]))
    with pytest.raises(ValueError, match="stored with a flag"):
        read_torch_file(save(tmp_path / "a.pt", {"w": tensor}, format))


@pytest.mark.parametrize("format", FORMATS)
def test_tensors_that_share_a_storage_share_it_still(format, tmp_path):
    values = torch.zeros(10)
    ours = read_torch_file(save(tmp_path / "a.pt", {"whole": values, "part": values[4:]}, format))
    ours["part"][0] = 7
    assert ours["whole"][4] == 7


@pytest.mark.parametrize("format", FORMATS)
def test_containers_numbers_and_parameters_come_as_plain_ones(format, tmp_path):
    module = torch.nn.Linear(2, 3)
    value = {
        "state": module.state_dict(),
        "parameter": module.weight,
        "ordered": OrderedDict(b=1, a=2),
        "default": defaultdict(int, {"x": 1}),
        "set": {1, 2},
        "frozen": frozenset("ab"),
        "bytes": bytearray(b"xyz"),
        "dtype": torch.float16,
        "device": torch.device("cuda", 1),
        "size": torch.Size([2, 3]),
        "numbers": (1j, slice(1, 2), 1 << 90, -1.5, None, True),
        "numpy": (np.float32(1.5), np.int64(-3), np.bool_(True)),
    }
    ours = read_torch_file(save(tmp_path / "a.pt", value, format))
    assert equal(ours.pop("state"), dict(value.pop("state")))
    parameter = ours.pop("parameter")
    assert type(parameter) is torch.Tensor and not parameter.requires_grad
    assert equal(parameter, value.pop("parameter"))
    assert type(ours["ordered"]) is type(ours["default"]) is dict
    assert ours == value
    assert [type(number) for number in ours["numpy"]] == [float, int, bool]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_of_numpy_are_read(protocol, tmp_path):
    """Both orders, swapped bytes, empty; one that stands in two places is one."""
    arrays = [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.zeros((0, 3), "f4"),
    ]
    arrays += [np.arange(3, dtype=">i4"), np.array(True)]
    ours = read_torch_file(save(tmp_path / "a.pt", {"a": arrays, "again": arrays[0]}, "zip", protocol))
    for a, b in zip(ours["a"], arrays, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and (a == b).all()
    assert ours["again"] is ours["a"][0]


def test_a_value_that_is_no_dict_is_given_as_it_is(tmp_path):
    assert read_torch_file(save(tmp_path / "a.pt", [1, "two"])) == [1, "two"]
    assert equal(read_torch_file(save(tmp_path / "b.pt", torch.ones(2))), torch.ones(2))


# ---- damaged files ----


def damage(content: bytes, generator: random.Random, is_cut: bool) -> bytes:
    if is_cut:
        return content[: generator.randrange(len(content))]
    damaged = bytearray(content)
    for _ in range(generator.choice([1, 1, 1, 2, 8])):
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
    return bytes(damaged)


def outcomes(folder: Path, format: str, kinds: tuple[bool, ...], count: int) -> dict[str, int]:
    """How many damaged files were refused, and read rightly; anything else fails."""
    path, expected, generator = folder / "a.pt", checkpoint(), random.Random(f"{format} {kinds}")
    content = save(path, expected, format).read_bytes()
    found = {"refused": 0, "right": 0}
    for number in range(count):
        path.write_bytes(damage(content, generator, kinds[number % len(kinds)]))
        started = time.monotonic()
        try:
            ours = read_torch_file(path)
        except ValueError:
            found["refused"] += 1
        else:
            assert equal(ours, expected), f"number {number} was read, wrongly"
            found["right"] += 1
        assert time.monotonic() - started < 5
    return found


COUNTS = [150, pytest.param(1000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
def test_a_damaged_archive_is_refused_or_read_rightly(count, tmp_path):
    """Cut and with flipped bits; a flip in what means nothing leaves the tensors as they are."""
    found = outcomes(tmp_path, "zip", (True, False), count)
    assert found["right"] > 0 and found["refused"] > count / 2


@pytest.mark.parametrize("count", COUNTS)
def test_a_cut_file_of_the_old_format_is_refused(count, tmp_path):
    """It has no checksums, so of flipped bits no such thing can be said."""
    assert outcomes(tmp_path, "legacy", (True,), count) == {"refused": count, "right": 0}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cut", "flipped", "old format cut"])
@pytest.mark.parametrize("case", ["image_cb4", "v1_audio"])
def test_a_damaged_checkpoint_is_refused_or_imported_as_it_was(case, kind, tmp_path):
    """1,000 of each kind, 2.0 and v1, through the whole import: settings, tensors and updates."""
    is_cut, format = kind != "flipped", "legacy" if kind.startswith("old") else "zip"
    path = save(tmp_path / "a.pt", pretrained(case), format)
    content, expected, generator, refused = path.read_bytes(), read(path), random.Random(f"{case} {kind}"), 0
    for number in range(1000):
        path.write_bytes(damage(content, generator, is_cut))
        started = time.monotonic()
        try:
            ours = read(path)
        except ValueError:
            refused += 1
        else:
            assert equal(ours.tensors, expected.tensors), f"number {number} was read, wrongly"
            assert (ours.recipe, ours.step, ours.origin) == (expected.recipe, expected.step, expected.origin)
        assert time.monotonic() - started < 10
    assert refused == 1000 if is_cut else refused > 500


def test_flipped_bits_of_the_old_format_are_no_crash(tmp_path):
    """Each is a ValueError or some value."""
    path, generator = tmp_path / "a.pt", random.Random(5)
    content = save(path, checkpoint(), "legacy").read_bytes()
    for _ in range(300):
        path.write_bytes(damage(content, generator, False))
        try:
            read_torch_file(path)
        except ValueError as error:
            assert str(error).startswith(str(path))


def test_every_flipped_bit_of_a_storage_is_found(tmp_path):
    path = save(tmp_path / "a.pt", {"w": torch.arange(8.0)})
    content = path.read_bytes()
    start = content.index(torch.arange(8.0).numpy().tobytes())
    for bit in range(0, 32 * 8, 5):
        damaged = bytearray(content)
        damaged[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert "damaged" in refusal(path)


def test_damage_in_a_record_that_is_not_used_counts(tmp_path):
    """It may be one whose name was damaged, such as the order of bytes."""
    path = save(tmp_path / "a.pt", checkpoint())
    content = path.read_bytes()
    for word in (b"little", b"byteorder"):
        damaged = bytearray(content)
        damaged[content.rindex(word)] ^= 1
        path.write_bytes(damaged)
        assert "damaged" in refusal(path)


# ---- files that are something else ----


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>404</html>", "it is a web page"),
        (b"hello, this is a text\n" * 40, "a text, no file that torch.save wrote"),
        (b"\x93NUMPY\x01\x00", "it begins with 93 4e 55"),
        (b"\x00" * 257 + b"ustar" + b"\x00" * 250, "tar format of 2017"),
        ((40).to_bytes(8, "little") + b'{"w":{"dtype":"F32"}}', "seems to be a safetensors file"),
        (pickle.dumps({"a": 1}), "torch.save did not write it"),
        (b"PK\x03\x04 and nothing else", "its archive is damaged"),
        (b"\x80", "cannot be read"),
    ],
)
def test_another_file_is_refused_in_words(content, words, tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    assert words in refusal(path)


def test_no_file_is_an_error(tmp_path):
    assert "is no file; give a .pt file" in refusal(tmp_path / "absent.pt")
    assert "is no file; give a .pt file" in refusal(tmp_path)


def archive(path: Path, **contents: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in contents.items():
            file.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ({"archive/version": b"3"}, "holds no data.pkl"),
        ({"a/data.pkl": b"N.", "b/data.pkl": b"N."}, "holds 2 data.pkl"),
        ({"archive/data.pkl": b"N.", "../../etc/passwd": b""}, "'../../etc/passwd', which leads out of it"),
        ({"archive/data.pkl": b"N.", "/etc/passwd": b""}, "'/etc/passwd', which leads out of it"),
        ({"archive/data.pkl": b"N.", "archive/constants.pkl": b""}, "TorchScript"),
        ({"archive/data.pkl": b"N.", "archive/byteorder": b"big"}, "big-endian"),
    ],
)
def test_an_archive_of_something_else_is_refused(records, words, tmp_path):
    assert words in refusal(archive(tmp_path / "a.pt", **records))


def test_a_record_under_two_headers_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("archive/data.pkl", b"N.")
        file.writestr("archive/data.pkl", b"I1\n.")
    assert "two records of one name" in refusal(path)


# ---- files that lie about sizes ----


def test_a_compressed_record_is_refused(tmp_path):
    """A gigabyte of zeros in a megabyte is a bomb; torch.save compresses nothing."""
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 100_000 + b"N.")
    assert "is compressed" in refusal(path)


def test_records_larger_than_the_file_are_refused(tmp_path):
    path = write_zip(tmp_path / "a.pt", b"N.", d0=b"1234")
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 20 : entry + 28] = (0x7FFFFFFF).to_bytes(4, "little") * 2
    path.write_bytes(content)
    assert "records are larger than the file" in refusal(path)


def tensor_pickle(numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """Of one tensor on storage 0, as torch.save writes it."""

    def number(n: int) -> bytes:
        return pickle.dumps(n, 2)[2:-1]

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    kind, key, place = b"ctorch\nFloatStorage\n", b"X\x01\x00\x00\x000", b"X\x03\x00\x00\x00cpu"
    storage = b"(X\x07\x00\x00\x00storage" + kind + key + place + number(numel) + b"tQ"
    arguments = b"(" + storage + number(offset) + numbers(size) + numbers(stride) + b"\x89}t"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R."


def test_the_hand_made_tensor_is_one(tmp_path):
    """So the tests below fail for what they change."""
    values = torch.arange(12.0)
    path = write_zip(tmp_path / "a.pt", tensor_pickle(12, 1, (2, 3), (4, 1)), d0=values.numpy().tobytes())
    assert equal(read_torch_file(path), values.as_strided((2, 3), (4, 1), 1))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (7, (2, 3), (4, 1)),
        (0, (13,), (1,)),
        (0, (2,), (12,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (-2,), (1,)),
        (0, (1 << 40,), (0,)),
        (0, (2, 3), (1,)),
        (1 << 70, (1,), (1,)),
        (13, (0,), (1,)),
        (0, (1 << 61, 1 << 61), (0, 0)),
        (0, (1,) * 65, (1,) * 65),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(offset, size, stride, tmp_path):
    path = write_zip(tmp_path / "a.pt", tensor_pickle(12, offset, size, stride), d0=bytes(48))
    assert "a tensor of size" in refusal(path)


@pytest.mark.parametrize("numel", [13, 11, 1 << 34, 1 << 59, 1 << 80, -1])
def test_a_storage_of_another_size_than_its_record_is_refused(numel, tmp_path):
    """Before memory is taken: 64 GB would be more than there is."""
    path = write_zip(tmp_path / "a.pt", tensor_pickle(numel, 0, (1,), (1,)), d0=bytes(48))
    assert "storage" in refusal(path)
    path = write_legacy(tmp_path / "b.pt", tensor_pickle(numel, 0, (1,), (1,)))
    assert "storage" in refusal(path)


def test_a_missing_storage_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.pt", tensor_pickle(12, 0, (1,), (1,)), d1=bytes(48))
    assert "lacks archive/data/0" in refusal(path)
