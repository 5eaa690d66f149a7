"""Compare the losses with published numbers, with a loop written from the equations, and with each other."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nnunetv2_macl import losses
from nnunetv2_macl.losses import (
    DenseContrastiveLoss,
    EquivarianceLoss,
    LocationContrastiveLoss,
    MultiLevelContrastiveLoss,
    PositionalContrastiveLoss,
    contrast,
    positive_mask,
    positive_weights,
    reference_values,
)
from nnunetv2_macl.losses.fused import FusedContrast

# Losses and gradients of the published implementation for random vectors.
REFERENCE = Path(__file__).parent / "data" / "loss_vectors.npz"


def loop(dominant, auxiliary, positions, threshold, temperature, own_view_weight=0.0):
    """Return L_g computed directly from the equations, without the base temperature."""
    vectors = np.concatenate([dominant, auxiliary])
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    positions = np.concatenate([positions.reshape(len(positions), -1)] * 2)
    n = len(dominant)
    per_anchor = []
    for i in range(2 * n):
        others = [j for j in range(2 * n) if j != i]
        similarity = {j: vectors[i] @ vectors[j] / temperature for j in others}
        denominator = np.log(sum(np.exp(similarity[j]) for j in others))
        own = (i + n) % (2 * n)
        positives = [j for j in others if j == own or np.abs(positions[i] - positions[j]).max() < threshold]
        mean = np.mean([denominator - similarity[j] for j in positives])
        per_anchor.append(own_view_weight * (denominator - similarity[own]) + (1 - own_view_weight) * mean)
    return np.mean(per_anchor)


@pytest.mark.parametrize("case", range(3))
def test_losses_and_gradients_equal_the_published_implementation(case):
    with np.load(REFERENCE) as file:
        ref = {key.split("/")[1]: file[key] for key in file.files if key.startswith(f"{case}/")}
    inputs = [torch.tensor(ref[k], requires_grad=True) for k in ("aux_global", "dom_global", "aux_dense", "dom_dense")]
    positions = torch.tensor(ref["positions"])
    settings = dict(temperature=float(ref["temperature"]), threshold=float(ref["threshold"]))
    loss_global = PositionalContrastiveLoss(**settings)(inputs[1], inputs[0], positions)
    loss_dense = DenseContrastiveLoss(**settings)(inputs[3], inputs[2], positions)
    assert loss_global.item() == pytest.approx(float(ref["loss_global"]), abs=1e-9)
    assert loss_dense.item() == pytest.approx(float(ref["loss_dense"]), abs=1e-9)
    gradients = torch.autograd.grad(loss_global + 0.5 * loss_dense, inputs)
    norms = [gradient.norm().item() for gradient in gradients]
    np.testing.assert_allclose(norms, ref["grad_norms"], rtol=0, atol=1e-9)


def test_location_loss_equals_its_equation():
    rng = np.random.default_rng(0)
    dominant, auxiliary = rng.normal(size=(2, 3, 5, 2, 4))
    expected = [
        loop(one.reshape(5, 8).T, other.reshape(5, 8).T, np.zeros(8), 0.0, 0.2)
        for one, other in zip(dominant, auxiliary, strict=True)
    ]
    got = LocationContrastiveLoss(0.2, None)(torch.tensor(dominant), torch.tensor(auxiliary))
    assert got.item() == pytest.approx(np.mean(expected), abs=1e-12)
    scaled = LocationContrastiveLoss(0.2, 0.1)(torch.tensor(dominant), torch.tensor(auxiliary))
    assert scaled.item() == pytest.approx(2 * np.mean(expected), abs=1e-12)


@pytest.mark.parametrize("axes", [None, 1, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.15, 2.0])
@pytest.mark.parametrize("own_view_weight", [0.0, 0.4])
def test_global_loss_equals_its_equation(axes, threshold, own_view_weight):
    rng = np.random.default_rng(0)
    dominant, auxiliary = rng.normal(size=(2, 6, 5))
    positions = rng.uniform(size=6 if axes is None else (6, axes))
    expected = loop(dominant, auxiliary, positions, threshold, 0.2, own_view_weight)
    loss = PositionalContrastiveLoss(0.2, threshold, None, own_view_weight=own_view_weight)
    got = loss(torch.tensor(dominant), torch.tensor(auxiliary), torch.tensor(positions))
    assert got.item() == pytest.approx(expected, abs=1e-12)
    scaled = PositionalContrastiveLoss(0.2, threshold, 0.07, own_view_weight=own_view_weight)
    got_scaled = scaled(torch.tensor(dominant), torch.tensor(auxiliary), torch.tensor(positions))
    assert got_scaled.item() == pytest.approx(expected * 0.2 / 0.07, abs=1e-12)


@pytest.mark.parametrize("grid", [(3, 2), (2, 3, 2)])
def test_dense_loss_is_the_mean_over_locations(grid):
    rng = np.random.default_rng(1)
    dominant, auxiliary = rng.normal(size=(2, 4, 5, *grid))
    positions = rng.uniform(size=(4, 3))
    expected = np.mean(
        [loop(dominant[(..., *at)], auxiliary[(..., *at)], positions, 0.4, 0.1) for at in np.ndindex(*grid)]
    )
    got = DenseContrastiveLoss(0.1, 0.4, None)(*(torch.tensor(a) for a in (dominant, auxiliary, positions)))
    assert got.item() == pytest.approx(expected, abs=1e-12)


def test_chunks_change_neither_loss_nor_gradient(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    positions = torch.rand(5, 2, generator=generator)
    maps = [torch.randn(5, 4, 6, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    whole = DenseContrastiveLoss()(*maps, positions)
    whole_gradients = torch.autograd.grad(whole, maps)
    monkeypatch.setitem(losses.MAX_SIMILARITIES, "cpu", 3 * 10**2)
    chunked = DenseContrastiveLoss()(*maps, positions)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(chunked, maps), whole_gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 1), (6, 5, 4), (5, 16, 40)])
@pytest.mark.parametrize("own_view_weight", [0.0, 0.4, 1.0])
def test_the_fused_loss_equals_the_direct_loss_in_value_and_gradient(shape, own_view_weight):
    generator = torch.Generator().manual_seed(0)
    embeddings = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    positions = torch.rand(shape[0], 3, generator=generator)
    weights = positive_weights(positions, 0.4, own_view_weight, torch.float64)
    # The upstream gradient differs between locations, as in a weighted sum.
    upstream = torch.randn(shape[2], generator=generator, dtype=torch.float64)
    readable, fused = (function(*embeddings, weights, 0.1) for function in (contrast, FusedContrast.apply))
    torch.testing.assert_close(fused, readable, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, embeddings, upstream) for loss in (fused, readable)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_threshold_is_strict_and_chebyshev():
    positions = torch.tensor([[0.25, 0.25], [0.5, 0.25], [0.375, 0.75]], dtype=torch.float64)
    mask = positive_mask(positions, 0.25)
    own_view_only = torch.eye(3, dtype=torch.bool)
    assert torch.equal(mask[:3, 3:], own_view_only)  # 0.25 apart is not less than 0.25
    assert positive_mask(positions, 0.2501)[0, 1] and not positive_mask(positions, 0.2501)[0, 2]
    assert not mask.diagonal().any()


def test_half_precision_is_computed_in_float32():
    generator = torch.Generator().manual_seed(0)
    dominant, auxiliary = (torch.randn(8, 16, generator=generator).half() for _ in range(2))
    positions = torch.rand(8, generator=generator)
    loss = PositionalContrastiveLoss()
    assert loss(dominant, auxiliary, positions).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(dominant.float(), auxiliary.float(), positions)
    torch.testing.assert_close(inside, loss(dominant.float(), auxiliary.float(), positions))


@pytest.mark.parametrize("small, large", [((4, 3), (8, 9)), ((2, 4, 3), (4, 8, 9))])
def test_equivariance_is_zero_for_linear_maps_and_l1_otherwise(small, large):
    def ramp(size):
        axes = torch.meshgrid(*(torch.linspace(0, 1, n) for n in size), indexing="ij")
        return sum((k + 1) * a for k, a in enumerate(axes))[None, None]

    assert EquivarianceLoss()(ramp(small), ramp(large)).item() == pytest.approx(0, abs=1e-6)
    assert EquivarianceLoss()(ramp(small) + 0.5, ramp(large)).item() == pytest.approx(0.5, abs=1e-6)


def test_the_total_is_the_weighted_sum_and_terms_of_weight_0_are_left_out():
    generator = torch.Generator().manual_seed(0)
    outputs = {f"global_{b}": torch.randn(4, 8, generator=generator) for b in ("dominant", "auxiliary")}
    outputs |= {f"dense_{b}": torch.randn(4, 8, 3, 3, generator=generator) for b in ("dominant", "auxiliary")}
    outputs["bottleneck_dominant"] = torch.randn(4, 8, 2, 2, generator=generator)
    outputs["bottleneck_auxiliary"] = torch.randn(4, 8, 4, 4, generator=generator)
    positions = torch.rand(4, generator=generator)
    all_three = MultiLevelContrastiveLoss()(outputs, positions)
    expected = all_three["global"] + 0.5 * all_three["dense"] + all_three["equivariance"]
    torch.testing.assert_close(all_three["total"], expected)
    only_global = MultiLevelContrastiveLoss(weight_dense=0, weight_equivariance=0)
    assert set(only_global(outputs, positions)) == {"global", "total"}
    only_global.threshold = 0.0
    assert only_global.dense_loss.threshold == only_global.global_loss.threshold == 0.0


def test_reference_values_are_those_of_vectors_in_each_state():
    """Compare the values with losses of vectors in the three states, and with numbers computed by hand."""
    assert reference_values(32, 12).own_view_only == pytest.approx(5.81, abs=0.01)
    assert reference_values(32, 12).collapse == pytest.approx(5.919, abs=1e-3)
    positions = torch.arange(16) // 4 * 0.25  # groups of 4 patches: 7 positives per anchor
    loss = PositionalContrastiveLoss(0.01, 0.1, None)
    alike = torch.ones(16, 16)
    assert loss(alike, alike, positions).item() == pytest.approx(
        reference_values(16, 7, temperature=0.01, base_temperature=None).collapse, abs=1e-4
    )
    found = torch.eye(16)[torch.arange(16) // 4]
    assert loss(found, found, positions).item() == pytest.approx(
        reference_values(16, 7, temperature=0.01, base_temperature=None).all_found, abs=1e-4
    )


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0}, {"threshold": -0.1}, {"base_temperature": -1.0}, {"own_view_weight": 1.5}]
)
def test_arguments_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DenseContrastiveLoss(**wrong)


def test_shapes_are_checked():
    vectors = torch.randn(4, 8)
    with pytest.raises(ValueError, match="shape"):
        PositionalContrastiveLoss()(vectors, vectors[:3], torch.rand(4))
    with pytest.raises(ValueError, match="4 patches, got 3 rows"):
        PositionalContrastiveLoss()(vectors, vectors, torch.rand(3))
    with pytest.raises(ValueError, match=r"\(N, C, \*grid\)"):
        DenseContrastiveLoss()(vectors, vectors, torch.rand(4))
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\).*\(2, 4, 8, 8\)"):
        EquivarianceLoss()(torch.randn(2, 3, 4, 4), torch.randn(2, 4, 8, 8))
    with pytest.raises(ValueError, match="weights"):
        MultiLevelContrastiveLoss(weight_global=0, weight_dense=0)


def test_standardised_equivariance_is_large_if_all_images_have_the_same_map():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(6, 4, 8, 8, generator=generator)
    small = F.interpolate(maps, size=(4, 4), mode="bilinear", align_corners=True)
    other = torch.randn(6, 4, 4, 4, generator=generator)
    plain, standardised = EquivarianceLoss(), EquivarianceLoss("standardised")
    assert plain(small, maps) < 1e-6 and standardised(small, maps) < 1e-6
    # The loss does not depend on what all images have in common, nor on the scale.
    common = torch.randn(1, 4, 4, 4, generator=generator)
    torch.testing.assert_close(standardised(0.1 * other + common, maps), standardised(other, maps), rtol=0.02, atol=0)
    assert plain(0.01 * other, 0.01 * maps) < 0.02 < standardised(0.1 * other, 0.1 * maps)
    with pytest.raises(ValueError, match="form"):
        EquivarianceLoss("l2")
