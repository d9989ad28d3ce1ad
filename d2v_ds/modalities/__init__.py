"""The modalities: one folder each, which says how to read its samples, embed and mask them, and which recipes exist.

To add one: a folder with `net.py`, `samples.py`, `inputs.py`, `recipes.py`, and a line in `MODALITIES`.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from d2v_ds.config import nearest

MODALITIES = {
    "image": ("ImageConfig", "ImageSamples"),
    "audio": ("AudioConfig", "AudioSamples"),
    "text": ("TextConfig", "TextSamples"),
}


def net(name: str) -> ModuleType:
    """The module with a modality's `build_encoder`, `init_encoder`, `build_decoder`, `init_decoder`."""
    return import_module(f"d2v_ds.modalities.{known(name)}.net")


def inputs(name: str) -> ModuleType:
    """The module with a modality's `listed` and `prepare`: what users give -> rows that the model takes."""
    return import_module(f"d2v_ds.modalities.{known(name)}.inputs")


def config_class(name: str) -> type:
    return getattr(net(name), MODALITIES[name][0])


def samples_class(name: str) -> Any:
    return getattr(import_module(f"d2v_ds.modalities.{known(name)}.samples"), MODALITIES[name][1])


def known(name: str) -> str:
    if name not in MODALITIES:
        raise ValueError(f"unknown modality '{name}'{nearest(name, MODALITIES)}")
    return name
