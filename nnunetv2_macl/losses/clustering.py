"""Online clustering: the codes of one view are predicted from another view of the same image.

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

    Rows and columns are normalised by turns (Sinkhorn and Knopp).

    Args:
        scores: (N, K), cosine similarities of N vectors to K prototypes.
        epsilon: ε. The smaller it is, the nearer a code is to one prototype.
        iterations: Number of normalisations of each kind.

    Returns:
        (N, K), each row sums to 1.
    """
    # Codes do not depend on the factor that the largest score takes out, and large exponents would overflow.
    codes = ((scores - scores.max()) / epsilon).exp()
    for _ in range(iterations):
        codes = codes / codes.sum(0)
        codes = codes / codes.sum(1, keepdim=True)
    return codes


def swapped_prediction(
    scores: Sequence[Tensor],
    assigned: int = 2,
    queued: Sequence[Tensor] = (),
    *,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
) -> Tensor:
    """Return the cross-entropy between the codes of some views and the predictions from all other views. Codes have no gradient.

    Args:
        scores: Of each view, (N, K), cosine similarities to the prototypes.
        assigned: Number of the first views whose codes are predicted.
        queued: Scores of earlier vectors of each of these views, (Q, K). Codes are computed with them, because a small batch
            cannot use all prototypes equally.
        temperature: τ, of the predictions.
        epsilon, iterations: See `sinkhorn`.

    Returns:
        A scalar, the mean over codes and over the views that predict them.
    """
    with autocast_disabled(scores[0]):
        scores = [at_least_float32(values, values)[0] for values in scores]
        log_p = [(values / temperature).log_softmax(1) for values in scores]
        losses = []
        for number in range(assigned):
            earlier = [queued[number].to(scores[number].dtype)] if queued else []
            codes = sinkhorn(torch.cat((scores[number].detach(), *earlier)), epsilon, iterations)
            codes = codes[: len(scores[number])]
            losses += [-(codes * log_p[k]).sum(1).mean() for k in range(len(scores)) if k != number]
        return torch.stack(losses).mean()
