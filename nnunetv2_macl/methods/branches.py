"""Where the two branches of MACL meet in a U-Net, and the patch that makes their grids equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.methods.base import Geometry
from nnunetv2_macl.methods.config import AUTO

# the paper's dense map lies at stride 16
_AUXILIARY_STRIDE = 16
_LARGEST_SCALE = 4
_PATCH_RATIO = (0.7, 1.5)
_MIN_BOTTLENECK = {2: 4, 3: 8}


def plan_branches(patch_size: Sequence[int], strides: Sequence[Sequence[int]], recipe: Any) -> Geometry:
    """Choose K, e, s and the patch for a U-Net.

    The auxiliary map is read at stage e, the deepest whose stride is at most 16; the dominant one after K decoder stages, at
    stage m = L-K, from a patch s = T_e / T_m times as small, so that both have one grid. The largest s up to 4 is taken whose
    patch (a multiple of s·T_L) stays near nnU-Net's and whose dominant bottleneck is no single voxel.

    Args:
        patch_size: of the nnU-Net plan, voxels.
        strides: of each encoder stage, an axis.
        recipe: may fix K, e or s.

    Raises:
        UserError: the recipe asks for what this network cannot give.
    """
    total = np.cumprod(np.asarray(strides), axis=0)
    stages = len(total)
    patch = np.asarray(patch_size)
    minimum = _MIN_BOTTLENECK[len(patch)]

    def levels(decoder_stages: int, auxiliary_stage: int) -> tuple[np.ndarray, np.ndarray]:
        """Scale, and the patch: nnU-Net's to the nearest multiple of s·T_L, halves up."""
        scale = total[auxiliary_stage - 1] // total[stages - decoder_stages - 1]
        step = scale * total[-1]
        return scale, np.maximum(np.floor(patch / step + 0.5), 1).astype(int) * step

    if recipe.decoder_stages != AUTO or recipe.auxiliary_stage != AUTO or recipe.scale != AUTO:
        decoder_stages, auxiliary_stage = _asked_levels(total, recipe)
        scale, size = levels(decoder_stages, auxiliary_stage)
        _enlarge(size, scale * total[-1], patch)
        reason = f"asked for by the recipe; the patch is the nearest to nnU-Net's {_by(patch)} that this allows"
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
            f"{where}; no scale from 2 to {_LARGEST_SCALE} leaves the dominant bottleneck {minimum} voxels, so both branches "
            "see the full patch" + ("" if decoder_stages else " and only the encoder is trained")
        )
        if (size != patch).any():
            reason += (
                f"; the patch is changed from nnU-Net's {_by(patch)} so that it is a multiple of {_by(total[-1])} and the "
                f"bottleneck has {minimum} voxels"
            )
        return Geometry(decoder_stages, auxiliary_stage, scale.tolist(), size.tolist(), reason)

    low, high = _PATCH_RATIO
    near = [c for c in candidates if low <= c[3] <= high]
    if near:
        best = max(near, key=lambda c: np.prod(c[1]))
        why = "is the largest"
    else:
        best = min(candidates, key=lambda c: max(math.log(low / c[3]), math.log(c[3] / high)))
        why = "comes nearest to those"
    decoder_stages, scale, size, ratio = best
    reason = (
        f"{where}; a scale of {_by(scale)} {why} of up to {_LARGEST_SCALE} whose patch has {low} to {high} times the voxels "
        f"of nnU-Net's {_by(patch)} ({ratio:.2f} here), rounded to multiples of {_by(scale * total[-1])}"
    )
    return Geometry(decoder_stages, auxiliary_stage, scale.tolist(), size.tolist(), reason)


def plan_one_branch(
    patch_size: Sequence[int], strides: Sequence[Sequence[int]], recipe: Any, decoder_stages: int = 0
) -> Geometry:
    """Return the geometry of a method that shows nnU-Net's own patch to one branch.

    Args:
        patch_size: Of the nnU-Net plan, voxels per axis.
        strides: Of each encoder stage, per axis.
        recipe: May ask for decoder stages.
        decoder_stages: Number of decoder stages to train where the recipe does not ask for them.

    Raises:
        UserError: The recipe asks for more decoder stages than the network has.
    """
    stages = len(strides)
    if recipe.decoder_stages != AUTO:
        decoder_stages = int(recipe.decoder_stages)
    if decoder_stages >= stages:
        raise UserError(
            f"The recipe asks for decoder_stages={decoder_stages}, and the network has {stages - 1}. Take at most {stages - 1}."
        )
    patch, deepest = own_patch(patch_size, strides)
    reason = f"one branch sees nnU-Net's own patch, a multiple of {_by(deepest)}"
    auxiliary_stage = _auxiliary_stage(np.cumprod(np.asarray(strides), axis=0))
    return Geometry(decoder_stages, auxiliary_stage, [1] * len(patch), patch, reason)


def own_patch(patch_size: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], np.ndarray]:
    """Return nnU-Net's patch as a multiple of the total stride, and that stride.

    nnU-Net's own patches are such multiples, and they stay as they are unless the bottleneck would be a few voxels.
    """
    patch, deepest = np.asarray(patch_size), np.prod(np.asarray(strides), axis=0)
    size = np.maximum(np.floor(patch / deepest + 0.5), 1).astype(int) * deepest
    _enlarge(size, deepest, patch)
    return size.tolist(), deepest


def smaller_patch(patch_size: Sequence[int], multiple: Sequence[int], fraction: float) -> list[int]:
    """Return the size of a view that is smaller than the patch, and whose bottleneck has more than one voxel.

    Args:
        patch_size: Of the large views, a multiple of ``multiple``, voxels per axis.
        multiple: What a size must be divisible by, per axis.
        fraction: Wanted fraction of the patch's edge.
    """
    patch, step = np.asarray(patch_size), np.asarray(multiple)
    size = np.maximum(np.floor(patch * fraction / step + 0.5), 1).astype(int) * step
    _enlarge(size, step, patch)
    return size.tolist()


def _enlarge(size: np.ndarray, step: np.ndarray, patch: np.ndarray) -> None:
    """Enlarge a size by whole steps until the bottleneck is large enough. The axis that is smallest for its patch grows first."""
    while np.prod(size // step) < _MIN_BOTTLENECK[len(patch)]:
        axis = np.argmin(size / patch)
        size[axis] += step[axis]


def _auxiliary_stage(total_strides: np.ndarray) -> int:
    return int(np.flatnonzero(total_strides.max(1) <= _AUXILIARY_STRIDE)[-1]) + 1


def _asked_levels(total: np.ndarray, recipe: Any) -> tuple[int, int]:
    """K and e from a recipe that fixes at least one of K, e, s; the rest as near to the rule as it can be."""
    stages = len(total)
    decoder_stages = range(stages) if recipe.decoder_stages == AUTO else [int(recipe.decoder_stages)]
    if recipe.auxiliary_stage == "bottleneck":
        auxiliary = [stages]
    elif recipe.auxiliary_stage != AUTO:
        auxiliary = [int(recipe.auxiliary_stage)]
    else:
        # the stage of the rule first, then deeper ones
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
        f"The recipe asks for {', '.join(f'{k}={v}' for k, v in asked.items())}, which a network of {stages} stages with "
        f"strides {total.tolist()} cannot give. What it can: "
        + "; ".join(f"decoder_stages={k} auxiliary_stage={e} scale={max(s)}" for k, e, s in possible[:12])
        + (
            ". Take one of these, or leave the keys at 'auto'."
            if possible
            else f"decoder_stages from 0 to {stages - 1}."
        )
    )


def _by(sizes: Sequence[int] | np.ndarray) -> str:
    return "x".join(str(n) for n in sizes)
