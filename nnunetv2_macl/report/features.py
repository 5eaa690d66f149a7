"""Visualise features before and after pre-training, as colours and by the nearest neighbours of patches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from nnunetv2_macl.data import Case, PretrainingBatches
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.factory import build_model
from nnunetv2_macl.networks.base import PretrainableNetwork
from nnunetv2_macl.preprocessing.sources import training_cases
from nnunetv2_macl.report.run import Run, has_seen, unlabelled_records

# number of voxels of all patches, which take at most minutes on a CPU
_VOXELS = 2**24
_PATCHES = (24, 128)
_BATCH_VOXELS = 2**21
COLOURED, QUERIES, NEIGHBOURS = 4, 6, 3
# smallest standard deviation between patches; smaller ones are rounding errors
_SMALLEST_DEVIATION = 1e-6


@dataclass(frozen=True)
class Features:
    """Features of some patches. The keys ``before`` and ``after`` name the fresh and the pre-trained network."""

    slices: np.ndarray  # (N, H, W), the middle slice of each patch
    # (COLOURED, h, w, 3), 0 to 1: three principal components of the dense features of the first patches
    colours: dict[str, np.ndarray]
    # (QUERIES, NEIGHBOURS): the nearest patches of other cases, for the first patches
    neighbours: dict[str, np.ndarray]
    # mean distance of the positions of the first patches to those of their neighbours, fraction of the volume
    distances: dict[str, float]
    chance: float  # mean distance to all patches of other cases


def compute_feature_figures(run: Run, device: str = "cpu") -> Features:
    """Compute the features of patches of the run's images, with a fresh network and with the run's network.

    Raises:
        UserError: There is no checkpoint, or there are no preprocessed images.
    """
    if run.weights is None:
        raise UserError("There is no checkpoint of this version yet. The first one is written after the first epoch.")
    cases = _cases(run)
    patch = run.plan.sampling.patch_size
    number = int(np.clip(_VOXELS // np.prod(patch), *_PATCHES))
    seed = run.plan.get_recipe().seed + 1
    sampling = replace(run.plan.sampling, batch_size=number, position_group_size=1, seed=seed, neighbours=False)
    try:
        batch = PretrainingBatches(cases, sampling, (0, number), 1)[0]
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(f"The preprocessed images cannot be read: {error}") from None
    patches, positions, names = (
        torch.as_tensor(batch["data"]),
        np.asarray(batch["positions"]),
        np.asarray(batch["cases"]),
    )
    # the first patches are of different cases, and not at the border of the volume
    order = _diverse_order(positions, names)
    patches, positions, names = patches[order], positions[order], names[order]

    distances = np.abs(positions[:, None] - positions[None]).max(-1)
    others = names[:, None] != names[None]
    if not others.any(1).all():
        raise UserError("There is only one image, so its patches have no neighbours in other images.")
    colours, neighbours, near = {}, {}, {}
    for when, network in _networks(run).items():
        try:
            dense, pooled = _features(network.to(device).eval(), patches, device)
        except torch.OutOfMemoryError:
            raise UserError(f"Memory ran out on {device}. Type: nnUNetv2_macl_report ... -device cpu") from None
        network.cpu()
        colours[when] = pca_colours(dense)
        neighbours[when] = nearest(pooled, others)
        near[when] = float(np.mean([distances[i, row].mean() for i, row in enumerate(neighbours[when])]))
    middle = patches[:, 0].numpy()
    if middle.ndim == 4:
        middle = middle[:, middle.shape[1] // 2]
    chance = float(distances[:QUERIES][others[:QUERIES]].mean())
    return Features(middle, colours, neighbours, near, chance)


def _cases(run: Run) -> list[Case]:
    try:
        cases = training_cases(run.configuration)
    except KeyError:
        raise UserError("nnUNet_preprocessed is not set, so there are no images to show.") from None
    own = run.plan.dataset_name
    cases = [case for case in cases if has_seen(run, own, case.name)]
    return cases + [Case(record.stem, str(record.with_suffix(".b2nd"))) for record in unlabelled_records(run)]


def _diverse_order(positions: np.ndarray, names: np.ndarray) -> list[int]:
    """Return the indices of all patches, beginning with patches of different cases at different central positions."""
    central = [int(i) for i in np.argsort(np.abs(positions - 0.5).max(1)) if np.abs(positions[i] - 0.5).max() < 0.4]
    first: list[int] = []
    seen: set[str] = set()
    # evenly along the first axis
    for i in sorted(central, key=lambda i: positions[i, 0])[:: max(1, len(central) // (2 * QUERIES))]:
        if names[i] not in seen and len(first) < QUERIES:
            first.append(i)
            seen.add(names[i])
    return first + [i for i in range(len(positions)) if i not in first]


def _networks(run: Run) -> dict[str, PretrainableNetwork]:
    """Return a fresh network that nnU-Net initialises with the run's seed, and the network of the run."""
    recipe, networks = run.plan.get_recipe(), {}
    for when in ("before", "after"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            unet = nnUNetTrainer.build_network_architecture(
                run.configuration.plans_manager,
                run.configuration.manager,
                len(run.configuration.channel_names),
                2,
                True,
            )
            model = build_model(run.configuration, run.plan.geometry, recipe, unet)
        if when == "after":
            model.load_state_dict(run.weights or {})
        networks[when] = model.network
    return networks


@torch.no_grad()
def _features(network: PretrainableNetwork, patches: Tensor, device: str) -> tuple[Tensor, np.ndarray]:
    """Return the dense features of the first patches' middle slices, (COLOURED, C, h, w), and pooled features of all, (N, C)."""
    size = max(1, _BATCH_VOXELS // int(np.prod(patches.shape[2:])))
    dense: list[Tensor] = []
    pooled: list[Tensor] = []
    for batch in patches.split(size):
        features = network.decode(network.encode(batch.to(device)))[-1].float().cpu()
        pooled.append(features.flatten(2).mean(-1))
        if sum(len(part) for part in dense) < COLOURED:
            dense.append(features[:, :, features.shape[2] // 2] if features.ndim == 5 else features)
    return torch.cat(dense)[:COLOURED], torch.cat(pooled).numpy()


def pca_colours(dense: Tensor) -> np.ndarray:
    """Return the colours of features, (N, C, h, w) -> (N, h, w, 3), 0 to 1. Equal features have equal colours in all images."""
    vectors = dense.permute(0, 2, 3, 1).reshape(-1, dense.shape[1]).double().numpy()
    vectors = vectors - vectors.mean(0)
    _, _, axes = np.linalg.svd(vectors, full_matrices=False)
    components = np.zeros((len(vectors), 3))
    components[:, : len(axes[:3])] = vectors @ axes[:3].T
    low, high = np.percentile(components, (2, 98), axis=0)
    colours = np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1)
    return colours.reshape(len(dense), *dense.shape[2:], 3)


def nearest(pooled: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the (QUERIES, NEIGHBOURS) nearest patches by cosine similarity of standardised features (N, C), nearest first.

    Only patches of different cases are compared, for which ``others``, (N, N) bool, is True.
    """
    deviation = pooled.std(0)
    vectors = (pooled - pooled.mean(0)) / np.maximum(deviation, _SMALLEST_DEVIATION)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    similarities = np.where(others, vectors @ vectors.T, -np.inf)
    number = min(NEIGHBOURS, int(others[:QUERIES].sum(1).min()))
    return np.argsort(-similarities[:QUERIES], axis=1, kind="stable")[:, :number]
