"""Self-distillation: the loss, its centre, and the method DeSD."""

import math

import numpy as np
import pytest
import torch
from steps import batch, recipe_of, training_step

from nnunetv2_macl.losses import DistillationLoss
from nnunetv2_macl.methods.base import Progress
from nnunetv2_macl.methods.heads import DistillationHead


def outputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_loss_and_the_centre_equal_those_of_lightly():
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


def test_only_update_centre_changes_the_centre():
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


SMALL = {"method": "desd", "hidden": 16, "outputs": 8, "depths": 3, "optimizer": "adamw", "learning_rate": 0.01}


def step_of(epochs=4, iterations=2, **values):
    step = training_step(
        4, 4, recipe_of(**SMALL | dict(num_epochs=epochs, num_iterations_per_epoch=iterations) | values)
    )
    (method,) = step.methods
    return step, method


def test_each_depth_predicts_the_teacher_output_of_the_other_view():
    _, method = step_of()
    method.loss.update_centre(outputs(9, 8))
    views = ("first", "second")
    embeddings = {
        f"{view}_{depth}": outputs(4, 8, seed=depth + 10 * n) for n, view in enumerate(views) for depth in range(3)
    }
    embeddings |= {f"{view}_target": outputs(4, 8, seed=5 + 10 * n) for n, view in enumerate(views)}
    losses = []
    for student, teacher in (views, views[::-1]):
        for patch in range(4):
            target = np.exp((embeddings[f"{teacher}_target"][patch] - method.loss.centre).numpy() / 0.07)
            for depth in range(3):
                predicted = np.exp(embeddings[f"{student}_{depth}"][patch].numpy() / 0.1)
                losses.append(-(target / target.sum() * np.log(predicted / predicted.sum())).sum())
    found = method.losses(embeddings, torch.zeros(4, 3), Progress(8, 4, 2))["total"]
    assert found.item() == pytest.approx(np.mean(losses), rel=1e-9)


def test_the_depths_are_the_last_maps_and_the_teacher_reads_the_last_one():
    _, method = step_of(depths=3, decoder_stages=1)
    widths = [head.layers[0].num_features for head in method.heads]
    assert widths == [12, 16, 12] and method.teacher_head.layers[0].num_features == 12


def test_the_teacher_is_the_average_and_its_centre_moves_once_per_step():
    step, method = step_of(momentum_decay=0.9)
    before = {name: values.clone() for name, values in method.state_dict().items()}
    old_weight = method.teacher_network.encoder.stages[0][0].convs[0].conv.weight.clone()
    centres = []
    update = method.loss.update_centre
    method.loss.update_centre = lambda teacher: centres.append(teacher) or update(teacher)
    step(batch(4), 1)
    decay = 1 - 0.1 * (1 + math.cos(math.pi / 8)) / 2
    new_weight = method.network.encoder.stages[0][0].convs[0].conv.weight
    expected = decay * old_weight + (1 - decay) * new_weight
    torch.testing.assert_close(method.teacher_network.encoder.stages[0][0].convs[0].conv.weight, expected)
    layer = "layers.1.weight"
    expected = decay * before[f"teacher_head.{layer}"] + (1 - decay) * method.state_dict()[f"heads.2.{layer}"]
    torch.testing.assert_close(method.teacher_head.state_dict()[layer], expected)
    assert len(centres) == 1 and centres[0].shape == (8, 8)
    torch.testing.assert_close(method.loss.centre, 0.1 * centres[0].mean(0))


def test_the_teacher_has_no_gradient():
    _, method = step_of()
    views = {name: batch(4)["data"] + seed for seed, name in enumerate(("first", "second"))}
    features = method.encode(views)
    assert not features["first_target"].requires_grad and features["first_2"].requires_grad
    found = method.project({name: values.detach().requires_grad_() for name, values in features.items()})
    assert not found["first_target"].requires_grad and found["first_2"].requires_grad


def test_last_layers_are_frozen_at_first():
    step, method = step_of()
    moved = []
    for number in range(3):
        before = [head.directions.weight.clone() for head in method.heads]
        step(batch(4), number)
        moved.append([not torch.equal(b, head.directions.weight) for b, head in zip(before, method.heads, strict=True)])
    assert moved == [[False] * 3, [False] * 3, [True] * 3]


def test_outputs_are_cosine_similarities_to_the_directions():
    head = DistillationHead(6, 5, hidden=4).double()
    with torch.no_grad():
        head.directions.weight.mul_(7)
    found = head(outputs(3, 6))
    compressed = head.layers(outputs(3, 6))
    expected = torch.nn.functional.cosine_similarity(compressed[:, None], head.directions.weight[None], dim=-1)
    torch.testing.assert_close(found, expected)


def test_the_temperature_of_the_teacher_rises():
    _, method = step_of(teacher_warmup=0.5)
    found = [method.teacher_temperature(Progress(number, 4, 2)) for number in (0, 2, 4, 8)]
    assert found == pytest.approx([0.04, 0.055, 0.07, 0.07])
