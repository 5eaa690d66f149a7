"""SimTriplet: SimSiam with a third view, which shows a neighbour of the patch.

Source: Liu et al., MICCAI 2021, https://arxiv.org/abs/2103.05585, Eq. 1 to 3. The published neighbour is the adjacent tile of a
microscope slide. Here it is the next slice of the volume in 2D, and a patch that is shifted by half its size in 3D, so that both
patches show some of the same tissue.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nnunetv2_macl.methods.base import Geometry
from nnunetv2_macl.methods.image_level import TwoViews
from nnunetv2_macl.methods.simsiam import SimSiam, SimSiamConfig
from nnunetv2_macl.networks.base import PretrainableNetwork


class SimTripletConfig(SimSiamConfig):
    """The recipe keys of SimTriplet."""


class _ThreeViews(TwoViews):
    """Two views of each patch, and one view of its neighbour, ``neighbour``."""

    names = ("first", "second", "neighbour")

    def shown(self, patches: Tensor) -> list[Tensor]:
        patches, neighbours = patches.chunk(2)
        return [patches, patches, neighbours]


class SimTriplet(SimSiam):
    """Predicts the network's own embeddings of another view of the patch and of a view of its neighbour."""

    name = "simtriplet"
    Config = SimTripletConfig
    loss_labels = {
        "similarity": "L_s, two views of a patch",
        "neighbour": "L_n, a view of a patch and of its neighbour",
    }
    view_titles = {**SimSiam.view_titles, "neighbour": "view of the neighbour"}
    uses_neighbours = True
    summary = "by SimTriplet, prediction of the embedding of another view and of a neighbour,"
    citations = (
        "Liu et al. SimTriplet: Simple Triplet Representation Learning with a Single GPU. MICCAI 2021. arXiv:2103.05585",
    )
    pairs = {"similarity": ("first", "second"), "neighbour": ("first", "neighbour")}

    def __init__(self, network: PretrainableNetwork, geometry: Geometry, recipe: Any) -> None:
        super().__init__(network, geometry, recipe)
        self.views = _ThreeViews(geometry, recipe)
