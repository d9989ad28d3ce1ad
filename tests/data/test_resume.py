"""A stream that stopped goes on to the bit with other ranks and workers, for every kind of data.

Real samples of the committed shards, through the modalities' own decoders, crops and masks.
"""

import dataclasses
import json
from collections.abc import Iterator

import pytest
import torch
from ranks import SAMPLE

from d2v_ds.data import MicroBatch, Plan, Source, StepLoader
from d2v_ds.modalities.source import open_source
from d2v_ds.recipe import load_recipe

SHARDS = "multimodal-train-00000{}.tar"
MIX = "data.corpora={{one: {}, two: '{}'}}".format(SHARDS.format(0), SHARDS.format("[12]"))
KINDS = {
    "image": ("image", ()),
    "image, mixed": ("image", (MIX, "data.weights={one: 1, two: 5}")),
    "audio, by length": ("audio", ("data.batch_seconds=3", "data.max_seconds=2")),
    "audio, by length and mixed": ("audio", ("data.batch_seconds=3", MIX, "data.temperature=3")),
    "text": ("text", ()),
    "text, samples by length": (
        "text",
        ("data.mode=samples", "data.batch_tokens=128", "data.batch=20", f"data.shards={SHARDS.format('*')}"),
    ),
}
STEPS, STOP = 6, 4


def open_kind(kind: str) -> Source:
    name, settings = KINDS[kind]
    overrides = ["data.micro_batches=4", "data.batch=3", "data.mix_steps=5", *settings]
    recipe = load_recipe("multimodal_tiny", [f"modalities.{name}.{text}" for text in overrides])
    return open_source(name, recipe.modalities[name], str(SAMPLE))


def load(
    source: Source, first: int, last: int, rank: int = 0, world: int = 1, workers: int = 0
) -> list[list]:
    plan = Plan(1, [source.stream])
    return list(StepLoader([source], plan, rank, world, first, last, workers))


def as_values(micro: MicroBatch) -> tuple:
    """All that a model is given, masks and crops included."""
    fields = {f.name: getattr(micro.batch, f.name) for f in dataclasses.fields(micro.batch)}
    tensors = {k: (v.tolist() if isinstance(v, torch.Tensor) else v) for k, v in fields.items()}
    return micro.step, micro.index, tensors


def in_order(ranks: list[list[list[MicroBatch]]]) -> Iterator[tuple]:
    """The global batch of each step, from those of its ranks."""
    for steps in zip(*ranks, strict=True):
        yield from map(as_values, sorted((m for step in steps for m in step), key=lambda m: m.index))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_with_other_ranks_and_workers(kind: str) -> None:
    """Stopped in step 4; 1, 2 and 4 ranks, with 0, 1 and 3 workers; another process state in between."""
    source = open_kind(kind)
    whole = list(in_order([load(source, 0, STEPS)]))
    assert len(whole) == STEPS * 4
    for world, workers in ((1, 3), (2, 0), (4, 1)):
        torch.manual_seed(world)
        again = open_kind(kind)
        ranks = [load(again, STOP, STEPS, rank, world, workers) for rank in range(world)]
        assert list(in_order(ranks)) == whole[STOP * 4 :]


def test_the_state_is_a_few_integers_and_a_fingerprint_for_each_modality() -> None:
    """What a checkpoint keeps of the data: less than 1 kB, equal on all ranks, for it knows no rank."""
    sources = {kind: open_kind(kind) for kind in KINDS}
    state = {
        "step": 10**12,
        "seed": 1,
        "data": {kind: source.fingerprint for kind, source in sources.items()},
    }
    assert len(json.dumps(state)) < 1000
    assert len(set(state["data"].values())) >= 5
    assert all(open_kind(kind).fingerprint == source.fingerprint for kind, source in sources.items())


def test_a_run_knows_when_lengths_or_mix_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same shards grouped otherwise are another order."""
    first = open_kind("audio, by length").fingerprint
    monkeypatch.setitem(KINDS, "other", ("audio", ("data.batch_seconds=4", "data.max_seconds=2")))
    assert open_kind("other").fingerprint != first
