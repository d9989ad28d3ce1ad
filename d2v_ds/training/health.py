"""Does what student and teacher say carry anything? Statistics of one step, over all its samples and ranks.

Four places are looked at: the targets, the predictions, the student's output (`encoder`) and the tokens that go into
it (`local`). The norms that make targets hide a collapse: a teacher that says the same of every sample, or nothing
but rounding errors, has targets of healthy variance. So each place has numbers that no norm hides (docs/health.md):
content, the effective rank of its tokens, and how far samples lie apart.

B samples, T tokens, D dim, S dim of a sketch. Sums are fp64, of every rank, and reduced together: the numbers do not
depend on the number of ranks. Of the views of a sample the first one is looked at.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from d2v_ds.model.batch import Batch
from d2v_ds.model.data2vec import Output

SKETCH_DIM = 64
"""Tokens are projected to so many dimensions before their rank is measured: eigenvalues of D = 768 would take longer
than one percent of a step, and a rank worth a warning is far below 64."""
SKETCH_TOKENS = 512
"""Of a micro-batch, evenly spaced."""


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

        def total(x: Tensor) -> Tensor:
            return x.sum((0, 1), dtype=torch.float64)

        self.add_sums(
            count=count,
            target=total(target),
            target_square=total(target.square()),
            pred=total(pred),
            pred_square=total(pred.square()),
            error=total((pred - target).square()),
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
            "explained": 1 - s["error"].sum() / target_sum.sum().clamp(min=1e-12),
        }


def standard_deviation(squares: Tensor, count: Tensor) -> Tensor:
    return ((squares / (count - 1).clamp(min=1)).clamp(min=0) + 1e-6).sqrt().mean()


class Content(Sums):
    """Share of the variance that differs between samples at the same position.

    mean_c mean_t Var_b(y[b, t, c]) / mean_c Var_{b,t}(y[b, t, c]), real tokens only, biased variance; 0 = the
    position alone decides.
    """

    def add(self, x_BTD: Tensor, real_BT: Tensor, positions_BT: Tensor | None, tokens: int) -> None:
        """Padded rows of `x_BTD` are zero. `positions_BT`: where in the sample's `tokens` each row of it lies; None =
        at 0, 1, ..."""
        squares_BT = x_BTD.square().sum(2).double()
        if positions_BT is None:
            count, total, squares = (
                real_BT.double().sum(0),
                x_BTD.sum(0, dtype=torch.float64),
                squares_BT.sum(0),
            )
        else:
            where = positions_BT.flatten()
            zeros = squares_BT.new_zeros(tokens)
            count = zeros.index_add(0, where, real_BT.double().flatten())
            squares = zeros.index_add(0, where, squares_BT.flatten())
            total = squares_BT.new_zeros(tokens, x_BTD.shape[2]).index_add(
                0, where, x_BTD.double().flatten(0, 1)
            )
        self.add_sums(count=count, total=total, squares=squares)

    def value(self) -> Tensor:
        count_T, total_TD, squares_T = self.sums["count"], self.sums["total"], self.sums["squares"]
        is_seen_T = count_T > 1  # a position seen once has no spread
        n_T = count_T.clamp(min=1)
        within_T = squares_T / n_T - (total_TD / n_T[:, None]).square().sum(1)
        within = (within_T * is_seen_T).sum() / is_seen_T.sum()  # 0 / 0 is nan
        n = (count_T * is_seen_T).sum().clamp(min=1)
        overall = (squares_T * is_seen_T).sum() / n - (
            (total_TD * is_seen_T[:, None]).sum(0) / n
        ).square().sum()
        return (within / overall.clamp(min=1e-30)).clamp(0)


class Pooled(Sums):
    """How far samples, and tokens, lie apart, beside how far from zero they lie.

    Spread: sqrt(s^2 / (s^2 + m^2)) with s^2 the variance between the samples' mean embeddings, summed over channels,
    and m the length of their mean: nearly s / m where it is small, 0 = all samples are alike, 1 = they have nothing in
    common. `tokens` is the same of single tokens.
    """

    def add(self, x_BTD: Tensor, real_BT: Tensor) -> None:
        count_B = real_BT.sum(1).double()
        total_BD = x_BTD.sum(1, dtype=torch.float64)
        pooled_BD = total_BD / count_B.clamp(min=1)[:, None]
        self.add_sums(
            samples=(count_B > 0).double().sum(),
            pooled=pooled_BD.sum(0),
            pooled_square=pooled_BD.square().sum(),
            tokens=count_B.sum(),
            total=total_BD.sum(0),
            square=x_BTD.square().sum(dtype=torch.float64),
        )

    def values(self) -> tuple[Tensor, Tensor]:
        """(spread of samples, spread of tokens)."""
        s = self.sums
        return (
            relative(s["samples"], s["pooled"], s["pooled_square"]),
            relative(s["tokens"], s["total"], s["square"]),
        )


def relative(count: Tensor, total_D: Tensor, square: Tensor) -> Tensor:
    mean_square = square / count
    variance = mean_square - (total_D / count).square().sum()
    return (variance / mean_square.clamp(min=1e-30)).clamp(0, 1).sqrt()


class Rank(Sums):
    """Effective rank of the tokens: exp of the entropy of their singular values (Roy & Vetterli 2007; RankMe,
    arXiv:2210.02885), their mean removed, in a fixed random projection to at most SKETCH_DIM dimensions."""

    def add(self, x_BTD: Tensor, real_BT: Tensor) -> None:
        x_ND, real_N = x_BTD.flatten(0, 1), real_BT.flatten()
        step = -(-len(x_ND) // SKETCH_TOKENS)
        x_NS = sketch(x_ND[::step]).double()
        self.add_sums(count=real_N[::step].double().sum(), total=x_NS.sum(0), gram=x_NS.T @ x_NS)

    def covariance(self) -> Tensor:
        mean = self.sums["total"] / self.sums["count"]
        return self.sums["gram"] / self.sums["count"] - mean[:, None] * mean


def sketch(x_ND: Tensor) -> Tensor:
    """(N, D) -> (N, S)."""
    dim = x_ND.shape[1]
    return x_ND if dim <= SKETCH_DIM else x_ND @ projection(dim, x_ND.device)


@lru_cache
def projection(dim: int, device: torch.device) -> Tensor:
    """Equal in every run; the run's own random state is left alone."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(dim, SKETCH_DIM, generator=generator) / dim**0.5).to(device)


def effective_rank(covariance_SS: Tensor) -> Tensor:
    """(..., S, S) -> (...); nan for what is not finite."""
    is_finite = covariance_SS.isfinite().all(-1).all(-1)
    safe = torch.where(is_finite[..., None, None], covariance_SS, torch.zeros_like(covariance_SS))
    singular = torch.linalg.eigvalsh(safe).clamp(min=0).sqrt()
    share = singular / singular.sum(-1, keepdim=True).clamp(min=1e-30)
    rank = torch.special.entr(share).sum(-1).exp()
    return torch.where(is_finite, rank, torch.full_like(rank, float("nan")))


class Place:
    """Content, rank and spread of one place; the spread of the targets is that of the layers they are made of."""

    def __init__(self) -> None:
        self.content, self.rank, self.pooled = Content(), Rank(), Pooled()

    def add(
        self,
        x_BTD: Tensor,
        padding_BT: Tensor | None,
        positions_BT: Tensor | None = None,
        tokens: int = 0,
        before_norms_BTD: Tensor | None = None,
    ) -> None:
        """`padding_BT`: bool, True = not to be looked at."""
        x_BTD = x_BTD.float()
        raw_BTD = x_BTD if before_norms_BTD is None else before_norms_BTD.float()
        real_BT = torch.ones_like(x_BTD[..., 0])
        if padding_BT is not None:
            real_BT = (~padding_BT).to(x_BTD.dtype)
            x_BTD, raw_BTD = (x.masked_fill(padding_BT[..., None], 0) for x in (x_BTD, raw_BTD))
        self.content.add(x_BTD, real_BT, positions_BT, tokens)
        self.rank.add(x_BTD, real_BT)
        self.pooled.add(raw_BTD, real_BT)


PLACES = ("target", "pred", "encoder", "local")


class Modality:
    """All that is known of one modality in one step."""

    def __init__(self) -> None:
        self.spread = Spread()
        self.places = {name: Place() for name in PLACES}

    def add(self, batch: Batch, output: Output) -> None:
        observed, views, tokens = output.observed, batch.clones, output.targets_BTD.shape[1]
        padding_BT = batch.padding_BT
        self.spread.add(output.target_NJD, output.pred_NJD, output.counts_NJ)
        self.places["target"].add(output.targets_BTD, padding_BT, before_norms_BTD=observed.layers_BTD)
        self.places["local"].add(observed.local_BTD, padding_BT)

        masked_BJ = batch.masked_NJ[::views]
        filler_BJ = None if padding_BT is None else padding_BT.gather(1, masked_BJ)
        if batch.counted_NJ is not None:
            unused_BJ = ~batch.counted_NJ[::views]
            filler_BJ = unused_BJ if filler_BJ is None else filler_BJ | unused_BJ
        self.places["pred"].add(output.pred_NJD[::views], filler_BJ, masked_BJ, tokens)

        keep_BK = (
            None if batch.keep_NK is None else batch.keep_NK[::views]
        )  # None: the student sees all tokens
        if padding_BT is not None and keep_BK is not None:
            padding_BT = padding_BT.gather(1, keep_BK)
        self.places["encoder"].add(observed.hidden_NKD[::views], padding_BT, keep_BK, tokens)

    def sums(self) -> list[Sums]:
        return [self.spread] + [part for place in self.places.values() for part in vars(place).values()]


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
        values: dict[str, Tensor] = {}
        covariances = []
        for name in names:
            part = self.parts[name]
            for key, place in part.places.items():
                prefix = f"{name}/" if key == "target" else f"{name}/{key}_"
                samples, tokens = place.pooled.values()
                values[prefix + "content"] = place.content.value()
                values[prefix + "rank"] = (
                    samples  # its place in the row; the value comes below, of all at once
                )
                values[prefix + "spread"], values[prefix + "token_spread"] = samples, tokens
                covariances.append((prefix + "rank", place.rank.covariance()))
            values |= {f"{name}/{key}": value for key, value in part.spread.values().items()}
        ranks = effective_rank(torch.stack([c for _, c in covariances]).cpu())
        for (key, _), rank in zip(covariances, ranks, strict=True):
            values[key] = rank.to(values[key].device)
        numbers = torch.stack(list(values.values()))
        dist.broadcast(numbers, 0)  # equal to the bit, so all ranks decide the same
        return dict(zip(values, numbers.tolist(), strict=True))


def reduce_sums(parts: list[Sums]) -> None:
    """Adds up over ranks, in two reductions: lengths, since ranks may have seen different ones, and sums."""
    named = [(part, key) for part in parts for key in part.sums if part.sums[key].ndim]
    if not parts:
        return
    device = next(iter(parts[0].sums.values())).device
    if dist.get_world_size() > 1:
        lengths = torch.tensor([len(part.sums[key]) for part, key in named], device=device)
        dist.all_reduce(lengths, op=dist.ReduceOp.MAX)
        for (part, key), tokens in zip(named, lengths.tolist(), strict=True):
            part.sums[key] = grow(part.sums[key], tokens)
    flat = torch.cat([value.flatten() for part in parts for value in part.sums.values()])
    dist.all_reduce(flat)
    pieces = iter(flat.split([value.numel() for part in parts for value in part.sums.values()]))
    for part in parts:
        part.sums = {key: next(pieces).view(value.shape) for key, value in part.sums.items()}
