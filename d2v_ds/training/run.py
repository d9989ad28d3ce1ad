"""A run from its recipe to its last checkpoint: the same for `train.py`, `d2v train` and `d2v_ds.train`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from d2v_ds.config import dotted_keys
from d2v_ds.data import DataError, FaultLog, Plan, Source, StepLoader
from d2v_ds.data.remote import reading
from d2v_ds.data.room import cut_windows, windows_of
from d2v_ds.engine import checkpoint as checkpoints
from d2v_ds.engine.build import build_engine, build_optimizer
from d2v_ds.engine.ds_config import emulated_precision, find_config, read_config, resolve_config
from d2v_ds.engine.ema import TeacherEMA
from d2v_ds.engine.launch import prepare_environment, start_distributed
from d2v_ds.engine.saver import Saver
from d2v_ds.engine.start import put_weights
from d2v_ds.modalities.build import build_model, build_tuned
from d2v_ds.modalities.source import open_source
from d2v_ds.recipe import Recipe, is_free, load_recipe, write_yaml
from d2v_ds.training.agreement import agree, settings, together
from d2v_ds.training.alone import alone
from d2v_ds.training.arguments import Arguments, parse_arguments
from d2v_ds.training.classes import with_classes
from d2v_ds.training.clock import Clock
from d2v_ds.training.codes import COLLAPSED, FAILED, LOST, MISTAKE, STOPPED, Stopped, record_code
from d2v_ds.training.examiner import Examiner, open_examiner
from d2v_ds.training.guard import Collapsed, places_to_go_back_to
from d2v_ds.training.init import Start, read_start, with_network
from d2v_ds.training.log import Log
from d2v_ds.training.loop import run_steps
from d2v_ds.training.probing import Probes, open_probes
from d2v_ds.training.signals import Signals, leave_now, listen, stop_listening, tell
from d2v_ds.training.skips import Diverged
from d2v_ds.training.verdict import Watch
from d2v_ds.training.volume import describe_volume
from d2v_ds.training.watchdog import Watchdog

LAST_BARRIER_SECONDS = 30.0
"""Everything is saved by then, and a rank that died meanwhile must not keep the others."""


@dataclass
class Run:
    """Everything the loop needs."""

    recipe: Recipe
    engine: Any
    ema: TeacherEMA
    plan: Plan
    sources: list[Source]
    device: torch.device
    rank: int
    world: int
    step: int
    """Steps done, skipped ones included: the position in the data."""
    applied: int
    """Steps of this run that changed the weights: what Adam counts."""
    first_step: int
    """Where it began: 0, or what `init` had done."""
    updates_before: int
    """Updates of `init` besides these."""
    log: Log | None
    faults: FaultLog
    signals: Signals
    watchdog: Watchdog
    clock: Clock
    identity: dict[str, Any]
    """What is equal on all ranks throughout."""
    saved: int
    """Steps done when it was last saved."""
    watch: Watch
    saver: Saver
    probes: Probes
    examiner: Examiner
    lr_scale: float = 1.0
    """What rollbacks have left of the recipe's learning rate."""
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    loader: StepLoader | None = None

    @property
    def folder(self) -> Path:
        return self.recipe.folder

    @property
    def updates(self) -> int:
        """All that the weights have seen: what tau counts."""
        return self.first_step + self.updates_before + self.applied

    def say(self, text: str) -> None:
        if self.rank == 0:
            with contextlib.suppress(BrokenPipeError):  # a launcher that is gone does not read
                print(text, flush=True)

    def save(self) -> None:
        """Begins a checkpoint, once a step, and waits for it if `train.save` is sync; all ranks call it."""
        if self.step == self.saved:
            return
        loop = {
            "applied_steps": self.applied,
            "first_step": self.first_step,
            "updates_before": self.updates_before,
            "recipe": self.recipe.model_dump(mode="json"),
            "recipe_hash": self.recipe.hash(),
            "data": fingerprints(self.sources),
            "files": file_hashes(self.sources),
            "windows": windows_of(self.sources),
            "is_healthy": self.watch.is_firm,
            "looked": self.watch.step,
            "best": self.examiner.best,
            "test": self.examiner.fingerprints,
            "lr_scale": self.lr_scale,
            "rollbacks": self.rollbacks,
        }
        self.signals.phase = "saving"
        self.watchdog.wait_patiently("saving")
        self.saver.begin(self.step, loop, self.spared())
        self.signals.phase, self.saved = "running", self.step

    def spared(self) -> Callable[[], list[Path]]:
        """Older checkpoints that stay besides the last ones: the best, and those to go back to."""
        best, step = self.examiner.spared(self.folder), self.step
        goes_back = self.recipe.health.on_collapse == "rollback"

        def find() -> list[Path]:
            healthy = places_to_go_back_to(self.folder, step) if goes_back else []
            return [path for path in (best(), *healthy) if path]

        return find

    def finish_saving(self) -> None:
        """Waits for the last checkpoint; OSError if it could not be written. All ranks call it."""
        self.signals.phase = "saving"
        self.watchdog.wait_patiently("saving")
        self.saver.finish_last()
        self.signals.phase = "running"


def train(
    recipe: str | Recipe = "multimodal_tiny",
    data: str | None = None,
    out: str | None = None,
    deepspeed: str | None = None,
    **settings: Any,
) -> Path:
    """Trains, or goes on with, a run; returns its folder.

    `settings` are recipe keys with `.` written as `__`: train__steps=100, optim__lr=1e-3. Alone it is one
    rank; under a launcher every rank calls it.
    """
    assignments = [
        f"{key.replace('__', '.')}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
    ]
    assignments += [f"{key}={value}" for key, value in (("data", data), ("out", out)) if value is not None]
    if isinstance(recipe, Recipe):
        from d2v_ds.recipe import override

        resolved = override(recipe, assignments)
    else:
        resolved = load_recipe(recipe, assignments)
    return train_recipe(resolved, deepspeed, assignments)


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """The command line; the exit codes are those of `codes.py`, with one message each.

    Errors of the command itself are told by one rank of each machine, those of a started run by each that has one.
    """
    try:
        return run_command(parse_arguments(argv, prog))
    except SystemExit as end:  # --help, or a wrong argument
        record_code(end.code)
        raise
    finally:
        stop_listening()


def run_command(arguments: Arguments) -> int:
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        if arguments.print_recipe:
            print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), end="")
            return 0
        train_recipe(recipe, arguments.deepspeed, arguments.overrides)
    except Stopped as stopped:
        leave_together(stopped)
    except (ValueError, OSError, DataError, Diverged, Collapsed) as error:
        if dist.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0":
            rank = os.environ.get("RANK", "0")
            whose = "error" if rank == "0" else f"error (rank {rank})"
            print(f"{whose}: {without_traceback(error)}", file=sys.stderr, flush=True)
        is_mistake, is_collapse = isinstance(error, ValueError), isinstance(error, Collapsed)
        return record_code(MISTAKE if is_mistake else COLLAPSED if is_collapse else FAILED)
    except BaseException as error:
        if not is_lost_rank(error):
            record_code(FAILED)
            raise
        tell(f"error: another rank was lost, its own message says why ({str(error).splitlines()[0]})")
        leave_now(LOST)
    return record_code(0)


def leave_together(stopped: Stopped) -> None:
    """At once and without Python's slow end, since a launcher kills the others when the first has left."""
    if os.environ["RANK"] == "0":
        print(stopped, flush=True)
    late = threading.Timer(LAST_BARRIER_SECONDS, leave_now, [STOPPED])
    late.daemon = True
    late.start()
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    leave_now(STOPPED)


def is_lost_rank(error: BaseException) -> bool:
    """Whether it comes from a collective that other ranks left; gloo has no class for that."""
    return isinstance(error, dist.DistError) or any(
        text in str(error) for text in ("gloo", "Connection closed by peer")
    )


def without_traceback(error: Exception) -> str:
    """The message; of a data worker's error, which comes with the worker's traceback, what stands after it."""
    text = str(error)
    if "Original Traceback" not in text:
        return text
    return re.split(rf"(?m)^(?:\w+\.)*{type(error).__name__}: ", text)[-1].strip()


def train_recipe(recipe: Recipe, deepspeed: str | None, given: Sequence[str] = ()) -> Path:
    """`given`: the `key=value` that the recipe already has from the command."""
    signals = listen()
    try:
        return train_until_asked(recipe, deepspeed, given, signals)
    finally:
        if signals.phase != "leaving":
            stop_listening()


def train_until_asked(recipe: Recipe, deepspeed: str | None, given: Sequence[str], signals: Signals) -> Path:
    rank, world = prepare_environment()
    ds_config = check_settings(recipe, deepspeed, world)
    device = start_distributed(world, recipe.train.timeout_minutes, recipe.folder)
    agree(settings(recipe))
    with alone(recipe.folder, rank):
        return train_alone(recipe, ds_config, device, rank, world, given, signals)


def check(ranks: int, argv: list[str]) -> int:
    """Whether a run of this command could begin, before its data is there; the exit code. `scripts/pretrain.sh`'s."""
    try:
        arguments = parse_arguments(argv, "train.py")
        check_settings(load_recipe(arguments.recipe, arguments.overrides), arguments.deepspeed, ranks)
        if 0 < (gpus := torch.cuda.device_count()) < ranks:
            raise ValueError(f"NUM_GPUS={ranks}, but this machine has {gpus}; set at most that")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    return 0


def check_settings(recipe: Recipe, deepspeed: str | None, world: int) -> dict[str, Any]:
    """DeepSpeed's config, resolved; ValueError for what no run can have."""
    if recipe.folder.exists() and not recipe.folder.is_dir():
        raise ValueError(f"out={recipe.folder} is a file, must be a folder for the run; set another out=")
    config_path = find_config(deepspeed)
    ds_config = resolve_config(
        read_config(config_path),
        clip=recipe.optim.clip,
        lr=recipe.optim.lr,
        betas=recipe.optim.betas,
        eps=recipe.optim.eps,
        weight_decay=recipe.optim.weight_decay,
        precision=recipe.precision,
        dim=recipe.body.dim,
        path=str(config_path),
    )
    check_ranks(recipe, world)
    checkpoints.refuse_links(recipe.folder)
    return ds_config


def train_alone(
    recipe: Recipe,
    ds_config: dict[str, Any],
    device: torch.device,
    rank: int,
    world: int,
    given: Sequence[str],
    signals: Signals,
) -> Path:
    """From the newest checkpoint, or the beginning, to the last step."""
    start, problems = choose_checkpoint(recipe.folder)
    if rank == 0:
        for problem in problems:
            print(f"warning: {problem}; taking an older checkpoint", file=sys.stderr, flush=True)
    saved = checkpoints.Checkpoint(start) if start else None
    if recipe.task:
        before = Recipe(**saved.loop["recipe"]) if saved else None
        recipe = together(lambda: with_classes(with_network(recipe, before, given), before))
    if saved:
        together(lambda: check_same_recipe(recipe, saved))
        recipe = together(lambda: check_same_init(recipe, saved))
        if saved.loop["step"] >= recipe.train.steps:
            if rank == 0:
                print(
                    f"{recipe.folder} is finished: {saved.loop['step']} of {recipe.train.steps} steps are done; "
                    "set train.steps higher to go on, or out= to start anew",
                    flush=True,
                )
            return recipe.folder
    opened, windows = open_sources(recipe, rank), saved.loop.get("windows", {}) if saved else None
    sources = together(lambda: cut_windows(opened, windows))
    if saved:
        together(lambda: check_same_data(sources, saved))
    hashes = file_hashes(sources)
    begin = Start() if saved else together(lambda: read_start(recipe, hashes))
    facts = {"data": fingerprints(sources), "files": hashes, "checkpoint": str(start)}
    agree({**facts, "init": begin.fingerprint()})
    probes = open_probes_together(recipe, sources, rank)
    examiner = together(lambda: open_examiner(recipe, sources))
    run = build_run(recipe, ds_config, sources, saved, begin, device, rank, world, probes, examiner)
    signals.phase, signals.patience = "running", recipe.train.stop_seconds
    try:
        run_steps(run)
    except Collapsed:  # on all ranks alike
        run.finish_saving()
        raise
    finally:
        run.watchdog.close()
    return recipe.folder


def check_ranks(recipe: Recipe, world: int) -> None:
    """Before any work: every modality's micro-batches must divide among the ranks."""
    for name, config in recipe.modalities.items():
        n = config.data.micro_batches
        if n % world:
            fits = [r for r in range(1, n + 1) if n % r == 0]
            raise ValueError(
                f"modalities.{name}.data.micro_batches={n} does not divide among {world} ranks; start one of {fits} "
                f"ranks, or set it to a multiple such as {-(-n // world) * world} (and batch to keep their product)"
            )


def choose_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """What rank 0 finds, for all ranks: the newest checkpoint that verifies."""
    found: list[Any] = [None, []]
    if dist.get_rank() == 0:
        checkpoints.recover(folder)
        found = list(checkpoints.newest(folder))
    dist.broadcast_object_list(found)
    if found[0] is None and found[1]:
        raise ValueError(
            f"no checkpoint in {folder} is whole ({'; '.join(found[1])}); "
            "move the folder away, or set out= to start anew"
        )
    return found[0], found[1]


def check_same_recipe(recipe: Recipe, saved: checkpoints.Checkpoint) -> None:
    before = Recipe(**saved.loop["recipe"])  # so a key that came since has its default, and is no difference
    if before.hash() == recipe.hash():
        return
    old, new = dotted_keys(before), dotted_keys(recipe)
    changed = [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not is_free(key)
    ]
    raise ValueError(
        f"{saved.folder} is of another recipe ({'; '.join(changed[:10])}); "
        "give the same values to go on with it, or another out= to start anew"
    )


def check_same_init(recipe: Recipe, saved: checkpoints.Checkpoint) -> Recipe:
    """The recipe with what its run was started from, whose file is not read again and may be gone.

    Raises ValueError if another one is given: it would be ignored.
    """
    began_from = saved.loop["recipe"].get("init")
    if recipe.init not in (None, "", began_from):
        raise ValueError(
            f"{saved.folder} was started from {began_from or 'fresh weights'}, and goes on from its own; to start from "
            f"init={recipe.init} set another out=, to go on leave init out"
        )
    return recipe.model_copy(update={"init": began_from})


def open_sources(recipe: Recipe, rank: int) -> list[Source]:
    """Rank 0 builds what is missing of the index, then all read it; an error of rank 0 reaches all."""
    outcome: list[tuple[str, str] | None] = [None]
    sources: list[Source] = []
    with reading(recipe.remote):
        if rank == 0:
            try:
                sources = [
                    open_source(name, config, recipe.data, recipe.task)
                    for name, config in recipe.modalities.items()
                ]
            except (ValueError, OSError) as error:
                outcome = [("data" if isinstance(error, ValueError) else "machine", str(error))]
        dist.broadcast_object_list(outcome)
        if outcome[0]:
            whose, message = outcome[0]
            raise ValueError(message) if whose == "data" else OSError(message)
        return together(
            lambda: (
                sources
                or [
                    open_source(name, config, recipe.data, recipe.task)
                    for name, config in recipe.modalities.items()
                ]
            )
        )


def open_probes_together(recipe: Recipe, sources: list[Source], rank: int) -> Probes:
    """Rank 0 first, which builds what is missing of the index."""
    with reading(recipe.remote):
        probes = together(lambda: open_probes(recipe, sources) if rank == 0 else None)
        return together(lambda: probes or open_probes(recipe, sources))


def fingerprints(sources: list[Source]) -> dict[str, str]:
    return {s.name: s.fingerprint for s in sources}


def check_same_data(sources: list[Source], saved: checkpoints.Checkpoint) -> None:
    before = saved.loop.get("files", {})  # absent in older checkpoints
    for name, digest in file_hashes(sources).items():
        if before.get(name, digest) != digest:
            is_vocabulary = (saved.loop["recipe"].get("task") or {}).get("vocabulary")
            key = "task.vocabulary" if is_vocabulary else f"modalities.{name}.data.tokenizer"
            raise ValueError(
                f"{key} is not the one that {saved.folder} was trained with "
                f"(sha256 {digest[:12]}, was {before[name][:12]}); give that of {saved.folder.parent}, or another "
                "out= to start anew"
            )
    for name, fingerprint in fingerprints(sources).items():
        if saved.loop["data"].get(name) != fingerprint:
            raise ValueError(
                f"the shards of {name} are not those {saved.folder} was trained on "
                f"(fingerprint {fingerprint[:12]}, was {str(saved.loop['data'].get(name))[:12]}); "
                "give the same data=, or another out= to start anew"
            )


def file_hashes(sources: list[Source]) -> dict[str, str]:
    """sha256 of the file that a modality's samples are read with: a tokenizer."""
    return {
        source.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for source in sources
        for file in getattr(source.samples, "files", ())
    }


def build_run(
    recipe: Recipe,
    ds_config: dict[str, Any],
    sources: list[Source],
    saved: checkpoints.Checkpoint | None,
    begin: Start,
    device: torch.device,
    rank: int,
    world: int,
    probes: Probes | None = None,
    examiner: Examiner | None = None,
) -> Run:
    torch.manual_seed(recipe.seed)  # equal on all ranks: so are the fresh weights
    if recipe.task:
        model = build_tuned(recipe.body, recipe.modalities, recipe.task, recipe.fairseq_compat)
    else:
        model = build_model(recipe.body, recipe.modalities, recipe.fairseq_compat)
    optim = recipe.optim
    optimizer = build_optimizer(
        model,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        decay=optim.decay,
    )
    engine = build_engine(model, optimizer, ds_config, recipe.train.compile)
    ema = TeacherEMA(engine)
    step, applied, first_step, updates_before = begin.step, 0, begin.step, begin.updates_before
    if saved:
        step, applied = saved.loop["step"], saved.loop["applied_steps"]
        first_step, updates_before = saved.loop.get("first_step", 0), saved.loop.get("updates_before", 0)
        checkpoints.load(engine, ema, saved, applied)
    elif recipe.init:
        put_weights(engine, ema, begin.student, begin.teacher)
    plan = Plan(recipe.seed, [s.stream for s in sources])
    log = None
    if rank == 0:
        write_run_files(recipe, ds_config, sources, world)
        if saved:
            repair_latest(recipe.folder, saved.folder)
        log = Log(recipe.folder, step, recipe.train.steps)
    train = recipe.train
    watchdog = Watchdog(
        recipe.folder, rank, train.hang_factor, train.hang_seconds, patience=60 * train.timeout_minutes
    )
    identity = {"recipe": recipe.hash(), "data": fingerprints(sources)}
    faults = FaultLog(recipe.folder / "quarantine.jsonl", recipe.train.max_bad_share)
    saver = Saver(
        engine,
        ema,
        recipe.folder,
        mode=train.save,
        keep=train.keep_checkpoints,
        keep_every=train.keep_every,
        max_failures=train.save_failures,
        last_good=saved.folder if saved else None,
    )
    run = Run(
        recipe, engine, ema, plan, sources, device, rank, world,
        step, applied, first_step, updates_before, log, faults,
        listen(), watchdog, Clock(watchdog, device), identity, step, Watch(recipe.health.patience), saver,
        probes or Probes(recipe, {}), examiner or Examiner(recipe, None),
    )  # fmt: skip
    if saved:
        run.examiner.go_on(run, saved.loop)
        run.lr_scale, run.rollbacks = saved.loop.get("lr_scale", 1.0), saved.loop.get("rollbacks", [])
    run.loader = StepLoader(sources, plan, rank, world, step, recipe.train.steps, recipe.train.workers)
    introduce(run, ds_config, saved)
    for note in begin.notes:
        run.say(note)
    run.probes.begin(run)
    return run


def repair_latest(folder: Path, checkpoint: Path) -> None:
    said = checkpoints.point_to(folder, checkpoint)
    if said is not None:
        print(
            f"warning: {folder}/latest is damaged, it said {said!r}; now it says {checkpoint.name}",
            file=sys.stderr,
            flush=True,
        )


def introduce(run: Run, ds_config: dict[str, Any], saved: checkpoints.Checkpoint | None) -> None:
    """What is about to happen, in a few lines."""
    recipe, engine = run.recipe, run.engine
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters() if p.requires_grad)
    dtype = str(next(engine.module.parameters()).dtype).removeprefix("torch.")
    run.say(
        f"{recipe.name}: {trained / 1e6:.1f} M parameters, ZeRO-{engine.zero_optimization_stage()}, {dtype}, "
        f"{run.world} rank{'s' * (run.world > 1)} on {run.device.type}, run folder {recipe.folder}"
    )
    if run.device.type == "cpu" and (precision := emulated_precision(ds_config)):
        run.say(
            f"warning: this CPU has no matrix products in {precision}, so a step may take hundreds of times as long as "
            "in fp32; give precision=fp32 and a DeepSpeed config without torch_autocast"
        )
    for source in run.sources:
        run.say(f"  {describe_volume(source, run.plan, recipe.train.steps)}")
    if saved:
        run.say(f"resuming from {saved.folder}: {run.step} of {recipe.train.steps} steps are done")


def write_run_files(recipe: Recipe, ds_config: dict[str, Any], sources: list[Source], world: int) -> None:
    folder = recipe.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(recipe, folder / "recipe.yaml")
    (folder / "ds_config.json").write_text(json.dumps(ds_config, indent=2), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(environment(world), indent=2), encoding="utf-8")
    for source in sources:
        for file in getattr(source.samples, "files", ()):  # what an export needs to stand alone: a tokenizer
            if file.resolve() != (folder / file.name).resolve():
                shutil.copyfile(file, folder / file.name)


def environment(world: int) -> dict[str, Any]:
    import d2v_ds

    return {
        "d2v_ds": d2v_ds.__version__,
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "world_size": world,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": sys.argv,
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
    }
