"""The network that is pre-trained, with the methods that train it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from nnunetv2_macl.methods.base import Geometry, Method, Progress, StepRandom, Views
from nnunetv2_macl.methods.registry import methods_of
from nnunetv2_macl.networks.base import PretrainableNetwork


class PretrainingModel(nn.Module):
    """Holds the trained part of a network once, and the methods whose losses are added up.

    Args:
        network: The part that is trained.
        geometry: What the methods read of it, and the patches.
        recipe: Its ``method`` names the methods.
    """

    def __init__(self, network: PretrainableNetwork, geometry: Geometry, recipe: Any) -> None:
        super().__init__()
        self.network = network
        self.methods = nn.ModuleDict({m.name: m(network, geometry, recipe) for m in methods_of(recipe.method)})

    def __iter__(self) -> Iterator[Method]:
        """Iterate over the methods, in the order in which the recipe names them."""
        return iter(self.methods.values())  # type: ignore[arg-type]

    @property
    def uses_neighbours(self) -> bool:
        """Return whether a method asks for a neighbour of each patch. The images of a batch are then 2N."""
        return any(method.uses_neighbours for method in self)

    def make_views(self, method: Method, images: Tensor, numbers: Any, progress: Progress) -> dict[str, Tensor]:
        """Return the views of one of the methods. Only a method that asks for neighbours is given them.

        Args:
            method: One of this model.
            images: The images of a batch, see `uses_neighbours`.
            numbers: What its views drew, on the device of the images.
            progress: How far the run is.
        """
        if self.uses_neighbours and not method.uses_neighbours:
            images = images[: len(images) // 2]
        return method.views.make(images, numbers, progress)

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Copy weights into the network, by their names in the segmentation network, and into the methods' copies of it."""
        self.network.load_weights(weights)
        for method in self:
            method.copy_network()

    @property
    def views(self) -> AllViews:
        """Return the views of all methods, without the network."""
        return AllViews({method.name: method.views for method in self})


class AllViews:
    """Draws the random numbers of all methods. It can be sent to another process.

    Args:
        views: Of each method, by its name.
    """

    def __init__(self, views: dict[str, Views]) -> None:
        self._views = views

    def draw(self, random: StepRandom) -> dict[str, Any]:
        """Return the random numbers of a step by the name of the method."""
        return {name: views.draw(random) for name, views in self._views.items()}
