"""Who am I among the ranks: one answer for `deepspeed`, `torchrun`, `srun` and plain `python`."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import re
import socket
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from d2v_ds.data.memory import keep_memory


def prepare_environment() -> tuple[int, int]:
    """Sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT where the launcher did not; (rank, world)."""
    env = os.environ
    # NOTE: the shell of a batch script has SLURM_PROCID and SLURM_NTASKS too, but is no step
    if "RANK" not in env and "SLURM_STEP_ID" in env and int(step_variable("NUM_TASKS", "NTASKS")) > 1:
        env.update(slurm_environment())
    env.setdefault("RANK", "0")
    env.setdefault("WORLD_SIZE", "1")
    env.setdefault("LOCAL_RANK", "0")
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(free_port())
    if not torch.cuda.is_available():
        env.setdefault("DS_ACCELERATOR", "cpu")
    # pip's ninja lies beside python, which an unactivated environment hides from DeepSpeed's operator builder
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    return int(env["RANK"]), int(env["WORLD_SIZE"])


def slurm_environment() -> dict[str, str]:
    """The variables that torch.distributed needs, from those that srun sets."""
    env, world = os.environ, step_variable("NUM_TASKS", "NTASKS")
    return {
        "RANK": env["SLURM_PROCID"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "WORLD_SIZE": world,
        "LOCAL_SIZE": re.split(r"[(,]", step_variable("TASKS_PER_NODE", "TASKS_PER_NODE"))[0],
        "MASTER_ADDR": env.get("MASTER_ADDR") or first_host(step_variable("NODELIST", "JOB_NODELIST")),
        "MASTER_PORT": env.get("MASTER_PORT") or str(10_000 + int(env["SLURM_JOB_ID"]) % 50_000),
    }


def step_variable(name: str, of_job: str) -> str:
    """Of the step, which may have fewer tasks and nodes than its job."""
    return os.environ.get(f"SLURM_STEP_{name}") or os.environ.get(f"SLURM_{of_job}") or "1"


def first_host(nodelist: str) -> str:
    """First host of a SLURM node list such as `gpu[003-007,9],login1`."""
    try:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True
        )
        return hosts.stdout.split()[0]
    except (FileNotFoundError, subprocess.CalledProcessError):  # no scontrol inside a container
        match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodelist)
        return match.group(1) + (match.group(2) or "")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_distributed(world: int, timeout_minutes: float = 30, folder: Path | None = None) -> torch.device:
    """Joins the process group, quietly; the device this rank computes on. `folder` is where NCCL's flight recorder
    writes the last collectives of a rank when one runs out of time."""
    if folder is not None:
        record_collectives(folder)
    quiet()
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # NOTE: on a CPU DeepSpeed would compile a shared-memory operator at first use (a minute, g++ needed);
    # gloo alone is as fast here, since gradients are reduced once a step.
    if get_accelerator().device_name() == "cpu":
        share_cores(world)
        keep_memory()
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        atexit.register(leave)
    deepspeed.init_distributed(
        get_accelerator().communication_backend_name(),
        timeout=timedelta(minutes=timeout_minutes),
        verbose=False,
    )
    local_rank = int(os.environ["LOCAL_RANK"])
    get_accelerator().set_device(local_rank)
    return torch.device(get_accelerator().device_name(local_rank))


@functools.cache
def control_group() -> dist.ProcessGroup:
    """For a few bytes between hosts, apart from what their devices send each other: nobody waits for a device.

    All ranks call it first at the same place.
    """
    return dist.new_group(backend="gloo")


def record_collectives(folder: Path) -> None:
    """NCCL's flight recorder, before the process group starts; what is set already stays."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "nccl_timeout_rank_"))


def leave() -> None:
    """At the end of the process, not of a run: DeepSpeed remembers the group, and another run may follow."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """Ends a process that trained: its exit functions run, the interpreter is not taken down.

    NOTE: DeepSpeed holds on to process groups, and so to gloo's threads. One that lets go of a tensor while the
    interpreter goes down aborts the process, now and then, with all its work done.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def share_cores(world: int) -> None:
    """Threads for a rank on a CPU, unless OMP_NUM_THREADS says: ranks of one machine must not fight for cores."""
    if "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))


def quiet() -> None:
    """DeepSpeed's messages at import and deprecations of torch's collectives that it calls."""
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*barrier.*device.*")
