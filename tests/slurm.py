"""A real Slurm on this machine for tests, loopback only: started by the fixture `slurm`, stopped by the numbers of its processes.

Where it is not installed, tests skip.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

CONFIGURATION = """\
ClusterName=onenode
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={hold}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={port}
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=15
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=5
SlurmctldParameters=preempt_send_user_signal
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={port_one} CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=1000
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={port_two} CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=1000
PartitionName=main Nodes=one Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=high Nodes=one MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=both Nodes=one,two MaxTime=INFINITE State=UP PriorityTier=1
"""
GONE = ("", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def why_not() -> str | None:
    """The sentence with which tests skip."""
    if missing := [name for name in ("slurmctld", "slurmd", "munged", "sbatch", "runuser") if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]:
        return f"no Slurm here ({', '.join(missing)} not found): apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "a Slurm of one's own is started by root only"


class Slurm:
    """Nodes `one` and `two` of four pretended cores each, both this machine.

    `hold` is how long a requeued job must wait: Slurm lets it begin again when the credential of its last start has expired, by default after 120 s
    (`cred_expire`).
    """

    def __init__(self, folder: Path, hold: int = 5):
        self.folder = folder
        self.processes: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)
        port, one, two = free_ports(3)
        self.host = socket.gethostname().partition(".")[0]
        text = CONFIGURATION.format(host=self.host, folder=folder, port=port, port_one=one, port_two=two, hold=hold)
        (folder / "slurm.conf").write_text(text)
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}

    def start(self) -> "Slurm":
        for name in ("state", "spool-one", "spool-two"):
            (self.folder / name).mkdir(exist_ok=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        places = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munge.seed"}
        self._run("munged", "--force", "--num-threads=2", *(f"--{name}={self.folder / file}" for name, file in places.items()))
        self.start_controller()
        for name in ("one", "two"):
            self._run("slurmd", "-N", name)
        self.wait(lambda: self.tell("sinfo", "-h", "-N", "-p", "both", "-o", "%T").split() == ["idle", "idle"], "the nodes to be idle")
        return self

    def start_controller(self) -> None:
        self._run("slurmctld")

    def stop(self) -> None:
        for name in ("slurmd-one.pid", "slurmd-two.pid", "slurmctld.pid", "munged.pid"):
            with suppress(OSError, ValueError):
                pid = int((self.folder / name).read_text())
                os.kill(pid, signal.SIGTERM)
                deadline = time.monotonic() + 10
                while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
                    time.sleep(0.05)
                os.kill(pid, signal.SIGKILL)

    def _run(self, *words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **self.environment}, timeout=60)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    def logs(self) -> str:
        """The last lines of the daemons, for messages."""
        return "".join(f"\n{file.name}:\n" + "".join(file.read_text(errors='replace').splitlines(True)[-15:]) for file in sorted(self.folder.glob("*.log")))

    def tell(self, *words: str) -> str:
        """What one of Slurm's commands says."""
        return subprocess.run(words, capture_output=True, text=True, env={**os.environ, **self.environment}, timeout=60).stdout.strip()

    def wait(self, true, what: str, seconds: float = 60):
        """Until something is so; what it returned."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := true():
                return found
            time.sleep(0.1)
        raise AssertionError(f"waited {seconds:g} s for {what}; squeue:\n{self.tell('squeue', '-t', 'all')}{self.logs()}")

    def state(self, job: str) -> str:
        """Of a job, such as RUNNING, in Slurm's own words; COMPLETED and the like for some minutes after its end."""
        return self.tell("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")

    def end(self, job: str, seconds: float = 240) -> str:
        """Wait for the end of a job and of all its tasks; their last states."""
        self.wait(lambda: all(state in GONE for state in self.state(job).splitlines()), f"job {job} to end", seconds)
        return self.state(job)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A running Slurm, with its commands on the PATH of this process and its children."""
    if reason := why_not():
        pytest.skip(reason)
    made = Slurm(tmp_path_factory.mktemp("slurm"))
    before = {name: os.environ.get(name) for name in made.environment}
    try:
        made.start()
        os.environ.update(made.environment)
        yield made
    finally:
        for job in made.tell("squeue", "-h", "-o", "%A").split():
            made.tell("scancel", "--signal=KILL", "--full", job), made.tell("scancel", job)
        made.stop()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
