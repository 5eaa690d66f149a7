"""Ranks of torch.distributed: this one's share of a batch, and the gathering of embeddings with their gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def share(patches: int) -> tuple[int, int]:
    """First and last+1 patch of this rank; the first ranks take one more where the batch does not divide."""
    each, rest = divmod(patches, world_size())
    first = rank() * each + min(rank(), rest)
    return first, first + each + (rank() < rest)


def gather(local: Tensor) -> Tensor:
    """(n, ...) of each rank -> (N, ...) of all, in the order of ranks; n may differ. Gradients flow back to each rank.

    Every rank is taken to compute the same loss of what is gathered, and DDP to average gradients over ranks: together
    they give the gradient of one process that has the whole batch.
    """
    if world_size() == 1:
        return local
    return _Gather.apply(local)


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
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        first = sum(ctx.sizes[: rank()])
        return gradient[first : first + ctx.sizes[rank()]]
