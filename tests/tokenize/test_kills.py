"""A run is killed, or its disk is full, at any moment: run again, it ends with the bytes of an uninterrupted run.

The runs are real processes and the kills real SIGKILLs. Run as a script, this file is a parent that has imported
everything and forks a child per run, so that a start costs milliseconds.
"""

import ctypes
import errno
import glob
import hashlib
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers import HASHCODEC

from codecssl.tokenize.shards import Shards

RUN = ["--workers", "0", "--shard-inputs", "7", "--block-inputs", "2"]
FULL = "disk full; make room and run the same command again"
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_REMOUNT, MS_REC, MS_PRIVATE = 32, 1 << 14, 1 << 18


# ---------------------------------------------------------------- the parent of the runs


def serve():
    """Fork a child for the command in a line of stdin. Kill it or wait, by the next line. Print its status."""
    import hashcodec  # noqa: F401  # in this folder
    import torch

    from codecssl.tokenize.integrity import verify  # noqa: F401

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            try:
                child(**json.loads(line))
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(99)
        if sys.stdin.readline() == "kill\n":
            os.kill(pid, signal.SIGKILL)
        print(os.waitpid(pid, 0)[1], flush=True)


def child(argv, log, fail_at=None, how=None, tmpfs=None, tasks=1):
    """`codecssl-tokenize` ARGV, its output in LOG."""
    from codecssl.tokenize.backends import table
    from codecssl.tokenize.cli import main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    table.BACKENDS["hash_16khz"] = HASHCODEC
    if tmpfs:
        os._exit(fill_up(tmpfs, argv, main))
    if tasks > 1:
        os._exit(together(argv, tasks, main))
    operations = Operations(Path(argv[argv.index("-o") + 1]), fail_at, how)
    code = main(argv)
    Path(log).with_suffix(".count").write_text(str(operations.count))
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


class Operations:
    """Count the operations of a run on its folder: files opened for writing, fsynced, renamed, removed, folders made.

    At operation `fail_at` the process is killed, or the disk is full. If that is an fsync, half of the file is lost
    first.
    """

    def __init__(self, folder, fail_at, how):
        self.folder, self.fail_at, self.how, self.count = str(folder), fail_at, how, 0
        self.fsync, os.fsync = os.fsync, self.on_fsync
        sys.addaudithook(self.on_event)

    def on_event(self, event, arguments):
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            path, writes = arguments[0], True
        else:
            return
        if writes and isinstance(path, str | os.PathLike) and (os.fspath(path) + "/").startswith(self.folder):
            self.step(None)
        elif writes and arguments and isinstance(path, str) and "/" not in path:
            self.step(None)  # rmtree names files relative to a folder's descriptor

    def on_fsync(self, descriptor):
        self.step(descriptor)
        if self.how == "outside":  # a killed process needs no real fsync: its writes survive in the page cache
            self.fsync(descriptor)

    def step(self, descriptor):
        if self.count == self.fail_at:
            if descriptor is not None and stat.S_ISREG((status := os.fstat(descriptor)).st_mode):
                os.ftruncate(descriptor, status.st_size // 2)
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.count += 1


def together(argv, tasks, main):
    """All tasks of a run at once; the largest exit code."""
    pids = []
    for task in range(tasks):
        if (pid := os.fork()) == 0:
            os._exit(main([*argv, "--tasks", str(tasks), "--task", str(task)]))
        pids.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)


def fill_up(tmpfs, argv, main):
    """Run in a file system of one page, then of two, and so on until it completes; print each run's exit code."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNS | (CLONE_NEWUSER if user else 0)):
        return 77
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    private = libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    if private or libc.mount(b"tmpfs", tmpfs.encode(), b"tmpfs", 0, b"size=4k"):
        return 77
    for pages in range(1, 1000):
        libc.mount(b"tmpfs", tmpfs.encode(), b"tmpfs", MS_REMOUNT, f"size={4 * pages}k".encode())
        code = main(argv)
        print("exit", code, flush=True)
        if code != 1:
            break
    print(json.dumps(contents(Path(argv[argv.index("-o") + 1]))), flush=True)
    return code


# ---------------------------------------------------------------- the tests' side


class Parent:
    """The process that forks runs."""

    def __init__(self, folder):
        self.folder = folder
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen([sys.executable, __file__], env=environment, cwd=folder, **pipes)
        assert self.process.stdout.readline() == "ready\n"

    def start(self, argv, **how):
        """Start a run in the background."""
        line = {"argv": [str(a) for a in argv], "log": str(self.folder / "log.txt")} | how
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()

    def end(self, how):
        """Kill the run or wait for it; its exit code, -9 when it was killed."""
        self.process.stdin.write(how + "\n")
        self.process.stdin.flush()
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))

    def run(self, argv, **how):
        self.start(argv, **how)
        return self.end("wait")

    @property
    def log(self):
        return (self.folder / "log.txt").read_text()


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    parent = Parent(tmp_path_factory.mktemp("parent"))
    yield parent
    parent.process.stdin.close()
    parent.process.wait(30)


def contents(root):
    """name -> sha256 of every file, hidden ones too, and every folder."""
    return {
        str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() if f.is_file() else "folder"
        for f in sorted(root.rglob("*"))
    }


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """13 short files, one of which cannot be read: two shards of four blocks."""
    folder = tmp_path_factory.mktemp("audio")
    rng = np.random.default_rng(0)
    for i in range(12):
        wave = rng.standard_normal(16_000 + 4000 * i).astype("f4") * 0.1
        soundfile.write(folder / f"{i:02d}.wav", wave, 16_000)
    (folder / "05.wav").write_text("no sound\n")
    soundfile.write(folder / "last.wav", rng.standard_normal(3000) * 0.1, 16_000)
    return folder


def arguments(audio, output, codec):
    return ["run", audio, "-o", output, "--codec", codec, *RUN]


@pytest.fixture(scope="module")
def hashed(parent, audio, tmp_path_factory):
    """The bytes of an uninterrupted run of the hash codec, and how many operations it took."""
    output = tmp_path_factory.mktemp("hashed") / "out"
    assert parent.run(arguments(audio, output, "hash_16khz")) == 0, parent.log
    return contents(output), int((parent.folder / "log.count").read_text())


@pytest.fixture(scope="module")
def more_audio(tmp_path_factory):
    """130 files of up to 0.2 s: nineteen shards."""
    folder = tmp_path_factory.mktemp("more")
    rng = np.random.default_rng(1)
    for i in range(130):
        soundfile.write(folder / f"{i:03d}.wav", rng.standard_normal(rng.integers(100, 3200)) * 0.1, 16_000)
    return folder


def test_twenty_sigkills_at_random_moments(parent, more_audio, tmp_path):
    """Each kill falls a random time after a random amount of progress, so that a slow machine does not always meet the
    start."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    assert parent.run(arguments(more_audio, whole, "tiny_16khz"), how="outside") == 0, parent.log
    block = (time.monotonic() - began) / len(list((whole / "shards").glob("*.json"))) / 4
    expected, rng, kills, seen = contents(whole), random.Random(0), 0, set()
    for life in range(100):
        parent.start(arguments(more_audio, killed, "tiny_16khz"), how="outside")
        wait_for(progress(killed) + rng.randrange(6), killed, whole)
        time.sleep(rng.uniform(0, block))
        if (code := parent.end("kill")) == 0:  # it was faster
            assert contents(killed) == expected
            killed = tmp_path / f"killed{life}"
            continue
        assert code == -signal.SIGKILL, parent.log
        seen.add(written(killed))
        if (kills := kills + 1) == 20:
            break
    assert kills == 20
    assert len(seen) >= 3, f"the kills fell into {seen} only"
    assert parent.run(arguments(more_audio, killed, "tiny_16khz")) == 0, parent.log
    assert contents(killed) == expected


def progress(root):
    """Blocks written; a whole shard counts as four. glob.glob, unlike Path.glob, takes folders that vanish."""
    found = [len(glob.glob(f"{root}/{pattern}")) for pattern in ("shards/*.json", "work/*/*.json")]  # noqa: PTH207
    return 4 * found[0] + found[1]


def wait_for(target, killed, whole):
    """Return as soon as the run into `killed` has written `target` blocks, or is complete."""
    deadline = time.monotonic() + 60
    while progress(killed) < min(target, progress(whole)) and time.monotonic() < deadline:
        time.sleep(0.001)


def written(root):
    """Approximate place of a kill."""
    if not (root / "plan.json").exists():
        return "start"
    records, parts = (len(list(root.glob(pattern))) for pattern in ("shards/*.json", "work/*/*.json"))
    return f"{records} shards and {parts} blocks written"


@pytest.mark.parametrize("how", ["kill", "disk full"])
def test_stopped_at_every_operation_on_its_folder(parent, audio, tmp_path, hashed, how):
    """One run per operation that an uninterrupted run makes: each ends there, and each is completed by the next."""
    expected, operations = hashed
    assert operations > 60
    wrong = []
    for at in range(operations):
        output = tmp_path / str(at)
        argv = arguments(audio, output, "hash_16khz")
        code = parent.run(argv, fail_at=at, how=how)
        if how == "kill":
            assert code == -signal.SIGKILL, parent.log
        else:
            lines = parent.log.strip().splitlines()
            clean = code == 1 and len(lines) == 1 and FULL in lines[0]
            if not clean and not (code == 0 and Shards(output)):  # it only failed to tidy up
                wrong.append((at, code, lines[-1]))
        if parent.run(argv) != 0:
            wrong.append((at, parent.log))
        elif (found := contents(output)) != expected:
            wrong.append((at, sorted({k for k in found | expected if found.get(k) != expected.get(k)})))
    assert not wrong, "\n".join(map(str, wrong))


def test_a_real_file_system_that_is_full_at_every_page(parent, audio, tmp_path, hashed):
    (mount := tmp_path / "mount").mkdir()
    code = parent.run(arguments(audio, mount / "out", "hash_16khz"), tmpfs=str(mount))
    if code == 77:
        pytest.skip("file systems cannot be mounted here")
    *lines, found = parent.log.strip().splitlines()
    assert code == 0, parent.log
    assert lines.count("exit 1") > 10
    errors = [line for line in lines if not line.startswith(("exit", str(mount), "1 inputs could"))]
    assert len(errors) == lines.count("exit 1")
    assert all(FULL in line for line in errors)
    assert json.loads(found) == hashed[0]


def test_tasks_that_begin_and_end_at_the_same_moment(parent, audio, tmp_path, hashed):
    """Two tasks have shards to encode, two have none. The last task to finish writes dataset.json."""
    for attempt in range(20):
        output = tmp_path / str(attempt)
        assert parent.run(arguments(audio, output, "hash_16khz"), tasks=4) == 0, parent.log
        assert contents(output) == hashed[0]


@pytest.mark.parametrize("how", ["renamed", "exchanged", "another codec"])
def test_changes_since_a_kill_are_refused(parent, audio, tmp_path, hashed, how):
    """The run is killed with half of the first shard done. Times of files do not matter, their names and order do."""
    folder, output = tmp_path / "audio", tmp_path / "out"
    shutil.copytree(audio, folder)
    argv = arguments(folder, output, "hash_16khz")
    assert parent.run(argv, fail_at=30, how="kill") == -signal.SIGKILL
    assert list(output.glob("work/00000/00001.json"))
    assert not list(output.glob("shards/*.json"))
    (output / ".0-of-1.lock").unlink()  # the lock of an ended process
    before = contents(output)
    if how == "renamed":
        (folder / "01.wav").rename(folder / "zz.wav")
    elif how == "exchanged":
        (folder / "last.wav").rename(folder / "00b.wav")
    else:
        argv[argv.index("hash_16khz")] = "tiny_16khz"
    assert parent.run(argv) == 1
    [line] = parent.log.strip().splitlines()
    assert re.search("the sources changed since shard 00000 was begun|begun with codec hash_16khz, this run has", line)
    assert contents(output) == before
    shutil.rmtree(folder)
    shutil.copytree(audio, folder, copy_function=shutil.copyfile)
    assert parent.run(arguments(folder, output, "hash_16khz")) == 0
    expected = {name: what for name, what in hashed[0].items() if name not in ("plan.json", "dataset.json")}
    assert expected.items() <= contents(output).items()


def test_a_block_damaged_between_two_runs_does_not_become_part_of_a_shard(parent, audio, tmp_path, hashed):
    argv = arguments(audio, tmp_path / "out", "hash_16khz")
    assert parent.run(argv, fail_at=30, how="kill") == -signal.SIGKILL
    block = tmp_path / "out/work/00000/00001.block"
    content = bytearray(block.read_bytes())
    content[600] ^= 1
    block.write_bytes(content)
    assert parent.run(argv) == 1
    [line] = parent.log.strip().splitlines()
    assert line.endswith(f"00001.block: damaged since it was written; remove {block.parent} and run again")
    shutil.rmtree(block.parent)
    assert parent.run(argv) == 0
    assert contents(tmp_path / "out") == hashed[0]


if __name__ == "__main__":
    serve()
