"""Text -> ids of pieces, by a sentencepiece model or a `tokenizer.json`, with fairseq's special ids 0 to 3.

A `tokenizer.json` is what the `tokenizers` library writes; `d2v tokenizer import` makes one of the byte-level BPE that
released text models were trained with. What is in a text is text: `<s>` written there is three characters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sentencepiece

BOS, PAD, EOS, UNK = range(4)
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"
"""The last id of a model's vocabulary; no text has it."""


def load_tokenizer(model: bytes, vocabulary: int, path: Path, has_mask: bool = False) -> Any:
    """An object whose `encode(text)` gives ids without <s> and </s>.

    ValueError unless the special ids are 0 to 3 and all ids, with that of <mask> if `has_mask`, are below `vocabulary`.
    """
    is_json = model[:64].lstrip().startswith(b"{")
    tokenizer = JsonTokenizer.read(model, path) if is_json else load_sentencepiece(model, path)
    size = tokenizer.num_pieces if is_json else tokenizer.get_piece_size()
    if size + has_mask > vocabulary:
        raise ValueError(
            f"{path} has {size} pieces{' and view=masked needs one id more' * has_mask}, more "
            f"than modalities.text.vocabulary={vocabulary}; set that to at least the number of pieces"
            f"{' + 1' * has_mask}"
        )
    return tokenizer


def load_sentencepiece(model: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError(
            f"{path} is no sentencepiece model ({error}); train one with `d2v tokenizer train`"
        ) from error
    special = (tokenizer.bos_id(), tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.unk_id())
    if special != (BOS, PAD, EOS, UNK):
        raise ValueError(
            f"{path}: ids of <s>, <pad>, </s>, <unk> are {special}, must be {(BOS, PAD, EOS, UNK)}; "
            "train it with bos_id=0 pad_id=1 eos_id=2 unk_id=3, or by `d2v tokenizer train`"
        )
    return tokenizer


class JsonTokenizer:
    """A `tokenizer.json`. Pieces with ids beyond <mask>, which a released dictionary lacks, are <unk>."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        mask = tokenizer.token_to_id(MASK)
        self.num_pieces = tokenizer.get_vocab_size() if mask is None else mask
        """The ids that a text can have: those before <mask>."""
        self.num_unknown = 0 if mask is None else max(0, tokenizer.get_vocab_size() - 1 - mask)

    @classmethod
    def read(cls, model: bytes, path: Path) -> JsonTokenizer:
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(model.decode())
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(f"{path} is no tokenizer.json: {error}") from error
        ids = tuple(tokenizer.token_to_id(name) for name in SPECIAL)
        if ids != (BOS, PAD, EOS, UNK):
            raise ValueError(
                f"{path}: ids of {', '.join(SPECIAL)} are {ids}, must be {(BOS, PAD, EOS, UNK)}, as in fairseq's "
                "text models; make one of their encoder.json, vocab.bpe and dict.txt with `d2v tokenizer import`"
            )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # as text
        made = cls(tokenizer)
        if made.num_unknown > made.num_pieces:
            raise ValueError(
                f"{path}: the id of {MASK} is {made.num_pieces}, and {made.num_unknown} pieces beyond it would be read "
                f"as <unk>; {MASK} must be the last: make one of whole encoder.json, vocab.bpe and dict.txt with "
                "`d2v tokenizer import`"
            )
        return made

    def encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [i if i < self.num_pieces else UNK for i in ids]

    def __getstate__(self) -> str:
        return self.tokenizer.to_str()

    def __setstate__(self, state: str) -> None:
        self.__init__(JsonTokenizer.read(state.encode(), Path("tokenizer.json")).tokenizer)
