"""Send two signals to stop to this process."""

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
