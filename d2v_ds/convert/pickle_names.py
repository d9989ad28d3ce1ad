"""Which names a pickle may use, and the few that are built: tensors, containers, numbers of numpy.

Nothing that a file names is ever imported or called. A name in `BUILDERS` is built by the function beside it,
which is ours and checks its arguments; every other class becomes a `StandIn`. So what is refused here could do no
harm anyway: it is refused because a file that wants `os.system` is an attack, and must be called one.

Refused: the standard library but for names of data types, all of torch and numpy but what is listed, packages
that pickle code, and the call of any foreign function, told from a class by its lower-case name.
"""

from __future__ import annotations

import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # what protocols 0 to 2 write for Python 2's sake
from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2v_ds.convert.standin import Name, StandIn

MAX_KEY_PARTS = 30
MAX_TUPLE_KEYS = 2000
"""Keys of dicts and sets that are tuples: their hashes can be made equal, and then each is compared with all."""
MAX_NAME = 500
NUMBERS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"}
RENAMED = {
    "_operator": "operator",
    "_functools": "functools",
    "numpy._core.multiarray": "numpy.core.multiarray",
    "numpy._core.numeric": "numpy.core.numeric",
}
"""One module under several names: in C, in numpy 2."""
ALIASES = {"posix": "os", "nt": "os"}
BUILTINS = "object type int float complex bool str bytes bytearray list tuple dict set frozenset slice range"
PLAIN_TYPES = {f"builtins.{name}" for name in BUILTINS.split()} | {"torch.Tensor", "operator.or_"}
"""Named (as the type of a setting; `or_` joins two of them), built only as `BUILDERS` says."""
DATA_MODULES = {"typing", "datetime", "decimal", "fractions", "uuid", "pathlib", "pathlib._local"}
DATA_TYPES = {
    "argparse.Namespace",
    "types.SimpleNamespace",
    "types.GenericAlias",
    "collections.deque",
    "numpy.dtype",
    "numpy.ndarray",
}
"""Of the standard library and numpy: stand-ins are made of them."""
PICKLE_CODE = {
    "torch",
    "numpy",
    "cloudpickle",
    "dill",
    "joblib",
    "pip",
    "setuptools",
    "pkg_resources",
    "IPython",
}
STORAGES = {
    f"{module}.{name}Storage": dtype
    for module in ("torch", "torch.cuda")
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexDouble": torch.complex128,
        "ComplexFloat": torch.complex64,
    }.items()
}
STORAGES |= {"torch.storage.UntypedStorage": torch.uint8, "torch.UntypedStorage": torch.uint8}
DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def find(module: str, name: str) -> Any:
    """What a file gets for a name: one of torch's dtypes, or the name itself.

    Raises ValueError, with the name, for one that no checkpoint needs.
    """
    if len(module) + len(name) > MAX_NAME:
        raise ValueError(f"it names a class by a text of more than {MAX_NAME} characters")
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    module = RENAMED.get(module, module)
    found = Name(module, name)
    text = str(found)
    if text in DTYPES:
        return DTYPES[text]
    if text in BUILDERS or text in STORAGES or text in PLAIN_TYPES or text in DATA_TYPES:
        return found
    if module in DATA_MODULES and "." not in name:
        return found
    root = module.split(".")[0]
    if root in sys.stdlib_module_names or root in PICKLE_CODE or not root.isidentifier():
        raise refusal(f"wants {explained(found)}")
    return found


def explained(name: Name) -> str:
    alias = ALIASES.get(name.module)
    return f"'{name}' (that is '{alias}.{name.name}')" if alias else f"'{name}'"


def refusal(what: str) -> ValueError:
    return ValueError(
        f"it {what}, which no checkpoint needs; nothing of it was run. Files may hold tensors, plain values and "
        "objects of classes: do not trust this one, or save its state dict anew where it was made"
    )


def call(function: Any, args: Any, kwargs: dict[str, Any] | None = None, is_new: bool = False) -> Any:
    """What a file gets for calling a name: what a builder makes, or a stand-in.

    `is_new`: the file says that the name is a class. Raises ValueError for the call of a function.
    """
    if not isinstance(function, Name):
        raise ValueError(f"it calls a {type(function).__name__}, which is neither class nor function")
    if not isinstance(args, tuple):
        raise ValueError(f"it calls {function} with a {type(args).__name__} for arguments")
    if str(function) in BUILDERS:
        try:
            return BUILDERS[str(function)](*args, **(kwargs or {}))
        except (TypeError, OverflowError, RuntimeError) as error:
            raise ValueError(f"it calls {function} with arguments that do not fit: {error}") from error
    if str(function) in PLAIN_TYPES or str(function) in STORAGES:
        raise refusal(f"calls '{function}'")
    is_class = function.name.split(".")[-1].lstrip("_")[:1].isupper()
    if not (is_class or is_new or str(function) in DATA_TYPES or function.module == "datetime"):
        raise refusal(f"calls the function '{function}'")
    return StandIn(function.module, function.name, args, dict(kwargs or {}))


def check_keys(keys: Iterable[Any]) -> list[Any]:
    """Keys of a dict or set, of which few may be tuples."""
    checked = [check_key(key) for key in keys]
    check_tuples(num_tuples(checked))
    return checked


def num_tuples(keys: Iterable[Any]) -> int:
    return sum(isinstance(key, (tuple, frozenset)) for key in keys)


def check_tuples(count: int) -> None:
    if count > MAX_TUPLE_KEYS:
        raise ValueError(f"it has more than {MAX_TUPLE_KEYS} keys of dicts and sets that are tuples")


def check_key(key: Any) -> Any:
    """A key of a dict or set that hashes at once; nested tuples could take for ever."""
    parts, seen = [key], 0
    while parts:
        part = parts.pop()
        seen += 1
        if seen > MAX_KEY_PARTS:
            raise ValueError(f"a key of a dict or set has more than {MAX_KEY_PARTS} parts")
        if isinstance(part, (tuple, frozenset)):
            parts += part
        elif isinstance(part, int) and abs(part) >= 1 << 60:  # larger ones can be made to share a hash
            raise ValueError("a key of a dict or set is a number above 2**60")
        elif not isinstance(part, (str, bytes, int, float, Name, StandIn, torch.dtype, type(None))):
            raise ValueError(f"a key of a dict or set is a {type(part).__name__}")
    return key


# ---- tensors -----------------------------------------------------------------------------------------------------


def rebuild_tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    _grad: Any = None,
    _hooks: Any = None,
    flags: Any = None,
) -> Tensor:
    """A view of a storage (a flat tensor), once it is known to lie inside.

    `flags`: {neg or conj: True} of a tensor whose storage holds other values than its own; ValueError for these.
    """
    if flags and not (isinstance(flags, dict) and set(flags) <= {"neg", "conj"} and not any(flags.values())):
        raise ValueError(
            "a tensor is stored with a flag (negated or conjugated when it is read); save it anew after "
            "resolve_neg() and resolve_conj()"
        )
    if not isinstance(storage, Tensor) or storage.ndim != 1 or not storage.is_contiguous():
        raise ValueError(f"it makes a tensor of a {type(storage).__name__} instead of a storage")
    if not (is_sizes(size) and is_sizes(stride) and len(size) == len(stride) <= 64 and is_sizes((offset,))):
        raise ValueError(
            f"a tensor of size {cut(size)}, stride {cut(stride)}, offset {cut(offset)} is none: they must be "
            "whole numbers from 0, as many sizes as strides"
        )
    numel = prod(size)
    last = offset + sum((s - 1) * t for s, t in zip(size, stride, strict=True)) if numel else 0
    if last >= max(storage.numel(), 1) or numel > storage.numel() or offset > storage.numel():
        raise ValueError(
            f"a tensor of size {cut(size)}, stride {cut(stride)}, offset {offset} does not lie in its storage "
            f"of {storage.numel()} values"
        )
    return storage.as_strided(tuple(size), tuple(stride), storage.storage_offset() + offset)


def is_sizes(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(v) is int and 0 <= v < 1 << 62 for v in values)


def cut(value: Any) -> str:
    """Its text, short enough for one line: numbers may have thousands of digits, containers hold themselves."""
    if isinstance(value, tuple) and all(type(v) is int and abs(v) < 1 << 64 for v in value[:65]):
        return str(tuple(value[:65]))
    return str(value) if type(value) is int and abs(value) < 1 << 64 else f"<{type(value).__name__}>"


def rebuild_typed_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, flags: Any = None
) -> Tensor:
    """Of a storage that does not know its type."""
    if not isinstance(storage, Tensor) or not isinstance(dtype, torch.dtype):
        raise ValueError("it makes a tensor without a storage or a dtype")
    return rebuild_tensor(storage.view(dtype), offset, size, stride, grad, hooks, flags)


def rebuild_parameter(data: Any, *_: Any) -> Tensor:
    """A parameter is its tensor."""
    if not isinstance(data, Tensor):
        raise ValueError(f"it makes a parameter of a {type(data).__name__} instead of a tensor")
    return data


def rebuild_from_type(function: Any, _type: Any, args: Any, _state: Any) -> Any:
    """A tensor with attributes, or of a class derived from it, is its tensor."""
    made = call(function, args)
    if not isinstance(made, Tensor):
        raise ValueError(f"it makes a tensor by calling {function}")
    return made


def build_size(*values: Any) -> torch.Size:
    if len(values) != 1 or not is_sizes(tuple(values[0]) if isinstance(values[0], list) else values[0]):
        raise ValueError("it makes a torch.Size of what are no sizes")
    return torch.Size(values[0])


def build_device(kind: Any, index: Any = None) -> torch.device:
    if not isinstance(kind, str) or not (index is None or type(index) is int and 0 <= index < 1 << 7):
        raise ValueError("it makes a torch.device of what is no name and number")
    return torch.device(kind) if index is None else torch.device(kind, index)


# ---- containers and numbers --------------------------------------------------------------------------------------


def build_dict(*args: Any) -> dict[Any, Any]:
    """Of nothing, a dict or pairs: an OrderedDict or Counter as a dict."""
    if not args:
        return {}
    (given,) = args
    pairs = list(given.items()) if type(given) is dict else given
    if not isinstance(pairs, (list, tuple)) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs
    ):
        raise ValueError("it makes a dict of what are no pairs")
    keys = check_keys(key for key, _ in pairs)
    return dict(zip(keys, (value for _, value in pairs), strict=True))


def build_defaultdict(_factory: Any = None, *args: Any) -> dict[Any, Any]:
    """As a dict: what would make its missing values is forgotten."""
    return build_dict(*args)


def build_set(kind: Callable[..., Any]) -> Callable[..., Any]:
    def build(values: Any = ()) -> Any:
        if not isinstance(values, (list, tuple, set, frozenset)):
            raise ValueError(f"it makes a set of a {type(values).__name__}")
        return kind(check_keys(values))

    return build


def build_sequence(kind: Callable[..., Any]) -> Callable[..., Any]:
    def build(values: Any = ()) -> Any:
        if not isinstance(values, (list, tuple)):
            raise ValueError(f"it makes a {kind.__name__} of a {type(values).__name__}")
        return kind(values)

    return build


def build_numbers(kind: Callable[..., Any], most: int) -> Callable[..., Any]:
    """slice, range and complex, of numbers (and None) alone."""

    def build(*args: Any) -> Any:
        if len(args) > most or not all(a is None or type(a) in (int, float) for a in args):
            raise ValueError("it makes a slice, range or complex of what are no numbers")
        return kind(*args)

    return build


def build_bytes(kind: Callable[..., Any]) -> Callable[..., Any]:
    """bytes and bytearray, of bytes, a list of bytes, or text in Latin-1: as protocols before 3 write them."""

    def build(value: Any = b"", encoding: Any = None, *_: Any) -> Any:
        if isinstance(value, str):
            return kind(encode(value, encoding))
        if not isinstance(value, (bytes, bytearray, list)):
            raise ValueError(f"it makes bytes of a {type(value).__name__}")
        return kind(value)

    return build


def encode(text: Any, encoding: Any = "latin1", *_: Any) -> bytes:
    """How protocols before 3 write bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        raise ValueError("it makes bytes of what is no text in Latin-1 or UTF-8")
    return text.encode(encoding)


def reconstruct_object(kind: Any, _base: Any, content: Any) -> Any:
    """How protocols 0 and 1 begin any object; `content` of one that is a kind of list or dict."""
    made = call(kind, (), is_new=True)
    if isinstance(made, StandIn):
        made.items = list(content) if isinstance(content, (list, tuple)) else []
        made.entries = dict(content) if isinstance(content, dict) else {}
    return made


def build_type(value: Any) -> Name:
    """NoneType: the only type that is written as a call."""
    if value is not None:
        raise refusal("calls 'builtins.type' with a value")
    return Name("builtins", "NoneType")


def build_union(function: Any = None, types: Any = (), *_: Any) -> StandIn:
    """int | None and its kin, and several flags of an enum: joined by `or_`, which is not called here."""
    is_union = (
        isinstance(function, Name) and str(function) == "operator.or_" and isinstance(types, (tuple, list))
    )
    if not is_union or not all(isinstance(kind, (Name, StandIn)) for kind in types):
        raise refusal("calls 'functools.reduce' for another end than to join types")
    return StandIn("types", "UnionType", tuple(types))


def build_member(kind: Any = None, name: Any = None, *_: Any) -> StandIn:
    """A member of a foreign enum by its name, as some Pythons (3.11) write it."""
    is_foreign = isinstance(kind, Name) and str(kind) not in PLAIN_TYPES | DATA_TYPES | set(BUILDERS) | set(
        STORAGES
    )
    is_member = isinstance(name, str) and name.isidentifier() and not name.startswith("_")
    if not is_foreign or not is_member or kind.module in DATA_MODULES:
        raise refusal("calls 'builtins.getattr' for another end than to name a member of an enum")
    return StandIn(kind.module, kind.name, (name,))


def subscript(origin: Any, args: Any) -> StandIn:
    """typing.List[int] and its kin."""
    if not isinstance(origin, Name) or origin.module != "typing":
        raise refusal("calls 'operator.getitem' on what is no name of typing")
    return StandIn(origin.module, origin.name, (args,))


# ---- numpy -------------------------------------------------------------------------------------------------------


def numpy_dtype(given: Any) -> np.dtype:
    """numpy's dtype for a stand-in of one: numbers and booleans only."""
    code = given.args[0] if isinstance(given, StandIn) and given.name == "dtype" and given.args else None
    if not isinstance(code, str) or code not in NUMBERS:
        raise ValueError("an array of numpy has a type that is no number")
    order = given.state[1] if isinstance(given.state, tuple) and len(given.state) > 1 else "|"
    if order not in ("<", ">", "=", "|"):
        raise ValueError("an array of numpy has a byte order that is none")
    return np.dtype(code).newbyteorder(order)


def numpy_scalar(dtype: Any, raw: Any) -> Any:
    """As Python's int, float, complex or bool."""
    kind = numpy_dtype(dtype)
    if not isinstance(raw, bytes) or len(raw) != kind.itemsize:
        raise ValueError("a number of numpy has the wrong length")
    return np.frombuffer(raw, kind)[0].item()


def numpy_empty(*_: Any) -> StandIn:
    """An array that a file describes next, by its state."""
    return StandIn("numpy", "ndarray")


def numpy_array(state: Any) -> np.ndarray:
    """The array of the state (version, shape, dtype, is Fortran's order, bytes)."""
    if not isinstance(state, tuple) or len(state) != 5:
        raise ValueError("an array of numpy has no state that is known")
    _, shape, dtype, is_fortran, raw = state
    return numpy_frombuffer(raw, dtype, shape, "F" if is_fortran else "C")


def numpy_frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    kind = numpy_dtype(dtype)
    if (
        not isinstance(raw, (bytes, bytearray))
        or not is_sizes(shape)
        or len(shape) > 32
        or order not in ("C", "F")
    ):
        raise ValueError("an array of numpy has no bytes or no shape")
    if prod(shape) * kind.itemsize != len(raw):
        raise ValueError(f"an array of numpy of shape {cut(shape)} has {len(raw)} bytes")
    return np.ndarray(shape, kind, buffer=raw, order=order)


BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": rebuild_typed_tensor,
    "torch._utils._rebuild_parameter": rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": rebuild_from_type,
    "torch.nn.parameter.Parameter": rebuild_parameter,
    "torch.Size": build_size,
    "torch.device": build_device,
    "collections.OrderedDict": build_dict,
    "collections.Counter": build_dict,
    "collections.defaultdict": build_defaultdict,
    "builtins.dict": build_dict,
    "builtins.set": build_set(set),
    "builtins.frozenset": build_set(frozenset),
    "builtins.list": build_sequence(list),
    "builtins.tuple": build_sequence(tuple),
    "builtins.slice": build_numbers(slice, 3),
    "builtins.range": build_numbers(range, 3),
    "builtins.complex": build_numbers(complex, 2),
    "builtins.bytes": build_bytes(bytes),
    "builtins.bytearray": build_bytes(bytearray),
    "builtins.type": build_type,
    "builtins.getattr": build_member,
    "functools.reduce": build_union,
    "_codecs.encode": encode,
    "copyreg._reconstructor": reconstruct_object,
    "operator.getitem": subscript,
    "numpy.core.multiarray.scalar": numpy_scalar,
    "numpy.core.multiarray._reconstruct": numpy_empty,
    "numpy.core.numeric._frombuffer": numpy_frombuffer,
}
