"""A Slurm of two emulated nodes on this machine, for tests that submit real jobs. Needs root, slurmctld and munged."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from codecssl.superb.sample.unpack import unpack

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "slurm"
REQUEUED_AFTER_SECONDS = 8
"""A requeued job waits as long as a credential lives: 120 s, unless slurm.conf says otherwise."""
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

CONF = """
ClusterName=codecssl
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire={cred_expire}
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={root}/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
MaxArraySize=8
MessageTimeout=60
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/%n.pid
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/%n.log
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Two nodes, n1 and n2, of two CPUs each; every method waits until Slurm agrees."""

    def __init__(self, root: Path) -> None:
        self.root, self.conf = root, root / "slurm.conf"
        tools = {"SLURM_CONF": str(self.conf), "PATH": PATH, "CODECSSL_PYTHON": sys.executable}
        quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CODECSSL_CPUS": "1", "CODECSSL_GPUS": "0"}
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        self.environment = {**ours, **tools, **quiet}

    def start(self) -> None:
        for name in ("state", "log", "run", "munge"):
            (self.root / name).mkdir()
        self.root.chmod(0o755)
        munge = self.root / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        self.call("munged", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket",
                  f"--pid-file={self.root}/run/munged.pid", f"--log-file={munge}/log",
                  f"--seed-file={munge}/seed")  # fmt: skip
        host = socket.gethostname().split(".")[0]
        self.conf.write_text(
            CONF.format(root=self.root, host=host, ports=_free_ports(3), cred_expire=REQUEUED_AFTER_SECONDS)
        )
        self.call("slurmctld", "-c", "-f", str(self.conf))
        for node in ("n1", "n2"):
            self.start_node(node)
        self.until(lambda: self.call("sinfo", "-h", "-N", "-t", "idle").count("\n") == 2, 30, "the nodes to be idle")

    def start_node(self, node: str) -> None:
        (self.root / f"spool.{node}").mkdir(exist_ok=True)
        self.call("slurmd", "-f", str(self.conf), "-N", node)

    def stop(self) -> None:
        subprocess.run(["scancel", "--full", "-u", "root"], env=self.environment, capture_output=True)
        for name in ("n1", "n2", "slurmctld", "munged"):
            self._kill(self.root / "run" / f"{name}.pid", signal.SIGTERM)
        self._kill_all()  # slurmstepd of what had not ended

    def fail_node(self, node: str) -> None:
        """Simulate a power cut: kill the node's daemon and its processes, and report the node as down."""
        self._kill(self.root / "run" / f"{node}.pid", signal.SIGKILL)
        self._kill_all(f"SLURMD_NODENAME={node}")
        self.call("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def kill(self, number: signal.Signals, *marks: str, program: str = "python") -> int:
        """Signal the jobs' processes that have these marks in their environment. Return their number."""
        found = _processes(str(self.root), *marks)
        found = [p for p in found if program in Path(f"/proc/{p}/exe").resolve().name]
        for process in found:
            os.kill(process, number)
        return len(found)

    def warn(self, *marks: str) -> int:
        """Send the signal of --signal=B:USR2@... to the batch script alone, as Slurm does before the limit."""
        return self.kill(signal.SIGUSR2, *marks, program="bash")

    def mend_node(self, node: str) -> None:
        """Start the node's daemon. ReturnToService makes the node available again."""
        self.start_node(node)
        self.until(lambda: self.call("sinfo", "-h", "-n", node, "-t", "idle,alloc,mix") != "", 60, f"{node} to be back")

    def call(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Return the output of a command. If it fails, the test fails with that output."""
        done = subprocess.run(
            command, env=self.environment | environment, cwd=cwd, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def arrays(self) -> set[str]:
        """The numbers of the arrays that Slurm remembers."""
        return {job.partition("_")[0] for job in self.jobs() if "_" in job}

    def script(self, name: str, *arguments: object, cwd: Path, **environment: str) -> str:
        """Run a script of slurm/ from the login node; the numbers of the last job that it submitted."""
        return self.call("bash", str(SLURM / name), *map(str, arguments), cwd=cwd, **environment).strip()

    def jobs(self) -> dict[str, str]:
        """State of every job that Slurm remembers, by number or ARRAY_ELEMENT."""
        rows = self.call("squeue", "-h", "-r", "-t", "all", "-O", "ArrayJobID:20,ArrayTaskID:20,JobID:20,State:20")
        table = [row.split() for row in rows.splitlines()]
        return {job if task == "N/A" else f"{array}_{task}": state for array, task, job, state in table}

    def wait(self, *jobs: str, seconds: float = 240) -> None:
        """Wait until these jobs (arrays with all their elements) are COMPLETED. Another end fails at once."""
        bad = ("FAILED", "CANCELLED", "TIMEOUT", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")

        def over() -> bool:
            states = [state for job, state in self.jobs().items() if job.partition("_")[0] in jobs]
            assert states, f"Slurm knows no job {', '.join(jobs)}"
            assert not any(state in bad for state in states), f"{self.jobs()}\n{self.logs()}"
            return all(state == "COMPLETED" for state in states)

        self.until(over, seconds, f"jobs {', '.join(jobs)}")

    def until(self, condition: Callable[[], bool], seconds: float, what: str, every: float = 0.2) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{seconds:.0f} s were not enough for {what}\n{self.logs()}"
            time.sleep(every)

    def logs(self) -> str:
        """Ends of the logs of jobs and daemons."""
        files = [*sorted(self.root.glob("work*/**/*.out")), self.root / "log" / "slurmctld.log"]
        return "\n".join(f"--- {file}\n" + "\n".join(file.read_text(errors="replace").splitlines()[-15:])
                         for file in files if file.exists())  # fmt: skip

    def _kill_all(self, *marks: str) -> None:
        for process in _processes(str(self.root), *marks):
            with suppress(ProcessLookupError):  # it ended by itself
                os.kill(process, signal.SIGKILL)

    def _kill(self, pid_file: Path, number: int) -> None:
        if pid_file.exists() and (text := pid_file.read_text().strip()).isdigit():
            with ExitStack() as stack:
                stack.callback(pid_file.unlink, missing_ok=True)
                if Path(f"/proc/{text}").exists():
                    os.kill(int(text), number)


def _processes(*marks: str) -> list[int]:
    """Find the other processes with all marks in their command line or environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            text = (entry / "cmdline").read_bytes() + b"\0" + (entry / "environ").read_bytes()
        except OSError:
            continue
        if all(mark.encode() in text for mark in marks):
            found.append(int(entry.name))
    return found


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _why_not() -> str | None:
    missing = [name for name in ("slurmctld", "slurmd", "munged") if not shutil.which(name, path=PATH)]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "emulated Slurm nodes need root"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := _why_not():
        pytest.skip(reason)
    root = Path(tempfile.mkdtemp(prefix="codecssl-slurm-", dir="/tmp"))  # short: a socket's path has 107 bytes
    made = Cluster(root)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def folder(cluster: Cluster, request: pytest.FixtureRequest) -> Path:
    """A new folder on the disk that all nodes share."""
    path = cluster.root / f"work-{request.node.name[:40]}"
    path.mkdir()
    return path


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample corpus; who needs other files puts them elsewhere."""
    return unpack(tmp_path_factory.mktemp("sample") / "sample")


@pytest.fixture
def unused_port() -> int:
    return _free_ports(1)[0]
