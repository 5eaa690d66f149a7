"""The three losses of MACL, their weighted sum, and the values to read their curves against.

Pure functions of embeddings and positions: nothing here knows of nnU-Net, paths, ranks or loggers.

Source: Zeng et al., "Multi-level Asymmetric Contrastive Learning for Medical Image Segmentation Pre-training", IEEE JBHI
2026, https://arxiv.org/abs/2309.11876. Positives by position: Zeng et al., "Positional Contrastive Learning for
Volumetric Medical Image Segmentation", MICCAI 2021, https://arxiv.org/abs/2106.09157.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Similarities held at once by the dense loss; more locations than that are computed in turn. On a GPU as many as keep it busy
# (float32: 64 MiB), on a CPU as many as stay in its cache.
SIMILARITIES_AT_ONCE = {"cuda": 2**24, "cpu": 2**18}
# as torch's normalize
_SMALLEST_NORM = 1e-12

# of a channel, in the equivariance loss: less is rounding
_SMALLEST_VARIANCE = 1e-4

EQUIVARIANCE_FORMS = ("l1", "standardised")

LINEAR_MODE = {1: "linear", 2: "bilinear", 3: "trilinear"}


def positive_mask(positions: Tensor, threshold: float) -> Tensor:
    """Which of the 2N vectors are positives of which.

    Args:
        positions: (N,) or (N, A), fraction of the volume, one row a patch.
        threshold: t; patches are positives when their positions differ by less than t on every axis.

    Returns:
        (2N, 2N) bool, rows are anchors. Vector i and vector N+i are the two views of patch i: always positives of each
        other, whatever the threshold. No vector is its own positive.
    """
    positions = positions.reshape(len(positions), -1)
    near = (positions[:, None] - positions[None]).abs().amax(-1) < threshold
    own_patch = torch.eye(len(positions), dtype=torch.bool, device=positions.device)
    mask = (near | own_patch).repeat(2, 2)
    return mask.fill_diagonal_(False)


class _ContrastiveLoss(nn.Module):
    def __init__(
        self,
        temperature: float = 0.1,
        threshold: float = 0.1,
        base_temperature: float | None = 0.07,
        *,
        own_view_weight: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("temperature", temperature), ("base_temperature", base_temperature)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be greater than 0, got {value!r}")
        if not threshold >= 0:
            raise ValueError(f"threshold must be 0 or greater, got {threshold!r}")
        if not 0 <= own_view_weight <= 1:
            raise ValueError(f"own_view_weight must lie between 0 and 1, got {own_view_weight!r}")
        self.temperature = temperature
        self.threshold = threshold
        self.base_temperature = base_temperature
        self.own_view_weight = own_view_weight

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, threshold={self.threshold}, base_temperature={self.base_temperature}, "
            f"own_view_weight={self.own_view_weight}"
        )

    def _mean_over_anchors(self, dominant: Tensor, auxiliary: Tensor, positions: Tensor) -> Tensor:
        """Loss at each location. dominant, auxiliary: (N, C, P) -> (P,)."""
        if dominant.shape != auxiliary.shape:
            raise ValueError(
                f"dominant and auxiliary must have one shape, got {tuple(dominant.shape)} and {tuple(auxiliary.shape)}"
            )
        if len(positions) != len(dominant):
            raise ValueError(f"positions must have one row a patch: {len(dominant)} patches, got {len(positions)} rows")
        with full_precision(dominant):
            # half precision leaves too few digits for a similarity divided by 0.1
            if dominant.dtype not in (torch.float32, torch.float64):
                dominant, auxiliary = dominant.float(), auxiliary.float()
            weights = self._positive_weights(positions.to(dominant.device), dominant.dtype)
            loss = _Contrast.apply(dominant, auxiliary, weights, self.temperature)
        if self.base_temperature is not None:
            loss = loss * (self.temperature / self.base_temperature)
        return loss

    def _positive_weights(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """(2N, 2N), rows sum to 1: how much each positive counts for its anchor."""
        mask = positive_mask(positions, self.threshold).to(dtype)
        mean_over_positives = mask / mask.sum(1, keepdim=True)
        if not self.own_view_weight:
            return mean_over_positives
        own_view = torch.eye(len(mask), dtype=dtype, device=mask.device).roll(len(positions), 0)
        return self.own_view_weight * own_view + (1 - self.own_view_weight) * mean_over_positives


def full_precision(tensor: Tensor) -> AbstractContextManager:
    """No autocast on a tensor's device. Beside these two none is ever on, and MPS knows it in newer versions of torch alone."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if kind in ("cuda", "cpu") else nullcontext()


def locations_at_once(vectors: int, device_type: str) -> int:
    """Locations whose similarities are held at once, for 2N vectors at each; device_type as torch names it."""
    return max(1, SIMILARITIES_AT_ONCE.get(device_type, SIMILARITIES_AT_ONCE["cuda"]) // vectors**2)


@contextmanager
def similarities_on_meta(device_type: str) -> Iterator[None]:
    """Within, tensors on the meta device are computed in the chunks of a device type, to count its memory."""
    SIMILARITIES_AT_ONCE["meta"] = SIMILARITIES_AT_ONCE[device_type]
    try:
        yield
    finally:
        del SIMILARITIES_AT_ONCE["meta"]


class _Contrast(torch.autograd.Function):
    """Two (N, C, P) and weights (2N, 2N) of which each row sums to 1 -> (P,): mean over anchors i of -sum_j w_ij log p_ij.

    p_i is the softmax of the cosine similarities s_ij = u_i·u_j / τ over all j but i, with u_i = x_i / |x_i|. The gradient has a
    closed form, which is computed along with the loss: that saves keeping or computing again what autograd would need, and
    locations pass in chunks, so that similarities of only one chunk are ever held. With d_ij = p_ij - w_ij, D = d + dᵀ:

        2N · dL/dx_i = ( sum_j D_ij u_j / τ  -  (sum_j D_ij s_ij) u_i ) / |x_i|
    """

    @staticmethod
    def forward(ctx: Any, dominant: Tensor, auxiliary: Tensor, weights: Tensor, temperature: float) -> Tensor:
        patches, channels, locations = dominant.shape
        count = 2 * patches
        # one copy and no other tensor of this size: fresh memory costs more than what is computed with it
        vectors = dominant.new_empty(count, locations, channels)
        vectors[:patches].copy_(dominant.transpose(1, 2))
        vectors[patches:].copy_(auxiliary.transpose(1, 2))
        by_location = vectors.transpose(0, 1)
        losses = vectors.new_empty(locations)
        trained = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        chunk = locations_at_once(count, vectors.device.type)
        for part, loss in zip(by_location.split(chunk), losses.split(chunk), strict=True):
            similarities = part @ part.transpose(1, 2)
            inverse_norms = similarities.diagonal(dim1=1, dim2=2).clamp_min(_SMALLEST_NORM**2).rsqrt()
            similarities *= (inverse_norms / temperature).unsqueeze(2)
            similarities *= inverse_norms.unsqueeze(1)
            similarities.diagonal(dim1=1, dim2=2).fill_(-math.inf)
            log_p = similarities.log_softmax(-1)
            for matrices in (similarities, log_p):
                matrices.diagonal(dim1=1, dim2=2).zero_()
            loss.copy_(torch.einsum("pij,ij->p", log_p, weights)).div_(-count)
            if trained:
                difference = log_p.exp_().sub_(weights)
                difference.diagonal(dim1=1, dim2=2).zero_()
                both = difference + difference.transpose(1, 2)
                own = similarities.mul_(both).sum(-1)
                both *= (inverse_norms / (temperature * count)).unsqueeze(2)
                both *= inverse_norms.unsqueeze(1)
                both.diagonal(dim1=1, dim2=2).copy_(own * inverse_norms.square() / -count)
                # the vectors of these locations are done with
                part.copy_(both @ part)
        if trained:
            ctx.save_for_backward(vectors)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dominant, auxiliary = (
            # turned first: a product of a turned tensor is slow
            part.transpose(1, 2).clone(memory_format=torch.contiguous_format).mul_(grad_losses)
            for part in ctx.saved_tensors[0].chunk(2)
        )
        return dominant, auxiliary, None, None


class PositionalContrastiveLoss(_ContrastiveLoss):
    """Image-level contrastive loss with positives by position, L_g.

    Of the 2N vectors every one is an anchor; its positives are the vectors of patches that lie within ``threshold`` of its
    own, and always its own other view; its denominator is all but itself. Cosine similarity, mean of -log p over positives,
    then over anchors.

    Source: MACL Eq. 4-7 (image level). The factor temperature / base_temperature stands in the published implementation,
    not in the equations; ``base_temperature=None`` leaves it out.

    Args:
        temperature: τ.
        threshold: t, fraction of the volume; positives need |Δ| < t on every axis. 0: the own view only (SimCLR).
        base_temperature: see above.
        own_view_weight: a in a·(own view) + (1-a)·(mean over all positives); 0 is the paper's plain mean.

    Raises:
        ValueError: an argument outside its range.
    """

    def forward(self, dominant: Tensor, auxiliary: Tensor, positions: Tensor) -> Tensor:
        """Scalar loss.

        Args:
            dominant: (N, C) embeddings, any length.
            auxiliary: (N, C) embeddings of the same patches, in the same order.
            positions: (N,) or (N, A), fraction of the volume.

        Raises:
            ValueError: shapes that do not agree.
        """
        if dominant.ndim != 2:
            raise ValueError(f"dominant must be (N, C), got shape {tuple(dominant.shape)}")
        return self._mean_over_anchors(dominant.unsqueeze(-1), auxiliary.unsqueeze(-1), positions).mean()


class DenseContrastiveLoss(_ContrastiveLoss):
    """Pixel-level contrastive loss, L_d: `PositionalContrastiveLoss` at each grid location, averaged over locations.

    Memory stays bounded whatever the grid: locations are computed in chunks.

    Source: MACL Eq. 8-9 (pixel level). Arguments as in `PositionalContrastiveLoss`.
    """

    def forward(self, dominant: Tensor, auxiliary: Tensor, positions: Tensor) -> Tensor:
        """Scalar loss.

        Args:
            dominant: (N, C, *grid) embeddings, any length.
            auxiliary: (N, C, *grid) embeddings of the same patches, in the same order.
            positions: (N,) or (N, A), fraction of the volume.

        Raises:
            ValueError: shapes that do not agree.
        """
        if dominant.ndim < 3:
            raise ValueError(f"dominant must be (N, C, *grid), got shape {tuple(dominant.shape)}")
        if dominant.shape != auxiliary.shape:
            raise ValueError(
                f"dominant and auxiliary must have one shape, got {tuple(dominant.shape)} and {tuple(auxiliary.shape)}"
            )
        return self._mean_over_anchors(dominant.flatten(2), auxiliary.flatten(2), positions).mean()


class EquivarianceLoss(nn.Module):
    """Equivariant regularisation, L_ER: features of the downsampled image should be the downsampled features.

    Mean absolute difference between the dominant map and the auxiliary map, linearly interpolated to the dominant grid. A
    network that makes one map for every image has none. ``standardised`` leaves that way out: what all images of the batch have
    in common is subtracted, and the rest brought to one scale, with gradients through both.

    Source: MACL Eq. 3 (feature level), which is ``l1``.

    Args:
        form: ``l1`` or ``standardised``.

    Raises:
        ValueError: another form.
    """

    def __init__(self, form: str = "l1") -> None:
        super().__init__()
        if form not in EQUIVARIANCE_FORMS:
            raise ValueError(f"form must be one of {EQUIVARIANCE_FORMS}, got {form!r}")
        self.form = form

    def forward(self, dominant: Tensor, auxiliary: Tensor) -> Tensor:
        """Scalar loss.

        Args:
            dominant: (N, C, *small) features.
            auxiliary: (N, C, *large) features.

        Raises:
            ValueError: other numbers of patches, channels or axes.
        """
        if dominant.ndim != auxiliary.ndim or dominant.shape[:2] != auxiliary.shape[:2]:
            raise ValueError(
                "dominant and auxiliary must agree in patches, channels and number of axes, got "
                f"{tuple(dominant.shape)} and {tuple(auxiliary.shape)}"
            )
        with full_precision(dominant):
            if dominant.dtype not in (torch.float32, torch.float64):
                dominant, auxiliary = dominant.float(), auxiliary.float()
            auxiliary = down(auxiliary, dominant.shape[2:])
            if self.form == "standardised":
                dominant, auxiliary = _standardised(dominant), _standardised(auxiliary)
            return F.l1_loss(dominant, auxiliary)


def _standardised(maps: Tensor) -> Tensor:
    """(N, C, *grid), centred over the batch at each location, each channel of variance 1."""
    centred = maps - maps.mean(0, keepdim=True)
    variance = centred.square().mean([0, *range(2, maps.ndim)], keepdim=True)
    return centred * (variance + _SMALLEST_VARIANCE).rsqrt()


def down(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Linear interpolation of (N, C, *spatial) to ``size``, corners aligned: the paper's downsampling."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode=LINEAR_MODE[maps.ndim - 2], align_corners=True)


class MultiLevelContrastiveLoss(nn.Module):
    """L = λ1·L_g + λ2·L_d + λ3·L_ER (MACL Eq. 10). A term of weight 0 is not computed.

    Raises:
        ValueError: a negative weight, or a feature-level weight alone.
    """

    def __init__(
        self,
        *,
        weight_global: float = 1.0,
        weight_dense: float = 0.5,
        weight_equivariance: float = 1.0,
        temperature: float = 0.1,
        threshold: float = 0.1,
        base_temperature: float | None = 0.07,
        own_view_weight: float = 0.0,
        equivariance_form: str = "l1",
    ) -> None:
        super().__init__()
        self.weights = {"global": weight_global, "dense": weight_dense, "equivariance": weight_equivariance}
        if min(self.weights.values()) < 0 or (weight_equivariance and weight_global + weight_dense <= 0):
            raise ValueError(f"weights must be 0 or greater, and global or dense above 0, got {self.weights}")
        contrastive = {"own_view_weight": own_view_weight}
        self.global_loss = PositionalContrastiveLoss(temperature, threshold, base_temperature, **contrastive)
        self.dense_loss = DenseContrastiveLoss(temperature, threshold, base_temperature, **contrastive)
        self.equivariance_loss = EquivarianceLoss(equivariance_form)

    @property
    def threshold(self) -> float:
        return self.global_loss.threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        self.global_loss.threshold = self.dense_loss.threshold = value

    def forward(self, outputs: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
        """Losses by name: those with a weight, and ``total``.

        Args:
            outputs: what `nnunetv2_macl.network.MACLNetwork` returns.
            positions: (N,) or (N, A), fraction of the volume.
        """
        losses: dict[str, Tensor] = {}
        if self.weights["global"]:
            losses["global"] = self.global_loss(outputs["global_dominant"], outputs["global_auxiliary"], positions)
        if self.weights["dense"]:
            losses["dense"] = self.dense_loss(outputs["dense_dominant"], outputs["dense_auxiliary"], positions)
        if self.weights["equivariance"]:
            losses["equivariance"] = self.equivariance_loss(
                outputs["bottleneck_dominant"], outputs["bottleneck_auxiliary"]
            )
        losses["total"] = torch.as_tensor(sum(self.weights[name] * loss for name, loss in losses.items()))
        return losses


class ReferenceValues(NamedTuple):
    """What a contrastive loss is worth at three states of the network; see `reference_values`."""

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
    """The values to read a curve of L_g or L_d against.

    Args:
        patches: N of the batch, over all ranks.
        positives: P, mean number of positives an anchor, the own view included (at least 1).
        temperature, base_temperature, own_view_weight: as in `PositionalContrastiveLoss`.

    Returns:
        ``collapse``: every vector alike, ln(2N-1). ``own_view_only``: the best that a network can reach which knows
        nothing but the own view. ``all_found``: the best of all, every positive found. All times τ / base temperature.
    """
    candidates = 2 * patches - 1
    factor = 1.0 if base_temperature is None else temperature / base_temperature
    own = own_view_weight + (1 - own_view_weight) / positives

    def cross_entropy(others: float) -> float:
        """Own view at its weight, the rest of the weight even over ``others`` vectors."""
        rest = 1 - own
        return -own * math.log(own) - (rest * math.log(rest / others) if rest > 1e-12 else 0.0)

    return ReferenceValues(
        collapse=factor * math.log(candidates),
        own_view_only=factor * cross_entropy(candidates - 1),
        all_found=factor * cross_entropy(positives - 1),
    )
