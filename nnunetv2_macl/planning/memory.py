"""What a training step will hold in memory, and the batch that fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from nnunetv2_macl.building import build_loss, build_network
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.losses import locations_at_once
from nnunetv2_macl.network import MACLNetwork
from nnunetv2_macl.nnunet import Configuration
from nnunetv2_macl.planning.levels import Levels
from nnunetv2_macl.recipe import AUTO, Recipe

# the batch beyond which more memory is not spent
_BATCH_SIZES = (32, 24, 16, 12, 8, 6, 4, 2)
# patches in a batch below which an anchor has little to be told apart from
_FEW_NEGATIVES = 8
# torch's autocast keeps about half of what float32 would
_AUTOCAST_SHARE = 0.55
# arrays of similarities that the dense loss holds at once
_SIMILARITY_ARRAYS = 4


# see MemoryEstimate._step
_Counted = tuple[int, int, torch.Tensor | None]


class MemoryEstimate:
    """Memory of a training step, from a forward pass that computes shapes only (torch's meta device)."""

    def __init__(self, configuration: Configuration, levels: Levels, recipe: Recipe) -> None:
        with torch.device("meta"):
            self.network = build_network(configuration, levels, recipe)
        self._channels = len(configuration.channel_names)
        self._patch = levels.patch_size
        self._small = [n // s for n, s in zip(levels.patch_size, levels.scale, strict=True)]
        # of the variance group, in the training stage that holds more
        self._small_view = self._patch if recipe.full_size_first else self._small
        self._loss = build_loss(recipe)
        weights = sum(p.numel() for p in self.network.parameters())
        trained = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        self._half_weights = 2 * weights
        # weight, gradient, and what the optimiser keeps
        self._fixed = 4 * (weights + trained * (1 + {"sgd": 1, "adam": 2, "adamw": 2}[recipe.optimizer]))

    def gib(self, batch_size: int, patches_at_once: int | None = None, *, mixed_precision: bool = False) -> float:
        """The most that a training step holds, GiB.

        Args:
            batch_size: N.
            patches_at_once: patches whose activations are held at a time; None is all.
            mixed_precision: under torch's autocast.
        """
        at_once = batch_size if patches_at_once is None else min(patches_at_once, batch_size)
        # one after the other; what is made of a whole batch's images lies there while its parts pass
        image, small, small_view = (
            4 * self._channels * math.prod(size) for size in (self._patch, self._small, self._small_view)
        )
        passes = []
        if self.network.is_contrastive:
            shown = small * self.network.needs_invariance + (small_view + image) * self.network.image_level
            passes.append((self._contrast(batch_size, at_once), shown))
        if self.network.restoration_head is not None:
            passes.append((self._restoration(at_once), image + math.prod(self._patch)))
        most = max(self._held(counted, mixed_precision) + batch_size * shown for counted, shown in passes)
        return (most + batch_size * image + self._fixed) / 2**30

    def _held(self, counted: _Counted, mixed_precision: bool) -> float:
        kept, largest, dense = counted
        # the backward pass of the largest layer holds two gradients of its size
        activations = float(kept + 2 * largest)
        if mixed_precision:
            # autocast keeps a copy of the weights in half precision for the backward pass
            activations = activations * _AUTOCAST_SHARE + self._half_weights
        # float32 is what a CPU computes in
        return activations + _dense_loss(dense, "cuda" if mixed_precision else "cpu")

    def kept(self, batch_size: int) -> int:
        """What autograd keeps for the backward pass, and weights, gradients and optimiser state, bytes in float32."""
        step = self._step if self.network.is_contrastive else self._restoration
        return step(batch_size)[0] + self._fixed

    # Each returns, in bytes of float32, all that autograd keeps and the largest of it; and the dense embeddings, if any.

    def _contrast(self, batch_size: int, at_once: int) -> _Counted:
        if at_once >= batch_size:
            return self._step(batch_size)
        features = self._features(at_once)
        projectors, largest, dense = self._projectors(batch_size)
        # the features of all patches and their gradients lie there while the projectors and then the patches pass
        kept = 2 * self._feature_bytes(batch_size) + max(features[0], projectors)
        return kept, max(features[1], largest), dense

    def _restoration(self, patches: int) -> _Counted:
        def compute() -> None:
            images = torch.empty(patches, self._channels, *self._patch, device="meta")
            (self.network.restore(images) - images).square().sum()

        return self._count(compute)

    def _step(self, batch_size: int) -> _Counted:
        return self._count(lambda: self._loss_of(self.network(*self._groups(batch_size))))

    def _features(self, batch_size: int) -> _Counted:
        def compute() -> None:
            self.network.features(*self._groups(batch_size))

        return self._count(compute)

    def _projectors(self, batch_size: int) -> _Counted:
        with torch.no_grad():
            features = self.network.features(*self._groups(batch_size))
        features = {key: torch.empty_like(value).requires_grad_() for key, value in features.items()}
        return self._count(lambda: self._loss_of(self.network.project(features)))

    def _feature_bytes(self, batch_size: int) -> int:
        with torch.no_grad():
            return 4 * sum(f.numel() for f in self.network.features(*self._groups(batch_size)).values())

    def _groups(self, batch_size: int) -> tuple[torch.Tensor | None, ...]:
        image_level, invariance = self.network.image_level, self.network.needs_invariance
        small, small_view, full = (
            torch.empty(batch_size, self._channels, *size, device="meta")
            for size in (self._small, self._small_view, self._patch)
        )
        return (
            small if invariance else None,
            full if invariance else None,
            small_view if image_level else None,
            full if image_level else None,
        )

    def _loss_of(self, outputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        patches = len(next(iter(outputs.values())))
        self._loss(outputs, torch.empty(patches, 3, device="meta"))
        return outputs.get("dense_dominant")

    @staticmethod
    def _count(compute: Callable[[], torch.Tensor | None]) -> _Counted:
        """``compute`` returns the dense embeddings where the dense loss is part of it."""
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter):
                storage = tensor.untyped_storage()
                kept[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            dense = compute()
        sizes = [storage.nbytes() for storage in kept.values()]
        return sum(sizes), max(sizes), dense


def _dense_loss(dense: torch.Tensor | None, device_type: str) -> int:
    """Bytes that the dense loss holds while it computes: vectors by location, similarities of one chunk.

    Args:
        dense: (N, C, *grid); None without the dense loss.
        device_type: which decides how large a chunk is.
    """
    if dense is None:
        return 0
    vectors, channels, locations = 2 * dense.shape[0], dense.shape[1], math.prod(dense.shape[2:])
    at_once = min(locations, locations_at_once(vectors, device_type))
    return 4 * (vectors * channels * (locations + at_once) + _SIMILARITY_ARRAYS * at_once * vectors**2)


class Batch(NamedTuple):
    """The batch, how many of its patches are computed at a time, and the reason for each."""

    size: int
    at_once: int
    size_reason: str
    at_once_reason: str


def plan_batch(memory: MemoryEstimate, recipe: Recipe, target: float) -> Batch:
    """The batch that fits. target: GPU memory, GB as nnU-Net counts them."""

    def fits(size: int, at_once: int | None = None) -> bool:
        return memory.gib(size, at_once, mixed_precision=True) <= target

    if recipe.batch_size == AUTO:
        size = next(filter(fits, _BATCH_SIZES), _BATCH_SIZES[-1])
        reason = f"the largest of up to {_BATCH_SIZES[0]} that fits gpu_memory_gb in mixed precision"
        if not fits(size):
            reason = "the smallest there can be"
        if recipe.is_contrastive and size < _FEW_NEGATIVES and not memory.network.features_vary:
            reason += (
                f"; few negatives: -batch_size {_FEW_NEGATIVES} would be computed in parts, at the memory of a part"
            )
    else:
        size, reason = int(recipe.batch_size), "as the recipe has it"
    if recipe.patches_at_once != AUTO:
        at_once, at_once_reason = min(int(recipe.patches_at_once), size), "as the recipe has it"
    elif fits(size) or memory.network.features_vary:
        at_once, at_once_reason = size, "the whole batch"
    else:
        at_once = next((n for n in _BATCH_SIZES if n < size and fits(size, n)), 1)
        at_once_reason = "the most that fits; the gradient is that of the whole batch"
        if recipe.is_contrastive:
            at_once_reason += ", at a third more time"
    refuse_parts(memory.network, at_once, size)
    needed = memory.gib(size, at_once, mixed_precision=True)
    if needed > target:
        reason += f", though it takes about {needed:.1f} GB in mixed precision: more than gpu_memory_gb"
    return Batch(size, at_once, reason, at_once_reason)


def refuse_parts(network: MACLNetwork, at_once: int, patches: int) -> None:
    """Raises UserError where a batch is to be computed in parts, and what is made of a patch depends on the others.

    Args:
        network: to be trained.
        at_once: patches in a part.
        patches: of the batch.
    """
    if at_once < patches and network.features_vary:
        raise UserError(
            f"patches_at_once is {at_once} of a batch of {patches}, and this network has batch norm or dropout, so that a batch "
            f"cannot be computed in parts. Take it whole: -patches_at_once {patches}"
        )


def check_gpu_memory(gpu_memory_gb: float) -> float:
    """The value itself. Raises UserError unless it is a number above 0."""
    if not is_above_zero(gpu_memory_gb):
        raise UserError(
            f"-gpu_memory must be a number of GB above 0, got {gpu_memory_gb!r}. Type, for example: -gpu_memory 24"
        )
    return float(gpu_memory_gb)


def is_above_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
