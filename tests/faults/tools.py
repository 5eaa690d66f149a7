"""What several of the tests here need."""

import contextlib
import json
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist


@contextlib.contextmanager
def after_step(monkeypatch, number, do):
    """Do something right after a step was computed, in the process that trains."""
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


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def ask_rank(rank, ranks, folder):
    """A rank that is signalled at its own times, and what all ranks then agree about."""
    from nnunetv2_macl.training.signals import Signals

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    signals = Signals()
    signals.install()
    said = [signals.pending_requests()]
    if rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    said += [signals.pending_requests(), signals.pending_requests()]
    if rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    said.append(signals.pending_requests())
    Path(folder, f"{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()
