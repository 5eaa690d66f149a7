"""Choose the stages of a U-Net at which MACL compares its two branches, and the patch that makes their grids equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.methods.base import Geometry
from nnunetv2_macl.methods.config import AUTO
from nnunetv2_macl.networks.planned import nearest_multiple

# The paper reads its dense map at this stride.
_AUXILIARY_STRIDE = 16
_LARGEST_SCALE = 4
_PATCH_RATIO = (0.7, 1.5)
_ENCODER_ONLY = (
    " and only the encoder is trained. L_d and L_ER then compare maps of the same image, so they teach little. To change the "
    "intensity of one of the two images: --set intensity=1.0 intensity_on=auxiliary"
)
_MIN_BOTTLENECK = {2: 4, 3: 8}


def plan_branches(patch_size: Sequence[int], strides: Sequence[Sequence[int]], recipe: Any) -> Geometry:
    """Choose K, e, s and the patch for a U-Net.

    L is the number of encoder stages, and T_i is the total stride at stage i. The auxiliary map is read at stage e, the deepest
    stage with a stride of at most 16. The dominant map is read after K decoder stages, at stage m = L-K, from a patch that is
    downsampled by s = T_e / T_m, so that both maps have one grid. The patch must be a multiple of s·T_L. s is the largest factor
    up to 4 whose patch has about as many voxels as nnU-Net's and whose dominant bottleneck is large enough for instance norm.

    Args:
        patch_size: Patch size of the nnU-Net plan, voxels per axis.
        strides: Strides of each encoder stage, per axis.
        recipe: The recipe, which may fix K, e or s.

    Raises:
        UserError: The recipe does not fit this network.
    """
    total = np.cumprod(np.asarray(strides), axis=0)
    stages = len(total)
    patch = np.asarray(patch_size)
    minimum = _MIN_BOTTLENECK[len(patch)]

    def levels(decoder_stages: int, auxiliary_stage: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the scale, and nnU-Net's patch rounded to the nearest multiple of s·T_L (halves up)."""
        scale = total[auxiliary_stage - 1] // total[stages - decoder_stages - 1]
        step = scale * total[-1]
        return scale, nearest_multiple(patch, step)

    if recipe.decoder_stages != AUTO or recipe.auxiliary_stage != AUTO or recipe.scale != AUTO:
        decoder_stages, auxiliary_stage = _asked_levels(total, recipe)
        scale, size = levels(decoder_stages, auxiliary_stage)
        _enlarge(size, scale * total[-1], patch)
        reason = f"set by the recipe; the patch is the closest to nnU-Net's {_by(patch)} that this allows"
        return Geometry(decoder_stages, auxiliary_stage, scale.tolist(), size.tolist(), reason)

    auxiliary_stage = _auxiliary_stage(total)
    candidates = []
    for decoder_stages in range(max(1, stages - auxiliary_stage), stages):
        scale, size = levels(decoder_stages, auxiliary_stage)
        bottleneck = np.prod(size // (scale * total[-1]))
        if scale.max() >= 2 and scale.max() <= _LARGEST_SCALE and bottleneck >= minimum:
            candidates.append((decoder_stages, scale, size, np.prod(size) / np.prod(patch)))
    where = f"the auxiliary map is read at stage {auxiliary_stage}, the deepest with a stride of at most {_AUXILIARY_STRIDE}"
    if not candidates:
        decoder_stages = stages - auxiliary_stage
        scale, size = levels(decoder_stages, auxiliary_stage)
        _enlarge(size, total[-1], patch)
        reason = (
            f"{where}; with every scale from 2 to {_LARGEST_SCALE} the dominant bottleneck has fewer than {minimum} voxels, so "
            "there is no scale: both branches see the full patch" + ("" if decoder_stages else _ENCODER_ONLY)
        )
        if (size != patch).any():
            reason += (
                f"; the patch is changed from nnU-Net's {_by(patch)} so that it is a multiple of {_by(total[-1])} and the "
                f"bottleneck has at least {minimum} voxels"
            )
        return Geometry(decoder_stages, auxiliary_stage, scale.tolist(), size.tolist(), reason)

    low, high = _PATCH_RATIO
    near = [c for c in candidates if low <= c[3] <= high]
    if near:
        best = max(near, key=lambda c: np.prod(c[1]))
        why = "is the largest"
    else:
        best = min(candidates, key=lambda c: max(math.log(low / c[3]), math.log(c[3] / high)))
        why = "is the closest to the range"
    decoder_stages, scale, size, ratio = best
    reason = (
        f"{where}; a scale of {_by(scale)} {why} of up to {_LARGEST_SCALE} whose patch has {low} to {high} times the voxels "
        f"of nnU-Net's {_by(patch)} ({ratio:.2f} here), rounded to multiples of {_by(scale * total[-1])}"
    )
    return Geometry(decoder_stages, auxiliary_stage, scale.tolist(), size.tolist(), reason)


def plan_one_branch(
    patch_size: Sequence[int], strides: Sequence[Sequence[int]], recipe: Any, decoder_stages: int = 0
) -> Geometry:
    """Return the geometry of a method with one branch, which sees nnU-Net's own patch.

    Args:
        patch_size: Patch size of the nnU-Net plan, voxels per axis.
        strides: Strides of each encoder stage, per axis.
        recipe: The recipe, which may set the number of decoder stages.
        decoder_stages: Number of decoder stages to train unless the recipe sets it.

    Raises:
        UserError: The recipe asks for more decoder stages than the network has.
    """
    stages = len(strides)
    if recipe.decoder_stages != AUTO:
        decoder_stages = int(recipe.decoder_stages)
    if decoder_stages >= stages:
        raise UserError(
            f"decoder_stages is {decoder_stages}, but the network has {stages - 1} decoder stages. Set at most {stages - 1}."
        )
    patch, deepest = own_patch(patch_size, strides)
    reason = f"one branch sees nnU-Net's own patch, a multiple of {_by(deepest)}"
    auxiliary_stage = _auxiliary_stage(np.cumprod(np.asarray(strides), axis=0))
    return Geometry(decoder_stages, auxiliary_stage, [1] * len(patch), patch, reason)


def own_patch(patch_size: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], np.ndarray]:
    """Return nnU-Net's patch rounded to a multiple of the total stride, and the total stride, voxels per axis.

    nnU-Net's own patches are such multiples. They are enlarged only if the bottleneck would be too small for instance norm.
    """
    patch, deepest = np.asarray(patch_size), np.prod(np.asarray(strides), axis=0)
    size = nearest_multiple(patch, deepest)
    _enlarge(size, deepest, patch)
    return size.tolist(), deepest


def smaller_patch(patch_size: Sequence[int], multiple: Sequence[int], fraction: float) -> list[int]:
    """Return the size of a view that is smaller than the patch and has more than one voxel at the bottleneck.

    Args:
        patch_size: Size of the large views, a multiple of ``multiple``, voxels per axis.
        multiple: Divisor of the size on each axis.
        fraction: Desired fraction of the patch's edge.
    """
    patch, step = np.asarray(patch_size), np.asarray(multiple)
    size = nearest_multiple(patch * fraction, step)
    _enlarge(size, step, patch)
    return size.tolist()


def _enlarge(size: np.ndarray, step: np.ndarray, patch: np.ndarray) -> None:
    """Enlarge a size by whole steps until the bottleneck is large enough, first on the axis that is smallest for its patch."""
    while np.prod(size // step) < _MIN_BOTTLENECK[len(patch)]:
        axis = np.argmin(size / patch)
        size[axis] += step[axis]


def _auxiliary_stage(total_strides: np.ndarray) -> int:
    return int(np.flatnonzero(total_strides.max(1) <= _AUXILIARY_STRIDE)[-1]) + 1


def _asked_levels(total: np.ndarray, recipe: Any) -> tuple[int, int]:
    """Return K and e for a recipe that fixes at least one of K, e and s. The others are as close to the rule as possible.

    Raises:
        UserError: The network has no such stages or scale.
    """
    stages = len(total)
    decoder_stages = range(stages) if recipe.decoder_stages == AUTO else [int(recipe.decoder_stages)]
    if recipe.auxiliary_stage == "bottleneck":
        auxiliary = [stages]
    elif recipe.auxiliary_stage != AUTO:
        auxiliary = [int(recipe.auxiliary_stage)]
    else:
        # Try the stage of the rule first, then deeper ones, then shallower ones.
        first = _auxiliary_stage(total)
        auxiliary = [first, *range(first + 1, stages + 1), *range(first - 1, 0, -1)]
    possible = []
    for e in auxiliary:
        for k in decoder_stages:
            if k < stages and stages - k <= e <= stages:
                scale = (total[e - 1] // total[stages - k - 1]).tolist()
                possible.append((k, e, scale))
    for k, e, scale in possible:
        if recipe.scale == AUTO and (recipe.decoder_stages != AUTO or max(scale) <= _LARGEST_SCALE):
            return k, e
        if recipe.scale != AUTO and recipe.scale in (scale, max(scale)):
            return k, e
    asked = {key: getattr(recipe, key) for key in ("decoder_stages", "auxiliary_stage", "scale")}
    raise UserError(
        f"The recipe has {', '.join(f'{k}={v}' for k, v in asked.items())}, which is not possible with a network of {stages} "
        f"stages and total strides {total.tolist()}. Possible are "
        + "; ".join(f"decoder_stages={k} auxiliary_stage={e} scale={max(s)}" for k, e, s in possible[:12])
        + (
            ". Use one of these, or leave the keys at 'auto'."
            if possible
            else f"decoder_stages from 0 to {stages - 1}."
        )
    )


def _by(sizes: Sequence[int] | np.ndarray) -> str:
    return "x".join(str(n) for n in sizes)
