"""The loader brings the plan's micro-batches at any worker count, from any step, and hides no fault."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tars import payload

from d2v_ds.data import Corpus, Draw, Fault, FaultLog, MicroBatch, Plan, Source, StepLoader

Writer = Callable[..., list[Path]]


class ByteSamples:
    """The sums of the bytes, and a number drawn from each seed, as tensors."""

    fields = {"content": "bin", "label": "cls"}

    def __init__(self, corpus: Corpus, unreadable: tuple[int, ...] = ()) -> None:
        self.unit_starts = corpus.shard_starts
        self.unreadable = unreadable

    def read(self, corpus: Corpus, unit: int) -> tuple[int, bytes]:
        sample = corpus.read(unit)
        if unit in self.unreadable:
            raise ValueError("no picture at 0x7f00 byte 12")
        return unit, sample["content"]

    def collate(self, decoded: list[Any], draws: list[Draw]) -> dict[str, torch.Tensor]:
        assert [unit for unit, _ in decoded] == [draw.unit for draw in draws]
        noise = [torch.rand((), generator=torch.Generator().manual_seed(draw.seed)) for draw in draws]
        pairs = zip(decoded, draws, strict=True)
        rows = [(unit, draw.epoch, sum(content)) for (unit, content), draw in pairs]
        return {"rows": torch.tensor(rows), "noise": torch.stack(noise)}


@pytest.fixture
def sources(write_shards: Writer) -> list[Source]:
    paths = {"image": write_shards(shards=5, folder="image"), "audio": write_shards(shards=1, folder="audio")}
    corpora = {name: Corpus.open(paths[name], ByteSamples.fields, progress=None) for name in paths}
    batches = {"image": (4, 12), "audio": (2, 6)}
    return [Source(name, corpus, ByteSamples(corpus), *batches[name]) for name, corpus in corpora.items()]


def make_plan(sources: list[Source], seed: int = 11) -> Plan:
    return Plan(seed, [source.stream for source in sources])


def load(
    sources: list[Source], first: int, last: int, workers: int = 0, rank: int = 0, world: int = 1
) -> list[list[MicroBatch]]:
    return list(StepLoader(sources, make_plan(sources), rank, world, first, last, workers))


def as_values(micro_batches: list[MicroBatch]) -> list:
    return [
        (m.modality, m.step, m.index, m.batch["rows"].tolist(), m.batch["noise"].tolist(), m.faults)
        for m in micro_batches
    ]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_resuming_gives_the_rest_of_the_stream(sources: list[Source]) -> None:
    """From step 5 with 0, 1 and 3 workers: equal to the bit."""
    whole = [as_values(step) for step in load(sources, 0, 8)]
    for workers in (0, 1, 3):
        assert [as_values(step) for step in load(sources, 5, 8, workers)] == whole[5:]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_out_the_same_global_batch(sources: list[Source], world: int) -> None:
    whole = load(sources, 0, 3)
    ranks = [load(sources, 0, 3, rank=rank, world=world) for rank in range(world)]
    for step in range(3):
        shared = [value for rank in ranks for value in as_values(rank[step])]
        assert sorted(shared) == sorted(as_values(whole[step]))
        assert len({tuple(m.modality for m in rank[step]) for rank in ranks}) == 1


def test_a_step_follows_the_plan(sources: list[Source]) -> None:
    plan = make_plan(sources)
    loader = StepLoader(sources, plan, rank=1, world=2, first_step=3, last_step=5)
    assert len(loader) == 2
    for step, micro_batches in enumerate(loader, start=3):
        assert [(m.modality, m.index) for m in micro_batches] == plan.items(step, 1, 2)
        for m in micro_batches:
            draws = plan.draws(step, m.modality, m.index)
            assert m.batch["rows"][:, 0].tolist() == [draw.unit for draw in draws]
            shards = [(draw.unit // 7, draw.unit % 7) for draw in draws]
            assert m.batch["rows"][:, 2].tolist() == [sum(payload(*place)) for place in shards]


def test_loading_leaves_the_global_random_state_alone(sources: list[Source]) -> None:
    before = torch.get_rng_state()
    load(sources, 0, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_world_that_does_not_divide_is_refused_at_once(sources: list[Source]) -> None:
    with pytest.raises(ValueError, match="not a multiple of 5 ranks"):
        StepLoader(sources, make_plan(sources), 0, 5, 0, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_member_is_replaced_and_reported(sources: list[Source], workers: int) -> None:
    """A bit of the payload flips after indexing; shapes, and all micro-batches without it, stay."""
    before = load(sources, 0, 4)
    path = sources[0].corpus.indexes[2].path
    content = bytearray(path.read_bytes())
    content[content.index(payload(2, 3)) + 5] ^= 1
    path.write_bytes(content)
    after = load(sources, 0, 4, workers)
    faults = [fault for step in after for m in step for fault in m.faults]
    assert {(f.modality, f.key) for f in faults} == {("image", "train-000002.tar:part/2-00003")}
    assert len(faults) >= 5  # once in each epoch, and the steps hold 5.5 of them
    for old, new in zip(sum(before, []), sum(after, []), strict=True):
        assert old.batch["rows"].shape == new.batch["rows"].shape
        changed = (old.batch["rows"] != new.batch["rows"]).any(dim=1)
        assert changed.sum() == len({fault.step for fault in new.faults})
        assert torch.equal(changed, old.batch["rows"][:, 0] == 17) or old.modality == "audio"
        assert all(fault.step == new.step for fault in new.faults)


def test_an_undecodable_sample_is_named_by_its_key(sources: list[Source]) -> None:
    sources[0].samples.unreadable = (8,)
    faults = [fault for step in load(sources, 0, 2) for m in step for fault in m.faults]
    assert {fault.key for fault in faults} == {"train-000001.tar:part/1-00001"}
    assert {fault.reason for fault in faults} == {"no picture at 0x7f00 byte 12"}


def test_nothing_but_undecodable_samples_stops_the_run(sources: list[Source]) -> None:
    sources[1].samples.unreadable = tuple(range(7))
    with pytest.raises(RuntimeError, match="audio: train-000000.tar:part/0-.* and 20 units before it"):
        load(sources, 0, 1)


def test_a_bug_is_not_taken_for_a_bad_sample(sources: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteSamples, "read", lambda *_: {}["missing"])
    with pytest.raises(KeyError):
        load(sources, 0, 1)


def test_stopping_early_ends_the_workers(sources: list[Source]) -> None:
    """They ignore SIGTERM, so they must leave by themselves."""
    started = time.monotonic()
    steps = iter(StepLoader(sources, make_plan(sources), 0, 1, 0, 10**9, workers=2))
    next(steps)
    children = torch.multiprocessing.active_children()
    for child in children:
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGUSR1)
    assert len(children) == 2 and len(next(steps)) == 18
    steps.close()
    for child in children:
        child.join(5)
        assert child.exitcode == 0
    assert time.monotonic() - started < 10


def test_the_first_step_costs_the_same_anywhere(sources: list[Source]) -> None:
    def best_time(first: int) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            next(iter(StepLoader(sources, make_plan(sources), 0, 1, first, 10**12)))
            times.append(time.perf_counter() - start)
        return min(times)

    assert best_time(10**11) < 5 * best_time(0)


def faults_of(count: int, shard: str = "a.tar") -> list[Fault]:
    return [Fault("image", f"{shard}:k:{i}", f"cannot read byte {i}", step=i) for i in range(count)]


def test_faults_are_written_line_by_line(tmp_path: Path) -> None:
    log = FaultLog(tmp_path / "quarantine.jsonl")
    log.add(faults_of(2), samples_seen=10)
    log.add([], samples_seen=20)
    FaultLog(tmp_path / "quarantine.jsonl").add(faults_of(1), samples_seen=30)
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["a.tar:k:0", "a.tar:k:1", "a.tar:k:0"]
    record = {"modality": "image", "key": "a.tar:k:1", "reason": "cannot read byte 1", "step": 1}
    assert json.loads(lines[1]) == record
    assert log.counts == {("image", "a.tar", "cannot read byte #"): 2}


def test_too_many_faults_stop_the_run(tmp_path: Path) -> None:
    log = FaultLog(tmp_path / "quarantine.jsonl", max_share=0.01, min_count=20)
    log.add(faults_of(20), samples_seen=20)
    log.add(faults_of(5, "b.tar"), samples_seen=2500)
    rows = "  20 x image a.tar: cannot read byte #\n  6 x image b.tar: cannot"
    with pytest.raises(RuntimeError, match=f"26 of 2501 .* 1.00%:\n{rows}"):
        log.add(faults_of(1, "b.tar"), samples_seen=2501)
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 26
