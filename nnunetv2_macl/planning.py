"""nnU-Net plan -> MACL plan: where the branches meet, scale, patch, batch, threshold, memory; each with its reason.

The MACL plan lies beside nnU-Net's own as ``P_macl_C.json``. It is derived anew at every start, unless the user edited it: then
it is used as it stands.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunetv2_macl.checkpoints import write_json
from nnunetv2_macl.data import Sampling, draw_corner, position
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.losses import _MAX_SIMILARITIES, MultiLevelContrastiveLoss
from nnunetv2_macl.network import MACLNetwork
from nnunetv2_macl.nnunet import Configuration, checksum, read_json
from nnunetv2_macl.recipe import AUTO, Recipe, recipe_from_values

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
# the batch beyond which more memory is not spent
_BATCH_SIZES = (32, 24, 16, 12, 8, 6, 4, 2)
# the paper's dense map lies at stride 16
_AUXILIARY_STRIDE = 16
_LARGEST_SCALE = 4
_PATCH_RATIO = (0.7, 1.5)
_MIN_BOTTLENECK = {2: 4, 3: 8}
# torch's autocast keeps about half of what float32 would
_AUTOCAST_SHARE = 0.55
# arrays of similarities that the dense loss holds at once in its backward pass
_SIMILARITY_ARRAYS = 5


@dataclass(frozen=True)
class MACLPlan:
    """What is trained, on what, and how: the recipe, and all that follows from it and the nnU-Net plan.

    Per-axis values are in the order of the nnU-Net plan, sizes in voxels, memory in GiB.
    """

    dataset_name: str
    plans_name: str
    configuration: str
    nnunet_plan_checksum: str
    unlabelled_datasets: list[str]
    skip_unreadable: bool
    decoder_stages: int
    auxiliary_stage: int
    scale: list[int]
    patch_size: list[int]
    dominant_patch_size: list[int]
    grid: list[int]
    batch_size: int
    position_group_size: int
    threshold: float
    expected_positives: float
    out_of_plane_rotation: float
    gpu_memory_gb: float
    memory_gib: float
    memory_mixed_precision_gib: float
    recipe: dict[str, Any]
    reasons: dict[str, str]

    def get_recipe(self) -> Recipe:
        return recipe_from_values(self.recipe, "MACL plan")

    @property
    def sampling(self) -> Sampling:
        return Sampling(volume_patch(self.patch_size), self.batch_size, self.position_group_size, self.recipe["seed"])

    def with_recipe(self, values: dict[str, Any]) -> MACLPlan:
        """The same plan with other recipe values, none of which anything else is derived from but the batch size."""
        plan = replace(self, recipe=self.recipe | values)
        return replace(plan, batch_size=values["batch_size"]) if "batch_size" in values else plan

    def as_json(self, *, edited: bool = False) -> dict[str, Any]:
        """Content of the file. The checksum tells later whether the user edited it; an edited plan stays edited."""
        content = {"format_version": FORMAT_VERSION} | asdict(self)
        return content | {"checksum": "edited" if edited else checksum(content)}


def volume_patch(patch_size: Sequence[int]) -> tuple[int, ...]:
    """Patch on the three axes of a volume: a 2D patch is one slice thick."""
    return (1,) * (3 - len(patch_size)) + tuple(patch_size)


# --- levels: where the branches meet -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Levels:
    """Where the two branches meet, and the patch that makes their grids equal."""

    decoder_stages: int
    auxiliary_stage: int
    scale: list[int]
    patch_size: list[int]
    reason: str


def plan_levels(patch_size: Sequence[int], strides: Sequence[Sequence[int]], recipe: Recipe) -> Levels:
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

    def enlarge(size: np.ndarray, step: np.ndarray) -> None:
        """By whole steps, the axis first that is smallest beside nnU-Net's, until the dominant bottleneck is large enough."""
        while np.prod(size // step) < minimum:
            axis = np.argmin(size / patch)
            size[axis] += step[axis]

    if recipe.decoder_stages != AUTO or recipe.auxiliary_stage != AUTO or recipe.scale != AUTO:
        decoder_stages, auxiliary_stage = _asked_levels(total, recipe)
        scale, size = levels(decoder_stages, auxiliary_stage)
        enlarge(size, scale * total[-1])
        reason = f"asked for by the recipe; the patch is the nearest to nnU-Net's {_words(patch)} that this allows"
        return Levels(decoder_stages, auxiliary_stage, scale.tolist(), size.tolist(), reason)

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
        enlarge(size, total[-1])
        reason = (
            f"{where}; no scale from 2 to {_LARGEST_SCALE} leaves the dominant bottleneck {minimum} voxels, so both branches "
            "see the full patch" + ("" if decoder_stages else " and only the encoder is trained")
        )
        if (size != patch).any():
            reason += (
                f"; the patch is changed from nnU-Net's {_words(patch)} so that it is a multiple of {_words(total[-1])} and the "
                f"bottleneck has {minimum} voxels"
            )
        return Levels(decoder_stages, auxiliary_stage, scale.tolist(), size.tolist(), reason)

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
        f"{where}; a scale of {_words(scale)} {why} of up to {_LARGEST_SCALE} whose patch has {low} to {high} times the voxels "
        f"of nnU-Net's {_words(patch)} ({ratio:.2f} here), rounded to multiples of {_words(scale * total[-1])}"
    )
    return Levels(decoder_stages, auxiliary_stage, scale.tolist(), size.tolist(), reason)


def _auxiliary_stage(total_strides: np.ndarray) -> int:
    return int(np.flatnonzero(total_strides.max(1) <= _AUXILIARY_STRIDE)[-1]) + 1


def _asked_levels(total: np.ndarray, recipe: Recipe) -> tuple[int, int]:
    """K and e from a recipe that fixes at least one of K, e, s; the rest as near to the rule as it can be."""
    stages = len(total)
    decoder_stages = [recipe.decoder_stages] if recipe.decoder_stages != AUTO else range(stages)
    if recipe.auxiliary_stage == "bottleneck":
        auxiliary = [stages]
    elif recipe.auxiliary_stage != AUTO:
        auxiliary = [recipe.auxiliary_stage]
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


# --- positives -----------------------------------------------------------------------------------------------------------


def resampled_shapes(configuration: Configuration) -> list[list[int]]:
    """Shapes of the training cases as the configuration has them, (3,) voxels each, from nnU-Net's own fingerprint."""
    file = configuration.folder / "dataset_fingerprint.json"
    fingerprint = read_json(file, f"Type: nnUNetv2_extract_fingerprint -d {configuration.id}")
    order = configuration.plans_manager.transpose_forward
    shapes = []
    for shape, spacing in zip(fingerprint["shapes_after_crop"], fingerprint["spacings"], strict=True):
        shape, spacing = [shape[i] for i in order], [spacing[i] for i in order]
        target = list(configuration.manager.spacing)
        target = spacing[: 3 - len(target)] + target
        shapes.append([int(n) for n in compute_new_shape(shape, spacing, target)])
    return shapes


def positive_distances(shapes: Sequence[Sequence[int]], sampling: Sampling, batches: int = 64) -> list[np.ndarray]:
    """Chebyshev distances of all pairs of patches in batches drawn as in training, (N, N) each, fraction of the volume."""
    distances = []
    for step in range(batches):
        positions = []
        for generator, place in sampling.generators(step):
            shape = shapes[int(generator.integers(len(shapes)))]
            corner = draw_corner(shape, sampling.patch_size, generator, place)
            positions.append(position(corner, sampling.patch_size, shape))
        positions = np.stack(positions)
        distances.append(np.abs(positions[:, None] - positions[None]).max(-1))
    return distances


def _expected_positives(distances: list[np.ndarray], threshold: float) -> float:
    """Mean number of positives an anchor, its own view included: both views of each near patch, itself not."""
    return float(np.mean([2 * (d < threshold).sum(1).mean() - (1 if threshold > 0 else -1) for d in distances]))


def plan_threshold(shapes: Sequence[Sequence[int]], sampling: Sampling, recipe: Recipe) -> tuple[float, float, str]:
    """Threshold t, the expected number of positives an anchor (own view included), and the reason."""
    distances = positive_distances(shapes, sampling)
    threshold = float(recipe.threshold)
    at_recipe = _expected_positives(distances, threshold)
    if not recipe.limit_positives or threshold == 0:
        return threshold, at_recipe, "as the recipe has it"
    limit = max(sampling.batch_size / 8, 2.5 * (sampling.position_group_size - 1))
    while _expected_positives(distances, threshold) - 1 > limit:
        threshold = threshold * 0.9 if threshold > 0.004 else 0.0
    threshold = round(threshold, 4)
    expected = _expected_positives(distances, threshold)
    if threshold == recipe.threshold:
        return threshold, expected, f"as the recipe has it: at most {limit:.3g} positives beside the own view"
    reason = (
        f"lowered from {recipe.threshold}, where an anchor would have {at_recipe - 1:.1f} positives beside its own view: more "
        f"than {limit:.3g} dilute the own view, which is learned first, and the run collapses"
    )
    return threshold, expected, reason


def _position_group_size(axes: int, batch_size: int, recipe: Recipe) -> tuple[int, str]:
    if recipe.threshold == 0:
        return 1, "only the own view is a positive"
    if axes == 2:
        return 1, "slices of different cases meet by chance often enough"
    size = 1 + max(1, batch_size // 16)
    if batch_size < 2 * size:
        return 1, f"a batch of {batch_size} is too small for groups"
    return (
        size,
        "in 3D few random patches lie near each other, so some are drawn at one relative place of several cases",
    )


# --- memory --------------------------------------------------------------------------------------------------------------


def build_network(
    configuration: Configuration, levels: Levels | MACLPlan, recipe: Recipe, unet: nn.Module | None = None
) -> MACLNetwork:
    """The pre-training network around ``unet``, or around nnU-Net's own network for the configuration."""
    if unet is None:
        manager = configuration.manager
        unet = get_network_from_plans(
            manager.network_arch_class_name,
            manager.network_arch_init_kwargs,
            manager.network_arch_init_kwargs_req_import,
            len(configuration.channel_names),
            2,
            allow_init=False,
        )
    return MACLNetwork(
        unet,
        decoder_stages=levels.decoder_stages,
        auxiliary_stage=levels.auxiliary_stage,
        image_level=recipe.weight_global > 0,
        pixel_level=recipe.weight_dense > 0,
        feature_level=recipe.weight_equivariance > 0,
        embedding_dim=recipe.embedding_dim,
        standardise=recipe.standardise_projector,
        auxiliary_encoder=recipe.auxiliary_encoder,
        ema_decay=recipe.ema_decay,
    )


def build_loss(recipe: Recipe) -> MultiLevelContrastiveLoss:
    return MultiLevelContrastiveLoss(
        weight_global=recipe.weight_global,
        weight_dense=recipe.weight_dense,
        weight_equivariance=recipe.weight_equivariance,
        temperature=recipe.temperature,
        threshold=recipe.threshold,
        base_temperature=recipe.base_temperature,
        own_view_weight=recipe.own_view_weight,
    )


def build_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = [p for p in network.parameters() if p.requires_grad]
    settings: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=recipe.momentum, **settings)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer](parameters, **settings)


class MemoryEstimate:
    """Memory of a training step, from a forward pass that computes shapes only (torch's meta device)."""

    def __init__(self, configuration: Configuration, levels: Levels, recipe: Recipe) -> None:
        with torch.device("meta"):
            self._network = build_network(configuration, levels, recipe)
        self._channels = len(configuration.channel_names)
        self._patch = levels.patch_size
        self._small = [n // s for n, s in zip(levels.patch_size, levels.scale, strict=True)]
        self._loss = build_loss(recipe)
        weights = sum(p.numel() for p in self._network.parameters())
        trained = sum(p.numel() for p in self._network.parameters() if p.requires_grad)
        self._half_weights = 2 * weights
        # weight, gradient, and what the optimiser keeps
        self._fixed = 4 * (weights + trained * (1 + {"sgd": 1, "adam": 2, "adamw": 2}[recipe.optimizer]))

    def gib(self, batch_size: int, *, mixed_precision: bool = False) -> float:
        """The most that a training step holds, GiB."""
        kept, largest, chunks = self._activations(batch_size)
        # the backward pass of the largest layer holds two gradients of its size
        activations = kept + 2 * largest
        if mixed_precision:
            # autocast keeps a copy of the weights in half precision for the backward pass
            activations = activations * _AUTOCAST_SHARE + self._half_weights
        return (activations + chunks + self._fixed) / 2**30

    def kept(self, batch_size: int) -> int:
        """What autograd keeps for the backward pass, and weights, gradients and optimiser state, bytes in float32."""
        return self._activations(batch_size)[0] + self._fixed

    def _activations(self, batch_size: int) -> tuple[int, int, int]:
        """Bytes in float32: all that autograd keeps; the largest of it; what the dense loss in chunks holds besides."""
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter):
                storage = tensor.untyped_storage()
                kept[storage._cdata] = storage
            return tensor

        image_level, invariance = self._network.image_level, self._network.needs_invariance
        small = torch.empty(batch_size, self._channels, *self._small, device="meta")
        full = torch.empty(batch_size, self._channels, *self._patch, device="meta")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = self._network(
                small if invariance else None,
                full if invariance else None,
                small if image_level else None,
                full if image_level else None,
            )
            self._loss(outputs, torch.empty(batch_size, 3, device="meta"))
        sizes = [storage.nbytes() for storage in kept.values()]
        return sum(sizes), max(sizes), _dense_loss_in_chunks(outputs.get("dense_dominant"))


def _dense_loss_in_chunks(dense: torch.Tensor | None) -> int:
    """Bytes that autograd does not see: what the dense loss computes again from, whole, and the one chunk at work.

    Args:
        dense: (N, C, *grid); None without the dense loss.
    """
    if dense is None:
        return 0
    vectors, channels, locations = 2 * dense.shape[0], dense.shape[1], math.prod(dense.shape[2:])
    if locations <= max(1, _MAX_SIMILARITIES // vectors**2):
        return 0
    return 4 * (vectors * channels * locations + _SIMILARITY_ARRAYS * max(_MAX_SIMILARITIES, vectors**2))


def _plan_batch_size(memory: MemoryEstimate, recipe: Recipe, target: float) -> tuple[int, str]:
    """The batch, and the reason. target: GPU memory, GB as nnU-Net counts them."""
    if recipe.batch_size != AUTO:
        batch_size, reason = int(recipe.batch_size), "as the recipe has it"
    else:
        fits = (n for n in _BATCH_SIZES if memory.gib(n, mixed_precision=True) <= target)
        batch_size = next(fits, _BATCH_SIZES[-1])
        reason = f"the largest of up to {_BATCH_SIZES[0]} that fits gpu_memory_gb in mixed precision"
    needed = memory.gib(batch_size, mixed_precision=True)
    if needed <= target:
        return batch_size, reason
    if recipe.batch_size == AUTO:
        reason = "the smallest there can be"
    return batch_size, f"{reason}, though it takes about {needed:.1f} GB in mixed precision: more than gpu_memory_gb"


# --- the plan ------------------------------------------------------------------------------------------------------------


def derive_plan(
    configuration: Configuration,
    recipe: Recipe,
    *,
    unlabelled_datasets: Sequence[str] = (),
    skip_unreadable: bool = False,
    gpu_memory_gb: float | None = None,
) -> MACLPlan:
    """The MACL plan of a configuration.

    Args:
        configuration: of nnU-Net.
        recipe: what is trained, and how.
        unlabelled_datasets: further raw data sets, by full name.
        skip_unreadable: leave out images that cannot be used.
        gpu_memory_gb: what the batch may take; None is what nnU-Net planned for.

    Raises:
        UserError: the recipe and the network do not go together; nnU-Net's fingerprint is missing.
        NotImplementedError: a network that is no U-Net.
    """
    levels = plan_levels(configuration.patch_size, configuration.strides, recipe)
    patch = levels.patch_size
    axes = len(patch)
    stride = np.prod(np.asarray(configuration.strides)[: levels.auxiliary_stage], axis=0)
    memory = MemoryEstimate(configuration, levels, recipe)
    target, target_reason = configuration.gpu_memory_target()
    if gpu_memory_gb is not None:
        target, target_reason = check_gpu_memory(gpu_memory_gb), "asked for with -gpu_memory"
    batch_size, batch_reason = _plan_batch_size(memory, recipe, target)
    group_size, group_reason = _position_group_size(axes, batch_size, recipe)
    sampling = Sampling(volume_patch(patch), batch_size, group_size, recipe.seed)
    threshold, expected, threshold_reason = plan_threshold(resampled_shapes(configuration), sampling, recipe)
    if axes == 2:
        out_of_plane, out_reason = 0.0, "2D"
    elif max(patch) / patch[0] > ANISO_THRESHOLD:
        out_of_plane, out_reason = 0.0, "the patch is anisotropic: nnU-Net rotates in plane only"
    else:
        out_of_plane, out_reason = 30.0, "nnU-Net's own range for isotropic patches, degrees"
    return MACLPlan(
        dataset_name=configuration.dataset_name,
        plans_name=configuration.plans_name,
        configuration=configuration.name,
        nnunet_plan_checksum=configuration.plan_checksum(),
        unlabelled_datasets=list(unlabelled_datasets),
        skip_unreadable=skip_unreadable,
        decoder_stages=levels.decoder_stages,
        auxiliary_stage=levels.auxiliary_stage,
        scale=levels.scale,
        patch_size=patch,
        dominant_patch_size=[n // s for n, s in zip(patch, levels.scale, strict=True)],
        grid=[n // int(s) for n, s in zip(patch, stride, strict=True)],
        batch_size=batch_size,
        position_group_size=group_size,
        threshold=threshold,
        expected_positives=round(expected, 2),
        out_of_plane_rotation=out_of_plane,
        gpu_memory_gb=target,
        memory_gib=round(memory.gib(batch_size), 2),
        memory_mixed_precision_gib=round(memory.gib(batch_size, mixed_precision=True), 2),
        recipe=recipe.as_dict(),
        reasons={
            "decoder_stages, auxiliary_stage, scale, patch_size": levels.reason,
            "dominant_patch_size": "patch_size divided by scale",
            "grid": f"where both dense maps lie: patch_size divided by the stride at stage {levels.auxiliary_stage}",
            "gpu_memory_gb": target_reason,
            "batch_size": batch_reason,
            "position_group_size": group_reason,
            "threshold": threshold_reason,
            "expected_positives": "of an anchor, its own view included, counted over batches drawn as in training",
            "out_of_plane_rotation": out_reason,
            "memory_gib": "activations of both branches, weights, gradients and optimiser state at their peak in float32; "
            "memory_mixed_precision_gib as a GPU has it",
        },
    )


def check_gpu_memory(gpu_memory_gb: float) -> float:
    """The value itself. Raises UserError unless it is a number above 0."""
    if not _above_zero(gpu_memory_gb):
        raise UserError(
            f"-gpu_memory must be a number of GB above 0, got {gpu_memory_gb!r}. Type, for example: -gpu_memory 24"
        )
    return float(gpu_memory_gb)


def _above_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def plan_file(configuration: Configuration) -> Path:
    return configuration.folder / f"{configuration.plans_name}_macl_{configuration.name}.json"


def read_plan(file: Path) -> tuple[MACLPlan, bool]:
    """Read a MACL plan and tell whether it was edited since it was written.

    Raises:
        UserError: no such file, or not a MACL plan; names the key.
    """
    mend = "Correct it, or move it away to have it derived again."
    content = read_json(file, mend)
    names = [f.name for f in fields(MACLPlan)]
    if not isinstance(content, dict):
        raise UserError(f"{file} is no MACL plan. {mend}")
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{file} has format version {content.get('format_version')!r}, this nnunetv2_macl reads {FORMAT_VERSION}. "
            f"Update nnunetv2_macl, or move the file away to have it derived again."
        )
    if missing := [name for name in names if name not in content]:
        raise UserError(f"{file} lacks {', '.join(missing)}. {mend}")
    edited = content.get("checksum") != checksum({k: v for k, v in content.items() if k != "checksum"})
    plan = MACLPlan(**{name: content[name] for name in names})
    recipe_from_values(plan.recipe, f"{file}, 'recipe'")
    return plan, edited


def check_plan(plan: MACLPlan, configuration: Configuration, file: Path) -> None:
    """Check a plan that was edited against its network. Raises UserError that names the key, the rule and the value."""
    mend = f"Correct it in {file}, or move the file away to have it derived again."
    axes, stages = len(configuration.patch_size), len(configuration.strides)

    def require(true: bool, key: str, rule: str) -> None:
        if not true:
            raise UserError(f"'{key}' must be {rule}, got {getattr(plan, key)!r}. {mend}")

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
    require(plan.scale == scale.tolist(), "scale", f"{scale.tolist()}, from decoder_stages and auxiliary_stage")
    step = scale * total[-1]
    require(not (np.asarray(plan.patch_size) % step).any(), "patch_size", f"a multiple of {step.tolist()}")
    require(np.prod(np.asarray(plan.patch_size) // step) > 1, "patch_size", f"more than {step.tolist()} on some axis")
    small = (np.asarray(plan.patch_size) // scale).tolist()
    require(plan.dominant_patch_size == small, "dominant_patch_size", f"{small}, patch_size divided by scale")
    require(whole(plan.batch_size, 2), "batch_size", "a whole number from 2")
    require(whole(plan.position_group_size, 1), "position_group_size", "a whole number from 1")
    require(_above_zero(plan.gpu_memory_gb), "gpu_memory_gb", "a number above 0")
    for key, high in (("threshold", 1), ("out_of_plane_rotation", 180)):
        value = getattr(plan, key)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= high
        require(good, key, f"a number from 0 to {high}")
    good = isinstance(plan.unlabelled_datasets, list) and all(isinstance(d, str) for d in plan.unlabelled_datasets)
    require(good, "unlabelled_datasets", "a list of data set names")
    require(isinstance(plan.skip_unreadable, bool), "skip_unreadable", "true or false")
    if plan.nnunet_plan_checksum != configuration.plan_checksum():
        raise UserError(
            f"{file} was derived from another nnU-Net plan than the one there is now. Move it away to have it derived again."
        )


def write_plan(plan: MACLPlan, file: Path, *, edited: bool = False) -> None:
    write_json(plan.as_json(edited=edited), file)


def describe(plan: MACLPlan) -> str:
    """The plan in words, a line a derived value with its reason."""
    lines = [f"MACL plan of {plan.dataset_name}, {plan.plans_name}, {plan.configuration}"]
    for keys, reason in plan.reasons.items():
        values = ", ".join(f"{key} {_words(getattr(plan, key))}" for key in keys.split(", "))
        lines.append(f"  {values}\n      {reason}")
    lines.append(
        f"  memory: about {plan.memory_mixed_precision_gib} GiB on a GPU in mixed precision, {plan.memory_gib} GiB in float32"
    )
    if plan.unlabelled_datasets:
        lines.append(f"  unlabelled images also from {', '.join(plan.unlabelled_datasets)}")
    return "\n".join(lines)


def _words(value: Any) -> str:
    if isinstance(value, (list, tuple, np.ndarray)):
        return "x".join(str(n) for n in value)
    return json.dumps(value)
