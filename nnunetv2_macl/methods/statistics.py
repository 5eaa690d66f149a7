"""Measure how much features and embeddings vary between images. Results stay on the device, so that no step has to wait."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def embedding_variance(embeddings: Tensor) -> Tensor:
    """Return the variance of (N, C) embeddings between images: 1 - |mean of the unit vectors|^2.

    This is the sum over C of the variances of the unit vectors. It is 0 if all vectors are equal, and 1 if their mean is 0.
    """
    return 1 - F.normalize(embeddings.float(), dim=-1).mean(0).square().sum()


@torch.no_grad()
def batch_rank(embeddings: Tensor) -> Tensor:
    """Return the effective rank of the unit vectors of (N, C) embeddings: the participation ratio of their spectrum.

    It is at most N - 1. It is 1 if the vectors vary in one direction only, and 0 if all vectors are equal.
    """
    unit = F.normalize(embeddings.float(), dim=-1)
    centred = unit - unit.mean(0)
    gram = centred @ centred.T
    return gram.trace().square() / gram.square().sum().clamp_min(1e-24)


@torch.no_grad()
def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the RMS of (N, C, *spatial) features, and the fraction of their variance that is between images.

    Instance norm fixes the RMS, so only the second number shows that a network outputs the same map for every image.
    """
    features = features.float().flatten(1)
    between = features.var(0, unbiased=False).mean()
    return features.square().mean().sqrt(), between / features.var(unbiased=False).clamp_min(1e-12)
