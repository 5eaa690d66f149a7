"""SimCLR: the embeddings of two random views of an image are similar to each other and dissimilar to those of other images.

Source: Chen et al., ICML 2020, https://arxiv.org/abs/2002.05709, Eq. 1 and Algorithm 1. Departures: pooled features are
standardised over the batch before the head, because instance norm gives all images nearly the same mean. Batches have the size of
the plan instead of thousands of images.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from nnunetv2_macl.losses import PositionalContrastiveLoss
from nnunetv2_macl.methods.base import Geometry, Progress
from nnunetv2_macl.methods.config import ImageViewKeys, MethodConfig, Positive
from nnunetv2_macl.methods.contrast import ContrastiveMethod
from nnunetv2_macl.methods.heads import GlobalProjectionHead
from nnunetv2_macl.methods.image_level import ImageLevelMethod
from nnunetv2_macl.networks.base import PretrainableNetwork


class SimCLRConfig(ImageViewKeys):
    """The recipe keys of SimCLR."""

    temperature: Positive = Field(0.1, description="τ")
    embedding_dim: Annotated[int, Field(ge=2)] = Field(128, description="length of the compared vectors")


class SimCLR(ImageLevelMethod, ContrastiveMethod):
    """Contrasts whole images. The positive of a view is the other view of its image, and all other views are negatives.

    The head reads the map of the last trained decoder stage, or the bottleneck if no decoder stage is trained.
    """

    name = "simclr"
    Config: ClassVar[type[MethodConfig]] = SimCLRConfig
    loss_labels = {"contrast": "L_c, image level"}
    referenced_losses = ("contrast",)
    summary = "by SimCLR, contrastive learning of whole images,"
    citations = (
        "Chen et al. A Simple Framework for Contrastive Learning of Visual Representations. ICML 2020. arXiv:2002.05709",
    )

    def __init__(self, network: PretrainableNetwork, geometry: Geometry, recipe: Any) -> None:
        super().__init__(network, geometry, recipe)
        self.head = GlobalProjectionHead(self.channels, recipe.embedding_dim)
        self.loss: nn.Module = PositionalContrastiveLoss(threshold=self.threshold(), **self.loss_settings(recipe))

    def project(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        # The batch norm of the head standardises both views together, so that their scales stay comparable.
        first, second = self.head(torch.cat((features["first"], features["second"]))).chunk(2)
        return {"first": first, "second": second}

    def losses(self, embeddings: dict[str, Tensor], positions: Tensor, progress: Progress) -> dict[str, Tensor]:
        loss = self.loss(embeddings["first"], embeddings["second"], positions)
        (name,) = self.referenced_losses
        return {name: loss, "total": loss}

    @classmethod
    def collapse_advice(cls, recipe: Any) -> list[str]:
        return [f"another temperature (now {recipe.temperature:g})"]
