"""The pre-trained network together with the methods that train it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from nnunetv2_macl.methods.base import Geometry, Method, Progress, StepRandom, Views
from nnunetv2_macl.methods.registry import methods_of
from nnunetv2_macl.networks.base import PretrainableNetwork


class PretrainingModel(nn.Module):
    """The trained part of a network, and the methods whose losses are added.

    Args:
        network: The part of the network that is trained.
        geometry: The stages that the methods read, and the patches.
        recipe: The recipe, whose ``method`` names the methods.
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
        """Return whether a method uses a neighbour of each patch. A batch then has 2N images."""
        return any(method.uses_neighbours for method in self)

    def make_views(self, method: Method, images: Tensor, numbers: Any, progress: Progress) -> dict[str, Tensor]:
        """Return the views of one method. Neighbours are passed only to methods that use them.

        Args:
            method: A method of this model.
            images: The images of a batch, (N, C, *patch), or (2N, C, *patch) if `uses_neighbours`.
            numbers: The random numbers of the method's views, on the device of the images.
            progress: The current step.
        """
        if self.uses_neighbours and not method.uses_neighbours:
            images = images[: len(images) // 2]
        return method.views.make(images, numbers, progress)

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Copy weights, named as in the segmentation network, into the network and into the methods' copies of the network."""
        self.network.load_weights(weights)
        for method in self:
            method.copy_network()

    @property
    def views(self) -> AllViews:
        """Return the views of all methods, without the network."""
        return AllViews({method.name: method.views for method in self})


class AllViews:
    """Draws the random numbers of all methods. The object can be pickled, because it holds no network.

    Args:
        views: The views of each method, by the method's name.
    """

    def __init__(self, views: dict[str, Views]) -> None:
        self._views = views

    def draw(self, random: StepRandom) -> dict[str, Any]:
        """Return the random numbers of a step, by the method's name."""
        return {name: views.draw(random) for name, views in self._views.items()}
