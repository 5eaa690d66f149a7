"""PCL: patches at similar positions in their volumes are positives of each other.

Source: Zeng et al., "Positional Contrastive Learning for Volumetric Medical Image Segmentation", MICCAI 2021,
https://arxiv.org/abs/2106.09157. Departures: the head's output has the length ``embedding_dim`` instead of the width of the
bottleneck. Positions must be similar on all axes instead of the slice axis only, and in 3D some patches of a batch are drawn at
one relative position of several images.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from nnunetv2_macl.methods.config import Fraction
from nnunetv2_macl.methods.simclr import SimCLR, SimCLRConfig


class PCLConfig(SimCLRConfig):
    """The recipe keys of PCL."""

    intensity: Annotated[float, Field(ge=0, le=2)] = Field(
        0.0, description="strength of random gamma, contrast, brightness, bias field, noise and blur; `0` disables them"
    )
    threshold: Fraction = Field(
        0.1, description="t, the fraction of the volume within which two patches are positives of each other"
    )
    limit_positives: bool = Field(
        False,
        description="whether to lower t until an anchor has at most about N/8 positives besides its own other view",
    )


class PCL(SimCLR):
    """Contrasts whole images. Patches at similar positions are positives."""

    name = "pcl"
    Config = PCLConfig
    loss_labels = {"positional": "L_p, image level"}
    referenced_losses = ("positional",)
    compares_positions = True
    plan_keys = ("threshold", "expected_positives", "out_of_plane_rotation")
    summary = "by PCL, contrastive learning with positives by position,"
    citations = (
        "Zeng et al. Positional Contrastive Learning for Volumetric Medical Image Segmentation. MICCAI 2021. arXiv:2106.09157",
    )
