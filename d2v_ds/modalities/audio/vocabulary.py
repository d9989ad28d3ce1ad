"""What a CTC head can write: letters or sentencepiece's pieces; output 0 is the blank.

The letters and their order are those of fairseq's `dict.ltr.txt` for LibriSpeech, so released heads fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

Case = Literal["keep", "upper", "lower"]
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
SPACE = "|"
LETTERS = (*SPECIAL, SPACE, *"ETAONIHSRDLUMWCFGYPBVK'XJQZ")
"""32 outputs; `<s>` is the blank."""
BLANK = "<blank>"
WORD = "\u2581"
"""How sentencepiece writes the space before a word."""
BYTES = re.compile(r"(?:<0x[0-9A-F]{2}>)+")
MARK = re.compile(r"<[^<>]+>")
"""A symbol that is no text: the blank, the unknown, the bytes of sentencepiece."""
SHOWN = 8


class Vocabulary:
    """Symbols by number, and transcripts as those numbers.

    `pieces`: the sentencepiece model whose pieces follow the blank; None = a symbol is a letter, `|` the space.
    """

    def __init__(self, symbols: tuple[str, ...], case: Case = "keep", pieces: Any = None):
        self.symbols, self.case, self.pieces = symbols, case, pieces
        self.numbers = {symbol: i for i, symbol in enumerate(symbols)}
        if len(self.numbers) < len(symbols):
            twice = sorted({symbol for symbol in symbols if symbols.count(symbol) > 1})
            raise ValueError(
                f"a vocabulary has {', '.join(twice[:SHOWN])} twice; each symbol stands there once"
            )

    def encode(self, text: str) -> list[int]:
        """Numbers of a transcript; runs of white space are one space. Empty text has none.

        Raises ValueError for symbols that the vocabulary does not have.
        """
        text = " ".join(change_case(text, self.case).split())
        if self.pieces is not None:
            self.refuse({symbol for symbol in set(text) - {" "} if not self.knows(symbol)})
            return [i + 1 for i in self.pieces.encode(text)]
        self.refuse(set(text) - self.numbers.keys() - {" "} | ({SPACE} & set(text)))
        if " " in text and SPACE not in self.numbers:
            raise ValueError(
                f"a transcript has a space, for which the symbols have no {SPACE!r}; add it to task.labels"
            )
        if self.symbols[0] in text:
            raise ValueError(
                f"a transcript has {self.symbols[0]!r}, which is output 0, CTC's blank; put a symbol before it that "
                "no transcript has, such as <s>, in task.labels"
            )
        return [self.numbers[SPACE if symbol == " " else symbol] for symbol in text]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of numbers without blanks and repeats (`d2v_ds.convert.features.spell`)."""
        return join_symbols(self.symbols[i] for i in ids)

    def refuse(self, unknown: set[str]) -> None:
        if not unknown:
            return
        shown = ", ".join(map(repr, sorted(unknown)[:SHOWN]))
        other = [
            case for case in ("upper", "lower") if all(self.knows(change_case(s, case)) for s in unknown)
        ]
        remedy = (
            f"write all in {other[0]} case (task.case={other[0]})" if other else "normalise the transcripts"
        )
        letters = sorted(symbol for symbol in self.symbols if len(symbol) == 1 and symbol != SPACE)
        known = "" if self.pieces else f"; it has {''.join(letters)}"
        raise ValueError(
            f"a transcript has {shown}, which the vocabulary of {len(self.symbols)} symbols lacks{known}; {remedy}"
        )

    def knows(self, symbol: str) -> bool:
        if self.pieces is not None:
            return self.pieces.unk_id() not in self.pieces.encode(symbol)
        return symbol in self.numbers and symbol != SPACE


def change_case(text: str, case: Case) -> str:
    return {"keep": str, "upper": str.upper, "lower": str.lower}[case](text)


def case_of(symbols: Iterable[str]) -> Case:
    """How a head writes: "upper" or "lower" where its symbols have such letters alone, else "keep"."""
    letters = "".join(symbol for symbol in symbols if not MARK.fullmatch(symbol))
    has = any(map(str.isupper, letters)), any(map(str.islower, letters))
    return {(True, False): "upper", (False, True): "lower"}.get(has, "keep")


def writable(symbols: Iterable[str]) -> set[str] | None:
    """The characters that a head can write, the space left out; None = all, by bytes."""
    symbols = list(symbols)
    if any(BYTES.fullmatch(symbol) for symbol in symbols):
        return None
    return {letter for symbol in symbols if not MARK.fullmatch(symbol) for letter in symbol} - {SPACE, WORD}


def join_symbols(symbols: Iterable[str]) -> str:
    """Letters or pieces as text: `|` and sentencepiece's mark are spaces, runs of its bytes characters."""
    text = BYTES.sub(lambda run: bytes.fromhex(run[0].replace("<0x", " ").replace(">", "")).decode(errors="replace"),
                     "".join(symbols))  # fmt: skip
    return " ".join(text.replace(SPACE, " ").replace(WORD, " ").split())


def open_vocabulary(source: str | Path | None = None, case: Case = "keep") -> Vocabulary:
    """The letters of LibriSpeech (None), those of a fairseq dictionary (dict.ltr.txt) or the pieces of a
    sentencepiece model (.model).

    Raises ValueError for a file that is neither.
    """
    if source is None:
        return Vocabulary(LETTERS, case)
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(
            f"vocabulary {path} does not exist; give a fairseq dictionary (dict.ltr.txt) or a sentencepiece model "
            "(.model), or leave it out for the 32 letters of LibriSpeech"
        )
    if path.suffix == ".model":
        pieces = open_pieces(path)
        symbols = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
        return Vocabulary((BLANK, *symbols), case, pieces)
    return Vocabulary(read_dictionary(path), case)


def read_dictionary(path: Path) -> tuple[str, ...]:
    """fairseq's: a symbol and its count a line, after four special ones that are not in the file."""
    symbols = []
    for number, line in enumerate(read_lines(path), 1):
        words = line.split()
        if words and (len(words) > 2 or not words[-1].isdigit()):
            raise ValueError(
                f"{path}, line {number}: {line[:40]!r} must be a symbol and its count, as in fairseq's dict.ltr.txt"
            )
        symbols += words[:1]
    if SPACE not in symbols:
        raise ValueError(f"{path} has no symbol for the space between words: add a line '{SPACE} 1'")
    return (*SPECIAL, *symbols)


def read_lines(path: Path) -> list[str]:
    """ValueError if it is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start}); store it as UTF-8") from error


def open_pieces(path: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is no sentencepiece model: {error}") from error
