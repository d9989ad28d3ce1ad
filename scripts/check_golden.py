"""Compares our model with recorded tensors of the reference implementation, quantity by quantity.

    python scripts/check_golden.py tests/golden

A case is NAME.json with NAME.weights.safetensors and NAME.tensors.safetensors beside it. Prints one row per
quantity and exits 1 if any is out of tolerance. Models are built with fairseq_compat=True.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from d2v_ds.convert import fairseq_v1
from d2v_ds.convert.fairseq import our_config, our_name, our_tensor, our_weights
from d2v_ds.kernels.attention import Distance, make_bias
from d2v_ds.modalities.audio.samples import num_frames
from d2v_ds.modalities.build import build_model
from d2v_ds.modalities.text.samples import PAD
from d2v_ds.model.batch import Batch, make_masked, make_views
from d2v_ds.model.data2vec import Data2Vec
from d2v_ds.model.decoder import fill_in
from d2v_ds.model.layers import alibi_slopes

TIGHT = {"rtol": 1e-4, "atol": 5e-5}  # local features, encoder input and output, features
LOOSE = {"rtol": 1e-4, "atol": 2e-4}  # targets and predictions


@dataclass
class Row:
    """One compared quantity; `error` is relative to its tolerance, so up to 1 passes."""

    quantity: str
    max_difference: float
    error: float


def compare(quantity: str, ours: Tensor, reference: Tensor, rtol: float, atol: float) -> Row:
    if ours.shape != reference.shape:
        return Row(
            f"{quantity} shape {tuple(ours.shape)} != {tuple(reference.shape)}", float("inf"), float("inf")
        )
    difference = (ours.double() - reference.double()).abs()
    error = (
        (difference / (atol + rtol * reference.double().abs())).max().item() if difference.numel() else 0.0
    )
    finite = bool(torch.isfinite(ours.double()).all())
    return Row(
        quantity, difference.max().item() if difference.numel() else 0.0, error if finite else float("inf")
    )


def compare_number(
    quantity: str, ours: float, reference: float, rtol: float = 1e-5, atol: float = 0.0
) -> Row:
    return compare(
        quantity, torch.tensor(ours), torch.tensor(reference, dtype=torch.float64), rtol, atol or 1e-12
    )


def read_case(path: Path) -> Case:
    info = json.loads(path.read_text())
    return (Case if "data2vec_multi" in info["model"] else CaseV1)(path, info)


class Case:
    """One recorded data2vec 2.0 model with its batches."""

    def __init__(self, path: Path, info: dict):
        self.info = info
        self.tensors = load_file(path.with_suffix(".tensors.safetensors"))
        self.weights = load_file(path.with_suffix(".weights.safetensors"))

    def build(self) -> Data2Vec:
        cfg = self.info["resolved_config"]
        ((name, modality),) = cfg["modalities"].items()
        if name == "text":
            modality["vocabulary"] = self.weights[
                "modality_encoders.TEXT.local_encoder.embed_tokens.weight"
            ].shape[0]
        body, configs = our_config(cfg)
        self.modality, self.config, self.alibi = name, configs[name], configs[name].alibi
        model = build_model(body, configs, fairseq_compat=True)
        model.load_state_dict(our_weights(self.weights), strict=True)
        return model.train()

    def batch(self, prefix: str) -> Batch:
        get = lambda key: self.tensors.get(prefix + key)  # noqa: E731
        source = get("source").long() if self.modality == "text" else get("source")
        padding = get("padding_mask")
        if padding is not None and self.modality == "audio":
            padding = self.frame_padding(padding, get("local_features").shape[1])
        padding = None if padding is None else padding.bool()
        return Batch(self.modality, source, padding, **make_views(get("mask").bool()))

    def frame_padding(self, padding: Tensor, frames: int) -> Tensor:
        """Of samples (B, S) -> of frames (B, T)."""
        valid = torch.tensor([num_frames(int(n), self.config.conv_layers) for n in (padding == 0).sum(1)])
        return torch.arange(frames)[None] >= valid[:, None]

    def rows(self) -> Iterator[Row]:
        model = self.build()
        for name, recorded in self.info["batches"].items():
            batch = self.batch(f"{name}.")
            yield from (prefixed(name, row) for row in self.check_parts(model, batch, f"{name}."))
            yield from (prefixed(name, row) for row in self.check_step(model, batch, f"{name}.", recorded))
            yield from (prefixed(name, row) for row in self.check_features(model, batch, f"{name}."))
        yield from self.check_ema(model)

    @torch.no_grad()
    def check_parts(self, model: Data2Vec, batch: Batch, prefix: str) -> Iterator[Row]:
        """Everything on the way: local features, encoder input and output, decoder, teacher layers."""
        get = lambda key: self.tensors[prefix + key]  # noqa: E731
        encoder = model.encoders[self.modality]
        local = encoder.local(batch.source)
        yield compare("ids_keep", batch.keep_NK, get("ids_keep"), 0, 0.5)
        yield compare("ids_restore", batch.restore_NT, get("ids_restore"), 0, 0.5)
        yield compare("local_features", local, get("local_features"), **TIGHT)
        x, _, padding = encoder.context(local, batch, True)
        yield compare("enc_in", x, get("enc_in"), **TIGHT)
        if prefix + "enc_padding_mask" in self.tensors:
            yield compare("enc_padding_mask", padding, get("enc_padding_mask"), 0, 0.5)
        if prefix + "enc_alibi_bias" in self.tensors:
            yield compare(
                "enc_alibi_bias", self.recorded_bias(encoder.context, batch), get("enc_alibi_bias"), **TIGHT
            )
        hidden = model.see_views(batch, local)
        yield compare("enc_out", hidden, get("enc_out"), **TIGHT)
        decoder = model.decoders[self.modality]
        kept = hidden[:, self.config.extra_tokens :]
        yield compare(
            "dec_out", decoder(fill_in(kept, batch.restore_NT, get("dec_noise"))), get("dec_out"), **LOOSE
        )
        _, layers = model.teach(batch, local)
        for i, layer in enumerate(layers):
            if f"{prefix}teacher_layer.{i}" in self.tensors:
                ours = layer[:, self.config.extra_tokens :]
                yield compare(f"teacher_layer.{i}", ours, get(f"teacher_layer.{i}"), **TIGHT)
        yield compare("targets_full", model.make_targets(batch, local), get("targets_full"), **LOOSE)

    def recorded_bias(self, context: torch.nn.Module, batch: Batch) -> Tensor:
        """The bias as recorded: with the scale, unless each layer has its own."""
        if not self.alibi.per_layer:
            return context.make_biases(batch.keep_NK)[0]
        return make_bias(Distance(alibi_slopes(context.heads), batch.keep_NK, context.num_extra))

    def check_step(self, model: Data2Vec, batch: Batch, prefix: str, recorded: dict) -> Iterator[Row]:
        """Predictions, targets, losses, spreads and gradients of one forward and backward."""
        get = lambda key: self.tensors[prefix + key]  # noqa: E731
        model.zero_grad()
        out = model(batch, get("dec_noise"))
        scalars = recorded["scalars"]
        yield compare("pred", out.pred_NJD.flatten(0, 1), get("pred"), **LOOSE)
        yield compare("y", out.target_NJD.flatten(0, 1), get("y"), **LOOSE)
        yield compare_number("sample_size", out.sample_size.item(), scalars["sample_size"])
        yield compare_number("total_loss", out.loss.item(), scalars["total_loss"])
        names = {"cls": "cls", f"{self.modality.upper()}_regression": "regression"}
        for name, value in scalars["loss_sums"].items():
            yield compare_number(f"loss_sums.{name}", out.losses[names[name]].item(), value)
        yield from self.check_elements(model, batch, prefix)
        for key, tensor in (("pred_var", out.pred_NJD), ("target_var", out.target_NJD)):
            spread = (tensor.flatten(0, 1).var(dim=0) + 1e-6).sqrt().mean()
            yield compare_number(key, spread.item(), scalars[key], rtol=1e-4)
        (out.loss / out.sample_size).backward()
        yield from self.check_gradients(model, prefix, recorded)
        quiet = model(batch, torch.zeros_like(get("dec_noise")))
        yield compare("nonoise.pred", quiet.pred_NJD.flatten(0, 1), get("nonoise.pred"), **LOOSE)
        yield compare_number(
            "nonoise.total_loss", quiet.loss.item(), recorded["scalars_nonoise"]["total_loss"]
        )

    @torch.no_grad()
    def check_elements(self, model: Data2Vec, batch: Batch, prefix: str) -> Iterator[Row]:
        """The unreduced losses, recomputed from the recorded predictions' own path."""
        from d2v_ds.model.loss import regression

        out = model(batch, self.tensors[prefix + "dec_noise"])
        name = f"{self.modality.upper()}_regression"
        if f"{prefix}loss.{name}" in self.tensors:
            ours = regression(out.pred_NJD, out.target_NJD, self.config.loss).flatten(0, 1)
            yield compare(f"loss.{name}", ours, self.tensors[f"{prefix}loss.{name}"], rtol=1e-3, atol=1e-3)
        if f"{prefix}loss.cls" in self.tensors:
            hidden = model.see_views(batch, model.encoders[self.modality].local(batch.source))
            ours = (
                regression(
                    hidden[:, self.config.extra_tokens - 1],
                    model.mean_target(batch, out.targets_BTD),
                    self.config.loss,
                )
                * self.config.loss.cls_weight
                * out.sample_size
            )
            yield compare("loss.cls", ours, self.tensors[f"{prefix}loss.cls"], rtol=1e-3, atol=1e-3)

    def check_gradients(self, model: Data2Vec, prefix: str, recorded: dict) -> Iterator[Row]:
        """|| difference || against 1e-3 of the reference's norm plus 1e-6 of the global norm."""
        parameters = dict(model.named_parameters())
        slack = 1e-6 * recorded["grad_global_l2"]
        for name, norm in recorded["grad_l2"].items():
            gradient = self.part(name, {n: p.grad for n, p in parameters.items()})
            ours = 0.0 if gradient is None else gradient.double().norm().item()
            yield Row(f"grad_l2.{name}", abs(ours - norm), abs(ours - norm) / (1e-3 * norm + slack))
            full = self.tensors.get(f"{prefix}grad.{name}")
            if full is not None:
                reference = our_tensor(name, full)
                difference = (gradient - reference).double().norm().item()
                yield Row(
                    f"grad.{name}", difference, difference / (1e-3 * reference.double().norm().item() + slack)
                )
        total = (
            torch.stack([p.grad.double().norm() for p in parameters.values() if p.grad is not None])
            .norm()
            .item()
        )
        yield compare_number("grad_global_l2", total, recorded["grad_global_l2"], rtol=1e-3)

    def part(self, name: str, tensors: dict[str, Tensor | None]) -> Tensor | None:
        """Our tensor that stands for a recorded name."""
        return tensors[our_name(name)]

    @torch.no_grad()
    def check_features(self, model: Data2Vec, batch: Batch, prefix: str) -> Iterator[Row]:
        """Features of whole samples, every layer."""
        outputs, ffns = model.eval().encode(batch)
        model.train()
        for kind, layers in (("block_out", outputs), ("layer_result", ffns)):
            for i, layer in enumerate(layers):
                if f"{prefix}feat.{kind}.{i}" in self.tensors:
                    yield compare(
                        f"feat.{kind}.{i}", layer, self.tensors[f"{prefix}feat.{kind}.{i}"], **TIGHT
                    )
        if f"{prefix}feat.x" in self.tensors:
            ours = outputs[-1][:, self.config.extra_tokens :]
            yield compare("feat.x", ours, self.tensors[f"{prefix}feat.x"], **TIGHT)
        if f"{prefix}feat.padding_mask" in self.tensors:
            ours = (
                torch.zeros(ours.shape[:2], dtype=torch.bool)
                if batch.padding_BT is None
                else batch.padding_BT
            )
            yield compare("feat.padding_mask", ours, self.tensors[f"{prefix}feat.padding_mask"], 0, 0.5)

    def check_ema(self, model: Data2Vec) -> Iterator[Row]:
        """The teacher after one step of the moving average."""
        model.follow(self.info["ema_step"]["decay_used"])
        teacher = dict(model.named_parameters())
        for key, reference in self.tensors.items():
            if key.startswith("ema_after."):
                name = "_ema." + key.removeprefix("ema_after.")
                if our_name(name) is None:
                    continue
                yield compare(key, teacher[our_name(name)].detach(), our_tensor(name, reference), 0, 1e-6)


class CaseV1(Case):
    """One recorded data2vec v1 model of speech or text."""

    def build(self) -> Data2Vec:
        cfg = dict(self.info["resolved_config"])
        if "transformer" in cfg:
            cfg["vocabulary"] = self.weights["encoder.sentence_encoder.embed_tokens.weight"].shape[0]
        body, configs = fairseq_v1.our_config(cfg)
        ((self.modality, self.config),) = configs.items()
        model = build_model(body, configs, fairseq_compat=True)
        model.load_state_dict(fairseq_v1.our_weights(self.weights, self.config.teacher), strict=True)
        return model.train()

    def batch(self, prefix: str) -> Batch:
        get = lambda key: self.tensors.get(prefix + key)  # noqa: E731
        mask, padding = get("mask").bool(), get("padding_mask")
        if self.modality == "audio":
            source = get("source")
            padding = None if padding is None else self.frame_padding(padding, mask.shape[1])
        else:  # the recorded input has <mask> in it, the targets what stood there
            source = torch.where(mask, get("target_tokens"), get("src_tokens")).long()
            padding = source == PAD
        padding = padding if padding is not None and bool(padding.any()) else None
        return Batch(self.modality, source, padding, **make_masked(mask))

    @torch.no_grad()
    def check_parts(self, model: Data2Vec, batch: Batch, prefix: str) -> Iterator[Row]:
        local = model.encoders[self.modality].local(batch.source) if self.modality == "audio" else None
        real = torch.ones_like(batch.mask_NT) if batch.padding_BT is None else ~batch.padding_BT
        hidden = model.see_views(batch, local)
        yield compare("enc_out", hidden[real], self.tensors[prefix + "enc_out"][real], **TIGHT)
        taught = model.masked_alone(batch) if self.modality == "text" else batch
        _, layers = model.teach(taught, local)
        real = batch.mask_NT if self.modality == "text" else real
        for i, layer in enumerate(layers[-self.config.target.top_k :]):
            if f"{prefix}teacher_layer.{i}" in self.tensors:
                reference = self.tensors[f"{prefix}teacher_layer.{i}"]
                yield compare(f"teacher_layer.{i}", layer[real], reference[real], **TIGHT)

    def check_step(self, model: Data2Vec, batch: Batch, prefix: str, recorded: dict) -> Iterator[Row]:
        model.zero_grad()
        out, scalars = model(batch), recorded["scalars"]
        counts = (
            torch.ones_like(batch.masked_NJ, dtype=torch.bool) if out.counts_NJ is None else out.counts_NJ
        )
        pred, target = out.pred_NJD[counts], out.target_NJD[counts]
        yield compare("pred", pred, self.tensors[prefix + "pred"], **LOOSE)
        yield compare("y", target, self.tensors[prefix + "y"], **LOOSE)
        yield compare_number("sample_size", out.sample_size.item(), scalars["sample_size"])
        yield compare_number("total_loss", out.loss.item(), scalars["total_loss"])
        for key, tensor in (("pred_var", pred), ("target_var", target)):
            if key in scalars:
                spread = (tensor.var(dim=0) + 1e-6).sqrt().mean()
                yield compare_number(key, spread.item(), scalars[key], rtol=1e-4)
        (out.loss / out.sample_size).backward()
        yield from self.check_gradients(model, prefix, recorded)

    def part(self, name: str, tensors: dict[str, Tensor | None]) -> Tensor | None:
        place = fairseq_v1.our_name(name)
        tensor = None if place is None else tensors[place.name]
        return None if tensor is None else place.of(tensor)

    @torch.no_grad()
    def check_features(self, model: Data2Vec, batch: Batch, prefix: str) -> Iterator[Row]:
        outputs, ffns = model.eval().encode(batch)
        model.train()
        real = torch.ones_like(batch.mask_NT) if batch.padding_BT is None else ~batch.padding_BT
        recorded = {f"block_out.{i}": x for i, x in enumerate(outputs)}
        recorded |= {f"layer_result.{i}": x for i, x in enumerate(ffns)} | {"x": outputs[-1]}
        for name, ours in recorded.items():
            if f"{prefix}feat.{name}" in self.tensors:
                yield compare(f"feat.{name}", ours[real], self.tensors[f"{prefix}feat.{name}"][real], **TIGHT)
        if f"{prefix}feat.padding_mask" in self.tensors:
            yield compare("feat.padding_mask", ~real, self.tensors[f"{prefix}feat.padding_mask"], 0, 0.5)

    @torch.no_grad()
    def check_ema(self, model: Data2Vec) -> Iterator[Row]:
        """What the teacher does not own is the student's own tensor, a copy in the original."""
        model.follow(self.info["ema_step"]["decay_used"])
        values = dict(model.named_parameters())
        prefix = "_ema." if self.modality == "audio" else "encoder._ema."
        for key, reference in self.tensors.items():
            name = prefix + key.removeprefix("ema_after.")
            place = fairseq_v1.our_name(name) if key.startswith("ema_after.") else None
            if place is not None:
                owned = place.name if place.name in values else place.name.removeprefix("teacher.")
                yield compare(key, place.of(values[owned].detach()), reference, 0, 1e-6)


def prefixed(batch: str, row: Row) -> Row:
    return Row(f"{batch}.{row.quantity}", row.max_difference, row.error)


def find_cases(folder: Path) -> list[Path]:
    """NAME.json files with both tensor files beside them."""
    cases = [
        path
        for path in sorted(folder.glob("*.json"))
        if path.with_suffix(".weights.safetensors").exists()
        and path.with_suffix(".tensors.safetensors").exists()
    ]
    if not cases:
        raise SystemExit(
            f"no case in {folder}: a case is NAME.json with NAME.weights.safetensors and "
            "NAME.tensors.safetensors beside it"
        )
    return cases


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of recorded cases")
    parser.add_argument("--worst", type=int, default=0, help="print only the N worst rows of each case")
    arguments = parser.parse_args()
    misses = 0
    for path in find_cases(arguments.folder):
        rows = list(read_case(path).rows())
        misses += sum(not row.error <= 1 for row in rows)
        shown = sorted(rows, key=lambda row: -row.error)[: arguments.worst] if arguments.worst else rows
        for row in shown:
            verdict = "ok" if row.error <= 1 else "MISS"
            print(
                f"{path.stem:24} {row.quantity:72} diff {row.max_difference:9.2e}  "
                f"{row.error:9.2e} of tolerance  {verdict}"
            )
        print(
            f"{path.stem:24} {len(rows)} quantities, {sum(not row.error <= 1 for row in rows)} out of tolerance"
        )
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
