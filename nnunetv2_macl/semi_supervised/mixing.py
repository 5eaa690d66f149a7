"""Combine labelled and unlabelled patches for a training step of the student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nnunetv2_macl.semi_supervised.targets import Targets

# edge of the pasted box, as a fraction of the edge of the patch (Bai et al. 2023, beta)
_BOX = 2 / 3


class Patches(NamedTuple):
    """Images (B, C, *patch), and their targets at full resolution (B, T, *patch)."""

    images: Tensor
    target: Tensor


class Lesson(NamedTuple):
    """Images for one forward pass of the student, with two targets: the labels, and the predictions of the teacher.

    A target is None if the images have no voxel with it. ``share`` is the weight of the lesson's losses.
    """

    images: Tensor
    labels: Tensor | None
    pseudo_labels: Tensor | None
    share: float = 1.0


Mixing = Callable[[Patches, Patches, Targets, np.random.Generator], Sequence[Lesson]]


def consistency(
    labelled: Patches, unlabelled: Patches, targets: Targets, generator: np.random.Generator
) -> list[Lesson]:
    """Return the labelled and the unlabelled patches unchanged.

    Source: Sohn et al., FixMatch, NeurIPS 2020, with the averaged teacher of Tarvainen and Valpola, NIPS 2017.
    """
    return [Lesson(labelled.images, labelled.target, None), Lesson(unlabelled.images, None, unlabelled.target)]


def copy_paste(
    labelled: Patches, unlabelled: Patches, targets: Targets, generator: np.random.Generator
) -> list[Lesson]:
    """Return unlabelled patches with a box from the labelled ones, and labelled patches with a box from the unlabelled ones.

    The two lessons together use each labelled voxel once, and a loss is a mean, so each lesson has half of the weight.

    Source: Bai et al., Bidirectional Copy-Paste for Semi-Supervised Medical Image Segmentation, CVPR 2023.
    """
    inside = torch.from_numpy(draw_box(labelled.images.shape[2:], generator)).to(labelled.images.device)
    lessons = []
    for is_labelled in (inside, ~inside):
        lessons.append(
            Lesson(
                torch.where(is_labelled, labelled.images, unlabelled.images),
                targets.ignore(labelled.target, ~is_labelled),
                targets.ignore(unlabelled.target, is_labelled),
                share=0.5,
            )
        )
    return lessons


def draw_box(shape: Sequence[int], generator: np.random.Generator) -> np.ndarray:
    """Return a mask of a shape that is True in a box at a random place."""
    mask = np.zeros(shape, bool)
    edges = [max(1, int(n * _BOX)) for n in shape]
    corner = [int(generator.integers(n - edge + 1)) for n, edge in zip(shape, edges, strict=True)]
    mask[tuple(slice(c, c + edge) for c, edge in zip(corner, edges, strict=True))] = True
    return mask


MIXINGS: dict[str, Mixing] = {"consistency": consistency, "copy_paste": copy_paste}
