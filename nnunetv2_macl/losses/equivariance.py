"""The feature-level loss, L_ER: features of the downsampled image should be the downsampled features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_macl.losses.interpolation import downsample
from nnunetv2_macl.losses.precision import at_least_float32, autocast_disabled

EQUIVARIANCE_FORMS = ("l1", "standardised")

# This is added to the variance of a channel before dividing by it. Smaller variances are only rounding errors.
_SMALLEST_VARIANCE = 1e-4


class EquivarianceLoss(nn.Module):
    """Compute the equivariant regularisation, L_ER.

    It is the mean absolute difference between the dominant map and the auxiliary map, which is interpolated linearly to the
    dominant grid. A network that outputs the same map for every image minimises it trivially. The form ``standardised``
    prevents that: it subtracts the mean over the batch at each location and divides each channel by its standard deviation.
    Gradients pass through both.

    Source: MACL Eq. 3 (feature level), which is the form ``l1``.

    Args:
        form: ``l1`` or ``standardised``.

    Raises:
        ValueError: There is no such form.
    """

    def __init__(self, form: str = "l1") -> None:
        super().__init__()
        if form not in EQUIVARIANCE_FORMS:
            raise ValueError(f"form must be one of {EQUIVARIANCE_FORMS}, got {form!r}")
        self.form = form

    def forward(self, dominant: Tensor, auxiliary: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            dominant: Features of shape (N, C, *small).
            auxiliary: Features of shape (N, C, *large).

        Raises:
            ValueError: The numbers of patches, channels or axes differ.
        """
        if dominant.ndim != auxiliary.ndim or dominant.shape[:2] != auxiliary.shape[:2]:
            raise ValueError(
                "dominant and auxiliary must have the same numbers of patches, channels and axes, got shapes "
                f"{tuple(dominant.shape)} and {tuple(auxiliary.shape)}"
            )
        with autocast_disabled(dominant):
            dominant, auxiliary = at_least_float32(dominant), at_least_float32(auxiliary)
            auxiliary = downsample(auxiliary, dominant.shape[2:])
            if self.form == "standardised":
                dominant, auxiliary = _standardised(dominant), _standardised(auxiliary)
            return F.l1_loss(dominant, auxiliary)


def _standardised(maps: Tensor) -> Tensor:
    """Return maps (N, C, *grid) with mean 0 over the batch at each location, and with variance 1 in each channel."""
    centred = maps - maps.mean(0, keepdim=True)
    variance = centred.square().mean([0, *range(2, maps.ndim)], keepdim=True)
    return centred * (variance + _SMALLEST_VARIANCE).rsqrt()
