"""Compare loader, preprocessing and start of a training with those of nnU-Net."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from benchmarks.measure import Row, at_least, at_most, side_by_side, timed
from benchmarks.step import batch, training_step
from nnunetv2_macl.data import PretrainingBatches, Sampling
from nnunetv2_macl.nnunet import FOLDER_VARIABLES, DatasetConfiguration
from nnunetv2_macl.planning.plan import volume_patch
from nnunetv2_macl.preprocessing.cases import preprocess_unlabelled, unlabelled_folder
from nnunetv2_macl.preprocessing.sources import training_cases
from nnunetv2_macl.synthetic import generate_dataset

DATASET = "Dataset960_Benchmark"
VOLUMES, SHAPE, BATCHES, CASES, PROCESSES = 60, (24, 160, 160), 40, 1_000, 2
# This script runs a training command up to its first step, and then kills its process group, which is the exit that
# `_first_step` expects.
_UP_TO_THE_FIRST_STEP = """
import os, sys
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2_macl.training.pretrain import nnUNetTrainerMACLPretrain
def leave(self, batch):
    sys.stdout.flush()
    os.killpg(0, 9)
nnUNetTrainer.train_step = nnUNetTrainerMACLPretrain.train_step = leave
from {module} import {entry}
sys.argv = {arguments}
{entry}()
"""


@contextlib.contextmanager
def dataset() -> Iterator[Path]:
    """Provide a folder with generated volumes that nnU-Net planned and preprocessed, within the context."""
    before = {name: os.environ.get(name) for name in FOLDER_VARIABLES}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update({name: str(Path(folder) / name) for name in FOLDER_VARIABLES})
        for name in FOLDER_VARIABLES:
            (Path(folder) / name).mkdir()
        try:
            raw = Path(folder) / "nnUNet_raw" / DATASET
            generate_dataset(raw, labelled=VOLUMES, unlabelled=0, test=0, shape=SHAPE)
            (raw / "imagesUn").mkdir(exist_ok=True)
            for file in (raw / "imagesTr").iterdir():
                os.link(file, raw / "imagesUn" / f"un_{file.name}")
            _command("nnUNetv2_plan_and_preprocess", "-d", "960", "-c", "2d", "-npfp", "2", "-np", "2")
            yield Path(folder)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _command(*words: str) -> None:
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run(device: torch.device) -> list[Row]:
    with dataset():
        configuration = DatasetConfiguration.load(DATASET, "nnUNetPlans", "2d")
        return [_preprocessing(configuration), *_loader(configuration, device), _start(configuration, device)]


def _preprocessing(configuration: DatasetConfiguration) -> Row:
    def ours() -> None:
        shutil.rmtree(unlabelled_folder(configuration), ignore_errors=True)
        with contextlib.redirect_stderr(io.StringIO()):
            preprocess_unlabelled(configuration, [], processes=PROCESSES)

    def theirs() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            configuration.manager.preprocessor_class(verbose=False).run(960, "2d", "nnUNetPlans", PROCESSES)

    size = "x".join(map(str, SHAPE))
    what = f"{VOLUMES} volumes of {size}, -np {PROCESSES}, over nnU-Net's"
    seconds, nnunet_seconds = side_by_side(ours, theirs, repeats=2)
    return at_most("preprocessing", what, seconds, nnunet_seconds, "s", 1.0)


def _loader(configuration: DatasetConfiguration, device: torch.device) -> list[Row]:
    patch = configuration.patch_size
    step = training_step(configuration, device, batch_size=16)
    sampling = Sampling(volume_patch(patch), 16, step.plan.position_group_size, 1)
    ours = PretrainingBatches(training_cases(configuration), sampling, (0, 16), 10**6)
    data = infer_dataset_class(str(configuration.cases_folder))(str(configuration.cases_folder))
    labels = configuration.plans_manager.get_label_manager(configuration.dataset_json)
    loader = nnUNetDataLoader(data, 16, patch, patch, labels, oversample_foreground_percent=0.0)
    seconds = side_by_side(
        lambda: [ours[i] for i in range(BATCHES)], lambda: [next(loader) for _ in range(BATCHES)], repeats=3
    )
    speed, nnunet_speed = (16 * BATCHES / s for s in seconds)
    data_of_step = batch(step)
    step(data_of_step, 0)
    consumed = 16 / min(timed(lambda i=i: step(data_of_step, i)) for i in range(3))
    size = "x".join(map(str, patch))
    unit = "patches/s"
    return [
        at_least("loader", f"{size}, one process, over nnU-Net's without augmentation", speed, nnunet_speed, unit, 2),
        at_least(
            "loader", f"{size}, one process, over the speed of training on this machine", speed, consumed, unit, 5
        ),
    ]


def _start(configuration: DatasetConfiguration, device: torch.device) -> Row:
    """Measure the time from the command to the first step, with many links to the few preprocessed cases."""
    for folder in (configuration.cases_folder, unlabelled_folder(configuration) / DATASET):
        files = sorted(file for file in folder.iterdir() if file.suffix in (".b2nd", ".pkl"))
        for file in files if folder == configuration.cases_folder else []:
            for copy in range(1, CASES // VOLUMES):
                os.link(file, file.with_name(f"copy{copy:03d}_{file.name}"))
    (configuration.folder / "splits_final.json").unlink(missing_ok=True)
    common = ["-device", device.type]
    ours = ["nnUNetv2_train_macl_pretrain", "960", "-c", "2d", "-batch_size", "4", *common]
    theirs = ["nnUNetv2_train", "960", "2d", "0", *common]
    seconds, nnunet_seconds = side_by_side(
        lambda: _first_step("nnunetv2_macl.cli.pretrain", "pretrain_entry", ours),
        lambda: _first_step("nnunetv2.run.run_training", "run_training_entry", theirs),
        repeats=3,
    )
    return at_most(
        "start", f"command to first step, {CASES:,} cases, over nnUNetv2_train", seconds, nnunet_seconds, "s", 1.2
    )


def _first_step(module: str, entry: str, arguments: list[str]) -> None:
    script = _UP_TO_THE_FIRST_STEP.format(module=module, entry=entry, arguments=arguments)
    for fold in Path(os.environ["nnUNet_results"]).glob("*/*/fold_*"):
        shutil.rmtree(fold)
    environment = os.environ | {"nnUNet_n_proc_DA": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, start_new_session=True
    )
    if done.returncode != -9:
        raise RuntimeError(f"{arguments} did not reach its first step:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
