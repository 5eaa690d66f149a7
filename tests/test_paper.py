"""The paper's network in an nnU-Net plan, and fine-tuning as in the paper."""

import json

import numpy as np
import pytest
import torch
from conftest import DATASET
from nnunetv2.training.loss.robust_ce_loss import RobustCrossEntropyLoss
from torch import nn

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import resource_folder
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.planning.network import plan_network
from nnunetv2_macl.training.finetune_paper import nnUNetTrainerMACLPaper


def trainer(fold=0):
    plans = json.loads(
        (DatasetConfiguration.load("901", "nnUNetPlans_paper", "2d").folder / "nnUNetPlans_paper.json").read_text()
    )
    configuration = DatasetConfiguration.load("901", "nnUNetPlans_paper", "2d")
    plans["continue_training"] = False
    return nnUNetTrainerMACLPaper(plans, "2d", fold, configuration.dataset_json, torch.device("cpu"))


def test_the_plan_differs_only_by_the_network_and_its_sizes(workspace):
    file = plan_network("901", "paper")
    assert file.name == "nnUNetPlans_paper.json" and plan_network("901", "paper") == file
    before, after = (DatasetConfiguration.load("901", name, "2d") for name in ("nnUNetPlans", "nnUNetPlans_paper"))
    assert after.cases_folder == before.cases_folder and after.preprocessing_checksum() != ""
    assert after.strides == [[1, 1]] + [[2, 2]] * 4 and after.manager.batch_size == 5
    assert all(n % 16 == 0 for n in after.patch_size)
    changed = {
        key
        for key in before.manager.configuration
        if before.manager.configuration[key] != after.manager.configuration.get(key)
    }
    assert changed <= {"architecture", "batch_size", "patch_size"}
    file.write_text("{}")
    with pytest.raises(UserError, match=file.name):
        plan_network("901", "paper")


def test_a_configuration_that_inherits_is_planned(workspace):
    plans = workspace.preprocessed / DATASET / "nnUNetPlans.json"
    content = json.loads(plans.read_text())
    content["configurations"]["2d_bs5"] = {"inherits_from": "2d", "batch_size": 5}
    plans.write_text(json.dumps(content))
    plan_network("901", "paper", configuration="2d_bs5")
    alone = DatasetConfiguration.load("901", "nnUNetPlans_paper", "2d_bs5")
    assert alone.strides == [[1, 1]] + [[2, 2]] * 4 and alone.cases_folder.name == "nnUNetPlans_2d"


PAPER = json.loads((resource_folder("plans") / "networks" / "paper.json").read_text())


def paper_with(**kwargs):
    """Return the JSON of the paper's network with other arguments."""
    architecture = PAPER["architecture"]
    return PAPER | {"architecture": architecture | {"arch_kwargs": architecture["arch_kwargs"] | kwargs}}


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "nothing.*attention_unet.*paper"),
        ({}, "mine.json.*'architecture'"),
        (PAPER | {"batch_size": "2"}, "mine.json.*'batch_size'"),
        (PAPER | {"architecture": {"arch_kwargs": PAPER["architecture"]["arch_kwargs"]}}, "network_class_name"),
        (paper_with(strides=2), "mine.json.*'strides'"),
        (paper_with(strides=[[1, 1, 1], [2, 2, 2]]), "mine.json.*2 axes of 2d"),
        (paper_with(n_stages=3), "mine.json cannot be built"),
    ],
)
def test_an_invalid_network_is_rejected(workspace, tmp_path, content, words):
    network = "nothing"
    if content is not None:
        (tmp_path / "mine.json").write_text(json.dumps(content))
        network = str(tmp_path / "mine.json")
    with pytest.raises(UserError, match=words):
        plan_network("901", network)
    # a plan that was written would refuse the corrected network
    assert not list(workspace.preprocessed.glob("*/*mine*"))


def test_fine_tuning_has_the_settings_of_the_paper(workspace):
    plan_network("901", "paper")
    paper = trainer()
    paper.initialize()
    assert isinstance(paper.loss, RobustCrossEntropyLoss) and isinstance(paper.optimizer, torch.optim.Adam)
    assert any(isinstance(module, nn.BatchNorm2d) for module in paper.network.modules())
    # torch's training on several GPUs requires a gradient of every trained parameter.
    image = torch.randn(2, 1, *paper.configuration_manager.patch_size)
    paper.network(image).sum().backward()
    assert all(p.grad is not None for p in paper.network.parameters() if p.requires_grad)
    rates = []
    for epoch in range(paper.num_epochs):
        paper.lr_scheduler.step(epoch)
        rates.append(paper.optimizer.param_groups[0]["lr"])
    assert len(rates) == 100 and rates[0] == pytest.approx(5e-4) and rates[-1] == pytest.approx(5e-6)
    assert rates[50] == pytest.approx((5e-4 + 5e-6) / 2, rel=0.05) and sorted(rates, reverse=True) == rates
    dataset, _ = paper.get_tr_and_val_datasets()
    slices = sum(dataset.load_case(case)[0].shape[1] for case in dataset.identifiers)
    assert paper.num_iterations_per_epoch == max(1, round(slices / 5))
    # There is no augmentation, so all values of a patch occur in the cases.
    loader, _ = paper.get_dataloaders()
    batch = next(loader)["data"].numpy()
    volumes = [np.asarray(dataset.load_case(case)[0][:])[0] for case in dataset.identifiers]
    values = np.unique(np.concatenate([volume.ravel() for volume in volumes]))
    assert np.isin(batch[batch != 0], values).all()
    loader._finish()
