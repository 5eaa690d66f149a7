"""The comparisons that take a CPU days, on one GPU: ``python -m benchmarks.gpu_study RAW_DATASET FOLDER [--seconds 480]``.

Runs `nnUNetv2_macl_compare` on a data set of nnU-Net's raw format, in several processes on one GPU, and stops it when time is up.
Typed again it goes on. ``FOLDER/reports`` holds each study's table, values and curves, a few kilobytes to carry home.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nnunetv2_macl.nnunet import FOLDER_VARIABLES

_SAME = ["-c", "2d", "--group_regex", "^patient[0-9]+", "--labels", "8", "--test", "40", "--validation", "12", "--seeds", "3",
         "--disable_tta", "--finetuning", "sgd", "--rates", "1e-2"]  # fmt: skip
_ARMS = ["--arms", "scratch", "recipe:restore", "recipe:macl"]


class Study(NamedTuple):
    """A comparison: its name, its arguments, and how many processes share the GPU."""

    name: str
    arguments: Sequence[str]
    processes: int


# What matters most first. Both have nnU-Net's own width and optimiser.
STUDIES = (
    Study(
        "4000_steps_each",
        [*_ARMS, "--pretrain_epochs", "16", "--pretrain_iterations", "250", "--epochs", "16", "--iterations", "250"],
        9,
    ),
    Study(
        "55000_and_20000_steps",
        [*_ARMS, "--pretrain_epochs", "220", "--pretrain_iterations", "250", "--epochs", "80", "--iterations", "250"],
        9,
    ),
)
_REPORTS = ("compare.md", "compare.csv", "compare.png", "study.json")


def run(study: Study, dataset: str, folder: Path, until: float) -> bool:
    """Start or continue a study; returns whether it is finished.

    Args:
        study: What to compare.
        dataset: Name of the data set in ``nnUNet_raw``.
        folder: Of all studies.
        until: When to stop, as `time.monotonic` counts.
    """
    ours = folder / study.name
    command = ["nnUNetv2_macl_compare", dataset, *_SAME, *study.arguments, "-o", str(ours), "-np", "2"]
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"nnUNet_compile": "f", "OMP_NUM_THREADS": "1"}
    environment.setdefault("nnUNet_n_proc_DA", "2")
    processes = []
    for number in range(study.processes):
        with (folder / "logs" / f"{study.name}_{number}.log").open("ab") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True))
        # the first one plans and preprocesses
        time.sleep(15 if number == 0 and not ours.exists() else 1)
    while any(p.poll() is None for p in processes) and time.monotonic() < until:
        time.sleep(1)
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    for process in processes:
        process.wait()
    (folder / "reports" / study.name).mkdir(parents=True, exist_ok=True)
    for name in _REPORTS:
        if (ours / name).is_file():
            shutil.copy(ours / name, folder / "reports" / study.name)
    return all(p.returncode == 0 for p in processes)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_study", description=__doc__)
    parser.add_argument("dataset", type=Path, help="raw data set, for example ACDC at half resolution")
    parser.add_argument("folder", type=Path, help="where nnU-Net's folders and the studies are")
    parser.add_argument("--seconds", type=float, default=480, help="stop after that many")
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds
    folder = arguments.folder.resolve()
    for name in FOLDER_VARIABLES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(folder / name)
    raw = folder / "nnUNet_raw" / arguments.dataset.name
    if not raw.exists():
        shutil.copytree(arguments.dataset, raw)
    for study in STUDIES:
        finished = run(study, raw.name, folder, until)
        print(f"{study.name}: {'finished' if finished else 'stopped, to be continued'}", flush=True)
        report = folder / "reports" / study.name / "compare.md"
        if report.is_file():
            print(report.read_text(), flush=True)
        if not finished:
            sys.exit(0 if time.monotonic() >= until else 1)


if __name__ == "__main__":
    main()
