"""MoCo v2: contrast between a view, the momentum encoder's embedding of the other view, and a queue of earlier embeddings.

Source: He et al., CVPR 2020, https://arxiv.org/abs/1911.05722, Algorithm 1; head, temperature and schedule of Chen et al. 2020,
https://arxiv.org/abs/2003.04297. Departures: pooled features are standardised over the batch before the head, because instance
norm gives all images nearly the same mean. Batch norm uses the batch of all ranks, so images are not shuffled between ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from nnunetv2_macl.losses import queue_contrast
from nnunetv2_macl.methods.averaging import averaged_copy, encode_without_gradient, update_average
from nnunetv2_macl.methods.base import Geometry, Progress
from nnunetv2_macl.methods.config import AUTO, Auto, Count, Fraction, HeadKey, ImageViewKeys, MethodConfig, Positive
from nnunetv2_macl.methods.heads import GlobalProjectionHead
from nnunetv2_macl.methods.image_level import ImageLevelMethod
from nnunetv2_macl.methods.queue import EmbeddingQueue, queue_length
from nnunetv2_macl.networks.base import PretrainableNetwork

_EMBEDDING_DIM = 128


class MoCoConfig(ImageViewKeys, HeadKey):
    """The recipe keys of MoCo."""

    temperature: Positive = Field(0.2, description="τ")
    momentum_decay: Fraction = Field(
        0.999, description="weight of the old average in the momentum encoder and its head"
    )
    queue_length: Count | Auto = Field(
        AUTO, description="K, number of embeddings of earlier images; `auto`: those of 256 batches, as published"
    )


class MoCo(ImageLevelMethod):
    """Contrasts whole images with a queue. A momentum encoder computes the positive and the negatives.

    Embeddings are ``query`` and ``key``, (N, embedding_dim).
    """

    name = "moco"
    Config: ClassVar[type[MethodConfig]] = MoCoConfig
    loss_labels = {"queue": "L_q, image level"}
    reference_labels = {"queue_collapse": "collapse: one embedding for every image"}
    referenced_losses = ("queue",)
    summary = "by MoCo, contrastive learning of whole images with a momentum encoder,"
    citations: ClassVar[Sequence[str]] = (
        "He et al. Momentum Contrast for Unsupervised Visual Representation Learning. CVPR 2020. arXiv:1911.05722",
        "Chen et al. Improved Baselines with Momentum Contrastive Learning. 2020. arXiv:2003.04297",
    )
    tag = "contrastive-learning"

    def __init__(self, network: PretrainableNetwork, geometry: Geometry, recipe: Any) -> None:
        super().__init__(network, geometry, recipe)
        embedding_dim = self.channels if recipe.head == "light" else _EMBEDDING_DIM
        self.head = GlobalProjectionHead(self.channels, embedding_dim)
        self.momentum_network = averaged_copy(network)
        self.momentum_head = averaged_copy(self.head)
        self.queue = EmbeddingQueue(queue_length(recipe.queue_length, geometry.batch_size), embedding_dim)

    def encode(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"query": self.last_map(self.network, views["first"]), "key": self.momentum_map(views["second"])}

    def momentum_map(self, images: Tensor) -> Tensor:
        """Return the compared map of images from the momentum encoder, without gradient."""
        (maps,) = encode_without_gradient(
            lambda part: (self.last_map(self.momentum_network, part),), images, whole=self.network.mixes_samples
        )
        return maps

    def project(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"query": self.head(features["query"]), "key": self.momentum_head(features["key"].detach())}

    def losses(self, embeddings: dict[str, Tensor], positions: Tensor, progress: Progress) -> dict[str, Tensor]:
        loss = queue_contrast(embeddings["query"], embeddings["key"], self.queue.vectors, self.recipe.temperature)
        return {"queue": loss, "total": loss}

    def copy_network(self) -> None:
        self.momentum_network.load_state_dict(self.network.state_dict())

    def after_step(self, embeddings: dict[str, Tensor], progress: Progress) -> None:
        """Update the averages, and add the keys of the batch to the queue."""
        update_average(self.momentum_network, self.network, self.recipe.momentum_decay)
        update_average(self.momentum_head, self.head, self.recipe.momentum_decay)
        self.queue.push(embeddings["key"])

    def representations(self, embeddings: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return embeddings["query"], embeddings["key"]

    @classmethod
    def reference_lines(cls, recipe: Any, batch_size: int, means: Mapping[str, float]) -> dict[str, float]:
        return {"queue_collapse": log(1 + queue_length(recipe.queue_length, batch_size))}

    @classmethod
    def collapse_advice(cls, recipe: Any) -> list[str]:
        return [f"another temperature (now {recipe.temperature:g})", "another queue_length"]
