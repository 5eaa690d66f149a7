"""A process that is killed leaves the old or the new checkpoint, and no worker processes."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from conftest import DATASET

from nnunetv2_macl import checkpoints
from nnunetv2_macl.files import remove_temporary
from nnunetv2_macl.training import resume

RUN = {"fold": "all", "macl_plan": {"recipe": "a"}}


def checkpoint(number, values=200_000, run=RUN):
    weights = torch.from_numpy(np.full(values, float(number), np.float32))  # torch's threads do not survive a fork
    return {
        "format_version": resume.FORMAT_VERSION,
        "kind": resume.KIND,
        "run": run,
        "step": number,
        "weights": weights,
    }


def write(folder, number, **more):
    latest = folder / resume.LATEST
    resume.rotate_checkpoint(latest)
    checkpoints.save(checkpoint(number, **more), latest)


def load(folder, log=print):
    return resume.load_checkpoint(folder, RUN, log)


def write_for_ever(folder, first):
    while True:
        write(folder, first)
        first += 1


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_process_that_is_killed_while_writing_leaves_a_good_checkpoint(tmp_path):
    write(tmp_path, 0)
    generator, messages, last, moved = random.Random(0), [], 0, 0
    context = multiprocessing.get_context("fork")
    for _ in range(50):
        process = context.Process(target=write_for_ever, args=(tmp_path, last + 1))
        process.start()
        time.sleep(generator.uniform(0.002, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        remove_temporary(tmp_path)
        assert set(os.listdir(tmp_path)) <= {resume.LATEST, resume.PREVIOUS}
        found = checkpoints.load(tmp_path / resume.LATEST)
        assert found["step"] >= last and (found["weights"] == found["step"]).all()
        assert load(tmp_path, messages.append)["step"] == found["step"]
        moved += found["step"] > last
        last = found["step"]
    assert not messages and moved >= 5


def test_temporary_files_of_a_killed_process_are_removed_and_others_kept(tmp_path):
    (tmp_path / ".checkpoint_latest.pth.abc.tmp").write_bytes(b"half")
    (tmp_path / "notes.tmp").write_bytes(b"the user's")
    remove_temporary(tmp_path, older_than=60)
    assert len(os.listdir(tmp_path)) == 2
    remove_temporary(tmp_path)
    assert os.listdir(tmp_path) == ["notes.tmp"]


@pytest.mark.slow
def test_preprocessing_workers_end_with_a_killed_command(workspace):
    folder = workspace.raw / DATASET / "imagesUn"
    image = next(folder.iterdir())
    for number in range(500):
        shutil.copy(image, folder / f"more{number}_0000.nii.gz")
    command = ["nnUNetv2_train_macl_pretrain", "901", "-c", "2d", "--preprocess_only", "-device", "cpu", "-np", "2"]
    process = subprocess.Popen(command, env=workspace.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any(workspace.preprocessed.rglob("more*.b2nd")):
        time.sleep(0.05)
    pool = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    process.kill()
    process.wait()
    assert pool and not psutil.wait_procs(pool, timeout=30)[1]
