"""Losses of pairs of views: similarity to a detached target, and contrast with a queue."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunetv2_macl.losses.precision import at_least_float32, autocast_disabled


def negative_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return minus the mean cosine similarity between predictions and targets. Targets have no gradient.

    Args:
        predictions: (N, C), of any norm.
        targets: (N, C), of any norm.

    Source: SimSiam, Chen and He, CVPR 2021, https://arxiv.org/abs/2011.10566, Eq. 1 and 3. BYOL's Eq. 2 is 2 plus twice this.
    """
    with autocast_disabled(predictions):
        return -F.cosine_similarity(at_least_float32(predictions), at_least_float32(targets.detach()), dim=1).mean()


def queue_contrast(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Return the InfoNCE loss of queries and keys with the vectors of a queue as negatives. Only queries get a gradient.

    The loss is the mean over queries q of -log(exp(q·k/τ) / (exp(q·k/τ) + sum_j exp(q·v_j/τ))), with unit vectors q and k.

    Args:
        queries: (N, C), of any norm.
        keys: (N, C), of any norm. Each belongs to another view of the query's patch.
        queue: (K, C), unit vectors v_j.
        temperature: τ.

    Source: MoCo, He et al., CVPR 2020, https://arxiv.org/abs/1911.05722, Eq. 1.
    """
    with autocast_disabled(queries):
        queries, keys = (F.normalize(at_least_float32(v), dim=1) for v in (queries, keys.detach()))
        own = (queries * keys).sum(1, keepdim=True)
        others = queries @ queue.detach().to(queries.dtype).T
        return -(torch.cat((own, others), 1) / temperature).log_softmax(1)[:, 0].mean()
