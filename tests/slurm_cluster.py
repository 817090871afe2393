"""A real SLURM on this machine for as long as a test needs it: its own daemons, key and folder, no systemd.

Needs the programs of Debian's ``slurm-wlm`` and ``munge``. Everything listens on the loopback; nothing reaches another
cluster, for every command gets the configuration of this one.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# a job that was put back waits as long as its credential lives, two minutes if nothing is said
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
# neither cgroups nor accounting: both need more of the machine than a test may ask
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=15
"""


def missing() -> list[str]:
    """Programs that a cluster needs and that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Cluster:
    """Commands of a cluster that runs.

    Args:
        folder: of its configuration and logs.
        environment: of every command, also that of jobs.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = dict(environment)

    def ask(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """What a command prints.

        Raises:
            RuntimeError: it fails.
        """
        variables = {**self.environment, **environment}
        done = subprocess.run(command, env=variables, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout.strip()

    def job(self, name: str) -> dict[str, str]:
        """What SLURM knows of a job: ``JobState``, ``Restarts``, ``ExitCode`` and so on."""
        words = self.ask("scontrol", "--oneliner", "show", "job", name).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, name: str) -> str:
        """``PENDING``, ``RUNNING``, ``COMPLETED``, …"""
        return self.job(name)["JobState"]

    def wait(self, what: Callable[[], object], seconds: float, of: str) -> None:
        """Wait until something holds.

        Raises:
            TimeoutError: it does not.
        """
        deadline = time.monotonic() + seconds
        while not what():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{of}: not within {seconds:.0f} s\n{self.ask('squeue', '--long')}")
            time.sleep(0.5)

    def finish(self, name: str, seconds: float = 600) -> dict[str, str]:
        """Wait until a job has ended, and say how."""
        ended: dict[str, str] = {}

        def has() -> bool:
            nonlocal ended
            before, ended = ended, self.job(name)
            # in two looks: for a moment, a job that is put back is in a state of neither kind
            return ended["JobState"] in ENDED and before.get("JobState") == ended["JobState"]

        self.wait(has, seconds, f"end of job {name}")
        return ended


@contextmanager
def cluster(nodes: int = 1, cpus: int = 4) -> Iterator[Cluster]:
    """Start a cluster in a new temporary folder; at the end stop its jobs, then the daemons, and delete the folder.

    Args:
        nodes: that it seems to have; with more than one their names (n1, n2, …) are those of no host.
        cpus: of each, however many there are.

    Raises:
        RuntimeError: a daemon ends at once; says what it printed.
        TimeoutError: the nodes are not there in time.
    """
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short path: that of a socket has a limit
    daemons: list[subprocess.Popen[bytes]] = []
    made: Cluster | None = None
    try:
        conf = configure(folder, nodes, cpus)
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))}
        made = Cluster(folder, {**outside, "SLURM_CONF": str(conf)})
        paths = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munge = [f"--{option}={folder}/munge/{name}" for option, name in paths.items()]
        daemons.append(start(["munged", "--foreground", *munge], made))
        made.wait((folder / "munge" / "socket").exists, 10, "munged")
        daemons.append(start(["slurmctld", "-D", "-f", str(conf)], made))
        for name in names_of(nodes):
            daemons.append(start(["slurmd", "-D", "-f", str(conf), "-N", name], made))
        made.wait(lambda: idle(made, daemons) == nodes, 30, "nodes")
        yield made
    finally:
        if made is not None and len(daemons) > 2:
            with suppress(RuntimeError, subprocess.TimeoutExpired, TimeoutError):
                made.ask("scancel", f"--user={pwd.getpwuid(os.getuid()).pw_name}")
                made.wait(lambda: not made.ask("squeue", "--noheader"), 30, "end of all jobs")
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def names_of(nodes: int) -> list[str]:
    """One node is called as its host, so that the name can be looked up."""
    return [socket.gethostname().split(".")[0]] if nodes == 1 else [f"n{k + 1}" for k in range(nodes)]


def configure(folder: Path, nodes: int, cpus: int) -> Path:
    """Write key and configuration; returns the latter."""
    for each in (folder, folder / "munge", folder / "state"):
        each.mkdir(exist_ok=True)
        each.chmod(0o755)  # munged wants everybody to reach its socket, and nobody its key
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    host = socket.gethostname().split(".")[0]
    user = pwd.getpwuid(os.getuid()).pw_name
    own, *others = free_ports(nodes + 1)
    lines = CONF.format(host=host, port=own, user=user, folder=folder)
    for name, port in zip(names_of(nodes), others, strict=True):
        lines += f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=4000\n"
    conf = folder / "slurm.conf"
    conf.write_text(lines + "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n")
    return conf


def start(command: Sequence[str], made: Cluster) -> subprocess.Popen[bytes]:
    """A daemon, deaf to our Ctrl-C; what it says is in a file of the cluster's folder."""
    with (made.folder / f"{command[0]}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=made.environment, start_new_session=True)


def idle(made: Cluster, daemons: Sequence[subprocess.Popen[bytes]]) -> int:
    """How many nodes wait for jobs.

    Raises:
        RuntimeError: a daemon has ended.
    """
    for daemon in daemons:
        if daemon.poll() is not None:
            assert isinstance(daemon.args, list)
            name = Path(str(daemon.args[0])).name
            raise RuntimeError(f"{name} has ended:\n{(made.folder / f'{name}.log').read_text()[-2000:]}")
    try:
        return len(set(made.ask("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N").splitlines()))
    except RuntimeError:  # slurmctld does not listen yet
        return 0


def free_ports(count: int) -> list[int]:
    """Ports on which nobody listens now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
