"""The network of the paper's authors, and their published weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATASET
from dynamic_network_architectures.architectures.abstract_arch import test_submodules_loadable as check_submodules
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunetv2_macl import checkpoints, formats
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import resource_folder
from nnunetv2_macl.networks.registry import pretrainable
from nnunetv2_macl.transfer import ADAPTED, AS_IT_IS, NOT_TAKEN, plan_transfer

DATA = Path(__file__).parent / "data"
ARCHITECTURE = json.loads((resource_folder("plans") / "networks" / "paper.json").read_text())["architecture"]


def build(architecture, classes=3):
    """Return a U-Net built by nnU-Net."""
    kwargs = architecture["arch_kwargs"]
    return get_network_from_plans(
        architecture["network_class_name"],
        kwargs,
        [key for key, value in kwargs.items() if isinstance(value, str)],
        architecture["input_channels"],
        classes,
        deep_supervision=True,
    )


def paper_architecture(channels=1, **changes):
    kwargs = ARCHITECTURE["arch_kwargs"] | changes
    return {
        "network_class_name": ARCHITECTURE["network_class_name"],
        "arch_kwargs": kwargs,
        "input_channels": channels,
    }


def plain_architecture(features, **changes):
    """Return the architecture of a network that nnU-Net plans, with strided convolutions and instance norm."""
    stages = len(features)
    kwargs = {
        "n_stages": stages,
        "features_per_stage": features,
        "kernel_sizes": [[3, 3]] * stages,
        "strides": [[1, 1]] + [[2, 2]] * (stages - 1),
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
    }
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": ARCHITECTURE["arch_kwargs"] | kwargs,
        "input_channels": 1,
    }


@pytest.fixture(scope="module")
def small():
    """Return random weights of a small version of the authors' network, an input, and the map of each stage."""
    arrays = dict(np.load(DATA / "authors_network.npz"))
    tensors = {key: torch.from_numpy(value) for key, value in arrays.items()}
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
    return weights, {k: v for k, v in tensors.items() if not k.startswith("weights/")}


@pytest.fixture
def small_file(small, tmp_path):
    """Return a file in the authors' format."""
    file = tmp_path / "MACL_CHD.pth"
    torch.save({"epoch": 100, "model_state_dict": small[0], "optimizer": {"state": {}}}, file)
    return file


@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_map_equals_that_of_the_authors_network(small, tmp_path, prefix):
    weights, maps = small
    file = tmp_path / "MACL_CHD.pth"
    torch.save({"model_state_dict": {f"{prefix}{key}": value for key, value in weights.items()}}, file)
    pretrained = formats.load_weights(file)
    network = build(pretrained.architecture)
    state = network.state_dict()
    fitted = plan_transfer(pretrained, state, pretrained.architecture)
    network.load_state_dict(state | fitted.weights)
    left = {key for key in state if key not in fitted.weights}
    assert left and all(".seg_layers." in key for key in left)
    network.eval()
    # The maps come from the adapter that pre-training uses.
    ours = pretrainable(network, 4).eval()
    with torch.no_grad():
        found = {f"encoder_stage_{n}": m for n, m in enumerate(ours.encode(maps["input"]), 1)}
        found["bottleneck"] = found.pop("encoder_stage_5")
        decoded = ours.decode(ours.encode(maps["input"]))[1:]
        found |= {f"decoder_stage_{n}": m for n, m in enumerate(decoded, 1)}
    names = maps.keys() - {"input"}
    assert len(names) == 6
    for name in names:
        assert found[name].shape == maps[name].shape
        assert (found[name] - maps[name]).abs().max() <= 1e-5, name


@pytest.mark.parametrize("channels", [1, 4])
def test_the_published_files_fit_the_planned_network_key_by_key(tmp_path, channels):
    shapes = json.loads((DATA / "authors_checkpoint_keys.json").read_text())["keys"]
    shapes["share_encoder.contr_1_1.0.weight"][1] = channels
    torch.save({"model_state_dict": {key: torch.zeros(shape) for key, shape in shapes.items()}}, tmp_path / "MACL.pth")
    pretrained = formats.load_weights(tmp_path / "MACL.pth")
    assert pretrained.architecture == paper_architecture(channels)
    own = {key: value.shape for key, value in build(paper_architecture(channels)).state_dict().items()}
    unet = {key for key in own if ".seg_layers." not in key and not key.startswith("decoder.encoder.")}
    assert {key: value.shape for key, value in pretrained.weights.items()} == {key: own[key] for key in unet}


def test_another_file_with_the_same_key_is_rejected(small, tmp_path):
    torch.save({"model_state_dict": {"fc.weight": torch.zeros(3)}}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"resnet\.pth .*model_state_dict.*upscale"):
        formats.load_weights(tmp_path / "resnet.pth")


def test_transfer_to_nnunets_own_network_explains_every_stage(small_file):
    pretrained = formats.load_weights(small_file)
    ours = plain_architecture([4, 8, 16, 32, 64, 64])
    network = build(ours)
    fitted = plan_transfer(pretrained, network.state_dict(), ours)
    rows = {row.part: row for row in fitted.rows}
    network.load_state_dict(network.state_dict() | fitted.weights)
    stages = [f"encoder.stages.{stage}" for stage in range(6)]
    assert [rows[stage].how for stage in stages] == [AS_IT_IS] * 4 + [ADAPTED, NOT_TAKEN]
    assert "BatchNorm2d there, InstanceNorm2d here" in rows[stages[0]].why and "pool" not in rows[stages[0]].why
    assert "max-pooling there, strided convolutions here" in rows[stages[1]].why
    centre = rows[stages[4]]
    # The two convolutions are transferred, each with its bias under two names. The two norms are not.
    assert (
        (centre.taken, centre.tensors) == (8, 16) and "no norm there" in centre.why and "BatchNorm2d" not in centre.why
    )
    assert rows[stages[5]].why == "no such stage there"
    assert rows["decoder.stages.4"].how == AS_IT_IS and "BatchNorm2d there" in rows["decoder.stages.4"].why
    assert "pool" not in rows["decoder.stages.4"].why
    assert torch.equal(
        network.state_dict()["encoder.stages.2.0.convs.1.conv.weight"],
        pretrained.weights["encoder.stages.2.0.convs.1.conv.weight"],
    )


def test_its_submodules_can_be_loaded_like_those_of_nnunets_networks():
    check_submodules(build(paper_architecture(2, features_per_stage=[4, 8, 16, 32, 64])))


def test_weights_that_do_not_fit_are_rejected_with_a_table_of_all_stages(small_file, workspace):
    """The network of the generated data set has other widths."""
    out = workspace.run("nnUNetv2_macl_transfer", small_file, "901", "-c", "2d", code=1)
    assert "Traceback" not in out and "there, encoder.stages.1.0.convs.0.conv.weight is" not in out
    assert "encoder.stages.1" in out and "is [8, 4, 3, 3] there, [64, 32, 3, 3] here" in out


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["restore", "macl_0.1", "paper"])
def test_all_commands_with_deep_supervision(workspace, tmp_path, recipe):
    """Run pre-training, export, fine-tuning with deep supervision, and prediction."""
    out = workspace.run("nnUNetv2_macl_network", "901", "paper")
    assert "need nnunetv2_macl" in out
    workspace.pretrain("901", "-c", "2d", "-p", "nnUNetPlans_paper", "-recipe", recipe)
    run = workspace.run_folder("nnUNetTrainerMACLPretrain", "nnUNetPlans_paper")
    workspace.run("nnUNetv2_macl_export", run, "-o", tmp_path / "weights.zip")
    trained = formats.load_weights(run)
    assert trained.architecture == paper_architecture()
    mine = workspace.folder / "mine"
    mine.mkdir()
    (mine / "nnUNetTrainerMACL_quick.py").write_text(
        "from nnunetv2_macl.training.finetune import nnUNetTrainerMACL\n\n"
        "class nnUNetTrainerMACL_quick(nnUNetTrainerMACL):\n    finetuning_epochs = 1\n\n"
        "    def __init__(self, plans, configuration, fold, dataset_json, device):\n"
        "        super().__init__(plans, configuration, fold, dataset_json, device)\n"
        "        self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 1\n"
    )
    found = {"nnUNet_extTrainer": workspace.environment["nnUNet_extTrainer"] + f":{mine}"}
    common = ("-p", "nnUNetPlans_paper", "-tr", "nnUNetTrainerMACL_quick", "-device", "cpu")
    out = workspace.run("nnUNetv2_train", "901", "2d", "0", *common, **found)
    encoder = len([key for key in trained.weights if key.startswith("encoder.")])
    assert f"encoder: {encoder} of {encoder} tensors" in out and "Mean Validation Dice" in out
    images = workspace.raw / DATASET / "imagesTs"
    predict = ("nnUNetv2_predict", "-d", "901", "-c", "2d", "-f", "0", "-i", images, "-o", tmp_path / "out", *common)
    workspace.run(*predict, **found)
    assert list((tmp_path / "out").glob("*.nii.gz"))


def test_an_exported_checkpoint_with_this_network_can_be_read_again(small_file, tmp_path):
    """A file of this package that names the network of this package is accepted."""
    formats.export(small_file, tmp_path / "whole.pth", "nnunet")
    formats.export(tmp_path / "whole.pth", tmp_path / "again.pth", "nnunet")
    one, other = (checkpoints.load(tmp_path / f"{name}.pth")["network_weights"] for name in ("whole", "again"))
    assert all(torch.equal(one[key], other[key]) for key in one)
