"""Networks of nnU-Net's planners, and networks written by hand, must get a legal MACL plan."""

import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import set_folders
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)
from steps import embeddings_of, recipe_of
from torch import nn

from benchmarks.planned import FLAT, Fingerprint, plan_with_nnunet
from nnunetv2_macl.factory import build_model
from nnunetv2_macl.files import resource_folder
from nnunetv2_macl.methods.base import Geometry
from nnunetv2_macl.methods.branches import plan_branches
from nnunetv2_macl.methods.model import PretrainingModel
from nnunetv2_macl.networks.registry import pretrainable
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.planning.derive import derive_plan
from nnunetv2_macl.planning.plan import MACLPlan, check_plan, plan_file, read_plan, was_edited, write_plan
from nnunetv2_macl.recipe import Recipe, load_recipe

PLANNERS = (ExperimentPlanner, nnUNetPlannerResEncM, nnUNetPlannerResEncL, nnUNetPlannerResEncXL)


CT, MR = ("CT",), ("MR",)
QUICK = (
    Fingerprint("ct_isotropic", CT, (200, 256, 256), (1.0, 1.0, 1.0)),
    Fingerprint("hippocampus", MR, (36, 50, 35), (1.0, 1.0, 1.0)),
    Fingerprint("acdc", MR, (9, 237, 208), (10.0, 1.5, 1.5), nnUNetPlannerResEncM),
    Fingerprint("photographs", ("R", "G", "B"), (1, 512, 512), (FLAT, 1.0, 1.0), nnUNetPlannerResEncL),
    Fingerprint("brain_of_four", ("T1", "T1c", "T2", "FLAIR"), (138, 170, 138), (1.0, 1.0, 1.0), nnUNetPlannerResEncM),
    Fingerprint("smallest", MR, (32, 32, 32), (1.0, 1.0, 1.0)),
)
# Shape and spacing. Planners, channels and modalities alternate over the list.
_SHAPES = (
    ((32, 32, 32), (3.0, 3.0, 3.0)),
    ((32, 512, 512), (5.0, 0.5, 0.5)),
    ((32, 320, 320), (3.6, 0.6, 0.6)),
    ((33, 47, 61), (1.0, 1.0, 1.0)),
    ((40, 40, 400), (1.0, 1.0, 1.0)),
    ((48, 512, 512), (5.0, 0.8, 0.8)),
    ((50, 380, 380), (3.0, 0.4, 0.4)),
    ((64, 64, 64), (2.0, 2.0, 2.0)),
    ((64, 128, 96), (1.5, 1.0, 1.25)),
    ((80, 300, 60), (1.0, 1.0, 1.0)),
    ((96, 512, 512), (2.5, 0.75, 0.75)),
    ((100, 512, 512), (8.0, 0.8, 0.8)),
    ((128, 128, 128), (1.0, 1.0, 1.0)),
    ((150, 150, 150), (0.3, 0.3, 0.3)),
    ((155, 240, 240), (1.0, 1.0, 1.0)),
    ((200, 64, 64), (1.0, 4.0, 4.0)),
    ((256, 256, 36), (0.7, 0.7, 6.5)),
    ((256, 256, 256), (0.8, 0.8, 0.8)),
    ((300, 512, 512), (1.0, 0.7, 0.7)),
    ((320, 320, 32), (0.5, 0.5, 5.0)),
    ((350, 350, 350), (0.5, 0.5, 0.5)),
    ((400, 512, 512), (1.25, 0.8, 0.8)),
    ((512, 512, 512), (0.5, 0.5, 0.5)),
    ((512, 32, 512), (0.6, 6.0, 0.6)),
    ((32, 60, 60), (10.0, 1.0, 1.0)),
    ((35, 36, 512), (2.0, 2.0, 0.4)),
    ((32, 512, 40), (4.0, 1.0, 4.0)),
    ((1, 32, 32), (FLAT, 1.0, 1.0)),
    ((1, 33, 500), (FLAT, 1.0, 1.0)),
    ((1, 48, 64), (FLAT, 1.0, 1.0)),
    ((1, 128, 128), (FLAT, 0.5, 0.5)),
    ((1, 224, 224), (FLAT, 1.0, 1.0)),
    ((1, 300, 40), (FLAT, 1.0, 1.0)),
    ((1, 400, 256), (FLAT, 0.2, 0.4)),
    ((1, 512, 512), (FLAT, 1.0, 1.0)),
    ((1, 512, 512), (FLAT, 0.1, 1.0)),
)
MATRIX = QUICK + tuple(
    Fingerprint(
        f"{'x'.join(map(str, shape))}_{'ct' if number % 2 else 'mr'}",
        ("CT" if number % 2 else "MR", *(f"extra{i}" for i in range(number % 5))),
        shape,
        spacing,
        PLANNERS[number % 4],
        cases=4 + 3 * (number % 5),
    )
    for number, (shape, spacing) in enumerate(_SHAPES)
)


def check_legal(plan: MACLPlan, configuration: DatasetConfiguration) -> None:
    """Assert that a plan fits its network, and that its file can be read and passes the check."""
    with torch.device("meta"):
        model = build_model(configuration, plan.geometry, recipe_of())
    patches = torch.empty(2, len(configuration.channel_names), *plan.patch_size, device="meta")
    outputs = embeddings_of(model, patches)
    assert outputs["dense_dominant"].shape == outputs["dense_auxiliary"].shape
    assert list(outputs["dense_dominant"].shape[2:]) == plan.grid
    assert np.prod(outputs["bottleneck_dominant"].shape[2:]) >= (4 if len(plan.patch_size) == 2 else 8)

    deepest = np.prod(np.asarray(configuration.strides), axis=0)
    assert not (np.asarray(plan.patch_size) % (np.asarray(plan.scale) * deepest)).any()
    voxels = np.prod(plan.patch_size) / np.prod(configuration.patch_size)
    assert 0.25 <= voxels <= 4, f"the patch has {voxels:.2f} times the voxels of nnU-Net's"
    # Half precision needs less memory than float32, apart from cuBLAS's workspace of 32 MiB on a GPU.
    assert plan.batch_size >= 2 and 0 < plan.memory_mixed_precision_gib - 32 / 1024 < plan.memory_gib
    assert 1 <= plan.expected_positives <= 2 * plan.batch_size - 1
    assert all(reason for reason in plan.reasons.values())
    file = plan_file(configuration)
    write_plan(plan, file)
    assert read_plan(file) == plan and not was_edited(file)
    check_plan(plan, configuration, file)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    set_folders(monkeypatch, tmp_path)
    return tmp_path


def check_all_configurations(fingerprint: Fingerprint, folder) -> list[MACLPlan]:
    """Assert that all configurations that nnU-Net plans for a fingerprint get a legal plan."""
    dataset, plans_name = plan_with_nnunet(fingerprint, folder)
    names = json.loads((folder / "nnUNet_preprocessed" / dataset / f"{plans_name}.json").read_text())["configurations"]
    plans = []
    for name in sorted(set(names) - {"3d_cascade_fullres"}):
        configuration = DatasetConfiguration.load(dataset, plans_name, name)
        plan = derive_plan(configuration, recipe_of())
        check_legal(plan, configuration)
        plans.append(plan)
    expected = {"2d"} if fingerprint.shape[0] == 1 else {"2d", "3d_fullres"}
    assert expected <= {plan.configuration for plan in plans}
    return plans


@pytest.mark.parametrize("fingerprint", QUICK, ids=lambda f: f.name)
def test_networks_of_nnunets_planners(fingerprint, folders):
    check_all_configurations(fingerprint, folders)


RECIPES = sorted(file.stem for file in resource_folder("plans").glob("*.json"))


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=() if name == "simclr" else pytest.mark.slow) for name in RECIPES]
)
def test_every_recipe_gets_a_legal_plan_for_a_deep_network(recipe, folders):
    """A total stride of 32 is usual. Methods with one branch have no second stage that they could compare with."""
    dataset, plans_name = plan_with_nnunet(QUICK[2], folders)
    configuration = DatasetConfiguration.load(dataset, plans_name, "2d")
    assert np.prod(configuration.strides, axis=0).min() >= 32
    plan = derive_plan(configuration, load_recipe(recipe, resource_folder("plans")))
    check_plan(plan, configuration, plan_file(configuration))


@pytest.mark.slow
@pytest.mark.parametrize("fingerprint", MATRIX[len(QUICK) :], ids=lambda f: f.name)
def test_more_networks_of_nnunets_planners(fingerprint, folders):
    check_all_configurations(fingerprint, folders)


@st.composite
def fingerprints(draw) -> Fingerprint:
    flat = draw(st.booleans())
    size = st.integers(32, 512)
    mm = st.floats(0.2, 8.0).map(lambda value: round(value, 2))
    shape = (1 if flat else draw(size), draw(size), draw(size))
    spacing = (FLAT if flat else draw(mm), draw(mm), draw(mm))
    channels = tuple(draw(st.lists(st.sampled_from(("CT", "MR", "PET")), min_size=1, max_size=5)))
    return Fingerprint("drawn", channels, shape, spacing, draw(st.sampled_from(PLANNERS)), draw(st.integers(1, 60)))


_ANY_FOLDER = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]  # Each example overwrites the last one.


@given(fingerprints())
@settings(max_examples=2, deadline=None, suppress_health_check=_ANY_FOLDER)
def test_networks_for_random_fingerprints(folders, fingerprint):
    check_all_configurations(fingerprint, folders)


@pytest.mark.slow
@given(fingerprints())
@settings(max_examples=40, deadline=None, suppress_health_check=_ANY_FOLDER)
def test_networks_for_many_random_fingerprints(folders, fingerprint):
    check_all_configurations(fingerprint, folders)


class Topology(NamedTuple):
    """A U-Net that a user may write into a plan by hand."""

    patch: list[int]
    strides: list[list[int]]
    kernels: list[list[int]]
    blocks: list[int]
    decoder_blocks: list[int]
    residual: bool


@st.composite
def topologies(draw) -> Topology:
    """Draw U-Nets of 3 to 8 stages with any strides, kernels and depths, and patches that need not be multiples."""
    axes, stages = draw(st.integers(2, 3)), draw(st.integers(3, 8))

    def each(values: st.SearchStrategy[int], number: int) -> list[int]:
        return draw(st.lists(values, min_size=number, max_size=number))

    strides = [[1] * axes] + [each(st.sampled_from((1, 2, 2, 2, 3, 4)), axes) for _ in range(stages - 1)]
    deepest = np.prod(strides, axis=0)
    patch = [max(1, int(n * draw(st.floats(1.0, 6.0)))) for n in np.minimum(deepest, 256)]
    kernels = [each(st.sampled_from((1, 3, 3)), axes) for _ in range(stages)]
    depth = st.integers(1, 4)
    return Topology(patch, strides, kernels, each(depth, stages), each(depth, stages - 1), draw(st.booleans()))


def build(topology: Topology, geometry: Geometry) -> PretrainingModel:
    axes, stages = len(topology.patch), len(topology.strides)
    depth = "n_blocks_per_stage" if topology.residual else "n_conv_per_stage"
    with torch.device("meta"):
        unet = (ResidualEncoderUNet if topology.residual else PlainConvUNet)(
            1,
            stages,
            [min(4 * 2**i, 32) for i in range(stages)],
            (nn.Conv2d, nn.Conv3d)[axes - 2],
            topology.kernels,
            topology.strides,
            num_classes=2,
            n_conv_per_stage_decoder=topology.decoder_blocks,
            norm_op=(nn.InstanceNorm2d, nn.InstanceNorm3d)[axes - 2],
            norm_op_kwargs={"affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            **{depth: topology.blocks},
        )
        return PretrainingModel(pretrainable(unet, geometry.decoder_stages), geometry, recipe_of())


def check_topology(topology: Topology, recipe: Recipe) -> None:
    levels = plan_branches(topology.patch, topology.strides, recipe)
    total = np.cumprod(topology.strides, axis=0)
    scale, patch = np.array(levels.scale), np.array(levels.patch_size)
    assert levels.reason and not (patch % (scale * total[-1])).any()
    # This fails if the bottleneck has a single voxel, because of instance norm.
    outputs = embeddings_of(build(topology, levels), torch.empty(2, 1, *patch, device="meta"))
    assert outputs["dense_dominant"].shape == outputs["dense_auxiliary"].shape
    assert tuple(outputs["dense_dominant"].shape[2:]) == tuple(patch // total[levels.auxiliary_stage - 1])
    assert np.prod(outputs["bottleneck_dominant"].shape[2:]) >= (4 if len(patch) == 2 else 8)


@given(topologies())
@settings(max_examples=40, deadline=None)
def test_networks_written_by_hand(topology):
    check_topology(topology, recipe_of())


@pytest.mark.slow
@given(topologies(), st.data())
@settings(max_examples=150, deadline=None)
def test_recipes_on_networks_written_by_hand(topology, data):
    """The recipe may fix any K and e that the network has."""
    stages = len(topology.strides)
    k = data.draw(st.integers(0, stages - 1))
    check_topology(topology, recipe_of())
    check_topology(topology, recipe_of(decoder_stages=k, auxiliary_stage=data.draw(st.integers(stages - k, stages))))


def test_a_bottleneck_of_one_voxel_gets_a_larger_patch():
    levels = plan_branches([8, 8], [[1, 1], [8, 8], [1, 1]], recipe_of())
    assert (levels.decoder_stages, levels.scale, levels.patch_size) == (0, [1, 1], [16, 16])
    assert "only the encoder is trained" in levels.reason and "changed from nnU-Net's 8x8" in levels.reason
