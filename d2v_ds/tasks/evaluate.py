"""How good a fine-tuned model is on labelled data: accuracy of its classes, or word and character error rate of CTC."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from d2v_ds.convert.features import Encoder
from d2v_ds.convert.load import load
from d2v_ds.modalities.audio.vocabulary import (
    BLANK,
    Case,
    Vocabulary,
    case_of,
    change_case,
    open_vocabulary,
    writable,
)
from d2v_ds.model.tuned import Task, as_number
from d2v_ds.tasks.beam import Beam, BeamDecoder
from d2v_ds.tasks.embed import best_device
from d2v_ds.tasks.groups import Ready, cut_batches, make_groups, prepare
from d2v_ds.tasks.items import Items, open_items
from d2v_ds.tasks.metrics import OF_NUMBERS, measure
from d2v_ds.tasks.table import Bad, check_place, write_whole

LABELS = {"classify": "cls;json.label", "ctc": "txt;json.text"}
"""Member or json key with the label of each kind, unless said otherwise, here or when the model was fine-tuned."""
HEADS = {
    "classify": (
        "image_classification",
        "attentive_classification",
        "sentence_classification",
        "utterance_classification",
    ),
    "ctc": ("ctc",),
    "glue": ("sentence_classification",),
}


def evaluate(
    kind: str,
    model: str | Path,
    data: str | Path,
    out: str | Path | None = None,
    modality: str | None = None,
    label: str | None = None,
    batch: int = 32,
    device: str | None = None,
    workers: int | None = None,
    search: Beam | None = None,
) -> dict[str, Any]:
    """Metrics of a model with a head on labelled shards, written to `out` as JSON too, if it is named.

    `classify`: accuracy, top5_accuracy of heads with more than five outputs, and what a run of ours was scored by; of a
    head with one output, a number, pearson and spearman.
    `ctc`: wer and cer over all words and characters (jiwer), of the best path or of what `search` finds. Samples that
    cannot be decoded are counted as `unreadable`, with their names, and take no part.

    Raises ValueError, before the model runs, if the model has no head or one of the other kind, or for a sample
    without a label, a class that the head does not have, or a transcript with symbols that it cannot write.
    """
    if kind not in LABELS:
        raise ValueError(f"kind '{kind}' is not known; it must be one of {', '.join(LABELS)}")
    if batch < 1:
        raise ValueError(f"--batch {batch} must be 1 or more")
    encoder = load(model, modality, device=device or best_device())
    check_head(encoder, kind)
    decode = None
    if kind == "ctc":
        import_jiwer()
        decode = (
            best_path(encoder) if search is None else BeamDecoder(encoder.head_config.labels, search).decode
        )
    label = label or own_label(encoder, LABELS[kind])
    items = open_items(data, encoder.modality, encoder.samples, label)
    truths = (
        read_truths(items, encoder, label, data)
        if kind == "classify"
        else read_transcripts(items, encoder, label)
    )
    check_place(out)
    unreadable: list[Bad] = []
    rows, places = answers(encoder, items, batch, workers, unreadable, decode)
    said = [(row, truths[i]) for row, i in zip(rows, places, strict=True)]
    if not said:
        raise ValueError(
            f"none of {items.words} in {data} could be decoded; the first: {unreadable[0].reason}"
        )
    result = {
        "task": kind,
        "model": str(model),
        "data": str(data),
        "samples": len(said),
        **(score_transcripts(said) if decode else score_classes(said, encoder.recipe.task)),
        "unreadable": [bad._asdict() for bad in unreadable],
    }
    if out is not None:
        write_whole(Path(out), json.dumps(result, indent=1).encode())
    return result


def check_head(encoder: Encoder, kind: str) -> None:
    """Raises ValueError for a model that does not give what the kind needs."""
    if encoder.head_config is None:
        raise ValueError(
            f"{encoder.origin} has no fine-tuned head, which {kind} needs; give a fine-tuned model, or use `d2v probe`"
        )
    if encoder.head_config.kind not in HEADS[kind]:
        other = next(name for name, heads in HEADS.items() if encoder.head_config.kind in heads)
        raise ValueError(
            f"{encoder.origin} has a head of kind {encoder.head_config.kind}, {kind} needs "
            f"{' or '.join(HEADS[kind])}; use `d2v eval {other}`"
        )
    if kind == "ctc" and encoder.head_config.labels is None:
        raise ValueError(
            f"the letters of {encoder.origin} are not known, so its transcripts cannot be written; "
            "import it again with its dictionary beside it"
        )


def answers(
    encoder: Encoder,
    items: Items,
    batch: int,
    workers: int | None,
    unreadable: list[Bad],
    decode: Callable[[Tensor], str] | None = None,
) -> tuple[list[Any], list[int]]:
    """What the head says of each item that can be read, logits or the text that `decode` makes of them at once, since
    those of all frames of a corpus would fill the memory; and which items those are. ValueError for what is no number.
    """
    rows: list[Any] = []
    places: list[int] = []
    for group in make_groups(prepare(encoder, items, 0, workers), encoder, batch):
        unreadable += group.bad
        for chosen in cut_batches(group, encoder, batch):
            logits = head_logits(encoder, chosen)
            is_finite = logits.flatten(1).isfinite().all(1).tolist()
            if not all(is_finite):
                raise ValueError(
                    f"outputs of {encoder.origin or 'the model'} are not finite, as for "
                    f"{chosen[is_finite.index(False)].name.full}; take weights of an earlier step"
                )
            rows += map(decode, logits) if decode else logits.unbind()
            places += [item.number for item in chosen]
    return rows, places


@torch.no_grad()
def head_logits(encoder: Encoder, chosen: list[Ready]) -> Tensor:
    """(B, C) of classes, (B, T, C) of CTC, fp32 on the CPU."""
    hidden = encoder.run([item.row for item in chosen])
    return encoder.head.eval()(hidden.x, hidden.mask).float().cpu()


# ---- what is true ----------------------------------------------------------------------------------------------


def own_label(encoder: Encoder, default: str) -> str:
    """Where the labels were that a run of ours learned."""
    return encoder.recipe.task.label if encoder.recipe.task else default


def read_labels(items: Items, label: str) -> list[str]:
    """Of all samples; ValueError if one has none."""
    found = []
    for i in range(len(items)):
        text = items.read(i)[1] if items.has_labels else ""
        if not text:
            raise ValueError(
                f"{items.name(i).full} has no label: '{label}' is not in it, or empty; name its member or json key "
                "with --label"
            )
        found.append(text)
    return found


def class_names(data: str | Path, label: str) -> tuple[str, ...] | None:
    """What `classes.json` calls the classes of shards that lie in one folder of this machine; `d2v prepare` writes it
    for labels in `cls` or `json.label`."""
    if "::" in str(data) or not {"cls", "json.label"} & set(label.replace(" ", "").split(";")):
        return None
    try:
        names = json.loads(classes_file(data).read_bytes())
    except (OSError, ValueError):
        return None  # absent, or another tool's
    is_ours = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if is_ours and len(set(names)) == len(names) else None


def classes_file(data: str | Path) -> Path:
    return (Path(data) if Path(data).is_dir() else Path(data).parent) / "classes.json"


def renumber(data: str | Path, names: tuple[str, ...], label: str) -> dict[str, str]:
    """Numbers of data that names its classes, as those of a head that names some of them too; nothing for others."""
    classes = class_names(data, label) or ()
    if not set(classes) & set(names):
        return {}
    return {
        str(i): str(names.index(name)) if name in names else f"{i} ({name})" for i, name in enumerate(classes)
    }


def read_truths(items: Items, encoder: Encoder, label: str, data: str | Path) -> list[float]:
    """Numbers, or numbers of the head's outputs: where it names them and the shards do, by name."""
    if encoder.head_config.outputs > 1:
        return read_classes(items, encoder, label, data)
    truths = []
    for i, text in enumerate(read_labels(items, label)):
        if not math.isfinite(number := as_number(text)):
            raise ValueError(
                f"label {text!r} of {items.name(i).full} is no number, which the head gives; name the member that "
                "holds it, --label, or leave the sample out"
            )
        truths.append(number)
    return truths


def read_classes(items: Items, encoder: Encoder, label: str, data: str | Path) -> list[int]:
    """Numbers of the head's outputs; labels may be those, or names of classes that are no such numbers."""
    names = encoder.head_config.labels or ()
    outputs = encoder.head_config.outputs
    others = renumber(data, names, label)
    found = []
    for i, text in enumerate(read_labels(items, label)):
        text = others.get(str(as_whole(text)), text)
        number = as_whole(text)
        if not 0 <= number < outputs:
            number = names.index(text) if text in names else -1
        if number < 0:
            known = (
                f", and their names {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
                if names
                else ""
            )
            raise ValueError(
                f"label {text!r} of {items.name(i).full} is no class of the model, whose classes are 0 to "
                f"{outputs - 1}{known}; name another member or key than '{label}' with --label, or give its own data"
            )
        found.append(number)
    return found


def as_whole(text: str) -> int:
    """-1 for what is no whole number."""
    return int(text) if text.isascii() and text.isdigit() else -1


def read_transcripts(items: Items, encoder: Encoder, label: str) -> list[str]:
    """Texts as the head writes them: in capitals or small letters where it has only those, and for pieces normalised as
    the sentencepiece model does with which the run learned, or by NFKC if that is lost."""
    labels, task = encoder.head_config.labels, encoder.recipe.task
    case, letters, is_pieces = case_of(labels), writable(labels), labels[0] == BLANK
    if task and task.case != "keep":
        case = task.case  # what the run learned
    vocabulary = own_pieces(encoder, case) if is_pieces else None
    texts = []
    for i, text in enumerate(read_labels(items, label)):
        text, unknown = " ".join(change_case(text, case).split()), []
        if vocabulary:
            try:
                text = vocabulary.decode(vocabulary.encode(text))
            except ValueError as error:
                raise ValueError(f"{items.name(i).full}: {error}") from error
            if not text:
                raise ValueError(f"the transcript of {items.name(i).full} has no symbol; leave it out")
        elif is_pieces:
            text = unicodedata.normalize("NFKC", text)
        if letters is not None:
            unknown = sorted(set(text) - letters - {" "})
        if unknown:
            raise ValueError(
                f"the transcript of {items.name(i).full} has {', '.join(map(repr, unknown[:8]))}, which the model "
                f"cannot write; it knows {''.join(sorted(letters))}; normalise the transcripts"
            )
        texts.append(text)
    return texts


def own_pieces(encoder: Encoder, case: Case) -> Vocabulary | None:
    """The sentencepiece model that a run of ours learned with, if it is there."""
    task = encoder.recipe.task
    if not (task and task.vocabulary and Path(task.vocabulary).expanduser().is_file()):
        return None
    vocabulary = open_vocabulary(task.vocabulary, case)
    return vocabulary if vocabulary.symbols == encoder.head_config.labels else None


# ---- how much of it the model says -----------------------------------------------------------------------------


def score_classes(said: list[tuple[Tensor, float]], task: Task | None = None) -> dict[str, float]:
    logits_BC, truth_B = torch.stack([row for row, _ in said]), torch.tensor([truth for _, truth in said])
    if logits_BC.shape[1] == 1:
        found = measure(OF_NUMBERS, logits_BC, truth_B)
        return {name: found[name] for name in OF_NUMBERS}
    found = {"accuracy": (logits_BC.argmax(dim=1) == truth_B).double().mean().item()}
    if logits_BC.shape[1] > 5:
        best = logits_BC.topk(5, dim=1).indices
        found["top5_accuracy"] = (best == truth_B[:, None]).any(dim=1).double().mean().item()
    if task and task.test is not None:  # else nobody checked that they go with the head
        found |= measure(task.metrics, logits_BC, truth_B)
        del found["score"]
    return found


def score_transcripts(said: list[tuple[str, str]]) -> dict[str, float]:
    jiwer = import_jiwer()
    texts, truths = map(list, zip(*said, strict=True))
    return {"wer": jiwer.wer(truths, texts), "cer": jiwer.cer(truths, texts)}


def best_path(encoder: Encoder) -> Callable[[Tensor], str]:
    """Gives the text of logits (T, C)."""
    return lambda logits_TC: encoder.decide(logits_TC[None])[0]


def import_jiwer() -> ModuleType:
    try:
        import jiwer
    except ImportError as error:
        raise ValueError("word error rates need jiwer: pip install 'jiwer>=3,<5'") from error
    return jiwer


def format_result(result: dict[str, Any]) -> str:
    """A table of two columns."""
    rows = [
        (key, value) for key, value in result.items() if key not in ("unreadable", "model", "data", "task")
    ]
    rows.append(("unreadable", len(result["unreadable"])))
    return "\n".join(f"{k:14} {v:>10.4f}" if isinstance(v, float) else f"{k:14} {v:>10}" for k, v in rows)
