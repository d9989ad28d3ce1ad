"""Many command lines of train.py in one process, which saves the imports: commands.py COMMANDS.json RESULTS.json.

A command with `after` goes on with a copy of that run, interrupted, in the folder `out`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path

from d2v_ds.engine.launch import end_process
from d2v_ds.training.run import main

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runs import interrupted  # noqa: E402


def run_one(argv: list[str], env: dict[str, str]) -> dict[str, object]:
    """Exit code, stdout and stderr, as a process of its own would have had them."""
    out, err, before = io.StringIO(), io.StringIO(), dict(os.environ)
    os.environ.update(env)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv, prog="train.py")
        except SystemExit as exit_:
            code = exit_.code
        except Exception:
            traceback.print_exc()
            code = 1
    os.environ.clear()
    os.environ.update(before)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    is_first = os.environ.get("RANK", "0") == "0"
    results = {}
    for command in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        if command["after"] and is_first:  # the others wait for its news of what to resume from
            interrupted(Path(command["after"]), Path(command["out"]))
        results[command["name"]] = run_one(command["argv"], command["env"])
    if is_first:
        Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")
    end_process(0)
