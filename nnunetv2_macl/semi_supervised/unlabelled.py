"""Patches of unlabelled images for nnU-Net's data loader, in a weakly and a strongly augmented view."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from torch import Tensor

from nnunetv2_macl.data import Case, open_unchanged, read_outside

# Factor on nnU-Net's probabilities of its intensity transforms, which leave about every third patch of one channel as it is.
_STRONGER = 2.0


class UnlabelledDataset:
    """Preprocessed cases as nnU-Net's data loader reads them, with a segmentation without labels.

    Args:
        cases: The cases.
        in_mask: Whether the plan normalises within a mask. The segmentation is -1 outside of it, and 0 elsewhere.
    """

    def __init__(self, cases: list[Case], in_mask: bool) -> None:
        # A name need not be unique, because cases may come from several data sets.
        self.identifiers = [case.file for case in cases]
        self.in_mask = in_mask

    def load_case(self, identifier: str) -> tuple[Any, np.ndarray, None, dict[str, Any]]:
        """Return image (C, *volume), segmentation (1, *volume), None and properties without locations of classes."""
        data = open_unchanged(identifier)
        zeros = np.broadcast_to(np.zeros((), np.int8), (1, *data.shape[1:]))
        return data, read_outside(identifier) if self.in_mask else zeros, None, {"class_locations": {}}


class WeakAndStrong:
    """Applies nnU-Net's training augmentation in two views with the same geometry. The result is (2C, *patch).

    The first C channels are the weak view, which has only the geometric transforms. The others are the strong view, which
    also has the intensity transforms, with twice the probability.
    """

    def __init__(self, transforms: ComposeTransforms) -> None:
        self.geometry: list[BasicTransform] = []
        self.intensity: list[BasicTransform] = []
        self.masking: list[MaskImageTransform] = []
        for transform in transforms.transforms:
            inner = transform.transform if isinstance(transform, RandomTransform) else transform
            if isinstance(transform, MaskImageTransform):
                self.masking.append(transform)
            elif isinstance(transform, RandomTransform) and isinstance(inner, ImageOnlyTransform):
                self.intensity.append(RandomTransform(inner, min(1.0, _STRONGER * transform.apply_probability)))
            elif isinstance(inner, ImageOnlyTransform):
                self.intensity.append(transform)
            elif not isinstance(inner, SegOnlyTransform):
                self.geometry.append(transform)

    def __call__(self, image: Tensor, segmentation: Tensor) -> dict[str, Tensor]:
        weak = _apply(self.geometry, {"image": image, "segmentation": segmentation})
        strong = _apply(self.intensity, {**weak, "image": weak["image"].clone()})
        views = [_apply(self.masking, view)["image"] for view in (weak, strong)]
        return {"image": torch.cat(views), "segmentation": weak["segmentation"]}


def _apply(transforms: list[Any], content: dict[str, Tensor]) -> dict[str, Tensor]:
    for transform in transforms:
        content = transform(**content)
    return content


class PairedLoader:
    """Draws a labelled batch as nnU-Net does, and as many unlabelled patches.

    Args:
        labelled: nnU-Net's loader of the labelled cases.
        dataset: The unlabelled cases.
        axes: Number of axes of a patch.
        labels: nnU-Net's label manager.
    """

    def __init__(self, labelled: nnUNetDataLoader, dataset: UnlabelledDataset, axes: int, labels: Any) -> None:
        self.labelled = labelled
        self.unlabelled = nnUNetDataLoader(
            dataset,  # type: ignore[arg-type]
            labelled.batch_size,
            labelled.patch_size[-axes:],
            labelled.final_patch_size[-axes:],
            labels,
            transforms=WeakAndStrong(labelled.transforms),
        )
        # With an ignore label, nnU-Net places patches around annotated voxels, and unlabelled images have none.
        self.unlabelled.has_ignore = False

    def generate_train_batch(self) -> dict[str, Any]:
        """Return nnU-Net's batch, with ``weak`` and ``strong`` views (B, C, *patch) of unlabelled patches."""
        batch = self.labelled.generate_train_batch()
        weak, strong = self.unlabelled.generate_train_batch()["data"].chunk(2, 1)
        return batch | {"weak": weak, "strong": strong}
