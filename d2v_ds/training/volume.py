"""How much data a step holds, in the unit that its recipe counts in, and how many epochs a run comes to."""

from __future__ import annotations

from d2v_ds.data import Plan, Source


def describe_volume(source: Source, plan: Plan, steps: int) -> str:
    """One line for the start of a run; an epoch draws every sample once, however much of it is cropped away."""
    amount, total, unit = source.samples.volume(source.corpus, source.batch)
    a_step, epochs = amount * source.micro_batches, plan.epochs(steps)[source.name]
    hours = f" = {total / 3600:,.1f} h" if unit == "seconds" else ""
    lost = 1 - a_step * steps / (epochs * total)
    return (
        f"{source.name}: {a_step:,.0f} {unit} a step ({source.micro_batches} micro-batches of {source.batch}), "
        f"{epochs:.2f} epochs of {total:,.0f} {unit}{hours} in {steps} steps"
        + (f", of which cropping loses {lost:.0%}" if lost > 0.005 else "")
    )
