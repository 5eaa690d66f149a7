"""Derive a MACL plan from nnU-Net's plan and a recipe, with a reason for each derived value, or load an edited plan."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.configuration import ANISO_THRESHOLD

from nnunetv2_macl.data import Sampling
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import resource_folder
from nnunetv2_macl.methods.base import Geometry
from nnunetv2_macl.methods.config import AUTO, BranchKeys
from nnunetv2_macl.methods.registry import methods_of
from nnunetv2_macl.nnunet import DatasetConfiguration, read_json
from nnunetv2_macl.planning.memory import MemoryEstimate, check_gpu_memory, plan_batch
from nnunetv2_macl.planning.plan import (
    MACLPlan,
    check_plan,
    plan_file,
    read_plan,
    volume_patch,
    was_edited,
    write_plan,
)
from nnunetv2_macl.planning.positives import ONLY_THE_OWN_VIEW, plan_position_groups, plan_threshold, resampled_shapes
from nnunetv2_macl.recipe import (
    Recipe,
    check_values,
    load_recipe,
    recipe_from_values,
    settings_as_text,
    with_settings,
)
from nnunetv2_macl.start import plan_start

logger = logging.getLogger(__name__)

DEFAULT_RECIPE = "macl"
# `derive_plan` derives other values of the plan from these recipe keys. An edited plan can still get a new batch_size or
# patches_at_once, because nothing else depends on them.
_DERIVED_FROM = ("decoder_stages", "auxiliary_stage", "scale", "threshold", "limit_positives")


def derive_or_load_plan(
    configuration: DatasetConfiguration,
    *,
    recipe: str | Path | None = None,
    values: dict[str, Any] | None = None,
    gpu_memory_gb: float | None = None,
    pretrained_weights: Path | None = None,
    **images: Any,
) -> MACLPlan:
    """Return the MACL plan, and write it to the folder of nnU-Net's plan.

    The plan is derived from the arguments. If the user edited the file, the edited plan is used, with ``values`` replaced.

    Args:
        configuration: Configuration of nnU-Net's plan.
        recipe: Name or file of a recipe. None is the default recipe.
        values: Recipe keys that replace those of the recipe.
        gpu_memory_gb: GPU memory for the batch, GB. None is the memory that nnU-Net planned for.
        pretrained_weights: File or folder of weights that pre-training starts from. None initialises the network randomly.
        **images: The values of the plan that say which images are used: ``unlabelled_datasets``, ``skip_unreadable`` and
            ``channel_map``, see `MACLPlan`.

    Raises:
        UserError: The recipe or a value is wrong, an edited plan does not fit the network or the arguments, the weights are of a
            network too different from this one, or the network cannot be pre-trained.
    """
    values = values or {}
    configuration.check_network()
    check_values(values, "Command line")
    if gpu_memory_gb is not None:
        check_gpu_memory(gpu_memory_gb)
    file = plan_file(configuration)
    if file.is_file() and was_edited(file):
        plan = read_plan(file)
        check_plan(plan, configuration, file)
        if recipe is not None:
            raise UserError(
                f"{file} was edited, so it is not derived again from recipe '{recipe}'. Leave out -recipe to use the edited "
                "plan, or move the file away."
            )
        if gpu_memory_gb is not None:
            raise UserError(
                f"{file} was edited, so its batch is not planned again for -gpu_memory {gpu_memory_gb:g}. Give -batch_size "
                "instead, or move the file away."
            )
        _refuse_derived(plan, file, values)
        logger.info("Using the edited MACL plan %s (move the file away to derive the plan again)", file)
        given = images | {"pretrained_weights": _start(pretrained_weights, configuration, plan)}
        adapted = replace(plan.with_recipe(values), **{key: value for key, value in given.items() if value})
        if adapted != plan:
            write_plan(adapted, file, edited=True)
        return adapted
    name = recipe or DEFAULT_RECIPE
    derived = derive_plan(
        configuration, load_recipe(name, resource_folder("plans"), values), gpu_memory_gb=gpu_memory_gb
    )
    # Record only the name, because a path would reveal the user's folders when the plan is shared.
    plan = replace(derived, recipe_name=Path(name).name, settings=values, **images)
    plan = replace(plan, pretrained_weights=_start(pretrained_weights, configuration, plan))
    # Write only a changed plan, so that a read-only folder works if the plan is there already.
    if not file.is_file() or read_json(file, "") != plan.as_json():
        write_plan(plan, file)
    return plan


def _start(weights: Path | None, configuration: DatasetConfiguration, plan: MACLPlan) -> dict[str, Any] | None:
    return None if weights is None else plan_start(weights, configuration, plan.geometry, plan.get_recipe())


def _refuse_derived(plan: MACLPlan, file: Path, values: dict[str, Any]) -> None:
    """Raise UserError if other values of the plan depend on new recipe values, because an edited plan keeps its values."""
    before, after = plan.get_recipe(), recipe_from_values(with_settings(plan.recipe, values), "Command line")
    keys: tuple[str, ...] = _DERIVED_FROM
    if before.method != after.method:
        keys += tuple(values)
    was = before.as_dict()
    refused = {key: value for key, value in values.items() if key in keys and was.get(key) != value}
    if refused:
        raise UserError(
            f"{file} was edited, so it is not derived again for {', '.join(settings_as_text(refused))}. Edit the file, "
            "or move it away."
        )


def derive_plan(configuration: DatasetConfiguration, recipe: Recipe, *, gpu_memory_gb: float | None = None) -> MACLPlan:
    """Return the MACL plan of a configuration, without further data sets of images.

    Args:
        configuration: Configuration of nnU-Net's plan.
        recipe: The recipe.
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
        unlabelled_datasets=[],
        skip_unreadable=False,
        channel_map={},
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
