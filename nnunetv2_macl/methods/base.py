"""The interface of a pre-training method: the views it makes, the modules it adds, and the losses it minimises.

A method is one file in this folder. It opens no files and starts no processes. The training step, gradient caching,
training on several GPUs, the memory plan, the log, the curves, the report, the model card and the detection of collapse use only
this interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nnunetv2_macl.methods.config import MethodConfig
from nnunetv2_macl.networks.base import PretrainableNetwork
from nnunetv2_macl.views import IntensityNumbers, RandomIntensity


@dataclass(frozen=True)
class Geometry:
    """The stages of the network that a method reads, and the patches that it sees.

    Sizes are in voxels, one value per axis, in the order of the nnU-Net plan.

    Attributes:
        decoder_stages: K, the number of decoder stages that are trained, counted from the bottleneck.
        auxiliary_stage: e, the encoder stage (1 is the first) at which a second, dense map is read.
        scale: s, the factor by which the dominant branch downsamples the patch.
        patch_size: Size of a patch.
        reason: Why these values were chosen. The plan shows this text.
        threshold: t. Two patches are positives if their relative positions differ by less than t on every axis.
        out_of_plane_rotation: Largest angle about the in-plane axes, degrees.
        channels_without_zscore: Indices of the image channels that nnU-Net does not normalise to zero mean.
        batch_size: N, number of patches of a step. While the plan is made, N is unknown, and this is the largest batch that
            the planner may choose.
    """

    decoder_stages: int
    auxiliary_stage: int
    scale: list[int]
    patch_size: list[int]
    reason: str = ""
    threshold: float = 0.0
    out_of_plane_rotation: float = 0.0
    channels_without_zscore: Sequence[int] = ()
    batch_size: int = 32

    @property
    def dominant_patch_size(self) -> list[int]:
        """Return the size at which the dominant branch sees a patch."""
        return [n // s for n, s in zip(self.patch_size, self.scale, strict=True)]


class Progress(NamedTuple):
    """The current step of a run, and the length of the run."""

    step: int
    num_epochs: int
    num_iterations_per_epoch: int

    @property
    def steps(self) -> int:
        """Return the number of steps of the whole run."""
        return self.num_epochs * self.num_iterations_per_epoch

    @property
    def is_second_half(self) -> bool:
        """Return whether half of the steps, rounded down, are done. A run of one step has no second half."""
        return self.step >= max(1, self.steps // 2)

    def is_within(self, epochs: int) -> bool:
        """Return whether the step is within the first ``epochs`` epochs and within the first half of the run."""
        return self.step < min(epochs * self.num_iterations_per_epoch, self.steps // 2)


def derive_seed(*numbers: int) -> int:
    """Return one seed for torch from several numbers."""
    # 63 bits, so that the seed fits a signed integer of 64 bits
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


class StepRandom(NamedTuple):
    """The source of the random numbers of one step. They depend on (seed, step) only, and not on the images.

    Attributes:
        seed: Seed of the run.
        step: Number of the step.
        batch_size: N, number of patches of the whole batch. Each process draws the numbers of all N patches and uses its part,
            so that the views do not depend on the number of processes.
        part: The patches of this process.
        channels: C, number of image channels.
        patch_size: Voxels per axis.
    """

    seed: int
    step: int
    batch_size: int
    part: slice
    channels: int
    patch_size: tuple[int, ...]

    def generator(self, *stream: int) -> torch.Generator:
        """Return a generator on the CPU for a stream. Each view of a method uses a different stream.

        A stream and the same stream followed by zeros may be equal, so two streams must differ in more than trailing zeros.
        """
        return torch.Generator().manual_seed(derive_seed(self.seed, self.step, *stream))

    def draw_intensity(self, views: RandomIntensity, generator: torch.Generator) -> IntensityNumbers:
        """Return the random numbers of intensity views for the patches of this process."""
        numbers = views.draw(self.batch_size, self.channels, len(self.patch_size), generator)
        return IntensityNumbers(numbers.values[self.part], numbers.noise_seeds[self.part])


def to_device(numbers: Any, device: torch.device) -> Any:
    """Return random numbers with their tensors on a device. Copies from page-locked memory are asynchronous."""
    if isinstance(numbers, Tensor):
        return numbers.to(device, non_blocking=True)
    if isinstance(numbers, dict):
        return {key: to_device(value, device) for key, value in numbers.items()}
    if isinstance(numbers, list):
        return [to_device(value, device) for value in numbers]
    if isinstance(numbers, tuple):
        moved = (to_device(value, device) for value in numbers)
        return type(numbers)(*moved) if hasattr(numbers, "_fields") else tuple(moved)
    return numbers


class Views(ABC):
    """The views of a batch that a method shows to the network.

    This class holds settings and no network, because the data loader's processes call `draw`. Random numbers are tensors, None,
    or lists, tuples and dictionaries of these.
    """

    @abstractmethod
    def draw(self, random: StepRandom) -> Any:
        """Return the random numbers of a step for the n patches of this process, on the CPU."""

    @abstractmethod
    def make(self, patches: Tensor, numbers: Any, progress: Progress) -> dict[str, Tensor]:
        """Return the views by name, each with n rows.

        Args:
            patches: (n, C, *patch). If the method `uses_neighbours`, (2n, C, *patch): the patches, then their neighbours.
            numbers: The result of `draw`, with its tensors on the device of the patches.
            progress: The current step.
        """


class Method(nn.Module, ABC):
    """The base class of pre-training methods.

    Recipes name a subclass by its `name` in the key ``method``. State that lasts over steps (a queue, a teacher, prototypes) must
    be a parameter or a buffer, so that checkpoints contain it.

    Args:
        network: The part of the segmentation network that is trained.
        geometry: The stages that the method reads, and the patches.
        recipe: The values of `Config` and of all other keys.

    Attributes:
        name: Name of the method in recipes.
        Config: Recipe keys of the method.
        loss_labels: Label of each loss in log, curves and report, by the name of the loss: "L_g, image level".
        view_titles: Title of each view that is an image in ``views.png``, by the name of the view.
        reference_labels: Label of each value of `reference_lines` in the curves, by its key.
        referenced_losses: Names of the losses that the reference lines belong to.
        couples_samples: Whether the loss of a patch depends on the other patches. If False, parts of a batch need no gradient
            caching, and `losses` returns one value for each patch.
        compares_positions: Whether patches at nearby positions are positives, so that the plan needs a threshold.
        has_two_branches: Whether a second branch sees the patch at another size. The maps of both branches are compared on one
            grid, so the stages determine the scale in the plan.
        uses_neighbours: Whether the views also show a neighbour of each patch. See `Sampling.neighbours`.
        constant_rate_modules: Names of the modules whose learning rate stays constant after the warm-up.
        plan_keys: Keys of the MACL plan that only some methods use, this one among them.
        summary: Words for the model card, which completes "pre-trained ... on images without labels" with them.
        tag: Tag in the front matter of the model card.
        citations: References for the model card.
        views: Views of the method, which a subclass sets in `__init__`.
    """

    name: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]
    loss_labels: ClassVar[Mapping[str, str]]
    view_titles: ClassVar[Mapping[str, str]] = {}
    reference_labels: ClassVar[Mapping[str, str]] = {}
    referenced_losses: ClassVar[Sequence[str]] = ()
    couples_samples: ClassVar[bool] = True
    compares_positions: ClassVar[bool] = False
    has_two_branches: ClassVar[bool] = False
    uses_neighbours: ClassVar[bool] = False
    constant_rate_modules: ClassVar[Sequence[str]] = ()
    plan_keys: ClassVar[Sequence[str]] = ()
    summary: ClassVar[str]
    tag: ClassVar[str]
    citations: ClassVar[Sequence[str]] = ()

    views: Views

    def __init__(self, network: PretrainableNetwork, geometry: Geometry, recipe: Any) -> None:
        super().__init__()
        # The tuple keeps torch from registering the network in each method, because several methods may train one network.
        self._network = (network,)
        self.geometry, self.recipe = geometry, recipe

    @property
    def network(self) -> PretrainableNetwork:
        """Return the network that is trained."""
        return self._network[0]

    @classmethod
    @abstractmethod
    def plan_geometry(cls, patch_size: Sequence[int], strides: Sequence[Sequence[int]], recipe: Any) -> Geometry:
        """Return the stages of a network that the method reads, and the patch.

        Args:
            patch_size: Patch size of the nnU-Net plan, voxels per axis.
            strides: Strides of each encoder stage, per axis.
            recipe: The values of `Config` and of all other keys.

        Raises:
            UserError: The recipe does not fit this network.
        """

    @property
    def shown_sizes(self) -> list[Sequence[int]]:
        """Return the sizes of the images that the network sees, voxels per axis."""
        return [self.geometry.patch_size]

    @classmethod
    def weights(cls, recipe: Any) -> dict[str, float]:
        """Return the weight in the total of each loss that a recipe trains, by the name of the loss."""
        return dict.fromkeys(cls.loss_labels, 1.0)

    @classmethod
    def trains_in_stages(cls, recipe: Any) -> bool:
        """Return whether some weights get their first gradient later than others."""
        return False

    @abstractmethod
    def encode(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the network's features by name, each with one row per patch.

        The features of a patch must not depend on the other patches, because parts of a batch are encoded separately. The result
        must also contain the views that `losses` needs.
        """

    def project(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Apply the heads to the features of all patches of this process, and return the embeddings by name."""
        return features

    @abstractmethod
    def losses(self, embeddings: dict[str, Tensor], positions: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Return the losses by name, and ``total``, which is minimised.

        Args:
            embeddings: The results of `project` for the patches of all processes.
            positions: (N, 3), fraction of the volume.
            progress: The current step.

        Returns:
            Scalars. If `couples_samples` is False, each loss, ``total`` included, has one value for each patch. A method
            that trains in stages may leave out a loss in an epoch that does not train it.
        """

    def copy_network(self) -> None:
        """Copy the network's weights into the method's copies of the network, after weights were loaded from a file."""

    def withhold_gradients(self, progress: Progress) -> None:
        """Set the gradients of the parameters that must not change at this step to None."""

    def after_step(self, embeddings: dict[str, Tensor], progress: Progress) -> None:
        """Update averages, queues and the like after the weights changed. This is not called for a step that was skipped."""

    def measure(self, embeddings: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
        """Return one scalar tensor for each name in `statistics`, on the device of the embeddings."""
        return {}

    def representations(self, embeddings: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return the vectors of two views of each patch, (N, C) each, or None if the method has none.

        The detection of collapse and the probes use them.
        """
        return None

    @classmethod
    def statistics(cls, recipe: Any) -> list[str]:
        """Return the names of the values that `measure` returns with a recipe, and that the log keeps."""
        return []

    @classmethod
    def reference_lines(cls, recipe: Any, batch_size: int, means: Mapping[str, float]) -> dict[str, float]:
        """Return reference values for reading the loss curves, by the keys of `reference_labels`.

        Args:
            recipe: Recipe of the run.
            batch_size: N, number of patches of a step.
            means: Mean statistics of the epoch.
        """
        return {}

    @classmethod
    def collapse_reasons(
        cls, means: Mapping[str, float], before: Mapping[str, float], references: Mapping[str, float]
    ) -> list[str]:
        """Return the reasons why an epoch counts as collapsed according to its losses, or an empty list.

        Args:
            means: Mean losses and statistics of the epoch.
            before: Mean losses of the epoch before, NaN if it did not train a loss; empty in the first epoch.
            references: The result of `reference_lines` for the epoch.
        """
        return []

    @classmethod
    def collapse_advice(cls, recipe: Any) -> list[str]:
        """Return changes of the recipe that help against collapse, the most effective first."""
        return []
