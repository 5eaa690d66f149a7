"""Variants of the U-Net: number of parameters, plans, and all commands from planning to prediction."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import DATASET, FEW_PROCESSES
from dynamic_network_architectures.architectures.abstract_arch import test_submodules_loadable as check_submodules
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunetv2_macl import checkpoints
from nnunetv2_macl.checkpoints import PretrainedWeights
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.networks.attention_unet import AttentionUNet
from nnunetv2_macl.networks.base import class_name
from nnunetv2_macl.networks.registry import family_of
from nnunetv2_macl.networks.rolling_unet import RollingUNet
from nnunetv2_macl.networks.uctransnet import UCTransNet
from nnunetv2_macl.networks.ukan import UKAN
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.planning.network import explain_changes, plan_network, variants
from nnunetv2_macl.preprocessing.cases import preprocess_unlabelled
from nnunetv2_macl.transfer import AS_IT_IS, NOT_TAKEN, TooLittleFitsError, plan_transfer

QUICK = "nnUNetTrainerMACL_quick"
TRAINER = f"""
from nnunetv2_macl.training.finetune import nnUNetTrainerMACL

class {QUICK}(nnUNetTrainerMACL):
    finetuning_epochs = 1

    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 1
"""
# Arguments that the variants take from a plan.
U_NET = {"strides": [1, 2, 2, 2, 2, 2], "norm_op": nn.BatchNorm2d, "norm_op_kwargs": None}
U_NET |= {"nonlin": nn.ReLU, "nonlin_kwargs": None}
# Numbers of parameters of the authors' implementations with 3 image channels and 1 output.
PUBLISHED = {
    "attention_unet": (
        AttentionUNet,
        {
            "n_stages": 5,
            "features_per_stage": [64, 128, 256, 512, 1024],
            "conv_op": nn.Conv2d,
            "kernel_sizes": [3] * 5,
            "strides": [1, 2, 2, 2, 2],
            "n_conv_per_stage": [2] * 5,
            "n_conv_per_stage_decoder": [2] * 4,
        },
        34_878_573,
    ),
    "uctransnet": (
        UCTransNet,
        {"features_per_stage": [64, 128, 256, 512, 512], "strides": [1, 2, 2, 2, 2], "position_grid": [14, 14]},
        66_430_657,
    ),
    # The authors' implementation has unused norms, which are subtracted.
    "rolling_unet_S": (RollingUNet, RollingUNet.planned(U_NET, [224, 224], "S"), 1_783_185 - 1_024),
    "rolling_unet_M": (RollingUNet, RollingUNet.planned(U_NET, [224, 224], "M"), 7_098_401 - 2_048),
    "rolling_unet_L": (RollingUNet, RollingUNet.planned(U_NET, [224, 224], "L"), 28_324_929 - 4_096),
    "ukan_S": (UKAN, UKAN.planned(U_NET, [224, 224], "S"), 1_848_633),
    "ukan_M": (UKAN, UKAN.planned(U_NET, [224, 224], "M"), 6_356_689),
    "ukan_L": (UKAN, UKAN.planned(U_NET, [224, 224], "L"), 25_359_265),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_number_of_parameters_is_that_of_the_authors(name):
    kind, arguments, parameters = PUBLISHED[name]
    with torch.device("meta"):
        network = kind(input_channels=3, num_classes=1, **{"norm_op": nn.BatchNorm2d} | arguments)
        images = torch.empty(2, 3, 224, 224)
    # The published networks have only the segmentation layer of the largest map.
    weights = {key: value for key, value in network.named_parameters() if ".seg_layers." not in key}
    weights |= network.decoder.seg_layers[-1].named_parameters()
    assert sum(value.numel() for value in weights.values()) == parameters
    assert network(images).shape == (2, 1, 224, 224)
    network.decoder.deep_supervision = True
    sizes = [224 // 2**depth for depth in range(len(network.decoder.stages))]
    assert [tuple(output.shape) for output in network(images)] == [(2, 1, n, n) for n in sizes]


@pytest.mark.parametrize("name", variants())
def test_the_plan_differs_from_nnunets_only_by_the_network_and_its_sizes(workspace, name):
    file = plan_network("901", name)
    assert file.name == f"nnUNetPlans_{name}.json" and plan_network("901", name) == file
    before, after = (DatasetConfiguration.load("901", plans, "2d") for plans in ("nnUNetPlans", file.stem))
    assert after.cases_folder == before.cases_folder
    ours, theirs = after.manager.configuration, before.manager.configuration
    assert {key for key in theirs if ours.get(key) != theirs[key]} <= {"architecture", "batch_size", "patch_size"}
    assert after.manager.batch_size <= before.manager.batch_size or after.manager.batch_size == 2
    architecture = ours["architecture"]
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        1,
        3,
        deep_supervision=True,
    )
    check_submodules(network)
    # nnU-Net derives the sizes of the targets of deep supervision from the strides of the plan.
    outputs, size = network(torch.zeros(2, 1, *after.patch_size)), torch.tensor(after.patch_size)
    assert len(outputs) == len(after.strides) - 1
    for output, stride in zip(outputs, torch.tensor(after.strides).cumprod(0), strict=False):
        assert torch.equal(torch.tensor(output.shape[2:]), size // stride)
    lines = explain_changes("901", "nnUNetPlans", file.stem, "2d")
    assert lines[0] == f"network: PlainConvUNet -> {variants()[name].__name__}"


def test_further_configurations_are_added_to_a_plan(workspace):
    one = plan_network("901", "attention_unet", name="gated")
    other = plan_network("901", "attention_unet", configuration="3d_fullres", name="gated")
    assert one == other and one.stem == "gated"
    assert json.loads(one.read_text())["configurations"].keys() == {"2d", "3d_fullres"}
    assert len(DatasetConfiguration.load("901", "gated", "3d_fullres").patch_size) == 3
    with pytest.raises(UserError, match=r"gated.json"):
        plan_network("901", "paper", name="gated")


def test_the_batch_needs_no_more_memory_than_that_of_nnunet(workspace):
    plans = workspace.preprocessed / DATASET / "nnUNetPlans.json"
    content = json.loads(plans.read_text())
    content["configurations"]["2d"]["batch_size"] = 12
    plans.write_text(json.dumps(content))
    plan_network("901", "attention_unet")
    assert 2 < DatasetConfiguration.load("901", "nnUNetPlans_attention_unet", "2d").manager.batch_size < 12


def change_plan(workspace, **values):
    """Write a plan with changed values of the 2D configuration, and return its name."""
    folder = workspace.preprocessed / DATASET
    content = json.loads((folder / "nnUNetPlans.json").read_text())
    content["plans_name"] = "changed"
    content["configurations"]["2d"] |= values
    (folder / "changed.json").write_text(json.dumps(content))
    return "changed"


def test_plans_and_sizes_that_do_not_fit_are_rejected(workspace):
    gated = plan_network("901", "attention_unet").stem
    with pytest.raises(UserError, match="-p"):
        plan_network("901", "attention_unet", gated)
    with pytest.raises(UserError, match="cascade"):
        plan_network("901", "attention_unet", change_plan(workspace, previous_stage="3d_lowres"))
    with pytest.raises(UserError, match="no size 'S'"):
        plan_network("901", "attention_unet", size="S")
    with pytest.raises(UserError, match="Leave out -size S"):
        plan_network("901", "paper", size="S")


@pytest.mark.parametrize("name", [name for name, kind in variants().items() if kind.axes == (2,)])
def test_a_2d_network_is_rejected_for_volumes(workspace, name):
    with pytest.raises(UserError, match="-c 2d"):
        plan_network("901", name, configuration="3d_fullres")


def test_a_plan_with_a_residual_encoder_can_be_converted(workspace, target):
    configuration = target.manager.configuration
    architecture = configuration["architecture"]
    kwargs = dict(architecture["arch_kwargs"])
    kwargs["n_blocks_per_stage"] = kwargs.pop("n_conv_per_stage")
    name = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    changed = architecture | {"network_class_name": name, "arch_kwargs": kwargs}
    file = plan_network("901", "attention_unet", change_plan(workspace, architecture=changed))
    assert "network: ResidualEncoderUNet -> AttentionUNet" in explain_changes("901", "changed", file.stem, "2d")


def architecture_of(name, features):
    """Return an architecture of four or five stages, whose norm depends on the number of stages."""
    stages = len(features)
    strides = [[1, 1]] + [[2, 2]] * (stages - 1)
    unet = {
        "n_stages": stages,
        "features_per_stage": features,
        "conv_op": "torch.nn.Conv2d",
        "kernel_sizes": [[3, 3]] * stages,
        "strides": strides,
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "norm_op": "torch.nn.InstanceNorm2d" if stages == 4 else "torch.nn.BatchNorm2d",
        "norm_op_kwargs": {"affine": True},
        "nonlin": "torch.nn.ReLU",
        "nonlin_kwargs": None,
    }
    kind = variants()[name]
    return {
        "network_class_name": class_name(kind),
        "arch_kwargs": kind.planned(unet, [32, 32], None),
        "input_channels": 1,
    }


def network_of(architecture):
    kwargs = architecture["arch_kwargs"]
    named = [key for key, value in kwargs.items() if isinstance(value, str)]
    return get_network_from_plans(architecture["network_class_name"], kwargs, named, 1, 3)


def transfer(source, target):
    """Transfer all weights that pre-training can train from one architecture to another."""
    network = network_of(source)
    adapter = family_of(type(network))(network, len(network.decoder.stages))
    encoder, decoder = adapter.trained_weights()
    state = network_of(target).state_dict()
    return plan_transfer(PretrainedWeights([], encoder | decoder, source, {}), state, target)


def test_weights_are_transferred_to_another_plan_of_the_same_network():
    source = architecture_of("attention_unet", [4, 8, 12, 16, 20])
    rows = {row.part: row for row in transfer(source, architecture_of("attention_unet", [4, 8, 12, 16])).rows}
    for stage in range(4):
        row = rows[f"encoder.stages.{stage}"]
        assert row.how == AS_IT_IS and row.why == "BatchNorm2d there, InstanceNorm2d here"
    # All tensors of a decoder stage are transferred, including its attention gate.
    for stage in range(3):
        row = rows[f"decoder.stages.{stage}"]
        assert row.taken == row.tensors and f"from decoder.stages.{stage + 1}" in row.why


def test_weights_of_another_width_are_rejected_stage_by_stage():
    with pytest.raises(TooLittleFitsError, match="features_per_stage is") as error:
        transfer(architecture_of("rolling_unet", [4, 8, 16, 32]), architecture_of("rolling_unet", [6, 12, 24, 48]))
    assert all(row.how == NOT_TAKEN for row in error.value.transfer.rows if row.is_encoder)


def test_position_embeddings_for_another_patch_are_not_transferred():
    source, target = (architecture_of("uctransnet", [4, 8, 12, 16]) for _ in range(2))
    target["arch_kwargs"]["position_grid"] = [4, 4]
    (row,) = [row for row in transfer(source, target).rows if row.part == "decoder.transformer"]
    assert row.taken == row.tensors - 4 and "position_embeddings is [1, 16, 2, 2] there" in row.why


@pytest.mark.parametrize("name", variants())
def test_weights_of_another_network_are_rejected_with_both_names(name):
    other = "ukan" if name != "ukan" else "rolling_unet"
    names = rf"{variants()[name].__name__}\b.*{variants()[other].__name__}\b.*Pre-train for this one"
    with pytest.raises(UserError, match=names):
        transfer(architecture_of(name, [4, 8, 12, 16]), architecture_of(other, [4, 8, 12, 16]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, configuration",
    [
        (name, configuration)
        for name, kind in variants().items()
        for configuration in ("2d", "3d_fullres")[: len(kind.axes)]
    ],
)
def test_all_commands_from_planning_to_prediction(workspace, tmp_path, name, configuration):
    """Run planning, pre-training, fine-tuning, validation, prediction, and transfer to another plan."""
    out = workspace.run("nnUNetv2_macl_network", "901", name, "-c", configuration)
    plans = f"nnUNetPlans_{name}"
    assert f"-p {plans}" in out and "nnunetv2_macl" in out
    if configuration == "3d_fullres":
        workspace.run("nnUNetv2_preprocess", "-d", "901", "-plans_name", plans, "-c", configuration, "-np", "1")
    workspace.pretrain("901", "-c", configuration, "-p", plans, "-recipe", "macl", **FEW_PROCESSES)
    run = workspace.run_folder("nnUNetTrainerMACLPretrain", plans, configuration)
    trained = checkpoints.load_weights(run)
    started = ("-recipe", "macl", "-pretrained_weights", run, "-seed", "1")
    workspace.pretrain("901", "-c", configuration, "-p", plans, *started, **FEW_PROCESSES)
    again = checkpoints.load_weights(run)
    assert again.weights.keys() == trained.weights.keys()
    changed = {key for key, value in again.weights.items() if not torch.equal(value, trained.weights[key])}
    assert {key for key, value in again.weights.items() if value.ndim > 1} <= changed

    mine = workspace.folder / "mine"
    mine.mkdir()
    (mine / f"{QUICK}.py").write_text(TRAINER)
    found = FEW_PROCESSES | {"nnUNet_extTrainer": workspace.environment["nnUNet_extTrainer"] + f":{mine}"}
    common = ("-p", plans, "-tr", QUICK)
    train = ("nnUNetv2_train", "901", configuration, "0", *common, "-device", "cpu")
    out = workspace.run(*train, "--npz", **found)
    encoder = len([key for key in trained.weights if key.startswith("encoder.")])
    assert f"encoder: {encoder} of {encoder} tensors" in out and "Mean Validation Dice" in out
    # as after a stop: training, validation and their state are taken up from the latest checkpoint
    fold = workspace.run_folder(QUICK, plans, configuration, fold=0)
    (fold / "checkpoint_final.pth").rename(fold / "checkpoint_latest.pth")
    assert "Mean Validation Dice" in workspace.run(*train, "--npz", "--c", **found)
    images = workspace.raw / DATASET / "imagesTs"
    predict = ("nnUNetv2_predict", "-d", "901", "-c", configuration, "-f", "0", "-i", images, "-o", tmp_path / "out")
    workspace.run(*predict, *common, "-device", "cpu", "-npp", "1", "-nps", "1", **found)
    assert list((tmp_path / "out").glob("*.nii.gz"))
    workspace.run(
        "nnUNetv2_find_best_configuration", "901", *common, "-c", configuration, "-f", "0", "-np", "1", **found
    )

    # The weights do not fit another network, and the message names both networks.
    out = workspace.run("nnUNetv2_macl_transfer", run, "901", "-c", configuration, code=1)
    assert variants()[name].__name__ in out and "PlainConvUNet" in out


def test_the_smallest_map_has_more_than_one_point(workspace):
    """An instance norm cannot be trained on one point."""
    plans = change_plan(workspace, patch_size=[40, 40])
    file = plan_network("901", "ukan", plans)
    assert DatasetConfiguration.load("901", file.stem, "2d").patch_size == [64, 32]


def test_plans_with_one_folder_of_labelled_images_share_the_unlabelled_ones(workspace):
    """Another network, or another patch, does not change how an image is preprocessed."""
    configuration = DatasetConfiguration.load("901", "nnUNetPlans", "2d")
    made = {
        case.file: os.stat(case.file).st_mtime_ns
        for case in preprocess_unlabelled(configuration, [], processes=1).cases
    }
    record = Path(min(made)).with_suffix(".json")
    content = json.loads(record.read_text())
    # a case of version 0.1, whose record depends on the patch
    content["made_from"]["plan"] = configuration.preprocessing_checksum()
    record.write_text(json.dumps(content))
    (record.parent / ".index").unlink()
    gated = plan_network("901", "attention_unet", change_plan(workspace, patch_size=[24, 40]))
    for plans in ("nnUNetPlans", gated.stem):
        cases = preprocess_unlabelled(DatasetConfiguration.load("901", plans, "2d"), [], processes=1).cases
        assert {case.file: os.stat(case.file).st_mtime_ns for case in cases} == made
