"""Derive the MACL plan from the user's options and write it, or load a plan that the user edited."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import resource_folder
from nnunetv2_macl.nnunet import DatasetConfiguration, read_json
from nnunetv2_macl.planning.derive import derive_plan
from nnunetv2_macl.planning.memory import check_gpu_memory
from nnunetv2_macl.planning.plan import MACLPlan, check_plan, plan_file, read_plan, was_edited, write_plan
from nnunetv2_macl.recipe import check_values, load_recipe, recipe_from_values, settings_as_text, with_settings
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
    unlabelled_datasets: Sequence[str] = (),
    skip_unreadable: bool = False,
    channel_map: Mapping[str, str] | None = None,
    gpu_memory_gb: float | None = None,
    pretrained_weights: Path | None = None,
) -> MACLPlan:
    """Return the MACL plan, and write it to the folder of nnU-Net's plan.

    The plan is derived from the arguments. If the user edited the file, the edited plan is used, with ``values`` replaced.

    Args:
        configuration: Configuration of nnU-Net's plan.
        recipe: Name or file of a recipe. None is the default recipe.
        values: Recipe keys that replace those of the recipe.
        unlabelled_datasets: Full names of further raw data sets.
        skip_unreadable: Whether to leave out images that cannot be used.
        channel_map: Channel names of ``unlabelled_datasets``, by the configuration's own channel names, if they differ.
        gpu_memory_gb: GPU memory for the batch, GB. None is the memory that nnU-Net planned for.
        pretrained_weights: File or folder of weights that pre-training starts from. None initialises the network randomly.

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
        given = {
            "unlabelled_datasets": list(unlabelled_datasets),
            "skip_unreadable": skip_unreadable,
            "channel_map": dict(channel_map or {}),
            "pretrained_weights": _start(pretrained_weights, configuration, plan),
        }
        return _adapt_edited(plan, file, values, {key: value for key, value in given.items() if value})
    name = recipe or DEFAULT_RECIPE
    derived = derive_plan(
        configuration,
        load_recipe(name, resource_folder("plans"), values),
        unlabelled_datasets=unlabelled_datasets,
        skip_unreadable=skip_unreadable,
        channel_map=channel_map,
        gpu_memory_gb=gpu_memory_gb,
    )
    # Record only the name, because a path would reveal the user's folders when the plan is shared.
    plan = replace(derived, recipe_name=Path(name).name, settings=values)
    plan = replace(plan, pretrained_weights=_start(pretrained_weights, configuration, plan))
    # Write only a changed plan, so that a read-only folder works if the plan is there already.
    if not file.is_file() or read_json(file, "") != plan.as_json():
        write_plan(plan, file)
    return plan


def _start(weights: Path | None, configuration: DatasetConfiguration, plan: MACLPlan) -> dict[str, Any] | None:
    return None if weights is None else plan_start(weights, configuration, plan.geometry, plan.get_recipe())


def _adapt_edited(plan: MACLPlan, file: Path, values: dict[str, Any], given: dict[str, Any]) -> MACLPlan:
    _refuse_derived(plan, file, values)
    logger.info("Using the edited MACL plan %s (move the file away to derive the plan again)", file)
    adapted = replace(plan.with_recipe(values), **given)
    if adapted != plan:
        write_plan(adapted, file, edited=True)
    return adapted


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
