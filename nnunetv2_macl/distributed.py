"""Ranks of torch.distributed: this one's share of a batch, and what of the whole batch each rank needs.

Every rank computes the same loss, of the embeddings of the whole batch. So the gradient at the gathered embeddings is known on
each rank and needs no communication; the gradients of the weights are summed over ranks. Together they are what one process with
the whole batch would have.
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

# ranks wait for rank 0 to preprocess, which may take days
_PATIENCE = timedelta(days=30)


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def local_rank() -> int:
    """Number of this rank on its machine, as torchrun has set it: which GPU is its own."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def started_by_torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def share(patches: int) -> tuple[int, int]:
    """First and last+1 patch of this rank; the first ranks take one more where the batch does not divide."""
    each, rest = divmod(patches, world_size())
    first = rank() * each + min(rank(), rest)
    return first, first + each + (rank() < rest)


def gather(local: Tensor) -> Tensor:
    """(n, ...) of each rank -> (N, ...) of all, in the order of ranks; n may differ. Gradients flow back to each rank."""
    return local if world_size() == 1 else _Gather.apply(local)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        sizes = [torch.zeros(1, dtype=torch.long, device=local.device) for _ in range(world_size())]
        dist.all_gather(sizes, torch.tensor([len(local)], device=local.device))
        ctx.sizes = [int(size) for size in sizes]
        # all_gather wants one shape: pad to the largest share
        padded = local.new_zeros(max(ctx.sizes), *local.shape[1:])
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in ctx.sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, ctx.sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        first = sum(ctx.sizes[: rank()])
        return gradient[first : first + ctx.sizes[rank()]]


def sum_gradients(module: nn.Module) -> None:
    """Add up the gradients of all ranks, in place; all in one message, which is what a slow network likes."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def spread(module: nn.Module) -> None:
    """Give every rank the weights of rank 0."""
    if world_size() > 1:
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, 0)


def any_rank(true_here: bool) -> bool:
    """Whether something is true on at least one rank: what all ranks must decide alike."""
    if world_size() == 1:
        return true_here
    flag = torch.tensor([float(true_here)])
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=_patient_group())
    return bool(flag)


def from_first(value: Any) -> Any:
    """What rank 0 has, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0, group=_patient_group())
    return values[0]


@lru_cache(maxsize=1)
def _patient_group() -> dist.ProcessGroup:
    """All ranks, on the CPU, for what may take longer than an exchange of gradients ever should."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE)  # type: ignore[return-value]


@contextmanager
def first_rank_first() -> Iterator[bool]:
    """The others wait at the end until rank 0 is through its body; yields whether this is rank 0.

    Raises:
        SystemExit: on the other ranks, where rank 0 failed. It has said why.
    """
    failed = True
    try:
        yield rank() == 0
        failed = False
    finally:
        if any_rank(failed) and not failed:
            raise SystemExit(1)


class _Sum(torch.autograd.Function):
    """Sum over ranks. What the sum is used for on each rank has a gradient of its own: they are summed as well."""

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
    """Batch norm over the patches of all ranks, on any device: torch's own is for GPUs only."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of axes will do."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        # statistics in half precision would lose what they are for
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


def synchronise_batch_norm(module: nn.Module) -> None:
    """Make every batch norm of a network one over all ranks, in place; parameters and their names stay."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            synchronised = SynchronisedBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            synchronised.__dict__ |= {"training": child.training}
            synchronised._parameters, synchronised._buffers = child._parameters, child._buffers
            setattr(module, name, synchronised)
        else:
            synchronise_batch_norm(child)
