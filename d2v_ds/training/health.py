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

from d2v_ds.kernels.regression import gather_targets
from d2v_ds.model.batch import Batch
from d2v_ds.model.data2vec import Output

SKETCH_DIM = 64
"""Tokens are projected to so many dimensions before their rank is measured: eigenvalues of D = 768 would take longer
than one percent of a step, and a rank worth a warning is far below 64."""
SKETCH_TOKENS = 256
"""Of a micro-batch at most so many, evenly spaced."""
MOST_WAITING = 2**24
"""Bytes of small micro-batches that are looked at together."""
LEAST_TOKENS = {"target": 100, "pred": 32, "encoder": 32, "local": 32}
"""Fewer in a whole step have no rank: it is below their number, whatever they are. Healthy targets come nearest to the
limit of a verdict: where many tokens have rank 11, 64 of four samples have 8.5 to 10, and 7.5 was seen."""


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

    def add(self, target_NJD: Tensor, pred_NJD: Tensor, counts_NJ: Tensor | None, parts: int = 1) -> None:
        """Of `parts` micro-batches, one behind the other."""
        target, pred = target_NJD.float(), pred_NJD.float()
        count = target.new_tensor(target.shape[0] * target.shape[1], dtype=torch.float64)
        if counts_NJ is not None:
            target, pred = (x.masked_fill(~counts_NJ[..., None], 0) for x in (target, pred))
            count = counts_NJ.sum(dtype=torch.float64)
        self.add_sums(
            count=count,
            target=sum_parts(target, parts).sum(0),
            target_square=sum_parts(target.square(), parts).sum(0),
            pred=sum_parts(pred, parts).sum(0),
            pred_square=sum_parts(pred.square(), parts).sum(0),
            error=sum_parts((pred - target).square(), parts).sum(),
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


def sum_parts(x_NTD: Tensor, parts: int) -> Tensor:
    """Over samples: in fp32 within each micro-batch, in fp64 over those; (T, D)."""
    return x_NTD.unflatten(0, (parts, -1)).sum(1).double().sum(0)


class Place:
    """The tokens of one place in a micro-batch or several, and what is summed up of them.

    `padding_BT`: bool, True = not to be looked at. `positions_BT`: where in the sample each row lies; None = at 0, 1,
    ... `before_norms_BTD`: the spreads are of these; None = of `x_BTD`. `parts`: so many micro-batches lie in B.
    """

    def __init__(
        self,
        x_BTD: Tensor,
        padding_BT: Tensor | None,
        positions_BT: Tensor | None = None,
        before_norms_BTD: Tensor | None = None,
        parts: int = 1,
    ) -> None:
        self.parts = parts
        self.x_BTD = x_BTD.float()
        self.raw_BTD = self.x_BTD if before_norms_BTD is None else before_norms_BTD.float()
        self.real_BT = torch.ones(x_BTD.shape[:2], dtype=torch.float64, device=x_BTD.device)
        self.positions_BT = positions_BT
        if padding_BT is not None:
            self.real_BT = (~padding_BT).double()
            padding_BT1 = padding_BT[..., None]
            self.x_BTD = self.x_BTD.masked_fill(padding_BT1, 0)
            self.raw_BTD = (
                self.x_BTD if before_norms_BTD is None else self.raw_BTD.masked_fill(padding_BT1, 0)
            )

    def sums(self, tokens: int) -> dict[str, Tensor]:
        """Of a modality of `tokens` positions."""
        squares_BT = self.x_BTD.square().sum(2).double()
        raw_squares_BT = squares_BT
        if self.raw_BTD is not self.x_BTD:
            raw_squares_BT = self.raw_BTD.square().sum(2).double()
        return self.sum_positions(squares_BT, tokens) | self.sum_samples(raw_squares_BT) | self.sum_sketch()

    def sum_positions(self, squares_BT: Tensor, tokens: int) -> dict[str, Tensor]:
        """For content: each (T, ...)."""
        if self.positions_BT is None:
            total_TD = sum_parts(self.x_BTD, self.parts)
            seen_T, squares_T = self.real_BT.sum(0), squares_BT.sum(0)
        else:
            where = self.positions_BT.flatten()
            zeros_T = squares_BT.new_zeros(tokens)
            zeros_TD = squares_BT.new_zeros(tokens, self.x_BTD.shape[2])
            seen_T = zeros_T.index_add(0, where, self.real_BT.flatten())
            squares_T = zeros_T.index_add(0, where, squares_BT.flatten())
            total_TD = zeros_TD.index_add(0, where, self.x_BTD.double().flatten(0, 1))
        return {"seen_T": seen_T, "total_TD": total_TD, "squares_T": squares_T}

    def sum_samples(self, squares_BT: Tensor) -> dict[str, Tensor]:
        """For the spreads, of samples' means and of tokens."""
        count_B = self.real_BT.sum(1)
        total_BD = self.raw_BTD.sum(1).double()
        mean_BD = total_BD / count_B.clamp(min=1)[:, None]
        return {
            "samples": count_B.count_nonzero().double(),
            "means_D": mean_BD.sum(0),
            "mean_squares": mean_BD.square().sum(),
            "tokens": count_B.sum(),
            "tokens_D": total_BD.sum(0),
            "token_squares": squares_BT.sum(),
        }

    def sum_sketch(self) -> dict[str, Tensor]:
        """For the rank; squared in fp64, since errors of fp32 would be a rank of their own."""
        tokens = self.real_BT.shape[1]
        step = sketch_step(self.real_BT.numel() // self.parts, tokens)
        x_PND, real_PN = (x.unflatten(0, (self.parts, -1)).flatten(1, 2) for x in (self.x_BTD, self.real_BT))
        x_NS = sketch(x_PND[:, ::step].flatten(0, 1)).double()
        sketched = real_PN[:, ::step].sum()
        return {"sketched": sketched, "sketched_S": x_NS.sum(0), "gram_SS": x_NS.T @ x_NS}


def sketch_step(rows: int, tokens: int) -> int:
    """Every how many rows one is taken: evenly spaced, and at other positions in each sample."""
    step = -(-rows // SKETCH_TOKENS)
    while gcd(step, tokens) > 1:
        step += 1
    return step


def sketch(x_ND: Tensor) -> Tensor:
    """(N, D) -> (N, S)."""
    dim = x_ND.shape[1]
    return x_ND if dim <= SKETCH_DIM else x_ND @ projection(dim, x_ND.device)


@lru_cache
def projection(dim: int, device: torch.device) -> Tensor:
    """Equal in every run; the run's own random state is left alone."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(dim, SKETCH_DIM, generator=generator) / dim**0.5).to(device)


PLACES = ("target", "pred", "encoder", "local")


class Places(Sums):
    """Content, rank and spread of the P places. They lie side by side in each sum, so that an operator serves all:
    (P,) of numbers, (T, P, ...), (D, P) and (S, P, S) of the others."""

    def add(self, places: list[Place], tokens: int) -> None:
        sums = [place.sums(tokens) for place in places]
        self.add_sums(
            **{key: torch.stack([s[key] for s in sums], min(x.ndim, 1)) for key, x in sums[0].items()}
        )

    def values(self) -> dict[str, Tensor]:
        """Each (P,)."""
        s = self.sums
        return {
            "content": content(s["seen_T"], s["total_TD"], s["squares_T"]),
            "spread": relative(s["samples"], s["means_D"], s["mean_squares"]),
            "token_spread": relative(s["tokens"], s["tokens_D"], s["token_squares"]),
        }

    def covariance(self) -> Tensor:
        """Of the sketched tokens; (P, S, S)."""
        mean_PS = (self.sums["sketched_S"] / self.sums["sketched"]).T
        gram_PSS = self.sums["gram_SS"].transpose(0, 1) / self.sums["sketched"][:, None, None]
        return gram_PSS - mean_PS[:, :, None] * mean_PS[:, None, :]


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


def relative(count_P: Tensor, total_DP: Tensor, square_P: Tensor) -> Tensor:
    """How far samples, or tokens, lie apart, beside how far from zero they lie.

    sqrt(s^2 / (s^2 + m^2)) with s^2 their variance, summed over channels, and m the length of their mean: nearly
    s / m where it is small, 0 = all are alike, 1 = they have nothing in common.
    """
    mean_square = square_P / count_P
    variance = mean_square - (total_DP / count_P).square().sum(0)
    return (variance / mean_square.clamp(min=1e-30)).clamp(0, 1).sqrt()


def effective_rank(covariance_SS: Tensor) -> Tensor:
    """exp of the entropy of the singular values (Roy & Vetterli 2007; RankMe, arXiv:2210.02885) of rows that have this
    covariance: (..., S, S) -> (...); nan for what is not finite."""
    is_finite = covariance_SS.isfinite().all(-1).all(-1)
    safe = torch.where(is_finite[..., None, None], covariance_SS, torch.zeros_like(covariance_SS))
    singular = torch.linalg.eigvalsh(safe).clamp(min=0).sqrt()
    share = singular / singular.sum(-1, keepdim=True).clamp(min=1e-30)
    rank = torch.special.entr(share).sum(-1).exp()
    return torch.where(is_finite, rank, torch.full_like(rank, float("nan")))


class Looked(NamedTuple):
    """What is looked at of one micro-batch, or of several that lie one behind the other."""

    targets_BTD: Tensor
    layers_BTD: Tensor
    """Of which the targets were made, before any norm."""
    local_BTD: Tensor
    padding_BT: Tensor | None
    pred_NJD: Tensor
    masked_NJ: Tensor
    counts_NJ: Tensor | None
    counted_NJ: Tensor | None
    hidden_NKD: Tensor
    keep_NK: Tensor | None
    """None: the student sees all tokens."""

    @classmethod
    def of(cls, batch: Batch, output: Output) -> Looked:
        observed = output.observed
        return cls(
            output.targets_BTD,
            observed.layers_BTD,
            observed.local_BTD,
            batch.padding_BT,
            output.pred_NJD.detach(),
            batch.masked_NJ,
            output.counts_NJ,
            batch.counted_NJ,
            observed.hidden_NKD,
            batch.keep_NK,
        )

    @property
    def shapes(self) -> list[torch.Size | None]:
        return [None if x is None else x.shape for x in self]

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in self if x is not None)

    def places(self, parts: int) -> list[Place]:
        """In the order of PLACES; of the views of a sample the first."""
        padding_BT, views = self.padding_BT, len(self.masked_NJ) // len(self.targets_BTD)
        masked_BJ = self.masked_NJ[::views]
        filler_BJ = None if padding_BT is None else padding_BT.gather(1, masked_BJ)
        if self.counted_NJ is not None:
            unused_BJ = ~self.counted_NJ[::views]
            filler_BJ = unused_BJ if filler_BJ is None else filler_BJ | unused_BJ
        keep_BK = None if self.keep_NK is None else self.keep_NK[::views]
        unseen_BK = padding_BT
        if padding_BT is not None and keep_BK is not None:
            unseen_BK = padding_BT.gather(1, keep_BK)
        places = {
            "target": Place(self.targets_BTD, padding_BT, before_norms_BTD=self.layers_BTD, parts=parts),
            "pred": Place(self.pred_NJD[::views], filler_BJ, masked_BJ, parts=parts),
            "encoder": Place(self.hidden_NKD[::views], unseen_BK, keep_BK, parts=parts),
            "local": Place(self.local_BTD, padding_BT, parts=parts),
        }
        return [places[name] for name in PLACES]


def join(looked: list[Looked]) -> Looked:
    """Of equal shapes."""
    if len(looked) == 1:
        return looked[0]
    return Looked(*(None if x[0] is None else torch.cat(x) for x in zip(*looked, strict=True)))


class Modality:
    """All that is known of one modality in one step.

    Small micro-batches wait for others of their shapes: what an operator costs does not depend on their size.
    """

    def __init__(self) -> None:
        self.spread, self.places = Spread(), Places()
        self.waiting: list[Looked] = []

    def add(self, batch: Batch, output: Output) -> None:
        looked = Looked.of(batch, output)
        if self.waiting and looked.shapes != self.waiting[0].shapes:
            self.add_waiting()
        self.waiting.append(looked)
        if len(self.waiting) * looked.bytes >= MOST_WAITING:
            self.add_waiting()

    def add_waiting(self) -> None:
        if not self.waiting:
            return
        x, parts = join(self.waiting), len(self.waiting)
        self.waiting = []
        target_NJD = gather_targets(x.targets_BTD, x.masked_NJ)
        self.spread.add(target_NJD, x.pred_NJD, x.counts_NJ, parts)
        self.places.add(x.places(parts), x.targets_BTD.shape[1])

    def sums(self) -> list[Sums]:
        self.add_waiting()
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
        least_P = torch.tensor([LEAST_TOKENS[place] for place in PLACES], device=ranks.device)
        for name, rank_P in zip(names, ranks, strict=True):
            found = self.parts[name].places.values()
            is_enough_P = self.parts[name].places.sums["sketched"] >= least_P
            rank_P = rank_P.where(is_enough_P, float("nan"))
            found = {"content": found.pop("content"), "rank": rank_P, **found}
            for i, place in enumerate(PLACES):
                prefix = f"{name}/" if place == "target" else f"{name}/{place}_"
                values |= {prefix + key: value_P[i] for key, value_P in found.items()}
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
