"""What a file names but nobody may run: names, and inert stand-ins for objects of foreign classes.

A stand-in only records what the file says; `plain` turns settings made of them (omegaconf nodes, argparse's
Namespace, enums) into dicts, lists, texts and numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from reprlib import Repr
from typing import Any

MAX_DEPTH = 200
"""Containers inside each other; settings and states have fewer than 30."""
NODE_ROOT = "omegaconf"
REFERENCE = re.compile(r"\$\{\s*(\.{0,20})(\w[\w.\-]*)\s*\}")
MAX_REFERENCE = 500
"""Characters; a longer text is none."""
MAX_KEY = 1 << 60
UNFOLLOWED = object()


@dataclass(frozen=True)
class Name:
    """A class or function as a file names it; never imported, never called."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class StandIn:
    """What a file says about an object of a foreign class."""

    module: str
    name: str
    args: tuple[Any, ...] = ()
    """What its constructor would have got."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    state: Any = None
    """What `__setstate__` would have got; mostly the attributes as a dict."""
    items: list[Any] = field(default_factory=list)
    """Appended to it, if its class is a kind of list or set."""
    entries: dict[Any, Any] = field(default_factory=dict)
    """Set in it, if its class is a kind of dict."""

    def __repr__(self) -> str:
        return f"<stand-in for {self.module}.{self.name}>"

    @property
    def is_node(self) -> bool:
        """Of omegaconf, whose state is understood."""
        return self.module.split(".")[0] == NODE_ROOT and isinstance(self.state, dict)

    def inside(self) -> list[Any]:
        """Everything it holds."""
        return [*self.args, self.kwargs, self.state, self.items, self.entries]


def plain(value: Any) -> Any:
    """The same with every stand-in as a plain value, in new containers.

    - an omegaconf node: its content, references such as `${task.seed}` followed where they lead anywhere
    - argparse.Namespace and every object with attributes: a dict of them
    - an enum: its value (files hold no names of members)
    - a kind of dict or list: a dict or list; a path: its text
    - a class, an object that says nothing, or one that holds itself, inside: its dotted name

    Raises ValueError where a list or dict holds itself, or containers nest deeper than 200.
    """
    try:
        return Plainer().of(value, 0)
    except RecursionError as error:
        raise ValueError(f"settings nest deeper than {MAX_DEPTH}") from error


def shown(value: Any) -> str:
    """Its repr, short, however large a file made it."""
    return BRIEF.repr(value)


BRIEF = Repr()
BRIEF.maxlevel, BRIEF.maxstring, BRIEF.maxother = 2, 80, 80


class Plainer:
    """One call of `plain`: what was done already is not done twice, so shared parts cost nothing."""

    def __init__(self) -> None:
        self.done: dict[int, Any] = {}
        self.open: set[int] = set()
        self.roots: dict[int, Any] = {}

    def of(self, value: Any, depth: int) -> Any:
        if isinstance(value, Name):
            return str(value)
        if not isinstance(value, (dict, list, tuple, set, frozenset, StandIn)):
            return value
        if id(value) in self.done:
            return self.done[id(value)]
        if id(value) in self.open and isinstance(value, StandIn):  # objects that know each other
            return f"{value.module}.{value.name}"
        if id(value) in self.open:
            raise ValueError("a setting holds itself, so it has no plain form")
        if depth > MAX_DEPTH:
            raise ValueError(f"settings nest deeper than {MAX_DEPTH}")
        self.open.add(id(value))
        self.done[id(value)] = result = self.make(value, depth + 1)
        self.open.remove(id(value))
        return result

    def make(self, value: Any, depth: int) -> Any:
        if isinstance(value, StandIn):
            return self.of_stand_in(value, depth)
        if isinstance(value, dict):
            return {self.key(k): self.of(v, depth) for k, v in value.items()}
        if isinstance(value, tuple):
            return tuple(self.of(v, depth) for v in value)
        return [self.of(v, depth) for v in value]

    def key(self, key: Any) -> Any:
        """An enum's value or a class's name; of an object that says more, its class's."""
        if not isinstance(key, StandIn):
            return str(key) if isinstance(key, Name) else key
        said = key.args[0] if len(key.args) == 1 else None
        is_number = type(said) in (int, float) and abs(said) < MAX_KEY
        return said if is_number or isinstance(said, str) else f"{key.module}.{key.name}"

    def of_stand_in(self, value: StandIn, depth: int) -> Any:
        if value.is_node and ("_val" in value.state or "_content" in value.state):
            return self.of_node(value, depth)
        if value.module.split(".")[0] == "pathlib":
            return str(PurePosixPath(*[part for part in value.args if isinstance(part, str)]))
        if value.entries:
            return self.of(value.entries, depth)
        if value.items:
            return self.of(value.items, depth)
        if isinstance(value.state, dict):
            return self.of(value.state, depth)
        if len(value.args) == 1:
            return self.of(value.args[0], depth)
        return f"{value.module}.{value.name}"

    def of_node(self, node: StandIn, depth: int) -> Any:
        content = node.state.get("_val", node.state.get("_content"))
        is_short = isinstance(content, str) and len(content) <= MAX_REFERENCE
        match = REFERENCE.fullmatch(content) if is_short else None
        if match:
            start = self.above(node, len(match[1])) if match[1] else self.root(node)
            target = follow(start, match[2])
            return content if target is UNFOLLOWED else self.of(target, depth)
        return self.of(content, depth)

    def root(self, node: Any) -> Any:
        """The topmost node above; found once for all that are below."""
        way = []
        while id(node) not in self.roots and len(way) < MAX_DEPTH and parent_of(node) is not None:
            way.append(node)
            node = parent_of(node)
        top = self.roots.get(id(node), node)
        self.roots |= {id(below): top for below in way}
        return top

    def above(self, node: Any, dots: int) -> Any:
        """The node's parent, its parent, ..., or the topmost."""
        node = parent_of(node)
        for _ in range(dots - 1):
            node = parent_of(node) or node
        return node


def follow(here: Any, path: str) -> Any:
    """What an omegaconf reference leads to from a node; `UNFOLLOWED` if it leads nowhere."""
    for part in path.split("."):
        content = here.state.get("_content") if isinstance(here, StandIn) and here.is_node else here
        if isinstance(content, dict) and part in content:
            here = content[part]
        elif isinstance(content, list) and part.isdecimal() and int(part) < len(content):
            here = content[int(part)]
        else:
            return UNFOLLOWED
    return here


def parent_of(node: Any) -> StandIn | None:
    above = node.state.get("_parent") if isinstance(node, StandIn) and node.is_node else None
    return above if isinstance(above, StandIn) else None
