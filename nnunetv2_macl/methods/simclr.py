"""SimCLR: one projection head makes two random views of an image alike, and unlike the views of all other images.

Source: Chen et al., ICML 2020, https://arxiv.org/abs/2002.05709, Eq. 1 and Algorithm 1. Pooled features are standardised over the
batch before the head, because instance norm gives all images nearly the same mean. Batches are those of the plan and not of
thousands of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from nnunetv2_macl.losses import PositionalContrastiveLoss
from nnunetv2_macl.methods.base import Geometry, Progress, StepRandom, Views
from nnunetv2_macl.methods.branches import plan_one_branch
from nnunetv2_macl.methods.config import MethodConfig, Positive, SpatialViewKeys
from nnunetv2_macl.methods.contrast import ContrastiveMethod, spatial_views
from nnunetv2_macl.methods.heads import GlobalProjectionHead
from nnunetv2_macl.networks.base import PretrainableNetwork
from nnunetv2_macl.views import IntensityNumbers, RandomIntensity


class SimCLRConfig(SpatialViewKeys):
    """The recipe keys of SimCLR."""

    temperature: Positive = Field(0.1, description="τ")
    embedding_dim: Annotated[int, Field(ge=2)] = Field(128, description="length of the vectors that are compared")
    intensity: Annotated[float, Field(ge=0, le=2)] = Field(
        1.0, description="strength of random gamma, contrast, brightness, bias field, noise and blur; `0`: none"
    )


class _Numbers(NamedTuple):
    spatial: Tensor
    intensity: list[IntensityNumbers]


class TwoViews(Views):
    """Two random views of each patch, ``first`` and ``second``, of the size of the patch."""

    def __init__(self, geometry: Geometry, recipe: Any) -> None:
        self.spatial = spatial_views(geometry, recipe)
        self.intensity = RandomIntensity(recipe.intensity)

    def draw(self, random: StepRandom) -> _Numbers:
        generator = random.generator()
        spatial = [self.spatial.draw(random.batch_size, generator)[random.part] for _ in range(2)]
        intensity = []
        for number in range(2 if self.intensity.strength else 0):
            values, seeds = self.intensity.draw(
                random.batch_size, random.channels, len(random.patch_size), random.generator(number + 1)
            )
            intensity.append(IntensityNumbers(values[random.part], seeds[random.part]))
        return _Numbers(torch.stack(spatial), intensity)

    def make(self, patches: Tensor, numbers: _Numbers, progress: Progress) -> dict[str, Tensor]:
        views = [self.spatial.apply(patches, spatial) for spatial in numbers.spatial]
        if numbers.intensity:
            views = [self.intensity.apply(v, changes) for v, changes in zip(views, numbers.intensity, strict=True)]
        return {"first": views[0], "second": views[1]}


class SimCLR(ContrastiveMethod):
    """Contrast of whole images. The positive of a view is the other view of its image; all other views are negatives.

    The head reads the bottleneck, or the map of the last decoder stage where the recipe trains decoder stages.
    """

    name = "simclr"
    Config: ClassVar[type[MethodConfig]] = SimCLRConfig
    loss_labels = {"contrast": "L_c, image level"}
    referenced_losses = ("contrast",)
    view_titles = {"first": "first view", "second": "second view"}
    plan_keys: ClassVar[Sequence[str]] = ("out_of_plane_rotation",)
    summary = "by SimCLR, contrastive learning of whole images,"

    def __init__(self, network: PretrainableNetwork, geometry: Geometry, recipe: Any) -> None:
        super().__init__(network, geometry, recipe)
        channels = [network.encoder_levels[-1], *network.decoder_levels][-1].channels
        self.head = GlobalProjectionHead(channels, recipe.embedding_dim)
        self.loss = PositionalContrastiveLoss(threshold=self.threshold(), **self.loss_settings(recipe))
        self.views = TwoViews(geometry, recipe)

    @classmethod
    def plan_geometry(cls, patch_size: Sequence[int], strides: Sequence[Sequence[int]], recipe: Any) -> Geometry:
        return plan_one_branch(patch_size, strides, recipe)

    def encode(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        both = self.network.decode(self.network.encode(torch.cat((views["first"], views["second"]))))[-1]
        first, second = both.chunk(2)
        return {"first": first, "second": second}

    def project(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        # standardised over both views at once, so that neither has a scale of its own
        first, second = self.head(torch.cat((features["first"], features["second"]))).chunk(2)
        return {"first": first, "second": second}

    def losses(self, embeddings: dict[str, Tensor], positions: Tensor, progress: Progress) -> dict[str, Tensor]:
        loss = self.loss(embeddings["first"], embeddings["second"], positions)
        (name,) = self.referenced_losses
        return {name: loss, "total": loss}

    def representations(self, embeddings: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return embeddings["first"], embeddings["second"]

    @classmethod
    def collapse_advice(cls, recipe: Any) -> list[str]:
        return [f"another temperature (now {recipe.temperature:g})"]
