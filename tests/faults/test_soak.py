"""Memory and the number of open files stay constant over 2,000 steps."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from steps import PATCH, training_step

from faults.test_data_workers import load
from nnunetv2_macl.training.epoch_log import EpochSums

PAGE = os.sysconf("SC_PAGE_SIZE") if sys.platform == "linux" else 0


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_and_open_files_stay_constant(tmp_path, workers):
    import blosc2

    from nnunetv2_macl.data import Case

    cases, rng = [], np.random.default_rng(0)
    for number in range(100):  # more cases than are kept open
        file = str(tmp_path / f"{number}.b2nd")
        blosc2.asarray(rng.normal(size=(1, 4, 48, 48)).astype(np.float32), urlpath=file, mode="w")
        cases.append(Case(str(number), file))
    step = training_step(4, 2, dtype=torch.float32)
    steps, sums, memory, files = 2000, EpochSums(), [], []
    for number, batch in enumerate(load(cases, workers=workers, steps=steps)):
        batch["data"] = batch["data"][..., :PATCH, :PATCH]
        sums.add(step(batch, number), skipped=step.skipped_in_a_row > 0)
        memory.append(resident())
        files.append(len(os.listdir("/proc/self/fd")))
    half = steps // 2  # caches are filled by now
    slope = np.polyfit(np.arange(half), memory[half:], 1)[0]
    print(f"\nworkers {workers}: {slope:.0f} bytes a step, {memory[-1] / 2**20:.0f} MiB, {files[-1]} open files")
    assert abs(slope) < 4096 and max(files[half:]) - min(files[half:]) <= 4
