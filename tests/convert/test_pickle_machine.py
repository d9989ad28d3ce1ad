"""A file that asks for more than data is refused with the name of what it wanted, and nothing of it is run."""

from __future__ import annotations

import builtins
import enum
import functools
import operator
import os
import pickle
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_files import FORMATS, calling, modules, save, write_legacy, write_zip

from d2v_ds.convert.unpickle import plain, read_torch_file


class Calls:
    """Pickled as a call."""

    def __init__(self, function: Any, *args: Any):
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_torch_file(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text
    return text


def both(folder: Path, content: bytes) -> list[Path]:
    """A pickle in both formats."""
    return [write_zip(folder / "zip.pt", content), write_legacy(folder / "legacy.pt", content)]


# ---- attacks ----


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, "os.system"),
        (subprocess.call, "subprocess.call"),
        (builtins.exec, "builtins.exec"),
        (builtins.eval, "builtins.eval"),
        (os.popen, "os.popen"),
    ],
)
def test_a_malicious_file_is_refused_by_name_and_does_nothing(function, name, format, tmp_path):
    """The proof that it is malicious: torch.load does what it says, when told to trust it."""
    mark = tmp_path / "was_here"
    code = f"open({str(mark)!r}, 'w')" if function in (exec, eval) else f"touch {mark}"
    arguments = [code.split()] if function is subprocess.call else [code]
    path = save(tmp_path / "a.pt", {"model": {}, "cfg": Calls(function, *arguments)}, format)
    assert f"{name}'" in refusal(path) and not mark.exists()
    result = torch.load(path, weights_only=False)["cfg"]
    if hasattr(result, "close"):
        result.close()
    assert mark.exists()


NAMES = """
    builtins.eval builtins.exec builtins.getattr builtins.setattr builtins.__import__ builtins.compile builtins.open
    builtins.globals builtins.map builtins.type builtins.object builtins.print os.system os.execv os.environ.get
    posix.system nt.system sys.exit subprocess.Popen importlib.import_module runpy.run_path code.interact
    shutil.rmtree socket.socket pickle.loads _pickle.loads ctypes.CDLL functools.partial operator.attrgetter
    operator.methodcaller types.FunctionType types.CodeType marshal.loads webbrowser.open pty.spawn asyncio.run
    pathlib.Path.write_text copyreg._extension_registry.get collections.UserDict enum.Enum logging.config.listen
    torch.load torch.hub.load torch.jit.load torch.nn.Linear torch.os.system torch.storage._load_from_bytes
    torch._utils._rebuild_sparse_tensor torch.serialization.load torch.utils.collect_env.run numpy.load
    numpy.os.system numpy.testing._private.utils.runstring cloudpickle.loads dill.loads joblib.load pip.main
    fairseq.checkpoint_utils.torch_load omegaconf.OmegaConf.load mine.run __main__.main
"""


@pytest.mark.parametrize("name", NAMES.split())
def test_a_name_that_no_checkpoint_needs_is_refused(name, tmp_path):
    """Called, in both formats; those that stand in a module of their own as C knows it too."""
    module, _, last = name.rpartition(".")
    for path in both(tmp_path, calling(module, last, "x")):
        assert f"{name}'" in refusal(path)


def test_a_name_is_refused_before_it_is_called(tmp_path):
    for path in both(tmp_path, b"\x80\x02cos\nsystem\n."):
        assert "wants 'os.system', which no checkpoint needs; nothing of it was run" in refusal(path)


def test_names_that_python_2_and_c_gave_are_known(tmp_path):
    """Also across modules, and in the protocol that takes names from the stack."""
    by_stack = b"\x80\x04\x8c\x05posix\x8c\x06system\x93."
    for content, words in [
        (calling("__builtin__", "eval", "1"), "'builtins.eval'"),
        (calling("commands", "getoutput", "1"), "'subprocess.getoutput'"),
        (by_stack, "'posix.system' (that is 'os.system')"),
        (b"\x80\x04\x8c\x0afairseq.os\x8c\x06system\x93)R.", "calls the function 'fairseq.os.system'"),
    ]:
        for path in both(tmp_path, content):
            assert words in refusal(path)


def test_every_way_to_call_is_guarded(tmp_path):
    """INST, OBJ, NEWOBJ and NEWOBJ_EX, besides REDUCE."""
    for content in (
        b"(S'x'\nios\nsystem\n.",
        b"(cos\nsystem\nS'x'\no.",
        b"\x80\x02cos\nsystem\n)\x81.",
        b"\x80\x04cos\nsystem\n)}\x92.",
    ):
        for path in both(tmp_path, content):
            assert "'os.system'" in refusal(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x80\x02\x82\x01.", "uses the opcode EXT1"),
        (b"\x80\x02\x84\x01\x00\x00\x00.", "uses the opcode EXT4"),
        (b"\x80\x05\x97.", "uses the opcode NEXT_BUFFER"),
        (b"Psomewhere\n.", "uses the opcode PERSID"),
        (b"\x80\x02X\x04\x00\x00\x00fileQ.", "kept outside the pickle"),
        (b"\x80\x02(X\x04\x00\x00\x00filetQ.", "kept outside the pickle"),
        (b"\x80\x02(X\x07\x00\x00\x00storagetQ.", "a storage of a kind that is not known"),
        (b"\x80\x02cfairseq.tasks\nTask\n}X\x01\x00\x00\x00aK\x01sb.", "sets the state of a Name"),
        (b"\x80\x02ctorch\nTensor\n)R.", "calls 'torch.Tensor'"),
        (b"\x80\x02K\x01)R.", "calls a int"),
        (b"\x80\x02cm\nC\nK\x01R.", "calls m.C with a int for arguments"),
        (b"\x80\x02]K\x01b.", "sets the state of a list"),
    ],
)
def test_what_else_a_pickle_can_try_is_refused(content, words, tmp_path):
    for path in both(tmp_path, content):
        assert words in refusal(path)


def test_state_of_a_stand_in_is_kept_and_not_obeyed(tmp_path):
    """Neither __setstate__ nor the attributes of a class are reached."""
    content = b"\x80\x02cm\nC\n)\x81}(X\x09\x00\x00\x00__class__K\x01X\x0c\x00\x00\x00__setstate__K\x02ub."
    for path in both(tmp_path, content):
        ours = read_torch_file(path)
        assert (ours.module, ours.name, ours.args) == ("m", "C", ())
        assert ours.state == {"__class__": 1, "__setstate__": 2}


def test_attributes_of_a_dict_are_forgotten(tmp_path):
    """A file cannot replace `items` of an OrderedDict."""
    content = b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb."
    for path in both(tmp_path, content):
        assert type(read_torch_file(path)) is dict and read_torch_file(path) == {}


def test_nothing_foreign_is_imported(tmp_path):
    """A package that lies beside the program is not touched."""
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    path = write_zip(tmp_path / "a.pt", b"\x80\x02ctrap\nThing\n)\x81.")
    code = f"from d2v_ds.convert.unpickle import read_torch_file as r; print(r({str(path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).resolve().parents[2]}"},
    )
    assert done.stdout.strip() == "<stand-in for trap.Thing>", done.stderr


# ---- exhaustion ----


def text(words: str) -> bytes:
    return b"X" + struct.pack("<I", len(words)) + words.encode()


def tree(levels: int) -> bytes:
    """A tuple of twice the same tuple of twice ...: small in memory, 2**levels parts to whoever walks it."""
    return b"K\x01" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(levels))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "nest deeper than 200"),
        (b"\x80\x02)" + b"\x85" * 100_000 + b".", "nest deeper than 200"),
        (b"\x80\x02" + b"(" * 100_000 + b".", "does not end with one object"),
        (b"\x80\x02}" + tree(60) + b"Ns.", "more than 30 parts"),
        (b"\x80\x04\x8f(" + tree(60) + b"\x90.", "more than 30 parts"),
        (b"\x80\x02}\x8a\x09" + (2**70).to_bytes(9, "little") + b"Ns.", "number above 2**60"),
        (b"\x80\x02}]Ns.", "a key of a dict or set is a list"),
        (b"\x80\x02}c__builtin__\ncomplex\nK\x01K\x02\x86RNs.", "a key of a dict or set is a complex"),
        (b"\x80\x02N" * 3_000_000 + b".", "more than 2000000 opcodes"),
        (b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "makes bytes of a int"),
        (b"\x80\x02c__builtin__\nlist\nc__builtin__\nxrange\nJ\xff\xff\xff\x7f\x85R\x85R.", "makes a list of a range"),
        (b"\x80\x04\x8d" + (1 << 62).to_bytes(8, "little") + b"abc.", "cannot be read"),
        (b"\x80\x02h\x07.", "damaged at BINGET"),
        (b"\x80\x02s.", "damaged at SETITEM"),
        (b"\x80\x02t.", "damaged at TUPLE"),
        (b"\x80\x02NN.", "does not end with one object"),
        (b"\x80\x02.", "does not end with one object"),
        (b"\x80\x02N", "cannot be read"),
    ],
)  # fmt: skip
def test_a_bomb_is_refused_at_once(content, words, tmp_path):
    """In seconds, at the limit of opcodes; in milliseconds otherwise."""
    started = time.monotonic()
    assert words in refusal(write_zip(tmp_path / "a.pt", content))
    assert time.monotonic() - started < 30


ATOM, NODE = b"cm.n\nThing\nq\xf0", b"comegaconf.nodes\nAnyNode\nq\xf0"


def colliding(count: int) -> bytes:
    """Tuples that differ and share a hash, since hash(-1) == hash(-2), as keys of one dict."""
    parts = [b"J" + struct.pack("<i", -1), b"J" + struct.pack("<i", -2)]
    keys = (b"(" + b"".join(parts[k >> i & 1] for i in range(16)) + b"tN" for k in range(count))
    return b"}(" + b"".join(keys) + b"u"


def one_hash(count: int) -> bytes:
    """Objects as keys whose only argument is a number of hash 0."""
    numbers = (b"\x8a\x14" + (k * (2**61 - 1)).to_bytes(20, "little") for k in range(1, count))
    return ATOM + b"0}(" + b"".join(b"h\xf0" + number + b"\x85RN" for number in numbers) + b"u"


def node(value: bytes) -> bytes:
    return b"h\xf0)\x81}" + text("_val") + value + b"sb"


@pytest.mark.parametrize(
    "content",
    [
        colliding(6000),
        one_hash(20_000),
        b"}(" + b"K\x01" * 29 + b"tq\x00Ns" + b"h\x00Ns" * 20_000,
        text("a" * 1_000_000) + b"q\x000(h\x00h\x00\x93" + b"0h\x00h\x00\x93" * 20_000 + b"t",
        NODE + b"0" + node(text("${" + "." * 200_000)),
        NODE + b"0" + text("${" + "a." * 500_000 + "a}") + b"q\x010(" + node(b"h\x01") * 3000 + b"t",
        b"}" + ATOM + b"]\x85\x85RNs",
        b"}(" + b"".join(text(str(i)) + b"N" for i in range(20_000)) + b"uq\x000" + ATOM + b")h\x00\x92"
        + b"0h\xf0)h\x00\x92" * 20_000,
    ],
    ids=["tuples", "numbers", "again", "names", "dots", "references", "lists", "keywords"],
)  # fmt: skip
def test_no_key_name_or_reference_takes_long(content, tmp_path):
    """A second of an idle core for each; some are refused, some are data of no use."""
    path = write_zip(tmp_path / "a.pt", b"\x80\x04" + content + b".")
    started = time.process_time()
    try:
        plain(read_torch_file(path))
    except ValueError as error:
        assert "\n" not in str(error)
    assert time.process_time() - started < 3


def test_a_few_tuples_as_keys_are_data(tmp_path):
    """Up to 2000 in a file, however they got there: alone, by a constructor, again and again."""
    value = {"pairs": {(i, "x"): i for i in range(500)}, "set": {(i, i) for i in range(500)}}
    assert read_torch_file(save(tmp_path / "a.pt", value)) == value
    again = b"](" + b"".join(b"K%cK\x01\x86" % i for i in range(200)) + b"eq\x000"
    again += b"c__builtin__\nset\nh\x00\x85R0" * 11 + b"N."
    assert "more than 2000 keys" in refusal(write_zip(tmp_path / "b.pt", b"\x80\x02" + again))


def test_a_value_copied_again_and_again_is_refused(tmp_path):
    """A list of a million, a thousand times: 8 GB of a file of 2 MB."""
    many = b"](" + b"N" * 1_000_000 + b"eq\x00"
    copies = b"".join(b"c__builtin__\nlist\nh\x00\x85R0" for _ in range(1000))
    assert "copies the same values again" in refusal(
        write_zip(tmp_path / "a.pt", b"\x80\x02" + many + copies + b".")
    )


def test_a_memo_index_takes_no_memory(tmp_path):
    """Python's own unpickler would make room for four billion objects."""
    path = write_zip(tmp_path / "a.pt", b"\x80\x02Nr\xff\xff\xff\xffj\xff\xff\xff\xff\x86.")
    assert read_torch_file(path) == (None, None)


def test_a_text_of_any_length_is_bounded_by_the_file(tmp_path):
    path = write_zip(tmp_path / "a.pt", b"\x80\x02X\xff\xff\xff\xffabc.")
    assert "cannot be read" in refusal(path)


def test_settings_of_a_shared_tree_are_read_at_once(tmp_path):
    """No copy for each way that leads to a part."""
    value = read_torch_file(write_zip(tmp_path / "a.pt", b"\x80\x02" + tree(60) + b"."))
    started = time.monotonic()
    plain(value)
    assert time.monotonic() - started < 1


# ---- classes and functions ----


def test_a_class_is_stood_in_for_and_a_function_is_refused(tmp_path):
    """A name in capitals may be called, since nothing is; a file that says itself that it names a class, too."""
    for content in (
        b"\x80\x02cm.n\nThing\n)R.",
        b"\x80\x02cm.n\nthing\n)\x81.",
        b"\x80\x02cm.n\n_Thing\n)R.",
    ):
        assert read_torch_file(write_zip(tmp_path / "a.pt", content)).module == "m.n"
    assert "calls the function 'm.n.thing'" in refusal(write_zip(tmp_path / "b.pt", calling("m.n", "thing")))


@pytest.mark.parametrize("protocol", range(6))
def test_objects_of_every_protocol_are_stood_in_for(protocol, tmp_path):
    class Meter:
        def __init__(self) -> None:
            self.count = 3

    class Kinds(list):
        pass

    with modules(mine__meters=[Meter, Kinds]):
        value = {"meter": Meter(), "kinds": Kinds([1, 2]), "class": Meter}
        content = pickle.dumps(value, protocol)
    for path in both(tmp_path, content):
        ours = read_torch_file(path)
        assert (ours["meter"].module, ours["meter"].name) == ("mine.meters", "Meter")
        assert ours["meter"].state == {"count": 3}
        assert ours["kinds"].items == [1, 2]
        assert str(ours["class"]) == "mine.meters.Meter"


@pytest.mark.parametrize("protocol", range(6))
def test_a_union_of_types_is_named_and_nothing_is_joined(protocol, tmp_path):
    """`int | None` is written as a call of functools.reduce, flags of an enum too; any other such call is refused."""
    value = {"steps": int | None, "kinds": list[int] | dict[str, int] | None}
    for path in both(tmp_path, pickle.dumps(value, protocol)):
        union = read_torch_file(path)["steps"]
        assert (union.module, union.name, list(map(str, union.args))) == (
            "types",
            "UnionType",
            ["builtins.int", "builtins.NoneType"],
        )
        assert plain(read_torch_file(path)) == {"steps": "types.UnionType", "kinds": "types.UnionType"}
    mark = tmp_path / "was_here"
    for function, *arguments in (
        (functools.reduce, os.system, [f"touch {mark}", 1]),
        (functools.reduce, operator.or_, [1, 2]),
        (functools.reduce, operator.add, [int, str]),
        (operator.or_, int, None),
    ):
        path = save(tmp_path / "b.pt", Calls(function, *arguments))
        assert any(
            f"{name}'" in refusal(path) for name in ("os.system", "functools.reduce", "add", "operator.or_")
        )
    assert not mark.exists()


def test_a_member_of_an_enum_may_be_written_by_its_name(tmp_path):
    """Python 3.11 does so, by getattr, which is refused for anything else."""

    class Mode(enum.Enum):
        MEAN = 1

    named = b"\x80\x02c__builtin__\ngetattr\nc%b\n%b\nX%b%b\x86R."
    for where, what, name in ((b"mine.m", b"Mode", b"MEAN"), (b"fairseq.m", b"Mode", b"MEAN")):
        content = named % (where, what, struct.pack("<I", len(name)), name)
        ours = read_torch_file(write_zip(tmp_path / "a.pt", content))
        assert (ours.name, ours.args) == ("Mode", ("MEAN",)) and plain(ours) == "MEAN"
    with modules(mine__modes=[Mode]):
        assert plain(read_torch_file(save(tmp_path / "b.pt", {"mode": Mode.MEAN})))["mode"] in (1, "MEAN")
    for where, what, name in (
        (b"__builtin__", b"dict", b"clear"),
        (b"torch", b"Tensor", b"backward"),
        (b"pathlib", b"Path", b"unlink"),
        (b"mine", b"Mode", b"__class__"),
        (b"os", b"environ", b"clear"),
    ):
        content = named % (where, what, struct.pack("<I", len(name)), name)
        assert "which no checkpoint needs" in refusal(write_zip(tmp_path / "c.pt", content))


def test_a_partial_function_is_refused(tmp_path):
    path = save(tmp_path / "a.pt", functools.partial(print, 1))
    assert "'functools.partial'" in refusal(path)
