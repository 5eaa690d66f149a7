"""Without space or permission, the message names path, needed and free bytes, and existing files are kept."""

import errno
import os
import subprocess

import blosc2
import numpy as np
import pytest
import torch

from faults.test_killed import load, write
from nnunetv2_macl import checkpoints, monitoring
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import write_json
from nnunetv2_macl.training import resume
from nnunetv2_macl.training.run_folder import RunLock, archive_previous_run

FULL = r"could not be written: the disk is full \([\d,]+ bytes needed, [\d,]+ bytes free\)\. Make space"


@pytest.mark.parametrize("file", ["checkpoint.pth", "plan.json", "progress.png"])
def test_a_disk_that_fills_during_a_write_leaves_the_old_file(tmp_path, monkeypatch, file):
    """This test runs on any system. The tests below fill a real disk, which must be mountable."""
    from nnunetv2_macl import files

    log = {key: [1.0] for key in ("lrs", "embedding_variance", "patches_per_second", "train_losses/equivariance")}
    write_one = {
        "checkpoint.pth": lambda: checkpoints.save({"weights": torch.zeros(10_000)}, tmp_path / file),
        "plan.json": lambda: write_json({"text": "x" * 10_000}, tmp_path / file),
        "progress.png": lambda: monitoring.plot_progress(log, tmp_path / file, "a"),
    }[file]
    write_one()
    before = (tmp_path / file).read_bytes()
    written = 0

    def fills(self, method, *data):
        nonlocal written
        written += len(data[0]) if data else 0
        if written > 1000:
            self.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise self.error
        return method(*data)

    with monkeypatch.context() as patch:
        patch.setattr(files._ErrorCapturingStream, "_remember", fills)
        with pytest.raises(UserError, match=f"{file} could not be written: the disk is full"):
            write_one()
    assert os.listdir(tmp_path) == [file] and (tmp_path / file).read_bytes() == before


def test_a_checkpoint_on_a_full_disk_leaves_the_previous_one(tmp_path, small_disk):
    folder = tmp_path / "results"
    small_disk(folder, "size=2m")
    write(folder, 1)
    with pytest.raises(UserError, match=f"checkpoint_latest.pth {FULL}"):
        write(folder, 2, values=400_000)
    assert load(folder)["step"] == 1
    assert set(os.listdir(folder)) <= {resume.LATEST, resume.PREVIOUS}
    write(folder, 2)  # a small checkpoint fits
    assert load(folder)["step"] == 2


def test_a_preprocessed_case_on_a_full_disk_is_named(tmp_path, small_disk, monkeypatch):
    from types import SimpleNamespace

    from nnunetv2_macl.preprocessing import cases

    monkeypatch.setattr(cases, "_configuration", SimpleNamespace(patch_size=[64, 64]), raising=False)
    folder = tmp_path / "preprocessed"
    small_disk(folder, "size=200k")
    data = np.random.default_rng(0).normal(size=(1, 20, 64, 64)).astype(np.float32)
    with pytest.raises(UserError, match=f"case.b2nd {FULL}"):
        cases._write_case(data, folder / "case", {}, [1.0, 1.0, 1.0])
    assert os.listdir(folder) == []
    cases._write_case(data[:, :2], folder / "case", {}, [1.0, 1.0, 1.0])
    np.testing.assert_array_equal(blosc2.open(str(folder / "case.b2nd"))[:], data[:, :2])


def test_read_only_results_are_reported(tmp_path, small_disk):
    folder = tmp_path / "results"
    small_disk(folder, "ro,size=64k")
    for action in (
        lambda: RunLock(folder).acquire(),
        lambda: checkpoints.save({}, folder / "a.pth"),
        lambda: checkpoints.save({}, folder / "new" / "a.pth"),
    ):
        with pytest.raises(UserError, match=r"could not be written: Read-only file system.*permissions"):
            action()


def test_an_earlier_run_is_moved_completely(tmp_path, small_disk):
    small_disk(tmp_path / "results", "size=64k")
    log = tmp_path / "results" / "log.txt"
    log.write_text("")
    (tmp_path / "results" / "macl_encoder.pth").write_bytes(b"weights")
    archive_previous_run(tmp_path / "results", log, print)
    assert len(list((tmp_path / "results").glob("previous_*/macl_encoder.pth"))) == 1


def run(**options):
    from nnunetv2_macl.run import pretrain

    return pretrain("901", "2d", device="cpu", processes=1, **options)


SHORT = {"num_epochs": 2, "num_iterations_per_epoch": 1, "batch_size": 4}


def test_a_run_whose_disk_was_full_can_be_continued(workspace, small_disk):
    small_disk(workspace.results, "size=45m")  # space for one checkpoint, but not for two
    folder = workspace.run_folder("nnUNetTrainerMACLPretrain")
    with pytest.raises(UserError, match=rf"checkpoint_final.pth {FULL} and try again.*type:\n +nnUNetv2.* --c"):
        run(recipe="macl", **SHORT)
    assert checkpoints.load(folder / resume.LATEST)["current_epoch"] == 1
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")] and not (folder / resume.FINAL).exists()
    subprocess.run(["mount", "-o", "remount,size=200m", str(workspace.results)], check=True)
    run(continue_training=True)
    assert checkpoints.load(folder / resume.FINAL)["current_epoch"] == 2 and (folder / "macl_encoder.pth").exists()


@pytest.mark.parametrize("options, reason", [("size=32k", "the disk is full"), ("ro,size=1m", "Read-only file system")])
def test_files_that_nnunet_cannot_write_are_reported(workspace, small_disk, options, reason):
    """nnU-Net writes the run's folder, its log, plans.json and debug.json."""
    small_disk(workspace.results, options)
    with pytest.raises(UserError, match=f"could not be written: {reason}") as stop:
        run(**SHORT)
    assert str(workspace.results) in str(stop.value)
