"""What every configuration class shares: unknown keys are errors that name the nearest known one."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator


class Config(BaseModel):
    """A typed, validated group of settings; assignment is validated too."""

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @field_validator("*")
    @classmethod
    def _is_number(cls, value: Any) -> Any:
        """Infinity may mean never, or no limit; what is no number means nothing."""
        if isinstance(value, float) and math.isnan(value):
            raise ValueError("must be a number")
        return value


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint ' (did you mean ...?)' for a name that is not among the known ones."""
    known = sorted(known)
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not matches:  # compare the last part alone: `steps` is near `train.steps`
        tails = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
        matches = [
            tails[t] for t in difflib.get_close_matches(name.rsplit(".", 1)[-1], tails, n=1, cutoff=0.6)
        ]
    return f"; did you mean '{matches[0]}'?" if matches else f"; known: {', '.join(known)}"


def explain(error: ValidationError, known: Iterable[str], source: str, prefix: str = "") -> ValueError:
    """One readable ValueError for pydantic's list: key, value, rule, and the nearest key if unknown."""
    lines = []
    for item in error.errors():
        key = prefix + ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key '{key}'{nearest(key, known)}")
        elif isinstance(item.get("input"), (dict, Config)):  # a rule about several keys names them itself
            lines.append(message)
        else:
            lines.append(f"{key}={item.get('input')!r}: {message}")
    return ValueError(f"{source}: " + "; ".join(lines))


def dotted_keys(config: Config, prefix: str = "") -> dict[str, Any]:
    """All leaf settings as {'train.steps': 100, ...}; dictionaries of configs are walked too."""
    leaves: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        items = value.items() if isinstance(value, dict) else None
        if isinstance(value, Config):
            leaves |= dotted_keys(value, f"{prefix}{name}.")
        elif items is not None and all(isinstance(v, Config) for _, v in items):
            for key, child in items:
                leaves |= dotted_keys(child, f"{prefix}{name}.{key}.")
        else:
            leaves[prefix + name] = value
    return leaves
