"""The base class of methods that contrast the images of a batch with one another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nnunetv2_macl.losses import ReferenceValues, positive_mask, reference_values
from nnunetv2_macl.methods.base import Geometry, Method
from nnunetv2_macl.views import RandomAffine

# A loss counts as collapsed if it is less than this fraction of the way from the collapse value to the own-view value.
_LEARNED_FRACTION = 0.05
# A loss that dropped by more than this fraction of the collapse value since the last epoch still improves: no collapse.
_FALLING_FRACTION = 0.005


def spatial_views(geometry: Geometry, recipe: Any, **changed: Any) -> RandomAffine:
    """Return the random spatial views of a recipe that has the keys of `SpatialViewKeys`, with some arguments changed."""
    settings = {key: getattr(recipe, key) for key in ("mirroring", "rotation", "scaling", "translation")}
    settings["out_of_plane_rotation"] = geometry.out_of_plane_rotation
    return RandomAffine(geometry.patch_size, **settings | changed)


class ContrastiveMethod(Method):
    """A method whose losses have known values at collapse, with only the own view found, and with all positives found."""

    reference_labels = {
        "collapse": "collapse: one embedding for every image",
        "own_view_only": "own view only",
        "all_found": "all positives found",
    }
    tag = "contrastive-learning"

    @classmethod
    def statistics(cls, recipe: Any) -> list[str]:
        return ["positives"]

    @classmethod
    def loss_settings(cls, recipe: Any) -> dict[str, Any]:
        """Return the arguments of the contrastive losses from a recipe."""
        return {"temperature": recipe.temperature, "base_temperature": None, "own_view_weight": 0.0}

    def threshold(self) -> float:
        """Return the current t: patches closer than this fraction of the volume are positives."""
        return self.geometry.threshold if self.compares_positions else 0.0

    def measure(self, embeddings: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
        """Return the mean number of positives of an anchor, its own other view included."""
        return {"positives": positive_mask(positions, self.threshold()).sum(1).float().mean()}

    @classmethod
    def reference_lines(cls, recipe: Any, batch_size: int, means: Mapping[str, float]) -> dict[str, float]:
        positives = max(1.0, means.get("positives", 1.0))
        return reference_values(batch_size, positives, **cls.loss_settings(recipe))._asdict()

    @classmethod
    def collapse_reasons(
        cls, means: Mapping[str, float], before: Mapping[str, float], references: Mapping[str, float]
    ) -> list[str]:
        """Return a sentence for each contrastive loss that has its collapse value."""
        lines = ReferenceValues(**references)
        line = lines.collapse - _LEARNED_FRACTION * (lines.collapse - lines.own_view_only)
        reasons = []
        for name in cls.referenced_losses:
            # A new network starts above the line, and its loss then falls below. In the first epoch that trains a loss, the loss
            # before is missing or NaN, and it is not known whether the loss falls.
            stays = before.get(name, math.inf) - means.get(name, math.inf) <= _FALLING_FRACTION * lines.collapse
            if means.get(name, -math.inf) > line and stays:
                reasons.append(
                    f"{cls.loss_labels[name]} is {means[name]:.3f}: it is {lines.collapse:.3f} if all images have the same "
                    f"embedding, and {lines.own_view_only:.3f} if the network recognises only the own view"
                )
        return reasons
