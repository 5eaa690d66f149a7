"""Distribute a batch over the ranks of torch.distributed, with the gradients of a single process.

Every rank computes the same loss from the embeddings of the whole batch. Each rank therefore knows the gradient at the gathered
embeddings without communication. The gradients of the weights are summed over the ranks, and equal those of a single process
with the whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# the other ranks wait while rank 0 preprocesses, which may take days
_PREPROCESS_TIMEOUT = timedelta(days=30)


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def local_rank() -> int:
    """Return the number of this rank on its machine, which is the number of its GPU. torchrun sets it."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def ranks_on_this_machine() -> int:
    """Return the number of ranks on this machine. torchrun sets it, and nnU-Net's own ranks are all on one machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if is_distributed() else 1


def started_by_torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def local_slice(patches: int, of_rank: int | None = None) -> tuple[int, int]:
    """Return first and last+1 patch of a rank, by default this one. The first ranks take one more if there is a remainder."""
    number = rank() if of_rank is None else of_rank
    each, rest = divmod(patches, world_size())
    first = number * each + min(number, rest)
    return first, first + each + (number < rest)


def gather(local: Tensor, patches: int) -> Tensor:
    """Gather the rows of all ranks, in their order: (n, ...) -> (N, ...). Gradients flow back to each rank.

    Args:
        local: One row for each patch of this rank's `local_slice`.
        patches: N, number of patches of all ranks.
    """
    return gather_all({"": local}, patches)[""]


def gather_all(local: dict[str, Tensor], patches: int) -> dict[str, Tensor]:
    """Gather several tensors like `gather`, in one message. If their precisions differ, half precision becomes float32."""
    if world_size() == 1 or not local:
        return local
    rows = [tensor.detach().reshape(len(tensor), -1) for tensor in local.values()]
    everyone = _all_rows(torch.cat(rows, 1), patches).split([row.shape[1] for row in rows], 1)
    return {
        name: _Gathered.apply(tensor, part.reshape(patches, *tensor.shape[1:]))
        for (name, tensor), part in zip(local.items(), everyone, strict=True)
    }


def _all_rows(local: Tensor, patches: int) -> Tensor:
    """Return the rows of all ranks, without gradients."""
    sizes = [last - first for first, last in (local_slice(patches, number) for number in range(world_size()))]
    # pad to the largest share, because all_gather needs equal shapes
    padded = local.new_zeros(max(sizes), *local.shape[1:])
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _Gathered(torch.autograd.Function):
    """Replaces the rows of this rank by those of all ranks, and returns the gradient of this rank's rows.

    Each tensor is gathered separately, so that a tensor that the loss does not use has no gradient, as in a single process. With
    a gradient of 0, momentum and weight decay would still change the weights.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, everyone: Tensor) -> Tensor:
        ctx.mine = slice(*local_slice(len(everyone)))
        return everyone

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.mine], None


class GradientSum:
    """Sums the gradients of all ranks in buckets, while the backward pass still runs.

    Every rank sends the buckets in the same order: that of the weights reversed, because the last layers get their gradients
    first.

    Args:
        modules: Modules without common weights. A bucket waits for those before it, so first come the modules that the last
            backward pass of a step trains. Parameters without a gradient are left out, and must be the same on all ranks.
        bucket_bytes: Size of a message. Small messages overlap better; large ones suit a slow network.
    """

    def __init__(self, *modules: nn.Module, bucket_bytes: int = 25 * 2**20) -> None:
        self._buckets: list[list[nn.Parameter]] = []
        self._sent: list[tuple[dist.Work | None, Tensor, list[Tensor]]] = []
        self._missing: list[int] = []
        self._is_last = False
        if world_size() == 1:
            return
        for module in modules:
            room = 0
            for parameter in reversed([p for p in module.parameters() if p.requires_grad]):
                if room <= 0:
                    self._buckets.append([])
                    room = bucket_bytes
                self._buckets[-1].append(parameter)
                room -= parameter.numel() * parameter.element_size()
                number = len(self._buckets) - 1
                parameter.register_post_accumulate_grad_hook(lambda _, number=number: self._ready(number))

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """Within the context, send each bucket once its gradients are complete. Use it for the last backward pass of a step."""
        self._missing, self._is_last = [len(bucket) for bucket in self._buckets], True
        try:
            yield
        finally:
            self._is_last = False

    def finish(self) -> None:
        """Send the remaining buckets, wait for all, and replace the gradients by their sums."""
        while len(self._sent) < len(self._buckets):
            self._send()
        for work, flat, gradients in self._sent:
            if work is not None:
                work.wait()
            for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))
        self._sent = []

    def _ready(self, number: int) -> None:
        if not self._is_last:
            return
        self._missing[number] -= 1
        while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] == 0:
            self._send()

    def _send(self) -> None:
        gradients = [p.grad for p in self._buckets[len(self._sent)] if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients]) if gradients else torch.empty(0)
        work = dist.all_reduce(flat, async_op=True) if gradients else None
        self._sent.append((work, flat, gradients))


def broadcast_module(module: nn.Module) -> None:
    """Give every rank the weights of rank 0."""
    if world_size() > 1:
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, 0)


def any_rank(true_here: bool) -> bool:
    """Return whether a condition is true on at least one rank. The result is the same on all ranks."""
    if world_size() == 1:
        return true_here
    flag = torch.tensor([float(true_here)])
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=_slow_group())
    return bool(flag)


def wait_for_all() -> None:
    """Wait for all ranks without a time limit, because NCCL ends ranks that wait for gradients longer than ten minutes."""
    any_rank(False)


def broadcast_object(value: Any) -> Any:
    """Return the value of rank 0 on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0, group=_slow_group())
    return values[0]


@lru_cache(maxsize=1)
def _slow_group() -> dist.ProcessGroup:
    """Return a group of all ranks on the CPU, with a timeout that is long enough for preprocessing."""
    return dist.new_group(backend="gloo", timeout=_PREPROCESS_TIMEOUT)  # type: ignore[return-value]


@contextmanager
def rank_zero_first() -> Iterator[bool]:
    """Yield whether this is rank 0, and let the other ranks wait at the end of the body for rank 0.

    Raises:
        SystemExit: On the other ranks, if rank 0 failed. Rank 0 has printed the reason.
    """
    failed = True
    try:
        yield rank() == 0
        failed = False
    finally:
        if any_rank(failed) and not failed:
            raise SystemExit(1)


class _Sum(torch.autograd.Function):
    """Sums a tensor over the ranks. The gradient is summed too, because every rank uses the sum."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        summed = local.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        summed = gradient.clone()
        dist.all_reduce(summed)
        return summed


class SynchronisedBatchNorm(_BatchNorm):
    """Batch norm over the patches of all ranks, on any device. torch's own layer supports only GPUs."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of axes."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        # compute statistics in float32, because half precision is too coarse for them
        values = input if input.dtype == torch.float64 else input.float()
        axes = [0, *range(2, input.ndim)]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        count = values.new_tensor([values.numel() / values.shape[1]])
        dist.all_reduce(count)
        mean = _Sum.apply(values.sum(axes)) / count
        centred = values - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(axes)) / count
        self._update_running(mean.detach(), variance.detach() * count / (count - 1))
        normalised = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(input.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)


def synchronise_batch_norm(module: nn.Module, device_type: str = "cpu") -> nn.Module:
    """Return the network with every batch norm over the patches of all ranks. Parameters and their names stay.

    Args:
        module: The network, which is changed in place.
        device_type: Device of the training. On a GPU torch's own layer is used, which is faster and needs less memory.
    """
    if device_type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    _replace_batch_norms(module)
    return module


def _replace_batch_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            synchronised = SynchronisedBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            synchronised.__dict__ |= {"training": child.training}
            synchronised._parameters, synchronised._buffers = child._parameters, child._buffers
            setattr(module, name, synchronised)
        else:
            _replace_batch_norms(child)
