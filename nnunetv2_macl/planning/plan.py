"""The MACL plan: what it holds, how it lies on disk, what may be edited, how it is told.

It lies beside nnU-Net's own plan as ``P_macl_C.json``.
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
# holds the plan of the command that is at work, for the processes that train by it
_HANDED_ON, _PROCESSES = "nnUNet_macl_plan", "nnUNet_macl_processes"
# what `plan_start` writes about the weights that a run starts from
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
    """What is trained, on what, and how: the recipe, and all that follows from it and the nnU-Net plan.

    Per-axis values are in the order of the nnU-Net plan, sizes in voxels, memory in GiB. ``pretrained_weights`` is None, or what
    `plan_start` returns about the weights that the run starts from.
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
    # the recipe that was asked for, and the values that replaced its own; None in an edited plan or one of an earlier version
    recipe_name: str | None = None
    settings: dict[str, Any] | None = None

    @property
    def recipe_source(self) -> str | None:
        """Return the options that ask for the recipe, as they are typed; None where the plan does not record them."""
        return describe_recipe(self.recipe_name, self.settings)

    def batch_bytes(self, channels: int) -> int:
        """Return the size of a batch of images in float32.

        Args:
            channels: C, number of image channels.
        """
        images = self.batch_size * (1 + self.get_recipe().uses_neighbours)
        return 4 * images * channels * math.prod(self.patch_size)

    def get_recipe(self) -> Recipe:
        return recipe_from_values(self.recipe, "MACL plan")

    @property
    def sampling(self) -> Sampling:
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
        """Return what the methods read of the network, and the patches."""
        return Geometry(
            self.decoder_stages,
            self.auxiliary_stage,
            self.scale,
            self.patch_size,
            threshold=self.threshold,
            out_of_plane_rotation=self.out_of_plane_rotation,
            batch_size=self.batch_size,
        )

    def with_recipe(self, values: dict[str, Any]) -> MACLPlan:
        """The same plan with other recipe values, none of which anything else is derived from but batch and parts."""
        given = {key: value for key, value in values.items() if value != AUTO}
        batch_size = given.get("batch_size", self.batch_size)
        # a batch that was computed whole stays whole
        as_it_was = self.patches_at_once if self.patches_at_once < self.batch_size else batch_size
        at_once = min(given.get("patches_at_once", as_it_was), batch_size)
        return replace(self, recipe=with_settings(self.recipe, values), batch_size=batch_size, patches_at_once=at_once)

    def as_json(self, *, edited: bool = False) -> dict[str, Any]:
        """Content of the file. The checksum tells later whether the user edited it; an edited plan stays edited."""
        content = {"format_version": FORMAT_VERSION} | asdict(self)
        # a plan of an earlier version keeps its checksum
        content = {key: value for key, value in content.items() if value is not None}
        return content | {"checksum": "edited" if edited else checksum(content)}


def volume_patch(patch_size: Sequence[int]) -> tuple[int, ...]:
    """Patch on the three axes of a volume: a 2D patch is one slice thick."""
    return (1,) * (3 - len(patch_size)) + tuple(patch_size)


def plan_file(configuration: DatasetConfiguration) -> Path:
    return configuration.folder / f"{configuration.plans_name}_macl_{configuration.name}.json"


_MEND_PLAN = "Correct it, or move it away to have it derived again."


def was_edited(file: Path) -> bool:
    """Whether a MACL plan was changed since it was written. Raises UserError where it is no JSON file."""
    return _is_edited(read_json(file, _MEND_PLAN))


def _is_edited(content: Any) -> bool:
    if not isinstance(content, dict):
        return True
    return content.get("checksum") != checksum({key: value for key, value in content.items() if key != "checksum"})


def read_plan(file: Path) -> MACLPlan:
    """Read a MACL plan.

    Raises:
        UserError: no such file, or not a MACL plan; names the key.
    """
    return _plan_in(read_json(file, _MEND_PLAN), file)


def _plan_in(content: Any, file: Path) -> MACLPlan:
    names = [f.name for f in fields(MACLPlan)]
    optional = [f.name for f in fields(MACLPlan) if f.default is None]
    if not isinstance(content, dict):
        raise UserError(f"{file} is no MACL plan. {_MEND_PLAN}")
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{file} has format version {content.get('format_version')!r}, this nnunetv2_macl reads {FORMAT_VERSION}. "
            f"Update nnunetv2_macl, or move the file away to have it derived again."
        )
    if missing := [name for name in names if name not in content and name not in optional]:
        raise UserError(f"{file} lacks {', '.join(missing)}. {_MEND_PLAN}")
    plan = MACLPlan(**{name: content[name] for name in names if name in content})
    start = plan.pretrained_weights
    if start is not None and not (
        isinstance(start, dict) and all(isinstance(start.get(key), kind) for key, kind in _START.items())
    ):
        raise UserError(
            f"{file}: 'pretrained_weights' must be null, or what -pretrained_weights has written, got {start!r:.200}. "
            f"{_MEND_PLAN}"
        )
    recipe_from_values(plan.recipe, f"{file}, 'recipe'")
    # the options that were typed say nothing about a plan that was edited since
    return replace(plan, recipe_name=None, settings=None) if _is_edited(content) else plan


@contextmanager
def plan_in_environment(plan: MACLPlan, processes: int) -> Iterator[None]:
    """Meanwhile `current_plan` returns this plan, and `current_processes` this number, here and in processes started now.

    Preprocessing may take hours, and another command may write its own plan of the same configuration to the file by then.
    """
    os.environ |= {_HANDED_ON: json.dumps(plan.as_json()), _PROCESSES: str(processes)}
    try:
        yield
    finally:
        del os.environ[_HANDED_ON], os.environ[_PROCESSES]


def current_plan(file: Path) -> MACLPlan:
    """The plan that was `plan_in_environment`, else what `read_plan` returns."""
    handed = os.environ.get(_HANDED_ON)
    return read_plan(file) if handed is None else _plan_in(json.loads(handed), file)


def current_processes() -> int:
    """For preprocessing: what was `plan_in_environment`, else nnU-Net's number."""
    return int(os.environ.get(_PROCESSES, default_num_processes))


def has_current_plan() -> bool:
    """Whether our command started the training, and not nnU-Net's, which has no options for it."""
    return _HANDED_ON in os.environ


def check_plan(plan: MACLPlan, configuration: DatasetConfiguration, file: Path, *, of_a_run: bool = False) -> None:
    """Check a plan that was edited against its network.

    Args:
        plan: to check.
        configuration: its network.
        file: where it is.
        of_a_run: that is to go on; then it cannot be derived again.

    Raises:
        UserError: names the key, the rule and the value.
    """
    again = "leave out --c to start a new run." if of_a_run else "move the file away to have it derived again."
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
    require(
        stages - plan.decoder_stages <= plan.auxiliary_stage, "auxiliary_stage", f"at least {stages} - decoder_stages"
    )
    for key in ("scale", "patch_size", "dominant_patch_size", "grid"):
        value = getattr(plan, key)
        good = isinstance(value, list) and len(value) == axes and all(whole(n, 1) for n in value)
        require(good, key, f"a list of {axes} whole numbers above 0")
    total = np.cumprod(np.asarray(configuration.strides), axis=0)
    scale = total[plan.auxiliary_stage - 1] // total[stages - plan.decoder_stages - 1]
    # one branch alone sees the patch as it is; version 0.1 planned a second one for restoration too
    one_branch = plan.scale == [1] * axes and not any(
        method.has_two_branches for method in methods_of(plan.get_recipe().method)
    )
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
    require(good, "channel_map", "channel names by channel names")
    names = {f.name for f in fields(MACLPlan)}
    good = isinstance(plan.reasons, dict) and all(names.issuperset(keys.split(", ")) for keys in plan.reasons)
    require(good, "reasons", "words by keys of the plan")
    if plan.nnunet_plan_checksum != configuration.plan_checksum():
        raise UserError(
            f"{file} was derived from another nnU-Net plan than the one there is now. Bring that plan back, or {again}"
        )


def write_plan(plan: MACLPlan, file: Path, *, edited: bool = False) -> None:
    write_json(plan.as_json(edited=edited), file)


def describe_recipe(name: Any, settings: Any) -> str | None:
    """Return the options that ask for a recipe with these settings, as they are typed.

    Args:
        name: Name of the recipe, as a plan records it.
        settings: Values by recipe key, as a plan records them.

    Returns:
        None unless both are there; a file from elsewhere may hold anything.
    """
    if not (isinstance(name, str) and isinstance(settings, dict)):
        return None
    return shlex.join(["-recipe", name, *(["--set", *settings_as_text(settings)] if settings else [])])


def describe(plan: MACLPlan) -> str:
    """The plan in words, a line a derived value with its reason."""
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
    for keys, reason in plan.reasons.items():
        values = ", ".join(f"{key} {_words(getattr(plan, key))}" for key in keys.split(", "))
        lines.append(f"  {values}\n      {reason}")
    lines.append(
        f"  memory: about {plan.memory_mixed_precision_gib} GiB on a GPU in mixed precision, {plan.memory_gib} GiB in float32"
    )
    if plan.unlabelled_datasets:
        lines.append(f"  unlabelled images also from {', '.join(plan.unlabelled_datasets)}")
    if plan.pretrained_weights is not None:
        lines.append(f"  starts from {start_in_short(plan.pretrained_weights)}")
        lines += [f"      {line}" for line in plan.pretrained_weights["transfer"]]
    return "\n".join(lines)


def start_in_short(start: dict[str, Any]) -> str:
    """Return what a run starts from, in one line; ``start`` is ``pretrained_weights`` of its plan."""
    files = ", ".join(f"{name} (SHA-256 {checksum[:16]}...)" for name, checksum in start["files"].items())
    trained_on = f", trained on {start['dataset_name']}" if start.get("dataset_name") else ""
    return (
        f"{start['origin']} weights{trained_on}, {files}; taken: {start['encoder']} tensors of the encoder and "
        f"{start['decoder']} of the decoder stages that are pre-trained"
    )


def _words(value: Any) -> str:
    if isinstance(value, (list, tuple, np.ndarray)):
        return "x".join(str(n) for n in value)
    return json.dumps(value)
