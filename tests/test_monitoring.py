"""Detection of collapse, statistics and pictures."""

import math

import pytest
import torch
from steps import batch, recipe_of, training_step

from nnunetv2_macl import monitoring
from nnunetv2_macl.losses import PositionalContrastiveLoss, ReferenceValues
from nnunetv2_macl.methods.registry import loss_labels
from nnunetv2_macl.methods.statistics import batch_rank, embedding_variance, feature_statistics

PATCHES = 32


def references(positives=3.0, patches=PATCHES):
    return ReferenceValues(**monitoring.reference_lines(recipe_of(), patches, {"positives": positives}))


def reason_of(means, before, steps=250, positives=3.0):
    return monitoring.collapse_reason(recipe_of(), PATCHES, {"positives": positives} | means, before, steps)


def test_a_loss_that_stays_at_the_collapse_value_is_a_collapse():
    at = references().collapse
    reason = reason_of({"global": at, "dense": 3.0}, {"global": at + 0.01})
    assert "L_g" in reason and "L_d" not in reason and f"{at:.3f}" in reason


def test_a_loss_that_falls_through_the_collapse_value_is_no_collapse():
    at = references().collapse
    assert reason_of({"global": at + 0.2}, {"global": at + 0.4}) is None
    assert reason_of({"global": at - 0.4}, {"global": at - 0.4}) is None
    assert reason_of({"global": at}, {}, steps=5) is None  # the first steps are not judged
    assert reason_of({"dense": at + 0.2}, {"dense": math.nan}) is None  # the first epoch of a second training stage


def test_a_loss_near_the_collapse_value_with_many_positives_is_no_collapse():
    """With 12 positives, a network that matches only the other view of a patch has a loss near the collapse value."""
    lines = references(positives=12)
    assert lines.collapse - lines.own_view_only < 0.15
    assert reason_of({"global": lines.own_view_only}, {}, positives=12) is None


def test_a_contrast_that_learns_slowly_beside_restoration_is_no_collapse():
    line = references(positives=1).collapse
    means = {"global": line, "dense": line, "positives": 1.0, "embedding_variance": 0.4, "embedding_rank": 5.0}
    alone, joined = (recipe_of(method=method) for method in ("macl", "macl+restoration"))
    assert monitoring.collapse_reason(alone, PATCHES, means, means, 100)
    assert monitoring.collapse_reason(joined, PATCHES, means, means, 100) is None
    assert monitoring.collapse_reason(joined, PATCHES, means | {"embedding_variance": 1e-4}, means, 100)


def test_embeddings_that_do_not_vary_are_a_collapse():
    alike = torch.randn(1, 16).expand(32, 16) + 1e-4 * torch.randn(32, 16)
    variance = embedding_variance(alike).item()
    assert variance < 1e-3
    assert "do not vary" in reason_of({"embedding_variance": variance}, {}, steps=100)
    assert embedding_variance(torch.randn(512, 64)).item() > 0.95


@pytest.mark.parametrize("method", ["macl", "restoration", "moco", "byol", "simsiam", "simtriplet"])
def test_embeddings_in_one_direction_are_a_collapse_for_every_method(method):
    torch.manual_seed(0)
    line = torch.randn(1, 16) + 0.3 * torch.linspace(-1, 1, 32)[:, None] * torch.randn(1, 16)
    assert batch_rank(line).item() < 1.05 < 10 < batch_rank(torch.randn(32, 64)).item()
    means = {"embedding_variance": 0.3, "embedding_rank": 1.02}
    recipe = recipe_of(method=method)
    assert "one direction" in monitoring.collapse_reason(recipe, PATCHES, means, {}, 100)
    # the embeddings of two patches always vary in one direction only
    assert monitoring.collapse_reason(recipe, 2, means, {}, 100) is None


def test_equal_maps_have_no_variance_between_images_but_a_normal_scale():
    torch.manual_seed(0)
    one = torch.randn(1, 8, 4, 4)
    rms, between = feature_statistics(one.expand(16, -1, -1, -1))
    assert rms.item() == pytest.approx(1, abs=0.2) and between.item() < 1e-6
    _, between = feature_statistics(torch.randn(16, 8, 4, 4))
    assert between.item() == pytest.approx(1, abs=0.1)


def test_the_number_of_positives_is_that_of_the_loss():
    positions = torch.tensor([0.0, 0.05, 0.5, 0.9])
    step = training_step(4, 4)
    step(batch(4) | {"positions": positions[:, None].expand(-1, 3)}, 0)
    method = step.methods[0]
    method.loss.threshold = 0.1
    assert method.measure({}, positions)["positives"] == pytest.approx((3 + 3 + 1 + 1) / 4)
    # with equal embeddings, the loss equals the reference value of collapse
    alike = torch.ones(4, 3)
    assert PositionalContrastiveLoss()(alike, alike, positions).item() == pytest.approx(references(patches=4).collapse)


def test_the_advice_names_recipe_keys():
    advice = monitoring.collapse_advice(recipe_of(own_view_weight=0.0, standardise_projector=False))
    for key in ("own_view_weight", "threshold_warmup", "standardise_projector", "weight_equivariance"):
        assert key in advice


def test_pictures_are_written(tmp_path):
    names = ("collapse", "own_view_only", "all_found")
    log = {"lrs": [0.1, 0.05], "embedding_variance": [0.5, 0.6], "patches_per_second": [10.0, 11.0]}
    log |= {f"train_losses/{name}": [5.0, 4.0] for name in loss_labels()}
    log |= {f"references/{name}": [v, v] for name, v in zip(names, (5.9, 4.0, 1.1), strict=True)}
    monitoring.plot_progress(log, tmp_path / "progress.png", "title")
    groups = {"dominant": torch.randn(4, 1, 8, 8), "auxiliary": torch.randn(4, 1, 4, 16, 16)}
    monitoring.plot_views(groups, torch.rand(4, 3), ["a", "cost_$x^$y", "c", r"\frac"], 0.1, tmp_path / "views.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("progress", "views"))
    assert math.isfinite(references().all_found)
