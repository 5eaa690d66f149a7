"""Self-distillation: the loss, its centre, and DeSD."""

import pytest
import torch

from nnunetv2_macl.losses import DistillationLoss


def outputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_loss_and_the_centre_are_those_of_lightly():
    lightly = pytest.importorskip("lightly.loss").DINOLoss(
        output_dim=16, warmup_teacher_temp=0.04, teacher_temp=0.04, warmup_teacher_temp_epochs=0, student_temp=0.1
    )
    lightly = lightly.double()
    ours = DistillationLoss(16).double()
    for step in range(3):
        teacher, student = outputs(2, 5, 16, seed=step), outputs(2, 5, 16, seed=10 + step).requires_grad_()
        expected = lightly(list(teacher), list(student), teacher_temp=0.04)
        targets = ours.targets(teacher, 0.04)
        found = (ours(student[0], targets[1]).mean() + ours(student[1], targets[0]).mean()) / 2
        ours.update_centre(teacher)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            *(torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (found, expected))
        )
        torch.testing.assert_close(ours.centre, lightly.center.flatten())


def test_only_an_update_moves_the_centre():
    loss = DistillationLoss(4, centre_momentum=0.75).double()
    teacher = outputs(3, 2, 4)
    loss(teacher, loss.targets(teacher, 0.04))
    assert not loss.centre.any()
    loss.update_centre(teacher)
    torch.testing.assert_close(loss.centre, teacher.mean((0, 1)) / 4)


def test_targets_have_no_gradient():
    loss = DistillationLoss(4).double()
    teacher = outputs(3, 4).requires_grad_()
    targets = loss.targets(teacher, 0.04)
    assert not targets.requires_grad
    torch.testing.assert_close(targets.sum(-1), torch.ones(3, dtype=torch.float64))
