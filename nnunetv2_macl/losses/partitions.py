"""Contrastive losses with negatives by place: from other partitions of volumes, or from other regions of an image.

Source: GCL, Chaitanya et al., NeurIPS 2020, https://arxiv.org/abs/2006.10511, Eq. 1 to 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_macl.losses.precision import at_least_float32, autocast_disabled


def pairwise_contrast(vectors: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Return the mean over all positive pairs (i, j) of -log(exp(s_ij) / (exp(s_ij) + sum over negatives k of exp(s_ik))).

    s_ij is a cosine similarity divided by the temperature. Unlike in SimCLR and PCL, the sum excludes the other positives of i.
    The loss is 0 if no vector has a negative.

    Args:
        vectors: (..., M, C), of any norm.
        positives: (M, M) bool, rows are anchors. At least one value is True.
        negatives: (M, M) bool, rows are anchors.
        temperature: τ.

    Returns:
        A scalar.
    """
    with autocast_disabled(vectors):
        vectors = F.normalize(at_least_float32(vectors), dim=-1)
        similarities = vectors @ vectors.transpose(-1, -2) / temperature
        # A finite number, because with -inf the gradient of an anchor without a negative would be NaN.
        smallest = torch.finfo(similarities.dtype).min / 2
        others = similarities.masked_fill(~negatives, smallest).logsumexp(-1, keepdim=True)
        losses = F.softplus(others - similarities) * positives
        return losses.sum((-1, -2)).mean() / positives.sum()


def partition_masks(positions: Tensor, partitions: int) -> tuple[Tensor, Tensor]:
    """Return the masks of the positives and of the negatives of each of the 2N vectors.

    Args:
        positions: (N, 3), fraction of the volume. The first axis is divided into partitions of equal length.
        partitions: S, number of partitions.

    Returns:
        Two (2N, 2N) bool tensors, rows are anchors. Vector i and vector N+i are the two views of patch i. Positives are all
        other vectors from the same partition of any volume, and negatives are all vectors from other partitions.
    """
    number = (positions[:, 0] * partitions).floor().clamp(0, partitions - 1)
    same = (number[:, None] == number).repeat(2, 2)
    negatives = ~same
    return same.fill_diagonal_(False), negatives


class PartitionContrastiveLoss(nn.Module):
    """Compute the image-level contrastive loss with positives and negatives by partition, strategy G^D of the paper.

    Source: Eq. 1, with the sets of positives and negatives of strategy G^D.

    Args:
        partitions: S.
        temperature: τ.
    """

    def __init__(self, partitions: int, temperature: float) -> None:
        super().__init__()
        self.partitions, self.temperature = partitions, temperature

    def forward(self, first: Tensor, second: Tensor, positions: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            first: (N, C) embeddings of any norm.
            second: (N, C) embeddings of the other views of the same patches.
            positions: (N, 3), fraction of the volume.
        """
        masks = partition_masks(positions.to(first.device), self.partitions)
        return pairwise_contrast(torch.cat((first, second)), *masks, self.temperature)


def region_masks(regions: int, negatives: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the masks of the positives and of the negatives of each of the 2R regions of two maps of an image.

    Args:
        regions: R, number of regions of a map, which are in random order.
        negatives: Number of negatives of a region in each of the two maps. They are the next regions in the random order.
        device: Device of the result.

    Returns:
        Two (2R, 2R) bool tensors, rows are anchors. The positive of a region is the same region of the other map.
    """
    number = torch.arange(regions, device=device)
    behind = (number - number[:, None]) % regions
    positives = torch.eye(2 * regions, dtype=torch.bool, device=device).roll(regions, 0)
    return positives, ((behind >= 1) & (behind <= negatives)).repeat(2, 2)


def region_contrast(first: Tensor, second: Tensor, negatives: int, temperature: float) -> Tensor:
    """Return the local contrastive loss, a scalar. It separates a region from other regions of the same image.

    Source: Eq. 3, strategy L^R.

    Args:
        first: (N, R, C) embeddings of R regions in random order.
        second: (N, R, C) embeddings of the same regions in the other view.
        negatives: Number of negatives of a region in each of the two maps, fewer than R.
        temperature: τ.
    """
    masks = region_masks(first.shape[1], negatives, first.device)
    return pairwise_contrast(torch.cat((first, second), 1), *masks, temperature)
