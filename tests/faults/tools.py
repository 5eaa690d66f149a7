"""Functions that several test modules share."""

import contextlib
import json
import os
import signal
from pathlib import Path

import torch.distributed as dist


@contextlib.contextmanager
def after_step(monkeypatch, number, do):
    """Within the context, call a function right after a step of the training."""
    from nnunetv2_macl.training.step import TrainingStep

    original = TrainingStep.__call__

    def call(self, batch, step):
        measured = original(self, batch, step)
        if step == number:
            do()
        return measured

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", call)
        yield


def ask_rank(rank, ranks, folder):
    """Run a rank that gets a signal at some point, and write the requests that all ranks agree on."""
    from nnunetv2_macl.training.signals import Signals

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    signals = Signals()
    signals.install()
    requests = [signals.pending_requests()]
    if rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    requests += [signals.pending_requests(), signals.pending_requests()]
    if rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    requests.append(signals.pending_requests())
    Path(folder, f"{rank}.json").write_text(json.dumps(requests))
    dist.destroy_process_group()
