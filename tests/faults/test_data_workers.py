"""A killed data worker, and a case that vanishes or is truncated, end the run with an error and never hang."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import blosc2
import numpy as np
import pytest

from nnunetv2_macl.data import Case, PretrainingBatches, Sampling, load_batches
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.training.signals import Signals, StoppedWhileWaiting, ignore_in_worker

pytestmark = [pytest.mark.timeout(60, func_only=True), pytest.mark.skipif(sys.platform == "win32", reason="signals")]


@pytest.fixture
def cases(tmp_path):
    made, rng = [], np.random.default_rng(0)
    for number in range(2):
        file = str(tmp_path / f"case{number}.b2nd")
        blosc2.asarray(
            rng.normal(size=(1, 20, 64, 64)).astype(np.float32), urlpath=file, mode="w", chunks=(1, 4, 64, 64)
        )
        made.append(Case(f"case{number}", file))
    return made


def load(cases, first=0, workers=1, steps=100_000):
    batches = PretrainingBatches(cases, Sampling((1, 32, 32), 4, 1, 0), (0, 4), steps)
    return load_batches(batches, first, workers=workers, prepare_worker=ignore_in_worker)


def started_worker(cases, **options):
    """Return a loader that has given its first batch, and the id of its worker process."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    before = children.read_text().split()
    loader = load(cases, **options)
    next(loader)
    new = [int(pid) for pid in children.read_text().split() if pid not in before]
    (worker,) = [pid for pid in new if b"tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return loader, worker


@pytest.mark.parametrize("time_to_live", [0, 0.003, *(pytest.param(t, marks=pytest.mark.slow) for t in (0.001, 0.01))])
def test_a_killed_worker_is_recognised(cases, time_to_live):
    """The worker is killed at different stages of its work."""
    script = Path(__file__).with_name("kill_worker.py")
    command = [sys.executable, str(script), cases[0].file, str(time_to_live)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    result, seconds = (done.stdout.split() or ["", "inf"])[:2]
    assert result == "recognised" and float(seconds) < 30, done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_to_all_processes_does_not_end_the_worker(cases, number):
    """The training process needs the worker to finish its step."""
    loader, worker = started_worker(cases, steps=12)
    os.kill(worker, getattr(signal, number))
    assert len(list(loader)) == 11


@pytest.mark.parametrize("worker_processes", [0, 1])
@pytest.mark.parametrize("kind", ["vanishes", "cut short", "replaced", "unreadable"])
def test_a_case_that_changes_is_named(cases, kind, worker_processes):
    loader = load(cases, workers=worker_processes)
    for _ in range(3):  # open both cases
        next(loader)
    # wait until the worker has read ahead, because truncating a file during a read would kill the worker
    time.sleep(0.5)
    file = cases[1].file
    if kind == "vanishes":
        os.unlink(file)
    elif kind == "cut short":  # the file is mapped into memory, so reading it would kill the process
        os.truncate(file, os.path.getsize(file) // 2)
    elif kind == "replaced":
        os.unlink(file)
        with open(file, "wb") as stream:
            stream.write(b"another file")
    else:
        size = os.path.getsize(file)
        os.unlink(file)
        os.mkdir(file)
        assert os.path.getsize(file) != size
    with pytest.raises(UserError, match=r"case1\.b2nd cannot be read.*--c") as caught:
        while True:
            next(loader)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("kind", ["absent", "cut short", "empty"])
def test_a_case_that_is_damaged_from_the_start_is_named(cases, kind):
    file = cases[0].file
    size = {"absent": None, "cut short": os.path.getsize(file) - 100, "empty": 0}[kind]
    os.unlink(file) if size is None else os.truncate(file, size)
    with pytest.raises(UserError, match=r"case0\.b2nd cannot be read"):
        list(load(cases, workers=0, steps=5))


SMALL_SHARED_MEMORY = """
import sys
from nnunetv2_macl.data import Case, PretrainingBatches, Sampling, load_batches
from nnunetv2_macl.errors import UserError

batches = PretrainingBatches([Case("case", sys.argv[1])], Sampling((1, 512, 512), 4, 1, 0), (0, 4), 9)
try:
    print(len(list(load_batches(batches, 0, workers=2))))
except UserError as error:
    print(error)
"""


def test_too_little_shared_memory_is_an_error_at_once(cases):
    """One batch of 4 MiB fits into the memory, but the batches that are read ahead do not."""
    mount = "mount -t tmpfs -o size=5m tmpfs /dev/shm"
    own_mounts = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    if sys.platform != "linux" or subprocess.run([*own_mounts, "true"], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root on Linux")
    command = [*own_mounts, sys.executable, "-c", SMALL_SHARED_MEMORY, cases[0].file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert "/dev/shm" in done.stdout and "nnUNet_n_proc_DA=0" in done.stdout, done.stdout + done.stderr


def test_a_signal_ends_the_wait_for_a_batch(own_signals):
    signals = Signals()
    signals.install()
    with pytest.raises(StoppedWhileWaiting), signals.waiting():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    # a signal between two waits takes effect before the next one
    with pytest.raises(StoppedWhileWaiting), signals.waiting():
        pass
    signals.restore()
