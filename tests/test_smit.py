"""SMIT: the compared locations, the losses, the teacher, the centre, and the stopped gradient."""

import numpy as np
import pytest
import torch
from steps import batch, embeddings_of, model_of, recipe_of, training_step, unet

from nnunetv2_macl.methods.base import Progress, StepRandom
from nnunetv2_macl.views import enlarge_mask

SMIT = {"method": "smit", "token_dim": 16, "tokens": 24}


def smit(**values):
    """Return a model, its method, and the embeddings of four patches."""
    model = model_of(unet(), [32, 32], recipe_of(**SMIT | values), scale=[1, 1]).double()
    (method,) = model
    return model, method, embeddings_of(model, batch(4)["data"])


def test_tokens_are_the_most_masked_locations():
    _, method, _ = smit()
    numbers = method.views.draw(StepRandom(0, 0, 4, slice(None), 1, (32, 32)))
    for mask, tokens, hidden in zip(numbers.masks, numbers.tokens, numbers.hidden, strict=True):
        assert tokens.shape == hidden.shape == (4, 6)
        shares = torch.nn.functional.avg_pool2d(enlarge_mask(mask, (32, 32)).float(), 8).flatten(1)
        assert all(len(set(row.tolist())) == 6 for row in tokens)
        torch.testing.assert_close(shares.gather(1, tokens), hidden)
        for share, row, chosen in zip(shares, tokens, hidden, strict=True):
            others = share[[n for n in range(16) if n not in row.tolist()]]
            assert chosen.min() >= others.max() - 1e-3 and chosen.max() > 0
    assert not torch.equal(numbers.masks[0], numbers.masks[1])


def test_the_teacher_sees_the_views_without_the_mask():
    _, method, _ = smit()
    numbers = method.views.draw(StepRandom(0, 0, 4, slice(None), 1, (32, 32)))
    shown = method.views.make(batch(4)["data"], numbers, Progress(0, 1, 1))
    for view in (0, 1):
        whole, masked, mask = (shown[f"{name}_{view}"] for name in ("whole", "masked", "mask"))
        assert torch.equal(masked, torch.where(mask, 0, whole)) and mask.any()
    assert not torch.allclose(shown["whole_0"], shown["whole_1"])


def softmax(values):
    raised = np.exp(values - values.max())
    return raised / raised.sum()


def test_the_losses_equal_their_equations():
    _, method, embeddings = smit(weight_tokens=0.3, weight_image_token=0.2, weight_restoration=0.7)
    generator = np.random.default_rng(0)
    centre = generator.normal(size=16)
    method.token_loss.centre.copy_(torch.from_numpy(centre))
    got = method.losses(embeddings, torch.rand(4, 3), Progress(50, 1, 100))
    found = {name: values.detach().numpy() for name, values in embeddings.items()}

    def distance(student, target):
        return -target @ np.log(softmax(student / 0.1))

    codes = np.exp(found["teacher_image"].reshape(8, 16) / 0.04)
    for _ in range(3):
        for output in range(16):
            codes[:, output] /= codes[:, output].sum()
        for view in range(8):
            codes[view] /= codes[view].sum()
    codes = codes.reshape(4, 2, 16)

    tokens, image = [], []
    for patch in range(4):
        for view in (0, 1):
            share = found["hidden"][patch, view]
            each = [
                distance(
                    found["student_tokens"][patch, view, t],
                    softmax((found["teacher_tokens"][patch, view, t] - centre) / 0.04),
                )
                for t in range(6)
            ]
            tokens.append((share * each).sum() / share.sum())
            image.append(distance(found["student_image"][patch, view], codes[patch, 1 - view]))
    assert got["tokens"].item() == pytest.approx(np.mean(tokens), rel=1e-9)
    assert got["image_token"].item() == pytest.approx(np.mean(image), rel=1e-9)
    assert got["restoration"].item() == pytest.approx(found["restoration"].mean(), rel=1e-9)
    total = 0.3 * got["tokens"] + 0.2 * got["image_token"] + 0.7 * got["restoration"]
    assert got["total"].item() == pytest.approx(total.item(), rel=1e-9)


def test_the_loss_of_patch_tokens_equals_that_of_lightly():
    lightly = pytest.importorskip("lightly.loss")
    _, method, embeddings = smit()
    embeddings["hidden"] = torch.ones_like(embeddings["hidden"])
    found = method.losses(embeddings, torch.rand(4, 3), Progress(100, 1, 100))
    patches = lightly.IBOTPatchLoss(16, teacher_temp=0.04, student_temp=0.1)
    # There are eight views with six tokens each, all masked.
    rows = [embeddings[f"{who}_tokens"].flatten(0, 2) for who in ("teacher", "student")]
    expected = patches(*rows, torch.ones(8, 1, 6, dtype=torch.bool))
    assert found["tokens"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_reference_line_is_the_loss_of_equal_image_tokens():
    _, method, embeddings = smit()
    embeddings = embeddings | {"student_image": torch.zeros_like(embeddings["student_image"])}
    found = method.losses(embeddings, torch.rand(4, 3), Progress(0, 4, 5))["image_token"]
    assert found.item() == pytest.approx(method.reference_lines(method.recipe, 4, {})["uniform"])


def test_no_gradient_passes_through_the_teacher():
    model, method, _ = smit()
    numbers = method.views.draw(StepRandom(0, 0, 4, slice(None), 1, (32, 32)))
    features = method.encode(method.views.make(batch(4)["data"], numbers, Progress(0, 1, 1)))
    targets = [features[f"teacher_{name}"] for name in ("tokens", "image")]
    assert not any(values.requires_grad for values in targets)
    # Gradient caching requires a gradient of all features.
    for values in targets:
        values.requires_grad_()
    method.losses(method.project(features), torch.rand(4, 3), Progress(0, 1, 1))["total"].backward()
    assert all(values.grad is None for values in targets)
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if ".teacher" not in name}


def test_the_teacher_is_an_average_whose_decay_rises_to_one():
    step = training_step(4, 4, recipe_of(**SMIT, teacher_decay=0.9, num_epochs=1, num_iterations_per_epoch=10))
    (method,) = step.methods
    pairs = [
        (method.teacher, step.model.network.encoder),
        (method.teacher_token_head, method.token_head),
        (method.teacher_image_head, method.image_head),
    ]
    for number, decay in ((0, 0.9), (5, 0.95)):
        before = [[p.clone() for p in teacher.parameters()] for teacher, _ in pairs]
        step(batch(4), number)
        for (teacher, student), old in zip(pairs, before, strict=True):
            for now, previous, trained in zip(teacher.parameters(), old, student.parameters(), strict=True):
                torch.testing.assert_close(now, decay * previous + (1 - decay) * trained.detach())


def test_the_centre_moves_once_a_step_towards_the_mean_of_the_teacher():
    for at_once in (4, 2):
        step = training_step(4, at_once, recipe_of(**SMIT))
        (method,) = step.methods
        seen, original = [], method.after_step
        method.after_step = lambda embeddings, progress, seen=seen, original=original: (
            seen.append(embeddings),
            original(embeddings, progress),
        )
        step(batch(4), 0)
        (embeddings,) = seen
        centre = method.token_loss.centre
        torch.testing.assert_close(centre, 0.1 * embeddings["teacher_tokens"].flatten(0, -2).mean(0))
        assert centre.abs().max() > 1e-3
