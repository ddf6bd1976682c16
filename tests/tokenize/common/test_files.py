"""Files that are there whole or not at all."""

import errno
import fcntl
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest

from codecssl.tokenize.common import files
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.files import alone_in, atomic_file, names_in, temporaries, write_atomic


def test_a_file_appears_when_it_is_complete(tmp_path):
    with atomic_file(tmp_path / "x") as file:
        file.write(b"half")
        assert names_in(tmp_path) == set()
        assert len(temporaries(tmp_path)) == 1
    assert (tmp_path / "x").read_bytes() == b"half"
    assert temporaries(tmp_path) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_atomic(tmp_path / "x", b"old")
    with pytest.raises(TypeError), atomic_file(tmp_path / "x") as file:
        file.writelines([b"new", None])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"old"}


def test_two_writers_at_a_time_do_not_meet(tmp_path):
    """Process ids are not sufficient: they may be equal in two containers, as here."""
    with atomic_file(tmp_path / "x") as first:
        first.write(b"whole")
        first.flush()
        write_atomic(tmp_path / "x", b"2")
        assert (tmp_path / "x").read_bytes() == b"2"
        first.write(b" file")
    assert (tmp_path / "x").read_bytes() == b"whole file"
    assert names_in(tmp_path) == {"x"}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", {"here": 0.3, "elsewhere": 0.3})


HOLDER = """
import sys, time
from pathlib import Path
from codecssl.tokenize.common.files import alone_in
with alone_in(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(600)
"""


def test_one_process_at_a_time_works_in_a_folder(tmp_path, impatient):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "new")], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"in\n"
        reported = f"new: process {holder.pid} on {socket.gethostname()} is at work there; wait for it, or give another"
        with pytest.raises(UserError, match=reported), alone_in(tmp_path / "new"):
            pass
        holder.send_signal(signal.SIGKILL)
    with alone_in(tmp_path / "new"):
        assert (tmp_path / "new" / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert list((tmp_path / "new").iterdir()) == []


def test_a_lock_that_outlives_its_process_for_a_while_is_waited_for(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"in\n"
        subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {holder.pid}"])
        with alone_in(tmp_path):
            assert holder.poll() is not None or holder.wait() != 0


def test_a_disk_on_which_not_even_the_holder_can_be_named(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with alone_in(tmp_path):
            empty = (tmp_path / ".lock").read_bytes()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert empty == b""


def _come_and_go(folder, times):
    for _ in range(times):
        with alone_in(folder, wait=True):
            (folder / "x").mkdir()
            (folder / "x").rmdir()


def test_many_that_wait_for_one_another(tmp_path, monkeypatch):
    """Each removes the lock's file in the end, while others look at it."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_come_and_go, args=(tmp_path, 300)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_a_file_system_without_locks_is_worked_on_all_the_same(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with alone_in(tmp_path), alone_in(tmp_path):
        (tmp_path / "x").touch()
    assert names_in(tmp_path) == {"x"}
    with pytest.raises(UserError, match="without locks .*; work there with one task"), alone_in(tmp_path, wait=True):
        pass


def test_only_links_out_of_a_folder_are_refused(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside.txt"
    (run / "a" / "b").mkdir(parents=True)
    outside.write_text("mine")
    (run / "inside").symlink_to("a/b")
    (tmp_path / "link").symlink_to(run)
    files.refuse_links_out(run)
    files.refuse_links_out(tmp_path / "link")
    files.refuse_links_out(tmp_path / "new")
    for name, target in (("a/b/file", outside), ("dangling", tmp_path / "nowhere"), ("folder", tmp_path)):
        (run / name).symlink_to(target)
        with pytest.raises(UserError, match=rf"{run / name}: a link to {target}, outside of {run}"):
            files.refuse_links_out(run)
        (run / name).unlink()
    with pytest.raises(UserError, match="outside of"):
        files.refuse_links_out(run / ".." / "elsewhere", run)
