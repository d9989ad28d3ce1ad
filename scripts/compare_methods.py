"""Which method learns more in the same time? data2vec 2.0 beside MAE, wav2vec 2.0 and masked-language modelling.

    python scripts/compare_methods.py image | audio | text [--seconds 60] [--seeds 1 2 3] [--out DIR]

The others are ViTMAEForPreTraining, Wav2Vec2ForPreTraining and RobertaForMaskedLM of `transformers`. All read the same
shards through the same loader, have an encoder of the same width, depth and heads (speech: the same convolutions before
it), AdamW, a warm-up of a tenth of the time and a cosine over all of it, on one thread; what a method takes per step
is its own: batch, mask, decoder. Every method trains for `--seconds` of CPU time, reading and masking included,
probing not. On the way the same probe reads the same labelled samples from every block's mean-pooled output, all
concatenated: closed-form ridge, as `d2v probe`. Each method learns at the best of three rates or more, tried until the
best has worse ones on both sides, by the probe at the end of a run with a seed of its own (0). Data is written below
OUT/data once. Writes OUT/NAME.json and OUT/NAME.png; runs that are done are not done again.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2v_ds.convert.features import Encoder, mean_pool
from d2v_ds.data import Plan, Source, StepLoader
from d2v_ds.engine.build import build_engine, build_optimizer
from d2v_ds.engine.ds_config import find_config, read_config, resolve_config
from d2v_ds.engine.ema import TeacherEMA, anneal
from d2v_ds.engine.launch import prepare_environment, start_distributed
from d2v_ds.engine.step import apply_step, one_reduction
from d2v_ds.modalities.build import build_model
from d2v_ds.modalities.source import open_source
from d2v_ds.model.batch import Batch
from d2v_ds.model.data2vec import TEACHER
from d2v_ds.recipe import Recipe, load_recipe
from d2v_ds.tasks.probe import labelled, layer_means, length, random_twin, ridge

ROOT = Path(__file__).resolve().parents[1]
POINTS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
"""Of the time, where it is probed."""
RATES = (1e-3, 2e-3, 4e-3)
MOST_RATES = 6
WARM_UP = 0.1
PROBED = 32
"""Samples in a batch of the probe."""
MASK_SHARE = 0.15
"""Of masked-language modelling."""


@dataclass(frozen=True)
class Data:
    """Shards to train on, and labelled ones to fit and test a probe on."""

    shards: str
    train: str
    test: str
    label: str
    more: tuple[str, ...] = ()
    """Recipe keys."""


# ---- the methods ----


class Data2Vec:
    """The project's own model, engine and step."""

    name = "data2vec 2.0"

    def __init__(self, recipe: Recipe, source: Source, device: torch.device):
        self.recipe, self.source = recipe, source
        optim, path = recipe.optim, find_config("zero0")
        self.device = device
        adam = {"betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
        config = resolve_config(
            read_config(path),
            clip=optim.clip,
            lr=optim.lr,
            precision="fp32",
            dim=recipe.body.dim,
            path=str(path),
            **adam,
        )
        model = build_model(recipe.body, recipe.modalities)
        optimizer = build_optimizer(model, lr=optim.lr, decay=optim.decay, **adam)
        self.engine = build_engine(model, optimizer, config, False)
        self.engine.train()
        self.ema = TeacherEMA(self.engine)

    def step(self, batch: Batch, rate: float, done: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        with one_reduction(self.engine):
            output = self.engine(batch)
            self.engine.backward(output.loss / output.sample_size)
        apply_step(self.engine)
        ema = self.recipe.ema
        self.ema.update(anneal(ema.start, ema.end, 600, int(1000 * done)))

    def layers(self, items: list[Any]) -> Tensor:
        """(N, depth, D)."""
        encoder = bare_encoder(self.recipe, self.source)
        own = {k: t for k, t in self.engine.module.state_dict().items() if not k.startswith(TEACHER)}
        encoder.model.load_state_dict(own)
        return layer_means(encoder, items, PROBED)


class Transformers:
    """A model of `transformers`, with AdamW in plain torch."""

    def __init__(self, recipe: Recipe, source: Source, device: torch.device):
        self.source, self.device = source, device
        self.encoder = bare_encoder(recipe, source)  # what prepares the input
        ((_, config),) = recipe.modalities.items()
        body = recipe.body
        size = {
            "hidden_size": body.dim,
            "num_hidden_layers": body.depth,
            "num_attention_heads": body.heads,
            "intermediate_size": int(body.mlp_ratio * body.dim),
        }
        self.model = self.build(size, config).train()
        matrices = [p for p in self.model.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in self.model.parameters() if p.requires_grad and p.ndim <= 1]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=self.betas, weight_decay=self.decay)

    betas, decay = (0.9, 0.98), 0.01

    def step(self, batch: Batch, rate: float, done: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        self.loss(batch, done).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 4.0)
        self.optimizer.step()

    @torch.no_grad()
    def layers(self, items: list[Any]) -> Tensor:
        """(N, depth, D)."""
        self.model.eval()
        order = sorted(range(len(items)), key=lambda i: length(items[i]))
        pooled: list[Any] = [None] * len(items)
        for first in range(0, len(order), PROBED):
            chosen = order[first : first + PROBED]
            rows = self.encoder.prepare([items[i] for i in chosen])
            hidden, padding = self.hidden(self.source.samples.pad(rows), rows)
            means = torch.stack([mean_pool(layer, padding) for layer in hidden], dim=1)
            for i, row in zip(chosen, means, strict=True):
                pooled[i] = row
        self.model.train()
        return torch.stack(pooled)


class MAE(Transformers):
    """arXiv:2111.06377: three quarters masked, pixels normalised by patch, a narrower decoder."""

    name, betas, decay = "MAE", (0.9, 0.95), 0.05

    def build(self, size: dict[str, int], config: Any) -> nn.Module:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        return ViTMAEForPreTraining(
            ViTMAEConfig(
                **size,
                image_size=config.size,
                patch_size=config.patch,
                mask_ratio=0.75,
                norm_pix_loss=True,
                decoder_hidden_size=64,
                decoder_num_hidden_layers=2,
                decoder_num_attention_heads=4,
                decoder_intermediate_size=256,
                attn_implementation="sdpa",
            )
        )

    def loss(self, batch: Batch, done: float) -> Tensor:
        return self.model(pixel_values=batch.source).loss

    def hidden(self, batch: Batch, rows: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        config = self.model.config
        config.mask_ratio = 0.0
        output = self.model.vit(pixel_values=batch.source, output_hidden_states=True)
        config.mask_ratio = 0.75
        layers = [layer[:, 1:] for layer in output.hidden_states[1:]]  # without the class token
        return layers, torch.zeros(layers[0].shape[:2], dtype=torch.bool)


class Wav2Vec2(Transformers):
    """arXiv:2006.11477: span masks, contrastive loss over a learned codebook."""

    name = "wav2vec 2.0"

    def build(self, size: dict[str, int], config: Any) -> nn.Module:
        from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining

        dims, kernels, strides = zip(*config.conv_layers, strict=True)
        return Wav2Vec2ForPreTraining(
            Wav2Vec2Config(
                **size,
                conv_dim=dims,
                conv_kernel=kernels,
                conv_stride=strides,
                feat_extract_norm="layer",
                num_conv_pos_embeddings=config.position_width,
                num_conv_pos_embedding_groups=config.position_groups,
                codevector_dim=64,
                proj_codevector_dim=64,
                num_negatives=100,
                hidden_dropout=0.0,
                attention_dropout=0.0,
                activation_dropout=0.0,
                feat_proj_dropout=0.0,
                feat_quantizer_dropout=0.0,
                layerdrop=0.0,
                attn_implementation="sdpa",
            )
        )

    def loss(self, batch: Batch, done: float) -> Tensor:
        from transformers.models.wav2vec2.modeling_wav2vec2 import (
            _compute_mask_indices,
            _sample_negative_indices,
        )

        frames = int(self.model._get_feat_extract_output_lengths(batch.source.shape[1]))
        shape = (len(batch.source), frames)
        mask = _compute_mask_indices(shape, mask_prob=0.65, mask_length=5, min_masks=2)
        negatives = _sample_negative_indices(shape, self.model.config.num_negatives, mask)
        self.model.set_gumbel_temperature(2.0 * 0.25**done)  # from 2 to 0.5, as in the original
        output = self.model(
            batch.source,
            mask_time_indices=torch.from_numpy(mask),
            sampled_negative_indices=torch.from_numpy(negatives),
        )
        return output.loss / int(mask.sum())

    def hidden(self, batch: Batch, rows: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        lengths = torch.tensor([len(row) for row in rows])
        attention = torch.arange(batch.source.shape[1])[None] < lengths[:, None]
        output = self.model.wav2vec2(batch.source, attention_mask=attention, output_hidden_states=True)
        layers = list(output.hidden_states[1:])
        frames = self.model._get_feat_extract_output_lengths(lengths)
        return layers, torch.arange(layers[0].shape[1])[None] >= frames[:, None]


class MaskedLM(Transformers):
    """arXiv:1907.11692: 15 % of the tokens, of which four fifths are hidden, a tenth is another, a tenth stays."""

    name = "masked LM"

    def build(self, size: dict[str, int], config: Any) -> nn.Module:
        from transformers import RobertaConfig, RobertaForMaskedLM

        self.vocabulary = config.vocabulary
        return RobertaForMaskedLM(
            RobertaConfig(
                **size,
                vocab_size=config.vocabulary + 1,  # the last one hides
                max_position_embeddings=config.max_tokens + 2,
                type_vocab_size=1,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                attn_implementation="sdpa",
            )
        )

    def loss(self, batch: Batch, done: float) -> Tensor:
        ids = batch.source.clone()
        chosen = torch.rand(ids.shape) < MASK_SHARE
        fate = torch.rand(ids.shape)
        ids[chosen & (fate < 0.8)] = self.vocabulary
        others = chosen & (fate >= 0.8) & (fate < 0.9)
        ids[others] = torch.randint(4, self.vocabulary, (int(others.sum()),))
        return self.model(input_ids=ids, labels=batch.source.masked_fill(~chosen, -100)).loss

    def hidden(self, batch: Batch, rows: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        padding = batch.padding_BT
        if padding is None:
            padding = torch.zeros(batch.source.shape, dtype=torch.bool)
        output = self.model.roberta(
            input_ids=batch.source, attention_mask=~padding, output_hidden_states=True
        )
        return list(output.hidden_states[1:]), padding


METHODS = {"image": (Data2Vec, MAE), "audio": (Data2Vec, Wav2Vec2), "text": (Data2Vec, MaskedLM)}


def bare_encoder(recipe: Recipe, source: Source) -> Encoder:
    """The recipe's network with new weights, without decoder and teacher."""
    return random_twin(Encoder(nn.Identity(), source.name, source.samples, recipe))


# ---- a run ----


def train(
    method: Any, seconds: float, rate: float, seed: int, points: tuple[float, ...]
) -> Iterator[tuple[float, int]]:
    """(CPU seconds spent, steps done) at each of `points`, shares of the time."""
    points = list(points)
    spent, steps = 0.0, 0
    batches = read_batches(method.source, seed)
    while True:
        if points and spent >= points[0] * seconds:
            points.pop(0)
            yield spent, steps
        if not points:
            return
        began = time.process_time()
        done = min(1.0, spent / seconds)
        method.step(next(batches), rate * schedule(done), done)
        spent += time.process_time() - began
        steps += 1


def schedule(done: float) -> float:
    """Share of the rate."""
    if done < WARM_UP:
        return done / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


def read_batches(source: Source, seed: int) -> Iterator[Batch]:
    for step in StepLoader([source], Plan(seed, [source.stream]), 0, 1, 0, 10**6, 0):
        for micro in step:
            yield micro.batch


def run(
    kind: type,
    modality: str,
    data: Data,
    seconds: float,
    rate: float,
    seed: int,
    points: tuple[float, ...] = POINTS,
) -> list[dict]:
    """Accuracy on the way, one row for each of `points`."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    keys = [f"data={data.shards}", f"seed={seed}", "precision=fp32", *data.more]
    recipe = load_recipe(f"{modality}_tiny", keys)
    ((name, config),) = recipe.modalities.items()
    source = open_source(name, config, recipe.data)
    method = kind(recipe, source, torch.device("cpu"))
    probed = bare_encoder(recipe, source)
    parts = [labelled(probed, shards, data.label) for shards in (data.train, data.test)]
    rows = []
    for spent, steps in train(method, seconds, rate, seed, points):
        (fit, labels), (held_out, test_labels) = (
            (method.layers(items).flatten(1), labels) for items, labels in parts
        )
        accuracy, penalty = ridge(fit, labels, held_out, test_labels)
        rows.append({"cpu_s": spent, "steps": steps, "accuracy": accuracy, "penalty": penalty})
    return rows


# ---- the study ----


def prepare(modality: str, out: Path) -> Data:
    folder = out / "data" / modality
    if modality == "text":
        return prepare_text(out)
    if not (folder / "done").exists():
        kind = ["--images-only"] if modality == "image" else ["--samples", "1500", "--val-samples", "500"]
        command = [sys.executable, "-m", "shards.sample", "--out", str(folder), *kind]
        subprocess.run(command, check=True, cwd=ROOT)
        (folder / "done").touch()
    train, test = (
        ("images-train-*.tar", "images-test-*.tar")
        if modality == "image"
        else ("multimodal-train-*.tar", "multimodal-val-*.tar")
    )
    return Data(str(folder), str(folder / train), str(folder / test), "cls;json.label")


def prepare_text(out: Path) -> Data:
    """Prose, and which module of Python's library a paragraph describes."""
    from few_labels import Study

    study = Study(argparse.Namespace(out=out, seeds=[1], shares=[1.0], jobs=1))
    prose = study.pretraining_shards("text")
    labels, _ = study.labelled("text", 1.0, 1)
    return Data(
        f"{prose}/text-*.tar",
        f"{labels}/*-train-*.tar",
        f"{labels}/*-val-*.tar",
        "cls;json.label",
        (f"modalities.text.data.tokenizer={prose}/sentencepiece.model",),
    )


def find_rate(kind: type, modality: str, data: Data, out: Path, seconds: float) -> tuple[float, dict]:
    """The rate whose run ends best, and all of them; beyond the lowest and the highest more are tried."""

    def measure(rate: float) -> float:
        return remembered(kind, modality, data, out, seconds, rate, 0, (1.0,))[-1]["accuracy"]

    tried = {rate: measure(rate) for rate in RATES}
    while len(tried) < MOST_RATES:
        best = max(tried, key=tried.get)
        beyond = {min(tried): min(tried) / 2, max(tried): max(tried) * 2}.get(best)
        if beyond is None:
            break
        tried[beyond] = measure(beyond)
    return max(tried, key=tried.get), {f"{rate:g}": tried[rate] for rate in sorted(tried)}


def remembered(
    kind: type,
    modality: str,
    data: Data,
    out: Path,
    seconds: float,
    rate: float,
    seed: int,
    points: tuple[float, ...] = POINTS,
) -> list[dict]:
    """A run, or what it gave when it was done before."""
    path = out / "runs" / f"{modality}-{kind.__name__}-{seconds:g}s-{rate:g}-{seed}.json"
    if not path.exists():
        rows = run(kind, modality, data, seconds, rate, seed, points)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows), encoding="utf-8")
        print(f"{kind.name}, rate {rate:g}, seed {seed}: {rows[-1]}", flush=True)
    return json.loads(path.read_text("utf-8"))


def compare(modality: str, out: Path, seconds: float, seeds: list[int]) -> dict:
    data, found = prepare(modality, out), {}
    for kind in METHODS[modality]:
        rate, tried = find_rate(kind, modality, data, out, seconds)
        runs = {seed: remembered(kind, modality, data, out, seconds, rate, seed) for seed in seeds}
        found[kind.name] = {"rate": rate, "tried": tried, "runs": runs}
    return {"modality": modality, "seconds": seconds, "data": asdict(data), "methods": found}


def summarise(result: dict) -> str:
    """A table: accuracy by share of the time, mean and standard deviation over the seeds."""
    header = [f"{point * result['seconds']:g} s" for point in POINTS]
    lines = [f"| method | rate | steps | {' | '.join(header)} |", "|---" * (len(header) + 3) + "|"]
    for name, method in result["methods"].items():
        runs = list(method["runs"].values())
        cells = [cell([rows[i]["accuracy"] for rows in runs]) for i in range(len(POINTS))]
        steps = statistics.mean(rows[-1]["steps"] for rows in runs)
        lines.append(f"| {name} | {method['rate']:g} | {steps:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} +- {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    for name, method in result["methods"].items():
        runs = list(method["runs"].values())
        seconds = [statistics.mean(rows[i]["cpu_s"] for rows in runs) for i in range(len(POINTS))]
        points = [[rows[i]["accuracy"] for rows in runs] for i in range(len(POINTS))]
        (line,) = axis.plot(seconds, [statistics.mean(p) for p in points], marker="o", label=name)
        axis.fill_between(
            seconds, [min(p) for p in points], [max(p) for p in points], alpha=0.2, color=line.get_color()
        )
    axis.set(xlabel="seconds of CPU", ylabel="probe accuracy", title=result["modality"])
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modality", choices=sorted(METHODS))
    parser.add_argument("--seconds", type=float, default=60.0, help="of CPU time, each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("checkpoints/compare_methods"))
    arguments = parser.parse_args()
    if not 0 < arguments.seconds < math.inf:
        parser.error(f"--seconds {arguments.seconds:g} must be above 0, and finite")
    if arguments.out.exists() and not arguments.out.is_dir():
        parser.error(f"--out {arguments.out} is a file; give a folder")
    if 0 in arguments.seeds:
        parser.error("--seeds 0 is the seed that chooses the rates; give others")
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise SystemExit("error: needs transformers: pip install 'd2v_ds[hf]'") from None
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    logging.getLogger("d2v_ds.convert.features").setLevel(logging.ERROR)  # each batch of long texts is cut
    prepare_environment()
    start_distributed(1)
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    result = compare(arguments.modality, out, arguments.seconds, arguments.seeds)
    (out / f"{arguments.modality}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(result, out / f"{arguments.modality}.png")
    print(summarise(result))


if __name__ == "__main__":
    main()
