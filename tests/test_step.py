"""A training step in parts equals the same step at once; learning rate, mixed precision and compilation."""

import shutil

import pytest
import torch
from steps import batch, gradients, recipe_of, training_step
from torch import nn

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.factory import load_optimizer, lr_factor
from nnunetv2_macl.training.step import TrainingStep

PATCHES = 7


def test_a_batch_in_parts_has_the_gradient_of_the_whole_with_an_independent_encoder():
    """The recipes of tests/test_contract.py do not include this encoder."""
    recipe = recipe_of(own_view_weight=0.5, auxiliary_encoder="independent")
    whole, cut = (training_step(PATCHES, at_once, recipe) for at_once in (PATCHES, 3))
    measured = whole(batch(PATCHES), 0), cut(batch(PATCHES), 0)
    assert measured[0] == pytest.approx(measured[1], rel=1e-9)
    wanted, got = gradients(whole), gradients(cut)
    assert wanted.keys() == got.keys() and any(gradient.any() for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    for (name, one), (_, other) in zip(whole.model.named_buffers(), cut.model.named_buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)  # running statistics of the projectors


def test_a_batch_in_parts_has_nearly_the_gradient_of_the_whole_in_float32():
    whole, cut = (training_step(64, at_once, dtype=torch.float32) for at_once in (64, 8))
    whole(batch(64, torch.float32), 0)
    cut(batch(64, torch.float32), 0)
    for name, gradient in gradients(whole).items():
        difference = (gradients(cut)[name] - gradient).norm() / gradient.norm()
        # the gradient of a bias before a norm is only rounding error
        assert difference < 1e-5 or gradient.norm() < 1e-5, name


def test_the_second_training_stage_does_not_change_the_encoder():
    recipe = recipe_of(training_stages=2, num_epochs=2, num_iterations_per_epoch=1, weight_decay=0.0)
    for at_once in (PATCHES, 3):
        step = training_step(PATCHES, at_once, recipe)
        before = {name: p.clone() for name, p in step.model.named_parameters()}
        step(batch(PATCHES), 1)  # the second epoch trains only the decoder
        changed = {name.split(".")[1] for name, p in step.model.named_parameters() if not torch.equal(p, before[name])}
        assert "encoder" not in changed and "stages" in changed
    step = training_step(PATCHES, PATCHES, recipe_of(**recipe.as_dict() | {"auxiliary_encoder": "independent"}))
    before = {name: p.clone() for name, p in step.model.named_parameters()}
    step(batch(PATCHES), 1)
    assert not [n for n, p in step.model.named_parameters() if "encoder" in n and not torch.equal(p, before[n])]


@pytest.mark.parametrize("downsamples, first", [(True, {"global", "equivariance"}), (False, {"global"})])
def test_a_training_stage_measures_only_the_losses_that_it_trains(downsamples, first):
    """An untrained loss stays at its value at collapse, so a healthy run would count as collapsed."""
    values = {"downsample_first_stage": downsamples, "num_epochs": 2, "num_iterations_per_epoch": 1}
    step = training_step(PATCHES, PATCHES, recipe_of(training_stages=2, **values))
    losses = [step(batch(PATCHES), number).keys() & step.recipe.losses.keys() for number in (0, 1)]
    assert losses == [first, {"dense"}]


@pytest.mark.parametrize("weight", ["weight_global", "weight_dense"])
def test_one_level_alone_has_one_training_stage(weight):
    recipe = recipe_of(training_stages=2, num_epochs=2, num_iterations_per_epoch=1, **{weight: 0.0})
    step = training_step(PATCHES, PATCHES, recipe)
    step(batch(PATCHES), 1)
    assert any(name.startswith("network.encoder.") and gradient.any() for name, gradient in gradients(step).items())


@pytest.mark.parametrize("at_once", [PATCHES, 3])
def test_a_first_stage_without_downsampling_shows_full_views_and_trains_the_global_loss(at_once):
    recipe = recipe_of(training_stages=2, downsample_first_stage=False, num_epochs=2, num_iterations_per_epoch=1)
    step, whole = (training_step(PATCHES, n, recipe) for n in (at_once, PATCHES))
    views = [step.show(batch(PATCHES)["data"], number)["macl"] for number in (0, 1)]
    sizes = [[group.shape[-1] for group in shown.values()] for shown in views]
    assert sizes == [[16, 32, 32, 32], [16, 32, 16, 32]]
    step(batch(PATCHES), 0)
    trained = {name for name, gradient in gradients(step).items() if gradient.any()}
    assert any(name.startswith("network.encoder.") for name in trained) and "network.stages" in str(trained)
    assert not any(name.startswith("methods.macl.pixel_projector") for name in trained)
    # L_ER does not contribute, so the gradient is that of the global loss
    whole.methods[0].loss.weights["equivariance"] = 100.0
    whole(batch(PATCHES), 0)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(step)[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_the_learning_rate_rises_and_falls():
    recipe = recipe_of(num_epochs=10, num_iterations_per_epoch=10, learning_rate_warmup=0.1)
    shares = [lr_factor(recipe, step) for step in range(101)]
    assert shares[0] == pytest.approx(1 / 11) and max(shares) == shares[10] == 1.0
    assert shares[:10] == sorted(shares[:10]) and shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[100] == pytest.approx(0)


@pytest.mark.parametrize(
    "spoil, scale", [(None, 1024.0), ("loss", 1024.0), ("gradient", 512.0)], ids=["good", "the loss", "its gradient"]
)
def test_only_a_gradient_that_is_not_finite_lowers_the_scale_of_mixed_precision(spoil, scale):
    """Otherwise a bad image, seen again and again, would lower the scale until gradients vanish."""
    step = training_step(PATCHES, PATCHES, recipe_of(), dtype=torch.float32)
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    patches = batch(PATCHES, torch.float32)
    if spoil == "loss":
        patches["data"][0, 0, 3, 4] = torch.nan
    if spoil == "gradient":
        next(step.model.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    before = [p.clone() for p in step.model.parameters()]
    step(patches, 0)
    assert step.grad_scaler.get_scale() == scale
    assert step.was_skipped == (spoil is not None)
    # a scale that is still too large explains a gradient that is not finite
    assert step.skipped_in_a_row == (spoil == "loss")
    moved = any(not torch.equal(p, old) for p, old in zip(step.model.parameters(), before, strict=True))
    assert moved == (spoil is None)


def test_steps_without_a_finite_gradient_count_once_the_scale_is_small():
    step = training_step(PATCHES, PATCHES, recipe_of(), dtype=torch.float32)
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    next(step.model.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    in_a_row = []
    for number in range(5):
        step(batch(PATCHES, torch.float32), number)
        in_a_row.append(step.skipped_in_a_row)
    # the scale falls from 8 to 1 in three steps
    assert in_a_row == [0, 0, 0, 1, 2]


@pytest.mark.parametrize("norm, refused", [(nn.BatchNorm2d, True), (nn.InstanceNorm2d, False)])
def test_a_network_that_mixes_patches_is_refused_in_parts(norm, refused):
    training_step(PATCHES, PATCHES, norm=norm)
    if refused:
        with pytest.raises(UserError, match=r"patches_at_once is 3 .* 7 .*batch norm"):
            training_step(PATCHES, 3, norm=norm)
    else:
        training_step(PATCHES, 3, norm=norm)


RESTORATION = recipe_of(weight_global=0.0, weight_dense=0.0, weight_equivariance=0.0, weight_restoration=1.0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize(
    "recipe, at_once", [(RESTORATION, PATCHES), (RESTORATION, 3), (recipe_of(), 3), (recipe_of(), PATCHES)]
)
def test_a_compiled_step_has_the_same_losses(recipe, at_once):
    plain, compiled = (training_step(PATCHES, at_once, recipe, dtype=torch.float32) for _ in range(2))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = TrainingStep(
        torch.compile(compiled.model), compiled.optimizer, compiled.scheduler, None, compiled.plan, compiled.device
    )
    measured = plain(batch(PATCHES, torch.float32), 0), compiled(batch(PATCHES, torch.float32), 0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)


@pytest.mark.parametrize("saved_fused, fused", [(None, True), (True, None)])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_loaded_optimiser_keeps_its_own_implementation(name, saved_fused, fused):
    """The checkpoint may be of another device or an earlier version."""
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    weights = [torch.zeros(3, requires_grad=True) for _ in range(2)]
    saved, optimizer = (kinds[name]([w], lr=0.1, fused=f) for w, f in zip(weights, (saved_fused, fused), strict=True))
    weights[0].grad = torch.ones(3)
    saved.step()
    load_optimizer(optimizer, saved.state_dict())
    assert optimizer.param_groups[0]["fused"] == fused
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(weights[1].sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert (weights[1] < 0).all()
