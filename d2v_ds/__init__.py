"""d2v_ds: train data2vec models (1.0 and 2.0) on images, speech and text, at any scale, on DeepSpeed.

Public names are imported on first use, so `import d2v_ds` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "d2v_ds.convert.load",
    "train": "d2v_ds.training.run",
    "Recipe": "d2v_ds.recipe",
    "Data2Vec": "d2v_ds.model.data2vec",
    "D2vModalitiesConfig": "d2v_ds.multi",
    "Data2VecMultiConfig": "d2v_ds.multi",
    "Data2VecMultiModel": "d2v_ds.multi",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(
            f"module 'd2v_ds' has no attribute '{name}'; it has: {', '.join(sorted(__all__))}"
        )
    return getattr(import_module(_PUBLIC[name]), name)
