"""CTC decoding by beam search with a lexicon and an n-gram language model: torchaudio's decoder, on flashlight-text.

A language model is an ARPA file or a KenLM binary, of words. A lexicon says how each word is spelt in symbols of the
head; an ARPA file is its own lexicon, since its words are listed in it. Without either, symbols are searched freely.
"""

from __future__ import annotations

import gzip
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from d2v_ds.config import Config
from d2v_ds.modalities.audio.vocabulary import SPACE, WORD, case_of, change_case, join_symbols, read_lines

REMEDY = "pip install 'd2v_ds[ctc]'"
NO_WORDS = {"<s>", "</s>", "<unk>", "<UNK>"}


class Beam(Config):
    """How to search; scores are added to the log probabilities of the symbols."""

    lm: str | None = None
    """ARPA file or KenLM binary, of words."""
    lexicon: str | None = None
    """A word and its symbols a line; None = the words of the ARPA file."""
    beam: PositiveInt = 50
    """Hypotheses that are kept after each frame."""
    threshold: PositiveFloat = 50.0
    """Those this much worse than the best are dropped."""
    lm_weight: float = 2.0
    word_score: float = -1.0
    """Added for each word of a lexicon."""
    silence: float = 0.0
    """Added for each space between words."""


class BeamDecoder:
    """`decode(logits_TC)` gives a text. Symbol 0 is the blank.

    Raises ValueError if the search's library is missing, a file cannot be read or no word of it can be spelt.
    """

    def __init__(self, symbols: tuple[str, ...], settings: Beam):
        self.symbols, self.has_lexicon = symbols, bool(settings.lm or settings.lexicon)
        for path in filter(None, (settings.lm, settings.lexicon)):
            if not Path(path).is_file():
                what = "is a folder" if Path(path).is_dir() else "does not exist"
                raise ValueError(f"{path} {what}; give an ARPA file or KenLM binary, and a lexicon")
        build = import_decoder(bool(settings.lm))
        spelt = spellings(symbols, settings) if self.has_lexicon else None
        if spelt == []:
            raise ValueError(
                f"{settings.lexicon} lists no words; a line is a word and its symbols, such as {example(symbols)}"
            )
        space = SPACE if SPACE in symbols else symbols[0]  # of pieces, which need none, the blank
        with tempfile.TemporaryDirectory() as folder:
            lexicon = None
            if spelt is not None:
                lexicon = Path(folder) / "lexicon.txt"
                lexicon.write_text("".join(f"{word}\t{' '.join(s)}\n" for word, s in spelt), encoding="utf-8")
            try:
                self.search = build(
                    lexicon=None if lexicon is None else str(lexicon),
                    tokens=list(symbols),
                    lm=settings.lm,
                    beam_size=settings.beam,
                    beam_threshold=settings.threshold,
                    lm_weight=settings.lm_weight,
                    word_score=settings.word_score,
                    sil_score=settings.silence,
                    blank_token=symbols[0],
                    sil_token=space,
                )
            except (RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[-1]  # before it, where in KenLM's source that is
                raise ValueError(
                    f"{settings.lm or settings.lexicon}: {reason}; a language model is an ARPA file of bigrams or "
                    "more, or a KenLM binary"
                ) from error
        if settings.lm and settings.lexicon and not self.knows_a_word():
            raise ValueError(
                f"{settings.lm} knows no word of {settings.lexicon}, such as {', '.join(w for w, _ in spelt[:3])}; "
                "write the lexicon's words as the language model does, in its case"
            )

    def decode(self, logits_TC: Tensor) -> str:
        scores_TC = torch.log_softmax(logits_TC.float().cpu(), dim=-1)
        if self.has_lexicon and SPACE in self.symbols:
            scores_TC = torch.cat([scores_TC, self.end()])
        (found,) = self.search(scores_TC[None].contiguous())
        if not found:
            return ""
        if self.has_lexicon:
            return change_case(" ".join(found[0].words), case_of(self.symbols))
        return join_symbols(self.symbols[i] for i in found[0].tokens.tolist())

    def knows_a_word(self) -> bool:
        """Whether the language model gives any word another score than the unknown one; a binary lists none."""
        words, lm = self.search.word_dict, self.search.lm
        start, unknown = lm.start(False), words.get_index("<unk>")
        return any(lm.score(start, i)[1] != lm.score(start, unknown)[1] for i in range(words.index_size()))

    def end(self) -> Tensor:
        """A frame (1, C) in which the last word may end: a transcript has no space after it, a spelling has."""
        scores_1C = torch.full((1, len(self.symbols)), -1e4)
        scores_1C[0, [0, self.symbols.index(SPACE)]] = 0
        return scores_1C


def import_decoder(needs_lm: bool) -> Any:
    """torchaudio's builder of decoders."""
    try:
        import flashlight.lib.text.decoder  # noqa: F401

        if needs_lm:
            import flashlight.lib.text.decoder.kenlm  # noqa: F401
    except ImportError as error:
        raise ValueError(f"beam search needs flashlight-text with KenLM: {REMEDY}") from error
    from torchaudio.models.decoder import ctc_decoder

    return ctc_decoder


def spellings(symbols: tuple[str, ...], settings: Beam) -> list[tuple[str, list[str]]]:
    """Words and their symbols; of an ARPA file those that the head can write, in capitals or small letters if it
    has only those."""
    if settings.lexicon:
        spelt = list(read_lexicon(Path(settings.lexicon), symbols))
        check_known(settings, {word for word, _ in spelt})
        return spelt
    known = set(symbols)
    if SPACE not in known:
        raise ValueError(
            f"{settings.lm}: how its words are spelt in pieces is not known; name a lexicon: lines 'word piece piece'"
        )
    words = list(read_words(Path(settings.lm)))
    if not words:
        raise ValueError(f"{settings.lm} lists no words under \\1-grams: is the file whole?")
    case = case_of(symbols)
    spelt = [(word, [*change_case(word, case), SPACE]) for word in words]
    spelt = [(word, letters) for word, letters in spelt if known.issuperset(letters)]
    if not spelt:
        raise ValueError(
            f"{settings.lm}: the model can write none of its {len(words)} words, such as {', '.join(words[:3])}; "
            "take a language model of the same letters, or name a lexicon"
        )
    return spelt


def check_known(settings: Beam, words: set[str]) -> None:
    """Raises ValueError for a lexicon of which the language model, if it is an ARPA file, knows no word."""
    try:
        theirs = set(read_words(Path(settings.lm))) if settings.lm else set()
    except ValueError:  # a KenLM binary, or what KenLM refuses
        return
    if words and theirs and words.isdisjoint(theirs):
        raise ValueError(
            f"{settings.lm} knows no word of {settings.lexicon}: it has {', '.join(sorted(theirs)[:3])}, not "
            f"{', '.join(sorted(words)[:3])}; write the lexicon's words as the language model does, in its case"
        )


def read_lexicon(path: Path, symbols: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """`word symbol symbol ...` a line; `|` is added at its end if the head has it.

    Raises ValueError for symbols that the head does not have.
    """
    for number, line in enumerate(read_lines(path), 1):
        word, *spelt = line.split() or [""]
        if not word:
            continue
        if SPACE in symbols and spelt[-1:] != [SPACE]:
            spelt.append(SPACE)
        if len(spelt) < 2 and SPACE in symbols or not spelt:
            raise ValueError(f"{path}, line {number}: {line.strip()!r} must be a word and its symbols")
        if unknown := set(spelt) - set(symbols):
            raise ValueError(
                f"{path}, line {number}: the model has no {', '.join(map(repr, sorted(unknown)[:8]))}; a line is "
                f"a word and its symbols, such as {example(symbols)}"
            )
        yield word, spelt


def example(symbols: Iterable[str]) -> str:
    return "'HELLO H E L L O |'" if SPACE in set(symbols) else f"'hello {WORD}he l lo'"


def read_words(path: Path) -> Iterator[str]:
    """The words of an ARPA file, plain or gzip."""
    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    inside = False
    try:
        with gzip.open(path, "rt", encoding="utf-8") if is_gzip else open(path, encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("\\"):
                    if inside:
                        return
                    inside = line.strip() == "\\1-grams:"
                elif inside and line.strip():
                    word = line.split()[1]
                    if word not in NO_WORDS:
                        yield word
        found = inside
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} cannot be read whole ({error}); fetch or compress it anew") from error
    except (UnicodeDecodeError, IndexError):
        found = False
    if not found:
        raise ValueError(
            f"{path} is no ARPA file; of a KenLM binary the words are not listed: name a lexicon, --lexicon"
        )
