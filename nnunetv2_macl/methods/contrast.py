"""What the methods share that contrast the images of a batch with one another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nnunetv2_macl.losses import ReferenceValues, positive_mask, reference_values
from nnunetv2_macl.methods.base import Geometry, Method
from nnunetv2_macl.views import RandomAffine

# A loss counts as learned when it is below collapse by this fraction of the way to the own-view line.
_LEARNED_FRACTION = 0.05
# A loss that fell by more than this fraction of the collapse value since the epoch before is on its way, wherever it is.
_FALLING_FRACTION = 0.005


def spatial_views(geometry: Geometry, recipe: Any) -> RandomAffine:
    """Return the random spatial views of a recipe with the keys of `SpatialViewKeys`."""
    return RandomAffine(
        geometry.patch_size,
        mirroring=recipe.mirroring,
        rotation=recipe.rotation,
        out_of_plane_rotation=geometry.out_of_plane_rotation,
        scaling=(recipe.scaling[0], recipe.scaling[1]),
        translation=recipe.translation,
    )


class ContrastiveMethod(Method):
    """A method whose losses have known values: at collapse, with the own view found, and with all positives found."""

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
        """Return what the contrastive losses take of a recipe."""
        return {"temperature": recipe.temperature, "base_temperature": None, "own_view_weight": 0.0}

    def threshold(self) -> float:
        """Return t in force: patches nearer than this fraction of the volume are positives."""
        return self.geometry.threshold

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
        """Return each contrastive loss that sits at the value it has with one embedding for every image."""
        lines = ReferenceValues(**references)
        line = lines.collapse - _LEARNED_FRACTION * (lines.collapse - lines.own_view_only)
        reasons = []
        for name in cls.referenced_losses:
            # fresh networks start above the line and fall through it
            falling = before.get(name, math.inf) - means.get(name, math.inf) > _FALLING_FRACTION * lines.collapse
            if means.get(name, -math.inf) > line and not falling:
                reasons.append(
                    f"{cls.loss_labels[name]} is {means[name]:.3f}: at {lines.collapse:.3f} every image has one embedding, a "
                    f"network that knows the own view alone reaches {lines.own_view_only:.3f}"
                )
        return reasons
