"""Names of tensors, translated both ways by one table of (theirs, ours) patterns.

A pattern may hold `{i}` (a number), `{n}` (a number that is one less in ours), `{w}` (weight or bias), `{rest}`
(anything), and `{qkv}` on their side alone: three projections that are the thirds of one tensor of ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

FIELDS = {"i": r"\d+", "n": r"\d+", "w": "weight|bias", "rest": ".+", "qkv": "[qkv]"}


class Place(NamedTuple):
    """Where a tensor of theirs lies in ours."""

    name: str
    third: int | None = None
    """0, 1, 2 = the rows of q, k, v in a fused projection; None = the whole tensor."""

    def of(self, tensor: Tensor) -> Tensor:
        """That part of our tensor, or of its gradient."""
        return tensor if self.third is None else tensor.chunk(3)[self.third]


class Names:
    """A table of pairs; the first pattern that matches wins, in either direction."""

    def __init__(self, pairs: Iterable[tuple[str, str]]):
        self.pairs = [(compiled(theirs), compiled(ours), theirs, ours) for theirs, ours in pairs]

    def ours(self, name: str) -> Place | None:
        """None for a name that the table does not know."""
        for theirs, _, _, template in self.pairs:
            match = theirs.fullmatch(name)
            if match:
                fields = match.groupdict()
                third = "qkv".index(fields.pop("qkv")) if "qkv" in fields else None
                return Place(filled(template, fields, -1), third)
        return None

    def theirs(self, name: str) -> list[str]:
        """Their name, or the three of a fused projection; empty for a name that the table does not know."""
        for _, ours, template, _ in self.pairs:
            match = ours.fullmatch(name)
            if match:
                letters = "qkv" if "{qkv}" in template else "-"
                return [filled(template, match.groupdict() | {"qkv": letter}, 1) for letter in letters]
        return []


def compiled(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile(
        "".join(f"(?P<{p}>{FIELDS[p]})" if k % 2 else re.escape(p) for k, p in enumerate(parts))
    )


def filled(template: str, fields: dict[str, str], shift: int) -> str:
    if "n" in fields:
        fields = fields | {"n": str(int(fields["n"]) + shift)}
    return template.format(**fields)


def fuse(parts: dict[Place, Tensor], theirs: Callable[[str], list[str]]) -> dict[str, Tensor]:
    """Whole tensors under our names; thirds of a projection are joined in the order q, k, v.

    Raises ValueError if a third is missing, with its name as `theirs` gives it.
    """
    whole = {place.name: tensor for place, tensor in parts.items() if place.third is None}
    missing = []
    for name in dict.fromkeys(place.name for place in parts if place.third is not None):
        thirds = [parts.get(Place(name, third)) for third in range(3)]
        missing += [theirs(name)[i] for i, third in enumerate(thirds) if third is None]
        shapes = {tuple(third.shape) for third in thirds if third is not None}
        if len(shapes) > 1:
            raise ValueError(
                f"{', '.join(theirs(name))} have different shapes: {', '.join(map(str, shapes))}"
            )
        if not missing:
            whole[name] = torch.cat(thirds)
    if missing:
        raise ValueError(f"{len(missing)} missing: {', '.join(missing)}; is the file complete?")
    return whole
