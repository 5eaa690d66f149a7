"""Measure the quality of the features during pre-training, in seconds instead of hours of fine-tuning.

Labels are used only for measuring. Sources: linear probe, Alain and Bengio, https://arxiv.org/abs/1610.01644; alignment and
uniformity, Wang and Isola, ICML 2020, https://arxiv.org/abs/2005.10242; effective rank, Roy and Vetterli, EUSIPCO 2007.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from nnunetv2_macl.data import Case, PretrainingBatches
from nnunetv2_macl.networks.base import PretrainableNetwork
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.planning.plan import volume_patch
from nnunetv2_macl.training.step import TrainingStep

# prefix of the names of measured values
PROBE = "probe/"
LINEAR_DICE, ALIGNMENT, UNIFORMITY = f"{PROBE}linear_dice", f"{PROBE}alignment", f"{PROBE}uniformity"
EFFECTIVE_RANK = f"{PROBE}effective_rank"
_MOST_CASES = 20
# number of patches per case, in 2D and in 3D
_PATCHES = {2: 12, 3: 4}
# largest number of locations to fit the linear probe, and to estimate the rank of a stage
_MOST_LOCATIONS = 20_000
_MOST_BATCHES = 4


def probe_keys(stages: int) -> list[str]:
    """Return the names of the values of `Probe.measure`, for a network with this number of encoder stages."""
    return [LINEAR_DICE, ALIGNMENT, UNIFORMITY, *(f"{EFFECTIVE_RANK}_{stage}" for stage in range(1, stages + 1))]


class Probe:
    """Measures a network. The patches are drawn once, so that epochs can be compared.

    Args:
        configuration: Configuration of the labelled cases.
        cases: Preprocessed labelled cases, in the order of their names. The probe is fitted to the first half and evaluated on
            the second half, so that images of one patient stay together.
        batches: Whole training batches. The first ones are used to measure the embeddings.
        patch_size: Patch size in voxels, one value per axis.
        seed: Seed of the patches.
    """

    def __init__(
        self,
        configuration: DatasetConfiguration,
        cases: Sequence[Case],
        batches: PretrainingBatches,
        patch_size: Sequence[int],
        seed: int,
    ) -> None:
        manager = configuration.plans_manager.get_label_manager(configuration.dataset_json)
        # single labels, also for overlapping regions, because regions are made of labels
        self.classes = [label for label in manager.all_labels if label != 0]
        self.ignored = [manager.ignore_label] if manager.has_ignore_label else []
        count = min(_MOST_BATCHES, len(batches))
        self.images = [torch.as_tensor(batches[step]["data"]) for step in range(count)]
        # sample cases evenly over the data set, and keep neighbouring cases in the same half
        half, every = -(-len(cases) // 2), max(1, -(-len(cases) // _MOST_CASES))
        chosen = [*cases[:half:every], *cases[half::every]]
        fitted = len(cases[:half:every])
        drawn = [
            _labelled_patches(configuration, case.name, self.classes, patch_size, (seed, number))
            for number, case in enumerate(chosen)
        ]
        self.fitted, self.measured = drawn[:fitted], drawn[fitted:]

    @torch.no_grad()
    def measure(self, step: TrainingStep) -> dict[str, float]:
        """Return the values by `probe_keys`, NaN if a value cannot be measured. The network does not change."""
        model = step.model
        was_training = model.training
        model.eval()
        try:
            at_once = step.plan.patches_at_once
            return {LINEAR_DICE: self._linear_dice(model.network, step.device, at_once)} | self._of_embeddings(step)
        finally:
            model.train(was_training)

    def _linear_dice(self, network: PretrainableNetwork, device: torch.device, at_once: int) -> float:
        """Return the mean Dice of the classes on the second half of the cases, on the grid of the dense features."""
        if not self.measured:
            return float("nan")
        # A part of the locations of each case, because those of a 3D data set need many GB.
        most = max(1, _MOST_LOCATIONS // len(self.fitted))
        parts = [self._locations(network, device, at_once, case, most) for case in self.fitted]
        x, y = (np.concatenate(values) for values in zip(*parts, strict=True))
        if len(np.unique(y)) < 2 or not np.isfinite(x).all():
            return float("nan")
        mean, deviation = x.mean(0), x.std(0) + 1e-6
        with warnings.catch_warnings():
            # epochs can be compared without full convergence
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(C=0.1, max_iter=200).fit((x - mean) / deviation, y)
        found, there, both = (np.zeros(len(self.classes)) for _ in range(3))
        for case in self.measured:
            x, y = self._locations(network, device, at_once, case)
            if not len(y):
                continue
            predicted = model.predict((x - mean) / deviation)
            for number, c in enumerate(self.classes):
                found[number] += (predicted == c).sum()
                there[number] += (y == c).sum()
                both[number] += ((predicted == c) & (y == c)).sum()
        scores = (2 * both / np.maximum(found + there, 1))[there > 0]
        return float(scores.mean()) if len(scores) else float("nan")

    def _locations(
        self,
        network: PretrainableNetwork,
        device: torch.device,
        at_once: int,
        case: tuple[Tensor, Tensor],
        most: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return features (L, C) and labels (L,) at the grid locations of a case's patches, without ignored locations.

        At most ``most`` locations are returned, evenly spread; None returns all.
        """
        values = torch.tensor([0, *self.classes, *self.ignored])
        images, segmentations = case
        parts = images.split(at_once)
        dense = torch.cat([network.decode(network.encode(part.to(device)))[-1].float().cpu() for part in parts])
        # the most frequent class of a location's voxels
        shares = torch.stack([(segmentations == value).float() for value in values], 1)
        shares = F.interpolate(shares, size=dense.shape[2:], mode="area")
        labels = values[shares.argmax(1)].flatten()
        used = torch.nonzero(~torch.isin(labels, torch.tensor(self.ignored, dtype=labels.dtype)))[:, 0]
        if most is not None:
            used = used[:: max(1, -(-len(used) // most))]
        return dense.movedim(1, -1).flatten(0, -2)[used].numpy(), labels[used].numpy()

    def _of_embeddings(self, step: TrainingStep) -> dict[str, float]:
        network = step.model.network
        one: list[Tensor] = []
        other: list[Tensor] = []
        stages: list[list[Tensor]] = []
        patches = sum(len(images) for images in self.images)
        for number, images in enumerate(self.images):
            for part in images.split(step.plan.patches_at_once):
                stages.append([_some_locations(maps, patches) for maps in network.encode(part.to(step.device))])
            if (two := step.representations(images, number)) is not None:
                one.append(two[0].float().cpu())
                other.append(two[1].float().cpu())
        ranks = [effective_rank(torch.cat(locations)) for locations in zip(*stages, strict=True)]
        values = {ALIGNMENT: float("nan"), UNIFORMITY: float("nan")}
        if one:
            first, second = torch.cat(one), torch.cat(other)
            values = {ALIGNMENT: alignment(first, second), UNIFORMITY: uniformity(torch.cat((first, second)))}
        return values | {f"{EFFECTIVE_RANK}_{stage}": rank for stage, rank in enumerate(ranks, 1)}


def _some_locations(maps: Tensor, patches: int) -> Tensor:
    """Return evenly spaced locations of feature maps, (n, C, *spatial) -> (L, C), few enough for this number of patches."""
    every = max(1, patches * maps[0, 0].numel() // _MOST_LOCATIONS)
    # an odd step, because an even one could take the same columns in each row
    return maps.float().movedim(1, -1).flatten(0, -2)[:: every | 1].cpu()


def alignment(one: Tensor, two: Tensor) -> float:
    """Return the mean squared distance of the unit vectors of two views, (N, C) each: 0 for equal, 2 for unrelated views."""
    return (F.normalize(one, dim=1) - F.normalize(two, dim=1)).square().sum(1).mean().item()


def uniformity(embeddings: Tensor) -> float:
    """Return the log of the mean Gaussian kernel of all pairs of unit vectors, (N, C): 0 if all are equal, -4 at best."""
    distances = torch.pdist(F.normalize(embeddings, dim=1)).square()
    return distances.mul(-2).exp().mean().log().item()


def effective_rank(features: Tensor) -> float:
    """Return the exponential of the entropy of the normalised spectrum of (L, C) features: 1 (one direction) to C (uniform)."""
    centred = (features - features.mean(0)).double()
    spectrum = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0).sqrt()
    if not (total := spectrum.sum()) > 0:
        return 1.0
    shares = spectrum / total
    return torch.special.entr(shares).sum().exp().item()


def _labelled_patches(
    configuration: DatasetConfiguration,
    case: str,
    classes: Sequence[int],
    patch_size: Sequence[int],
    seed: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Return (P, C, *patch) images and (P, *patch) labels of a case. Each patch is centred on a voxel of a random class."""
    generator = np.random.default_rng(seed)
    data, segmentation, _, _ = nnUNetDatasetBlosc2(str(configuration.cases_folder), [case]).load_case(case)
    # nnU-Net labels background outside of its mask with -1
    image, labels = np.asarray(data[:]), np.asarray(segmentation[:])[0].clip(min=0)
    size = np.asarray(volume_patch(tuple(patch_size)))
    present = [label for label in classes if (labels == label).any()]
    patches, targets = [], []
    for _ in range(_PATCHES[len(patch_size)]):
        if present:
            places = np.flatnonzero(labels == generator.choice(present))
            middle = np.unravel_index(places[generator.integers(len(places))], labels.shape)
        else:
            middle = generator.integers(labels.shape)
        corner = np.asarray(middle) - size // 2
        box = np.stack((corner, corner + size), 1).tolist()
        patches.append(crop_and_pad_nd(image, box))
        targets.append(crop_and_pad_nd(labels, box))
    images, segmentations = torch.from_numpy(np.stack(patches)), torch.from_numpy(np.stack(targets).astype(np.int64))
    return (images[:, :, 0], segmentations[:, 0]) if len(patch_size) == 2 else (images, segmentations)


def as_words(values: dict[str, Any]) -> str:
    """Return the values as one line for the log."""
    ranks = ", ".join(f"{value:.1f}" for key, value in values.items() if key.startswith(EFFECTIVE_RANK))
    return (
        f"Probe: linear Dice {values[LINEAR_DICE]:.4f}  alignment {values[ALIGNMENT]:.3f}  uniformity "
        f"{values[UNIFORMITY]:.3f}  effective rank by stage {ranks}"
    )
