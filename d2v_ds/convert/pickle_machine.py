"""Reads a pickle as data: an own machine for its opcodes, which can build but not run anything.

Python's unpickler imports and calls what a file names. This one knows names only (`pickle_names`), builds
containers, tensors and stand-ins, and refuses the rest. The standard library's `pickletools` cuts the bytes
into opcodes, of every protocol from 0 to 5. It is slower than the C one, about a million opcodes a second, and a
checkpoint has some 10,000; in exchange no length, depth, memo index or key of a hostile file can exhaust it.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from d2v_ds.convert.pickle_names import call, check_keys, check_tuples, find, num_tuples, numpy_array, refusal
from d2v_ds.convert.standin import MAX_DEPTH, Name, StandIn

MAX_OPCODES = 2_000_000
"""About 400 MB of objects and 4 s; the state of 300 tensors with their optimizer has 20,000."""
MAX_COPIED = 1 << 28
"""Bytes, or sixteenths of items: what calls may be given in all, since they may copy one value again and again."""
VALUES = """
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING
    BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
""".split()  # noqa: SIM905
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
FRESH: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}


class Machine:
    """`run(file)` gives what one pickle of `file` describes; the file stands behind it then.

    `load_storage` makes the flat tensor of a persistent id. Raises ValueError for everything that is no data.
    """

    def __init__(self, load_storage: Callable[[tuple[Any, ...]], Tensor]):
        self.load_storage = load_storage
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.memoed: dict[int, list[int]] = {}
        self.copied = 0
        self.tuple_keys = 0

    def run(self, file: Any) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count >= MAX_OPCODES:
                raise ValueError(f"its pickle has more than {MAX_OPCODES} opcodes; checkpoints have fewer")
            try:
                self.step(opcode.name, argument)
            except (IndexError, KeyError) as error:
                raise ValueError(
                    f"its pickle is damaged at {opcode.name}: nothing is where it looks"
                ) from error
        if len(self.stack) != 1 or self.marked:
            raise ValueError("its pickle is damaged: it does not end with one object")
        check_depth(self.stack[0])
        return self.stack[0]

    def step(self, name: str, argument: Any) -> None:
        if name in VALUES:
            self.push(argument)
        elif name in CONSTANTS:
            self.push(CONSTANTS[name])
        elif name in FRESH:
            self.push(FRESH[name]())
        elif name in STEPS:
            STEPS[name](self, argument)
        else:
            raise refusal(f"uses the opcode {name}")

    # ---- stack and memo

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def pop_marked(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def discard(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_marked()

    def mark(self, _: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def put(self, index: Any) -> None:
        value = self.stack[-1]
        self.memo[index] = value
        if isinstance(value, StandIn) and value.module == "numpy":
            self.memoed.setdefault(id(value), []).append(index)

    # ---- containers

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif isinstance(target, StandIn):
            target.items.extend(items)
        else:
            raise ValueError(f"it appends to a {type(target).__name__}")

    def add(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is set:
            target.update(self.keys(items))
        elif isinstance(target, StandIn):
            target.items.extend(items)
        else:
            raise ValueError(f"it adds to a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is dict:
            target.update(self.pairs(items))
        elif isinstance(target, StandIn):
            target.entries.update(self.pairs(items))
        else:
            raise ValueError(f"it sets an item of a {type(target).__name__}")

    def pairs(self, items: list[Any]) -> dict[Any, Any]:
        if len(items) % 2:
            raise ValueError("it sets items of a dict with a key and no value")
        return dict(zip(self.keys(items[::2]), items[1::2], strict=True))

    def keys(self, keys: list[Any]) -> list[Any]:
        """Those of a dict or set, if they hash at once and few are tuples, in all of the pickle."""
        self.count_tuples(keys)
        return check_keys(keys)

    def count_tuples(self, keys: Any) -> None:
        self.tuple_keys += num_tuples(keys)
        check_tuples(self.tuple_keys)

    # ---- names and objects

    def name(self, text: str) -> Name:
        module, _, name = text.partition(" ")
        return find(module, name)

    def name_of_stack(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("it names a class by what is no text")
        self.push(find(module, name))

    def reduce(self, _: Any) -> None:
        args, function = self.pop(), self.pop()
        self.push(self.call(function, args))

    def new_object(self, _: Any) -> None:
        args, kind = self.pop(), self.pop()
        self.push(self.call(kind, args, is_new=True))

    def call(
        self, function: Any, args: Any, kwargs: dict[str, Any] | None = None, is_new: bool = False
    ) -> Any:
        self.count_copied(args, kwargs)
        made = call(function, args, kwargs, is_new)
        if type(made) in (dict, set, frozenset):
            self.count_tuples(made)
        return made

    def count_copied(self, args: Any, kwargs: dict[str, Any] | None = None) -> None:
        for value in [*args, args, kwargs] if isinstance(args, tuple) else ():
            if isinstance(value, (str, bytes, bytearray)):
                self.copied += len(value)
            elif isinstance(value, (list, tuple, dict, set, frozenset)):
                self.copied += 16 * len(value)
        if self.copied > MAX_COPIED:
            raise ValueError("its pickle copies the same values again and again, far beyond its own size")

    def new_object_by_keywords(self, _: Any) -> None:
        kwargs, args, kind = self.pop(), self.pop(), self.pop()
        self.count_copied((kwargs,))
        if type(kwargs) is not dict or not all(isinstance(key, str) for key in kwargs):
            raise ValueError("it makes an object with arguments that have no names")
        self.push(self.call(kind, args, kwargs, is_new=True))

    def instance(self, text: Any) -> None:
        args = tuple(self.pop_marked())
        self.push(self.call(self.name(text), args, is_new=True))

    def object_of_mark(self, _: Any) -> None:
        kind, *args = self.pop_marked()
        self.push(self.call(kind, tuple(args), is_new=True))

    def build(self, _: Any) -> None:
        """Gives an object its state. Ours are all inert: a stand-in keeps it, a dict (once an OrderedDict with
        attributes) has no use for it."""
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, StandIn) and (target.module, target.name) == ("numpy", "ndarray"):
            self.stack[-1] = numpy_array(state)
            for index in self.memoed.pop(id(target), ()):
                if self.memo[index] is target:
                    self.memo[index] = self.stack[-1]
        elif isinstance(target, StandIn):
            target.state = state
        elif type(target) is not dict:
            raise refusal(f"sets the state of a {type(target).__name__}")

    def persistent(self, _: Any) -> None:
        given = self.pop()
        if not isinstance(given, tuple) or not given or given[0] != "storage":
            raise refusal("wants something kept outside the pickle that is no storage of a tensor")
        self.push(self.load_storage(given))


def check_depth(value: Any) -> None:
    """Raises ValueError if containers nest so deep that who walks through them would fail."""
    layer, seen = [value], set()
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in layer:
            if not isinstance(item, (dict, list, tuple, set, frozenset, StandIn)) or id(item) in seen:
                continue
            seen.add(id(item))
            parts = item.inside() if isinstance(item, StandIn) else item
            inner += [*parts, *parts.values()] if isinstance(parts, dict) else parts
        if not inner:
            return
        layer = inner
    raise ValueError(f"its containers nest deeper than {MAX_DEPTH}; checkpoints do not")


STEPS: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": lambda m, arg: None,
    "FRAME": lambda m, arg: None,
    "STOP": lambda m, arg: None,
    "MARK": Machine.mark,
    "POP": Machine.discard,
    "POP_MARK": lambda m, arg: m.pop_marked() and None,
    "DUP": lambda m, arg: m.push(m.stack[-1]),
    "PUT": Machine.put,
    "BINPUT": Machine.put,
    "LONG_BINPUT": Machine.put,
    "MEMOIZE": lambda m, arg: m.put(len(m.memo)),
    "GET": lambda m, arg: m.push(m.memo[arg]),
    "BINGET": lambda m, arg: m.push(m.memo[arg]),
    "LONG_BINGET": lambda m, arg: m.push(m.memo[arg]),
    "LIST": lambda m, arg: m.push(m.pop_marked()),
    "TUPLE": lambda m, arg: m.push(tuple(m.pop_marked())),
    "DICT": lambda m, arg: m.push(m.pairs(m.pop_marked())),
    "FROZENSET": lambda m, arg: m.push(frozenset(m.keys(m.pop_marked()))),
    "TUPLE1": lambda m, arg: m.push((m.pop(),)),
    "TUPLE2": lambda m, arg: m.push((m.pop(), m.pop())[::-1]),
    "TUPLE3": lambda m, arg: m.push((m.pop(), m.pop(), m.pop())[::-1]),
    "APPEND": lambda m, arg: m.extend([m.pop()]),
    "APPENDS": lambda m, arg: m.extend(m.pop_marked()),
    "ADDITEMS": lambda m, arg: m.add(m.pop_marked()),
    "SETITEM": lambda m, arg: m.set_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, arg: m.set_items(m.pop_marked()),
    "GLOBAL": lambda m, arg: m.push(m.name(arg)),
    "STACK_GLOBAL": Machine.name_of_stack,
    "REDUCE": Machine.reduce,
    "NEWOBJ": Machine.new_object,
    "NEWOBJ_EX": Machine.new_object_by_keywords,
    "INST": Machine.instance,
    "OBJ": Machine.object_of_mark,
    "BUILD": Machine.build,
    "BINPERSID": Machine.persistent,
}
