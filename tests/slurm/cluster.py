"""A SLURM cluster of its own on this machine: munged, slurmctld and a slurmd for each node, in one folder.

No systemd, no accounting, nothing of /etc/slurm; ports are free ones, and what it started it ends, by process id.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged")
SEARCH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
NODES = ("n1", "n2")
HOSTS, TAG = Path("/etc/hosts"), "# d2v_ds tests"

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# how long a requeued job waits too
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
JobRequeue=1
ReturnToService=1
KillWait=10
MinJobAge=3600
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=15
MessageTimeout=20
PropagateResourceLimits=NONE
MailProg=/bin/true
GresTypes=gpu
"""


def install() -> str | None:
    """Puts Debian's packages in place if they are absent; why that cannot be, or None."""
    if os.geteuid():
        return "only root can start a cluster whose nodes have names"
    missing = [name for name in PROGRAMS if not shutil.which(name, path=SEARCH)]
    if not missing:
        return None
    if not shutil.which("apt-get"):
        return f"{', '.join(missing)} not found, and there is no apt-get to install slurm-wlm and munge"
    policy = Path("/usr/sbin/policy-rc.d")  # or the packages start daemons of their own
    is_ours = not policy.exists()
    if is_ours:
        policy.write_text("#!/bin/sh\nexit 101\n", encoding="ascii")
        policy.chmod(0o755)
    try:
        for words in ("update -qq", "install -y -qq --no-install-recommends slurm-wlm munge"):
            done = subprocess.run(
                ["apt-get", "-o", "DPkg::Lock::Timeout=300", *words.split()],
                env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
                capture_output=True,
                text=True,
            )
    finally:
        if is_ours:
            policy.unlink()
    return f"apt-get failed: {done.stderr.strip()[-300:]}" if done.returncode else None


class Cluster:
    def __init__(self, folder: Path):
        self.folder = folder
        self.env = os.environ | {"PATH": SEARCH, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        ports = free_ports(1 + len(NODES))
        host = socket.gethostname().partition(".")[0]
        lines = [
            CONFIG.format(host=host, port=ports[0], user=subprocess.getoutput("id -un"), folder=self.folder)
        ]
        gpus = []
        for name, port in zip(NODES, ports[1:], strict=True):
            lines.append(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=4096 Gres=gpu:1"
            )
            gpus.append(f"NodeName={name} Name=gpu File=/dev/null")  # any device: it is never opened
            (self.folder / f"spool-{name}").mkdir()
        lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n", encoding="ascii")
        (self.folder / "gres.conf").write_text("\n".join(gpus) + "\n", encoding="ascii")
        (self.folder / "cgroup.conf").write_text("", encoding="ascii")
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self.hosts = self.folder / "hosts"  # the nodes' names must lead somewhere in their jobs
        known = HOSTS.read_text(encoding="utf-8")
        self.hosts.write_text(f"{known}\n127.0.0.1 {' '.join(NODES)} {host}\n", encoding="utf-8")
        sock = self.folder / "munge.sock"
        self.spawn(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={sock}",
            f"--pid-file={self.folder / 'munged.pid'}", f"--log-file={self.folder / 'munged.log'}",
            f"--seed-file={self.folder / 'munged.seed'}",
        )  # fmt: skip
        self.wait(sock.exists, 30, "munged")
        self.spawn("slurmctld", "-D", "-i", "-f", self.env["SLURM_CONF"])
        for name in NODES:
            self.start_node(name)
        self.wait(
            lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", 60, "two idle nodes"
        )

    def start_node(self, name: str) -> None:
        """With the names of the nodes in its own /etc/hosts, or where that is not allowed in that of all."""
        own_hosts = [
            *("unshare", "--mount", "--propagation", "slave", "sh", "-c"),
            'mount --bind "$0" /etc/hosts && exec "$@"',
            str(self.hosts),
        ]
        if subprocess.run([*own_hosts, "true"], capture_output=True).returncode:
            own_hosts, text = [], HOSTS.read_text(encoding="utf-8")
            if TAG not in text:
                HOSTS.write_text(f"{text}\n127.0.0.1 {' '.join(NODES)} {TAG}\n", encoding="utf-8")
        self.spawn(name, *own_hosts, "slurmd", "-D", "-f", self.env["SLURM_CONF"], "-N", name)

    def spawn(self, name: str, *words: object) -> None:
        program = [name, *map(str, words)] if name not in NODES else list(map(str, words))
        with (self.folder / f"{name}.out").open("ab") as file:
            self.daemons[name] = subprocess.Popen(
                program, env=self.env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=self.folder
            )

    def run(self, *words: object, **env: str) -> str:
        done = subprocess.run(
            list(map(str, words)), env=self.env | env, capture_output=True, text=True, timeout=60
        )
        return done.stdout if done.returncode == 0 else f"{done.stdout}{done.stderr}"

    def submit(self, *words: object, cwd: Path, **env: str) -> str:
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, words)],
            env=self.env | env | {"SLURM_CONF": self.env["SLURM_CONF"]}, capture_output=True, text=True, cwd=cwd,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says of a job: JobState, Restarts, ..."""
        words = self.run("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, is_so: Callable[[], object], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end, f"{what}: not within {seconds} s\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(
            f"---- {path.name}\n{path.read_text(errors='replace')[-1500:]}"
            for path in sorted([*self.folder.glob("*.out"), *self.folder.glob("*.log")])
        )

    def processes(self, node: str) -> list[int]:
        """All of a node: its daemon, the steps' daemons, which have its log open, and the tasks."""
        log, found = str(self.folder / f"slurmd-{node}.log"), []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environ = (folder / "environ").read_bytes().split(b"\0")
                is_task = {
                    f"SLURMD_NODENAME={node}".encode(),
                    f"SLURM_CONF={self.env['SLURM_CONF']}".encode(),
                } <= set(environ)
                if is_task or any(os.readlink(file) == log for file in (folder / "fd").iterdir()):
                    found.append(int(folder.name))
        return found

    def fail(self, node: str) -> None:
        """The node is gone: its daemon and all that ran on it."""
        for _ in range(3):  # what was being started meanwhile
            for pid in self.processes(node):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.daemons.pop(node).wait()

    def stop(self) -> None:
        if "slurmctld" in self.daemons:
            self.run("scancel", "--signal=KILL", "--user", subprocess.getoutput("id -un"))
            time.sleep(0.5)
        for node in NODES:
            if node in self.daemons:
                self.fail(node)
        for daemon in self.daemons.values():
            daemon.terminate()
            daemon.wait(20)
        text = HOSTS.read_text(encoding="utf-8")
        if TAG in text:
            kept = [line for line in text.splitlines() if TAG not in line]
            HOSTS.write_text("\n".join(kept) + "\n", encoding="utf-8")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
