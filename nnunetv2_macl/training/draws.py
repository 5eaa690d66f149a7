"""The random numbers of a training step.

They are functions of (seed, step) alone and depend on no image, so the processes that read the batches draw them as well. On a
GPU they then arrive in page-locked memory, from which nothing has to be waited for.
"""

from __future__ import annotations

from typing import Any

from nnunetv2_macl.methods.base import StepRandom
from nnunetv2_macl.methods.model import AllViews
from nnunetv2_macl.planning.plan import MACLPlan


class StepDraws:
    """Draws the random numbers of any step, for this rank's share of the batch.

    Args:
        views: Of all methods.
        plan: Sizes, batch and seed.
        share: First and last+1 patch of this rank.
        channels: C, number of image channels.
    """

    def __init__(self, views: AllViews, plan: MACLPlan, share: tuple[int, int], channels: int) -> None:
        self.views, self.seed, self.batch_size = views, plan.get_recipe().seed, plan.batch_size
        self.part, self.channels, self.patch_size = slice(*share), channels, tuple(plan.patch_size)

    def __call__(self, step: int) -> dict[str, Any]:
        """Return the numbers of a step, by the name of the method."""
        return self.views.draw(StepRandom(self.seed, step, self.batch_size, self.part, self.channels, self.patch_size))
