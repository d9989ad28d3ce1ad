"""Does what student and teacher say carry anything? Statistics of one step, over all its samples and ranks.

Four places are looked at: the targets, the predictions, the student's output (`encoder`) and the tokens that go into
it (`local`). The norms that make targets hide a collapse: a teacher that says the same of every sample, or nothing
but rounding errors, has targets of healthy variance. So each place has numbers that no norm hides (docs/health.md):
content, the effective rank of its tokens, and how far samples lie apart.

B samples, T tokens, D dim, P places, S dim of a sketch. Of a micro-batch sums are fp32; over micro-batches and ranks
they are fp64, and reduced together: the numbers do not depend on the number of ranks. Of the views of a sample the
first one is looked at.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from d2v_ds.model.batch import Batch
from d2v_ds.model.data2vec import Output

SKETCH_DIM = 64
"""Tokens are projected to so many dimensions before their rank is measured: eigenvalues of D = 768 would take longer
than one percent of a step, and a rank worth a warning is far below 64."""
SKETCH_TOKENS = 256
"""Of a micro-batch at most so many, evenly spaced."""
LEAST_TOKENS = 32
"""Fewer in a whole step have no rank: it is below their number, whatever they are."""


class Sums:
    """Tensors that add up over micro-batches and ranks; where they end in positions, the shorter one is filled up."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add_sums(self, **new: Tensor) -> None:
        for key, value in new.items():
            old = self.sums.get(key)
            if old is None:
                self.sums[key] = value
            else:
                tokens = max(len(old), len(value)) if old.ndim else 0
                self.sums[key] = grow(old, tokens) + grow(value, tokens)


def grow(x: Tensor, tokens: int) -> Tensor:
    """(T, ...) with zeros behind it; a scalar as it is."""
    if not x.ndim or len(x) == tokens:
        return x
    return F.pad(x, (*[0] * (2 * x.ndim - 1), tokens - len(x)))


class Spread(Sums):
    """fairseq's numbers, of targets and predictions at the masked positions of all views, by channel."""

    def add(self, target_NJD: Tensor, pred_NJD: Tensor, counts_NJ: Tensor | None) -> None:
        target, pred = target_NJD.float(), pred_NJD.float()
        count = target.new_tensor(target.shape[0] * target.shape[1], dtype=torch.float64)
        if counts_NJ is not None:
            target, pred = (x.masked_fill(~counts_NJ[..., None], 0) for x in (target, pred))
            count = counts_NJ.sum(dtype=torch.float64)
        self.add_sums(
            count=count,
            target=target.sum((0, 1)).double(),
            target_square=target.square().sum((0, 1)).double(),
            pred=pred.sum((0, 1)).double(),
            pred_square=pred.square().sum((0, 1)).double(),
            error=F.mse_loss(pred, target, reduction="sum").double(),
        )

    def values(self) -> dict[str, Tensor]:
        """`target_var`, `pred_var`: mean over channels of the standard deviation over tokens, as
        the original calls and computes them (unbiased, + 1e-6 under the root). `explained`: share of the targets'
        variance that the predictions explain, 0 for predicting the mean target."""
        s = self.sums
        target_sum = (
            s["target_square"] - s["target"].square() / s["count"]
        )  # of squared differences from the mean
        pred_sum = s["pred_square"] - s["pred"].square() / s["count"]
        return {
            "target_var": standard_deviation(target_sum, s["count"]),
            "pred_var": standard_deviation(pred_sum, s["count"]),
            "explained": 1 - s["error"] / target_sum.sum().clamp(min=1e-12),
        }


def standard_deviation(squares: Tensor, count: Tensor) -> Tensor:
    return ((squares / (count - 1).clamp(min=1)).clamp(min=0) + 1e-6).sqrt().mean()


class Place(NamedTuple):
    """The tokens of one place in one micro-batch."""

    x_BND: Tensor
    positions_BN: Tensor | None = None
    """Where in the sample each one lies; None = at 0, 1, ..."""
    unused_BN: Tensor | None = None
    """Bool, True = not to be looked at; None = none."""


PLACES = ("target", "pred", "encoder", "local")
BEFORE_NORMS = "layers"
"""A place more: what targets are made of; their spreads are of this."""


class Places(Sums):
    """Content, rank and spread of the P places, all (P, ...) or, with positions, (T, P, ...)."""

    def add(self, places: list[Place], tokens: int) -> None:
        """Of a modality of `tokens` positions. A place more than PLACES has no rank."""
        x_PBTD, real_PBT = lay_out(places, tokens)
        squares_PBT = x_PBTD.square().sum(3)
        count_PB = real_PBT.sum(2, dtype=torch.float64)
        total_PBD = x_PBTD.sum(2).double()
        mean_PBD = total_PBD / count_PB.clamp(min=1)[..., None]
        x_PNS, sketched_P = sketch(places[: len(PLACES)])
        self.add_sums(
            # for content
            seen_TP=real_PBT.sum(1, dtype=torch.float64).T,
            total_TPD=x_PBTD.sum(1).double().transpose(0, 1),
            squares_TP=squares_PBT.sum(1, dtype=torch.float64).T,
            # for the spreads, of samples' means and of tokens
            samples=count_PB.count_nonzero(1).double(),
            means_PD=mean_PBD.sum(1),
            mean_squares=mean_PBD.square().sum((1, 2)),
            tokens=count_PB.sum(1),
            tokens_PD=total_PBD.sum(1),
            token_squares=squares_PBT.sum((1, 2), dtype=torch.float64),
            # for the rank; squared in fp64, since errors of fp32 would be a rank of their own
            sketched=sketched_P,
            sketched_PS=x_PNS.sum(1),
            gram_PSS=x_PNS.mT @ x_PNS,
        )

    def values(self) -> dict[str, Tensor]:
        """Each (P,)."""
        s = self.sums
        return {
            "content": content(s["seen_TP"], s["total_TPD"], s["squares_TP"]),
            "spread": relative(s["samples"], s["means_PD"], s["mean_squares"]),
            "token_spread": relative(s["tokens"], s["tokens_PD"], s["token_squares"]),
        }

    def covariance(self) -> Tensor:
        """Of the sketched tokens; (P, S, S)."""
        mean_PS = self.sums["sketched_PS"] / self.sums["sketched"][:, None]
        gram_PSS = self.sums["gram_PSS"] / self.sums["sketched"][:, None, None]
        return gram_PSS - mean_PS[:, :, None] * mean_PS[:, None, :]


def lay_out(places: list[Place], tokens: int) -> tuple[Tensor, Tensor]:
    """All places side by side, each token at its position: (P, B, T, D) fp32, 0 where nothing is looked at, and
    (P, B, T), 1 where something is. So that an operator serves them all: in small models operators are the cost."""
    batch, _, dim = places[0].x_BND.shape
    x_PBTD = places[0].x_BND.new_zeros(len(places), batch, tokens + 1, dim, dtype=torch.float32)
    real_PBT = x_PBTD.new_zeros(len(places), batch, tokens + 1)
    rows_B1 = torch.arange(batch, device=x_PBTD.device)[:, None]
    for (x_BND, positions_BN, unused_BN), x_BTD, real_BT in zip(places, x_PBTD, real_PBT, strict=True):
        if positions_BN is None:
            x_BTD[:, :tokens], real_BT[:, :tokens] = x_BND, 1
            if unused_BN is not None:
                x_BTD[:, :tokens].masked_fill_(unused_BN[..., None], 0)
                real_BT[:, :tokens].masked_fill_(unused_BN, 0)
            continue
        if unused_BN is not None:
            positions_BN = positions_BN.masked_fill(unused_BN, tokens)  # a position more, for the unused
        x_BTD[rows_B1, positions_BN] = x_BND.float()
        real_BT.scatter_(1, positions_BN, 1)
    x_PBTD[:, :, tokens], real_PBT[:, :, tokens] = 0, 0
    return x_PBTD, real_PBT


def sketch(places: list[Place]) -> tuple[Tensor, Tensor]:
    """(P, SKETCH_TOKENS, S) fp64, tokens of each place, evenly spaced, then rows of zeros; (P,) how many they are."""
    x = places[0].x_BND
    project = projection(x.shape[2], x.device)
    x_PNS = x.new_zeros(len(places), SKETCH_TOKENS, project.shape[1], dtype=torch.float64)
    counts = []
    for (x_BND, _, unused_BN), x_NS in zip(places, x_PNS, strict=True):
        step = sketch_step(x_BND.shape[0] * x_BND.shape[1], x_BND.shape[1])
        x_ND = x_BND.flatten(0, 1)[::step].float()
        count = x.new_full((), len(x_ND), dtype=torch.float64)
        if unused_BN is not None:
            unused_N = unused_BN.flatten()[::step]
            x_ND = x_ND.masked_fill(unused_N[:, None], 0)
            count -= unused_N.sum()
        x_NS[: len(x_ND)] = x_ND @ project
        counts.append(count)
    return x_PNS, torch.stack(counts)


def sketch_step(rows: int, tokens: int) -> int:
    """Every how many rows one is taken: evenly spaced, and at other positions in each sample."""
    step = -(-rows // SKETCH_TOKENS)
    while gcd(step, tokens) > 1:
        step += 1
    return step


@lru_cache
def projection(dim: int, device: torch.device) -> Tensor:
    """(D, S), equal in every run; the run's own random state is left alone."""
    if dim <= SKETCH_DIM:
        return torch.eye(dim, device=device)
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(dim, SKETCH_DIM, generator=generator) / dim**0.5).to(device)


def content(seen_TP: Tensor, total_TPD: Tensor, squares_TP: Tensor) -> Tensor:
    """Share of the variance that differs between samples at the same position.

    mean_c mean_t Var_b(y[b, t, c]) / mean_c Var_{b,t}(y[b, t, c]), real tokens only, biased variance; 0 = the
    position alone decides.
    """
    counts_TP = seen_TP > 1  # a position seen once has no spread
    n_TP = seen_TP.clamp(min=1)
    within_TP = squares_TP / n_TP - (total_TPD / n_TP[..., None]).square().sum(2)
    within = (within_TP * counts_TP).sum(0) / counts_TP.sum(0)  # 0 / 0 is nan
    n = (seen_TP * counts_TP).sum(0).clamp(min=1)
    mean_PD = (total_TPD * counts_TP[..., None]).sum(0) / n[:, None]
    overall = (squares_TP * counts_TP).sum(0) / n - mean_PD.square().sum(1)
    return (within / overall.clamp(min=1e-30)).clamp(0)


def relative(count_P: Tensor, total_PD: Tensor, square_P: Tensor) -> Tensor:
    """How far samples, or tokens, lie apart, beside how far from zero they lie.

    sqrt(s^2 / (s^2 + m^2)) with s^2 their variance, summed over channels, and m the length of their mean: nearly
    s / m where it is small, 0 = all are alike, 1 = they have nothing in common.
    """
    mean_square = square_P / count_P
    variance = mean_square - (total_PD / count_P[:, None]).square().sum(1)
    return (variance / mean_square.clamp(min=1e-30)).clamp(0, 1).sqrt()


def effective_rank(covariance_SS: Tensor) -> Tensor:
    """exp of the entropy of the singular values (Roy & Vetterli 2007; RankMe, arXiv:2210.02885) of rows that have this
    covariance: (..., S, S) -> (...); nan for what is not finite."""
    is_finite = covariance_SS.sum((-1, -2)).isfinite()[..., None, None]
    singular = torch.linalg.eigvalsh(covariance_SS.where(is_finite, 0)).clamp(min=0).sqrt()
    share = singular / singular.sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.special.entr(share).sum(-1).exp().where(is_finite[..., 0, 0], float("nan"))


class Modality:
    """All that is known of one modality in one step."""

    def __init__(self) -> None:
        self.spread, self.places = Spread(), Places()

    def add(self, batch: Batch, output: Output) -> None:
        observed, views, tokens = output.observed, batch.clones, output.targets_BTD.shape[1]
        padding_BT = batch.padding_BT
        masked_BJ = batch.masked_NJ[::views]
        filler_BJ = None if padding_BT is None else padding_BT.gather(1, masked_BJ)
        if batch.counted_NJ is not None:
            unused_BJ = ~batch.counted_NJ[::views]
            filler_BJ = unused_BJ if filler_BJ is None else filler_BJ | unused_BJ
        # None: the student sees all tokens
        keep_BK = None if batch.keep_NK is None else batch.keep_NK[::views]
        unseen_BK = padding_BT
        if padding_BT is not None and keep_BK is not None:
            unseen_BK = padding_BT.gather(1, keep_BK)

        self.spread.add(output.target_NJD, output.pred_NJD, output.counts_NJ)
        places = {
            "target": Place(output.targets_BTD, None, padding_BT),
            "pred": Place(output.pred_NJD[::views], masked_BJ, filler_BJ),
            "encoder": Place(observed.hidden_NKD[::views], keep_BK, unseen_BK),
            "local": Place(observed.local_BTD, None, padding_BT),
            BEFORE_NORMS: Place(observed.layers_BTD, None, padding_BT),
        }
        self.places.add([places[name] for name in (*PLACES, BEFORE_NORMS)], tokens)

    def sums(self) -> list[Sums]:
        return [self.spread, self.places]


class Health:
    """The statistics of one step for each modality; ranks see the same modalities in the same order."""

    def __init__(self) -> None:
        self.parts: dict[str, Modality] = {}

    @torch.no_grad()
    def observe(self, batch: Batch, output: Output) -> None:
        """`output` of a forward pass with `is_observed`."""
        self.parts.setdefault(batch.modality, Modality()).add(batch, output)

    @torch.no_grad()
    def values(self) -> dict[str, float]:
        """Over all ranks, who all call it: `NAME/content`, `NAME/rank`, `NAME/spread` and `NAME/token_spread` of the
        targets, the same of `NAME/pred_...`, `NAME/encoder_...`, `NAME/local_...`, and `NAME/target_var`,
        `NAME/pred_var`, `NAME/explained`."""
        names = sorted(self.parts)
        if not names:
            return {}
        reduce_sums([part for name in names for part in self.parts[name].sums()])
        covariances = torch.stack([self.parts[name].places.covariance() for name in names])
        ranks = effective_rank(covariances.cpu()).to(covariances.device)
        values: dict[str, Tensor] = {}
        for name, rank_P in zip(names, ranks, strict=True):
            found = self.parts[name].places.values()
            is_enough_P = self.parts[name].places.sums["sketched"] >= LEAST_TOKENS
            rank_P = rank_P.where(is_enough_P, float("nan"))
            found = {"content": found.pop("content"), "rank": rank_P, **found}
            for i, place in enumerate(PLACES):
                prefix = f"{name}/" if place == "target" else f"{name}/{place}_"
                for key, value_P in found.items():
                    values[prefix + key] = value_P[-1 if place == "target" and "spread" in key else i]
            values |= {f"{name}/{key}": value for key, value in self.parts[name].spread.values().items()}
        numbers = torch.stack(list(values.values()))
        if dist.get_world_size() > 1:
            dist.broadcast(numbers, 0)  # equal to the bit, so all ranks decide the same
        return dict(zip(values, numbers.tolist(), strict=True))


def reduce_sums(parts: list[Sums]) -> None:
    """Adds up over ranks, in two reductions: lengths, since ranks may have seen different ones, and sums."""
    if dist.get_world_size() == 1:
        return
    named = [(part, key) for part in parts for key in part.sums if part.sums[key].ndim]
    device = next(iter(parts[0].sums.values())).device
    lengths = torch.tensor([len(part.sums[key]) for part, key in named], device=device)
    dist.all_reduce(lengths, op=dist.ReduceOp.MAX)
    for (part, key), tokens in zip(named, lengths.tolist(), strict=True):
        part.sums[key] = grow(part.sums[key], tokens)
    flat = torch.cat([value.flatten() for part in parts for value in part.sums.values()])
    dist.all_reduce(flat)
    pieces = iter(flat.split([value.numel() for part in parts for value in part.sums.values()]))
    for part in parts:
        part.sums = {key: next(pieces).view(value.shape) for key, value in part.sums.items()}
