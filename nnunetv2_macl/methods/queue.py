"""A queue of embeddings of earlier batches, which a contrast has as negatives or a clustering as further samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_macl.methods.config import AUTO

# MoCo's queue of 65,536 keys holds 256 batches of 256 images.
_BATCHES = 256


def queue_length(asked: int | str, batch_size: int) -> int:
    """Return the number of vectors of a queue. ``auto`` is 256 batches, so that the oldest vector is as old as published.

    A queue has as many batches and not as many vectors as published, because the age of its vectors is what limits its length:
    the momentum encoder that made them moves on with every step. With fewer images than vectors a queue holds several views of
    each image, and the fraction of vectors that are of the query's own image stays one in the number of images.
    """
    return _BATCHES * batch_size if asked == AUTO else int(asked)


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
