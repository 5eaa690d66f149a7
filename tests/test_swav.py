"""SwAV: codes, swapped prediction, prototypes, queue and small views."""

import math

import numpy as np
import pytest
import torch
from steps import batch, model_of, recipe_of, training_step, unet

from nnunetv2_macl.losses import sinkhorn, swapped_prediction
from nnunetv2_macl.methods.base import Progress
from nnunetv2_macl.methods.branches import smaller_patch

SMALL = {"method": "swav", "prototypes": 6, "queue_length": 8, "small_views": 2}


def scores(views, rows=5, prototypes=6, seed=0):
    return (
        torch.rand(views, rows, prototypes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    )


@pytest.mark.parametrize("has_queue", [False, True])
@pytest.mark.parametrize("views", [2, 5])
def test_the_loss_equals_that_of_lightly(views, has_queue):
    lightly = pytest.importorskip("lightly.loss").SwaVLoss(
        temperature=0.1, sinkhorn_epsilon=0.05, sinkhorn_iterations=3
    )
    ours, theirs = (scores(views).requires_grad_() for _ in range(2))
    queued = list(scores(2, 7, seed=1)) if has_queue else []
    found = swapped_prediction(list(ours), 2, queued)
    expected = lightly(list(theirs[:2]), list(theirs[2:]), queued or None)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_codes_use_all_prototypes_equally():
    many = scores(1, 24)[0]
    codes = sinkhorn(many, 0.05, iterations=200)
    torch.testing.assert_close(codes.sum(1), torch.ones(24, dtype=torch.float64))
    torch.testing.assert_close(codes.sum(0), torch.full((6,), 4.0, dtype=torch.float64), rtol=0, atol=0.01)
    # Codes are targets, so they have no gradient.
    assert not sinkhorn(many.requires_grad_()).requires_grad


def test_codes_are_finite_if_no_vector_is_near_a_prototype():
    scores = torch.full((8, 4), 0.9)
    scores[:, 0] = -0.9
    codes = sinkhorn(scores, 0.001)
    torch.testing.assert_close(codes, torch.full_like(codes, 0.25))


def test_codes_equal_those_of_the_equation():
    values = scores(1)[0].numpy()
    plan = np.exp(values.T / 0.05)
    plan /= plan.sum()
    for _ in range(3):
        for row in range(6):
            plan[row] /= plan[row].sum() * 6
        for column in range(5):
            plan[:, column] /= plan[:, column].sum() * 5
    np.testing.assert_allclose(sinkhorn(torch.from_numpy(values)).numpy(), plan.T * 5, rtol=1e-9)


def step_of(epochs=4, iterations=3, **values):
    recipe = recipe_of(
        **SMALL
        | dict(num_epochs=epochs, num_iterations_per_epoch=iterations, optimizer="adamw", learning_rate=0.1)
        | values
    )
    step = training_step(4, 4, recipe)
    (method,) = step.methods
    return step, method


def test_prototypes_are_frozen_at_first_and_always_have_unit_length():
    step, method = step_of()
    moved = []
    for number in range(5):
        before = method.prototypes.weight.clone()
        step(batch(4), number)
        moved.append(not torch.equal(before, method.prototypes.weight))
        torch.testing.assert_close(method.prototypes.weight.norm(dim=1), torch.ones(6, dtype=torch.float64))
    assert moved == [False, False, False, True, True]


def test_a_queue_holds_the_newest_vectors_of_its_view_first():
    _, method = step_of()
    pushed = [torch.randn(2, 4, 128, dtype=torch.float64) for _ in range(3)]
    for first, second in pushed:
        method.after_step({"first": first, "second": second}, Progress(0, 4, 3))
    for view, queue in enumerate(method.queues):
        newest = torch.cat((pushed[2][view], pushed[1][view]))
        torch.testing.assert_close(queue.vectors, newest / newest.norm(dim=1, keepdim=True))


def test_codes_use_the_queue_once_it_is_full_and_queue_start_is_reached():
    def is_used(number, queue_start):
        _, method = step_of(queue_start=queue_start)
        values = scores(2)
        embeddings = {"first_scores": values[0], "second_scores": values[1]}
        alone = swapped_prediction(list(values))
        found = method.losses(embeddings, torch.zeros(4, 3), Progress(number, 4, 3))["total"]
        return not torch.allclose(found, alone)

    assert [is_used(number, 0.0) for number in (0, 1, 2, 3)] == [False, False, True, True]
    assert [is_used(number, 0.25) for number in (2, 3)] == [False, True]


def test_small_views_show_a_part_of_the_patch():
    assert smaller_patch([224, 224], [32, 32], 96 / 224) == [96, 96]
    # Instance norm needs more than one voxel at the bottleneck.
    assert math.prod(n // 8 for n in smaller_patch([32, 32], [8, 8], 0.1)) >= 4
    recipe = recipe_of(**SMALL, intensity=0.0, rotation=0.0, mirroring=False)
    (method,) = model_of(unet(), [32, 32], recipe, scale=[1, 1])
    step = training_step(4, 4, recipe)
    # Values increase by 1 per voxel on the last axis, so that differences in a view give its magnification.
    ramp = torch.arange(32.0, dtype=torch.float64).expand(4, 1, 32, 32)
    views = method.views.make(ramp, step.draws(0)["swav"], Progress(0, 1, 1))
    assert views["first"].shape == (4, 1, 32, 32) and views["small_1"].shape == (4, 1, 16, 16)
    middle = views["small_1"][:, 0, 8, 6:10].diff(dim=-1)
    magnification = 31 / 15 / middle.mean(-1)
    assert ((magnification >= 1.99) & (magnification <= 3.31)).all()


def test_the_reference_line_is_the_loss_with_one_embedding_for_all_images():
    _, method = step_of(prototypes=6)
    same = torch.zeros(4, 6, dtype=torch.float64)
    found = swapped_prediction([same, same])
    assert found.item() == pytest.approx(method.reference_lines(method.recipe, 4, {})["code_collapse"])
