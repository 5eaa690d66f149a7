"""Run nnU-Net's training in this process, in one process per GPU, or in the processes that torchrun started."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from nnunetv2.run.run_training import find_free_network_port, run_training
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch._inductor import config as inductor

from nnunetv2_macl import distributed
from nnunetv2_macl.cpu import usable_cores
from nnunetv2_macl.main_guard import require_main_guard
from nnunetv2_macl.training.signals import ignore_save_requests


def train(*, device: str, num_gpus: int, **arguments: Any) -> None:
    """Run nnU-Net's ``run_training``.

    Args:
        device: ``cuda``, ``cpu`` or ``mps``.
        num_gpus: Number of processes to start; 1 under torchrun, which has started the processes.
        **arguments: Further arguments of ``run_training``.

    Raises:
        SystemExit: A process failed and has printed the reason. The others are stopped.
    """
    prepare_process(device)
    # data workers import the script again too, unless they are forked as on Linux
    if num_gpus > 1 or (multiprocessing.get_all_start_methods()[0] != "fork" and get_allowed_n_proc_DA() > 0):
        require_main_guard()
    if num_gpus == 1:
        run_training(device=torch.device(device), **arguments)
        return
    ranks = mp.spawn(_run_rank, (num_gpus, find_free_network_port(), device, arguments), nprocs=num_gpus, join=False)
    try:
        with _signals_passed_on(ranks.processes) as stopped_by:
            while not ranks.join():
                pass
    except mp.ProcessExitedException as error:
        if error.exit_code < 0 and not stopped_by:
            print(
                f"\nError: {error.signal_name} has ended a training process, most likely because memory ran out. To continue, "
                "type the same command with --c.",
                file=sys.stderr,
            )
            raise SystemExit(128 - error.exit_code) from None
        if not stopped_by:
            raise SystemExit(error.exit_code or 1) from None
    if stopped_by:
        raise SystemExit(128 + stopped_by[0])


@contextmanager
def _signals_passed_on(processes: Sequence[BaseProcess]) -> Iterator[list[int]]:
    """Within the context, forward signals to the ranks, which write a checkpoint, and list those that asked to stop."""
    stopped_by: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            stopped_by.append(number)
        for process in processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    names = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        names = []  # Python allows handlers in the main thread only.
    before = {getattr(signal, name): signal.signal(getattr(signal, name), pass_on) for name in names}
    try:
        yield stopped_by
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def join_ranks(device: str) -> None:
    """Join the processes that torchrun started, until this process ends. Does nothing without torchrun."""
    if distributed.started_by_torchrun() and not dist.is_initialized():
        prepare_process(device)
        _join(device)
        # leave only at the end, because torch does not join the same processes twice
        atexit.register(_leave)


def _join(device: str) -> None:
    if device == "cuda":
        torch.cuda.set_device(distributed.local_rank())
    dist.init_process_group("nccl" if device == "cuda" else "gloo")


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _run_rank(rank: int, ranks: int, port: int, device: str, arguments: dict[str, Any]) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
    }  # fmt: skip
    ignore_save_requests()
    prepare_process(device)
    _join(device)
    run_training(device=torch.device(device), **arguments)
    _leave()


def prepare_process(device: str) -> None:
    """Set the number of threads, on a GPU as nnU-Net's training command does, and the GPU allocator. Ranks share the cores."""
    if device == "cuda":
        torch.set_num_threads(1)
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if ranks_here > 1 and "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
            # set in torch, because torch has read the variable when it was imported
            inductor.compile_threads = max(1, usable_cores() // ranks_here)
        if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
            # Without this the allocator held 1.2 to 1.7 times the memory of a step. torch reads the variable when it first
            # allocates.
            os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    elif device == "cpu":
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        # torch has read this variable, with which a user or a study shares the cores among several runs.
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, usable_cores() // ranks_here))
