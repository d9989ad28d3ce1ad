"""`write_onnx(stored, out)`: an encoder as ONNX, of any batch size and length.

What was written is run in onnxruntime and compared with ours before it is there.

B samples, S waveform samples, T tokens, E extra tokens, D dim, V outputs of a head.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2v_ds.convert.consolidate import LICENCE, copy_tokenizer
from d2v_ds.convert.features import Encoder
from d2v_ds.convert.folder import staged
from d2v_ds.convert.load import build_encoder
from d2v_ds.convert.single import draw_rows, largest_difference, modality_of, single
from d2v_ds.convert.stored import Stored
from d2v_ds.modalities.audio.samples import RATE
from d2v_ds.modalities.text.samples import PAD
from d2v_ds.model.batch import Batch

TOLERANCE = 1e-4
"""Of every output, as a share of its largest value where that is above 1."""
TRACED = (19, 13)
"""Tokens of the two samples that are traced."""
CHECKED = ((31, 7, 24), (11,), (19, 19))
"""Tokens of the samples of each batch that is compared: other batch sizes and lengths, padded and not."""
INPUTS = {"audio": "input_values", "image": "pixel_values", "text": "input_ids"}
FORMAT = "d2v_ds onnx"
LARGE = 1_500_000_000
"""Bytes of weights above which they lie in a file beside the graph: ONNX files end at 2 GB."""


class Graph(nn.Module):
    """What is exported: last_hidden_state (B, E + T, D), pooler_output (B, D), and logits of a head.

    `source`: waveforms (B, S), images (B, C, H, W) or ids (B, T). `attention_mask`: 1 = real, of the source's shape
    (not for images).
    """

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.model, self.head, self.modality = encoder.model, encoder.head, encoder.modality
        self.config = encoder.model.configs[encoder.modality]

    def forward(self, source: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        padding_BT = None if attention_mask is None else self.padding(attention_mask)
        outputs, _ = self.model.encode(Batch(self.modality, source, padding_BT))
        hidden = self.model.norm(outputs[-1])
        x_BTD = hidden[:, self.config.extra_tokens :]
        if padding_BT is None:
            pooled = x_BTD.mean(dim=1)
        else:
            real = (~padding_BT)[:, :, None].to(x_BTD.dtype)
            pooled = (x_BTD * real).sum(dim=1) / real.sum(dim=1)
        logits = () if self.head is None else (self.head(x_BTD, padding_BT),)
        return hidden, pooled, *logits

    def padding(self, mask: Tensor) -> Tensor:
        """Bool (B, T), True = a token that the sample alone would not have."""
        if self.modality == "text":
            return mask == 0
        lengths, frames = mask.sum(dim=1), mask.shape[1]
        for _, kernel, stride in self.config.conv_layers:
            lengths, frames = (lengths - kernel) // stride + 1, (frames - kernel) // stride + 1
        return torch.arange(frames)[None] >= lengths[:, None]


def write_onnx(
    stored: Stored, out: str | Path, modality: str | None = None, weights: str | None = None
) -> Path:
    """A folder with model.onnx, its tokenizer, config.json and README; returns it.

    One modality a folder: `modality` says which of several. `weights`: student or teacher. Batch size and length are
    free. What was written is run in onnxruntime at other batch sizes and lengths than it was traced with, padded and
    not; nothing is left behind if outputs differ from ours by more than TOLERANCE (RuntimeError). ValueError if the
    choice is open, or a package is missing.
    """
    require("onnx", "onnxruntime", "onnxscript")
    stored, out = single(stored, modality, weights), Path(out)
    name, _ = modality_of(stored)
    encoder = build_encoder(stored, name, out).eval()
    graph = Graph(encoder).eval()
    with staged(out, "onnx") as folder:
        trace(graph, folder / "model.onnx", *inputs_of(stored, TRACED))
        found = check(graph, folder / "model.onnx", stored)
        config = settings(stored, found)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card(stored, config), encoding="utf-8")
        if name == "text":
            copy_tokenizer(stored, folder)
    return out


def require(*packages: str) -> None:
    from importlib.util import find_spec

    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ValueError(f"the format onnx needs {', '.join(missing)}: pip install 'd2v_ds[onnx]'")


def inputs_of(stored: Stored, tokens: tuple[int, ...]) -> tuple[Tensor, ...]:
    """A batch of random samples as the graph takes it."""
    name, _ = modality_of(stored)
    rows = draw_rows(stored, tokens, seed=sum(tokens))
    if name == "image":
        return (torch.stack(rows),)
    source = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD if name == "text" else 0)
    lengths = torch.tensor([len(row) for row in rows])
    return source, (torch.arange(source.shape[1])[None] < lengths[:, None]).long()


def output_names(graph: Graph) -> list[str]:
    return ["last_hidden_state", "pooler_output", *([] if graph.head is None else ["logits"])]


@torch.no_grad()
def trace(graph: Graph, path: Path, *inputs: Tensor) -> None:
    graph(*inputs)  # what is computed once and kept must be a real tensor, not one of the tracer's
    is_image = len(inputs) == 1
    names = [INPUTS[graph.modality], *([] if is_image else ["attention_mask"])]
    free = torch.export.Dim.DYNAMIC
    dynamic = (
        {"source": {0: free}} if is_image else dict.fromkeys(("source", "attention_mask"), {0: free, 1: free})
    )
    size = sum(p.numel() * p.element_size() for p in graph.parameters())
    with quiet():
        torch.onnx.export(
            graph,
            inputs,
            str(path),
            input_names=names,
            output_names=output_names(graph),
            dynamic_shapes=dynamic,
            dynamo=True,
            external_data=size > LARGE,
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter says what it does on every channel."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# ---- what was written, run ----


def check(graph: Graph, path: Path, stored: Stored) -> float:
    """The largest difference between onnxruntime's outputs and ours; RuntimeError if it is above TOLERANCE."""
    session = open_session(path)
    worst = 0.0
    for tokens in CHECKED:
        inputs = inputs_of(stored, tokens)
        for what, difference in compare(graph, session, inputs).items():
            if not difference <= TOLERANCE:
                shape = tuple(inputs[0].shape)
                raise RuntimeError(
                    f"the ONNX model gives other outputs than ours: {what} of a batch of shape {shape} differs by "
                    f"{difference:.3g}, allowed are {TOLERANCE:g}; nothing was kept"
                )
            worst = max(worst, difference)
    return worst


def open_session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def compare(graph: Graph, session: Any, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """The largest difference of each output, at real tokens."""
    given = {spec.name: x.numpy() for spec, x in zip(session.get_inputs(), inputs, strict=True)}
    ours, theirs = graph(*inputs), [torch.from_numpy(y) for y in session.run(None, given)]
    extra = graph.config.extra_tokens
    real = None if len(inputs) == 1 else ~graph.padding(inputs[1])
    found = {}
    for name, x, y in zip(output_names(graph), ours, theirs, strict=True):
        if real is not None and x.ndim == 3 and x.shape == y.shape:
            skipped = extra if name == "last_hidden_state" else 0
            x, y = x[:, skipped:][real], y[:, skipped:][real]
        found[name] = largest_difference(x, y)
    return found


# ---- what lies beside it ----


def settings(stored: Stored, found: float) -> dict[str, Any]:
    name, config = modality_of(stored)
    preparation = {
        "audio": {"rate": RATE, "normalise": "(x - mean(x)) / sqrt(var(x) + 1e-5), over the whole waveform"},
        "image": {"size": getattr(config, "size", None), "resample": "bicubic", "scale": 1 / 255},
        "text": {"first": 0, "pad": PAD, "last": 2, "max_tokens": getattr(config, "max_tokens", None)},
    }[name]
    if name == "image":
        preparation |= {"mean": list(config.data.mean), "std": list(config.data.std)}
    return {
        "format": FORMAT,
        "version": 1,
        "modality": name,
        "weights": stored.weights,
        "step": stored.step,
        "origin": stored.source,
        "input": INPUTS[name],
        "preparation": preparation,
        "extra_tokens": config.extra_tokens,
        "head": None if stored.head is None else stored.head.model_dump(mode="json"),
        "difference": found,
        "recipe": stored.recipe.model_copy(update={"out": None}).model_dump(mode="json"),
    }


PREPARE = {
    "audio": """x = x.astype("float32")                         # 16 kHz mono, (samples,)
x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)    # each alone, before padding with 0
inputs = {"input_values": x[None], "attention_mask": np.ones((1, len(x)), "int64")}""",
    "image": """x = np.asarray(image.convert("RGB").resize((SIZE, SIZE), 3), "float32") / 255
x = (x - np.array(MEAN, "float32")) / np.array(STD, "float32")
inputs = {"pixel_values": x.transpose(2, 0, 1)[None]}""",
    "text": """ids = np.array([[0, *tokens, 2]])  # <s>, sentencepiece's ids, </s>; pad with 1
inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}""",
}


def card(stored: Stored, config: dict[str, Any]) -> str:
    name, modality = modality_of(stored)
    prepare = PREPARE[name]
    for key, value in (("SIZE", getattr(modality, "size", "")), ("MEAN", ""), ("STD", "")):
        value = config["preparation"].get(key.lower(), value)
        prepare = prepare.replace(key, str(value))
    version = "1.0" if modality.view == "masked" else "2.0"
    steps = f" after {stored.step} steps" if stored.step is not None else ""
    data = f" on `{stored.recipe.data}`" if stored.is_own_run else ""
    extra = (
        f" The first {modality.extra_tokens} tokens are extra (class) tokens."
        if modality.extra_tokens
        else ""
    )
    head = " `logits` are the head's." if stored.head else ""
    return (
        f"# {stored.recipe.name} (ONNX)\n\ndata2vec {version} weights ({stored.weights}){steps}{data}: {name}, fp32. "
        f"Origin: {stored.source}.\n\n"
        "Batch size and length are free; padding is what `attention_mask` says (0), and changes nothing. Outputs: "
        f"`last_hidden_state` (B, T, D), `pooler_output` (B, D), its mean over real tokens.{extra}{head}\n\n"
        "```python\nimport numpy as np\nimport onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession("model.onnx")\n{prepare}\n'
        "last_hidden_state, pooler_output, *logits = session.run(None, inputs)\n```\n\n"
        f"Checked when it was written, in onnxruntime at several batch sizes and lengths: within {TOLERANCE:g} of "
        f"d2v_ds (found: {config['difference']:.1e}).\n"
    ) + ("" if stored.is_own_run else f"\n## Licence\n\n{LICENCE}\n")
