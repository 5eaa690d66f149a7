"""A queue of embeddings of earlier batches: negatives for a contrastive loss, or further samples for clustering."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_macl.methods.config import AUTO

# MoCo's queue of 65,536 keys holds 256 batches of 256 images.
_BATCHES = 256


def queue_length(asked: int | str, batch_size: int) -> int:
    """Return the number of vectors in a queue. ``auto`` is 256 batches, so that the oldest vector is as old as published.

    The number of batches is the published one, not the number of vectors, because the age of the vectors limits the length of a
    queue: the momentum encoder changes with every step. If there are fewer images than vectors, a queue holds several views of
    each image. The share of vectors from the query's own image is then still one over the number of images.
    """
    return _BATCHES * batch_size if asked == AUTO else int(asked)


class EmbeddingQueue(nn.Module):
    """A first-in, first-out queue of unit vectors.

    The vectors are a buffer, so checkpoints contain them. They are initialised with random directions.

    Source: MoCo, He et al., CVPR 2020, https://arxiv.org/abs/1911.05722, section 3.2 and Algorithm 1.

    Args:
        length: Number of vectors.
        embedding_dim: Length of a vector.

    Attributes:
        vectors: (length, embedding_dim), the newest batch first. Vectors of one batch keep their order.
    """

    vectors: Tensor

    def __init__(self, length: int, embedding_dim: int) -> None:
        super().__init__()
        self.register_buffer("vectors", F.normalize(torch.randn(length, embedding_dim), dim=1))

    @torch.no_grad()
    def push(self, vectors: Tensor) -> None:
        """Add vectors to the queue and drop the same number of oldest vectors.

        Args:
            vectors: (N, embedding_dim), of any norm and any N. With several ranks, pass the vectors of all ranks.
        """
        newest = F.normalize(vectors.to(self.vectors.dtype), dim=1)
        self.vectors.copy_(torch.cat((newest, self.vectors))[: len(self.vectors)])
