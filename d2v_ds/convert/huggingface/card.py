"""The model card of a Hugging Face folder: what the weights are, of whom, and how to use them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from d2v_ds.convert.consolidate import LICENCE
from d2v_ds.convert.single import modality_of
from d2v_ds.convert.stored import Stored

PAPERS = {"visible": ("data2vec 2.0", "2212.07525"), "masked": ("data2vec", "2202.03555")}
TAGS = {"audio": "speech", "image": "image-feature-extraction", "text": "feature-extraction"}
HEAD_TAGS = {
    "ctc": "automatic-speech-recognition",
    "image_classification": "image-classification",
    "sentence_classification": "text-classification",
}
PROCESS = {
    "audio": (
        "AutoFeatureExtractor",
        'inputs = processor([waveform], sampling_rate=16000, padding=True, return_tensors="pt")  # 16 kHz mono',
    ),
    "image": (
        "AutoImageProcessor",
        'inputs = processor([image], return_tensors="pt")  # PIL images of any size',
    ),
    "text": (
        "AutoTokenizer",
        'inputs = processor(["a text"], padding=True, truncation=True, return_tensors="pt")',
    ),
}
HEAD_CLASSES = {
    "ctc": "AutoModelForCTC",
    "image_classification": "AutoModelForImageClassification",
    "sentence_classification": "AutoModelForSequenceClassification",
}


def card(stored: Stored, config: dict[str, Any], notes: str, tolerance: float) -> str:
    """README.md of a folder with this config.json. `notes`: what is special about its processor."""
    name, modality = modality_of(stored)
    paper, arxiv = PAPERS[modality.view]
    is_remote = "auto_map" in config
    front = ["---", "library_name: transformers", f"pipeline_tag: {pipeline_tag(stored)}", "tags: [data2vec]"]
    licence = source_licence(stored.files)
    front += [f"license: {licence}"] if licence else []
    model = HEAD_CLASSES[stored.head.kind] if stored.head else "AutoModel"
    trust = ", trust_remote_code=True" if is_remote else ""
    processor, line = PROCESS[name]
    output = "logits" if stored.head else "last_hidden_state"
    body = [
        f"# {stored.recipe.name}",
        f"An encoder of {name}, {paper} ([paper](https://arxiv.org/abs/{arxiv})), written by d2v_ds as "
        f"`{config['architectures'][0]}` of "
        + ("this folder's modeling file." if is_remote else "transformers."),
        "## What it holds",
        *rows(stored, tolerance),
        "## Licence of the weights",
        licence_text(stored, licence),
        "## Use",
        "```python",
        f"from transformers import {processor}, {model}\n",
        f'processor = {processor}.from_pretrained("THIS_FOLDER"{trust})',
        f'model = {model}.from_pretrained("THIS_FOLDER"{trust}).eval()',
        line,
        f"{output} = model(**inputs).{output}",
        "```",
        *([notes.strip()] if notes.strip() else []),
        *usage(stored, is_remote),
        'Back in d2v_ds: `d2v_ds.load("THIS_FOLDER").extract(x)`.',
    ]
    return "\n".join([*front, "---", ""]) + spaced(body)


def spaced(parts: list[str]) -> str:
    """Paragraphs apart, lines of a code block or of a list together."""
    text, inside = "", False
    for part in parts:
        text += part + ("\n" if inside or part.startswith(("- ", "```p")) else "\n\n")
        inside = part == "```python" or (inside and part != "```")
        if part == "```":
            text = text.rstrip("\n") + "\n\n"
    return re.sub(r"(\n- [^\n]*\n)(?!- )", r"\1\n", text).rstrip("\n") + "\n"


def pipeline_tag(stored: Stored) -> str:
    if stored.head:
        return HEAD_TAGS[stored.head.kind]
    return "feature-extraction" if modality_of(stored)[0] != "image" else "image-feature-extraction"


def rows(stored: Stored, tolerance: float) -> list[str]:
    name, _ = modality_of(stored)
    recipe, body = stored.recipe, stored.recipe.body
    owned = sum(tensor.numel() for tensor in stored.tensors.values())
    whose = {
        "student": "the student's (the model that was trained)",
        "teacher": "the teacher's (the exponential moving average of the student), with the student's own parts "
        "where the teacher has none",
    }[stored.weights]
    start = f", started from the weights `{Path(recipe.init).name}`" if recipe.init else ""
    head = f"; a fine-tuned head of {stored.head.outputs} outputs ({stored.head.kind})" if stored.head else ""
    steps = "not said by the file" if stored.step is None else f"{stored.step}"
    return [
        f"- Weights: {whose}, fp32{head}.",
        f"- Size: {owned / 1e6:.1f} M parameters; {body.dim} wide, {body.depth} shared blocks, {body.heads} heads.",
        f"- Read from: {stored.source}{start}.",
        f"- Data: {'`' + str(recipe.data) + '`' if stored.is_own_run else 'as its authors say'}; modality {name}.",
        f"- Steps: {steps}.",
        f"- Checked when it was written: loaded back, every layer agrees with d2v_ds to {tolerance:g}.",
    ]


def licence_text(stored: Stored, licence: str | None) -> str:
    if licence:
        return f"`{licence}`, as the card of the folder says that they were read from."
    if stored.is_own_run and stored.recipe.init:
        return f"That of the weights which training started from, `{Path(stored.recipe.init).name}`, holds. {LICENCE}"
    if stored.is_own_run:
        return "None was chosen yet. Whoever trained them, on data that allows it, chooses one (`license:` above)."
    return LICENCE


def source_licence(files: Path | None) -> str | None:
    """What the card beside imported weights says."""
    readme = files / "README.md" if files else None
    if readme is None or not readme.is_file():
        return None
    text = readme.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*([\w.-]+)\s*$", front.group(1), re.MULTILINE) if front else None
    return found.group(1) if found else None


def usage(stored: Stored, is_remote: bool) -> list[str]:
    name, config = modality_of(stored)
    lines = []
    if name == "image" and config.extra_tokens:
        lines.append(
            f"The first {config.extra_tokens} of the tokens is the class token; patches follow row by row."
            if config.extra_tokens == 1
            else f"The first {config.extra_tokens} tokens are extra ones; patches follow row by row."
        )
    if name != "image" and is_remote:
        lines.append(
            "Give `attention_mask` with a padded batch: then each sample has the features that it has alone."
        )
    if is_remote:
        lines.append("`pooler_output` is the mean over real tokens without extra ones.")
    if name == "audio" and not is_remote:
        lines.append(
            "In transformers' class, padding in a batch changes the features of padded samples (its positional "
            "convolutions read it, as in fairseq), not a little: give sounds of one length, or one at a "
            "time. Its feature extractor normalises with eps 1e-7, d2v_ds and fairseq with 1e-5: quiet recordings "
            "differ slightly."
        )
    if name == "text":
        lines.append(
            "Texts longer than the model reads are cut: transformers keeps `</s>` at the end, d2v_ds does not."
        )
        if not is_remote and not stored.head:
            lines.append(
                "transformers adds a pooler to this class, which is untrained: ignore `pooler_output`."
            )
    return lines
