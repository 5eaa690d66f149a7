"""BYOL: a predictor predicts an averaged network's embedding of the other view. There are no negatives.

Source: Grill et al., NeurIPS 2020, https://arxiv.org/abs/2006.07733, Eq. 2 and appendix J. Departures: the heads compute batch
statistics over both views together, because a batch may have only two patches. Pooled features are standardised over the batch
before the head.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from nnunetv2_macl.losses import negative_cosine
from nnunetv2_macl.methods.averaging import averaged_copy, encode_without_gradient, rising_decay, update_average
from nnunetv2_macl.methods.base import Geometry, Progress
from nnunetv2_macl.methods.config import Fraction, HeadKey, ImageViewKeys
from nnunetv2_macl.methods.heads import GlobalProjectionHead, mlp
from nnunetv2_macl.methods.image_level import ImageLevelMethod
from nnunetv2_macl.networks.base import PretrainableNetwork

_HIDDEN, _EMBEDDING_DIM = 4096, 256


class BYOLConfig(ImageViewKeys, HeadKey):
    """The recipe keys of BYOL."""

    momentum_decay: Fraction = Field(
        0.996,
        description="weight of the old average in the target network at the first step; it rises to 1 along half a cosine",
    )


class BYOL(ImageLevelMethod):
    """Predicts an averaged network's embedding of the other view.

    Embeddings, all (N, embedding_dim): the projections of the trained network, ``first`` and ``second``; their predictions,
    ``first_prediction`` and ``second_prediction``; the averaged network's projections, ``first_target`` and ``second_target``.
    """

    name = "byol"
    Config = BYOLConfig
    loss_labels = {"bootstrap": "L_b, image level"}
    summary = "by BYOL, prediction of the embeddings of an averaged network,"
    citations = (
        "Grill et al. Bootstrap your own latent: A new approach to self-supervised learning. NeurIPS 2020. arXiv:2006.07733",
    )
    tag = "self-distillation"

    def __init__(self, network: PretrainableNetwork, geometry: Geometry, recipe: Any) -> None:
        super().__init__(network, geometry, recipe)
        if recipe.head == "light":
            embedding_dim = self.channels
            self.head = GlobalProjectionHead(self.channels, embedding_dim)
        else:
            embedding_dim = _EMBEDDING_DIM
            self.head = GlobalProjectionHead(self.channels, embedding_dim, hidden=[_HIDDEN], hidden_norm=True)
        self.predictor = mlp(embedding_dim, _HIDDEN, embedding_dim, hidden_norm=True)
        self.target_network = averaged_copy(network)
        self.target_head = averaged_copy(self.head)

    def encode(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        both = torch.cat((views["first"], views["second"]))
        (targets,) = encode_without_gradient(
            lambda part: (self.last_map(self.target_network, part),), both, whole=self.network.mixes_samples
        )
        first, second = self.last_map(self.network, both).chunk(2)
        first_target, second_target = targets.chunk(2)
        return {"first": first, "second": second, "first_target": first_target, "second_target": second_target}

    def project(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        projections = self.head(torch.cat((features["first"], features["second"])))
        targets = self.target_head(torch.cat((features["first_target"], features["second_target"])).detach())
        found = {"": projections, "_prediction": self.predictor(projections), "_target": targets}
        return {
            f"{view}{kind}": part
            for kind, both in found.items()
            for view, part in zip(("first", "second"), both.chunk(2), strict=True)
        }

    def losses(self, embeddings: dict[str, Tensor], positions: Tensor, progress: Progress) -> dict[str, Tensor]:
        loss = 4 + 2 * (
            negative_cosine(embeddings["first_prediction"], embeddings["second_target"])
            + negative_cosine(embeddings["second_prediction"], embeddings["first_target"])
        )
        return {"bootstrap": loss, "total": loss}

    def copy_network(self) -> None:
        self.target_network.load_state_dict(self.network.state_dict())

    def after_step(self, embeddings: dict[str, Tensor], progress: Progress) -> None:
        """Update the target network and its head."""
        decay = rising_decay(self.recipe.momentum_decay, progress)
        update_average(self.target_network, self.network, decay)
        update_average(self.target_head, self.head, decay)

    @classmethod
    def collapse_advice(cls, recipe: Any) -> list[str]:
        return [f"a momentum_decay nearer to 1 (now {recipe.momentum_decay:g})", "a larger batch_size"]
