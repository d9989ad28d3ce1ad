"""Does a tiny recipe learn? Trains it with several seeds, probes it, and prints mean and spread.

    python scripts/tiny_learning.py image --data DIR --seeds 1 2 3 [key=value ...]

DIR holds labelled shards: for image those of `python -m shards.sample --images-only`, otherwise the sample
shards. One process, as many threads as OMP_NUM_THREADS says. Writes OUT/results.json and the runs beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from d2v_ds.tasks.probe import probe
from d2v_ds.training.log import read_rows

ROOT = Path(__file__).resolve().parents[1]
SHARDS = {
    "image": ("images-train-*.tar", "images-test-*.tar"),
    "audio": ("multimodal-train-*.tar", "multimodal-val-*.tar"),
    "text": ("multimodal-train-*.tar", "multimodal-val-*.tar"),
}


def run_seed(arguments: argparse.Namespace, seed: int) -> dict:
    out = arguments.out / f"seed{seed}"
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--deepspeed",
        "zero0",
        "--recipe",
        arguments.recipe or f"{arguments.modality}_tiny",
        f"data={arguments.data}",
        f"out={out}",
        f"seed={seed}",
        *arguments.overrides,
    ]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    seconds = time.perf_counter() - began
    train, test = (
        str(Path(arguments.labels or arguments.data) / name) for name in SHARDS[arguments.modality]
    )
    rows = probe(out, train, test, modality=arguments.modality)
    health, metrics = read_rows(out / "health.jsonl"), read_rows(out / "metrics.jsonl")
    tail = health[-max(1, len(health) // 5) :]
    key = f"{arguments.modality}/"
    return {
        "seed": seed,
        "seconds": seconds,
        "loss": metrics[-1][key + "loss"],
        "content_first": health[0][key + "content"],
        "content": statistics.mean(r[key + "content"] for r in tail),
        "target_var": tail[-1][key + "target_var"],
        "probes": {r.features: r.accuracy for r in rows},
    }


def summarise(results: list[dict]) -> str:
    lines = [f"{'':28}" + "".join(f"  seed {r['seed']:<5}" for r in results) + "   mean   sd"]

    def row(name: str, values: list[float], digits: int = 3) -> None:
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        lines.append(
            f"{name:28}"
            + "".join(f"  {v:10.{digits}f}" for v in values)
            + f"  {statistics.mean(values):6.{digits}f} {spread:5.{digits}f}"
        )

    for name in results[0]["probes"]:
        row(name, [r["probes"][name] for r in results])
    for kind in ("mean", "all"):
        row(
            f"gain, {kind} (points)",
            [100 * (r["probes"][f"student, {kind}"] - r["probes"][f"random init, {kind}"]) for r in results],
            1,
        )
    for key in ("content_first", "content", "target_var", "loss"):
        row(key, [r[key] for r in results])
    row("seconds, start to end", [r["seconds"] for r in results], 1)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modality", choices=sorted(SHARDS))
    parser.add_argument("--recipe", help="default: MODALITY_tiny")
    parser.add_argument("--data", default=str(ROOT / "shards" / "sample"), help="shards to train on")
    parser.add_argument("--labels", help="labelled shards to probe on (default: --data)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("checkpoints/tiny_learning"))
    arguments, arguments.overrides = parser.parse_known_args()
    results = [run_seed(arguments, seed) for seed in arguments.seeds]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(summarise(results))


if __name__ == "__main__":
    main()
