"""What a pre-training method is: the views it shows, the modules it adds, the losses it minimises.

A method is one file in this folder. It knows torch only: no folders, no plans, no processes. The training step, gradients in
parts of a batch, several GPUs, the memory plan, the log, the curves, the report, the model card and the watch for collapse all
work from what a method declares here.
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


@dataclass(frozen=True)
class Geometry:
    """What a method reads of the network, and the patches it sees.

    Sizes are in voxels, one value per axis, in the order of the nnU-Net plan.

    Attributes:
        decoder_stages: K, the number of decoder stages that are trained, counted from the bottleneck.
        auxiliary_stage: e, the encoder stage (1 is the first) at which a second, dense map is read.
        scale: s, how much smaller the first branch sees the patch.
        patch_size: Size of a patch.
        reason: Why it is so, for the plan.
        threshold: t, the fraction of the volume within which two patches are positives of each other.
        out_of_plane_rotation: Largest angle about the in-plane axes, degrees.
        channels_without_zscore: Numbers of the image channels that nnU-Net does not normalise to zero mean.
        batch_size: N, patches of a step. While the plan is made, N is not known, and this is
            the largest batch that the planner chooses by itself.
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
        """Return the size at which the first branch sees a patch."""
        return [n // s for n, s in zip(self.patch_size, self.scale, strict=True)]


class Progress(NamedTuple):
    """How far a run is."""

    step: int
    num_epochs: int
    num_iterations_per_epoch: int

    @property
    def steps(self) -> int:
        """Return the number of steps of the whole run."""
        return self.num_epochs * self.num_iterations_per_epoch

    @property
    def is_second_half(self) -> bool:
        """Return whether half of the epochs, rounded down, are done. A run of one epoch has no second half."""
        return self.step >= max(1, self.num_epochs // 2) * self.num_iterations_per_epoch


def derive_seed(*numbers: int) -> int:
    """Return one seed for torch from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


class StepRandom(NamedTuple):
    """The source of the random numbers of one step. They are functions of (seed, step) and depend on no image.

    Attributes:
        seed: Of the run.
        step: Number of the step.
        batch_size: N, patches of the whole batch. Numbers are drawn for all of them, so that each process shows its part of
            what one process would show.
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
        """Return a generator on the CPU. Each view of a method takes a stream of its own.

        A stream and the same stream followed by zeros are equal, so two streams must not differ in that alone.
        """
        return torch.Generator().manual_seed(derive_seed(self.seed, self.step, *stream))


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
    """What a method shows the network of a batch.

    It holds settings and no network, because the processes that read the batches draw its random numbers. Random numbers are
    tensors, lists, tuples or dictionaries of them, and None.
    """

    @abstractmethod
    def draw(self, random: StepRandom) -> Any:
        """Return the random numbers of a step, for the n patches of this process, on the CPU."""

    @abstractmethod
    def make(self, patches: Tensor, numbers: Any, progress: Progress) -> dict[str, Tensor]:
        """Return the views by name, each with n rows.

        Args:
            patches: (n, C, *patch); for a method that `uses_neighbours` (2n, C, *patch), the neighbours after the patches.
            numbers: What `draw` returned, its tensors on the device of the patches.
            progress: How far the run is.
        """


class Method(nn.Module, ABC):
    """One way to pre-train.

    A subclass is found by its `name`, which recipes hold as ``method``. What it remembers from step to step (a queue, a teacher,
    prototypes) lies in its parameters and buffers, so that checkpoints have it.

    Args:
        network: The part of the segmentation network that is trained.
        geometry: What is read of it, and the patches.
        recipe: The values of `Config` and of all other keys.

    Attributes:
        name: What recipes call it.
        Config: Its recipe keys.
        loss_labels: Each loss by name, with the label that log, curves and report show: "L_g, image level".
        view_titles: Each view that is an image, with its title in ``views.png``.
        reference_labels: Each value of `reference_lines`, with its label in a curve.
        referenced_losses: The losses that these lines belong to.
        couples_samples: Whether the loss of a patch depends on the other patches. Where it does not, parts of a batch need no
            gradient caching, and `losses` returns one value for each patch.
        compares_positions: Whether patches of near positions are positives, so that the plan needs a threshold.
        has_two_branches: Whether a second branch sees the patch at another size and both meet on one grid, so that the scale in
            the plan follows from the stages.
        uses_neighbours: Whether its views show a neighbour of each patch, too. See `Sampling.neighbours`.
        constant_rate_modules: Names of its modules whose learning rate does not follow the schedule, but stays as it is after
            the warm-up.
        plan_keys: The keys of the MACL plan that only such a method uses.
        summary: How it trains, for the model card: "by MACL, multi-level contrastive learning,".
        tag: Its tag in the model card.
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

    views: Views

    def __init__(self, network: PretrainableNetwork, geometry: Geometry, recipe: Any) -> None:
        super().__init__()
        # A tuple, so that the network is not registered here too: several methods may train one network.
        self._network = (network,)
        self.geometry, self.recipe = geometry, recipe

    @property
    def network(self) -> PretrainableNetwork:
        """Return the network that is trained, with all its methods."""
        return self._network[0]

    @classmethod
    @abstractmethod
    def plan_geometry(cls, patch_size: Sequence[int], strides: Sequence[Sequence[int]], recipe: Any) -> Geometry:
        """Return what the method reads of a network, and the patch.

        Args:
            patch_size: Of the nnU-Net plan, voxels per axis.
            strides: Of each encoder stage, per axis.
            recipe: Holds the values of `Config`.

        Raises:
            UserError: The recipe asks for what this network cannot give.
        """

    @classmethod
    def weights(cls, recipe: Any) -> dict[str, float]:
        """Return the losses that a recipe trains, each with its weight in the total."""
        return dict.fromkeys(cls.loss_labels, 1.0)

    @classmethod
    def trains_in_stages(cls, recipe: Any) -> bool:
        """Return whether some weights get their first gradient later than others."""
        return False

    @abstractmethod
    def encode(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the network's features by name, each with a row per patch. No patch sees another here.

        Any part of a batch may pass alone. What `losses` needs of the views is handed on.
        """

    def project(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what the losses compare by name, from the features of all patches of this process. Heads are applied here."""
        return features

    @abstractmethod
    def losses(self, embeddings: dict[str, Tensor], positions: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Return the losses by name, and ``total``, whose gradient is followed.

        Args:
            embeddings: What `project` returned, of the patches of all processes.
            positions: (N, 3), fraction of the volume.
            progress: How far the run is.

        Returns:
            Scalars; without `couples_samples` one value for each patch. A method that trains in stages may leave out a loss in an
            epoch that does not train it.
        """

    def copy_network(self) -> None:
        """Set the method's own copies of the network to its weights, which were loaded from a file."""

    def withhold_gradients(self, progress: Progress) -> None:
        """Set the gradient of what is not to be moved at this step to None."""

    def after_step(self, embeddings: dict[str, Tensor], progress: Progress) -> None:
        """Update what follows the weights, such as an average or a queue. A step that was skipped does not come here."""

    def measure(self, embeddings: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
        """Return one tensor for each name in `statistics`, on the device; an empty dictionary without embeddings."""
        return {}

    def representations(self, embeddings: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return the vectors of two views of each patch, (N, C) each; None where the method has none.

        The watch for collapse and the probes look at them.
        """
        return None

    @classmethod
    def statistics(cls, recipe: Any) -> list[str]:
        """Return the names of the values of `measure` with a recipe, which the log keeps."""
        return []

    @classmethod
    def reference_lines(cls, recipe: Any, batch_size: int, means: Mapping[str, float]) -> dict[str, float]:
        """Return the values to read the curves against, by the keys of `reference_labels`.

        Args:
            recipe: Of the run.
            batch_size: N, patches of a step.
            means: Mean statistics of the epoch.
        """
        return {}

    @classmethod
    def collapse_reasons(
        cls, means: Mapping[str, float], before: Mapping[str, float], references: Mapping[str, float]
    ) -> list[str]:
        """Return why an epoch counts as collapsed by its losses.

        Args:
            means: Of the epoch.
            before: Losses of the epoch before; empty in the first.
            references: What `reference_lines` returned for the epoch.
        """
        return []

    @classmethod
    def collapse_advice(cls, recipe: Any) -> list[str]:
        """Return recipe keys that help against collapse, what helped most first."""
        return []
