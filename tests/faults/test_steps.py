"""Steps without a finite loss or gradient are skipped, counted and harmless."""

import math

import pytest
import torch
from steps import batch, recipe_of, training_step

from nnunetv2_macl.training.epoch_log import Epoch, EpochSums, log_keys


def state(step):
    return {key: value.clone() for key, value in step.model.state_dict().items()}


@pytest.mark.parametrize("at_once", [4, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("scaler", [False, True])
def test_a_step_without_a_finite_gradient_changes_nothing(value, scaler, at_once):
    step = training_step(4, at_once, recipe_of(auxiliary_encoder="ema"), dtype=torch.float32)
    if scaler:
        step.grad_scaler = torch.amp.GradScaler("cpu")
    step(batch(4, torch.float32), 0)
    before, rate = state(step), step.scheduler.last_epoch
    bad = batch(4, torch.float32)
    bad["data"][1] *= value
    if value == 1e38:  # the images are finite, but the gradient explodes
        bad["data"][1] = torch.randn_like(bad["data"][1]) * 3e38
        bad["data"][1, :, ::2] *= -1
    step(bad, 1)
    assert step.skipped_in_a_row == 1 and step.scheduler.last_epoch == rate + 1
    after = state(step)
    assert all(torch.equal(before[key], after[key]) for key in before)
    step(batch(4, torch.float32), 2)
    assert step.skipped_in_a_row == 0
    assert any(not torch.equal(before[key], value) for key, value in state(step).items())


def test_an_epoch_counts_skipped_steps_and_leaves_them_out_of_the_means():
    sums = EpochSums(seconds=2.0)
    measured = {"total": 3.0, "global": 3.0, "positives": 1.0}
    sums.add(measured, skipped=False)
    sums.add({"total": math.nan, "global": math.nan, "positives": 1.0}, skipped=True)
    sums.add(measured | {"total": 5.0}, skipped=False)
    epoch = Epoch(0, 2, 4, sums, recipe_of())
    values = epoch.log_values(log_keys(recipe_of(), []))
    assert values["train_losses"] == 4.0 and values["skipped_steps"] == 1 and values["patches_per_second"] == 6
    assert "loss 4.0000" in epoch.line() and "skipped 1 steps" in epoch.line()
    none = EpochSums(seconds=1.0)
    none.add({"total": math.nan}, skipped=True)
    epoch = Epoch(0, 2, 4, none, recipe_of())
    assert math.isnan(epoch.log_values(log_keys(recipe_of(), []))["train_losses"]) and "skipped 1" in epoch.line()
