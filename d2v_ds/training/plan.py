"""`d2v plan`: which data a run would see, without a model and without starting it."""

from __future__ import annotations

import argparse
import sys

from d2v_ds.data import Plan, Share, Source, Stream, Volume
from d2v_ds.data.remote import reading
from d2v_ds.data.room import cut_windows
from d2v_ds.modalities.source import open_source
from d2v_ds.recipe import Recipe, load_recipe
from d2v_ds.training.classes import with_classes
from d2v_ds.training.init import with_network
from d2v_ds.training.volume import describe_windows

DESCRIPTION = """\
What a training run would see of its data, without starting it.

  d2v plan --recipe audio_base data=DIR
  d2v plan --recipe multimodal_base data=DIR train.steps=1000 --step 999 --ranks 8

Of each corpus: samples, amount, its share of the micro-batches, epochs, and what padding or cropping loses.
Shards without an index are indexed, lengths that were never measured are measured: the run then has them."""

HEADER = (
    "corpus",
    "samples",
    "amount",
    "share",
    "in a micro-batch",
    "an epoch",
    "steps an epoch",
    "epochs",
    "lost",
    "filled",
)


def main(argv: list[str] | None = None) -> int:
    """The command line; exit code 2 and one message for a user's mistake."""
    arguments = parse_arguments(argv)
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        if recipe.task:
            recipe = with_classes(with_network(recipe, None, arguments.overrides), None)
        with reading(recipe.remote):
            opened = [
                open_source(name, config, recipe.data, recipe.task)
                for name, config in recipe.modalities.items()
            ]
        sources = cut_windows(opened)
        plan = Plan(recipe.seed, [source.stream for source in sources])
        plan.check_world(arguments.ranks)
        print(describe_plan(recipe, sources, plan))
        if arguments.step is not None:
            print(describe_step(sources, plan, arguments.step, arguments.ranks))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Exits with a message, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="d2v plan",
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--recipe",
        default="multimodal_tiny",
        metavar="NAME|FILE.yaml",
        help="as `d2v train` has it (%(default)s)",
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="list the samples of step N, from 0, in their order"
    )
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="who runs them (default: 1 rank)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="as `d2v train` has them: data=DIR, ..."
    )
    values, more = parser.parse_known_args(argv)
    for text in more:
        if text.startswith("-"):
            parser.error(f"unknown option {text}; see --help")
    values.overrides += more
    for name, least in (("step", 0), ("ranks", 1)):
        number = getattr(values, name)
        if number is not None and number < least:
            parser.error(f"--{name} {number} must be {least} or more")
    return values


def describe_plan(recipe: Recipe, sources: list[Source], plan: Plan) -> str:
    steps = recipe.train.steps
    lines = [
        f"{recipe.name}: {steps:,} steps on {plan.possible_worlds()} rank(s), seed {recipe.seed}, data {recipe.data}"
    ]
    for source in sources:
        stream = source.stream
        data = recipe.modalities[source.name].data
        volumes = [source.samples.volume(source.corpus, share, source.batch) for share in stream.shares]
        pairs = list(zip(stream.shares, volumes, strict=True))
        amount = sum(share.count * volume.micro_batch for share, volume in pairs) / stream.block
        lines += [
            "",
            f"{source.name}: a step is {stream.micro_batches} micro-batches, "
            + (
                f"{stream.micro_batches * stream.mean_batch:,.1f} samples, "
                if volumes[0].unit != "images"
                else ""
            )
            + f"{stream.micro_batches * amount:,.0f} {volumes[0].unit}",
        ]
        if source.corpus.skipped:
            lines.append(f"{source.corpus.skipped:,} samples are left out (the warning above says why)")
        epochs = plan.epochs(steps)
        lines += table([HEADER, *(row(stream, *pair, epochs) for pair in pairs)])
        for share in stream.shares:
            if share.buckets:
                lines.append(describe_buckets(share, volumes[0]))
            if share.windows:
                lines.append(f"{share.name}: {describe_windows(share.windows)}")
        if len(pairs) > 1:
            parts = ", ".join(f"{share.name} {share.count:,}" for share in stream.shares)
            lines.append(
                f"mixed: of the {stream.block:,} micro-batches of every {data.mix_steps:,} steps, {parts}"
            )
    return "\n".join(lines)


def row(stream: Stream, share: Share, volume: Volume, epochs: dict[str, float]) -> tuple[str, ...]:
    own = share.count / stream.block
    batches = share.batches(stream.batch)
    is_time = volume.unit == "seconds"
    lost = f"{volume.padding:.1%} padding"
    if volume.unit == "images":
        lost = ""
    elif is_time and not volume.padding:
        lost = f"{volume.cropped:.1%} cropped"
    filled = (
        volume.micro_batch / (1 - volume.padding) / (1 - volume.cropped) / volume.budget
        if volume.budget
        else 0
    )
    return (
        share.name,
        f"{share.size:,}",
        f"{volume.total / 3600:,.2f} h" if is_time else f"{volume.total:,.0f} {volume.unit}",
        f"{own:.2%}",
        f"{share.size / batches:.1f}"
        + (f", {volume.micro_batch:,.1f} {volume.unit}" if volume.unit != "images" else ""),
        f"{batches:,.0f} micro-batches",
        f"{batches / (stream.micro_batches * own):,.1f}",
        f"{epochs[share.name]:,.2f}",
        lost,
        f"{filled:.0%} of {volume.budget:g}" if volume.budget else "",
    )


def describe_buckets(share: Share, volume: Volume) -> str:
    buckets = share.buckets
    assert buckets is not None and volume.budget is not None
    scale = buckets.budget / volume.budget
    first, last = buckets.shortest[0] / scale, buckets.tops[-1] / scale
    return (
        f"{share.name}: {len(buckets.tops)} buckets of lengths from {first:,.4g} to {last:,.4g} {volume.unit}, "
        f"{buckets.room.min()} samples in a micro-batch of the longest, {buckets.room.max()} of the shortest"
    )


def describe_step(sources: list[Source], plan: Plan, step: int, world: int) -> str:
    """All micro-batches of a step in the order in which its ranks run them, with their samples."""
    by_name = {source.name: source for source in sources}
    lines = ["", f"step {step}:"]
    for name, index in plan.items(step, 0, 1):
        source = by_name[name]
        draws = plan.draws(step, name, index)
        epochs = ", ".join(str(epoch) for epoch in sorted({draw.epoch for draw in draws}))
        lines.append(
            f"{plan.corpus(step, name, index)}, micro-batch {index} on rank {index % world}, epoch {epochs}: "
            f"{len(draws)} samples"
        )
        lines += [f"  {source.samples.label(source.corpus, draw.unit)}" for draw in draws]
    return "\n".join(lines)


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns as wide as their widest cell; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = "<" + ">" * (len(widths) - 1)
    lines = []
    for cells in rows:
        padded = (f"{cell:{side}{width}}" for cell, side, width in zip(cells, sides, widths, strict=True))
        lines.append("  ".join(padded).rstrip())
    return lines
