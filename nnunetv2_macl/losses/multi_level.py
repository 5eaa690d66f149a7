"""The losses of MACL and their weighted sum."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnunetv2_macl.losses.contrastive import (
    DenseContrastiveLoss,
    LocationContrastiveLoss,
    PositionalContrastiveLoss,
)
from nnunetv2_macl.losses.equivariance import EquivarianceLoss


class MultiLevelContrastiveLoss(nn.Module):
    """Compute the weighted sum L = λ1·L_g + λ2·L_d + λ3·L_ER. A term of weight 0 is not computed.

    The pixel-level loss may have a second part, which compares the locations of one image. It is not from the paper.

    Source: MACL Eq. 10.

    Args:
        weight_global: λ1.
        weight_dense: λ2.
        weight_locations: Weight of the second part of the pixel level.
        weight_equivariance: λ3.
        temperature, threshold, base_temperature, own_view_weight: As in `PositionalContrastiveLoss`, for all contrastive
            losses that have them.
        equivariance_form: As in `EquivarianceLoss`.

    Raises:
        ValueError: A weight is negative, or only the feature-level weight is above 0.
    """

    def __init__(
        self,
        *,
        weight_global: float = 1.0,
        weight_dense: float = 0.5,
        weight_locations: float = 0.0,
        weight_equivariance: float = 1.0,
        temperature: float = 0.1,
        threshold: float = 0.1,
        base_temperature: float | None = 0.07,
        own_view_weight: float = 0.0,
        equivariance_form: str = "l1",
    ) -> None:
        super().__init__()
        self.weights = {
            "global": weight_global,
            "dense": weight_dense,
            "locations": weight_locations,
            "equivariance": weight_equivariance,
        }
        contrasts = weight_global + weight_dense + weight_locations > 0
        if min(self.weights.values()) < 0 or (weight_equivariance and not contrasts):
            raise ValueError(f"weights must be 0 or greater, and global or dense above 0, got {self.weights}")
        contrastive = {"own_view_weight": own_view_weight}
        self.global_loss = PositionalContrastiveLoss(temperature, threshold, base_temperature, **contrastive)
        self.dense_loss = DenseContrastiveLoss(temperature, threshold, base_temperature, **contrastive)
        self.location_loss = LocationContrastiveLoss(temperature, base_temperature)
        self.equivariance_loss = EquivarianceLoss(equivariance_form)

    @property
    def threshold(self) -> float:
        """Return the threshold t of both contrastive losses, fraction of the volume."""
        return self.global_loss.threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        self.global_loss.threshold = self.dense_loss.threshold = value

    def forward(self, outputs: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
        """Return the losses whose weight is above 0, by name, and their weighted sum ``total``.

        Args:
            outputs: The embeddings of `nnunetv2_macl.methods.macl.MACL`, by name.
            positions: (N,) or (N, A), fraction of the volume.
        """
        losses: dict[str, Tensor] = {}
        if self.weights["global"]:
            losses["global"] = self.global_loss(outputs["global_dominant"], outputs["global_auxiliary"], positions)
        if self.weights["dense"]:
            losses["dense"] = self.dense_loss(outputs["dense_dominant"], outputs["dense_auxiliary"], positions)
        if self.weights["locations"]:
            losses["locations"] = self.location_loss(outputs["dense_dominant"], outputs["dense_auxiliary"])
        if self.weights["equivariance"]:
            losses["equivariance"] = self.equivariance_loss(
                outputs["bottleneck_dominant"], outputs["bottleneck_auxiliary"]
            )
        losses["total"] = torch.as_tensor(sum(self.weights[name] * loss for name, loss in losses.items()))
        return losses
