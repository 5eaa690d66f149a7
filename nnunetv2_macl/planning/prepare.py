"""From what the user asked for to the MACL plan on disk: derived anew, or the edited one as it stands."""

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

DEFAULT_RECIPE = "restore"
# recipe keys that `derive_plan` turns into other numbers of the plan; an edited plan takes batch and parts as they are given
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
    """Derive the MACL plan and write it beside nnU-Net's. One that the user edited is kept, and only given ``values``.

    Args:
        configuration: of nnU-Net.
        recipe: name or file; None is the default.
        values: recipe keys that win over the recipe's own.
        unlabelled_datasets: further raw data sets, by full name.
        skip_unreadable: leave out images that cannot be used.
        channel_map: the configuration's channel names to those of ``unlabelled_datasets``, where they have other names.
        gpu_memory_gb: what the batch may take; None is what nnU-Net planned for.
        pretrained_weights: File or folder of weights that pre-training starts from; None for a freshly initialised network.

    Raises:
        UserError: a wrong recipe or value; an edited plan that does not fit its network or the recipe asked for; weights of a
            network too unlike this one; a network that cannot be pre-trained.
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
                f"{file} was edited, so it is not derived again from recipe '{recipe}'. Leave out -recipe to use it as it "
                "stands, or move it away."
            )
        if gpu_memory_gb is not None:
            raise UserError(
                f"{file} was edited, so its batch is not planned again for -gpu_memory {gpu_memory_gb:g}. Leave that out "
                "and give -batch_size, or move the file away."
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
    # the name alone, because a path tells where on a machine a user keeps files
    plan = replace(derived, recipe_name=Path(name).name, settings=values)
    plan = replace(plan, pretrained_weights=_start(pretrained_weights, configuration, plan))
    # a folder that may only be read will do for the plan that is there
    if not file.is_file() or read_json(file, "") != plan.as_json():
        write_plan(plan, file)
    return plan


def _start(weights: Path | None, configuration: DatasetConfiguration, plan: MACLPlan) -> dict[str, Any] | None:
    return None if weights is None else plan_start(weights, configuration, plan.geometry, plan.get_recipe())


def _adapt_edited(plan: MACLPlan, file: Path, values: dict[str, Any], given: dict[str, Any]) -> MACLPlan:
    _refuse_derived(plan, file, values)
    logger.info("Using the MACL plan as it was edited: %s (move it away to have it derived again)", file)
    adapted = replace(plan.with_recipe(values), **given)
    if adapted != plan:
        write_plan(adapted, file, edited=True)
    return adapted


def _refuse_derived(plan: MACLPlan, file: Path, values: dict[str, Any]) -> None:
    """Raise UserError for values that other numbers of the plan are derived from, because an edited plan keeps these."""
    before, after = plan.get_recipe(), recipe_from_values(with_settings(plan.recipe, values), "Command line")
    keys: tuple[str, ...] = _DERIVED_FROM
    if before.method != after.method:
        keys += tuple(values)
    was = before.as_dict()
    refused = {key: value for key, value in values.items() if key in keys and was.get(key) != value}
    if refused:
        raise UserError(
            f"{file} was edited, so it is not derived again for {', '.join(settings_as_text(refused))}. Edit the file itself, "
            "or move it away."
        )
