"""Does a run survive being killed anywhere? Kills a real one again and again, and compares it with one that was not.

    python scripts/crash_test.py --kills 20

Each time a two-rank ZeRO-3 run starts under the deepspeed launcher, one rank or all of them get SIGKILL at a random
moment, three of four times while a checkpoint is being saved, and the same command is given again. Then every logged
number, the last checkpoint's student, teacher, average and moments, and the position in the data must be equal to the
bit to those of an uninterrupted run. One line a kill; exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from d2v_ds.engine.checkpoint import newest
from d2v_ds.engine.ds_config import PRESETS
from d2v_ds.engine.launch import free_port
from d2v_ds.engine.tensor_file import TensorFile

ROOT = Path(__file__).resolve().parents[1]
STEPS = 8
SETTINGS = [
    f"data={ROOT / 'shards' / 'sample'}",
    f"train.steps={STEPS}",
    "train.save_every=1",
    "train.log_every=1",
    "train.workers=0",
    "precision=fp32",
    "optim.lr=2e-3",
    "body.dim=128",
    "body.depth=2",
    *[
        f"modalities.{name}.{key}=2"
        for name in ("audio", "image", "text")
        for key in ("data.batch", "data.micro_batches", "target.top_k", "clones")
    ],
]
CLOCKS = ("seconds", "share", "per_second", "slowest_rank")
"""Numbers of metrics.jsonl that a clock gives end with one of these."""
TIMEOUT = 600


@dataclass
class Kill:
    """When and whom."""

    victim: str
    """rank 0, rank 1 or all"""
    is_saving: bool
    step: int
    """The save, or the step, that must have begun."""
    delay: float
    """Seconds after that."""
    save: str


def draw(rng: random.Random, number: int) -> Kill:
    is_saving = rng.random() < 0.75
    return Kill(
        rng.choice(["rank 0", "rank 1", "all"]),
        is_saving,
        rng.randint(1, STEPS),
        rng.uniform(0, 0.05 if is_saving else 0.5),
        ("async", "sync")[number % 2],
    )


def command(out: Path, config: Path, save: str) -> list[str]:
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    runner += ["--master_port", str(free_port()), "train.py", "--deepspeed", str(config)]
    return [*runner, f"out={out}", f"train.save={save}", *SETTINGS]


def launch(arguments: list[str], log: Path) -> subprocess.Popen:
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with log.open("ab") as file:
        return subprocess.Popen(
            arguments, env=env, cwd=ROOT, stdout=file, stderr=file, start_new_session=True
        )


def finish(process: subprocess.Popen, log: Path) -> None:
    """Waits for a run that must succeed."""
    code = process.wait(timeout=TIMEOUT)
    if code:
        raise RuntimeError(f"exit code {code}\n{log.read_text(errors='replace')[-3000:]}")


def descendants(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    children = [int(text) for text in listed.split()]
    return [pid for child in children for pid in (child, *descendants(child))]


def ranks_of(process: subprocess.Popen) -> dict[str, int]:
    """{rank: pid} of the processes that train."""
    found = {}
    for pid in descendants(process.pid):
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        rank = next((e.removeprefix(b"RANK=").decode() for e in environment if e.startswith(b"RANK=")), None)
        if rank is not None and any(a.endswith(b"train.py") for a in arguments[1:3]):
            found[f"rank {rank}"] = pid
    return found


def has_begun(out: Path, kill: Kill) -> bool:
    """Whether the moment has come; also when it was missed."""
    if kill.is_saving:
        names = [path.name.removeprefix(".tmp-") for path in out.glob("*step_*")]
        return any(
            name.startswith("step_") and int(name.removeprefix("step_")) >= kill.step for name in names
        )
    metrics = out / "metrics.jsonl"
    return metrics.exists() and metrics.read_bytes().count(b"\n") >= kill.step


def strike(process: subprocess.Popen, out: Path, kill: Kill) -> str:
    """Kills at the moment; what was going on, in words."""
    ranks: dict[str, int] = {}
    deadline = time.monotonic() + TIMEOUT
    while not has_begun(out, kill) and process.poll() is None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"step {kill.step} never came")
        if len(ranks) < 2:
            ranks = ranks_of(process)
        time.sleep(0.0005)
    time.sleep(kill.delay)
    for rank, pid in ranks.items():
        if kill.victim in (rank, "all"):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                return "had ended"
    was_saving = any(out.glob(".tmp-*"))
    for pid in wait_for_end(process, list(ranks.values())):
        os.kill(pid, signal.SIGKILL)
    return "inside saving" if was_saving else "between saves"


def wait_for_end(process: subprocess.Popen, pids: list[int]) -> list[int]:
    """The ranks that still live a while after the launcher ended."""
    process.wait(timeout=TIMEOUT)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        alive = [pid for pid in pids if is_alive(pid)]
        if not alive:
            return []
        time.sleep(0.05)
    return alive


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def differences(ours: Path, theirs: Path) -> list[str]:
    """What of a run is not that of another one."""
    found = []
    for name in ("metrics.jsonl", "health.jsonl"):
        if read_rows(ours / name) != read_rows(theirs / name):
            found.append(name)
    last = f"step_{STEPS:08d}"
    if newest(ours)[0] != ours / last:
        return [*found, f"{last} is not the newest whole checkpoint"]
    loops = [json.loads((run / last / "loop.json").read_text()) for run in (ours, theirs)]
    for loop in loops:
        loop.pop("recipe")  # its out= differs
    if loops[0] != loops[1]:
        found.append("position in the data, or counters")
    different = set()
    for path in sorted((theirs / last).glob("rank_*.safetensors")):
        a, b = TensorFile(ours / last / path.name), TensorFile(path)
        if a.names() != b.names():
            different.add("names of tensors")
            continue
        different |= {n.split("|")[0] for n in a.names() if not torch.equal(bits(a, n), bits(b, n))}
    return found + sorted(different)


def bits(file: TensorFile, name: str) -> torch.Tensor:
    return file.read(name).view(torch.int32)


def read_rows(path: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if not key.endswith(CLOCKS)} for row in rows]


def crash(number: int, kill: Kill, folder: Path, config: Path, whole: Path) -> bool:
    """One kill and one restart; prints a row, True if nothing differs."""
    out, log = folder / f"kill_{number:02d}", folder / f"kill_{number:02d}.log"
    arguments = command(out, config, kill.save)
    what = strike(launch(arguments, log), out, kill)
    found = newest(out)[0]
    start = found.name if found else "the beginning"
    began = time.monotonic()
    try:
        finish(launch(command(out, config, kill.save), log), log)
        different = differences(out, whole)
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        different = [f"the restart failed: {error}"]
    verdict = "equal to the bit" if not different else f"DIFFERS: {', '.join(different)}"
    print(
        f"kill {number:2d}  {kill.victim:6} {kill.save:5} {what:13} from {start:13} "
        f"{time.monotonic() - began:4.0f} s  {verdict}",
        flush=True,
    )
    if not different:
        shutil.rmtree(out)
    return not different


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--seed", type=int, default=1, help="of moments and victims (default: 1)")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for runs and logs (default: a temporary one)"
    )
    arguments = parser.parse_args()
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="crash_test_"))
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads((PRESETS / "zero3.json").read_text(encoding="utf-8"))
    content["zero_optimization"]["stage3_param_persistence_threshold"] = 2_000  # some kept, some gathered
    config = folder / "zero3_low.json"
    config.write_text(json.dumps(content), encoding="utf-8")
    whole = folder / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    finish(launch(command(whole, config, "async"), folder / "whole.log"), folder / "whole.log")
    print(
        f"an uninterrupted run of {STEPS} steps on 2 ranks at ZeRO-3; runs and logs in {folder}", flush=True
    )
    rng = random.Random(arguments.seed)
    good = 0
    for number in range(1, arguments.kills + 1):
        shutil.rmtree(folder / f"kill_{number:02d}", ignore_errors=True)
        good += crash(number, draw(rng, number), folder, config, whole)
    print(f"{good} of {arguments.kills} equal to the bit")
    return 0 if good == arguments.kills else 1


if __name__ == "__main__":
    sys.exit(main())
