"""Several machines by `deepspeed --hostfile`: here two loopback addresses of one, reached as two machines are."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import ROOT
from runs import TINY, environment

from d2v_ds.engine.launch import free_port

RUNNER = [sys.executable, "-m", "deepspeed.launcher.runner"]
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hostfile"
    path.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n", encoding="utf-8")
    return path


def train(out: Path) -> list[str]:
    return ["train.py", "--deepspeed", "zero3", *TINY, "train.steps=2", f"out={out}"]


@pytest.mark.slow
def test_each_machine_starts_its_ranks_itself(hostfile: Path, tmp_path: Path) -> None:
    """`--no_ssh`: the same command on each, with its own `--node_rank`."""
    port, runs = str(free_port()), []
    for rank in (0, 1):
        at = ["--no_ssh", "--node_rank", str(rank), "--master_addr", "127.0.0.1", "--master_port", port]
        runs.append(
            subprocess.Popen(
                [*RUNNER, "--hostfile", str(hostfile), *at, *train(tmp_path / "run")],
                env=environment(),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )  # fmt: skip
        )
    shown = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], shown
    assert "2 ranks" in shown[0] and "finished 2 steps" in shown[0]


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[tuple[int, str]]:
    """(port, options for ssh) of a server of our own that lets this user in."""
    missing = [name for name in ("pdsh", "ssh", "ssh-keygen") if not shutil.which(name)]
    missing += [] if Path(SSHD).is_file() else ["sshd"]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    shutil.copy(tmp_path / "user.pub", tmp_path / "allowed")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    port = free_port()
    settings = {
        "Port": port, "ListenAddress": "0.0.0.0", "HostKey": tmp_path / "host", "PidFile": tmp_path / "pid",
        "AuthorizedKeysFile": tmp_path / "allowed", "StrictModes": "no", "PermitRootLogin": "yes", "UsePAM": "no",
        "AllowUsers": getpass.getuser(),
    }  # fmt: skip
    (tmp_path / "sshd").write_text("".join(f"{k} {v}\n" for k, v in settings.items()), encoding="utf-8")
    server = subprocess.Popen(
        [SSHD, "-D", "-e", "-f", tmp_path / "sshd"], stderr=(tmp_path / "log").open("w")
    )
    options = f"-i {tmp_path / 'user'} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    try:
        for _ in range(50):
            there = ["ssh", *options.split(), "-p", str(port), "127.0.0.2", "true"]
            if subprocess.run(there, capture_output=True).returncode == 0:
                break
            time.sleep(0.1)
        else:
            pytest.skip(f"no ssh to this machine: {(tmp_path / 'log').read_text()[-500:]}")
        yield port, options
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_one_command_starts_all_machines(hostfile: Path, ssh: tuple[int, str], tmp_path: Path) -> None:
    """Through pdsh and ssh."""
    port, options = ssh
    command = [*RUNNER, "--hostfile", str(hostfile), "--ssh_port", str(port), "--no_ssh_check"]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(free_port()), *train(tmp_path / "run")]
    done = subprocess.run(
        command,
        env=environment(PDSH_SSH_ARGS_APPEND=options),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "2 ranks" in done.stdout and "finished 2 steps" in done.stdout
