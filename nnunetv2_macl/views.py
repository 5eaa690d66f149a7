"""What each branch is shown: random spatial and intensity views, and the downsampled copies for the dominant branch.

A view is parameters drawn once, then applied: rotation, scaling, translation and mirroring are one matrix and one
resampling, which also does the downsampling where a branch needs it. Runs on whichever device the patches are on.

Source: MACL section III (invariance group, variance group, down).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunetv2_macl.losses import LINEAR_MODE, down

__all__ = ["IntensityViews", "SpatialViews", "down"]

# which of down(I1), I2, down(V1), V2 an intensity view changes
INTENSITY_ON = {
    "all": (True, True, True, True),
    "variance": (False, False, True, True),
    "auxiliary": (False, True, False, True),
}


class SpatialViews:
    """Random mirroring, rotation, scaling and translation of 2D or 3D patches.

    Args:
        patch_size: voxels an axis.
        mirroring: mirror each axis with probability 1/2.
        rotation: largest angle in the plane of the last two axes, degrees; 180 is the full turn.
        out_of_plane_rotation: largest angle about the two in-plane axes, degrees; 3D only.
        scaling: smallest and largest factor; one factor a patch in 2D, one an axis in 3D.
        translation: largest shift, fraction of the patch edge.

    Raises:
        ValueError: an argument outside its range.
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
                raise ValueError(f"{name} must lie between 0 and 180 degrees, got {angle}")
        if not 0 < scaling[0] <= scaling[1]:
            raise ValueError(f"scaling must be two factors above 0, the smaller first, got {tuple(scaling)}")
        if not 0 <= translation <= 1:
            raise ValueError(f"translation must lie between 0 and 1, got {translation}")
        self.patch_size = tuple(patch_size)
        self.mirroring = mirroring
        self.rotation = rotation
        self.out_of_plane_rotation = out_of_plane_rotation
        self.scaling = tuple(scaling)
        self.translation = translation

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items())})"

    def draw(self, patches: int, generator: torch.Generator) -> Tensor:
        """Parameters of ``patches`` views: (N, A, A+1), output to input coordinates as `torch` grids have them.

        Args:
            patches: N.
            generator: where every random number comes from; on the CPU, so that a seed means one view on every device.
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
        # drawn always, so that leaving mirroring out changes no other number of the view
        mirrored = torch.where(uniform(0, 1, axes) < 0.5, -1.0, 1.0)
        factors = uniform(self.scaling[0], self.scaling[1], axes if axes == 3 else 1).expand(-1, axes)
        # a factor of 2 shows things twice as large: the view's voxels lie half as far apart in the patch
        matrix = matrix / factors[:, None]
        if self.mirroring:
            matrix = matrix * mirrored[:, None]

        # from voxels, where a rotation is one, to the coordinates of torch: -1 to 1 an axis, last axis first
        half = torch.tensor([max(n - 1, 1) / 2 for n in self.patch_size])
        matrix = matrix * half / half[:, None]
        shift = uniform(-self.translation, self.translation, axes) * 2
        return torch.cat((matrix.flip(1, 2), shift.flip(1)[..., None]), -1)

    def apply(self, patches: Tensor, parameters: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """The views, resampled once, linearly; outside the patch is 0, as nnU-Net pads.

        Args:
            patches: (N, C, *patch).
            parameters: (N, A, A+1) from `draw`.
            size: voxels an axis of the result, for the downsampled view; the patch's own by default.

        Returns:
            (N, C, *size).
        """
        size = tuple(size or patches.shape[2:])
        grid = F.affine_grid(parameters.to(patches), [len(patches), 1, *size], align_corners=True)
        return F.grid_sample(patches, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def _rotation(axes: int, first: int, second: int, angles: Tensor) -> Tensor:
    """(N,) radians in the plane of two axes -> (N, A, A)."""
    matrix = torch.eye(axes).repeat(len(angles), 1, 1)
    matrix[:, first, first] = matrix[:, second, second] = angles.cos()
    matrix[:, first, second] = -angles.sin()
    matrix[:, second, first] = angles.sin()
    return matrix


class IntensityNumbers(NamedTuple):
    """Random numbers of one intensity view of N patches of C channels.

    Attributes:
        values: (N, C, changes + amounts + points of the bias field). One tensor, because each is copied to a GPU on its own.
        noise_seeds: One seed for each patch. A list, because the CPU reads it while the values are on a GPU.
    """

    values: Tensor
    noise_seeds: list[int]


class IntensityViews:
    """Random gamma, contrast, brightness, bias field, noise and blur, each channel of each image on its own.

    For images that are normalised, as nnU-Net's are: changes of brightness and noise are in standard deviations.

    Args:
        strength: 1 for the ranges below, 0 for none; all grow with it.
    """

    GAMMA = 0.5  # largest logarithm of the exponent
    CONTRAST = 0.4  # largest logarithm of the factor
    BRIGHTNESS = 0.3  # largest shift, standard deviations
    BIAS = 0.5  # largest logarithm of the field
    NOISE = 0.3  # largest standard deviation
    # The probability of each change: gamma, inverted gamma, contrast and brightness, bias field, noise, blur.
    PROBABILITIES = (0.8, 0.3, 0.8, 0.5, 0.3, 0.3)
    # The bias field has this many points on each axis and is interpolated between them.
    FIELD_POINTS = 4

    def __init__(self, strength: float = 1.0) -> None:
        if not strength >= 0:
            raise ValueError(f"strength must be 0 or greater, got {strength!r}")
        self.strength = strength

    def draw(self, patches: int, channels: int, axes: int, generator: torch.Generator) -> IntensityNumbers:
        """Draw the numbers of a view.

        Args:
            patches: N.
            channels: C.
            axes: 2 or 3.
            generator: Source of every random number. It is on the CPU, so that a seed means one view on every device.
        """
        single = [patches, channels, *[1] * axes]

        def even(reach: float) -> Tensor:
            reach *= self.strength
            return torch.rand(single, generator=generator) * 2 * reach - reach

        chosen = [(torch.rand(single, generator=generator) < p).float() for p in self.PROBABILITIES]
        amounts = [even(reach) for reach in (self.GAMMA, self.GAMMA, self.CONTRAST, self.BRIGHTNESS)]
        points = torch.randn(patches, channels, *[self.FIELD_POINTS] * axes, generator=generator)
        field = (points * (self.BIAS * self.strength / 2)).clamp(-1, 1)
        noise = torch.Generator().manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        amounts.append(even(self.NOISE).abs())
        seeds = torch.randint(2**62, (patches,), generator=noise).tolist()
        values = [number.view(patches, channels, 1) for number in (*chosen, *amounts)]
        return IntensityNumbers(torch.cat((*values, field.flatten(2)), -1), seeds)

    def apply(self, patches: Tensor, numbers: IntensityNumbers) -> Tensor:
        """Change patches; constant ones stay finite.

        Args:
            patches: (N, C, *patch).
            numbers: What `draw` returned for these patches, its values on their device.

        Returns:
            (N, C, *patch).
        """
        if not self.strength:
            return patches
        axes = patches.ndim - 2
        single = [*patches.shape[:2], *[1] * axes]

        def whole(values: Tensor, statistic: str) -> Tensor:
            return getattr(values.flatten(2), statistic)(-1).view(single)

        values = numbers.values.to(patches.dtype)
        changes, amounts = len(self.PROBABILITIES), 5
        chosen, reached, points = values.split((changes, amounts, self.FIELD_POINTS**axes), -1)
        gamma, inverse, contrast, biased, noisy, blurred = (c.bool().reshape(single) for c in chosen.unbind(-1))
        exponent, inverse_exponent, factor, shift, deviation = (r.reshape(single) for r in reached.unbind(-1))
        low = whole(patches, "amin")
        span = (whole(patches, "amax") - low).clamp_min(1e-6)
        views = ((patches - low) / span).clamp(0, 1)
        views = torch.where(gamma, views ** exponent.exp(), views)
        # nnU-Net's inverted gamma stretches the bright end.
        views = torch.where(inverse, 1 - (1 - views) ** inverse_exponent.exp(), views)
        views = views * span + low
        mean = whole(views, "mean")
        views = torch.where(contrast, (views - mean) * factor.exp() + mean + shift, views)
        field = points.reshape(*single[:2], *[self.FIELD_POINTS] * axes)
        field = F.interpolate(field, patches.shape[2:], mode=LINEAR_MODE[axes], align_corners=True)
        views = torch.where(biased, views * field.exp(), views)
        views = torch.where(noisy, views + _noise(patches, numbers.noise_seeds) * deviation, views)
        return torch.where(blurred, _blurred(views), views)


def _noise(patches: Tensor, seeds: Sequence[int]) -> Tensor:
    """Standard normal noise for each patch from its own seed, drawn on the patches' device because it is as large as they."""
    noise = torch.empty_like(patches)
    if patches.is_meta:
        return noise
    generator = torch.Generator(patches.device)
    for patch, seed in zip(noise, seeds, strict=True):
        patch.normal_(generator=generator.manual_seed(seed))
    return noise


def _blurred(images: Tensor) -> Tensor:
    """Along each axis 1/4, 1/2, 1/4; edges repeated."""
    for axis in range(2, images.ndim):
        length = images.shape[axis]
        before = torch.cat((images.narrow(axis, 0, 1), images.narrow(axis, 0, length - 1)), axis)
        after = torch.cat((images.narrow(axis, 1, length - 1), images.narrow(axis, length - 1, 1)), axis)
        images = images / 2 + (before + after) / 4
    return images
