"""What a training step will hold in memory, and the batch that fits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from nnunetv2_macl.building import build_loss, build_network
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.losses import MAX_SIMILARITIES
from nnunetv2_macl.nnunet import Configuration
from nnunetv2_macl.planning.levels import Levels
from nnunetv2_macl.recipe import AUTO, Recipe

# the batch beyond which more memory is not spent
_BATCH_SIZES = (32, 24, 16, 12, 8, 6, 4, 2)
# torch's autocast keeps about half of what float32 would
_AUTOCAST_SHARE = 0.55
# arrays of similarities that the dense loss holds at once in its backward pass
_SIMILARITY_ARRAYS = 5


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
        activations = float(kept + 2 * largest)
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
    if locations <= max(1, MAX_SIMILARITIES // vectors**2):
        return 0
    return 4 * (vectors * channels * locations + _SIMILARITY_ARRAYS * max(MAX_SIMILARITIES, vectors**2))


def plan_batch_size(memory: MemoryEstimate, recipe: Recipe, target: float) -> tuple[int, str]:
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


def check_gpu_memory(gpu_memory_gb: float) -> float:
    """The value itself. Raises UserError unless it is a number above 0."""
    if not is_above_zero(gpu_memory_gb):
        raise UserError(
            f"-gpu_memory must be a number of GB above 0, got {gpu_memory_gb!r}. Type, for example: -gpu_memory 24"
        )
    return float(gpu_memory_gb)


def is_above_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
