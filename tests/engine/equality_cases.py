"""What the equality test compares: engine configurations, a small recipe, and the plain loop that is right."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from d2v_ds.data import Plan, seed_of
from d2v_ds.engine.build import parameter_groups
from d2v_ds.engine.ema import anneal
from d2v_ds.modalities.build import build_model
from d2v_ds.modalities.source import open_source
from d2v_ds.recipe import Recipe, load_recipe
from d2v_ds.training.schedule import learning_rate

STEPS = 5
SAMPLE = Path(__file__).resolve().parents[2] / "shards" / "sample"


@dataclass
class Case:
    preset: str
    precision: str = "fp32"
    zero: dict = field(default_factory=dict)


LOW_THRESHOLD = {"stage3_param_persistence_threshold": 5_000}  # some parameters above, some below
CASES = {
    "zero0": Case("zero0"),
    "zero1": Case("zero1"),
    "zero2": Case("zero2"),
    "zero3": Case("zero3"),
    "zero3_low": Case("zero3", zero=LOW_THRESHOLD),
    "zero1_offload": Case("zero1", zero={"offload_optimizer": {"device": "cpu"}}),
    "zero2_offload": Case("zero2_offload"),
    "zero3_offload": Case("zero3_offload", zero=LOW_THRESHOLD),
    "zero3_subgroups": Case("zero3", zero={**LOW_THRESHOLD, "sub_group_size": 20_000}),
    "zero0_bf16": Case("zero0", "bf16"),
    "zero1_bf16": Case("zero1", "bf16"),
    "zero2_bf16": Case("zero2", "bf16"),
    "zero3_bf16": Case("zero3", "bf16", LOW_THRESHOLD),
    "zero2_offload_bf16": Case("zero2_offload", "bf16"),
    "zero3_offload_bf16": Case("zero3_offload", "bf16", LOW_THRESHOLD),
}


def schedule(step: int) -> tuple[str, ...]:
    """The modalities of a step: they appear and disappear."""
    return (("audio", "image", "text"), ("image",), ("audio", "text"), ("text",), ("audio", "image"))[step]


def case_recipe(case: Case) -> Recipe:
    """multimodal_tiny, fp32 by default, all dropouts 0, layer drop on, Adam eps 1e-4 (key biases have gradients
    that are rounding only)."""
    recipe = load_recipe(
        "multimodal_tiny",
        [
            f"train.steps={STEPS}",
            "optim.eps=1e-4",
            "optim.warmup_steps=1",
            "optim.lr=1e-2",
            "body.layerdrop=0.3",
            "ema.start=0.9",
            "ema.end=0.99",
            "optim.clip=4.0",
            f"precision={case.precision}",
            f"data={SAMPLE}",
            "train.workers=0",
        ],
    )
    for config in recipe.modalities.values():
        config.data.batch, config.data.micro_batches = 2, 4
    return recipe


def plain_loop(recipe: Recipe) -> dict[str, torch.Tensor]:
    """One process, one model, plain AdamW: what every engine must equal."""
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.body, recipe.modalities).train()
    optim = recipe.optim
    optimizer = torch.optim.AdamW(
        parameter_groups(model, optim.weight_decay, optim.decay),
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
    )
    sources = {n: open_source(n, c, recipe.data) for n, c in recipe.modalities.items()}
    plan = Plan(recipe.seed, [s.stream for s in sources.values()])
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, recipe.train.steps)
        optimizer.zero_grad()
        sums = dict.fromkeys(sorted(recipe.modalities), 0.0)
        for name in schedule(step):
            source = sources[name]
            outputs = []
            for index in range(source.micro_batches):
                draws = plan.draws(step, name, index)
                batch = source.samples.collate(
                    [source.samples.read(source.corpus, d.unit) for d in draws], draws
                )
                batch.layerdrop_seed = seed_of(recipe.seed, "layerdrop", step, name)
                torch.manual_seed(seed_of(recipe.seed, "forward", step, name, index))
                outputs.append(model(batch))
            size = sum(o.sample_size for o in outputs)
            loss = sum(o.loss for o in outputs) / size
            (loss * recipe.modalities[name].loss.weight).backward()
            sums[name] = loss.item()
        for parameter in model.parameters():  # absent gradients count as zero
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if optim.clip:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], optim.clip)
        optimizer.step()
        model.follow(anneal(recipe.ema.start, recipe.ema.end, recipe.ema.anneal_steps, step + 1))
        losses.append([sums[name] for name in sorted(sums)])
    values = {"student." + n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    values |= {"teacher." + n: t.detach() for n, s, t in model.followed() if s.requires_grad}
    return values | {"losses": torch.tensor(losses, dtype=torch.float64)}
