"""A beam search finds what the language model thinks likelier among what sounds alike; what it lacks is said first."""

from __future__ import annotations

import base64
import gzip
import math
import sys
import zlib
from pathlib import Path

import pytest
import torch

from d2v_ds.cli import read_search
from d2v_ds.modalities.audio.vocabulary import LETTERS, open_vocabulary
from d2v_ds.tasks.beam import Beam, BeamDecoder

ARPA = """\\data\\
ngram 1=7
ngram 2=4

\\1-grams:
-2.0\t<unk>
-99\t<s>\t0
-1.0\t</s>
-1.0\ti\t-0.3
-1.0\tsee\t-0.3
-1.0\tthe\t-0.3
-1.0\tsea\t-0.3

\\2-grams:
-0.2\t<s> i
-0.1\ti see
-0.1\tthe sea
-0.3\tsea </s>

\\end\\
"""
BINARY = (
    "eNrLzU0sUMjJVcgoKSmw0tfPzkhNTMtMzUnRS87P1U/OT0lVSMsvyk0sUShLLSrOzM9TMOViQIAGeyCxnxFI/AcCkAgjVIYJTB6w"
    "Z4KKgTA7VI4FyQQ2KF1Qp7jXsq2UYX7sJb1nKVpSXDnfP9YWP8jWXvRUao269ZLJmTedQo7X3Dp+6PhNG5/m20hGHAA5BME9dogB"
    "BTTsnzVz5j5kPohgRJNnIsBnRjUUxQ/IIC8t7V2osfHl42lpz+KAGmtQZG1K87LtGGyK7RiKU1MZbPSBjJKMVCAnkSGTAQCcg1Vm"
)
"""ARPA by KenLM's `build_binary trie`, zlib in base64."""


@pytest.fixture
def arpa(tmp_path) -> str:
    path = tmp_path / "lm.arpa"
    path.write_text(ARPA)
    return str(path)


def say(text: str, doubts: dict[int, str], symbols: tuple[str, ...] = LETTERS) -> torch.Tensor:
    """Logits (T, C) of a text, a blank after each letter; at some letters another one is as likely, or nearly."""
    ids = open_vocabulary().encode(text)
    logits = torch.full((2 * len(ids), len(symbols)), -9.0)
    for i, letter in enumerate(ids):
        logits[2 * i, letter], logits[2 * i + 1, 0] = 5.0, 5.0
        if i in doubts:
            logits[2 * i, symbols.index(doubts[i])] = 5.3
    return logits


def test_the_language_model_decides_between_what_sounds_alike(arpa):
    """The best path hears THE SEE and I SEA, each a little; the model's bigrams say THE SEA and I SEE."""
    decode = BeamDecoder(LETTERS, Beam(lm=arpa)).decode
    free = BeamDecoder(LETTERS, Beam()).decode
    for truth, doubts, heard in (("THE SEA", {6: "E"}, "THE SEE"), ("I SEE", {4: "A"}, "I SEA")):
        logits = say(truth, doubts)
        assert free(logits) == heard and decode(logits) == truth
        deaf = BeamDecoder(LETTERS, Beam(lm=arpa, lm_weight=0.0)).decode
        assert deaf(logits) == heard  # so it was the model that decided
    assert decode(say("SEA", {})) == "SEA"


def test_a_lexicon_limits_the_words_and_needs_no_model(tmp_path):
    path = tmp_path / "lexicon.txt"
    path.write_text("cat C A T |\nbat B A T\n")
    decode = BeamDecoder(LETTERS, Beam(lexicon=str(path))).decode
    assert decode(say("CAT BAT", {2: "R"})) == "CAT BAT"


def test_pieces_are_found_without_a_space():
    symbols = ("<blank>", "\u2581he", "llo", "\u2581you")
    logits = torch.full((6, 4), -9.0)
    logits[range(6), [1, 0, 2, 0, 3, 0]] = 5.0
    assert BeamDecoder(symbols, Beam()).decode(logits) == "hello you"


def test_what_a_search_cannot_use_is_named(arpa, tmp_path, monkeypatch):
    empty = tmp_path / "empty.arpa"
    empty.write_text("\\data\\\nngram 1=1\n\n\\1-grams:\n-1.0\t<s>\t-0.3\n\\end\\\n")
    with pytest.raises(ValueError, match="empty.arpa lists no words"):
        BeamDecoder(LETTERS, Beam(lm=str(empty)))
    with pytest.raises(ValueError, match="nowhere.arpa does not exist"):
        BeamDecoder(LETTERS, Beam(lm=str(tmp_path / "nowhere.arpa")))
    with pytest.raises(ValueError, match="is a folder; give an ARPA file or KenLM binary"):
        BeamDecoder(LETTERS, Beam(lm=str(tmp_path)))
    binary = tmp_path / "lm.bin"
    binary.write_bytes(b"mmap lm \xff\xfe" * 10)
    with pytest.raises(ValueError, match=r"is no ARPA file; of a KenLM binary .* --lexicon"):
        BeamDecoder(LETTERS, Beam(lm=str(binary)))
    lexicon = tmp_path / "lexicon.txt"
    lexicon.write_text("SEA S E A |\n")
    with pytest.raises(ValueError, match="lm.bin: .*ARPA file of bigrams or more, or a KenLM binary"):
        BeamDecoder(LETTERS, Beam(lm=str(binary), lexicon=str(lexicon)))
    lexicon.write_text("SEA S E A |\nsee s e e\n")
    with pytest.raises(ValueError, match=r"line 2: the model has no 'e', 's'"):
        BeamDecoder(LETTERS, Beam(lm=arpa, lexicon=str(lexicon)))
    lexicon.write_text("\n \n")
    with pytest.raises(
        ValueError, match="lexicon.txt lists no words; a line is a word and its symbols, such as"
    ):
        BeamDecoder(LETTERS, Beam(lexicon=str(lexicon)))
    with pytest.raises(ValueError, match="can write none of its 4 words, such as i, see, the"):
        BeamDecoder(("<s>", "0", "1", "|"), Beam(lm=arpa))
    options = dict.fromkeys(Beam.model_fields) | {"lm": arpa, "decoder": "greedy"}
    with pytest.raises(ValueError, match="lm_weight=nan: must be a number"):
        read_search(options | {"lm_weight": math.nan, "decoder": "beam"})
    with pytest.raises(ValueError, match="--lm is for a beam: add --decoder beam"):
        read_search(options)
    lexicon.write_text("SEA S E A |\nSEE S E E |\n")
    with pytest.raises(
        ValueError, match="lm.arpa knows no word of .*lexicon.txt: it has i, sea, see, not SEA, SEE"
    ):
        BeamDecoder(LETTERS, Beam(lm=arpa, lexicon=str(lexicon)))
    lexicon.write_bytes("caf\u00e9 C A F E |\n".encode("latin-1"))
    with pytest.raises(ValueError, match="lexicon.txt is no UTF-8 text .*; store it as UTF-8"):
        BeamDecoder(LETTERS, Beam(lexicon=str(lexicon)))
    unigrams = tmp_path / "unigrams.arpa"
    unigrams.write_text("\\data\\\nngram 1=2\n\n\\1-grams:\n-1.0\t</s>\n-1.0\tsea\n\n\\end\\\n")
    with pytest.raises(
        ValueError, match=r"\A\S*unigrams.arpa: This ngram .*; a language model is an ARPA file of bigrams"
    ):
        BeamDecoder(LETTERS, Beam(lm=str(unigrams)))
    monkeypatch.setitem(sys.modules, "flashlight.lib.text.decoder", None)
    with pytest.raises(ValueError, match=r"pip install 'd2v_ds\[ctc\]'"):
        BeamDecoder(LETTERS, Beam())


def test_a_gzipped_model_is_one_too(arpa, tmp_path):
    path = tmp_path / "lm.arpa.gz"
    path.write_bytes(gzip.compress(Path(arpa).read_bytes()))
    assert BeamDecoder(LETTERS, Beam(lm=str(path))).decode(say("THE SEA", {6: "E"})) == "THE SEA"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="lm.arpa.gz cannot be read whole"):
        BeamDecoder(LETTERS, Beam(lm=str(path)))


def test_a_kenlm_binary_decides_with_a_lexicon_in_its_own_case(tmp_path):
    binary, lexicon = tmp_path / "lm.bin", tmp_path / "lexicon.txt"
    binary.write_bytes(zlib.decompress(base64.b64decode(BINARY)))
    lexicon.write_text("see S E E |\nthe T H E |\nsea S E A |\n")
    decode = BeamDecoder(LETTERS, Beam(lm=str(binary), lexicon=str(lexicon))).decode
    assert decode(say("THE SEA", {6: "E"})) == "THE SEA"
    lexicon.write_text(lexicon.read_text().upper())
    with pytest.raises(
        ValueError,
        match=r"lm.bin knows no word of \S*lexicon.txt, such as SEE, THE, SEA; write the lexicon's words",
    ):
        BeamDecoder(LETTERS, Beam(lm=str(binary), lexicon=str(lexicon)))


def test_the_last_word_needs_no_space_after_it(arpa):
    """However sure the model is that none is there, as it learns from transcripts."""
    decode = BeamDecoder(LETTERS, Beam(lm=arpa)).decode
    assert decode(10 * say("I SEE", {})) == "I SEE"
