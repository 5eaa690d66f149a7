"""SwAV: views of an image predict each other's assignment to prototypes, which all images of a batch share equally.

Source: Caron et al., NeurIPS 2020, https://arxiv.org/abs/2006.09882, Eq. 1 to 5; queue and frozen prototypes of the published
settings. Departures: a tenth of the published prototypes and a tenth of the queue, because batches have a tenth of the images or
fewer, and codes need about as many vectors as there are prototypes. The queue is there by default for the same reason. It is used
as soon as it is full. Pooled features are standardised over the batch before the head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nnunetv2_macl.losses import autocast_disabled, swapped_prediction
from nnunetv2_macl.methods.base import Geometry, Progress, StepRandom, Views
from nnunetv2_macl.methods.branches import smaller_patch
from nnunetv2_macl.methods.config import Fraction, HeadKey, ImageViewKeys, Positive
from nnunetv2_macl.methods.heads import GlobalProjectionHead, pool
from nnunetv2_macl.methods.image_level import ImageLevelMethod, TwoViews
from nnunetv2_macl.methods.queue import EmbeddingQueue
from nnunetv2_macl.networks.base import PretrainableNetwork
from nnunetv2_macl.views import IntensityNumbers, RandomAffine

_HIDDEN, _EMBEDDING_DIM = 2048, 128
_EPSILON, _SINKHORN_ITERATIONS = 0.05, 3
_ASSIGNED = ("first", "second")
# A small view has this fraction of the patch's edge: 96 of 224 voxels as published.
_SMALL_EDGE = 96 / 224
# What a small view shows is so many times as large in its patch, and lies at most so far from the middle (fraction of the edge).
# It covers 5 to 14 % of the area of an image as published, and here 9 to 25 %, because a patch is a part of an image already.
_SMALL_SCALING, _SMALL_TRANSLATION = (2.0, 3.3), 0.25
# The random numbers of small views are another stream than those of the large ones.
_SMALL_STREAM = 7


class SwAVConfig(ImageViewKeys, HeadKey):
    """The recipe keys of SwAV."""

    temperature: Positive = Field(0.1, description="τ")
    prototypes: Annotated[int, Field(ge=2)] = Field(300, description="K, number of prototypes")
    frozen_prototype_epochs: Annotated[int, Field(ge=0)] = Field(
        1, description="epochs at the start in which the prototypes stay as they are"
    )
    queue_length: Annotated[int, Field(ge=0)] = Field(
        384, description="number of earlier vectors with which the codes of a small batch are computed; `0`: none"
    )
    queue_start: Fraction = Field(0.075, description="fraction of the steps after which the queue is used")
    small_views: Annotated[int, Field(ge=0)] = Field(
        6, description="views of a smaller part and size besides the two large ones"
    )


class _Numbers(NamedTuple):
    large: Any
    small: list[Tensor]
    intensity: list[IntensityNumbers]


class _LargeAndSmallViews(Views):
    """Two random views of the size of the patch, and smaller ones of parts of it, ``small_1`` and so on.

    Args:
        geometry, recipe: As in `TwoViews`.
        size: Of a small view, voxels per axis.
    """

    def __init__(self, geometry: Geometry, recipe: Any, size: Sequence[int]) -> None:
        self.large = TwoViews(geometry, recipe)
        self.small = RandomAffine(
            geometry.patch_size,
            mirroring=recipe.mirroring,
            rotation=recipe.rotation,
            out_of_plane_rotation=geometry.out_of_plane_rotation,
            scaling=_SMALL_SCALING,
            translation=_SMALL_TRANSLATION,
        )
        self.size, self.count = size, recipe.small_views

    def draw(self, random: StepRandom) -> _Numbers:
        changed, spatial, intensity = self.large.intensity, [], []
        for number in range(self.count):
            generator = random.generator(_SMALL_STREAM, number)
            spatial.append(self.small.draw(random.batch_size, generator)[random.part])
            if changed.strength:
                values, seeds = changed.draw(random.batch_size, random.channels, len(random.patch_size), generator)
                intensity.append(IntensityNumbers(values[random.part], seeds[random.part]))
        return _Numbers(self.large.draw(random), spatial, intensity)

    def make(self, patches: Tensor, numbers: _Numbers, progress: Progress) -> dict[str, Tensor]:
        views = self.large.make(patches, numbers.large, progress)
        small = [self.small.apply(patches, spatial, self.size) for spatial in numbers.small]
        if numbers.intensity:
            small = [
                self.large.intensity.apply(v, changes) for v, changes in zip(small, numbers.intensity, strict=True)
            ]
        return views | {f"small_{number}": view for number, view in enumerate(small, 1)}


class SwAV(ImageLevelMethod):
    """Prediction of the prototypes of one view from another view, with prototypes that all images share equally.

    Embeddings are ``first`` and ``second``, (N, embedding_dim), the vectors of the two large views, and of each view its
    similarities to the prototypes, (N, prototypes), as ``first_scores``, ``small_1_scores`` and so on.
    """

    name = "swav"
    Config = SwAVConfig
    loss_labels = {"swapped": "L_sw, image level"}
    reference_labels = {"code_collapse": "collapse: one embedding for every image"}
    referenced_losses = ("swapped",)
    summary = "by SwAV, prediction of online clusters between views,"
    tag = "clustering"

    def __init__(self, network: PretrainableNetwork, geometry: Geometry, recipe: Any) -> None:
        super().__init__(network, geometry, recipe)
        if recipe.head == "light":
            embedding_dim = self.channels
            self.head = GlobalProjectionHead(self.channels, embedding_dim)
        else:
            embedding_dim = _EMBEDDING_DIM
            self.head = GlobalProjectionHead(self.channels, embedding_dim, hidden=[_HIDDEN], hidden_norm=True)
        self.prototypes = nn.Linear(embedding_dim, recipe.prototypes, bias=False)
        self.normalise_prototypes()
        queues = len(_ASSIGNED) if recipe.queue_length else 0
        self.queues = nn.ModuleList(EmbeddingQueue(recipe.queue_length, embedding_dim) for _ in range(queues))
        size = smaller_patch(geometry.patch_size, network.patch_multiple, _SMALL_EDGE)
        self.views = _LargeAndSmallViews(geometry, recipe, size)

    @classmethod
    def trains_in_stages(cls, recipe: Any) -> bool:
        return recipe.frozen_prototype_epochs > 0

    @torch.no_grad()
    def normalise_prototypes(self) -> None:
        """Scale each prototype to unit length."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def encode(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        features: dict[str, Tensor] = {}
        # views of one size in one pass
        for names in (_ASSIGNED, [name for name in views if name not in _ASSIGNED]):
            if names:
                maps = self.last_map(self.network, torch.cat([views[name] for name in names]))
                features |= dict(zip(names, maps.chunk(len(names)), strict=True))
        return features

    def project(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        # Views of two sizes are pooled before they are joined, so that the batch norms of the head see all views together.
        pooled = torch.cat([pool(maps) for maps in features.values()])
        vectors = F.normalize(self.head(pooled[..., None]), dim=1)
        with autocast_disabled(vectors):
            scores = self.prototypes(vectors.to(self.prototypes.weight.dtype))
        views = len(features)
        found = {f"{name}_scores": part for name, part in zip(features, scores.chunk(views), strict=True)}
        return dict(zip(_ASSIGNED, vectors.chunk(views), strict=False)) | found

    def losses(self, embeddings: dict[str, Tensor], positions: Tensor, progress: Progress) -> dict[str, Tensor]:
        scores = [values for name, values in embeddings.items() if name.endswith("_scores")]
        queued = [
            queue.vectors @ self.prototypes.weight.detach().T for queue in self._full_queues(progress, len(positions))
        ]
        loss = swapped_prediction(
            scores,
            len(_ASSIGNED),
            queued,
            temperature=self.recipe.temperature,
            epsilon=_EPSILON,
            iterations=_SINKHORN_ITERATIONS,
        )
        return {"swapped": loss, "total": loss}

    def _full_queues(self, progress: Progress, batch_size: int) -> Sequence[EmbeddingQueue]:
        """Return the queues, or none as long as they are not full or not to be used yet."""
        is_full = progress.step * batch_size >= self.recipe.queue_length
        return list(self.queues) if is_full and progress.step >= self.recipe.queue_start * progress.steps else []  # type: ignore

    def _is_frozen(self, progress: Progress) -> bool:
        return progress.step < self.recipe.frozen_prototype_epochs * progress.num_iterations_per_epoch

    def withhold_gradients(self, progress: Progress) -> None:
        """Fix the prototypes at the start."""
        if self._is_frozen(progress):
            self.prototypes.weight.grad = None

    def after_step(self, embeddings: dict[str, Tensor], progress: Progress) -> None:
        """Scale the prototypes to unit length, and put the vectors of the large views into their queues."""
        if not self._is_frozen(progress):
            self.normalise_prototypes()
        for queue, name in zip(self.queues, _ASSIGNED, strict=False):
            queue.push(embeddings[name])  # type: ignore[operator]

    def representations(self, embeddings: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return embeddings["first"], embeddings["second"]

    @classmethod
    def reference_lines(cls, recipe: Any, batch_size: int, means: Mapping[str, float]) -> dict[str, float]:
        return {"code_collapse": log(recipe.prototypes)}

    @classmethod
    def collapse_advice(cls, recipe: Any) -> list[str]:
        return [f"fewer prototypes (now {recipe.prototypes})", "a larger batch_size"]
