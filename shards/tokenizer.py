"""Tokenizers for text models: trained on text shards, or made of the vocabulary of a released model.

    d2v tokenizer train 'shards/openwebtext/*-train-*.tar' --out shards/openwebtext/sentencepiece.model
    d2v tokenizer import FOLDER --out tokenizer.json

`train` makes a sentencepiece model, BPE or unigram. `import` makes a tokenizer.json with the ids of released text
models, from a folder that holds encoder.json, vocab.bpe and dict.txt (fairseq: GPT-2's byte-level BPE and the model's
dictionary), or vocab.json and merges.txt, or tokenizer.json (RoBERTa's, of Hugging Face). In both <s> <pad> </s> <unk>
are 0 to 3. Nothing of this is in the shards: they hold text, and one may be read with any tokenizer.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from d2v_ds.cli import add_remote, reading_remote
from d2v_ds.data import Corpus, CorruptSample, expand_shards
from shards.writer import write_bytes

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"
ADDED = re.compile(r"<.*>|\[.*\]|madeupword\d+")
"""Pieces of a released vocabulary that no rule makes."""
MOST_ADDED = 100
"""Words that somebody added besides."""
KINDS = ("bpe", "unigram")
VOCABULARY = 32000
LINES = 2_000_000
MAX_LINE = 4000
"""Bytes. Longer lines are cut at spaces; sentencepiece would leave them out without a word."""


def main(argv: list[str] | None = None, prog: str = "d2v tokenizer") -> int:
    arguments = build_parser(prog).parse_args(argv)
    try:
        with reading_remote(arguments):
            return arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="a sentencepiece model of text shards", allow_abbrev=False)
    train.add_argument("shards", nargs="+", help="folder, pattern or URLs of shards with texts")
    train.add_argument("--out", type=Path, required=True, help="file to write: sentencepiece.model")
    train.add_argument("--kind", choices=KINDS, default="bpe", help="default: bpe")
    train.add_argument(
        "--vocabulary", type=int, default=VOCABULARY, help=f"number of pieces (default: {VOCABULARY})"
    )
    train.add_argument(
        "--fields", default="txt;json.text", help="members that hold text (default: txt;json.text)"
    )
    train.add_argument("--lines", type=int, default=LINES, help=f"lines to learn from (default: {LINES})")
    train.add_argument("--seed", type=int, default=0, help="which documents are drawn (default: 0)")
    train.add_argument(
        "--threads", type=int, default=1, help="more are faster, and may give other pieces of kind unigram"
    )
    add_remote(train)
    train.set_defaults(run=run_train)
    imported = commands.add_parser("import", help="the vocabulary of a released model", allow_abbrev=False)
    imported.add_argument("folder", type=Path, metavar="FOLDER", help="folder with its files")
    imported.add_argument("--out", type=Path, required=True, help="file to write: tokenizer.json")
    imported.set_defaults(run=run_import)
    return parser


# ---- train ----


def run_train(arguments: argparse.Namespace) -> int:
    for name, least in (("lines", 1), ("threads", 1), ("vocabulary", 1), ("seed", 0)):
        if not least <= (value := getattr(arguments, name)) < 1 << 32:
            raise ValueError(f"--{name} {value} must be from {least} to {(1 << 32) - 1}")
    out = arguments.out
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; give the file to write, as {out}/sentencepiece.model")
    if out.suffix == ".tar":
        raise ValueError(
            f"--out {out} is called as a shard; give the file of the model, as sentencepiece.model"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    corpus = Corpus.open(expand_shards(arguments.shards), {"text": arguments.fields})
    drawn = Drawn(corpus, arguments.lines, arguments.seed)
    try:
        model = train_sentencepiece(drawn, arguments.kind, arguments.vocabulary, arguments.threads)
    except ValueError:
        if drawn.lines:
            raise
        why = f"{drawn.unreadable} are unreadable, one of them: {drawn.example}; " if drawn.unreadable else ""
        raise ValueError(
            f"{' '.join(arguments.shards)} holds no line of text in {drawn.documents + drawn.unreadable} documents; "
            f"{why}name shards with texts, or their members by --fields"
        ) from None
    write_file(arguments.out, model)
    print(f"learned from {drawn.lines} lines of {drawn.documents} documents, of {len(corpus)} that there are")
    if drawn.unreadable:
        print(f"documents left out, being unreadable: {drawn.unreadable}; one of them: {drawn.example}")
    print(f"wrote {arguments.out}; set modalities.text.data.tokenizer={arguments.out}, and")
    print(
        f"modalities.text.vocabulary to {arguments.vocabulary}, or {arguments.vocabulary + 1} if view=masked"
    )
    return 0


class Drawn:
    """Lines of documents in an order drawn from the seed, until there are enough."""

    def __init__(self, corpus: Corpus, num_lines: int, seed: int) -> None:
        self.corpus, self.num_lines, self.seed = corpus, num_lines, seed
        self.lines = self.documents = self.unreadable = 0
        self.example = ""
        """Why one is unreadable."""

    def __iter__(self) -> Iterator[str]:
        for document in np.random.RandomState(self.seed).permutation(len(self.corpus)):
            if self.lines >= self.num_lines:
                return
            try:
                text = self.corpus.read(int(document))["text"].decode()
            except ValueError as error:
                self.unreadable += 1
                is_named = isinstance(error, CorruptSample)
                self.example = str(error) if is_named else f"{self.corpus.key(int(document))}: {error}"
                continue
            self.documents += 1
            for line in text.splitlines():
                for piece in cut_line(line.strip()):
                    self.lines += 1
                    yield piece


def cut_line(line: str, max_bytes: int = MAX_LINE) -> Iterator[str]:
    """The line in pieces of at most `max_bytes`, cut at spaces where there are some; nothing of an empty one."""
    whole, start = line.encode(), 0
    while len(whole) - start > max_bytes:
        end = whole.rfind(b" ", start + 1, start + max_bytes)
        end = end if end > 0 else start + max_bytes
        piece = whole[start:end].decode(
            errors="ignore"
        )  # a character cut in two goes to the next piece, whole
        yield piece
        start += len(piece.encode())
        while whole.startswith(b" ", start):
            start += 1
    if start < len(whole):
        yield whole[start:].decode()


def train_sentencepiece(
    lines: Iterable[str], kind: str, vocabulary: int, threads: int = 1, max_line: int = MAX_LINE + 1
) -> bytes:
    """A sentencepiece model, byte fallback on, with fairseq's special ids; a text and its ids tell the same.

    ValueError if the texts hold fewer different pieces than `vocabulary`, or more characters than it has room for.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=kind,
            vocab_size=vocabulary,
            byte_fallback=True,
            bos_id=0,
            pad_id=1,
            eos_id=2,
            unk_id=3,
            normalization_rule_name="identity",  # the NFKC table alone would add 240 kB to the model
            max_sentence_length=max_line,
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"sentencepiece cannot train {vocabulary} pieces: {error}; set --vocabulary"
        ) from error
    return model.getvalue()


# ---- import ----


def run_import(arguments: argparse.Namespace) -> int:
    if arguments.out.name != "tokenizer.json":
        raise ValueError(
            f"--out {arguments.out} must be called tokenizer.json, as everything that reads it expects"
        )
    content = import_vocabulary(arguments.folder).encode()
    from d2v_ds.modalities.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(content, 1 << 31, arguments.folder)
    pieces = tokenizer.num_pieces
    write_file(arguments.out, content)
    if tokenizer.num_unknown:
        print(f"{tokenizer.num_unknown} pieces, which the dictionary lacks, are read as <unk>")
    print(f"wrote {arguments.out}; set modalities.text.data.tokenizer={arguments.out}, and")
    print(f"modalities.text.vocabulary={pieces + 1}: {pieces} ids of texts, and <mask> last")
    return 0


def import_vocabulary(folder: Path) -> str:
    """tokenizer.json of what a folder holds. ValueError if that is not enough, or the special ids are others."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the one with encoder.json, vocab.bpe and dict.txt")
    if (folder / "tokenizer.json").is_file():
        from d2v_ds.modalities.text.tokenizer import JsonTokenizer

        path = folder / "tokenizer.json"
        JsonTokenizer.read(path.read_bytes(), path)
        return path.read_text(encoding="utf-8")
    names = {
        name: folder / name for name in ("encoder.json", "vocab.bpe", "dict.txt", "vocab.json", "merges.txt")
    }
    there = {name for name, path in names.items() if path.is_file()}
    encoder, merges = (
        ("encoder.json", "vocab.bpe") if "encoder.json" in there else ("vocab.json", "merges.txt")
    )
    if not {encoder, merges} <= there or encoder == "encoder.json" and "dict.txt" not in there:
        raise ValueError(
            f"{folder} holds {', '.join(sorted(there)) or 'none of the files'}; needed are encoder.json, vocab.bpe and "
            "dict.txt of a fairseq model, or vocab.json and merges.txt, or tokenizer.json"
        )
    pieces = read_pieces(names[encoder])
    ids = number_pieces(pieces, names["dict.txt"]) if "dict.txt" in there else pieces
    return build_bpe(ids, read_merges(names[merges], ids)).to_str()


def read_pieces(path: Path) -> dict[str, int]:
    try:
        pieces = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(pieces, dict) or not all(type(i) is int for i in pieces.values()):
        raise ValueError(f"{path} must be an object of pieces and their numbers")
    counts = Counter(pieces.values())
    for piece, number in pieces.items():
        if counts[number] > 1 or not 0 <= number < 1 << 32:
            raise ValueError(
                f"{path}: {piece!r} has the number {number}; each piece must have one of its own, from 0 to "
                f"{(1 << 32) - 1}: get it again"
            )
    return pieces


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); get it again") from error


def number_pieces(pieces: dict[str, int], path: Path) -> dict[str, int]:
    """The ids of a fairseq dictionary: the special ones, its lines in order, <mask>.

    A line is `<number of the piece> <count>`. Pieces that it lacks have ids beyond <mask>, and are read as <unk>.
    """
    names = {number: piece for piece, number in pieces.items()}
    ids = {name: place for place, name in enumerate(SPECIAL)}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        word = line.split(" ")[0]
        if not line.strip():
            continue
        if word.isdigit() and int(word) not in names:
            raise ValueError(
                f"{path}: line {number} is piece {word}, which encoder.json lacks: they do not belong together"
            )
        name = names[int(word)] if word.isdigit() else word  # madeupword0000 fills the dictionary up
        if name in ids:
            raise ValueError(f"{path}: line {number} comes a second time ({name!r})")
        ids[name] = len(ids)
    ids[MASK] = len(ids)
    for piece in pieces:
        ids.setdefault(piece, len(ids))
    return ids


def read_merges(path: Path, ids: dict[str, int]) -> list[tuple[str, str]]:
    """The rules of a BPE, most frequent first: `first second` a line, after one that begins with #version."""
    merges = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip() or number == 1 and line.startswith("#version"):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not {*parts, "".join(parts)} <= ids.keys():
            raise ValueError(f"{path}: line {number}, {line!r}, is no pair of pieces of the vocabulary")
        merges.append((parts[0], parts[1]))
    made = {first + second for first, second in merges}
    lost = [piece for piece in ids if len(piece) > 1 and piece not in made and not ADDED.fullmatch(piece)]
    what = (
        f"{path} has no rule that makes {len(lost)} pieces of the vocabulary, such as {', '.join(lost[:3])}"
    )
    if len(lost) > min(MOST_ADDED, len(made)):
        raise ValueError(f"{what}: it is cut; get it again")
    if lost:
        print(f"warning: {what}: no text gives them; if they are no words that somebody added, it is cut")
    return merges


def build_bpe(ids: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    """GPT-2's byte-level BPE over these ids; no space is put before a text, as fairseq puts none."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE(ids, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL if name in ids])
    if MASK in ids:
        tokenizer.add_special_tokens([AddedToken(MASK, special=True, lstrip=True)])
    return tokenizer


def write_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, lambda file: file.write(content))
