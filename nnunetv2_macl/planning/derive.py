"""Derive a MACL plan from nnU-Net's plan and a recipe, with a reason for each derived value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from nnunetv2.configuration import ANISO_THRESHOLD

from nnunetv2_macl.data import Sampling
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.methods.base import Geometry
from nnunetv2_macl.methods.config import AUTO, BranchKeys
from nnunetv2_macl.methods.registry import methods_of
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.planning.memory import MemoryEstimate, check_gpu_memory, plan_batch
from nnunetv2_macl.planning.plan import MACLPlan, volume_patch
from nnunetv2_macl.planning.positives import ONLY_THE_OWN_VIEW, plan_position_groups, plan_threshold, resampled_shapes
from nnunetv2_macl.recipe import Recipe


def derive_plan(
    configuration: DatasetConfiguration,
    recipe: Recipe,
    *,
    unlabelled_datasets: Sequence[str] = (),
    skip_unreadable: bool = False,
    channel_map: Mapping[str, str] | None = None,
    gpu_memory_gb: float | None = None,
) -> MACLPlan:
    """Return the MACL plan of a configuration.

    Args:
        configuration: Configuration of nnU-Net's plan.
        recipe: The recipe.
        unlabelled_datasets: Full names of further raw data sets.
        skip_unreadable: Whether to leave out images that cannot be used.
        channel_map: Channel names of ``unlabelled_datasets``, by the configuration's own channel names, if they differ.
        gpu_memory_gb: GPU memory for the batch, GB. None is the memory that nnU-Net planned for.

    Raises:
        UserError: The recipe does not fit the network, the network cannot be pre-trained, or nnU-Net's fingerprint is missing.
    """
    geometry = _joint_geometry(configuration, recipe)
    patch = geometry.patch_size
    axes = len(patch)
    stride = np.prod(np.asarray(configuration.strides)[: geometry.auxiliary_stage], axis=0)
    memory = MemoryEstimate(configuration, geometry, recipe)
    target, target_reason = configuration.gpu_memory_target()
    if gpu_memory_gb is not None:
        target, target_reason = check_gpu_memory(gpu_memory_gb), "set by -gpu_memory"
    batch = plan_batch(memory, recipe, target)
    group_size, group_reason = plan_position_groups(axes, batch.size, recipe)
    sampling = Sampling(volume_patch(patch), batch.size, group_size, recipe.seed)
    threshold, expected, threshold_reason = plan_threshold(resampled_shapes(configuration), sampling, recipe)
    if recipe.compares_positions and threshold == 0:
        group_size, group_reason = 1, ONLY_THE_OWN_VIEW
    if axes == 2:
        out_of_plane, out_reason = 0.0, "2D"
    elif max(patch) / patch[0] > ANISO_THRESHOLD:
        out_of_plane, out_reason = 0.0, "the patch is anisotropic, and nnU-Net rotates such patches only in plane"
    else:
        out_of_plane, out_reason = 30.0, "degrees, nnU-Net's own range for isotropic patches"
    return MACLPlan(
        dataset_name=configuration.dataset_name,
        plans_name=configuration.plans_name,
        configuration=configuration.name,
        nnunet_plan_checksum=configuration.plan_checksum(),
        unlabelled_datasets=list(unlabelled_datasets),
        skip_unreadable=skip_unreadable,
        channel_map=dict(channel_map or {}),
        decoder_stages=geometry.decoder_stages,
        auxiliary_stage=geometry.auxiliary_stage,
        scale=geometry.scale,
        patch_size=patch,
        dominant_patch_size=geometry.dominant_patch_size,
        grid=[n // int(s) for n, s in zip(patch, stride, strict=True)],
        batch_size=batch.size,
        patches_at_once=batch.at_once,
        position_group_size=group_size,
        threshold=threshold,
        expected_positives=round(expected, 2),
        out_of_plane_rotation=out_of_plane,
        gpu_memory_gb=target,
        memory_gib=round(memory.gib(batch.size, batch.at_once), 2),
        memory_mixed_precision_gib=round(memory.gib(batch.size, batch.at_once, mixed_precision=True), 2),
        recipe=recipe.as_dict(),
        reasons={
            "decoder_stages, auxiliary_stage, scale, patch_size": geometry.reason,
            "dominant_patch_size": "patch_size divided by scale",
            "grid": f"size of both dense maps: patch_size divided by the stride at stage {geometry.auxiliary_stage}",
            "gpu_memory_gb": target_reason,
            "batch_size": batch.size_reason,
            "patches_at_once": batch.at_once_reason,
            "position_group_size": group_reason,
            "threshold": threshold_reason,
            "expected_positives": "mean per anchor, including its own other view, counted over batches drawn as in training",
            "out_of_plane_rotation": out_reason,
            "memory_gib": "peak of activations, weights, gradients and optimiser state in float32; "
            "memory_mixed_precision_gib is the peak on a GPU with mixed precision",
        },
    )


def _joint_geometry(configuration: DatasetConfiguration, recipe: Recipe) -> Geometry:
    """Return the geometry that all methods of a recipe share.

    A method with two branches needs its own patch size. Otherwise all methods read the largest number of decoder stages.

    Raises:
        UserError: The recipe sets a key of one method, and the geometry of another method is used.
    """
    # Of equal geometries, that of a method with keys for it comes first.
    methods = sorted(
        methods_of(recipe.method), key=lambda m: (not m.has_two_branches, not issubclass(m.Config, BranchKeys))
    )
    geometries = [m.plan_geometry(configuration.patch_size, configuration.strides, recipe) for m in methods]
    geometry = geometries[0] if methods[0].has_two_branches else max(geometries, key=lambda g: g.decoder_stages)
    for method, own in zip(methods, geometries, strict=True):
        for key in BranchKeys.model_fields if issubclass(method.Config, BranchKeys) else ():
            if getattr(recipe, key) != AUTO and getattr(own, key) != getattr(geometry, key):
                raise UserError(
                    f"The recipe has {key}={getattr(recipe, key)}, a key of the method {method.name}, which alone has "
                    f"decoder_stages={own.decoder_stages} with it. {recipe.method} has decoder_stages={geometry.decoder_stages}. "
                    f"Leave out {key}, or also set: --set decoder_stages={geometry.decoder_stages}"
                )
    return geometry
