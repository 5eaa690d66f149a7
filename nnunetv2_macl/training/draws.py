"""Draw the random numbers of a training step.

The numbers depend only on (seed, step) and not on images, so the data workers can draw them with the batch. The numbers then
arrive in page-locked memory, from which they are copied to a GPU without waiting.
"""

from __future__ import annotations

from typing import Any

from nnunetv2_macl.methods.base import StepRandom
from nnunetv2_macl.methods.model import AllViews
from nnunetv2_macl.planning.plan import MACLPlan


class StepDraws:
    """Draws the random numbers of any step, for this rank's share of the batch.

    Args:
        views: Views of all methods.
        plan: Plan of the run, with patch size, batch size and seed.
        share: First and last+1 patch of this rank.
        channels: C, number of image channels.
    """

    def __init__(self, views: AllViews, plan: MACLPlan, share: tuple[int, int], channels: int) -> None:
        self.views, self.seed, self.batch_size = views, plan.get_recipe().seed, plan.batch_size
        self.part, self.channels, self.patch_size = slice(*share), channels, tuple(plan.patch_size)

    def __call__(self, step: int) -> dict[str, Any]:
        """Return the numbers of a step, by the name of the method."""
        return self.views.draw(StepRandom(self.seed, step, self.batch_size, self.part, self.channels, self.patch_size))
