"""Measure how the time of a step depends on the batch size, and the time of the loader on the number of cases."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import blosc2
import numpy as np
import torch

from benchmarks.measure import Row, at_most, timed
from benchmarks.planned import FLAT, Fingerprint, planned
from benchmarks.step import batch, training_step
from nnunetv2_macl.data import Case, PretrainingBatches, Sampling

FINGERPRINT = Fingerprint("2D", ("MR",), (1, 62, 62), (FLAT, 1.0, 1.0))
BATCHES = (8, 16, 32, 64)
CASES = (10, 100, 1_000, 10_000)


def run(device: torch.device) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        with planned(FINGERPRINT, "2d", Path(folder)) as configuration:
            steps = {n: training_step(configuration, device, batch_size=n) for n in BATCHES}
        seconds = {n: [timed(lambda s=s: s(batch(s), 0)) for _ in range(4)] for n, s in steps.items()}
        a_patch = {n: statistics.median(times[1:]) / n for n, times in seconds.items()}
        for n in BATCHES[1:]:
            what = f"seconds per patch at N={n} over N={BATCHES[0]}"
            rows.append(at_most("growth with N", what, a_patch[n], a_patch[BATCHES[0]], "s", 1.2))

        files = []
        for number in range(CASES[0]):
            files.append(str(Path(folder) / f"{number}.b2nd"))
            volume = np.random.default_rng(number).normal(size=(1, 16, 128, 128)).astype(np.float32)
            blosc2.asarray(volume, urlpath=files[-1], chunks=(1, 4, 64, 64), blocks=(1, 1, 64, 64))
        a_batch = {}
        for count in CASES:
            cases = [Case(str(i), files[i % len(files)]) for i in range(count)]
            loader = PretrainingBatches(cases, Sampling((1, 64, 64), 16, 4, 1), (0, 16), 60)
            a_batch[count] = statistics.median([timed(lambda b=loader, i=i: b[i]) for i in range(60)][10:])
        for count in CASES[1:]:
            what = f"seconds per batch from {count:,} cases over {CASES[0]}"
            rows.append(at_most("growth with cases", what, a_batch[count], a_batch[CASES[0]], "s", 1.2))
    return rows
