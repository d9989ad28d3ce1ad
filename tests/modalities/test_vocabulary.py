"""Transcripts become numbers of a head's outputs and back; what it cannot write is named with the remedy."""

from __future__ import annotations

import pytest
import sentencepiece
from ranks import SAMPLE

from d2v_ds.modalities.audio.samples import Transcripts
from d2v_ds.modalities.audio.vocabulary import LETTERS, Vocabulary, open_vocabulary


def test_the_letters_are_those_of_fairseqs_dictionary(tmp_path):
    """Numbers as released heads have them; a file in fairseq's format gives the same."""
    vocabulary = open_vocabulary()
    assert len(LETTERS) == 32 and vocabulary.encode("THE  CAT'S\n") == [6, 11, 5, 4, 19, 7, 6, 27, 12]
    path = tmp_path / "dict.ltr.txt"
    path.write_text("".join(f"{letter} {100 - i}\n" for i, letter in enumerate(LETTERS[4:])))
    assert open_vocabulary(path).symbols == LETTERS
    assert vocabulary.decode(vocabulary.encode("IT'S A QUIZ")) == "IT'S A QUIZ"


def test_pieces_follow_the_blank():
    vocabulary = open_vocabulary(SAMPLE / "sentencepiece.model")
    ids = vocabulary.encode("the other one")
    assert 0 not in ids and vocabulary.decode(ids) == "the other one"
    assert [vocabulary.symbols[i] for i in ids] == vocabulary.pieces.encode("the other one", out_type=str)
    assert vocabulary.decode(vocabulary.encode("one \u56db")) == "one \u56db"  # by its bytes


def test_a_character_without_a_piece_is_named(tmp_path):
    (tmp_path / "text").write_text("one two three four five six seven\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=20, minloglevel=2
    )
    vocabulary = open_vocabulary(tmp_path / "m.model")
    assert vocabulary.decode(vocabulary.encode("seven six")) == "seven six"
    with pytest.raises(
        ValueError, match=r"the transcript '\\u200b' of 'txt' has no symbol; leave the sample out"
    ):
        Transcripts(vocabulary, "txt")("\u200b")
    with pytest.raises(ValueError, match="has '8'.*vocabulary of 21 symbols lacks; normalise"):
        vocabulary.encode("one 8")


def test_unknown_symbols_are_named_with_the_remedy():
    with pytest.raises(ValueError, match=r"'a', 'c', 't'.*32 symbols lacks; it has .*task.case=upper"):
        open_vocabulary().encode("cat")
    assert open_vocabulary(case="upper").encode("cat") == open_vocabulary().encode("CAT")
    with pytest.raises(ValueError, match="'4'.*normalise the transcripts"):
        open_vocabulary().encode("4 CATS")
    with pytest.raises(ValueError, match=r"has '\|', .* lacks; it has '[A-Z]*; normalise the transcripts"):
        open_vocabulary().encode("A|B")
    with pytest.raises(ValueError, match=r"has a space, .* no '\|'; add it to task.labels"):
        Vocabulary(("<s>", "A", "B")).encode("A B")


def test_the_blank_is_no_letter():
    """Output 0 is never what a transcript says: the loss would count it as a pause."""
    assert Vocabulary(("-", "A", "B")).encode("AB") == [1, 2]
    with pytest.raises(ValueError, match="has 'A', which is output 0, CTC's blank; put a symbol before it"):
        Vocabulary(("A", "B", "|")).encode("AB B")


def test_a_file_that_is_no_vocabulary_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_vocabulary(tmp_path / "dict.txt")
    (tmp_path / "dict.txt").write_text("| 5\nhello big world\n")
    with pytest.raises(ValueError, match="line 2: 'hello big world'"):
        open_vocabulary(tmp_path / "dict.txt")
    (tmp_path / "dict.txt").write_text("A 5\nB 3\n")
    with pytest.raises(ValueError, match="no symbol for the space"):
        open_vocabulary(tmp_path / "dict.txt")
    (tmp_path / "dict.txt").write_text("| 5\nA 5\nA 3\n")
    with pytest.raises(ValueError, match="A twice"):
        open_vocabulary(tmp_path / "dict.txt")
    (tmp_path / "a.model").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no sentencepiece model"):
        open_vocabulary(tmp_path / "a.model")
