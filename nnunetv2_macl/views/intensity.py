"""Random intensity views. They are not from the MACL paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunetv2_macl.losses import LINEAR_MODE
from nnunetv2_macl.views.parts import parts_of


class IntensityNumbers(NamedTuple):
    """Random numbers of the intensity views of N patches with C channels.

    Attributes:
        values: (N, C, changes + amounts + points of the bias field), in one tensor, so that they need only one copy to a GPU.
        noise_seeds: One seed for each patch, in a list, because the CPU reads the seeds while the values are on a GPU.
    """

    values: Tensor
    noise_seeds: list[int]


class RandomIntensity:
    """Change gamma, contrast, brightness, bias field, noise and blur at random, independently for each channel of each image.

    Brightness and noise are in standard deviations of the image.

    Args:
        strength: Factor of the ranges below. 0 changes nothing.
        unnormalised: Indices of the channels whose standard deviation is not about 1, because nnU-Net does not normalise it.

    Raises:
        ValueError: The strength is below 0.
    """

    GAMMA = 0.5  # largest logarithm of the exponent
    CONTRAST = 0.4  # largest logarithm of the factor
    BRIGHTNESS = 0.3  # largest shift, standard deviations
    BIAS = 0.5  # two standard deviations of the logarithm of the field, which is at most 1
    NOISE = 0.3  # largest standard deviation
    # The probability of each change: gamma, inverted gamma, contrast and brightness, bias field, noise, blur.
    PROBABILITIES = (0.8, 0.3, 0.8, 0.5, 0.3, 0.3)
    # The bias field has this many points on each axis and is interpolated between them.
    FIELD_POINTS = 4

    def __init__(self, strength: float = 1.0, unnormalised: Sequence[int] = ()) -> None:
        if not strength >= 0:
            raise ValueError(f"strength must be 0 or greater, got {strength!r}")
        self.strength, self.unnormalised = strength, tuple(unnormalised)

    def draw(self, patches: int, channels: int, axes: int, generator: torch.Generator) -> IntensityNumbers:
        """Draw the random numbers of views.

        Args:
            patches: N.
            channels: C.
            axes: 2 or 3.
            generator: Generator on the CPU, so that a seed gives the same view on every device.
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
        """Return the changed patches. The result is finite for constant patches, too.

        Args:
            patches: (N, C, *patch).
            numbers: The result of `draw` for these patches, with its values on their device.

        Returns:
            (N, C, *patch).
        """
        if not self.strength:
            return patches
        views = torch.empty_like(patches)
        for part in parts_of(len(patches), patches.shape[2:]):
            views[part] = self._change(patches[part], IntensityNumbers(numbers.values[part], numbers.noise_seeds[part]))
        return views

    def _change(self, patches: Tensor, numbers: IntensityNumbers) -> Tensor:
        """Return the changed patches like `apply`, but all at once, which takes the memory of several copies of the patches."""
        axes = patches.ndim - 2
        single = [*patches.shape[:2], *[1] * axes]

        def whole(values: Tensor, statistic: str) -> Tensor:
            return getattr(values.flatten(2), statistic)(-1).view(single)

        values = numbers.values.to(patches.dtype)
        changes, amounts = len(self.PROBABILITIES), 5
        chosen, reached, points = values.split((changes, amounts, self.FIELD_POINTS**axes), -1)
        gamma, inverse, contrast, biased, noisy, blurred = (c.bool().reshape(single) for c in chosen.unbind(-1))
        exponent, inverse_exponent, factor, shift, deviation = (r.reshape(single) for r in reached.unbind(-1))
        if self.unnormalised:
            channels = list(self.unnormalised)
            unit = torch.ones(single, dtype=patches.dtype, device=patches.device)
            unit[:, channels] = whole(patches, "std")[:, channels]
            shift, deviation = shift * unit, deviation * unit
        low = whole(patches, "amin")
        span = (whole(patches, "amax") - low).clamp_min(1e-6)
        views = ((patches - low) / span).clamp(0, 1)
        views = torch.where(gamma, views ** exponent.exp(), views)
        # As in nnU-Net's inverted gamma, this stretches the bright values.
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
    """Return standard normal noise, drawn with one seed for each patch.

    Noise is drawn on the device of the patches, because copying it would take longer.
    """
    noise = torch.empty_like(patches)
    if patches.is_meta:
        return noise
    generator = torch.Generator(patches.device)
    for patch, seed in zip(noise, seeds, strict=True):
        patch.normal_(generator=generator.manual_seed(seed))
    return noise


def _blurred(images: Tensor) -> Tensor:
    """Return images smoothed along each axis with the weights 1/4, 1/2 and 1/4. Edge voxels are repeated."""
    for axis in range(2, images.ndim):
        length = images.shape[axis]
        before = torch.cat((images.narrow(axis, 0, 1), images.narrow(axis, 0, length - 1)), axis)
        after = torch.cat((images.narrow(axis, 1, length - 1), images.narrow(axis, length - 1, 1)), axis)
        images = images / 2 + (before + after) / 4
    return images
