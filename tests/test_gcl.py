"""GCL: contrast by partitions of volumes, and contrast of regions with a frozen encoder."""

import math

import numpy as np
import pytest
import torch
from steps import batch, model_of, recipe_of, training_step, unet

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.losses import PartitionContrastiveLoss, region_contrast
from nnunetv2_macl.methods.base import Progress
from nnunetv2_macl.methods.gcl import GCL, GCLImage, RegionHead
from nnunetv2_macl.recipe import check_values

TEMPERATURE = 0.1


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair_loss(anchor, positive, negatives):
    """Return -log of the softmax of the positive among itself and the negatives, as in Eq. 1 and 3."""

    def similarity(a, b):
        return math.exp(a @ b / np.linalg.norm(a) / np.linalg.norm(b) / TEMPERATURE)

    found = similarity(anchor, positive)
    return -math.log(found / (found + sum(similarity(anchor, other) for other in negatives)))


def test_images_of_one_partition_are_positives_and_never_negatives():
    first, second = vectors(6, 8), vectors(6, 8, seed=1)
    places = [0.1, 0.2, 0.3, 0.6, 0.9, 1.0]
    part = [0, 0, 1, 2, 3, 3] * 2
    both = np.concatenate((first, second))
    losses = []
    for i in range(12):
        others = [both[k] for k in range(12) if part[k] != part[i]]
        losses += [pair_loss(both[i], both[j], others) for j in range(12) if j != i and part[j] == part[i]]
    positions = torch.tensor([[place, 0.7, 0.2] for place in places])
    found = PartitionContrastiveLoss(4, TEMPERATURE)(first, second, positions)
    assert found.item() == pytest.approx(np.mean(losses), rel=1e-9)


def test_the_negatives_of_a_region_are_the_next_regions_in_both_maps():
    first, second = vectors(2, 7, 8), vectors(2, 7, 8, seed=1)
    losses = []
    for maps in zip(first.numpy(), second.numpy(), strict=True):
        for one, other in (maps, maps[::-1]):
            for region in range(7):
                behind = [(region + step) % 7 for step in range(1, 4)]
                losses.append(pair_loss(one[region], other[region], [values[k] for values in maps for k in behind]))
    assert region_contrast(first, second, 3, TEMPERATURE).item() == pytest.approx(np.mean(losses), rel=1e-9)


def test_without_a_negative_there_is_no_loss_and_no_gradient():
    first = vectors(3, 8).requires_grad_()
    loss = PartitionContrastiveLoss(4, TEMPERATURE)(first, vectors(3, 8, seed=1), torch.full((3, 3), 0.5))
    loss.backward()
    assert loss.item() == 0 and not first.grad.any()


def test_reference_lines_equal_the_loss_in_these_states():
    recipe, positions = recipe_of(method="gcl_image"), torch.tensor([[0.1] * 3, [0.4] * 3, [0.9] * 3])
    same = torch.ones(3, 8, dtype=torch.float64)
    loss = PartitionContrastiveLoss(4, TEMPERATURE)
    lines = GCLImage.reference_lines(recipe, 3, {"positives": 1.0, "negatives": 4.0})
    assert lines["collapse"] == pytest.approx(loss(same, same, positions).item(), rel=1e-9)
    apart = torch.eye(3, dtype=torch.float64)
    assert lines["all_found"] == pytest.approx(loss(apart, apart, positions).item(), abs=1e-3)


def test_patches_that_are_all_in_one_partition_are_reported():
    lines = GCLImage.reference_lines(recipe_of(method="gcl_image"), 8, {})
    reasons = GCLImage.collapse_reasons({"partition": 0.0, "negatives": 0.2}, {}, lines)
    assert "0.20 negatives" in reasons[0]
    assert not GCLImage.collapse_reasons({"partition": 0.1, "negatives": 9.0}, {}, lines)
    # the second half of GCL has regions, and no partitions
    assert not GCL.collapse_reasons({"region": 0.3, "negatives": 0.2}, {}, lines)


def test_a_region_is_flattened_before_the_linear_layer():
    head = RegionHead(2, 4, 3, 2).double()
    maps = vectors(1, 2, 7, 9)
    convolved = head[2](head[1](head[0](maps)))
    cells = [
        convolved[:, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3] for row in range(2) for column in range(3)
    ]
    expected = torch.stack([cell.flatten(1) @ head[3].weight.flatten(1).T for cell in cells], 1)
    torch.testing.assert_close(head(maps), expected)


@pytest.mark.parametrize("method, at_once", [("gcl", 4), ("gcl", 2), ("gcl+restoration", 4)])
@pytest.mark.parametrize("epochs, steps", [(2, 1), (1, 2)])
def test_the_second_half_trains_only_the_decoder(method, at_once, epochs, steps):
    lengths = {"num_epochs": epochs, "num_iterations_per_epoch": steps}
    recipe = recipe_of(method=method, optimizer="adamw", learning_rate=0.1, weight_decay=0.1, **lengths)
    step = training_step(4, at_once, recipe)
    moved = []
    for number in range(2):
        before = {name: values.clone() for name, values in step.model.network.state_dict().items()}
        step(batch(4), number)
        now = step.model.network.state_dict()
        moved.append({name.partition(".")[0] for name, values in before.items() if not torch.equal(values, now[name])})
    assert moved == [
        {"encoder"} if method == "gcl" else {"encoder", "transpconvs", "stages"},
        {"transpconvs", "stages"},
    ]


def test_views_of_regions_differ_only_in_their_intensities():
    recipe = recipe_of(method="gcl", intensity=1e-6)
    (method,) = model_of(unet(), [32, 32], recipe, scale=[1, 1])
    step = training_step(4, 4, recipe)
    patches, numbers = batch(4)["data"], step.draws(0)["gcl"]
    views = method.views.make(patches, numbers, Progress(1, 2, 1))
    for name in ("first", "second"):
        # The tolerance is for blur, which does not depend on the strength.
        torch.testing.assert_close(views[name].mean((1, 2, 3)), patches.mean((1, 2, 3)), rtol=0, atol=0.05)
    assert all(len(set(regions.tolist())) == 13 for regions in views["regions"])


def test_the_region_level_needs_a_decoder():
    with pytest.raises(UserError, match="gcl_image"):
        training = recipe_of(method="gcl", decoder_stages=0)
        GCL.plan_geometry([32, 32], [[1, 1], [2, 2], [2, 2]], training)


def test_a_value_is_valid_if_one_of_several_methods_allows_it():
    """GCL needs intensity changes, and other methods do not."""
    check_values({"intensity": 0.0}, "test")
    check_values({"intensity": 0.0, "method": "simclr"}, "test")
    with pytest.raises(UserError, match="intensity"):
        check_values({"intensity": 0.0, "method": "gcl"}, "test")
    with pytest.raises(UserError, match="intensity"):
        check_values({"intensity": 9.0}, "test")
