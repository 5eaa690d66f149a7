"""Only one run writes into a folder: a second run is refused, and one run takes over the lock of a dead process."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.training.run_folder import RunLock

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no fork")
fork = multiprocessing.get_context("fork") if sys.platform != "win32" else None


def hold(folder, ready):
    RunLock(folder).acquire()
    ready.set()
    time.sleep(600)


@pytest.fixture
def other(tmp_path):
    """Return another process that holds the lock of the folder."""
    ready = fork.Event()
    process = fork.Process(target=hold, args=(tmp_path, ready), daemon=True)
    process.start()
    assert ready.wait(30)
    yield process
    process.kill()
    process.join()


def test_a_second_run_is_refused_and_takes_over_the_lock_of_a_dead_process(tmp_path, other):
    with pytest.raises(UserError) as error:
        RunLock(tmp_path).acquire()
    started = json.loads((tmp_path / ".macl_running.json").read_text())["started"]
    for word in (f"process {other.pid}", socket.gethostname(), started, "rm "):
        assert word in str(error.value)
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    lock = RunLock(tmp_path)
    lock.acquire()
    assert json.loads(lock.file.read_text())["pid"] == os.getpid()
    lock.release()
    assert os.listdir(tmp_path) == []


def test_a_process_that_reuses_the_id_of_a_dead_one_does_not_hold_its_lock(tmp_path):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        lock = RunLock(tmp_path)
        owner = {"host": socket.gethostname(), "pid": sleeper.pid, "started": "then"}
        lock.file.write_text(json.dumps(owner | {"process_start": psutil.Process(sleeper.pid).create_time()}))
        with pytest.raises(UserError, match=f"process {sleeper.pid}"):
            lock.acquire()
        lock.file.write_text(json.dumps(owner | {"process_start": 1.0}))
        lock.acquire()
    finally:
        sleeper.kill()
        sleeper.wait()


def test_the_lock_of_another_machine_is_kept(tmp_path):
    lock = RunLock(tmp_path)
    lock.file.write_text(json.dumps({"host": "elsewhere", "pid": 2**22, "process_start": 1.0, "started": "then"}))
    with pytest.raises(UserError, match=r"elsewhere.* then"):
        lock.acquire()


def test_the_lock_of_another_container_is_kept(tmp_path):
    """The host is the same, but the process id belongs to another process here, or to none."""
    lock = RunLock(tmp_path)
    lock.acquire()
    content = json.loads(lock.file.read_text())
    for pid in (2**22, os.getpid()):
        lock.file.write_text(json.dumps(content | {"processes": "pid:[1]", "pid": pid}))
        with pytest.raises(UserError, match=f"process {pid} on {socket.gethostname()}"):
            RunLock(tmp_path).acquire()
        assert RunLock(tmp_path).holder() is not None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}', "null"])
def test_a_damaged_lock_is_replaced(tmp_path, content):
    lock = RunLock(tmp_path)
    lock.file.write_text(content)
    lock.acquire()


def try_to_take(folder, start, taken, done):
    start.wait()
    try:
        RunLock(folder).acquire()
        taken.release()
    except UserError:
        pass
    done.wait()


def test_only_one_of_many_processes_takes_over_a_lock(tmp_path):
    for _ in range(5):
        (tmp_path / ".macl_running.json").write_text(
            json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1, "process_start": 1.0, "started": "then"})
        )
        start, done, taken = fork.Event(), fork.Event(), fork.Semaphore(0)
        processes = [
            fork.Process(target=try_to_take, args=(tmp_path, start, taken, done), daemon=True) for _ in range(8)
        ]
        for process in processes:
            process.start()
        start.set()
        assert taken.acquire(timeout=30)
        assert not taken.acquire(timeout=0.1)
        done.set()
        for process in processes:
            process.join()
