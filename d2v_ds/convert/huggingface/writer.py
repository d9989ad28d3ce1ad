"""`write_huggingface(stored, out)`: a folder for transformers, loaded back and compared before it is there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from d2v_ds.convert.features import Encoder
from d2v_ds.convert.folder import staged
from d2v_ds.convert.huggingface import native, own
from d2v_ds.convert.huggingface.card import HEAD_CLASSES, card
from d2v_ds.convert.huggingface.processors import (
    write_feature_extractor,
    write_image_processor,
    write_json,
    write_letters,
    write_tokenizer,
)
from d2v_ds.convert.load import build_encoder
from d2v_ds.convert.single import draw_rows, largest_difference, modality_of, run, single
from d2v_ds.convert.stored import Stored
from d2v_ds.modalities.text.samples import PAD

TOLERANCE = 1e-5
"""Of every layer's output, as a share of its largest value where that is above 1."""
NATIVE_TOLERANCE = 2e-5
"""transformers' v1 classes compute q, k and v in three products, so sums are rounded differently."""
INPUTS = {"audio": "input_values", "image": "pixel_values", "text": "input_ids"}


def write_huggingface(
    stored: Stored, out: str | Path, modality: str | None = None, weights: str | None = None
) -> Path:
    """A folder that `transformers.AutoModel.from_pretrained` opens; returns it.

    2.0 models come with one modeling file (`trust_remote_code=True`), v1 models as transformers' own classes; a
    variant of v1 that those cannot hold gets the modeling file too. One modality a folder: `modality` says which
    of several. `weights`: student or teacher. A fine-tuned head is written as the `AutoModelFor...` of its task.

    The folder is loaded back and every layer compared with ours on random input; nothing is left behind if they
    differ by more than TOLERANCE (RuntimeError). ValueError if the choice is open, or transformers is missing.
    """
    require_transformers()
    stored, out = single(stored, modality, weights), Path(out)
    misfit = native.misfit(stored)
    layout = own if misfit else native
    with staged(out, "hf") as folder:
        write(stored, folder, layout, misfit)
        check(stored, folder, NATIVE_TOLERANCE if layout is native else TOLERANCE)
    return out


def require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "the format hf needs transformers, which checks what is written: pip install 'd2v_ds[hf]'"
        ) from error


def write(stored: Stored, folder: Path, layout: Any, misfit: str | None) -> None:
    name, modality = modality_of(stored)
    config = layout.settings(stored)
    remote = own.MODULE if layout is own else None
    write_json(folder / "config.json", config)
    save_file(layout.their_weights(stored), folder / "model.safetensors", metadata={"format": "pt"})
    if remote:
        shutil.copyfile(Path(__file__).with_name(f"{remote}.py"), folder / f"{remote}.py")
    notes = ""
    if misfit and modality.view == "masked":
        notes = f"transformers' own data2vec class cannot hold this variant: {misfit}. "
    if name == "audio":
        write_feature_extractor(folder, remote)
        if stored.head and stored.head.labels:
            write_letters(folder, stored.head.labels)
    elif name == "image":
        write_image_processor(folder, modality, remote)
    else:
        notes += write_tokenizer(folder, stored.files, modality)
    tolerance = NATIVE_TOLERANCE if layout is native else TOLERANCE
    (folder / "README.md").write_text(card(stored, config, notes, tolerance), encoding="utf-8")


# ---- what was written, loaded back ----


def check(stored: Stored, folder: Path, tolerance: float) -> None:
    """Loads the folder as a user does, and compares every layer, and the head's output, on random input."""
    name, config = modality_of(stored)
    encoder = build_encoder(stored, name, folder)
    with quiet(), torch.random.fork_rng(devices=[]):
        model, missing = open_model(folder, stored)
        open_processor(folder, name)
    if missing:
        raise RuntimeError(f"transformers found no weights for {', '.join(missing)} in what was written")
    rows = draw_rows(stored, (23, 14))
    is_native = not hasattr(model.config, "auto_map")
    # transformers' v1 class lets padding change features, so there each sample is compared alone
    groups = [[row] for row in rows] if is_native else [rows]
    for group in groups:
        compare(encoder, model, group, config.extra_tokens, tolerance)


def open_model(folder: Path, stored: Stored) -> tuple[nn.Module, list[str]]:
    """The model through its Auto class, and what it did not find; a native text model's pooler is never there."""
    import transformers

    auto = getattr(transformers, HEAD_CLASSES[stored.head.kind] if stored.head else "AutoModel")
    model, info = auto.from_pretrained(str(folder), trust_remote_code=True, output_loading_info=True)
    if info["unexpected_keys"]:
        raise RuntimeError(f"transformers did not know {', '.join(info['unexpected_keys'])}")
    missing = [key for key in info["missing_keys"] if not key.startswith("pooler.dense.")]
    return model.eval(), missing


def open_processor(folder: Path, modality: str) -> Any | None:
    import transformers

    auto = {"audio": "AutoFeatureExtractor", "image": "AutoImageProcessor", "text": "AutoTokenizer"}[modality]
    if modality == "text" and not (
        (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()
    ):
        return None
    return getattr(transformers, auto).from_pretrained(str(folder), trust_remote_code=True)


@torch.no_grad()
def compare(encoder: Encoder, model: nn.Module, rows: list[Tensor], extra: int, tolerance: float) -> None:
    """RuntimeError with what differs most, if one of the layers or the head's output differs by more than allowed."""
    ours = run(encoder, rows)
    output = model(**padded(encoder.modality, rows), output_hidden_states=True, return_dict=True)
    real = ours.real
    states = output.hidden_states[-len(ours.layers) :]
    found = {
        f"layer {i}": largest_difference(layer[real], state[:, extra:][real])
        for i, (layer, state) in enumerate(zip(ours.layers, states, strict=True))
    }
    if ours.logits is None:
        last = output.last_hidden_state[:, extra:]
        found["the last hidden state"] = largest_difference(ours.x[real], last[real])
    else:
        where = real if ours.logits.ndim == 3 else ...
        found["the logits"] = largest_difference(ours.logits[where], output.logits[where])
    what = max(found, key=found.get)
    if not found[what] <= tolerance:
        raise RuntimeError(
            f"what was written gives other outputs than ours: {what} differs by {found[what]:.3g}, allowed are "
            f"{tolerance:g}; nothing was kept"
        )


def padded(modality: str, rows: list[Tensor]) -> dict[str, Tensor]:
    """Rows as a processor gives them."""
    if modality == "image":
        return {"pixel_values": torch.stack(rows)}
    value = PAD if modality == "text" else 0
    batch = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(batch.shape[1])[None] < lengths[:, None]).long()
    return {INPUTS[modality]: batch, "attention_mask": mask}


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and warnings for a while."""
    from transformers.utils import logging

    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()
