"""What turns raw input into a model's, as files that transformers' Auto classes open."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

from d2v_ds.convert.consolidate import tokenizers
from d2v_ds.modalities.audio.samples import RATE
from d2v_ds.modalities.text.tokenizer import BOS, EOS, MASK, PAD, UNK, load_tokenizer
from d2v_ds.model.encoder import ModalityConfig

BICUBIC = 3
SPACE = "\u2581"  # what sentencepiece writes for a space
SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
UNIGRAM, BPE = 1, 2  # sentencepiece's numbers of its kinds of models
ODD_TEXTS = (
    "a",
    " leading and  double   spaces ",
    "tab\tand\nnew line\r\n",
    "<b> [x] {y}",
    "na\u00efve caf\u00e9 \uff21\uff22\uff23 \u2460 \ufb01 \u00bd",
    "\u4eca\u65e5\u306f \u4e16\u754c \u0645\u0631\u062d\u0628\u0627 \U0001f600\U0001f469\u200d\U0001f680",
    "\u2581 \u2581x a\u0301 \u00a0 \u3000 z",
)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=True) + "\n", encoding="utf-8")


def write_feature_extractor(out: Path, remote: str | None) -> None:
    """preprocessor_config.json for sound; `remote`: the folder's module with a class of our own, None = stock."""
    name = "Wav2Vec2FeatureExtractor" if remote is None else "Data2Vec2FeatureExtractor"
    settings = {
        "feature_extractor_type": name,
        "sampling_rate": RATE,
        "feature_size": 1,
        "padding_value": 0.0,
        "padding_side": "right",
        "do_normalize": True,
        "return_attention_mask": True,
    }
    auto = {} if remote is None else {"auto_map": {"AutoFeatureExtractor": f"{remote}.{name}"}}
    write_json(out / "preprocessor_config.json", settings | auto)


def write_image_processor(out: Path, config: ModalityConfig, remote: str | None) -> None:
    """preprocessor_config.json for images, resized whole as `d2v_ds.load(...).extract` does."""
    name = "BeitImageProcessor" if remote is None else "Data2Vec2ImageProcessor"
    settings = {
        "image_processor_type": name,
        "size": {"height": config.size, "width": config.size},
        "resample": BICUBIC,
        "do_convert_rgb": True,
        "do_resize": True,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.data.mean),
        "image_std": list(config.data.std),
    }
    auto = {} if remote is None else {"auto_map": {"AutoImageProcessor": f"{remote}.{name}"}}
    write_json(out / "preprocessor_config.json", settings | auto)


def write_letters(out: Path, labels: tuple[str, ...]) -> None:
    """The tokenizer of a CTC head, whose blank is output 0: transformers calls that the padding token."""
    write_json(out / "vocab.json", {label: i for i, label in enumerate(labels)})
    special = {"pad_token": labels[0], "word_delimiter_token": "|"}
    special |= {key: token for key, token in SPECIAL.items() if key != "pad_token" and token in labels}
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "Wav2Vec2CTCTokenizer", **special})


def write_tokenizer(out: Path, files: Path | None, config: ModalityConfig) -> str:
    """tokenizer.json made of the sentencepiece model in `files`, or the files of transformers that are there instead;
    returns what the card says about it, empty if all is well.

    The new tokenizer must give the ids of the old one on odd and on random texts, or it is not written.
    """
    found = tokenizers(files) if files else []
    if not found:
        if not files or not copy_foreign(files, out):
            return NO_TOKENIZER
        is_ours = (out / "tokenizer.json").is_file() and not (out / "tokenizer_config.json").is_file()
        if is_ours:  # a tokenizer.json of a run or an export, which transformers needs settings for
            write_tokenizer_config(out, config, {"mask_token": MASK})
        return ""
    model = found[0].read_bytes()
    shutil.copyfile(found[0], out / found[0].name)
    pieces = load_tokenizer(model, config.vocabulary, found[0])
    tokenizer = convert_sentencepiece(model)
    if tokenizer is None:
        return (
            f"No AutoTokenizer: `{found[0].name}` is neither a unigram nor a BPE model; use sentencepiece. "
        )
    for text in sample_texts(pieces):
        expected = pieces.encode(text)
        given = tokenizer.encode(text, add_special_tokens=False).ids
        if expected != given:
            return (
                f"No AutoTokenizer: its ids of {text!a} would be {given}, sentencepiece's are {expected}; "
                f"use `{found[0].name}` with sentencepiece. "
            )
    tokenizer.save(str(out / "tokenizer.json"))
    write_tokenizer_config(out, config)
    return ""


def write_tokenizer_config(out: Path, config: ModalityConfig, more: dict[str, str] | None = None) -> None:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **SPECIAL,
        **(more or {}),
        "cls_token": "<s>",
        "sep_token": "</s>",
        "padding_side": "right",
        "model_max_length": config.max_tokens,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    write_json(out / "tokenizer_config.json", settings)


def copy_foreign(files: Path, out: Path) -> bool:
    """The tokenizer of the transformers folder that the weights were read from, if it has one."""
    present = [name for name in FOREIGN if (files / name).is_file()]
    if not {"tokenizer.json", "vocab.json"} & set(present):
        return False
    for name in present:
        shutil.copyfile(files / name, out / name)
    return True


FOREIGN = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
NO_TOKENIZER = (
    "No tokenizer: the file that these weights were read from holds none (fairseq keeps its dictionary elsewhere). "
    "Models with 50265 tokens of fairseq's GPT-2 BPE have the ids of `AutoTokenizer.from_pretrained"
    '("FacebookAI/roberta-base")`; compare a few with your dictionary. '
)


def convert_sentencepiece(model: bytes) -> Any | None:
    """A `tokenizers.Tokenizer` of a sentencepiece unigram or BPE model, None for other kinds."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, normalizers, processors
    from tokenizers import decoders as text_decoders
    from tokenizers.models import BPE as BPEModel
    from tokenizers.models import Unigram

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    fallback = proto.trainer_spec.byte_fallback
    if proto.trainer_spec.model_type == UNIGRAM:
        tokenizer = Tokenizer(Unigram(pieces, unk_id=UNK, byte_fallback=fallback))
    elif proto.trainer_spec.model_type == BPE:
        vocabulary = {piece: i for i, (piece, _) in enumerate(pieces)}
        merges = bpe_merges(pieces)
        tokenizer = Tokenizer(
            BPEModel(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=fallback)
        )
    else:
        return None
    spec, steps = proto.normalizer_spec, []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    start = [text_decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    tokenizer.decoder = text_decoders.Sequence(
        [text_decoders.Replace(SPACE, " "), text_decoders.ByteFallback(), text_decoders.Fuse(), *start]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    tokenizer.add_special_tokens([AddedToken(pieces[i][0], special=True) for i in (BOS, PAD, EOS, UNK)])
    return tokenizer


def bpe_merges(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """The pairs that a sentencepiece BPE model joins, best first: all halves of a piece that are pieces."""
    scores = dict(pieces)
    merges = [
        (score, i, (piece[:cut], piece[cut:]))
        for i, (piece, score) in enumerate(pieces)
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [pair for _, _, pair in sorted(merges, key=lambda merge: (-merge[0], merge[1]))]


def sample_texts(pieces: Any, num: int = 200) -> list[str]:
    """Odd texts, and random rows of the vocabulary's own pieces."""
    rng = random.Random(0)
    words = [pieces.id_to_piece(i).replace(SPACE, " ") for i in range(UNK + 1, pieces.get_piece_size())]
    words = [word for word in words if not re.fullmatch("<.*>", word)]
    drawn = ["".join(rng.choices(words, k=rng.randint(1, 40))) for _ in range(num)] if words else []
    return [*ODD_TEXTS, *drawn]
