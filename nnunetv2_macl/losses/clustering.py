"""Online clustering: one view predicts the codes of another view of the same image.

Source: SwAV, Caron et al., NeurIPS 2020, https://arxiv.org/abs/2006.09882, Eq. 2, 3 and 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunetv2_macl.losses.precision import at_least_float32, autocast_disabled


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Return codes: soft assignments of vectors to prototypes that use all prototypes equally.

    The algorithm of Sinkhorn and Knopp normalises columns and rows alternately.

    Args:
        scores: (N, K), cosine similarities of N vectors to K prototypes.
        epsilon: ε. With a smaller ε, a code concentrates on fewer prototypes.
        iterations: Number of normalisations of each kind.

    Returns:
        (N, K). Each row sums to 1.
    """
    # Logarithms, because a prototype that is far from all vectors would have the sum 0.
    codes = scores / epsilon
    for _ in range(iterations):
        codes = codes.log_softmax(0)
        codes = codes.log_softmax(1)
    return codes.exp()


def swapped_prediction(
    scores: Sequence[Tensor],
    assigned: int = 2,
    queued: Sequence[Tensor] = (),
    *,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
) -> Tensor:
    """Return the cross-entropy between the codes of the first views and the predictions of all other views.

    Codes have no gradient.

    Args:
        scores: Cosine similarities of each view to the prototypes, (N, K).
        assigned: Number of first views whose codes are predicted.
        queued: Scores of earlier vectors of each of these views, (Q, K). They are added when codes are computed, because a small
            batch cannot use all prototypes equally.
        temperature: τ of the predictions.
        epsilon, iterations: See `sinkhorn`.

    Returns:
        A scalar, the mean over codes and over the views that predict them.
    """
    with autocast_disabled(scores[0]):
        scores = [at_least_float32(values) for values in scores]
        log_p = [(values / temperature).log_softmax(1) for values in scores]
        losses = []
        for number in range(assigned):
            earlier = [queued[number].to(scores[number].dtype)] if queued else []
            codes = sinkhorn(torch.cat((scores[number].detach(), *earlier)), epsilon, iterations)
            codes = codes[: len(scores[number])]
            losses += [-(codes * log_p[k]).sum(1).mean() for k in range(len(scores)) if k != number]
        return torch.stack(losses).mean()
