"""What a sweep over learning rates and seeds gave: of each task the rate with the best median, and that median.

    python -m d2v_ds.tasks.sweep checkpoints/glue     reads TASK/lr_RATE_seed_N/best.json; writes glue.json

Runs that have not come to their end have no result yet.

A run's score is that of its best checkpoint on the development set, as GLUE's published development scores are.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from d2v_ds.tasks.table import write_whole

RUN = re.compile(r"lr_(?P<rate>[^_]+)_seed_(?P<seed>\d+)")
BEST = "best.json"
"""What a run writes of its best checkpoint."""
FINISHED = "finished"
"""What the script writes when a run has come to its end."""


def summarize(folder: Path) -> dict[str, Any]:
    """`tasks`: of each the best rate, its median score and metrics, and all runs; `average` of the medians; `missing`:
    runs that have no result.

    Raises ValueError if there is no result at all.
    """
    tasks, missing = {}, []
    for path in sorted(path for path in folder.glob("*/lr_*_seed_*") if RUN.fullmatch(path.name)):
        found = read_run(path)
        if found is None:
            missing.append(path.relative_to(folder).as_posix())
        else:
            tasks.setdefault(path.parent.name, []).append(found)
    if not tasks:
        raise ValueError(f"{folder} holds no TASK/lr_RATE_seed_N/{BEST}; run scripts/finetune_glue.sh first")
    chosen = {name: choose(runs) for name, runs in tasks.items()}
    average = statistics.fmean(each["median"] for each in chosen.values())
    return {"tasks": chosen, "average": average, "missing": missing}


def read_run(path: Path) -> dict[str, Any] | None:
    """Rate, seed, score and metrics of a run; None if it has no result, or has not come to its end."""
    if not (path / BEST).is_file() or not (path / FINISHED).is_file():
        return None
    best, name = json.loads((path / BEST).read_bytes()), RUN.fullmatch(path.name)
    numbers = {key: value for key, value in best.items() if isinstance(value, float)}
    return {"lr": float(name["rate"]), "seed": int(name["seed"]), **numbers}


def choose(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The rate with the best median over its seeds; of equals the lowest."""
    by_rate: dict[float, list[dict[str, Any]]] = {}
    names = metrics_of(runs[0])
    if other := next((run for run in runs if metrics_of(run) != names), None):
        said = (
            f"lr {run['lr']:g}, seed {run['seed']} by {', '.join(metrics_of(run))}"
            for run in (runs[0], other)
        )
        raise ValueError(
            f"runs of one task are scored by other metrics: {'; '.join(said)}; remove those of one kind"
        )
    for run in runs:
        by_rate.setdefault(run["lr"], []).append(run)
    medians = {rate: statistics.median(run["score"] for run in some) for rate, some in by_rate.items()}
    rate = min(medians, key=lambda rate: (-medians[rate], rate))
    scores = [run["score"] for run in by_rate[rate]]
    return {
        "lr": rate,
        "seeds": len(scores),
        "median": medians[rate],
        "lowest": min(scores),
        "highest": max(scores),
        "metrics": {name: statistics.median(run[name] for run in by_rate[rate]) for name in names},
        "median_by_lr": {f"{rate:g}": medians[rate] for rate in sorted(medians)},
        "runs": runs,
    }


def metrics_of(run: dict[str, Any]) -> list[str]:
    return [key for key in run if key not in ("lr", "seed", "score")]


def format_summary(found: dict[str, Any]) -> str:
    """A line for every task, in percent."""
    lines = [
        f"{'task':8} {'lr':>7} {'seeds':>5} {'median':>7} {'lowest':>7} {'highest':>7}  medians of each metric"
    ]
    for name, task in found["tasks"].items():
        metrics = ", ".join(f"{key} {100 * value:.1f}" for key, value in task["metrics"].items())
        scores = " ".join(f"{100 * task[key]:7.1f}" for key in ("median", "lowest", "highest"))
        lines.append(f"{name:8} {task['lr']:7.0e} {task['seeds']:5} {scores}  {metrics}")
    lines.append(f"{'average':8} {'':7} {'':5} {100 * found['average']:7.1f}  of {len(found['tasks'])} tasks")
    if found["missing"]:
        lines.append(f"{len(found['missing'])} runs have no result: {', '.join(found['missing'][:5])}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m d2v_ds.tasks.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what scripts/finetune_glue.sh wrote: its OUT")
    arguments = parser.parse_args(argv)
    try:
        found = summarize(arguments.folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_whole(arguments.folder / "glue.json", json.dumps(found, indent=1).encode())
    print(format_summary(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
