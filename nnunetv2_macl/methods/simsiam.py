"""SimSiam: a predictor predicts the network's own embedding of the other view, which is detached. There are no negatives.

Source: Chen and He, CVPR 2021, https://arxiv.org/abs/2011.10566, Algorithm 1 and sections 3 and 4. Departures: the heads compute
batch statistics over both views together, because a batch may have only two patches. Pooled features are standardised over the
batch before the head.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from nnunetv2_macl.losses import negative_cosine
from nnunetv2_macl.methods.base import Geometry, Progress
from nnunetv2_macl.methods.config import HeadKey, ImageViewKeys, MethodConfig
from nnunetv2_macl.methods.heads import GlobalProjectionHead, mlp
from nnunetv2_macl.methods.image_level import ImageLevelMethod
from nnunetv2_macl.networks.base import PretrainableNetwork

_WIDTH, _PREDICTOR_WIDTH = 2048, 512


class SimSiamConfig(ImageViewKeys, HeadKey):
    """The recipe keys of SimSiam."""


class SimSiam(ImageLevelMethod):
    """Predicts the network's own embedding of another view. The predicted embedding has no gradient.

    Embeddings, all (N, embedding_dim): the projection of each view, by its name, and its prediction, ``first_prediction`` and so
    on.

    Attributes:
        pairs: Names of the two views that each loss compares, by the name of the loss.
    """

    name = "simsiam"
    Config: ClassVar[type[MethodConfig]] = SimSiamConfig
    loss_labels = {"similarity": "L_s, two views of a patch"}
    summary = "by SimSiam, prediction of the embedding of another view,"
    citations = ("Chen and He. Exploring Simple Siamese Representation Learning. CVPR 2021. arXiv:2011.10566",)
    tag = "self-distillation"
    constant_rate_modules = ("predictor",)
    pairs: ClassVar[dict[str, tuple[str, str]]] = {"similarity": ("first", "second")}

    def __init__(self, network: PretrainableNetwork, geometry: Geometry, recipe: Any) -> None:
        super().__init__(network, geometry, recipe)
        if recipe.head == "light":
            width, predictor_width = self.channels, self.channels // 4
            self.head = GlobalProjectionHead(self.channels, width)
        else:
            width, predictor_width = _WIDTH, _PREDICTOR_WIDTH
            self.head = GlobalProjectionHead(
                self.channels, width, hidden=[width, width], hidden_norm=True, output_norm=True
            )
        self.predictor = mlp(width, predictor_width, width, hidden_norm=True)

    def project(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        projections = self.head(torch.cat(list(features.values())))
        predictions = self.predictor(projections).chunk(len(features))
        outputs = dict(zip(features, projections.chunk(len(features)), strict=True))
        return outputs | {f"{view}_prediction": part for view, part in zip(features, predictions, strict=True)}

    def losses(self, embeddings: dict[str, Tensor], positions: Tensor, progress: Progress) -> dict[str, Tensor]:
        losses = {
            name: (
                negative_cosine(embeddings[f"{one}_prediction"], embeddings[other])
                + negative_cosine(embeddings[f"{other}_prediction"], embeddings[one])
            )
            / 2
            for name, (one, other) in self.pairs.items()
        }
        return losses | {"total": torch.stack(list(losses.values())).sum()}

    @classmethod
    def collapse_advice(cls, recipe: Any) -> list[str]:
        return ["a larger batch_size"]
