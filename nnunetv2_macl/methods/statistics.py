"""How much features and embeddings vary between images. Everything stays on the device, and nothing waits for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def embedding_variance(embeddings: Tensor) -> Tensor:
    """Return how much (N, C) embeddings vary between images: 1 - |mean of the unit vectors|^2.

    This is the sum over all C of the squared standard deviations of the unit vectors: 0 for one vector, 1 for vectors in all
    directions.
    """
    return 1 - F.normalize(embeddings.float(), dim=-1).mean(0).square().sum()


@torch.no_grad()
def batch_rank(embeddings: Tensor) -> Tensor:
    """Return in how many directions the unit vectors of (N, C) embeddings vary: the participation ratio of their spectrum.

    It is 1 where all lie on one line, at most N - 1, and 0 where all are one vector.
    """
    unit = F.normalize(embeddings.float(), dim=-1)
    centred = unit - unit.mean(0)
    gram = centred @ centred.T
    return gram.trace().square() / gram.square().sum().clamp_min(1e-24)


@torch.no_grad()
def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return of (N, C, *spatial) features their RMS, and the fraction of their variance that lies between images.

    Instance norm fixes the RMS, so a network that makes one map for every image shows in the second number alone.
    """
    features = features.float().flatten(1)
    between = features.var(0, unbiased=False).mean()
    return features.square().mean().sqrt(), between / features.var(unbiased=False).clamp_min(1e-12)
