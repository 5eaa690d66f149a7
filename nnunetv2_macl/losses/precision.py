"""Compute losses in float32 when a network is trained in mixed precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_disabled(tensor: Tensor) -> AbstractContextManager:
    """Return a context in which autocast is disabled on the tensor's device.

    Only CUDA and CPU need this, because training uses autocast on no other device. MPS supports it only in recent torch versions.
    """
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if kind in ("cuda", "cpu") else nullcontext()


def at_least_float32(values: Tensor) -> Tensor:
    """Return a tensor in float32 if it has half precision, else unchanged.

    Half precision has too few digits for a similarity that is divided by a temperature of 0.1.
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))
