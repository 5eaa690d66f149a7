"""Compute the contrastive loss and its gradient together, which takes less memory than `contrast`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Maximum number of similarities that are computed at once. More locations are processed in chunks. The number is large enough
# to keep a GPU busy (64 MiB in float32), and small enough for the cache of a CPU.
MAX_SIMILARITIES = {"cuda": 2**24, "cpu": 2**18}

# Shorter vectors are divided by this length, as in torch's ``normalize``.
_SMALLEST_NORM = 1e-12


def locations_at_once(vectors: int, device_type: str) -> int:
    """Return the number of locations whose similarities are computed at once.

    Args:
        vectors: 2N, the number of vectors at each location.
        device_type: Name of the device type in torch.
    """
    return max(1, MAX_SIMILARITIES.get(device_type, MAX_SIMILARITIES["cuda"]) // vectors**2)


@contextmanager
def similarities_on_meta(device_type: str) -> Iterator[None]:
    """Chunk tensors on the meta device as on a device of this type within the context, to count that device's memory."""
    MAX_SIMILARITIES["meta"] = MAX_SIMILARITIES[device_type]
    try:
        yield
    finally:
        del MAX_SIMILARITIES["meta"]


class FusedContrast(torch.autograd.Function):
    """Compute what `nnunetv2_macl.losses.contrastive.contrast` computes, and its gradient in the same pass.

    The gradient has a closed form. Computing it together with the loss means that the backward pass neither stores nor recomputes
    the similarities. Locations are processed in chunks, so that only the similarities of one chunk are in memory.

    p_i is the softmax of the similarities s_ij = u_i·u_j / τ over all j but i, with u_i = x_i / |x_i|. With d_ij = p_ij - w_ij
    and D = d + dᵀ, the gradient of the mean over the 2N anchors is

        2N · dL/dx_i = ( sum_j D_ij u_j / τ  -  (sum_j D_ij s_ij) u_i ) / |x_i|
    """

    @staticmethod
    def forward(ctx: Any, dominant: Tensor, auxiliary: Tensor, weights: Tensor, temperature: float) -> Tensor:
        patches, channels, locations = dominant.shape
        count = 2 * patches
        # Allocate this copy once and reuse it, because allocating a tensor of this size takes longer than computing with it.
        vectors = dominant.new_empty(count, locations, channels)
        vectors[:patches].copy_(dominant.transpose(1, 2))
        vectors[patches:].copy_(auxiliary.transpose(1, 2))
        by_location = vectors.transpose(0, 1)
        losses = vectors.new_empty(locations)
        trained = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        chunk = locations_at_once(count, vectors.device.type)
        for part, loss in zip(by_location.split(chunk), losses.split(chunk), strict=True):
            similarities = part @ part.transpose(1, 2)
            inverse_norms = similarities.diagonal(dim1=1, dim2=2).clamp_min(_SMALLEST_NORM**2).rsqrt()
            similarities *= (inverse_norms / temperature).unsqueeze(2)
            similarities *= inverse_norms.unsqueeze(1)
            similarities.diagonal(dim1=1, dim2=2).fill_(-math.inf)
            log_p = similarities.log_softmax(-1)
            for matrices in (similarities, log_p):
                matrices.diagonal(dim1=1, dim2=2).zero_()
            loss.copy_(torch.einsum("pij,ij->p", log_p, weights)).div_(-count)
            if trained:
                difference = log_p.exp_().sub_(weights)
                difference.diagonal(dim1=1, dim2=2).zero_()
                both = difference + difference.transpose(1, 2)
                own = similarities.mul_(both).sum(-1)
                both *= (inverse_norms / (temperature * count)).unsqueeze(2)
                both *= inverse_norms.unsqueeze(1)
                both.diagonal(dim1=1, dim2=2).copy_(own * inverse_norms.square() / -count)
                # Overwrite the vectors of these locations by their gradient, because the vectors are not needed any more.
                part.copy_(both @ part)
        if trained:
            ctx.save_for_backward(vectors)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dominant, auxiliary = (
            # Transpose and copy first, because elementwise products of transposed tensors are slow.
            part.transpose(1, 2).clone(memory_format=torch.contiguous_format).mul_(grad_losses)
            for part in ctx.saved_tensors[0].chunk(2)
        )
        return dominant, auxiliary, None, None
