"""Random spatial views: mirroring, rotation, scaling and translation in one resampling.

Source: MACL section III (variance group).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunetv2_macl.views.parts import parts_of


class RandomAffine:
    """Mirror, rotate, scale and translate 2D or 3D patches at random.

    The parameters are one matrix for each patch, so that a single resampling applies all changes and a possible downsampling.

    Args:
        patch_size: Size of a patch, voxels per axis.
        mirroring: Whether each axis is mirrored with probability 1/2.
        rotation: Largest angle in the plane of the last two axes, degrees. 180 allows all angles.
        out_of_plane_rotation: Largest angle about the two in-plane axes, degrees. Used in 3D only.
        scaling: Smallest and largest factor. One factor is drawn for each patch in 2D, one for each axis in 3D.
        translation: Largest shift, fraction of the patch's edge.

    Raises:
        ValueError: An argument is outside its range.
    """

    def __init__(
        self,
        patch_size: Sequence[int],
        *,
        mirroring: bool = True,
        rotation: float = 180.0,
        out_of_plane_rotation: float = 0.0,
        scaling: tuple[float, float] = (0.7, 1.3),
        translation: float = 0.1,
    ) -> None:
        if len(patch_size) not in (2, 3):
            raise ValueError(f"patch_size must have 2 or 3 axes, got {tuple(patch_size)}")
        for name, angle in (("rotation", rotation), ("out_of_plane_rotation", out_of_plane_rotation)):
            if not 0 <= angle <= 180:
                raise ValueError(f"{name} must be between 0 and 180 degrees, got {angle}")
        if not 0 < scaling[0] <= scaling[1]:
            raise ValueError(f"scaling must be two factors above 0, the smaller first, got {tuple(scaling)}")
        if not 0 <= translation <= 1:
            raise ValueError(f"translation must be between 0 and 1, got {translation}")
        self.patch_size = tuple(patch_size)
        self.mirroring = mirroring
        self.rotation = rotation
        self.out_of_plane_rotation = out_of_plane_rotation
        self.scaling = tuple(scaling)
        self.translation = translation

    def draw(self, patches: int, generator: torch.Generator) -> Tensor:
        """Draw the parameters of views.

        Args:
            patches: N, number of views.
            generator: Generator on the CPU, so that a seed gives the same view on every device.

        Returns:
            (N, A, A+1), matrices from output to input coordinates, as `torch.nn.functional.affine_grid` takes them.
        """
        axes = len(self.patch_size)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.rand(patches, *shape, generator=generator) * (high - low) + low

        angle = math.radians(self.rotation)
        matrix = _rotation(axes, axes - 2, axes - 1, uniform(-angle, angle))
        if axes == 3:
            angle = math.radians(self.out_of_plane_rotation)
            for plane in ((0, 1), (0, 2)):
                matrix = matrix @ _rotation(axes, *plane, uniform(-angle, angle))
        # Always drawn, so that disabling mirroring does not change the other random parameters.
        mirrored = torch.where(uniform(0, 1, axes) < 0.5, -1.0, 1.0)
        factors = uniform(self.scaling[0], self.scaling[1], axes if axes == 3 else 1).expand(-1, axes)
        # A factor of 2 magnifies: the voxels of the view are half as far apart in the patch.
        matrix = matrix / factors[:, None]
        if self.mirroring:
            matrix = matrix * mirrored[:, None]

        # Convert from voxels, in which the rotation is rigid, to torch's coordinates: from -1 to 1, with the last axis first.
        half = torch.tensor([max(n - 1, 1) / 2 for n in self.patch_size])
        matrix = matrix * half / half[:, None]
        shift = uniform(-self.translation, self.translation, axes) * 2
        return torch.cat((matrix.flip(1, 2), shift.flip(1)[..., None]), -1)

    def apply(self, patches: Tensor, parameters: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Return the linearly resampled views. Voxels outside of the patch are 0, as in nnU-Net's padding.

        Args:
            patches: (N, C, *patch).
            parameters: (N, A, A+1), the result of `draw`.
            size: Size of the views, voxels per axis. None keeps the size of the patches.

        Returns:
            (N, C, *size).
        """
        return resample(patches, parameters, size)


def resample(patches: Tensor, matrices: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """Return linearly resampled patches, computed a few at a time. Voxels outside of the patch are 0, as in nnU-Net's padding.

    Args:
        patches: (N, C, *patch).
        matrices: (N, A, A+1), from output to input coordinates, as `torch.nn.functional.affine_grid` takes them.
        size: Size of the result, voxels per axis. None keeps the size of the patches.

    Returns:
        (N, C, *size).
    """
    size = tuple(size or patches.shape[2:])
    matrices, views = matrices.to(patches), patches.new_empty(*patches.shape[:2], *size)
    for part in parts_of(len(patches), size):
        shown = patches[part]
        grid = F.affine_grid(matrices[part], [len(shown), 1, *size], align_corners=True)
        views[part] = F.grid_sample(shown, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
        # Free the grid, because otherwise two grids are in memory at once.
        del grid
    return views


def _rotation(axes: int, first: int, second: int, angles: Tensor) -> Tensor:
    """Return rotations (N, A, A) by angles (N,), in radians, in the plane of two axes."""
    matrix = torch.eye(axes).repeat(len(angles), 1, 1)
    matrix[:, first, first] = matrix[:, second, second] = angles.cos()
    matrix[:, first, second] = -angles.sin()
    matrix[:, second, first] = angles.sin()
    return matrix
