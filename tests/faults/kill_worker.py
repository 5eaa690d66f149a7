"""Kill the data worker of this process after some time, and print whether the error is recognised: CASE_FILE SECONDS.

This is a separate process, because torch raises the error in a signal handler.
"""

import os
import signal
import sys
import threading
import time

import psutil

from nnunetv2_macl.data import Case, PretrainingBatches, Sampling, load_batches, worker_was_killed
from nnunetv2_macl.training.signals import ignore_in_worker

if __name__ == "__main__":
    file, seconds = sys.argv[1], float(sys.argv[2])
    batches = PretrainingBatches([Case("case", file)], Sampling((1, 32, 32), 4, 1, 0), (0, 4), 100_000)
    loader = load_batches(batches, 0, workers=1, prepare_worker=ignore_in_worker)
    next(loader)
    (worker,) = [child for child in psutil.Process().children() if "tracker" not in "".join(child.cmdline())]
    began = time.monotonic()
    try:
        threading.Timer(seconds, os.kill, (worker.pid, signal.SIGKILL)).start()
        for _ in loader:
            pass
    except RuntimeError as error:
        print("recognised" if worker_was_killed(error) else repr(error), time.monotonic() - began, flush=True)
