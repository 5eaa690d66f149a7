"""Compare methods over several splits of the patients, on one GPU: ``python -m benchmarks.gpu_study DATASET FOLDER --arms ARM``.

This runs `nnUNetv2_macl_compare` on a data set in nnU-Net's raw format, with several trainings at a time on one GPU, and stops it
when the time is up. The same command continues it. ``FOLDER/reports`` gets the tables, values and curves, a few kilobytes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from nnunetv2_macl.nnunet import FOLDER_VARIABLES

# A few validation cases are enough: they are used only for curves, because each study has one learning rate.
_SAME = [
    *("-c", "2d", "--group_regex", "^patient[0-9]+", "--labels", "8", "--test", "40", "--validation", "6"),
    *("--disable_tta", "--pretrain_batch_size", "32", "--pretrain_iterations", "250"),
]
STUDIES = {
    "short": ["--finetuning", "adamw", "--rates", "3e-3", "--epochs", "5", "--iterations", "160"],
    "long": ["--finetuning", "sgd", "--rates", "1e-2", "--epochs", "20", "--iterations", "250"],
}
_REPORTS = ("compare.md", "compare.csv", "compare.png", "study.json")


def run(command: list[str], folder: Path, log: Path, until: float) -> bool:
    """Start or continue a study, stop it when the time is up, and return whether it is finished.

    Args:
        command: `nnUNetv2_macl_compare` with its arguments.
        folder: Folder of the study.
        log: File for the output of the command.
        until: Time at which to stop, on the clock of `time.monotonic`.
    """
    environment = os.environ | {"nnUNet_compile": "f", "OMP_NUM_THREADS": "1"}
    environment.setdefault("nnUNet_n_proc_DA", "1")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [*command, "-o", str(folder)], stdout=stream, stderr=stream, env=environment, start_new_session=True
        )
        while process.poll() is None and time.monotonic() < until:
            time.sleep(1)
        for ending in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                # Most trainings end within seconds of SIGTERM. One that hangs while sharing the GPU is killed.
                os.killpg(process.pid, ending)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
    reports = log.parent.parent / "reports" / folder.name
    for file in (path for path in folder.rglob("*") if path.name in _REPORTS):
        (reports / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, reports / file.relative_to(folder))
    return process.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_study", description=__doc__)
    add = parser.add_argument
    add("dataset", type=Path, help="raw data set, for example ACDC at half resolution")
    add("folder", type=Path, help="folder for nnU-Net's folders and the studies")
    add("--arms", nargs="+", required=True, help="arms, as for nnUNetv2_macl_compare")
    add("--study", choices=STUDIES, default="short", help="length of fine-tuning. Default: short")
    add("--plan", type=Path, help="nnU-Net plan to use unchanged. Default: nnU-Net makes the plan")
    add("--splits", default="3", help="random splits of the patients. Default: 3")
    add("--seeds", default="2", help="fine-tunings per split. Default: 2")
    add("--pretrain_epochs", default="16", help="pre-training epochs, each of 250 steps with 32 patches. Default: 16")
    add("--jobs", default="12", help="trainings at a time. Default: 12")
    add("--seconds", type=float, default=480, help="stop after this many seconds. Default: 480")
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds
    folder = arguments.folder.resolve()
    for name in FOLDER_VARIABLES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(folder / name)
    raw = folder / "nnUNet_raw" / arguments.dataset.name
    if not raw.exists():
        shutil.copytree(arguments.dataset, raw)
    command = ["nnUNetv2_macl_compare", raw.name, *_SAME, *STUDIES[arguments.study], "--arms", *arguments.arms]
    command += ["--splits", arguments.splits, "--seeds", arguments.seeds, "--jobs", arguments.jobs, "-np", "1"]
    command += ["--pretrain_epochs", arguments.pretrain_epochs]
    command += ["--plan", str(arguments.plan.resolve())] if arguments.plan else []
    finished = run(command, folder / arguments.study, folder / "logs" / f"{arguments.study}.log", until)
    print(f"{arguments.study}: {'finished' if finished else 'stopped, to be continued'}", flush=True)
    report = folder / arguments.study / "compare.md"
    if report.is_file():
        print(report.read_text(), flush=True)


if __name__ == "__main__":
    main()
