"""DiRA: distortions, restoration by the whole decoder, and the adversary."""

import pytest
import torch
from steps import batch, recipe_of, training_step

from nnunetv2_macl.losses import queue_contrast
from nnunetv2_macl.methods.base import Progress
from nnunetv2_macl.methods.dira import DiRA, PatchAdversary, _DistortedViews

SMALL = {"method": "dira", "queue_length": 8, "optimizer": "adamw", "learning_rate": 0.01}


def step_of(at_once=4, **values):
    values = dict(num_epochs=2, num_iterations_per_epoch=1) | values
    step = training_step(4, at_once, recipe_of(**SMALL | values))
    (method,) = step.methods
    return step, method


def weights(module):
    return {name: values.clone() for name, values in module.named_parameters()}


def is_moved(before, module):
    return {not torch.equal(values, before[name]) for name, values in module.named_parameters() if values.ndim > 1}


def test_only_its_own_loss_trains_the_adversary():
    _, method = step_of()
    images, restored = torch.randn(2, 3, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    restored.requires_grad_()
    # The network's loss passes through the adversary without a gradient of the adversary's weights.
    method.adversary.error(restored, 1, fixed=True).sum().backward()
    assert restored.grad.norm() > 0
    assert all(weight.grad is None for weight in method.adversary.parameters())
    # Fixing the weights does not change the value.
    torch.testing.assert_close(method.adversary.error(restored, 1, fixed=True), method.adversary.error(restored, 1))
    expected = (method.adversary(images) - 1).square().mean((1, 2, 3))
    torch.testing.assert_close(method.adversary.error(images, 1), expected)


def test_each_loss_has_gradients_only_in_its_own_modules():
    step, method = step_of()
    views = step.show(batch(4)["data"], 0)["dira"]
    features = method.encode(views)
    sides = {"network": method.network, "head": method.restoration_head, "adversary": method.adversary}

    def reached(name):
        step.model.zero_grad(set_to_none=True)
        features[name].sum().backward(retain_graph=True)
        return {side for side, module in sides.items() if any(p.grad is not None for p in module.parameters())}

    assert reached("patch_restoration") == reached("adversary") == {"network", "head"}
    assert reached("discriminator") == {"adversary"}
    assert reached("query") == {"network"} and not features["key"].requires_grad


@pytest.mark.parametrize("at_once", [4, 3])
def test_the_adversary_is_trained_from_the_second_half_on(at_once):
    step, method = step_of(at_once)
    before = weights(method.adversary)
    first = step(batch(4), 0)
    assert is_moved(before, method.adversary) == {False}
    assert first["total"] == pytest.approx(first["queue"] + 10 * first["patch_restoration"])
    second = step(batch(4), 1)
    assert is_moved(before, method.adversary) == {True}
    parts = {"queue": 1, "patch_restoration": 10, "adversary": 0.001, "discriminator": 1}
    assert second["total"] == pytest.approx(sum(weight * second[name] for name, weight in parts.items()))


def test_the_losses_equal_their_equations():
    step, method = step_of()
    views = step.show(batch(4)["data"], 0)["dira"]
    features = method.encode(views)
    found = method.losses(method.project(features), torch.zeros(4, 3), Progress(1, 2, 1))
    restored = method.restoration_head(method.network.decode(method.network.encode(views["first"]))[-1])
    real, fake = (method.adversary(images) for images in (views["target"], restored))
    expected = {
        "patch_restoration": (restored - views["target"]).square().mean(),
        "adversary": (fake - 1).square().mean(),
        "discriminator": ((real - 1).square().mean() + fake.square().mean()) / 2,
        "queue": queue_contrast(
            method.head(features["query"]), method.momentum_head(features["key"]), method.queue.vectors, 0.2
        ),
    }
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-9), name


def test_the_whole_decoder_is_trained():
    geometry = DiRA.plan_geometry([32, 32], [[1, 1], [2, 2], [2, 2], [2, 2]], recipe_of(method="dira"))
    assert geometry.decoder_stages == 3 and geometry.patch_size == [32, 32]


def test_blocks_are_cut_out_and_shuffled():
    step, _ = step_of()
    recipe = recipe_of(**SMALL, distorted_share=0.25)
    views = _DistortedViews(step.plan.geometry, recipe, (8, 8))
    images = torch.arange(1.0, 17).repeat(2, 1).view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    orders = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)])
    found = views.distort(images, orders)[:, 0, ::8, ::8].flatten(1)
    for row, order in zip(found, orders, strict=True):
        expected = torch.arange(1.0, 17)
        expected[order[4:8]] = expected[order[4:8].roll(1)]
        expected[order[:4]] = 0
        torch.testing.assert_close(row, expected)
    nothing = _DistortedViews(step.plan.geometry, recipe_of(**SMALL, distorted_share=0.0), (8, 8))
    assert nothing.distort(images, orders) is images


def test_splitting_into_blocks_keeps_the_voxels():
    step, _ = step_of()
    views = _DistortedViews(step.plan.geometry, recipe_of(**SMALL), (8, 4))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    blocks = views._blocks(images)
    torch.testing.assert_close(blocks[:, 9], images[:, :, 8:16, 4:8].flatten(1))
    torch.testing.assert_close(views._images(blocks, images.shape), images)


@pytest.mark.parametrize("size", [(32, 32), (4, 6), (5, 32, 32), (64, 64, 64)])
def test_an_adversary_fits_any_patch(size):
    places = PatchAdversary(2, size)(torch.randn(1, 2, *size)).shape
    assert places[:2] == (1, 1) and min(places[2:]) >= min(4, *size)


def test_the_target_is_the_first_view_without_intensity_changes():
    step, method = step_of(intensity=0.0, distorted_share=0.0)
    views = method.views.make(batch(4)["data"], step.draws(0)["dira"], Progress(0, 1, 1))
    torch.testing.assert_close(views["target"], views["first"])
    assert not torch.allclose(views["target"], views["second"])
