"""Semi-supervised training with the real commands, from raw images to a prediction without this package."""

import os
import re

import pytest
import torch

QUICK = "nnUNetTrainerMACLSemi_quick"
# a user's own trainer, which is in the user's own folder
QUICK_TRAINER = f"""
from nnunetv2_macl.semi_supervised.settings import SemiSettings
from nnunetv2_macl.semi_supervised.trainer import nnUNetTrainerMACLSemi

class {QUICK}(nnUNetTrainerMACLSemi):
    semi = SemiSettings(confidence=0.5)
    finetuning_epochs = 2

    def initialize(self):
        super().initialize()
        self.num_iterations_per_epoch = 2
        self.num_val_iterations_per_epoch = 1
"""


@pytest.mark.slow
def test_semi_supervised_training_and_prediction_without_this_package(workspace, tmp_path):
    workspace.pretrain("901", "-c", "2d", "--exclude_fold", "0")
    trainers, shadow = tmp_path / "trainers", tmp_path / "shadow"
    trainers.mkdir()
    (trainers / f"{QUICK}.py").write_text(QUICK_TRAINER)
    both = os.pathsep.join([workspace.environment["nnUNet_extTrainer"], str(trainers)])
    train = ("nnUNetv2_train", "901", "2d", "0", "-tr", QUICK, "-device", "cpu")
    out = workspace.run(*train, nnUNet_extTrainer=both)
    assert "encoder: 64 of 64 tensors" in out and "Unlabelled images used: 4" in out
    assert "voxels that the teacher labelled" in out and "Mean Validation Dice" in out
    folder = workspace.run_folder(QUICK, fold=0)
    checkpoint = torch.load(folder / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainer" and checkpoint["macl"]["trainer"] == QUICK
    assert "Mean Validation Dice" in workspace.run(*train, "--val", nnUNet_extTrainer=both)

    (shadow / "nnunetv2_macl").mkdir(parents=True)
    (shadow / "nnunetv2_macl" / "__init__.py").write_text("raise ImportError('not on this machine')")
    workspace.run(
        "nnUNetv2_predict", "-d", "901", "-c", "2d", "-tr", QUICK, "-f", "0", "-device", "cpu",
        "-i", workspace.raw / "Dataset901_Generated" / "imagesTs", "-o", tmp_path / "predictions",
        PYTHONPATH=str(shadow), nnUNet_extTrainer="",
    )  # fmt: skip
    assert len(list((tmp_path / "predictions").glob("*.nii.gz"))) == 1
    network = workspace.run_folder("nnUNetTrainerMACLPretrain", fold=0) / "macl_network.pth"
    out = workspace.run(*train, "-pretrained_weights", network, nnUNet_extTrainer=both)
    assert "Loading pretrained weights from file" in out and "MACL weights from" not in out


@pytest.mark.slow
def test_a_study_with_semi_supervised_arms(workspace, tmp_path):
    """Labelled cases that are not drawn count as unlabelled images."""
    arms = ["scratch", "semi:scratch", "semi,mixing=copy_paste,confidence=0.5:pretrained"]
    out = workspace.run(
        "nnUNetv2_macl_compare", "901", "-c", "2d", "--arms", *arms, "--labels", "1", "--seeds", "1", "--finetuning", "sgd",
        "--rates", "1e-2", "--test", "1", "--validation", "1", "--epochs", "1", "--iterations", "2", "-batch_size", "2",
        "--disable_tta", "--pretrain_epochs", "1", "--pretrain_iterations", "1", "--pretrain_batch_size", "4", "-device", "cpu",
        "-np", "1", "-o", tmp_path / "study",
    )  # fmt: skip
    assert "Too few to tell" in out
    table = (tmp_path / "study" / "compare.csv").read_text()
    assert "semi-scratch" in table and "semi-mixing-copy_paste-confidence-0-5-pretrained" in table
    (log,) = (tmp_path / "study" / "cells").glob("semi-scratch*/**/training_log*")
    # four images in imagesUn; one of five labelled cases each is for training, validation and test
    assert re.search(r"Unlabelled images used: 6 \(2\b", log.read_text())
