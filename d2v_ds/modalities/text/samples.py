"""Documents in shards -> blocks of tokens, or one padded sample each, with their masks."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import PositiveInt, model_validator

from d2v_ds.data import Buckets, Corpus, Draw, Share, TextBlocks, Volume
from d2v_ds.data.buckets import expected_extremes
from d2v_ds.modalities.source import StreamConfig, column_name, draw_views, pad_stack
from d2v_ds.modalities.text.tokenizer import BOS, EOS, PAD, load_tokenizer
from d2v_ds.model.batch import Batch
from d2v_ds.model.tuned import Task, as_labels

PARTS = ("text", "pair")
"""Fields of a sample that are text."""
MAX_KEPT_TOKENS = 1 << 23
"""Of the documents that were read last: 32 MB of a worker."""


class TextData(StreamConfig):
    fields: str = "txt;json.text"
    """Extensions that hold the text, best first; `json.text` is the key `text` of a json member."""
    pair: str | None = None
    """Of mode=samples: the member or json key with a second text, read as `<s> A </s> </s> B </s>`; None = none."""
    mode: Literal["blocks", "samples"] = "blocks"
    """blocks: consecutive tokens of a shard, across documents; samples: one padded sequence a sample."""
    tokenizer: str = "sentencepiece.model"
    """Path of the sentencepiece model or tokenizer.json, as it is or inside the data folder."""
    batch_tokens: PositiveInt | None = None
    """Of mode=samples: a micro-batch holds texts of like length, as many as number x longest <= this, and at most
    `batch`. None: `batch` of them, whatever their length."""

    @model_validator(mode="after")
    def has_lengths(self) -> TextData:
        if self.batch_tokens is not None and self.mode == "blocks":
            raise ValueError(
                f"data.batch_tokens={self.batch_tokens} has no meaning with data.mode=blocks, which are of one length; "
                "set data.batch, or data.mode=samples"
            )
        if self.pair is not None and self.mode == "blocks":
            raise ValueError(
                f"data.pair={self.pair} has no meaning with data.mode=blocks; set data.mode=samples"
            )
        return self


class TextSamples:
    """A block is max_tokens - 1 consecutive tokens of one shard in stored order, after `<s>`; every document
    ends in `</s>`. A shard's last, incomplete block is left out."""

    min_length = 1

    def __init__(self, config: Any, folder: Path, tokenizer: Any = None):
        """`tokenizer`: an object whose `encode(text)` gives ids, in place of the file that the config names."""
        self.config = config
        self.fields = {"text": config.data.fields}
        if config.data.pair is not None:
            self.fields["pair"] = config.data.pair
        if tokenizer is not None:
            self.tokenizer, self.files, self.measure_name = tokenizer, (), ""
            return
        path = find_tokenizer(config.data.tokenizer, folder)
        self.files = (path,)  # what an export needs besides the weights
        model = path.read_bytes()
        self.measure_name = column_name(f"tokens-{hashlib.sha256(model).hexdigest()[:12]}", config.data)
        if config.data.pair is not None:
            self.measure_name += f"-pair-{hashlib.sha256(config.data.pair.encode()).hexdigest()[:8]}"
        self.tokenizer = load_tokenizer(model, config.vocabulary, path, has_mask=config.view == "masked")

    def with_pair(self, pair: str) -> TextSamples:
        """The same, with a second text from this member or json key; one sequence a sample."""
        data = self.config.data.model_copy(update={"mode": "samples", "pair": pair})
        other = copy.copy(self)
        other.config = self.config.model_copy(update={"data": data})
        other.fields = {**self.fields, "pair": pair}
        return other

    def measure(self, fields: dict[str, bytes]) -> int:
        """Tokens of a document, or of a pair, with end tokens."""
        return len(self.sequence(*(fields[name] for name in PARTS if name in fields))) - 1

    def sequence(self, text: bytes | str, pair: bytes | str | None = None) -> list[int]:
        """`<s> A </s>` or `<s> A </s> </s> B </s>`, whole."""
        ids = [BOS, *self.encode(text)]
        return ids if pair is None else [*ids, EOS, *self.encode(pair)]

    def cut(self, ids: list[int], is_pair: bool) -> list[int]:
        """A sequence of at most max_tokens: of a pair the longer text loses its end, of one text the end goes."""
        limit = self.config.max_tokens
        if len(ids) <= limit or not is_pair:
            return ids[:limit]
        first = ids.index(EOS)  # no text has it: what is written there is characters
        a, b = ids[1:first], ids[first + 2 : -1]
        room = limit - 4
        keep_a = max(room - len(b), min(len(a), room - room // 2))
        return [BOS, *a[:keep_a], EOS, EOS, *b[: room - keep_a], EOS]

    def encode(self, text: bytes | str) -> list[int]:
        """Ids of one document, closed by </s>; ValueError if the bytes are no UTF-8 or hold no text."""
        text = text.decode() if isinstance(text, bytes) else text  # UnicodeDecodeError is a ValueError
        text.encode()  # UnicodeEncodeError, of half a pair of surrogates, is one too
        ids = self.tokenizer.encode(text)
        if not ids:
            raise ValueError("document without any text")
        return [*ids, EOS]

    def attach(self, corpus: Corpus) -> None:
        if self.config.data.mode == "samples":
            self.unit_starts = corpus.shard_starts
            return
        self._documents: OrderedDict[int, np.ndarray] = OrderedDict()
        self._kept_tokens = 0
        self.blocks = TextBlocks.build(corpus.lengths, self.config.max_tokens - 1)
        self.unit_starts = self.blocks.block_starts

    def buckets(self, corpus: Corpus, shards: range) -> Buckets | None:
        data, longest = self.config.data, self.config.max_tokens - 1
        if data.batch_tokens is None:
            return None
        return Buckets(corpus.lengths, shards, data.batch_tokens, data.batch, longest, extra=1)  # <s>

    def volume(self, corpus: Corpus, share: Share, batch: int) -> Volume:
        """In tokens, with each sequence's <s>; a micro-batch is padded to its longest."""
        if self.config.data.mode == "blocks":
            return Volume("tokens", share.size * self.config.max_tokens, batch * self.config.max_tokens)
        if share.buckets:
            stored, _, padded = share.buckets.filling()
        else:
            counts = corpus.lengths.count(
                corpus.lengths.shards_of(share.first, share.size), self.config.max_tokens - 1
            )
            values = np.arange(len(counts)) + 1
            stored, padded = values @ counts, share.size * expected_extremes(values, counts, batch)[1]
        tokens = stored / share.batches(batch)
        return Volume(
            "tokens", float(stored), tokens, padding=1 - stored / padded, budget=self.config.data.batch_tokens
        )

    def label(self, corpus: Corpus, unit: int) -> str:
        if self.config.data.mode == "samples":
            return (
                f"{corpus.key(unit)} {min(corpus.lengths.of_unit(unit) + 1, self.config.max_tokens)} tokens"
            )
        first, offset, last = self.blocks.locate(unit)
        return f"{corpus.key(first)} from token {offset}" + (
            f" to {corpus.key(last)}" if last > first else ""
        )

    def decode(self, corpus: Corpus, unit: int) -> str | tuple[str, str]:
        """One whole sample as `prepare` takes it."""
        fields = corpus.read(unit)
        text = fields["text"].decode()
        return (text, fields["pair"].decode()) if "pair" in self.fields else text

    def raw(self, texts: list[str] | list[tuple[str, str]]) -> torch.Tensor:
        """Token counts, for a baseline; (N, V)."""
        all_ids = [
            self.sequence(text)[1:] if isinstance(text, str) else self.sequence(*text)[1:] for text in texts
        ]
        counts = [np.bincount(ids, minlength=self.config.vocabulary) for ids in all_ids]
        return torch.from_numpy(np.stack(counts)).float()

    def read(self, corpus: Corpus, unit: int) -> np.ndarray:
        """Token ids with <s>; (max_tokens,) for a block, any length up to it for a sample."""
        limit = self.config.max_tokens - 1
        if self.config.data.mode == "samples":
            fields = corpus.read(unit)
            ids = self.sequence(*(fields[name] for name in PARTS if name in fields))
            return np.array(self.cut(ids, "pair" in fields))
        first, offset, last = self.blocks.locate(unit)
        parts, missing = [[BOS]], limit
        for document in range(first, last + 1):
            ids = self._document(corpus, document)
            parts.append(ids[offset : offset + missing])
            missing -= len(parts[-1])
            offset = max(offset - len(ids), 0)
        if missing:
            raise corpus.corrupt(
                first, f"block of {limit - missing} tokens instead of {limit}: token counts are stale"
            )
        return np.concatenate(parts, dtype=np.int64)

    def _document(self, corpus: Corpus, document: int) -> np.ndarray:
        """The ids of a document; of a long one each block would take all of it through the tokenizer again."""
        if document in self._documents:
            self._documents.move_to_end(document)
            return self._documents[document]
        ids = np.array(self.encode(corpus.read(document)["text"]), dtype=np.int32)
        if len(ids) <= MAX_KEPT_TOKENS:
            self._documents[document] = ids
            self._kept_tokens += len(ids)
        while self._kept_tokens > MAX_KEPT_TOKENS:
            self._kept_tokens -= len(self._documents.popitem(last=False)[1])
        return ids

    def collate(self, rows: list[np.ndarray], draws: list[Draw]) -> Batch:
        lengths = [len(row) for row in rows]
        source = torch.full((len(rows), max(lengths)), PAD)
        for i, row in enumerate(rows):
            source[i, : len(row)] = torch.from_numpy(row)
        padding = source == PAD
        views = draw_views(draws, lengths, self.config)
        return Batch("text", source, padding if bool(padding.any()) else None, **views)

    def collate_whole(
        self, rows: list[np.ndarray], draws: list[Draw], labels: list[float], task: Task
    ) -> Batch:
        """Whole texts, padded, and what they are."""
        batch = self.pad([torch.from_numpy(row) for row in rows])
        return dataclasses.replace(batch, labels=as_labels(labels, task.outputs))

    def prepare(self, text: str | torch.Tensor | list[int]) -> torch.Tensor:
        """One text as a trained model sees it: <s>, ids, </s>, cut to max_tokens; (T,). Ids are taken as they are."""
        if not isinstance(text, str):
            return torch.as_tensor(text)[: self.config.max_tokens]
        return torch.tensor(self.cut(self.sequence(text), False))

    def pad(self, rows: list[torch.Tensor]) -> Batch:
        source, padding = pad_stack(rows, PAD)
        return Batch("text", source, padding)


def find_tokenizer(name: str, folder: Path) -> Path:
    for path in (Path(name), folder / name, folder.parent / name):
        if path.is_file():
            return path
    raise ValueError(
        f"tokenizer '{name}' is neither a file nor one in {folder}; "
        "set modalities.text.data.tokenizer=PATH to a sentencepiece model or tokenizer.json; `d2v tokenizer` makes both"
    )
