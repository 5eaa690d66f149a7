"""Scores equal values computed by hand, for anisotropic spacing, 2D, empty masks, ignored voxels and regions."""

import json
import math

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_macl.compare.measure import measure, surface_distances


def block(shape, *corner, size):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(c, c + n) for c, n in zip(corner, size, strict=True))] = True
    return mask


@pytest.mark.parametrize("axis, millimetres", [(0, 5.0), (1, 2.0), (2, 0.5)])
def test_distance_of_a_shifted_plate_is_the_shift(axis, millimetres):
    """The plates are one voxel thick, so every surface voxel has the same distance, two voxels."""
    size = [5, 6, 7]
    size[axis] = 1
    one, other = [2, 2, 2], [2, 2, 2]
    other[axis] += 2
    shape = (12, 12, 12)
    hd95, asd = surface_distances(block(shape, *one, size=size), block(shape, *other, size=size), (5.0, 2.0, 0.5))
    assert (hd95, asd) == pytest.approx((2 * millimetres,) * 2)


def test_distance_of_single_voxels_is_euclidean():
    one, other = block((6, 6, 6), 1, 1, 1, size=(1, 1, 1)), block((6, 6, 6), 2, 3, 4, size=(1, 1, 1))
    expected = math.sqrt(5**2 + (2 * 2) ** 2 + (3 * 0.5) ** 2)
    assert surface_distances(one, other, (5, 2, 0.5)) == pytest.approx((expected, expected))


def test_a_slice_of_a_volume_is_measured_in_2d():
    """The spacing of an axis with one voxel does not matter."""
    one, other = block((9, 9), 1, 1, size=(1, 4)), block((9, 9), 4, 1, size=(1, 4))
    assert surface_distances(one, other, (2, 7)) == pytest.approx((6, 6))
    assert surface_distances(one[None], other[None], (999, 2, 7)) == pytest.approx((6, 6))


def test_one_outlier_changes_asd_but_not_hd95():
    """The outlier is one of 101 voxels, 40 mm from the others."""
    reference = block((200, 3), 10, 1, size=(100, 1))
    prediction = reference.copy()
    prediction[149, 1] = True
    hd95, asd = surface_distances(reference, prediction, (1, 1))
    assert hd95 == 0 and asd == pytest.approx(40 / 201)


def test_hd95_is_the_larger_of_the_two_directions():
    reference, prediction = block((30, 3), 0, 1, size=(20, 1)), block((30, 3), 0, 1, size=(1, 1))
    hd95, asd = surface_distances(reference, prediction, (2, 1))
    distances = 2.0 * np.arange(20)
    assert hd95 == pytest.approx(np.percentile(distances, 95)) and asd == pytest.approx(distances.sum() / 21)


def test_identical_masks_have_distance_0_and_empty_masks_nan():
    full, empty = block((8, 8, 8), 2, 2, 2, size=(3, 3, 3)), np.zeros((8, 8, 8), dtype=bool)
    assert surface_distances(full, full, (1, 1, 1)) == (0, 0)
    for pair in ((full, empty), (empty, full), (empty, empty)):
        assert all(math.isnan(value) for value in surface_distances(*pair, (1, 1, 1)))


def write(file, array, spacing):
    image = sitk.GetImageFromArray(array.astype(np.uint8))
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, str(file))
    return str(file)


def test_measuring_files(tmp_path):
    """The files have a spacing, classes in one or neither of them, a region and an ignored voxel."""
    reference, prediction = np.zeros((6, 8, 8)), np.zeros((6, 8, 8))
    reference[1, 2:5, 2:5], prediction[2, 2:5, 2:5] = 1, 1
    prediction[5, 7, 7] = 2
    files = (write(tmp_path / f"{n}.nii.gz", a, (4.0, 1.0, 1.0)) for n, a in (("r", reference), ("p", prediction)))
    files = list(files)
    one, two, three, region = measure(*files, SimpleITKIO(), [1, 2, 3, (1, 2)])
    assert (one.dice, one.hd95, one.asd) == pytest.approx((0, 4, 4))
    assert two.dice == 0 and math.isnan(two.hd95) and math.isnan(two.asd)
    assert math.isnan(three.dice) and math.isnan(three.hd95)
    assert (one.label, region.label) == ("1", "(1, 2)") and region.hd95 > 4

    reference[5, 7, 7] = 9
    write(tmp_path / "r.nii.gz", reference, (4.0, 1.0, 1.0))
    two, region = measure(*files, SimpleITKIO(), [2, (1, 2)], ignore_label=9)
    assert math.isnan(two.dice) and region.hd95 == pytest.approx(4)


def test_measuring_png_files(tmp_path):
    from skimage import io

    reference, prediction = np.zeros((20, 20), dtype=np.uint8), np.zeros((20, 20), dtype=np.uint8)
    reference[3, 3:9], prediction[5, 3:9] = 1, 1
    for name, array in (("r", reference), ("p", prediction)):
        io.imsave(tmp_path / f"{name}.png", array, check_contrast=False)
    (found,) = measure(str(tmp_path / "r.png"), str(tmp_path / "p.png"), NaturalImage2DIO(), [1])
    assert (found.dice, found.hd95, found.asd) == (0, 2, 2)
    json.dumps(found.__dict__)
