"""Pre-training, fine-tuning and prediction of anisotropic 3D images with four channels, with the real commands."""

import re

import pytest
from conftest import Workspace

from nnunetv2_macl import checkpoints
from nnunetv2_macl.synthetic import generate_dataset

PRETRAIN, QUICK = "nnUNetTrainerMACLPretrain", "nnUNetTrainerMACL_quick3d"
TRAINER = f"""
from nnunetv2_macl.training.finetune import nnUNetTrainerMACL

class {QUICK}(nnUNetTrainerMACL):
    finetuning_epochs = 1

    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 1
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "planner, plans", [("ExperimentPlanner", "nnUNetPlans"), ("nnUNetPlannerResEncM", "nnUNetResEncUNetMPlans")]
)
def test_3d_fullres_is_the_default(tmp_path, planner, plans):
    space = Workspace(tmp_path / "nnunet")
    dataset = "Dataset905_Volumes"
    generate_dataset(
        space.raw / dataset, labelled=5, unlabelled=2, test=1, shape=(12, 32, 40), spacing=(3, 1.5, 1.5), channels=4
    )
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / f"{QUICK}.py").write_text(TRAINER)
    mine = {"nnUNet_extTrainer": f"{space.environment['nnUNet_extTrainer']}:{tmp_path / 'trainers'}"}
    space.run("nnUNetv2_plan_and_preprocess", "-d", "905", "-pl", planner, "-c", "3d_fullres", "-npfp", "1", "-np", "1")
    out = space.pretrain("905", "-p", plans, "-recipe", "macl")
    assert "Configuration 3d_fullres" in out and "Pre-training on 7 images" in out
    assert float(re.search(r"positives ([\d.]+)", out)[1]) >= 1
    folder = space.results / dataset / f"{PRETRAIN}__{plans}__3d_fullres" / "fold_all"
    assert checkpoints.load(folder / "macl_encoder.pth")["architecture"]["input_channels"] == 4
    out = space.run("nnUNetv2_train", "905", "3d_fullres", "all", "-tr", QUICK, "-p", plans, "-device", "cpu", **mine)
    taken, tensors = map(int, re.search(r"encoder: (\d+) of (\d+) tensors", out).groups())
    assert taken == tensors > 0
    options = f"-d 905 -c 3d_fullres -tr {QUICK} -p {plans} -f all -device cpu --disable_tta".split()
    bare = {"nnUNet_extTrainer": ""}
    space.run("nnUNetv2_predict", *options, "-i", space.raw / dataset / "imagesTs", "-o", tmp_path / "out", **bare)
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 1
