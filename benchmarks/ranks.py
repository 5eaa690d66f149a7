"""Compare the speed of two ranks on two cores with that of one rank with one thread, with the same batch and gloo."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.measure import Row, at_least, timed
from benchmarks.planned import FLAT, Fingerprint, planned
from benchmarks.step import batch, training_step
from nnunetv2_macl import distributed

FINGERPRINT = Fingerprint("2D", ("MR",), (1, 124, 124), (FLAT, 1.0, 1.0))
PATCHES, STEPS = 16, 4


def run(device: torch.device) -> list[Row]:
    if device.type != "cpu":
        return []
    seconds = {world: min(_measure(world) for _ in range(2)) for world in (2, 1)}
    what = f"patches per second of 2 ranks over 1, gloo, 2D 128x128, N={PATCHES}"
    return [at_least("ranks", what, PATCHES * STEPS / seconds[2], PATCHES * STEPS / seconds[1], "patches/s", 1.7)]


def _measure(world: int) -> float:
    with socket.socket() as sock, tempfile.TemporaryDirectory() as folder:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        sock.close()
        mp.spawn(_rank, (world, port, folder), nprocs=world)
        return max(float((Path(folder) / str(rank)).read_text()) for rank in range(world))


def _rank(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    (Path(folder) / f"plan{rank}").mkdir()
    with planned(FINGERPRINT, "2d", Path(folder) / f"plan{rank}") as configuration:
        step = training_step(configuration, torch.device("cpu"), batch_size=PATCHES)
    if world > 1:
        distributed.synchronise_batch_norm(step.model)
    mine = {key: value[step.first : step.last] for key, value in batch(step).items()}
    step(mine, 0)
    dist.barrier()
    (Path(folder) / str(rank)).write_text(str(timed(lambda: [step(mine, i) for i in range(STEPS)])))
    dist.destroy_process_group()
