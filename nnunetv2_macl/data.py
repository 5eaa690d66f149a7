"""Draw batches of patches with their positions from preprocessed cases.

A batch depends only on the seed and the step. It does not depend on the number of workers, on earlier batches, or on whether
a run was stopped and resumed. The ranks of a distributed run share the batch that one process would draw.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import blosc2
import numpy as np
import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch.utils.data import DataLoader, Dataset, get_worker_info

from nnunetv2_macl.errors import UserError

# Draws of a patch before giving up on finding one that is not constant.
_MAX_DRAWS = 1000
# Beginning of torch's message about a killed worker.
_WORKER_KILLED = "DataLoader worker"
# Batches that are read ahead may take this much shared memory, and as much page-locked memory for a GPU.
_READ_AHEAD_BYTES = 2 * 2**30
# Fraction of the free shared memory that batches may take.
_SHARED_PART = 0.8
_SHARED_MEMORY = Path("/dev/shm")
# A batch beyond this size takes so long to read that each worker needs only one in hand.
_LARGE_BATCH = 100 * 2**20
# ending of the file with the mask of a preprocessed unlabelled case
MASK_ENDING = ".mask"
_MMAP = {} if os.name == "nt" else {"mmap_mode": "r"}


class Case(NamedTuple):
    """A preprocessed case: its name for messages, and its ``.b2nd`` file, (C, *volume) float32."""

    name: str
    file: str


@dataclass(frozen=True)
class Sampling:
    """How a batch is drawn."""

    patch_size: tuple[int, ...]  # Voxels on the three axes of the volume; 1 on the first axis for 2D patches
    batch_size: int  # Number of patches per step, N, over all ranks
    # Number of patches per group. The patches of a group come from different cases and from the same relative position, so
    # that more patches are positives of each other. With fewer cases than this, there are no groups.
    position_group_size: int
    seed: int  # Seed of all draws
    # Whether a neighbour of each patch is read, too. It is shifted along one axis, by a slice for 2D patches and by half of the
    # patch for 3D patches, or as far as the volume allows.
    neighbours: bool = False

    def draws(self, step: int, cases: int) -> Iterator[tuple[np.random.Generator, int, np.ndarray | None]]:
        """Yield for each patch its generator, the number of its case, and the relative place (3,) of its group or None."""
        for patch in range(self.batch_size):
            generator = np.random.default_rng((self.seed, step, patch))
            if self.position_group_size == 1 or self.position_group_size > cases:
                yield generator, int(generator.integers(cases)), None
                continue
            group, member = divmod(patch, self.position_group_size)
            of_group = np.random.default_rng((self.seed, step, self.batch_size + group))
            place = of_group.random(3)
            chosen = of_group.choice(cases, self.position_group_size, replace=False)
            yield generator, int(chosen[member]), place


def draw_corner(
    shape: Sequence[int], patch_size: Sequence[int], generator: np.random.Generator, place: np.ndarray | None = None
) -> np.ndarray:
    """Return the lowest corner of a patch in voxels, (3,), uniform over the places that nnU-Net draws
    where it does not oversample foreground.

    Args:
        shape: Voxels of the volume, (3,).
        patch_size: Voxels of the patch, (3,). If the patch is larger than the volume, the corner is negative, because nnU-Net
            pads both sides.
        generator: Generator that draws the place.
        place: Relative place (3,), from 0 for the first possible corner to 1 for the last one; None draws the place.
    """
    size, patch = np.asarray(shape), np.asarray(patch_size)
    lowest, highest = _corner_range(size, patch)
    if place is None:
        return generator.integers(lowest, highest + 1)
    return np.minimum(np.floor(lowest + place * (highest + 1 - lowest)).astype(int), highest)


def _corner_range(size: np.ndarray, patch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and the highest corner of a patch in a volume, both in voxels."""
    padding = np.maximum(patch - size, 0)
    return -padding // 2, size + padding // 2 + padding % 2 - patch


def neighbour_corners(
    corner: np.ndarray, shape: Sequence[int], patch_size: Sequence[int], generator: np.random.Generator
) -> list[np.ndarray]:
    """Return the corners of the neighbours of a patch, each shifted along one axis.

    Neighbours that the border of the volume does not move closer come first. Otherwise their order is random.

    Args:
        corner: Lowest corner of the patch in voxels, (3,).
        shape: Voxels of the volume, (3,).
        patch_size: Voxels of the patch, (3,). A 2D patch has neighbours in the next slices, a 3D patch half a patch away, or as
            far away as the volume allows.
        generator: Generator that draws the order.
    """
    patch = np.asarray(patch_size)
    axes = [0] if patch[0] == 1 else range(len(patch))
    shifts = np.array(
        [np.eye(len(patch), dtype=int)[a] * sign * max(1, patch[a] // 2) for a in axes for sign in (1, -1)]
    )
    shifts = generator.permutation(shifts)
    moved = np.clip(corner + shifts, *_corner_range(np.asarray(shape), patch)) - corner
    distances = np.abs(moved).sum(1) / np.abs(shifts).sum(1)
    return [corner + moved[n] for n in np.argsort(-distances, kind="stable") if distances[n]]


def position(corner: np.ndarray, patch_size: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """Return the centre of a patch as a fraction of the volume, (3,)."""
    return (corner + np.asarray(patch_size) / 2) / np.asarray(shape)


class PretrainingBatches(Dataset):
    """The batches of a run. Item ``step`` is the batch of this step, or the share of it that this rank reads.

    Args:
        cases: Cases to draw from, with the same probability.
        sampling: How to draw a batch.
        share: First patch of the batch that this rank reads, and the patch after its last one.
        steps: Number of batches.
        draws: Function of the step that draws the other random numbers of a step. The batch holds them as ``numbers``.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        sampling: Sampling,
        share: tuple[int, int],
        steps: int,
        draws: Callable[[int], Any] | None = None,
    ) -> None:
        if not cases:
            raise ValueError("cases must not be empty")
        self.cases = cases
        self.sampling = sampling
        self.share = share
        self.steps = steps
        self.draws = draws

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Return ``data`` (n, C, *patch) float32, ``positions`` (n, 3) float32 as fractions of the volume, and names ``cases``.

        With neighbours, ``data`` is (2n, C, *patch): first the patches, then their neighbours in the same order. With
        ``draws``, the batch also has ``numbers``.
        """
        # Use one thread, because the workers share the cores with the training.
        blosc2.set_nthreads(1)
        draws = list(self.sampling.draws(step, len(self.cases)))[slice(*self.share)]
        size = self.sampling.patch_size
        positions, names = np.empty((len(draws), 3), np.float32), []
        data = torch.empty(0)
        for number, draw in enumerate(draws):
            patches, positions[number], name = self._read_patch(*draw)
            if not number:
                data = _zeros((len(draws) * len(patches), len(patches[0].values), *size))
            for patch, row in zip(patches, range(number, len(data), len(draws)), strict=True):
                first, second, third = patch.place
                # Written where it will stay, because copies of whole batches cost as much as reading them.
                data.numpy()[row, :, first, second, third] = patch.values
            names.append(name)
        batch = {
            "data": data[:, :, 0] if size[0] == 1 else data,
            "positions": torch.from_numpy(positions),
            "cases": names,
        }
        return batch if self.draws is None else batch | {"numbers": self.draws(step)}

    def _read_patch(
        self, generator: np.random.Generator, number: int, place: np.ndarray | None
    ) -> tuple[list[_Patch], np.ndarray, str]:
        """Return a patch with its neighbour if asked for, the position of the patch, and the name of its case."""
        size = self.sampling.patch_size
        for _ in range(_MAX_DRAWS):
            case = self.cases[number]
            with _reading(case):
                volume = open_unchanged(case.file)
                shape = volume.shape[1:]
                corner = draw_corner(shape, size, generator, place)
                patch = _cut(volume, corner, size, case)
            if not patch.is_constant:
                break
            # The patch is empty, so draw another case and another place.
            number, place = int(generator.integers(len(self.cases))), None
        else:
            raise UserError(
                f"{_MAX_DRAWS} patches in a row were constant, the last one from {case.file}. Most likely images are empty: "
                "remove them and start again."
            )
        patches = [patch]
        if self.sampling.neighbours:
            with _reading(case):
                others = (
                    _cut(volume, other, size, case) for other in neighbour_corners(corner, shape, size, generator)
                )
                # A patch without a neighbour, such as that of a single slice, is its own.
                patches.append(next((other for other in others if not other.is_constant), patch))
        return patches, position(corner, size, shape), case.name


class _Patch(NamedTuple):
    """The part of a patch that is inside the volume, (C, *size), and its place in the patch."""

    values: np.ndarray
    place: tuple[slice, ...]

    @property
    def is_constant(self) -> bool:
        return not np.ptp(self.values.reshape(len(self.values), -1), axis=1).any()


def _cut(volume: blosc2.NDArray, corner: np.ndarray, size: Sequence[int], case: Case) -> _Patch:
    """Return the patch of a volume at its lowest corner.

    Raises:
        UserError: The patch holds NaN or infinite values.
    """
    inside = tuple(slice(max(c, 0), min(c + n, s)) for c, n, s in zip(corner, size, volume.shape[1:], strict=True))
    values = volume[(slice(None), *inside)]
    if not np.isfinite(values).all():
        raise UserError(
            f"{case.file} holds NaN or infinite values. They are in the image of case {case.name}, or come from nnU-Net's "
            "normalisation of it. Correct or remove this image, and preprocess again: nnUNetv2_plan_and_preprocess"
        )
    return _Patch(values, tuple(slice(n.start - c, n.stop - c) for n, c in zip(inside, corner, strict=True)))


@contextmanager
def _reading(case: Case) -> Iterator[None]:
    """Raise a UserError if the body fails to read the file of a case."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{case.file} cannot be read: {error}. It may be missing, changed or cut short. If the image is unlabelled, "
            "nnUNetv2_train_macl_pretrain with --c makes the file again. If it is labelled, type nnUNetv2_preprocess."
        ) from None


def _zeros(shape: Sequence[int]) -> torch.Tensor:
    """Return a float32 tensor of zeros. In a worker it is in shared memory, so that it is passed on without a copy.

    Raises:
        UserError: There is not enough shared memory.
    """
    if get_worker_info() is None:
        return torch.zeros(shape)
    try:
        storage = torch.UntypedStorage._new_shared(4 * math.prod(shape))
    except RuntimeError as error:
        raise UserError(f"{too_little_shared_memory(4 * math.prod(shape))} ({str(error).splitlines()[0]})") from error
    return torch.empty(0).set_(storage).view(tuple(shape))  # type: ignore[call-overload]


def too_little_shared_memory(batch_bytes: int) -> str:
    """Return the message for a user whose batches do not fit into shared memory."""
    free = f", of which {_mib(shutil.disk_usage(_SHARED_MEMORY).free)} are free," if _SHARED_MEMORY.is_dir() else ""
    return (
        f"Shared memory ({_SHARED_MEMORY}){free} is too small for the data workers, which pass batches of "
        f"{_mib(batch_bytes)} through it. Enlarge it (Docker: --shm-size=8g; Kubernetes: an emptyDir of medium Memory on "
        f"{_SHARED_MEMORY}), or load data without workers. Type: export nnUNet_n_proc_DA=0"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.3g} MiB"


class Reading(NamedTuple):
    """How batches are read ahead."""

    workers: int  # Number of processes; 0 reads in the training process
    prefetch: int  # Batches that each worker reads ahead
    needed: int  # Bytes of shared memory for all batches that are read ahead


def plan_reading(batch_bytes: int, allowed: int, free: int | None = None) -> Reading:
    """Return how many workers read how far ahead, so that their batches take a bounded part of the memory.

    Args:
        batch_bytes: Size of this rank's share of a batch.
        allowed: Workers that nnU-Net would use, as ``nnUNet_n_proc_DA`` has it.
        free: Bytes of shared memory that may be used. None where the system does not limit it.
    """
    if not allowed:
        return Reading(0, 0, 0)
    room = _READ_AHEAD_BYTES if free is None else min(_READ_AHEAD_BYTES, int(_SHARED_PART * free))
    # Two more batches need room: the current batch, and the next one while a worker reads it.
    batches = room // batch_bytes - 2
    prefetch = 2 if batch_bytes <= _LARGE_BATCH and batches >= 2 else 1
    workers = min(allowed, max(1, batches // prefetch))
    return Reading(workers, prefetch, (workers * prefetch + 2) * batch_bytes)


@lru_cache(maxsize=64)
def _open(file: str, device: int, inode: int) -> tuple[blosc2.NDArray, int]:
    """Open a file. Its device and inode tell it from a file of the same name that replaces it later."""
    return blosc2.open(urlpath=file, mode="r", dparams={"nthreads": 1}, **_MMAP), os.stat(file).st_size


def open_unchanged(file: str) -> blosc2.NDArray:
    """Open a preprocessed case, (C, *volume). Raises OSError if the file has been cut short or extended since it was opened."""
    now = os.stat(file)
    volume, size = _open(file, now.st_dev, now.st_ino)
    # Reading beyond the end of a memory-mapped file kills the process.
    if now.st_size != size:
        raise OSError(f"it had {size:,} bytes and now has {now.st_size:,}")
    return volume


def read_outside(file: str) -> np.ndarray:
    """Return where a preprocessed case is outside of the mask of the normalisation, (1, *volume) int8: -1 there, 0 elsewhere.

    nnU-Net marks these voxels in the segmentation of a labelled case. Its labels are not returned.
    """
    stem = file.removesuffix(".b2nd")
    ours = f"{stem}{MASK_ENDING}"
    return -(open_unchanged(ours if os.path.exists(ours) else f"{stem}_seg.b2nd")[:] == -1).astype(np.int8)


def plan_reading_here(batch_bytes: int, processes: int = 1) -> Reading:
    """Return `plan_reading` for nnU-Net's workers and the shared memory that is free, divided among training processes."""
    free = shutil.disk_usage(_SHARED_MEMORY).free // processes if _SHARED_MEMORY.is_dir() else None
    return plan_reading(batch_bytes, get_allowed_n_proc_DA(), free)


def load_batches(
    batches: PretrainingBatches,
    first: int,
    *,
    workers: int,
    prefetch: int = 2,
    pin_memory: bool = False,
    prepare_worker: Callable[[int], None] | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Yield the batches from step ``first`` on, read ahead by worker processes.

    Args:
        batches: What to load.
        first: First step.
        workers: Number of processes; 0 reads in this one.
        prefetch: Batches that each worker reads ahead.
        pin_memory: Whether the batches go to a GPU.
        prepare_worker: Called in each worker with its number.

    Raises:
        UserError: A case cannot be read. Errors are raised in the order of steps.
    """
    loader = DataLoader(
        _PassUserErrors(batches),
        batch_size=None,
        sampler=range(first, len(batches)),
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=prepare_worker,
    )
    try:
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch
    except (EOFError, OSError, RuntimeError) as error:
        handing_over = not isinstance(error, RuntimeError)  # the worker was killed while it passed on a batch
        if handing_over or worker_was_killed(error):
            reset_sigchld_handler()
        if handing_over:
            raise RuntimeError(f"{_WORKER_KILLED} is gone ({type(error).__name__})") from error
        raise


def reset_sigchld_handler() -> None:
    """Restore the default SIGCHLD handler, because torch would raise the error again while it is handled."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


class _PassUserErrors(Dataset):
    """Batches that return the message of a user error, because torch would wrap the error into the worker's traceback."""

    def __init__(self, batches: PretrainingBatches) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> dict[str, Any] | str:
        try:
            return self.batches[step]
        except UserError as error:
            return str(error)


def worker_was_killed(error: Exception) -> bool:
    """Return whether an error is the one that torch raises, at any time, after a data worker was killed."""
    return str(error).startswith(_WORKER_KILLED)
