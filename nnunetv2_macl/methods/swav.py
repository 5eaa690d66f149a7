"""SwAV: views of an image predict each other's assignment to prototypes. A batch uses all prototypes equally.

Source: Caron et al., NeurIPS 2020, https://arxiv.org/abs/2006.09882, Eq. 1 to 5, with the published queue and frozen prototypes.
Departures: prototypes and queue are a tenth of the published ones, because batches have at most a tenth of the images, and codes
need about as many vectors as there are prototypes. The queue is on by default for the same reason, and is used once it is full.
Pooled features are standardised over the batch before the head.
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
from nnunetv2_macl.methods.contrast import spatial_views
from nnunetv2_macl.methods.heads import GlobalProjectionHead, pool
from nnunetv2_macl.methods.image_level import ImageLevelMethod, TwoViews
from nnunetv2_macl.methods.queue import EmbeddingQueue
from nnunetv2_macl.networks.base import PretrainableNetwork
from nnunetv2_macl.views import IntensityNumbers

_HIDDEN, _EMBEDDING_DIM = 2048, 128
_EPSILON, _SINKHORN_ITERATIONS = 0.05, 3
_ASSIGNED = ("first", "second")
# A small view has this fraction of the patch's edge: 96 of 224 voxels as published.
_SMALL_EDGE = 96 / 224
# Magnification of a small view, and its largest distance from the centre of the patch (fraction of the edge).
# A small view covers 9 to 25 % of a 2D patch and 3 to 13 % of a 3D patch. The published 5 to 14 % are of an image, and a patch is
# only a part of an image.
_SMALL_SCALING, _SMALL_TRANSLATION = (2.0, 3.3), 0.25
# Small and large views draw from separate random streams.
_SMALL_STREAM = 7


class SwAVConfig(ImageViewKeys, HeadKey):
    """The recipe keys of SwAV."""

    temperature: Positive = Field(0.1, description="τ")
    prototypes: Annotated[int, Field(ge=2)] = Field(300, description="K, number of prototypes")
    frozen_prototype_epochs: Annotated[int, Field(ge=0)] = Field(
        1, description="number of initial epochs in which the prototypes are frozen, at most half of the run"
    )
    queue_length: Annotated[int, Field(ge=0)] = Field(
        384, description="number of earlier vectors that are used to compute the codes; `0` disables the queue"
    )
    queue_start: Fraction = Field(0.075, description="fraction of the steps after which the queue is used")
    small_views: Annotated[int, Field(ge=0)] = Field(
        6,
        description="number of small views, which show a smaller part of the patch, in addition to the two large views",
    )


class _Numbers(NamedTuple):
    large: Any
    small: list[Tensor]
    intensity: list[IntensityNumbers]


class _LargeAndSmallViews(Views):
    """Two random views of the size of the patch, and small views of parts of the patch, ``small_1`` and so on.

    Args:
        geometry, recipe: As in `TwoViews`.
        size: Size of a small view, voxels per axis.
    """

    def __init__(self, geometry: Geometry, recipe: Any, size: Sequence[int]) -> None:
        self.large = TwoViews(geometry, recipe)
        self.small = spatial_views(geometry, recipe, scaling=_SMALL_SCALING, translation=_SMALL_TRANSLATION)
        self.size, self.count = size, recipe.small_views

    def draw(self, random: StepRandom) -> _Numbers:
        changed, spatial, intensity = self.large.intensity, [], []
        for number in range(self.count):
            generator = random.generator(_SMALL_STREAM, number)
            spatial.append(self.small.draw(random.batch_size, generator)[random.part])
            if changed.strength:
                intensity.append(random.draw_intensity(changed, generator))
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
    """Predicts the prototypes of one view from another view. A batch uses all prototypes equally.

    Embeddings are the vectors of the two large views, ``first`` and ``second``, (N, embedding_dim), and the similarities of each
    view to the prototypes, ``first_scores``, ``small_1_scores`` and so on, (N, prototypes).
    """

    name = "swav"
    Config = SwAVConfig
    loss_labels = {"swapped": "L_sw, image level"}
    reference_labels = {"code_collapse": "collapse: one embedding for every image"}
    referenced_losses = ("swapped",)
    summary = "by SwAV, prediction of online clusters between views,"
    citations = (
        "Caron et al. Unsupervised Learning of Visual Features by Contrasting Cluster Assignments. NeurIPS "
        "2020. arXiv:2006.09882",
    )
    tag = "clustering"

    views: _LargeAndSmallViews

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

    @property
    def shown_sizes(self) -> list[Sequence[int]]:
        return [self.geometry.patch_size, self.views.size] if self.views.count else [self.geometry.patch_size]

    @torch.no_grad()
    def normalise_prototypes(self) -> None:
        """Scale each prototype to unit length."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def encode(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        large = super().encode({name: views[name] for name in _ASSIGNED})
        small = {name: view for name, view in views.items() if name not in _ASSIGNED}
        return large | (super().encode(small) if small else {})

    def project(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        # Pool before joining the views, because they have two sizes and the batch norms of the head must see all views together.
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
        """Return the queues, or an empty list before they are full and ``queue_start`` is reached."""
        is_full = progress.step * batch_size >= self.recipe.queue_length
        return list(self.queues) if is_full and progress.step >= self.recipe.queue_start * progress.steps else []  # type: ignore

    def _is_frozen(self, progress: Progress) -> bool:
        return progress.is_within(self.recipe.frozen_prototype_epochs)

    def withhold_gradients(self, progress: Progress) -> None:
        """Freeze the prototypes in the first epochs."""
        if self._is_frozen(progress):
            self.prototypes.weight.grad = None

    def after_step(self, embeddings: dict[str, Tensor], progress: Progress) -> None:
        """Scale the prototypes to unit length, and add the vectors of the large views to their queues."""
        if not self._is_frozen(progress):
            self.normalise_prototypes()
        for queue, name in zip(self.queues, _ASSIGNED, strict=False):
            queue.push(embeddings[name])  # type: ignore[operator]

    @classmethod
    def reference_lines(cls, recipe: Any, batch_size: int, means: Mapping[str, float]) -> dict[str, float]:
        return {"code_collapse": log(recipe.prototypes)}

    @classmethod
    def collapse_advice(cls, recipe: Any) -> list[str]:
        return [f"fewer prototypes (now {recipe.prototypes})", "a larger batch_size"]
