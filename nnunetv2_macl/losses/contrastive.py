"""The image-level and the pixel-level contrastive loss, L_g and L_d, with positives by position.

`contrast` implements the equations directly. The classes compute the same loss with `nnunetv2_macl.losses.fused`, which is faster
and takes less memory.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_macl.losses.fused import FusedContrast
from nnunetv2_macl.losses.precision import at_least_float32, autocast_disabled


def positive_mask(positions: Tensor, threshold: float) -> Tensor:
    """Return the mask of the positives of each of the 2N vectors.

    Args:
        positions: (N,) or (N, A), fraction of the volume, one row for each patch.
        threshold: t. Patches are positives of each other if their positions differ by less than t on every axis.

    Returns:
        (2N, 2N) bool, rows are anchors. Vector i and vector N+i are the two views of patch i. They are positives of each other
        with any threshold. No vector is its own positive.

    Source: MACL Eq. 4-6.
    """
    positions = positions.reshape(len(positions), -1)
    near = (positions[:, None] - positions[None]).abs().amax(-1) < threshold
    own_patch = torch.eye(len(positions), dtype=torch.bool, device=positions.device)
    mask = (near | own_patch).repeat(2, 2)
    return mask.fill_diagonal_(False)


def positive_weights(
    positions: Tensor, threshold: float, own_view_weight: float = 0.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the weight of each positive for its anchor.

    Args:
        positions: (N,) or (N, A), fraction of the volume.
        threshold: t, see `positive_mask`.
        own_view_weight: a in a·(own view) + (1-a)·(mean over all positives).
        dtype: Data type of the result.

    Returns:
        (2N, 2N). Rows are anchors, and each row sums to 1.
    """
    mask = positive_mask(positions, threshold).to(dtype)
    mean_over_positives = mask / mask.sum(1, keepdim=True)
    if not own_view_weight:
        return mean_over_positives
    own_view = torch.eye(len(mask), dtype=dtype, device=mask.device).roll(len(positions), 0)
    return own_view_weight * own_view + (1 - own_view_weight) * mean_over_positives


def contrast(dominant: Tensor, auxiliary: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Return the contrastive loss at each location: the mean over anchors i of -sum_j w_ij log p_ij.

    p_i is the softmax over all vectors but i of the cosine similarities to vector i, divided by the temperature.

    Args:
        dominant: (N, C, P) embeddings of N patches at P locations, of any norm.
        auxiliary: (N, C, P) embeddings of the other views of the same patches.
        weights: (2N, 2N), w_ij, the weight of the positive j for the anchor i. Rows sum to 1, and the diagonal is 0.
        temperature: τ.

    Returns:
        (P,) losses, without the factor τ / base temperature.

    Source: MACL Eq. 7 and 9.
    """
    vectors = F.normalize(torch.cat((dominant, auxiliary)), dim=1)
    similarities = torch.einsum("icp,jcp->pij", vectors, vectors) / temperature
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    log_p = similarities.masked_fill(itself, -math.inf).log_softmax(-1).masked_fill(itself, 0)
    return -(weights * log_p).sum(-1).mean(-1)


class _ContrastiveLoss(nn.Module):
    def __init__(
        self,
        temperature: float = 0.1,
        threshold: float = 0.1,
        base_temperature: float | None = 0.07,
        *,
        own_view_weight: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("temperature", temperature), ("base_temperature", base_temperature)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be greater than 0, got {value!r}")
        if not threshold >= 0:
            raise ValueError(f"threshold must be 0 or greater, got {threshold!r}")
        if not 0 <= own_view_weight <= 1:
            raise ValueError(f"own_view_weight must be between 0 and 1, got {own_view_weight!r}")
        self.temperature = temperature
        self.threshold = threshold
        self.base_temperature = base_temperature
        self.own_view_weight = own_view_weight

    def _mean_over_anchors(self, dominant: Tensor, auxiliary: Tensor, positions: Tensor) -> Tensor:
        """Return the loss at each location, (P,), of embeddings (N, C, P)."""
        if dominant.shape != auxiliary.shape:
            raise ValueError(
                f"dominant and auxiliary must have the same shape, got {tuple(dominant.shape)} and {tuple(auxiliary.shape)}"
            )
        if len(positions) != len(dominant):
            raise ValueError(
                f"positions must have one row per patch: {len(dominant)} patches, got {len(positions)} rows"
            )
        with autocast_disabled(dominant):
            dominant, auxiliary = at_least_float32(dominant), at_least_float32(auxiliary)
            weights = positive_weights(
                positions.to(dominant.device), self.threshold, self.own_view_weight, dominant.dtype
            )
            loss = FusedContrast.apply(dominant, auxiliary, weights, self.temperature)
        if self.base_temperature is not None:
            loss = loss * (self.temperature / self.base_temperature)
        return loss


class PositionalContrastiveLoss(_ContrastiveLoss):
    """Compute the image-level contrastive loss with positives by position, L_g.

    Each of the 2N vectors serves as anchor. Its positives are the vectors of patches whose positions differ by less than
    ``threshold``, and always the other view of its own patch. The denominator runs over all vectors except the anchor. The
    loss is the mean of -log p over the positives of an anchor, and then over anchors, with cosine similarities.

    Source: MACL Eq. 4-7 (image level). The factor temperature / base_temperature comes from the published implementation and is
    not in the equations. ``base_temperature=None`` disables it.

    Args:
        temperature: τ.
        threshold: t, fraction of the volume. Positives have |Δ| < t on every axis. With t = 0, the only positive is the other
            view of the same patch (SimCLR).
        base_temperature: The loss is multiplied by temperature / base_temperature, unless this is None.
        own_view_weight: a in a·(own view) + (1-a)·(mean over all positives). 0 is the paper's mean.

    Raises:
        ValueError: An argument is outside its range.
    """

    def forward(self, dominant: Tensor, auxiliary: Tensor, positions: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            dominant: (N, C) embeddings of any norm.
            auxiliary: (N, C) embeddings of the same patches, in the same order.
            positions: (N,) or (N, A), fraction of the volume.

        Raises:
            ValueError: The shapes do not agree.
        """
        if dominant.ndim != 2:
            raise ValueError(f"dominant must be (N, C), got shape {tuple(dominant.shape)}")
        return self._mean_over_anchors(dominant.unsqueeze(-1), auxiliary.unsqueeze(-1), positions).mean()


class DenseContrastiveLoss(_ContrastiveLoss):
    """Compute the pixel-level contrastive loss, L_d: the mean of `PositionalContrastiveLoss` over the locations of a grid.

    Locations are processed in chunks, so that memory is bounded for a grid of any size.

    Source: MACL Eq. 8-9 (pixel level). The arguments are those of `PositionalContrastiveLoss`.
    """

    def forward(self, dominant: Tensor, auxiliary: Tensor, positions: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            dominant: (N, C, *grid) embeddings of any norm.
            auxiliary: (N, C, *grid) embeddings of the same patches, in the same order.
            positions: (N,) or (N, A), fraction of the volume.

        Raises:
            ValueError: The shapes do not agree.
        """
        if dominant.ndim < 3:
            raise ValueError(f"dominant must be (N, C, *grid), got shape {tuple(dominant.shape)}")
        if dominant.shape != auxiliary.shape:
            raise ValueError(
                f"dominant and auxiliary must have the same shape, got {tuple(dominant.shape)} and {tuple(auxiliary.shape)}"
            )
        return self._mean_over_anchors(dominant.flatten(2), auxiliary.flatten(2), positions).mean()


class LocationContrastiveLoss(_ContrastiveLoss):
    """Compute the contrast of the locations of each image with one another, averaged over images. It is not from the paper.

    The positive of a location is the same location in the other branch. The denominator runs over all locations of the image
    in both branches, except the anchor. `DenseContrastiveLoss` compares one location of all images; this loss compares all
    locations of one image.

    Args:
        temperature, base_temperature: As in `PositionalContrastiveLoss`.
    """

    def __init__(self, temperature: float = 0.1, base_temperature: float | None = 0.07) -> None:
        super().__init__(temperature, 0.0, base_temperature)

    def forward(self, dominant: Tensor, auxiliary: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            dominant: (N, C, *grid) embeddings of any norm.
            auxiliary: (N, C, *grid) embeddings of the same patches, in the same order.

        Raises:
            ValueError: The shapes do not agree.
        """
        # Swap locations and patches, because here the locations of an image are contrasted.
        dominant, auxiliary = (maps.flatten(2).transpose(0, 2) for maps in (dominant, auxiliary))
        return self._mean_over_anchors(dominant, auxiliary, dominant.new_zeros(len(dominant))).mean()
