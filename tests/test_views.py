"""Compare spatial and intensity views with results computed by hand."""

import pytest
import torch

from benchmarks.measure import peak_allocated
from nnunetv2_macl.views import RandomAffine, RandomIntensity, downsample
from nnunetv2_macl.views import parts as module

STILL = dict(mirroring=False, rotation=0.0, scaling=(1.0, 1.0), translation=0.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("patch_size", [(9, 13), (5, 9, 7)])
def test_resampling_can_be_the_identity_or_a_downsampling(patch_size):
    views = RandomAffine(patch_size, **STILL)
    patches = torch.randn(2, 3, *patch_size, generator=generator())
    parameters = views.draw(2, generator())
    torch.testing.assert_close(views.apply(patches, parameters), patches, atol=1e-5, rtol=0)
    small = [n // 2 + 1 for n in patch_size]
    torch.testing.assert_close(views.apply(patches, parameters, small), downsample(patches, small), atol=1e-5, rtol=0)


def test_mirroring_flips_each_axis_half_of_the_time():
    views = RandomAffine((5, 7), **(STILL | {"mirroring": True}))
    patches = torch.randn(1, 1, 5, 7, generator=generator()).expand(200, -1, -1, -1)
    seen = views.apply(patches, views.draw(200, generator()))
    flips = [patches[0].flip(dims) for dims in ([], [1], [2], [1, 2])]
    counts = [sum(torch.allclose(view, flip, atol=1e-5) for view in seen) for flip in flips]
    assert sum(counts) == 200
    assert min(counts) > 25


@pytest.mark.parametrize("patch_size, plane", [((21, 41), (0, 1)), ((11, 21, 41), (1, 2))])
def test_rotation_is_rigid_in_voxels_of_an_oblong_patch(patch_size, plane):
    """The distance of a point from the centre, in voxels, does not change."""
    views = RandomAffine(patch_size, **(STILL | {"rotation": 180.0}))
    patches = torch.zeros(32, 1, *patch_size)
    centre = [n // 2 for n in patch_size]
    at = list(centre)
    at[plane[1]] += 7
    patches[(slice(None), 0, *at)] = 1
    seen = views.apply(patches, views.draw(32, generator()))[:, 0]
    axes = torch.meshgrid(*(torch.arange(n) - c for n, c in zip(patch_size, centre, strict=True)), indexing="ij")
    mass = seen.flatten(1).sum(1)
    mean = torch.stack([(seen * axis).flatten(1).sum(1) / mass for axis in axes], -1)
    torch.testing.assert_close(mean.norm(dim=-1), torch.full((32,), 7.0), atol=0.3, rtol=0)
    angles = torch.atan2(mean[:, plane[0]], mean[:, plane[1]])
    assert angles.min() < -2 and angles.max() > 2  # The angles cover the full turn.
    if len(patch_size) == 3:
        assert mean[:, 0].abs().max() < 1e-4  # The point stays in its plane.


def test_scaling_magnifies():
    views = RandomAffine((33, 33), **(STILL | {"scaling": (2.0, 2.0)}))
    patches = torch.zeros(1, 1, 33, 33)
    patches[..., 12:21, 12:21] = 1
    seen = views.apply(patches, views.draw(1, generator()))
    assert seen.sum() == pytest.approx(4 * 81, rel=0.15)


def test_translation_stays_within_its_range():
    views = RandomAffine((33, 65), **(STILL | {"translation": 0.25}))
    patches = torch.zeros(64, 1, 33, 65)
    patches[:, 0, 16, 32] = 1
    seen = views.apply(patches, views.draw(64, generator()))[:, 0]
    where = seen.flatten(1).argmax(1)
    rows, columns = where // 65 - 16, where % 65 - 32
    assert rows.abs().max() <= 9 and columns.abs().max() <= 17
    assert rows.unique().numel() > 8 and columns.unique().numel() > 16


def test_the_same_seed_gives_the_same_views():
    views = RandomAffine((8, 8, 8), out_of_plane_rotation=30.0)
    assert torch.equal(views.draw(4, generator(3)), views.draw(4, generator(3)))
    assert not torch.equal(views.draw(4, generator(3)), views.draw(4, generator(4)))


@pytest.mark.parametrize(
    "wrong", [{"patch_size": (3,)}, {"rotation": 200}, {"scaling": (1.3, 0.7)}, {"translation": 2}]
)
def test_arguments_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RandomAffine(**({"patch_size": (8, 8)} | wrong))


def changed_intensity(patches, seed, strength=1.0, unnormalised=()):
    views = RandomIntensity(strength, unnormalised)
    numbers = views.draw(*patches.shape[:2], patches.ndim - 2, generator(seed))
    return views.apply(patches, numbers)


@pytest.mark.parametrize("shape", [(6, 2, 16, 20), (4, 1, 6, 16, 12)])
def test_intensity_views_change_values_but_not_their_order(shape):
    patches = torch.randn(shape, generator=generator())
    views = changed_intensity(patches, 1)
    assert views.shape == patches.shape and torch.isfinite(views).all()
    assert torch.equal(views, changed_intensity(patches, 1))
    changed = (views - patches).flatten(2).abs().amax(-1) > 1e-3
    assert changed.float().mean() > 0.7
    # Bright voxels stay bright.
    ranks = [
        torch.stack((a.flatten(), b.flatten())) for a, b in zip(patches.flatten(0, 1), views.flatten(0, 1), strict=True)
    ]
    assert min(torch.corrcoef(pair)[0, 1] for pair in ranks) > 0.5
    assert torch.equal(changed_intensity(patches, 1, strength=0), patches)


@pytest.mark.parametrize("size", [(48, 40), (16, 20, 12)])
def test_views_in_parts_are_the_same_and_need_less_memory(monkeypatch, size):
    patches = torch.randn(16, 2, *size, generator=generator())
    spatial, intensity = RandomAffine(size), RandomIntensity()
    parameters = spatial.draw(16, generator(1))
    numbers = intensity.draw(16, 2, len(size), generator(2))
    for run in (lambda: spatial.apply(patches, parameters), lambda: intensity.apply(patches, numbers)):
        whole, at_once = peak_allocated(run)
        # The parts have three patches, and the last part has one.
        monkeypatch.setattr(module, "VOXELS_AT_ONCE", 3 * size[0] * patches[0, 0, 0].numel())
        several, in_parts = peak_allocated(run)
        monkeypatch.undo()
        torch.testing.assert_close(several, whole)
        assert in_parts < 0.6 * at_once


def test_intensity_of_a_constant_image_is_finite():
    assert torch.isfinite(changed_intensity(torch.full((20, 1, 8, 8), 2.5), 0, strength=3.0)).all()


def test_channels_that_are_not_normalised_change_as_much_as_normalised_ones():
    patches = torch.randn(20, 2, 16, 20, generator=generator())
    patches = (patches - patches.mean((2, 3), keepdim=True)) / patches.std((2, 3), keepdim=True)
    scale, offset = torch.tensor([1.0, 40.0]).view(1, 2, 1, 1), torch.tensor([0.0, 128.0]).view(1, 2, 1, 1)
    # without the bias field, which multiplies the values
    views = RandomIntensity(unnormalised=[1])
    views.PROBABILITIES = (0.8, 0.3, 0.8, 0.0, 0.3, 0.3)
    numbers = views.draw(20, 2, 2, generator(3))
    expected = views.apply(patches, numbers) * scale + offset
    torch.testing.assert_close(views.apply(patches * scale + offset, numbers), expected, rtol=1e-4, atol=1e-3)


def test_intensity_of_each_image_and_channel_is_its_own():
    patches = torch.randn(1, 1, 12, 12, generator=generator()).expand(5, 2, -1, -1)
    views = changed_intensity(patches, 0).flatten(0, 1)
    assert len({tuple(view.flatten().tolist()) for view in views}) >= 8


def test_blur_keeps_a_ramp_and_spreads_a_point():
    from nnunetv2_macl.views.intensity import _blurred

    ramp = torch.arange(8.0).view(1, 1, 8, 1).expand(1, 1, 8, 8)
    torch.testing.assert_close(_blurred(ramp)[..., 1:-1, :], ramp[..., 1:-1, :])
    point = torch.zeros(1, 1, 5, 5)
    point[..., 2, 2] = 1
    assert _blurred(point)[0, 0, 2].tolist() == [0, 0.125, 0.25, 0.125, 0] and _blurred(point).sum() == 1


def test_a_negative_strength_is_rejected():
    with pytest.raises(ValueError, match="strength"):
        RandomIntensity(-1)
