"""Distances worked out by hand: spacing per axis, 2D, empty masks, ignored voxels, regions."""

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
def test_a_shifted_plate(axis, millimetres):
    """Two plates one voxel thick, two voxels apart: every surface voxel is exactly that far away."""
    size = [5, 6, 7]
    size[axis] = 1
    one, other = [2, 2, 2], [2, 2, 2]
    other[axis] += 2
    shape = (12, 12, 12)
    hd95, asd = surface_distances(block(shape, *one, size=size), block(shape, *other, size=size), (5.0, 2.0, 0.5))
    assert (hd95, asd) == pytest.approx((2 * millimetres,) * 2)


def test_single_voxels_in_space():
    one, other = block((6, 6, 6), 1, 1, 1, size=(1, 1, 1)), block((6, 6, 6), 2, 3, 4, size=(1, 1, 1))
    expected = math.sqrt(5**2 + (2 * 2) ** 2 + (3 * 0.5) ** 2)
    assert surface_distances(one, other, (5, 2, 0.5)) == pytest.approx((expected, expected))


def test_distances_in_2d():
    """A slice of a volume and a picture are the same, and the slice spacing does not matter."""
    one, other = block((9, 9), 1, 1, size=(1, 4)), block((9, 9), 4, 1, size=(1, 4))
    assert surface_distances(one, other, (2, 7)) == pytest.approx((6, 6))
    assert surface_distances(one[None], other[None], (999, 2, 7)) == pytest.approx((6, 6))


def test_outliers_count_as_the_95th_percentile_and_in_the_mean():
    """100 voxels in a row, one more 40 mm off: HD95 ignores 1 of 101, ASD spreads it."""
    reference = block((200, 3), 10, 1, size=(100, 1))
    prediction = reference.copy()
    prediction[149, 1] = True
    hd95, asd = surface_distances(reference, prediction, (1, 1))
    assert hd95 == 0 and asd == pytest.approx(40 / 201)


def test_larger_of_the_two_directions():
    reference, prediction = block((30, 3), 0, 1, size=(20, 1)), block((30, 3), 0, 1, size=(1, 1))
    hd95, asd = surface_distances(reference, prediction, (2, 1))
    distances = 2.0 * np.arange(20)
    assert hd95 == pytest.approx(np.percentile(distances, 95)) and asd == pytest.approx(distances.sum() / 21)


def test_identical_and_empty_masks():
    full, empty = block((8, 8, 8), 2, 2, 2, size=(3, 3, 3)), np.zeros((8, 8, 8), dtype=bool)
    assert surface_distances(full, full, (1, 1, 1)) == (0, 0)
    for pair in ((full, empty), (empty, full), (empty, empty)):
        assert all(math.isnan(value) for value in surface_distances(*pair, (1, 1, 1)))


def write(file, array, spacing):
    image = sitk.GetImageFromArray(array.astype(np.uint8))
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, str(file))
    return str(file)


def test_files(tmp_path):
    """Spacing from the file, a class in neither, a class in one only, a region, an ignored voxel."""
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


def test_pictures(tmp_path):
    from skimage import io

    reference, prediction = np.zeros((20, 20), dtype=np.uint8), np.zeros((20, 20), dtype=np.uint8)
    reference[3, 3:9], prediction[5, 3:9] = 1, 1
    for name, array in (("r", reference), ("p", prediction)):
        io.imsave(tmp_path / f"{name}.png", array, check_contrast=False)
    (found,) = measure(str(tmp_path / "r.png"), str(tmp_path / "p.png"), NaturalImage2DIO(), [1])
    assert (found.dice, found.hd95, found.asd) == (0, 2, 2)
    json.dumps(found.__dict__)
