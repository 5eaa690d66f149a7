"""The MACL plan: its values, its file, the check of an edited plan, and its description in words.

The file is ``PLANS_macl_CONFIGURATION.json`` in the folder of nnU-Net's plan.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.configuration import default_num_processes

from nnunetv2_macl.data import Sampling
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import write_json
from nnunetv2_macl.methods.base import Geometry
from nnunetv2_macl.methods.registry import all_methods, methods_of
from nnunetv2_macl.nnunet import DatasetConfiguration, checksum, read_json
from nnunetv2_macl.planning.memory import is_above_zero
from nnunetv2_macl.recipe import AUTO, Recipe, recipe_from_values, settings_as_text, with_settings

FORMAT_VERSION = 1
# Environment variables that pass the plan and the number of processes to child processes.
_HANDED_ON, _PROCESSES = "nnUNet_macl_plan", "nnUNet_macl_processes"
# Types of the values that `plan_start` records about the weights that a run starts from.
_START = {
    "path": str,
    "files": dict,
    "origin": str,
    "encoder": str,
    "decoder": str,
    "citations": list,
    "transfer": list,
}


@dataclass(frozen=True)
class MACLPlan:
    """All settings of a pre-training: the recipe, and the values derived from the recipe and nnU-Net's plan.

    Per-axis values are in the order of nnU-Net's plan, sizes in voxels, ``gpu_memory_gb`` in GB and other memory in GiB.
    ``pretrained_weights`` is None, or the result of `plan_start` for the weights that the run starts from.
    """

    dataset_name: str
    plans_name: str
    configuration: str
    nnunet_plan_checksum: str
    unlabelled_datasets: list[str]
    skip_unreadable: bool
    channel_map: dict[str, str]
    decoder_stages: int
    auxiliary_stage: int
    scale: list[int]
    patch_size: list[int]
    dominant_patch_size: list[int]
    grid: list[int]
    batch_size: int
    patches_at_once: int
    position_group_size: int
    threshold: float
    expected_positives: float
    out_of_plane_rotation: float
    gpu_memory_gb: float
    memory_gib: float
    memory_mixed_precision_gib: float
    recipe: dict[str, Any]
    reasons: dict[str, str]
    pretrained_weights: dict[str, Any] | None = None
    # The name of the recipe, and the values that replaced its own. None in an edited plan and in plans of earlier versions.
    recipe_name: str | None = None
    settings: dict[str, Any] | None = None

    @property
    def recipe_source(self) -> str | None:
        """Return the command-line options that select the recipe, or None if the plan does not record them."""
        return describe_recipe(self.recipe_name, self.settings)

    def batch_bytes(self, channels: int) -> int:
        """Return the size of a batch of images in float32.

        Args:
            channels: C, number of image channels.
        """
        images = self.batch_size * (1 + self.get_recipe().uses_neighbours)
        return 4 * images * channels * math.prod(self.patch_size)

    def get_recipe(self) -> Recipe:
        """Return the recipe with its values checked. Raise UserError if a value is wrong."""
        return recipe_from_values(self.recipe, "MACL plan")

    @property
    def sampling(self) -> Sampling:
        """Return the settings with which batches are drawn."""
        recipe = self.get_recipe()
        return Sampling(
            volume_patch(self.patch_size),
            self.batch_size,
            self.position_group_size,
            recipe.seed,
            neighbours=recipe.uses_neighbours,
        )

    @property
    def geometry(self) -> Geometry:
        """Return the stages of the network that the methods read, and the patches."""
        return Geometry(
            self.decoder_stages,
            self.auxiliary_stage,
            self.scale,
            self.patch_size,
            threshold=self.threshold,
            out_of_plane_rotation=self.out_of_plane_rotation,
            batch_size=self.batch_size,
        )

    def values_with_reasons(self) -> list[tuple[str, str]]:
        """Return the derived values as text, with the reason for those that are derived together."""

        def words(value: Any) -> str:
            return "x".join(map(str, value)) if isinstance(value, list) else json.dumps(value)

        return [
            (", ".join(f"{k} {words(getattr(self, k))}" for k in keys.split(", ") if hasattr(self, k)), reason)
            for keys, reason in self.reasons.items()
        ]

    def with_recipe(self, values: dict[str, Any]) -> MACLPlan:
        """Return the plan with new recipe values. No other value may depend on them except batch_size and patches_at_once."""
        given = {key: value for key, value in values.items() if value != AUTO}
        batch_size = given.get("batch_size", self.batch_size)
        # If the whole batch was computed at once, a batch of another size is, too.
        as_it_was = self.patches_at_once if self.patches_at_once < self.batch_size else batch_size
        at_once = min(given.get("patches_at_once", as_it_was), batch_size)
        return replace(self, recipe=with_settings(self.recipe, values), batch_size=batch_size, patches_at_once=at_once)

    def as_json(self, *, edited: bool = False) -> dict[str, Any]:
        """Return the content of the file, with a checksum that shows whether the user edited the file later.

        Args:
            edited: Whether the plan counts as edited from the start.
        """
        content = {"format_version": FORMAT_VERSION} | asdict(self)
        # Omit None, so that plans of earlier versions keep their checksum.
        content = {key: value for key, value in content.items() if value is not None}
        return content | {"checksum": "edited"} if edited else with_checksum(content)


def volume_patch(patch_size: Sequence[int]) -> tuple[int, ...]:
    """Return the patch size on the three axes of a volume. A 2D patch is one slice thick."""
    return (1,) * (3 - len(patch_size)) + tuple(patch_size)


def plan_file(configuration: DatasetConfiguration) -> Path:
    """Return the file of a configuration's MACL plan."""
    return configuration.folder / f"{configuration.plans_name}_macl_{configuration.name}.json"


_PLAN_ADVICE = "Correct the file, or move it away to derive the plan again."


def was_edited(file: Path) -> bool:
    """Return whether a MACL plan was changed since it was written. Raise UserError if it is not a JSON file."""
    return is_edited(read_json(file, _PLAN_ADVICE))


def is_edited(content: Any) -> bool:
    """Return whether the content of a MACL plan was changed since it was written."""
    if not isinstance(content, dict):
        return True
    return content.get("checksum") != with_checksum(content)["checksum"]


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a MACL plan with the checksum that shows whether a user has edited it."""
    content = {key: value for key, value in content.items() if key != "checksum"}
    return content | {"checksum": checksum(content)}


def read_plan(file: Path) -> MACLPlan:
    """Return the MACL plan in a file.

    Raises:
        UserError: There is no such file, or it is not a MACL plan.
    """
    return _plan_in(read_json(file, _PLAN_ADVICE), file)


def _plan_in(content: Any, file: Path) -> MACLPlan:
    names = [f.name for f in fields(MACLPlan)]
    optional = [f.name for f in fields(MACLPlan) if f.default is None]
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a MACL plan. {_PLAN_ADVICE}")
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{file} has format version {content.get('format_version')!r}, and this nnunetv2_macl reads {FORMAT_VERSION}. "
            f"Update nnunetv2_macl, or move the file away to derive the plan again."
        )
    if missing := [name for name in names if name not in content and name not in optional]:
        raise UserError(f"{file} lacks {', '.join(missing)}. {_PLAN_ADVICE}")
    plan = MACLPlan(**{name: content[name] for name in names if name in content})
    start = plan.pretrained_weights
    if start is not None and not (
        isinstance(start, dict) and all(isinstance(start.get(key), kind) for key, kind in _START.items())
    ):
        raise UserError(
            f"{file}: 'pretrained_weights' must be null or the value that -pretrained_weights wrote, got {start!r:.200}. "
            f"{_PLAN_ADVICE}"
        )
    recipe_from_values(plan.recipe, f"{file}, 'recipe'")
    # The recorded options do not describe a plan that was edited later.
    return replace(plan, recipe_name=None, settings=None) if is_edited(content) else plan


@contextmanager
def plan_in_environment(plan: MACLPlan, processes: int) -> Iterator[None]:
    """Make `current_plan` and `current_processes` return these values within the context, in child processes, too.

    The file is not enough, because preprocessing may take hours, and another command may replace the file meanwhile.
    """
    os.environ |= {_HANDED_ON: json.dumps(plan.as_json()), _PROCESSES: str(processes)}
    try:
        yield
    finally:
        del os.environ[_HANDED_ON], os.environ[_PROCESSES]


def current_plan(file: Path) -> MACLPlan:
    """Return the plan of `plan_in_environment`, or outside of that context the plan in a file."""
    handed = os.environ.get(_HANDED_ON)
    return read_plan(file) if handed is None else _plan_in(json.loads(handed), file)


def current_processes() -> int:
    """Return the number of preprocessing processes of `plan_in_environment`, or outside of that context nnU-Net's default."""
    return int(os.environ.get(_PROCESSES, default_num_processes))


def has_current_plan() -> bool:
    """Return whether the command of this package started the training, and not nnU-Net's, which has no options for the plan."""
    return _HANDED_ON in os.environ


def check_plan(plan: MACLPlan, configuration: DatasetConfiguration, file: Path, *, of_a_run: bool = False) -> None:
    """Check that the values of a plan, which the user may have edited, fit the network.

    Args:
        plan: The plan.
        configuration: The configuration of nnU-Net, with the network.
        file: The file of the plan, for error messages.
        of_a_run: Whether the plan belongs to a run that is resumed. Such a plan cannot be derived again.

    Raises:
        UserError: A value is wrong. The message names the key, the rule and the value.
    """
    again = "leave out --c to start a new run." if of_a_run else "move the file away to derive the plan again."
    fix = f"Correct it in {file}, or {again}"
    axes, stages = len(configuration.patch_size), len(configuration.strides)

    def require(true: bool, key: str, rule: str) -> None:
        if not true:
            raise UserError(f"'{key}' must be {rule}, got {getattr(plan, key)!r}. {fix}")

    def whole(value: Any, low: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= low

    for key, low, high in (("decoder_stages", 0, stages - 1), ("auxiliary_stage", 1, stages)):
        require(
            whole(getattr(plan, key), low) and getattr(plan, key) <= high, key, f"a whole number from {low} to {high}"
        )
    # A single branch has scale 1. Version 0.1 planned another scale for restoration, which is still valid.
    one_branch = plan.scale == [1] * axes and not any(
        method.has_two_branches for method in methods_of(plan.get_recipe().method)
    )
    # only a second branch compares maps of the two stages
    reaches = stages - plan.decoder_stages <= plan.auxiliary_stage
    require(one_branch or reaches, "auxiliary_stage", f"at least {stages} - decoder_stages")
    for key in ("scale", "patch_size", "dominant_patch_size", "grid"):
        value = getattr(plan, key)
        good = isinstance(value, list) and len(value) == axes and all(whole(n, 1) for n in value)
        require(good, key, f"a list of {axes} whole numbers above 0")
    total = np.cumprod(np.asarray(configuration.strides), axis=0)
    scale = total[plan.auxiliary_stage - 1] // total[stages - plan.decoder_stages - 1]
    if one_branch:
        scale = np.ones_like(scale)
    require(plan.scale == scale.tolist(), "scale", f"{scale.tolist()}, from decoder_stages and auxiliary_stage")
    step = scale * total[-1]
    require(not (np.asarray(plan.patch_size) % step).any(), "patch_size", f"a multiple of {step.tolist()}")
    require(np.prod(np.asarray(plan.patch_size) // step) > 1, "patch_size", f"more than {step.tolist()} on some axis")
    small = (np.asarray(plan.patch_size) // scale).tolist()
    require(plan.dominant_patch_size == small, "dominant_patch_size", f"{small}, patch_size divided by scale")
    require(whole(plan.batch_size, 2), "batch_size", "a whole number from 2")
    require(whole(plan.patches_at_once, 1), "patches_at_once", "a whole number from 1")
    require(whole(plan.position_group_size, 1), "position_group_size", "a whole number from 1")
    require(is_above_zero(plan.gpu_memory_gb), "gpu_memory_gb", "a number above 0")
    for key, high in (("threshold", 1), ("out_of_plane_rotation", 180)):
        value = getattr(plan, key)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= high
        require(good, key, f"a number from 0 to {high}")
    good = isinstance(plan.unlabelled_datasets, list) and all(isinstance(d, str) for d in plan.unlabelled_datasets)
    require(good, "unlabelled_datasets", "a list of data set names")
    require(isinstance(plan.skip_unreadable, bool), "skip_unreadable", "true or false")
    good = isinstance(plan.channel_map, dict) and all(isinstance(c, str) for c in plan.channel_map.values())
    require(good, "channel_map", "a mapping from channel names to channel names")
    names = {f.name for f in fields(MACLPlan)}
    good = isinstance(plan.reasons, dict) and all(names.issuperset(keys.split(", ")) for keys in plan.reasons)
    require(good, "reasons", "a mapping from keys of the plan to reasons")
    if plan.nnunet_plan_checksum != configuration.plan_checksum():
        raise UserError(
            f"{file} was derived from another nnU-Net plan than the current one. Restore that nnU-Net plan, or {again}"
        )


def write_plan(plan: MACLPlan, file: Path, *, edited: bool = False) -> None:
    """Write a plan to a file. See `MACLPlan.as_json`."""
    write_json(plan.as_json(edited=edited), file)


def describe_recipe(name: Any, settings: Any) -> str | None:
    """Return the command-line options that select a recipe with these settings.

    Args:
        name: Name of the recipe in a plan.
        settings: Values by recipe key in a plan.

    Returns:
        The options, or None if one of the values is missing or has a wrong type, which is possible in files from elsewhere.
    """
    if not (isinstance(name, str) and isinstance(settings, dict)):
        return None
    return shlex.join(["-recipe", name, *(["--set", *settings_as_text(settings)] if settings else [])])


def describe(plan: MACLPlan) -> str:
    """Return the plan in words, with the reason of each derived value."""
    lines = [f"MACL plan of {plan.dataset_name}, {plan.plans_name}, {plan.configuration}"]
    if plan.recipe_source:
        lines.append(f"  recipe: {plan.recipe_source}")
    methods = methods_of(plan.get_recipe().method)
    unused = [
        key
        for key in dict.fromkeys(key for method in all_methods().values() for key in method.plan_keys)
        if not any(key in method.plan_keys for method in methods)
    ]
    if unused:
        lines.append(f"  the method {plan.get_recipe().method} does not use {', '.join(unused)}")
    lines += [f"  {values}\n      {reason}" for values, reason in plan.values_with_reasons()]
    lines.append(
        f"  memory: about {plan.memory_mixed_precision_gib} GiB on a GPU in mixed precision, {plan.memory_gib} GiB in float32"
    )
    if plan.unlabelled_datasets:
        lines.append(f"  further unlabelled images from {', '.join(plan.unlabelled_datasets)}")
    if plan.pretrained_weights is not None:
        lines.append(f"  starts from {start_in_short(plan.pretrained_weights)}")
        lines += [f"      {line}" for line in plan.pretrained_weights["transfer"]]
    return "\n".join(lines)


def start_in_short(start: dict[str, Any]) -> str:
    """Return a line about the weights that a run starts from, from ``pretrained_weights`` of its plan."""
    files = ", ".join(f"{name} (SHA-256 {checksum[:16]}...)" for name, checksum in start["files"].items())
    trained_on = f", trained on {start['dataset_name']}" if start.get("dataset_name") else ""
    return (
        f"{start['origin']} weights{trained_on}, {files}; loaded: {start['encoder']} tensors of the encoder and "
        f"{start['decoder']} of the pre-trained decoder stages"
    )
