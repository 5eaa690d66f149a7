"""The random numbers of a training step.

They are functions of (seed, step) alone and depend on no image, so the processes that read the batches draw them as well. On a
GPU they then arrive in page-locked memory, from which nothing has to be waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nnunetv2_macl.planning.plan import MACLPlan
from nnunetv2_macl.views import INTENSITY_ON, IntensityNumbers, IntensityViews, SpatialViews, draw_mask

# The first numbers of the seeds: the spatial views have none, the intensity views of the four groups have 1 to 4.
_MASK = 5


def derive_seed(*numbers: int) -> int:
    """Return one seed for torch from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class StepNumbers(NamedTuple):
    """Random numbers of one step, for the n patches of this rank.

    Attributes:
        views: (2, n, A, A+1), parameters of the two spatial views; see `SpatialViews.draw`. None where nothing is contrasted
            on the image level.
        intensity: For each of down(I1), I2, down(V1), V2, or None where that group is not changed.
        mask: (n, 1, *grid) bool, what is hidden; see `nnunetv2_macl.views.draw_mask`. None without restoration.
    """

    views: Tensor | None
    intensity: list[IntensityNumbers | None]
    mask: Tensor | None

    def to(self, device: torch.device) -> StepNumbers:
        """Return the numbers on a device. From page-locked memory nothing is waited for."""

        def move(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(device, non_blocking=True)

        intensity = [
            None if n is None else n._replace(values=n.values.to(device, non_blocking=True)) for n in self.intensity
        ]
        return StepNumbers(move(self.views), intensity, move(self.mask))


class StepDraws:
    """Draws the random numbers of any step, for this rank's share of the batch.

    The numbers of the whole batch are drawn, so that each rank shows its share of what one process would.

    Args:
        plan: Sizes, batch and recipe.
        share: First and last+1 patch of this rank.
        channels: C, number of image channels.
        groups: Which of down(I1), I2, down(V1), V2 are shown to the network.
        hidden_blocks: Block sizes of restoration, voxels on each axis. Empty without restoration.
    """

    def __init__(
        self,
        plan: MACLPlan,
        share: tuple[int, int],
        channels: int,
        groups: Sequence[bool],
        hidden_blocks: Sequence[Sequence[int]] = (),
    ) -> None:
        recipe = plan.get_recipe()
        self.seed, self.batch_size, self.channels = recipe.seed, plan.batch_size, channels
        self.part, self.patch_size = slice(*share), plan.patch_size
        self.spatial: SpatialViews | None = None
        if groups[2]:
            self.spatial = SpatialViews(
                plan.patch_size,
                mirroring=recipe.mirroring,
                rotation=recipe.rotation,
                out_of_plane_rotation=plan.out_of_plane_rotation,
                scaling=(recipe.scaling[0], recipe.scaling[1]),
                translation=recipe.translation,
            )
        self.intensity = IntensityViews(recipe.intensity)
        changed = INTENSITY_ON[recipe.intensity_on] if recipe.intensity else [False] * 4
        self.changed = [shown and on for shown, on in zip(groups, changed, strict=True)]
        self.hidden_blocks, self.hidden_share = hidden_blocks, recipe.restoration_share

    def __call__(self, step: int) -> StepNumbers:
        """Return the numbers of a step."""
        return StepNumbers(self._views(step), [self._intensity(step, g) for g in range(4)], self._mask(step))

    def _views(self, step: int) -> Tensor | None:
        if self.spatial is None:
            return None
        generator = torch.Generator().manual_seed(derive_seed(self.seed, step))
        return torch.stack([self.spatial.draw(self.batch_size, generator)[self.part] for _ in range(2)])

    def _intensity(self, step: int, group: int) -> IntensityNumbers | None:
        if not self.changed[group]:
            return None
        generator = torch.Generator().manual_seed(derive_seed(self.seed, step, group + 1))
        values, seeds = self.intensity.draw(self.batch_size, self.channels, len(self.patch_size), generator)
        return IntensityNumbers(values[self.part], seeds[self.part])

    def _mask(self, step: int) -> Tensor | None:
        if not self.hidden_blocks:
            return None
        generator = torch.Generator().manual_seed(derive_seed(self.seed, step, _MASK))
        return draw_mask(
            self.batch_size, self.patch_size, self.hidden_blocks, self.hidden_share, generator, part=self.part
        )
