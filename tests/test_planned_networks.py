"""Networks of other libraries: equality with the originals, plans, pre-training, fine-tuning and prediction."""

import json

import numpy as np
import pytest
import torch
from conftest import DATASET, FEW_PROCESSES, set_folders
from dynamic_network_architectures.architectures import primus
from monai.networks import nets
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from steps import recipe_of

from nnunetv2_macl import checkpoints
from nnunetv2_macl.checkpoints import PretrainedWeights
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import resource_folder
from nnunetv2_macl.formats import as_nnssl
from nnunetv2_macl.networks import NAMES
from nnunetv2_macl.networks.base import class_name
from nnunetv2_macl.networks.planned import PlannedNetwork
from nnunetv2_macl.networks.primus import Primus, PrimusV2, PrimusV3
from nnunetv2_macl.networks.registry import families, family_of
from nnunetv2_macl.networks.swin_unetr import SwinUNETR
from nnunetv2_macl.networks.unetr import UNETR
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.planning.derive import derive_plan
from nnunetv2_macl.planning.network import explain_changes, plan_network, plannable

TRAINER = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2_macl.training.finetune import nnUNetTrainerMACL


class Quick:
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 1


class nnUNetTrainerQuick(Quick, nnUNetTrainer):
    pass


class nnUNetTrainerMACLQuick(Quick, nnUNetTrainerMACL):
    pass
"""
ORIGINALS = {
    Primus: primus.Primus,
    PrimusV2: primus.PrimusV2,
    PrimusV3: primus.PrimusV3,
    SwinUNETR: nets.SwinUNETR,
    UNETR: nets.UNETR,
}
EXAMPLES = [
    pytest.param(network, id=f"{type(network).__name__}-{axes}D")
    for axes in (2, 3)
    for family in families()
    for network in family.examples(axes)
    if isinstance(network, PlannedNetwork) and (axes == 2 or not isinstance(network, SwinUNETR))
]
# The quick suite has one configuration of each family.
QUICK = [("primus", 3), ("swin_unetr", 2), ("unetr", 2)]
PLANNED = [
    pytest.param(name, {2: "2d", 3: "3d_fullres"}[axes], marks=[] if (name, axes) in QUICK else pytest.mark.slow)
    for name, kind in plannable().items()
    if issubclass(kind, PlannedNetwork)
    for axes in kind.axes
]


def images_for(network):
    adapter = family_of(type(network))(network, 0)
    size = adapter.only_patch_size or [2 * n for n in adapter.patch_multiple]
    return torch.randn(1, 2, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("network", EXAMPLES)
def test_it_computes_what_the_original_network_computes(network):
    images = images_for(network)
    original = ORIGINALS[type(network)]
    network.eval()
    first, second = network(images)
    assert second.shape[2:] == tuple(n // 2 for n in first.shape[2:])
    torch.testing.assert_close(second.mean(), first.mean())
    network.decoder.deep_supervision = False
    assert torch.equal(network(images), first)
    with torch.no_grad():
        assert torch.equal(original.forward(network, images), first)
    # The names of the weights are those of the library.
    assert not {key for key in network.state_dict() if key.startswith("decoder.")}


@pytest.mark.parametrize("name, configuration", PLANNED)
def test_the_strides_of_the_plan_are_those_of_the_network(workspace, name, configuration):
    file = plan_network("901", name, configuration=configuration)
    planned = DatasetConfiguration.load("901", file.stem, configuration)
    architecture = planned.manager.configuration["architecture"]
    with torch.device("meta"):
        network = get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            1,
            3,
            deep_supervision=True,
        )
        outputs = network(torch.zeros(2, 1, *planned.patch_size))
    adapter = family_of(type(network))(network, 0)
    assert np.cumprod(planned.strides, axis=0).tolist() == [list(level.stride) for level in adapter.encoder_levels]
    assert adapter.only_patch_size in (None, tuple(planned.patch_size))
    # nnU-Net derives the sizes of the targets of deep supervision from the strides of the plan.
    scales = 1 / np.cumprod(np.vstack(planned.manager.pool_op_kernel_sizes), axis=0)[:-1]
    expected = [(2, 3, *(int(n * scale) for n, scale in zip(planned.patch_size, row, strict=True))) for row in scales]
    assert [tuple(output.shape) for output in outputs] == expected
    lines = explain_changes("901", "nnUNetPlans", file.stem, configuration)
    assert lines[0] == f"network: PlainConvUNet -> {type(network).__name__}"


def test_the_names_in_the_help_are_those_of_the_networks():
    assert set(NAMES) == {*plannable(), *(file.stem for file in (resource_folder("plans") / "networks").iterdir())}


@pytest.mark.parametrize(
    "plans, command",
    [
        ("nnUNetPlans_attention_unet", "nnUNetv2_macl_network 901 attention_unet -c 2d"),
        ("nnUNetPlans_primus_v2_B", "nnUNetv2_macl_network 901 primus_v2 -c 2d -size B"),
        ("my_plans_swin_unetr", "nnUNetv2_macl_network 901 swin_unetr -c 2d -p my_plans"),
        ("nnUNetPlans_paper", "nnUNetv2_macl_network 901 paper -c 2d"),
        (
            "nnUNetPlans_other",
            "nnUNetv2_plan_and_preprocess -d 901 -pl PLANNER -overwrite_plans_name nnUNetPlans_other",
        ),
    ],
)
def test_a_missing_plan_of_a_network_is_explained_by_the_command_that_writes_it(tmp_path, monkeypatch, plans, command):
    set_folders(monkeypatch, tmp_path)
    (tmp_path / "nnUNet_preprocessed" / DATASET).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"Type: {command}$"):
        DatasetConfiguration.load("901", plans, "2d")


def test_a_3d_network_is_rejected_for_slices(workspace):
    with pytest.raises(UserError, match="-c 3d_fullres"):
        plan_network("901", "primus")


def test_patches_of_another_size_than_the_position_embeddings_are_rejected(workspace):
    file = plan_network("901", "unetr")
    content = json.loads(file.read_text())
    content["configurations"]["2d"]["architecture"]["arch_kwargs"] |= {
        "img_size": [64, 64],
        "hidden_size": 12,
        "mlp_dim": 12,
    }
    file.write_text(json.dumps(content))
    words = r"macl .*\d+x\d+.*UNETR .*64x64.*-recipe restore"
    with pytest.raises(UserError, match=words):
        derive_plan(DatasetConfiguration.load("901", file.stem, "2d"), recipe_of(method="macl"))


def test_methods_that_unetr_cannot_show_are_rejected(workspace):
    target = DatasetConfiguration.load("901", plan_network("901", "unetr").stem, "2d")
    with pytest.raises(UserError, match=r"swav .*UNETR "):
        derive_plan(target, recipe_of(method="swav"))
    assert derive_plan(target, recipe_of(method="swav", small_views=0)).patch_size == target.patch_size
    with pytest.raises(UserError, match="gcl_image"):
        derive_plan(target, recipe_of(method="gcl"))


def test_they_cannot_be_exported_in_the_format_of_nnssl():
    kwargs = {"strides": [[1, 1], [2, 2], [8, 8]], "img_size": [32, 32], "hidden_size": 12, "mlp_dim": 12}
    architecture = {"network_class_name": class_name(UNETR), "arch_kwargs": kwargs, "input_channels": 1}
    with pytest.raises(UserError, match=r"UNETR.*FILE\.zip"):
        as_nnssl(PretrainedWeights([], {}, architecture, {}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, configuration, recipe, smaller",
    [
        ("primus", "3d_fullres", "simclr", {"embed_dim": 72, "eva_depth": 2, "eva_numheads": 2}),
        ("unetr", "2d", "restore", {"hidden_size": 24, "mlp_dim": 24}),
        ("swin_unetr", "2d", "macl", {"feature_size": 12}),
    ],
)
def test_all_commands_from_planning_to_prediction(workspace, tmp_path, name, configuration, recipe, smaller):
    """Run planning, pre-training, fine-tuning, training from scratch with nnU-Net's trainer, and prediction."""
    out = workspace.run("nnUNetv2_macl_network", "901", name, "-c", configuration)
    plans = f"nnUNetPlans_{name}"
    assert f"-p {plans}" in out and "need nnunetv2_macl" in out
    file = workspace.preprocessed / DATASET / f"{plans}.json"
    content = json.loads(file.read_text())
    content["configurations"][configuration]["architecture"]["arch_kwargs"] |= smaller
    file.write_text(json.dumps(content))
    if configuration == "3d_fullres":
        workspace.run("nnUNetv2_preprocess", "-d", "901", "-plans_name", plans, "-c", configuration, "-np", "1")
    workspace.pretrain("901", "-c", configuration, "-p", plans, "-recipe", recipe, **FEW_PROCESSES)
    run = workspace.run_folder("nnUNetTrainerMACLPretrain", plans, configuration)
    encoder = len(checkpoints.load(run / checkpoints.ENCODER_FILE)["network_weights"])

    mine = workspace.folder / "mine"
    mine.mkdir()
    (mine / "quick.py").write_text(TRAINER)
    found = FEW_PROCESSES | {"nnUNet_extTrainer": workspace.environment["nnUNet_extTrainer"] + f":{mine}"}
    for trainer in ("nnUNetTrainerMACLQuick", "nnUNetTrainerQuick"):
        train = ("nnUNetv2_train", "901", configuration, "0", "-p", plans, "-tr", trainer, "-device", "cpu")
        out = workspace.run(*train, "--npz", **found)
        assert "Mean Validation Dice" in out
        assert trainer == "nnUNetTrainerQuick" or f"encoder: {encoder} of {encoder} tensors" in out
    images = workspace.raw / DATASET / "imagesTs"
    predict = ("nnUNetv2_predict", "-d", "901", "-c", configuration, "-f", "0", "-i", images, "-o", tmp_path / "out")
    workspace.run(*predict, "-p", plans, "-tr", trainer, "-device", "cpu", "-npp", "1", "-nps", "1", **found)
    assert list((tmp_path / "out").glob("*.nii.gz"))
    best = ("nnUNetv2_find_best_configuration", "901", "-p", plans, "-tr", trainer, "-c", configuration, "-f", "0")
    workspace.run(*best, "-np", "1", **found)
