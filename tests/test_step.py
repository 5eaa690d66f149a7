"""A training step computed in parts against the same step computed at once."""

import pytest
import torch
from steps import batch, gradients, training_step

from nnunetv2_macl.recipe import Recipe
from nnunetv2_macl.training.step import learning_rate_share

PATCHES = 7


@pytest.mark.parametrize("auxiliary_encoder", ["shared", "ema", "independent"])
@pytest.mark.parametrize("at_once", [1, 3, 6])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(at_once, auxiliary_encoder):
    recipe = Recipe(own_view_weight=0.5, auxiliary_encoder=auxiliary_encoder)
    whole, cut = training_step(PATCHES, PATCHES, recipe), training_step(PATCHES, at_once, recipe)
    measured = whole(batch(PATCHES), 0), cut(batch(PATCHES), 0)
    assert measured[0] == pytest.approx(measured[1], rel=1e-9)
    wanted, got = gradients(whole), gradients(cut)
    assert wanted.keys() == got.keys() and any(gradient.any() for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    for (name, one), (_, other) in zip(whole.module.named_buffers(), cut.module.named_buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)  # running statistics of the projectors


def test_a_batch_in_parts_in_float32():
    whole, cut = (training_step(64, at_once, dtype=torch.float32) for at_once in (64, 8))
    whole(batch(64, torch.float32), 0)
    cut(batch(64, torch.float32), 0)
    for name, gradient in gradients(whole).items():
        difference = (gradients(cut)[name] - gradient).norm() / gradient.norm()
        # a bias before a norm has no gradient but rounding
        assert difference < 1e-5 or gradient.norm() < 1e-5, name


def test_two_stages_train_one_part_at_a_time_also_in_parts():
    recipe = Recipe(training_stages=2, num_epochs=2, num_iterations_per_epoch=1, weight_decay=0.0)
    for at_once in (PATCHES, 3):
        step = training_step(PATCHES, at_once, recipe)
        before = {name: p.clone() for name, p in step.module.named_parameters()}
        step(batch(PATCHES), 1)  # the second epoch: the decoder's
        changed = {name.split(".")[0] for name, p in step.module.named_parameters() if not torch.equal(p, before[name])}
        assert "encoder" not in changed and "decoder_stages" in changed


def test_the_learning_rate_rises_and_falls():
    recipe = Recipe(num_epochs=10, num_iterations_per_epoch=10, learning_rate_warmup=0.1)
    shares = [learning_rate_share(recipe, step) for step in range(101)]
    assert shares[0] == pytest.approx(1 / 11) and max(shares) == shares[10] == 1.0
    assert shares[:10] == sorted(shares[:10]) and shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[100] == pytest.approx(0)
