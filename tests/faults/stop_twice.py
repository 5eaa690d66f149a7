"""A process that is told to stop, and told again."""

import os
import signal

from nnunetv2_macl.training.signals import Signals

signals = Signals()
signals.install()
os.kill(os.getpid(), signal.SIGTERM)
assert signals.pending_requests() == (True, False)
print("first", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("second", flush=True)
