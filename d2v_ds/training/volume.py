"""How much data a step holds, in the unit that its recipe counts in, and how many epochs a run comes to."""

from __future__ import annotations

from d2v_ds.data import Plan, Share, Source, Volume, Windows


def describe_volume(source: Source, plan: Plan, steps: int) -> str:
    """A line for the start of a run, and one for each corpus if there are several; an epoch draws every sample
    once, however much of it is cropped away."""
    stream, epochs = source.stream, plan.epochs(steps)
    volumes = [source.samples.volume(source.corpus, share, source.batch) for share in stream.shares]
    unit, pairs = volumes[0].unit, list(zip(stream.shares, volumes, strict=True))
    a_step = source.micro_batches * sum(s.count * v.micro_batch for s, v in pairs) / stream.block
    if len(pairs) == 1:
        return f"{source.name}: {a_step:,.0f} {unit} a step ({micro_batches(source)}), " + describe_share(
            *pairs[0], epochs[source.name], steps, a_step
        )
    lines = [f"{source.name}: {a_step:,.0f} {unit} a step ({micro_batches(source)}) of {len(pairs)} corpora"]
    for share, volume in pairs:
        own = share.count / stream.block
        text = describe_share(
            share, volume, epochs[share.name], steps, source.micro_batches * own * volume.micro_batch
        )
        lines.append(f"  {share.name}: {own:.2%} of the micro-batches, {text}")
    return "\n".join(lines)


def micro_batches(source: Source) -> str:
    stream = source.stream
    if not any(share.buckets for share in stream.shares):
        return f"{source.micro_batches} micro-batches of {source.batch}"
    return f"{source.micro_batches} micro-batches by length, {stream.mean_batch:.1f} in each"


def describe_share(share: Share, volume: Volume, epochs: float, steps: int, a_step: float) -> str:
    hours = f" = {volume.total / 3600:,.1f} h" if volume.unit == "seconds" else ""
    lost = 1 - a_step * steps / (epochs * volume.total)
    to_shortest = f" ({volume.cropped:.1%} to the shortest of a micro-batch)" if volume.budget else ""
    return (
        f"{epochs:.2f} epochs of {volume.total:,.0f} {volume.unit}{hours} in {steps} steps"
        + (f", of which cropping loses {lost:.0%}{to_shortest}" if lost > 0.005 else "")
        + (f", and padding is {volume.padding:.1%} of what is computed" if volume.padding > 0.0005 else "")
        + describe_budget(volume)
        + (f"; {describe_windows(share.windows)}" if share.windows else "")
    )


def describe_windows(windows: Windows) -> str:
    """What is shuffled together."""
    shards = len(windows.shards) / windows.num_windows(seed=0, epoch=0)
    return (
        f"its {len(windows.shards):,} shards come in windows of {windows.limit / (1 << 30):.3g} GiB, about "
        f"{shards:,.0f} shards that are shuffled together"
    )


def describe_budget(volume: Volume) -> str:
    """Where a micro-batch is filled badly, for `batch` allows no more."""
    if volume.budget is None:
        return ""
    filled = volume.micro_batch / (1 - volume.padding) / volume.budget
    hint = "; data.batch is the most of a micro-batch, raise it to fill them" if filled < 0.6 else ""
    return f"; {filled:.0%} of {volume.budget:g} {volume.unit} are filled{hint}"
