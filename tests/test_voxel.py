"""Contrast of voxels: crops, common points of two crops, features at points, and the loss."""

import numpy as np
import pytest
import torch
from steps import batch, embeddings_of, model_of, recipe_of, unet

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.methods.base import Geometry, Progress, StepRandom
from nnunetv2_macl.methods.voxel import TwoCrops, Voxel, features_at
from nnunetv2_macl.views import RandomCrops

VOXEL = {"method": "voxel", "voxels": 64}
GEOMETRY = Geometry(0, 1, [1, 1], [32, 32], "")


def ramps(patches, size):
    """Return patches whose channels are the coordinates of the voxels, from -1 to 1, with the last axis first."""
    axes = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1]).expand(patches, *[-1] * (len(size) + 1))


@pytest.mark.parametrize("size", [(32, 48), (16, 32, 24)])
def test_shared_points_show_the_same_voxel_in_both_crops(size):
    views = TwoCrops(GEOMETRY, recipe_of(**VOXEL, intensity=0.0, zoom=[1.2, 2.0]))
    numbers = views.draw(StepRandom(0, 0, 8, slice(None), 1, size))
    shown = views.make(ramps(8, size), numbers, Progress(0, 1, 1))
    assert shown["first_points"].shape == (8, 8, len(size))
    for crop in ("first", "second"):
        assert shown[crop].shape == (8, len(size), *size)
        read = features_at([shown[crop]], shown[f"{crop}_points"])
        torch.testing.assert_close(read, numbers.points.double(), rtol=0, atol=1e-5)
    assert (shown["first_points"] - shown["second_points"]).abs().mean() > 0.1


def test_crops_lie_within_their_patch_and_overlap():
    crops, generator = RandomCrops([1.0, 2.0]), torch.Generator().manual_seed(0)
    first, second = (crops.draw(500, 3, generator) for _ in range(2))
    for drawn in (first, second):
        assert (drawn.centres.abs() + drawn.reaches.abs() <= 1 + 1e-6).all()
        assert 0.4 < (drawn.reaches < 0).float().mean() < 0.6
        zoom = 1 / drawn.reaches.abs()
        assert zoom.min() < 1.05 and 1.95 < zoom.max() <= 2 + 1e-6
    points = crops.draw_shared_points(first, second, 20, generator)
    for drawn in (first, second):
        assert drawn.locate(points).abs().max() <= 1 + 1e-5
    assert (RandomCrops([1.0, 2.0], mirroring=False).draw(50, 2, generator).reaches > 0).all()


@pytest.mark.parametrize("zoom", [[0.9, 1.5], [1.0, 2.5], [1.6, 1.2]])
def test_a_zoom_that_leaves_no_overlap_is_refused(zoom):
    with pytest.raises(ValueError, match="zoom"):
        RandomCrops(zoom)
    with pytest.raises(UserError, match="zoom"):
        recipe_of(**VOXEL, zoom=zoom)


def test_features_of_a_coarse_map_are_read_at_the_centres_of_its_blocks():
    image = torch.arange(8.0, dtype=torch.float64).expand(1, 1, 8, 8)
    small = torch.nn.functional.avg_pool2d(image, 2)
    points = torch.tensor([[[-0.5, 0.0], [0.0, 0.3], [0.25, -0.5]]], dtype=torch.float64)
    found = features_at([image, small], points)
    assert found.shape == (1, 3, 2)
    torch.testing.assert_close(found[..., 0], found[..., 1])


def test_the_loss_equals_its_equation():
    """The denominator of InfoNCE runs over all voxels of both crops of all images except the anchor."""
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 3, 4, 5))
    vectors = np.concatenate((first.reshape(12, 5), second.reshape(12, 5)))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = 0.0
    for anchor in range(24):
        positive = (anchor + 12) % 24
        others = sum(np.exp(vectors[anchor] @ vectors[j] / 0.2) for j in range(24) if j != anchor)
        expected -= np.log(np.exp(vectors[anchor] @ vectors[positive] / 0.2) / others) / 24
    recipe = recipe_of(**VOXEL, temperature=0.2, weight_voxel=3.0)
    (method,) = model_of(unet(), [32, 32], scale=[1, 1], recipe=recipe)
    embeddings = {"first": torch.from_numpy(first), "second": torch.from_numpy(second)}
    losses = method.losses(embeddings, torch.rand(3, 3), Progress(0, 1, 1))
    assert losses["voxel"].item() == pytest.approx(expected, rel=1e-9)
    assert losses["total"].item() == pytest.approx(3 * expected, rel=1e-9)


def test_the_loss_equals_that_of_lightly():
    lightly = pytest.importorskip("lightly.loss")
    model = model_of(unet(), [32, 32], scale=[1, 1], recipe=recipe_of(**VOXEL))
    embeddings = embeddings_of(model, batch(4, torch.float32)["data"])
    (method,) = model
    found = method.losses(embeddings, torch.rand(4, 3), Progress(0, 1, 1))["voxel"]
    expected = lightly.NTXentLoss(0.1)(embeddings["first"].flatten(0, 1), embeddings["second"].flatten(0, 1))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_features_contain_all_trained_levels():
    model = model_of(unet(), [32, 32], scale=[1, 1], recipe=recipe_of(**VOXEL), decoder_stages=2)
    (method,) = model
    numbers = method.views.draw(StepRandom(0, 0, 4, slice(None), 1, (32, 32)))
    features = method.encode(method.views.make(batch(4, torch.float32)["data"], numbers, Progress(0, 1, 1)))
    assert features["first"].shape == (4, 16, 16 + 12 + 8)
    assert all(part.std() > 0 for part in features["first"].split([16, 12, 8], -1))


def test_a_small_batch_compares_as_many_voxels_as_a_large_one():
    for patches, per_patch in ((2, 512), (32, 32), (5000, 1)):
        views = TwoCrops(GEOMETRY, recipe_of(method="voxel"))
        assert views.draw(StepRandom(0, 0, patches, slice(2), 1, (32, 32))).points.shape == (2, per_patch, 2)
    references = Voxel.reference_lines(recipe_of(**VOXEL), 4, {})
    assert references["collapse"] == pytest.approx(np.log(127))


def test_by_default_all_decoder_stages_but_the_last_are_trained():
    strides = [[1, 1], *[[2, 2]] * 4]
    geometry = Voxel.plan_geometry([64, 48], strides, recipe_of(**VOXEL))
    assert (geometry.decoder_stages, geometry.patch_size, geometry.scale) == (3, [64, 48], [1, 1])
    assert Voxel.plan_geometry([64, 48], strides, recipe_of(**VOXEL, decoder_stages=1)).decoder_stages == 1
    # a transformer has one map, and no decoder stage that could be trained
    assert Voxel.plan_geometry([64, 64], [[16, 16]], recipe_of(**VOXEL)).decoder_stages == 0
    with pytest.raises(UserError, match="at most 4"):
        Voxel.plan_geometry([64, 48], strides, recipe_of(**VOXEL, decoder_stages=5))
