"""Batches: the content and the position of a patch, and that a batch depends only on the seed and the step."""

import blosc2
import numpy as np
import pytest
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd

from nnunetv2_macl.data import (
    Case,
    PretrainingBatches,
    Sampling,
    draw_corner,
    load_batches,
    open_unchanged,
    plan_reading,
    position,
)
from nnunetv2_macl.errors import UserError


def make_case(folder, name, volume):
    file = str(folder / f"{name}.b2nd")
    blosc2.asarray(np.ascontiguousarray(volume, dtype=np.float32), urlpath=file, mode="w")
    return Case(name, file)


@pytest.fixture
def cases(tmp_path):
    rng = np.random.default_rng(0)
    shapes = [(2, 9, 30, 40), (2, 12, 26, 44), (2, 7, 50, 20)]
    return [make_case(tmp_path, f"case{i}", rng.normal(size=shape)) for i, shape in enumerate(shapes)]


def batches(cases, patch=(1, 24, 32), n=8, group=1, seed=0, share=None, neighbours=False):
    return PretrainingBatches(cases, Sampling(patch, n, group, seed, neighbours), share or (0, n), 100)


@pytest.mark.parametrize("patch", [(1, 24, 32), (1, 48, 48), (8, 24, 32), (16, 64, 16)])
def test_patches_are_cut_and_padded_as_nnunet_does(cases, patch):
    batch = batches(cases, patch)[3]
    assert batch["data"].shape == (8, 2, *(patch if patch[0] > 1 else patch[1:]))
    for data, where, name in zip(batch["data"], batch["positions"], batch["cases"], strict=True):
        volume = blosc2.open(next(c.file for c in cases if c.name == name))[:]
        shape = np.array(volume.shape[1:])
        corner = np.round(where.numpy() * shape - np.array(patch) / 2).astype(int)
        expected = crop_and_pad_nd(volume, [[c, c + p] for c, p in zip(corner, patch, strict=True)], 0)
        expected = expected if patch[0] > 1 else expected[:, 0]
        np.testing.assert_array_equal(data.numpy(), expected)


def test_corners_are_those_of_nnunets_loader():
    """Corners are uniform from -padding//2 to shape + padding//2 + padding%2 - patch."""
    rng = np.random.default_rng(0)
    drawn = np.stack([draw_corner((9, 40, 39), (1, 24, 64), rng) for _ in range(4000)])
    np.testing.assert_array_equal(drawn.min(0), [0, 0, -13])
    np.testing.assert_array_equal(drawn.max(0), [8, 16, -12])
    counts = np.bincount(drawn[:, 0])
    assert counts.min() > 0.7 * counts.max()
    first, last = (draw_corner((9, 40, 39), (1, 24, 64), rng, np.full(3, p)) for p in (0.0, 0.9999))
    np.testing.assert_array_equal([first, last], [[0, 0, -13], [8, 16, -12]])


def test_places_are_spread_evenly_over_the_corners_of_a_patch_larger_than_the_volume():
    """An odd number of padded voxels leaves two corners, both below 0."""
    corners = [
        int(draw_corner((7,), (10,), None, np.array([place]))[0]) for place in (0.0, 0.25, 0.49, 0.51, 0.75, 1.0)
    ]
    assert corners == [-2, -2, -2, -1, -1, -1]


def test_position_is_the_centre_as_a_fraction_of_the_volume():
    np.testing.assert_allclose(position(np.array([4, 0, 10]), (1, 20, 20), (9, 20, 40)), [0.5, 0.5, 0.5])


def test_a_batch_is_a_function_of_seed_and_step(cases):
    one, other = batches(cases), batches(cases)
    other[7]  # earlier draws do not matter
    assert torch.equal(one[5]["data"], other[5]["data"])
    assert not torch.equal(one[5]["data"], one[6]["data"])
    assert not torch.equal(one[5]["data"], batches(cases, seed=1)[5]["data"])


def test_ranks_share_the_batch_of_one_process(cases):
    whole = batches(cases)[2]
    parts = [batches(cases, share=share)[2] for share in ((0, 3), (3, 8))]
    for key in ("data", "positions"):
        assert torch.equal(torch.cat([p[key] for p in parts]), whole[key])
    both = [batches(cases, share=share, neighbours=True)[2]["data"].chunk(2) for share in ((0, 8), (0, 3), (3, 8))]
    for everyone, first, second in zip(*both, strict=True):
        assert torch.equal(torch.cat((first, second)), everyone)
    assert [name for p in parts for name in p["cases"]] == whole["cases"]


@pytest.mark.parametrize(
    "patch, shift", [((1, 24, 32), (1, 0, 0)), ((4, 8, 10), (2, 4, 5)), ((16, 64, 16), (8, 32, 8))]
)
def test_neighbours_are_next_to_their_patches(cases, patch, shift):
    """A neighbour is as far away as the volume allows on any axis. Without neighbours, the patches are the same."""
    batch, alone = batches(cases, patch, neighbours=True)[3], batches(cases, patch)[3]
    own, neighbours = batch["data"].chunk(2)
    assert torch.equal(own, alone["data"]) and torch.equal(batch["positions"], alone["positions"])
    for data, neighbour, where, name in zip(own, neighbours, batch["positions"], batch["cases"], strict=True):
        volume = blosc2.open(next(c.file for c in cases if c.name == name))[:]
        corner = np.round(where.numpy() * volume.shape[1:] - np.array(patch) / 2).astype(int)
        lowest, highest = (draw_corner(volume.shape[1:], patch, None, np.full(3, p)) for p in (0.0, 1.0))
        shifts = [sign * along for sign in (1, -1) for along in np.diag(shift) if along.any()]
        moved = [(np.clip(corner + one, lowest, highest), np.abs(one).sum()) for one in shifts]
        farthest = max(np.abs(other - corner).sum() / whole for other, whole in moved)
        possible = [other for other, whole in moved if np.abs(other - corner).sum() / whole == farthest]
        cut = [
            crop_and_pad_nd(volume, [[c, c + p] for c, p in zip(other, patch, strict=True)], 0) for other in possible
        ]
        cut = [values if patch[0] > 1 else values[:, 0] for values in cut]
        assert any(np.array_equal(neighbour.numpy(), values) for values in cut)
        assert not torch.equal(neighbour, data)


def test_a_patch_without_a_neighbour_is_its_own(tmp_path):
    volumes = np.zeros((2, 1, 3, 16, 16))
    volumes[0, :, 1] = np.random.default_rng(0).normal(size=(16, 16))
    empty_around = make_case(tmp_path, "sparse", volumes[0])
    single = make_case(tmp_path, "single", volumes[0, :, 1:2])
    for case in (empty_around, single):
        patches, neighbours = batches([case], (1, 16, 16), neighbours=True)[0]["data"].chunk(2)
        assert torch.equal(patches, neighbours)


def test_a_file_that_replaces_another_is_read_and_one_that_is_cut_short_is_not(tmp_path):
    file, other = tmp_path / "case.b2nd", tmp_path / "other.b2nd"
    blosc2.asarray(np.zeros((1, 2, 3, 4), np.float32), urlpath=str(file))
    assert not open_unchanged(str(file))[:].any()
    blosc2.asarray(np.ones((1, 5, 6, 7), np.float32), urlpath=str(other))
    other.replace(file)
    assert open_unchanged(str(file))[:].shape == (1, 5, 6, 7) and open_unchanged(str(file))[:].all()
    with open(file, "r+b") as stream:
        stream.truncate(10)
    with pytest.raises(OSError, match="now has 10"):
        open_unchanged(str(file))


def test_position_groups_are_positives(cases):
    batch = batches(cases, (4, 12, 12), n=30, group=3)[0]
    where = batch["positions"].reshape(10, 3, 3)
    within = (where[:, :, None] - where[:, None]).abs().amax((-1, -2, -3))
    assert (within < 0.25).all()  # the same relative place; centres differ with the size of the volume
    assert batches(cases, (4, 12, 12), n=32)[0]["positions"].reshape(8, 4, 3).std(1).mean() > 0.1


def test_patches_of_a_position_group_are_of_different_cases(cases):
    for step in range(20):
        chosen = [case for _, case, _ in Sampling((4, 12, 12), 9, 3, 0).draws(step, 4)]
        assert all(len(set(chosen[first : first + 3])) == 3 for first in (0, 3, 6))


def test_with_fewer_cases_than_a_group_has_no_patch_is_copied(cases):
    patches = batches(cases[:2], (4, 12, 12), n=9, group=3)[0]["data"].flatten(1)
    assert len(patches.unique(dim=0)) == 9


def test_constant_slices_are_not_drawn(tmp_path):
    volume = np.zeros((1, 10, 16, 16))
    volume[:, 4] = np.random.default_rng(0).normal(size=(16, 16))
    batch = batches([make_case(tmp_path, "sparse", volume)], (1, 16, 16), n=16)[0]
    assert (batch["data"].flatten(1).std(1) > 0).all()
    with pytest.raises(UserError, match=r"constant.*empty"):
        batches([make_case(tmp_path, "blank", np.zeros((1, 4, 16, 16)))], (1, 16, 16))[0]


def test_a_preprocessed_case_with_nan_or_infinite_values_is_named(tmp_path):
    """One such voxel spreads over the whole case in nnU-Net's normalisation, and nnU-Net does not stop."""
    for value in (np.nan, np.inf):
        volume = np.random.default_rng(0).normal(size=(1, 4, 16, 16))
        volume[0, 1, 3, 5] = value
        with pytest.raises(UserError, match=r"patient7\.b2nd.*case patient7"):
            batches([make_case(tmp_path, "patient7", volume)], (4, 16, 16))[0]


MIB = 2**20


@pytest.mark.parametrize(
    "batch, allowed, free, workers, prefetch",
    [
        (20 * MIB, 12, 64 * 2**30, 12, 2),  # a large machine, small batches: as many as nnU-Net uses
        (400 * MIB, 12, 64 * 2**30, 3, 1),  # large batches: two GiB at most are read ahead
        (20 * MIB, 12, 64 * MIB, 1, 1),  # a container's default
        (20 * MIB, 12, 30 * MIB, 1, 1),  # too little for any batch: the worker raises an error
        (20 * MIB, 0, 30 * MIB, 0, 0),  # no workers, no shared memory
    ],
)
def test_reading_ahead_is_bounded_by_memory(batch, allowed, free, workers, prefetch):
    reading = plan_reading(batch, allowed, free)
    assert (reading.workers, reading.prefetch) == (workers, prefetch)
    assert reading.needed == ((workers * prefetch + 2) * batch if workers else 0)


def test_numbers_of_a_step_come_with_its_batch(cases):
    batches = PretrainingBatches(cases, Sampling((1, 8, 8), 2, 1, 0), (0, 2), 9, draws=lambda step: [step])
    assert [batch["numbers"] for batch in load_batches(batches, 7, workers=0)] == [[7], [8]]
