"""A queue of embeddings of earlier batches, which a contrast has as negatives or a clustering as further samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EmbeddingQueue(nn.Module):
    """Holds the newest unit vectors, first in, first out.

    The vectors are a buffer, so checkpoints have them. They start as random directions.

    Source: MoCo, He et al., CVPR 2020, https://arxiv.org/abs/1911.05722, section 3.2 and Algorithm 1.

    Args:
        length: Number of vectors.
        embedding_dim: Length of a vector.

    Attributes:
        vectors: (length, embedding_dim), the newest first. Vectors of one batch keep their order.
    """

    vectors: Tensor

    def __init__(self, length: int, embedding_dim: int) -> None:
        super().__init__()
        self.register_buffer("vectors", F.normalize(torch.randn(length, embedding_dim), dim=1))

    @torch.no_grad()
    def push(self, vectors: Tensor) -> None:
        """Put vectors in, and drop as many of the oldest.

        Args:
            vectors: (N, embedding_dim), of any length and any N. With several ranks these must be the vectors of all ranks.
        """
        newest = F.normalize(vectors.to(self.vectors.dtype), dim=1)
        self.vectors.copy_(torch.cat((newest, self.vectors))[: len(self.vectors)])
