"""The base classes of methods that compare whole images: random views of patches, and one map per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nnunetv2_macl.methods.base import Geometry, Method, Progress, StepRandom, Views
from nnunetv2_macl.methods.branches import plan_one_branch
from nnunetv2_macl.methods.contrast import spatial_views
from nnunetv2_macl.networks.base import PretrainableNetwork
from nnunetv2_macl.views import IntensityNumbers, RandomIntensity


class _Numbers(NamedTuple):
    spatial: Tensor
    intensity: list[IntensityNumbers]


class TwoViews(Views):
    """Two random views of each patch, ``first`` and ``second``, of the size of the patch.

    Args:
        geometry: Size of the patches, and out-of-plane rotation.
        recipe: Recipe with the keys of `ImageViewKeys`.

    Attributes:
        names: Names of the views. A subclass with more views overrides `shown`.
    """

    names: ClassVar[Sequence[str]] = ("first", "second")

    def __init__(self, geometry: Geometry, recipe: Any) -> None:
        self.spatial = spatial_views(geometry, recipe)
        self.intensity = RandomIntensity(recipe.intensity, geometry.channels_without_zscore)

    def draw(self, random: StepRandom) -> _Numbers:
        generator = random.generator()
        spatial = [self.spatial.draw(random.batch_size, generator)[random.part] for _ in self.names]
        intensity = [
            random.draw_intensity(self.intensity, random.generator(number + 1))
            for number in range(len(self.names) if self.intensity.strength else 0)
        ]
        return _Numbers(torch.stack(spatial), intensity)

    def make(self, patches: Tensor, numbers: _Numbers, progress: Progress) -> dict[str, Tensor]:
        shown = self.shown(patches)
        views = [self.spatial.apply(images, spatial) for images, spatial in zip(shown, numbers.spatial, strict=True)]
        if numbers.intensity:
            views = [self.intensity.apply(v, changes) for v, changes in zip(views, numbers.intensity, strict=True)]
        return dict(zip(self.names, views, strict=True))

    def shown(self, patches: Tensor) -> list[Tensor]:
        """Return the source images of each view, (n, C, *patch) each."""
        return [patches, patches]


class ImageLevelMethod(Method):
    """A method that compares one map of each view: that of the last trained decoder stage, or the bottleneck if there is none."""

    view_titles = {"first": "first view", "second": "second view"}
    plan_keys: ClassVar[Sequence[str]] = ("out_of_plane_rotation",)

    def __init__(self, network: PretrainableNetwork, geometry: Geometry, recipe: Any) -> None:
        super().__init__(network, geometry, recipe)
        self.views: Views = TwoViews(geometry, recipe)

    @classmethod
    def plan_geometry(cls, patch_size: Sequence[int], strides: Sequence[Sequence[int]], recipe: Any) -> Geometry:
        return plan_one_branch(patch_size, strides, recipe)

    @property
    def channels(self) -> int:
        """Return the number of channels of the compared map."""
        return [self.network.encoder_levels[-1], *self.network.decoder_levels][-1].channels

    @staticmethod
    def last_map(network: PretrainableNetwork, images: Tensor) -> Tensor:
        """Return the compared map of images, (N, channels, *size / stride), from the trained network or a copy of it."""
        return network.decode(network.encode(images))[-1]

    def encode(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the compared map of each view by its name, from one pass over all views."""
        maps = self.last_map(self.network, torch.cat(list(views.values())))
        return dict(zip(views, maps.chunk(len(views)), strict=True))

    def representations(self, embeddings: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return embeddings["first"], embeddings["second"]
