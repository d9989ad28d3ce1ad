"""Folders that Hugging Face transformers opens, out and in: 2.0 models with a modeling file of their own, v1 models as
transformers' own `Data2Vec{Audio,Text,Vision}` classes."""

from __future__ import annotations

from d2v_ds.convert.huggingface.reader import read_huggingface
from d2v_ds.convert.huggingface.writer import write_huggingface

__all__ = ["read_huggingface", "write_huggingface"]
