"""Training targets with voxels that the loss ignores, from labels and from a teacher's predictions."""

from __future__ import annotations

import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor


class LabelTargets:
    """One label for each voxel: the target has one channel, and ignored voxels have a separate label."""

    def __init__(self, ignore_label: int) -> None:
        self.ignore_label = ignore_label

    def from_labels(self, target: Tensor) -> Tensor:
        """Return the target of labelled patches, given nnU-Net's target at full resolution."""
        return target

    def from_logits(self, logits: Tensor, confidence: float) -> Tensor:
        """Return hard labels from logits (B, C, *patch). Voxels with a lower probability are ignored."""
        probability, label = logits.float().softmax(1).max(1, keepdim=True)
        return torch.where(probability >= confidence, label, self.ignore_label).to(torch.int16)

    def ignore(self, target: Tensor, where: Tensor) -> Tensor:
        """Return a target in which the voxels of a mask, broadcastable to (B, 1, *patch), are ignored too."""
        return torch.where(where, self.ignore_label, target)

    def ignored(self, target: Tensor) -> Tensor:
        """Return the mask of the ignored voxels, (B, 1, *patch)."""
        return target == self.ignore_label


class RegionTargets:
    """Overlapping regions: the target has a channel for each region, and a last channel that is 1 where voxels are ignored.

    The methods are those of `LabelTargets`. A voxel is confident if the prediction of every region is.
    """

    def __init__(self, regions: int) -> None:
        self.regions = regions

    def from_labels(self, target: Tensor) -> Tensor:
        if target.shape[1] > self.regions:  # the data set itself has an ignore label
            return target.bool()
        return torch.cat([target.bool(), torch.zeros_like(target[:, :1], dtype=torch.bool)], 1)

    def from_logits(self, logits: Tensor, confidence: float) -> Tensor:
        probability = logits.float().sigmoid()
        certain = torch.maximum(probability, 1 - probability).amin(1, keepdim=True) >= confidence
        return torch.cat([probability > 0.5, ~certain], 1)

    def ignore(self, target: Tensor, where: Tensor) -> Tensor:
        return torch.cat([target[:, :-1], target[:, -1:] | where], 1)

    def ignored(self, target: Tensor) -> Tensor:
        return target[:, -1:]


# makes targets in the form that nnU-Net's loss with an ignore label requires, (B, T, *patch)
Targets = LabelTargets | RegionTargets


def targets_of(labels: LabelManager) -> Targets:
    """Return the object that makes targets for the labels of a data set."""
    if labels.has_regions:
        return RegionTargets(len(labels.foreground_regions))
    return LabelTargets(ignore_label_of(labels))


def ignore_label_of(labels: LabelManager) -> int:
    """Return the ignore label of a data set, or the one that nnU-Net would require: the number after the largest label."""
    return int(max(labels.all_labels)) + 1
