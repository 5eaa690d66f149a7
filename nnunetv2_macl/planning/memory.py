"""Predict the memory of a training step, and choose the batch that fits into a GPU."""

from __future__ import annotations

import math
import weakref
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.factory import build_model
from nnunetv2_macl.losses import similarities_on_meta
from nnunetv2_macl.methods.base import Geometry, Method, Progress, StepRandom, to_device
from nnunetv2_macl.methods.model import PretrainingModel
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.recipe import AUTO, Recipe

# Batch sizes that the planner tries. Larger batches are not planned, however much memory there is.
_BATCH_SIZES = (32, 24, 16, 12, 8, 6, 4, 2)
# A contrastive loss has few negatives if the batch has fewer patches.
_FEW_NEGATIVES = 8
# Fragmentation and cuDNN's workspaces add this fraction to the memory of a step's tensors. On an H200 with expandable segments,
# they added 4 to 19 % for plain and residual U-Nets in 2D and 3D.
_OVERHEAD = 0.2
# cuBLAS allocates a workspace of this size in torch's memory.
_WORKSPACE_BYTES = 32 * 2**20
# Layers that autocast computes in half precision, and layers that it computes and returns in float32.
_IN_HALF_PRECISION = (nn.Conv2d, nn.Conv3d, nn.Linear)
_IN_FLOAT32 = (nn.LayerNorm,)
# The CUDA context and the libraries take this memory outside of torch.
_CONTEXT_BYTES = 0.6e9


class MemoryEstimate:
    """The memory of a training step, predicted by running forward and backward pass without values.

    The meta device of torch runs all operations on shapes only, so every map, copy and gradient has its real size and lifetime.
    """

    def __init__(self, configuration: DatasetConfiguration, geometry: Geometry, recipe: Recipe) -> None:
        with torch.device("meta"):
            self.model = build_model(configuration, geometry, recipe)
        self._geometry = geometry
        self._channels = len(configuration.channel_names)
        # Methods that train in stages may need more memory in the first or in the last step, so both are measured.
        steps = recipe.num_epochs * recipe.num_iterations_per_epoch
        self._progresses = [
            Progress(step, recipe.num_epochs, recipe.num_iterations_per_epoch)
            for step in ([0, steps - 1] if recipe.trains_in_stages else [0])
        ]
        weights = sum(p.numel() for p in self.model.parameters())
        buffers = sum(b.numel() for b in self.model.buffers())
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self._half_weights = 2 * weights
        # Weights, gradients, optimiser state, and buffers, which are counted twice because a step keeps a backup of them.
        states = {"sgd": 1, "adam": 2, "adamw": 2}[recipe.optimizer]
        self._fixed = 4 * (weights + trained * (1 + states) + 2 * buffers)
        self._peaks: dict[tuple[int, int, bool], int] = {}
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                # Drop gradients at once, because `_fixed` includes them.
                parameter.register_post_accumulate_grad_hook(_forget_gradient)
        for module in self.model.modules():
            if isinstance(module, (*_IN_HALF_PRECISION, *_IN_FLOAT32)):
                module.register_forward_pre_hook(_cast_as_autocast_does)

    def gib(self, batch_size: int, patches_at_once: int | None = None, *, mixed_precision: bool = False) -> float:
        """Return the peak memory of the tensors of a training step, GiB.

        Args:
            batch_size: N.
            patches_at_once: Number of patches whose activations are in memory at once. None is the whole batch.
            mixed_precision: Whether to predict for a GPU with autocast to half precision. Otherwise for float32 on a CPU.
        """
        at_once = batch_size if patches_at_once is None else min(patches_at_once, batch_size)
        key = batch_size, at_once, mixed_precision
        if key not in self._peaks:
            self._peaks[key] = self._peak(*key)
        held = self._peaks[key] + self._fixed
        if mixed_precision:
            # Autocast keeps a half-precision copy of the weights for the backward pass.
            held += self._half_weights + _WORKSPACE_BYTES
        return held / 2**30

    def _peak(self, batch_size: int, at_once: int, mixed_precision: bool) -> int:
        dtype = torch.float16 if mixed_precision else torch.float32
        self.model.to(dtype)
        for module in self.model.methods.modules():
            # Heads read pooled features in float32, and autocast changes their memory only a little.
            if isinstance(module, (nn.Linear, nn.BatchNorm1d)):
                module.to(torch.float32)
        for module in self.model.network.modules():
            if isinstance(module, _IN_FLOAT32):
                module.to(torch.float32)
        random = StepRandom(0, 0, batch_size, slice(None), self._channels, tuple(self._geometry.patch_size))
        numbers = to_device(self.model.views.draw(random), torch.device("meta"))
        with (
            similarities_on_meta("cuda" if mixed_precision else "cpu"),
            _LiveMemory(_as_cuda_allocates if mixed_precision else int) as memory,
        ):
            images = batch_size * (1 + self.model.uses_neighbours)
            patches = torch.empty(images, self._channels, *self._geometry.patch_size, device="meta")
            for progress in self._progresses:
                for method in self.model:
                    views = self.model.make_views(method, patches, numbers[method.name], progress)
                    self._backward(method, views, at_once, progress)
                    del views
        return memory.most

    def _backward(self, method: Method, views: dict[str, Tensor], at_once: int, progress: Progress) -> None:
        """Run the forward and backward passes in the same order as `TrainingStep`."""
        size = len(next(iter(views.values())))
        part = {name: view[:at_once] for name, view in views.items()}
        if at_once >= size or not method.couples_samples:
            self._losses(method, method.project(method.encode(part)), progress).sum().backward()
            return
        with torch.no_grad():
            # One part is enough, because the parts run one after another and need the same memory.
            piece = method.encode(part)
            joined = {key: value.new_empty(size, *value.shape[1:]) for key, value in piece.items()}
            del piece
        joined = {key: value.requires_grad_() for key, value in joined.items()}
        outputs = method.project(joined)
        self._losses(method, outputs, progress).backward()
        gradients = {key: value.grad for key, value in joined.items() if value.grad is not None}
        del joined
        piece = method.encode(part)
        used = [key for key in piece if piece[key].requires_grad and key in gradients]
        torch.autograd.backward([piece[key] for key in used], [gradients[key][:at_once] for key in used])

    def _losses(self, method: Method, outputs: dict[str, Tensor], progress: Progress) -> Tensor:
        patches = len(next(iter(outputs.values())))
        return method.losses(outputs, torch.empty(patches, 3, device="meta"), progress)["total"]


def _as_cuda_allocates(size: int) -> int:
    """Return a number of bytes rounded up as in torch's CUDA allocator: to 512 bytes, or to 2 MiB for large blocks."""
    unit = 512 if size < 2**20 else 2**21
    return -(-size // unit) * unit


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _cast_as_autocast_does(layer: nn.Module, values: tuple[Tensor]) -> tuple[Tensor]:
    """Return the input of a layer cast to the layer's precision. As with autocast, the cast allocates a copy."""
    return (values[0].to(next(layer.parameters()).dtype),)


class _LiveMemory(TorchDispatchMode):
    """Track the memory of all tensors that operations created and that are still in use.

    Args:
        allocated: Function from the size of a tensor to the size of the allocated block, bytes.

    Attributes:
        most: The peak so far, bytes.
    """

    def __init__(self, allocated: Callable[[int], int]) -> None:
        super().__init__()
        self.most = self._now = 0
        self._allocated = allocated
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        # The storage is known if the result is a view or was changed in place.
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        size = self._allocated(storage.nbytes())
        self._now += size
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._free, storage._cdata, size)

    def _free(self, number: int, size: int) -> None:
        self._known.discard(number)
        self._now -= size


def training_memory(network: nn.Module, channels: int, batch_size: int, patch_size: Sequence[int]) -> int:
    """Return the peak memory of the tensors of a segmentation network's training step without its weights, bytes.

    Args:
        network: The network on the meta device. It returns one map or a list of maps.
        channels: Number of image channels.
        batch_size: N.
        patch_size: Voxels per axis.
    """
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    with _LiveMemory(int) as memory:
        images = torch.empty(batch_size, channels, *patch_size, device="meta")
        outputs = network(images)
        maps = outputs if isinstance(outputs, list) else [outputs]
        torch.autograd.grad([values.sum() for values in maps], trained, allow_unused=True)
    return memory.most


class BatchSizes(NamedTuple):
    """The batch size, the number of patches that are computed at once, and the reasons for both."""

    size: int
    at_once: int
    size_reason: str
    at_once_reason: str


def plan_batch(memory: MemoryEstimate, recipe: Recipe, target: float) -> BatchSizes:
    """Return the batch size of the recipe, or the largest one that fits, and the number of patches that are computed at once.

    Args:
        memory: Memory of a training step.
        recipe: Recipe of the run.
        target: Memory of the GPU, GB (10^9 bytes), as it is advertised.

    Raises:
        UserError: The recipe computes a batch in parts, and the network has batch norm or dropout.
    """

    def needed(size: int, at_once: int | None = None) -> float:
        """Return the memory on the GPU, GB, including everything besides the tensors of the step."""
        tensors = memory.gib(size, at_once, mixed_precision=True) * 2**30
        # A GPU that is sold with 8 GB has 8 GiB. The difference is used for the CUDA context.
        spare = target * (2**30 - 1e9)
        return (tensors * (1 + _OVERHEAD) + max(0.0, _CONTEXT_BYTES - spare)) / 1e9

    def fits(size: int, at_once: int | None = None) -> bool:
        return needed(size, at_once) <= target

    if recipe.batch_size == AUTO:
        size = _largest(_BATCH_SIZES, fits) or _BATCH_SIZES[-1]
        reason = f"the largest of up to {_BATCH_SIZES[0]} that fits gpu_memory_gb in mixed precision"
        if not fits(size):
            reason = "the smallest possible"
        has_few_negatives = recipe.couples_samples and size < _FEW_NEGATIVES
        if has_few_negatives and not memory.model.network.mixes_samples and fits(_FEW_NEGATIVES, 1):
            reason += f"; a contrast has few negatives. -batch_size {_FEW_NEGATIVES} would be computed in parts and fit"
    else:
        size, reason = int(recipe.batch_size), "set by the recipe"
    if recipe.patches_at_once != AUTO:
        at_once, at_once_reason = min(int(recipe.patches_at_once), size), "set by the recipe"
    elif fits(size) or memory.model.network.mixes_samples:
        at_once, at_once_reason = size, "the whole batch"
    else:
        at_once = _largest([n for n in _BATCH_SIZES if n < size], lambda n: fits(size, n)) or 1
        at_once_reason = "the largest that fits; the gradient is that of the whole batch"
        if recipe.couples_samples:
            at_once_reason += ", in about a third more time"
    check_batch_can_be_split(memory.model, at_once, size)
    if not fits(size, at_once):
        reason += f", but it takes about {needed(size, at_once):.1f} GB in mixed precision, more than gpu_memory_gb"
    return BatchSizes(size, at_once, reason, at_once_reason)


def _largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Return the first of descending sizes that fits, or None. All sizes after it must fit, too."""
    first = bisect_left(range(len(sizes)), True, key=lambda i: fits(sizes[i]))
    return sizes[first] if first < len(sizes) else None


def check_batch_can_be_split(model: PretrainingModel, at_once: int, patches: int) -> None:
    """Check that a batch may be computed in parts.

    Args:
        model: The model to train.
        at_once: Number of patches in a part.
        patches: Number of patches in the batch.

    Raises:
        UserError: The batch has several parts, and the network has batch norm or dropout.
    """
    if at_once < patches and model.network.mixes_samples:
        raise UserError(
            f"patches_at_once is {at_once} and the batch has {patches} patches, but this network has batch norm or dropout, so a "
            f"batch cannot be computed in parts. Compute the whole batch at once: -patches_at_once {patches}"
        )


def check_gpu_memory(gpu_memory_gb: float) -> float:
    """Return the value as a float.

    Raises:
        UserError: The value is not a finite number above 0.
    """
    if not is_above_zero(gpu_memory_gb):
        raise UserError(
            f"-gpu_memory must be a number of GB above 0, got {gpu_memory_gb!r}. Type, for example: -gpu_memory 24"
        )
    return float(gpu_memory_gb)


def is_above_zero(value: Any) -> bool:
    """Return whether a value is a finite number above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
