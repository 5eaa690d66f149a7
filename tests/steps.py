"""Training steps on a small U-Net, for tests that compare two ways of computing a step."""

from dataclasses import replace

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from nnunetv2_macl import distributed
from nnunetv2_macl.factory import build_optimizer
from nnunetv2_macl.methods.base import Geometry, Progress, StepRandom, to_device
from nnunetv2_macl.methods.model import PretrainingModel
from nnunetv2_macl.networks.registry import pretrainable
from nnunetv2_macl.planning.plan import MACLPlan
from nnunetv2_macl.recipe import recipe_from_values
from nnunetv2_macl.training.step import TrainingStep

PATCH = 32


def unet(norm=nn.InstanceNorm2d):
    torch.manual_seed(0)
    return PlainConvUNet(
        1, 4, (4, 8, 12, 16), nn.Conv2d, 3, (1, 2, 2, 2), 1, 3, 1, norm_op=norm, norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, conv_bias=True, deep_supervision=True,
    )  # fmt: skip


def recipe_of(**values):
    return recipe_from_values(values, "test")


def model_of(unet, patch, recipe=None, **levels):
    """Return the model of a recipe around a U-Net. ``levels`` replaces the default levels of the geometry."""
    recipe = recipe or recipe_of()
    geometry = Geometry(patch_size=list(patch), **({"decoder_stages": 1, "auxiliary_stage": 4} | levels))
    return PretrainingModel(pretrainable(unet, geometry.decoder_stages), geometry, recipe)


def embeddings_of(model, patches):
    """Return the embeddings of all methods for patches, as in the first step of a training."""
    random = StepRandom(0, 0, len(patches), slice(None), patches.shape[1], tuple(patches.shape[2:]))
    numbers, found = to_device(model.views.draw(random), patches.device), {}
    for method in model:
        found |= method.project(method.encode(method.views.make(patches, numbers[method.name], Progress(0, 2, 2))))
    return found


def plan(batch_size, patches_at_once, recipe):
    return MACLPlan(
        dataset_name="Dataset001_Test", plans_name="nnUNetPlans", configuration="2d", nnunet_plan_checksum="",
        unlabelled_datasets=[], skip_unreadable=False, channel_map={}, decoder_stages=1, auxiliary_stage=4, scale=[2, 2],
        patch_size=[PATCH, PATCH], dominant_patch_size=[PATCH // 2] * 2, grid=[4, 4], batch_size=batch_size,
        patches_at_once=patches_at_once, position_group_size=1, threshold=0.3, expected_positives=1.0,
        out_of_plane_rotation=0.0, gpu_memory_gb=8, memory_gib=1, memory_mixed_precision_gib=1, recipe=recipe.as_dict(),
        reasons={},
    )  # fmt: skip


def training_step(
    batch_size, patches_at_once, recipe=None, dtype=torch.float64, norm=nn.InstanceNorm2d, unnormalised=()
):
    recipe = recipe or recipe_of(own_view_weight=0.5)
    made = plan(batch_size, patches_at_once, recipe)
    geometry = replace(made.geometry, channels_without_zscore=unnormalised)
    model = PretrainingModel(pretrainable(unet(norm), made.decoder_stages), geometry, recipe).to(dtype)
    if distributed.world_size() > 1:
        distributed.synchronise_batch_norm(model)
    optimizer = build_optimizer(model, recipe)
    return TrainingStep(model, optimizer, LambdaLR(optimizer, lambda step: 1.0), None, made, torch.device("cpu"))


def batch(patches, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return {
        "data": torch.randn(patches, 1, PATCH, PATCH, generator=generator, dtype=dtype),
        "positions": torch.rand(patches, 3, generator=generator),
    }


def gradients(step):
    return {name: p.grad.clone() for name, p in step.model.named_parameters() if p.grad is not None}
