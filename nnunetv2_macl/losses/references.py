"""Reference values of the contrastive losses at three states of the network."""

from __future__ import annotations

import math
from typing import NamedTuple


class ReferenceValues(NamedTuple):
    """Values of a contrastive loss at three states of the network; see `reference_values`."""

    collapse: float
    own_view_only: float
    all_found: float


def reference_values(
    patches: int,
    positives: float,
    *,
    temperature: float = 0.1,
    base_temperature: float | None = 0.07,
    own_view_weight: float = 0.0,
) -> ReferenceValues:
    """Return reference values for reading a curve of L_g or L_d.

    Args:
        patches: N, number of patches of the batch over all ranks.
        positives: P, mean number of positives of an anchor, including the other view of its patch (at least 1).
        temperature, base_temperature, own_view_weight: As in `PositionalContrastiveLoss`.

    Returns:
        ``collapse``: the loss when all vectors are equal, ln(2N-1). ``own_view_only``: the lowest loss of a network that
        recognises only the other view of the same patch. ``all_found``: the lowest possible loss, with all positives found.
        Each is multiplied by τ / base temperature.
    """
    candidates = 2 * patches - 1
    factor = 1.0 if base_temperature is None else temperature / base_temperature
    own = own_view_weight + (1 - own_view_weight) / positives

    def cross_entropy(others: float) -> float:
        """Return the cross-entropy of the own view's weight, and of the remaining weight spread over ``others`` vectors."""
        rest = 1 - own
        return -own * math.log(own) - (rest * math.log(rest / others) if rest > 1e-12 else 0.0)

    return ReferenceValues(
        collapse=factor * math.log(candidates),
        own_view_only=factor * cross_entropy(candidates - 1),
        all_found=factor * cross_entropy(positives - 1),
    )
