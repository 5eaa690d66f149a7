"""MoCo, BYOL, SimSiam and SimTriplet: losses, stopped gradients, averages, queue, heads and learning rates."""

import math

import numpy as np
import pytest
import torch
from dynamic_network_architectures.building_blocks.regularization import DropPath
from steps import batch, model_of, recipe_of, training_step, unet
from torch import nn

from nnunetv2_macl.factory import build_optimizer, build_schedule
from nnunetv2_macl.losses import negative_cosine, queue_contrast
from nnunetv2_macl.methods.averaging import averaged_copy, rising_decay, update_average
from nnunetv2_macl.methods.base import Progress, StepRandom
from nnunetv2_macl.methods.queue import EmbeddingQueue, queue_length

ENCODER_ALONE = {"decoder_stages": 0, "scale": [1, 1]}
START, END = Progress(0, 4, 5), Progress(20, 4, 5)
PATCHES = 6


def method_of(name, **settings):
    """Return the method of a recipe with light heads and a small U-Net."""
    (method,) = model_of(unet(), [32, 32], recipe_of(method=name, **{"head": "light"} | settings), **ENCODER_ALONE)
    return method


def random_embeddings(method, patches=PATCHES, dim=16):
    """Return random embeddings of a method by name, each a leaf that requires a gradient."""
    names = method.project(method.encode({name: torch.randn(patches, 1, 32, 32) for name in method.views.names}))
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(patches, dim, generator=generator).double().requires_grad_() for name in names}


def loss_of(method, embeddings):
    return method.losses(embeddings, torch.rand(PATCHES, 3), START)["total"]


def cosine(one, other):
    return float(np.dot(one, other) / np.linalg.norm(one) / np.linalg.norm(other))


def arrays(embeddings):
    return {name: values.detach().numpy() for name, values in embeddings.items()}


# --- losses against loops and against lightly ----------------------------------------------------------------------------


def info_nce_by_loop(queries, keys, queue, temperature):
    total = 0.0
    for query, key in zip(queries, keys, strict=True):
        scores = [math.exp(cosine(query, other) / temperature) for other in (key, *queue)]
        total -= math.log(scores[0] / sum(scores))
    return total / len(queries)


def cosines_by_loop(predictions, targets):
    return float(np.mean([cosine(p, t) for p, t in zip(predictions, targets, strict=True)]))


def test_the_loss_of_moco_equals_its_equation():
    method = method_of("moco", queue_length=23)
    embeddings = random_embeddings(method)
    e = arrays(embeddings)
    expected = info_nce_by_loop(e["query"], e["key"], method.queue.vectors.double().numpy(), 0.2)
    assert loss_of(method, embeddings).item() == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_byol_equals_its_equation():
    method = method_of("byol")
    embeddings = random_embeddings(method)
    e = arrays(embeddings)
    # Eq. 2 is the squared distance of unit vectors, 2 - 2 cos, summed over both directions.
    expected = sum(
        np.mean(
            [
                np.sum((p / np.linalg.norm(p) - t / np.linalg.norm(t)) ** 2)
                for p, t in zip(e[f"{one}_prediction"], e[f"{other}_target"], strict=True)
            ]
        )
        for one, other in (("first", "second"), ("second", "first"))
    )
    assert loss_of(method, embeddings).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "name, pairs",
    [("simsiam", [("first", "second")]), ("simtriplet", [("first", "second"), ("first", "neighbour")])],
)
def test_the_losses_of_simsiam_and_simtriplet_equal_their_equations(name, pairs):
    method = method_of(name)
    embeddings = random_embeddings(method)
    e = arrays(embeddings)
    expected = sum(
        -cosines_by_loop(e[f"{one}_prediction"], e[other]) / 2 - cosines_by_loop(e[f"{other}_prediction"], e[one]) / 2
        for one, other in pairs
    )
    assert loss_of(method, embeddings).item() == pytest.approx(expected, rel=1e-6)


def test_losses_equal_those_of_lightly():
    lightly = pytest.importorskip("lightly.loss")
    torch.manual_seed(0)
    a, b, bank = (torch.randn(n, 16) for n in (PATCHES, PATCHES, 40))
    contrast = lightly.NTXentLoss(temperature=0.2, memory_bank_size=(40, 16))
    contrast.memory_bank.bank = nn.functional.normalize(bank, dim=1)
    ours = queue_contrast(a, b, nn.functional.normalize(bank, dim=1), 0.2)
    assert ours.item() == pytest.approx(contrast(a, b).item(), rel=1e-6)
    assert negative_cosine(a, b).item() == pytest.approx(lightly.NegativeCosineSimilarity()(a, b).item(), rel=1e-6)

    cosine_of = lightly.NegativeCosineSimilarity()
    for name, factor, constant, kind in (("simsiam", 1 / 2, 0, ""), ("byol", 2, 4, "_target")):
        method = method_of(name)
        e = random_embeddings(method)
        pairs = (("first", "second"), ("second", "first"))
        theirs = sum(cosine_of(e[f"{one}_prediction"], e[f"{other}{kind}"]) for one, other in pairs)
        assert loss_of(method, e).item() == pytest.approx(constant + factor * theirs.item(), rel=1e-6)


# --- stop-gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, trained",
    [
        ("moco", {"query"}),
        ("byol", {"first_prediction", "second_prediction"}),
        ("simsiam", {"first_prediction", "second_prediction"}),
        ("simtriplet", {"first_prediction", "second_prediction", "neighbour_prediction"}),
    ],
)
def test_only_one_side_of_a_pair_has_a_gradient(name, trained):
    method = method_of(name)
    embeddings = random_embeddings(method)
    loss_of(method, embeddings).backward()
    assert {key for key, values in embeddings.items() if values.grad is not None} == trained


@pytest.mark.parametrize("name, kept", [("moco", {"query"}), ("byol", {"first", "second"})])
def test_the_heads_of_averaged_networks_pass_no_gradient(name, kept):
    """Gradient caching requires a gradient of all features, including those of the averaged network."""
    method = method_of(name)
    views = {view: torch.randn(PATCHES, 1, 32, 32) for view in ("first", "second")}
    with torch.no_grad():
        features = method.encode(views)
    features = {key: values.requires_grad_() for key, values in features.items()}
    torch.stack([values.sum() for values in method.project(features).values() if values.requires_grad]).sum().backward()
    assert {key for key, values in features.items() if values.grad is not None} == kept


# --- averages ------------------------------------------------------------------------------------------------------------


def test_an_averaged_copy_drops_nothing():
    module = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Dropout2d(0.5), DropPath(0.5)).train()
    copy, images = averaged_copy(module), torch.randn(8, 1, 4, 4)
    assert copy.training and module[1].p == 0.5 and module[2].drop_prob == 0.5
    torch.testing.assert_close(copy(images), module[0](images))


@pytest.mark.parametrize(
    "name, network, head", [("moco", "momentum_network", "momentum_head"), ("byol", "target_network", "target_head")]
)
def test_averages_follow_network_and_head(name, network, head):
    method = method_of(name, momentum_decay=0.9)
    pairs = [(getattr(method, network), method.network), (getattr(method, head), method.head)]
    before = []
    for average, trained in pairs:
        assert not any(parameter.requires_grad for parameter in average.parameters())
        before.append({key: values.clone() for key, values in average.named_parameters()})
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(1)
    method.after_step({"key": torch.randn(PATCHES, 16)}, START)
    for (average, _), old in zip(pairs, before, strict=True):
        for key, values in average.named_parameters():
            torch.testing.assert_close(values, old[key] + 0.1, rtol=0, atol=1e-6)


def test_an_averaged_batch_norm_keeps_the_statistics_of_its_own_inputs_while_it_trains():
    trained = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    trained.register_buffer("other", torch.zeros(1))
    average = averaged_copy(trained)
    trained(torch.randn(8, 2))
    average(torch.randn(8, 2) + 5)
    trained.other.add_(1)
    own = [buffer.clone() for buffer in average[1].buffers()]
    update_average(average, trained, 0.9)
    assert all(torch.equal(now, before) for now, before in zip(average[1].buffers(), own, strict=True))
    assert average.other == 1
    # A teacher in evaluation mode collects no statistics.
    update_average(average.eval(), trained, 0.9)
    assert all(torch.equal(now, other) for now, other in zip(average.buffers(), trained.buffers(), strict=True))


def test_the_momentum_of_byol_rises_to_1():
    assert rising_decay(0.996, START) == pytest.approx(0.996)
    assert rising_decay(0.996, Progress(10, 4, 5)) == pytest.approx(0.998)
    assert rising_decay(0.996, END) == 1
    linear = nn.Linear(2, 2)
    average = averaged_copy(linear)
    with torch.no_grad():
        linear.weight.add_(1)
    before = average.weight.clone()
    update_average(average, linear, rising_decay(0.996, END))
    assert torch.equal(average.weight, before)


# --- the queue -----------------------------------------------------------------------------------------------------------


def unit_vectors(first, count):
    """Return unit vectors in a plane, whose angles increase with their index."""
    angles = torch.arange(first, first + count) / 100
    return torch.stack((angles.cos(), angles.sin()), 1)


def test_the_queue_drops_the_oldest_and_keeps_the_order():
    queue = EmbeddingQueue(7, 2)
    assert torch.allclose(queue.vectors.norm(dim=1), torch.ones(7))
    for first in (0, 3, 6):
        queue.push(5 * unit_vectors(first, 3))
    expected = torch.cat((unit_vectors(6, 3), unit_vectors(3, 3), unit_vectors(0, 1)))
    torch.testing.assert_close(queue.vectors, expected)
    queue.push(unit_vectors(50, 9))
    torch.testing.assert_close(queue.vectors, unit_vectors(50, 7))


def test_a_step_of_moco_compares_with_earlier_keys_and_then_adds_its_own_to_the_queue():
    step = training_step(PATCHES, PATCHES, recipe_of(method="moco", head="light", queue_length=15))
    (method,) = step.methods
    data, earlier = batch(PATCHES), method.queue.vectors.clone()
    with torch.no_grad():
        found = method.project(method.encode(step.show(data["data"], 0)["moco"]))
    measured = step(data, 0)
    expected = queue_contrast(found["query"], found["key"], earlier, 0.2)
    assert measured["queue"] == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(method.queue.vectors[:PATCHES], nn.functional.normalize(found["key"], dim=1))
    assert torch.equal(method.queue.vectors[PATCHES:], earlier[: 15 - PATCHES])


def test_the_default_queue_has_the_published_number_of_batches():
    assert queue_length("auto", 256) == 65_536
    assert queue_length("auto", 2) == 512 and queue_length(1000, 2) == 1000
    model = training_step(PATCHES, PATCHES, recipe_of(method="moco")).model
    assert model.methods["moco"].queue.vectors.shape == (256 * PATCHES, 128)


# --- heads and learning rates --------------------------------------------------------------------------------------------


def widths(module):
    """Return the input length of the first linear layer, and the output lengths of all linear layers."""
    linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
    return [linear[0].in_features, *(part.out_features for part in linear)]


@pytest.mark.parametrize(
    "name, head, projector, predictor",
    [
        ("moco", "published", [16, 16, 128], None),
        ("moco", "light", [16, 16, 16], None),
        ("byol", "published", [16, 4096, 256], [256, 4096, 256]),
        ("byol", "light", [16, 16, 16], [16, 4096, 16]),
        ("simsiam", "published", [16, 2048, 2048, 2048], [2048, 512, 2048]),
        ("simsiam", "light", [16, 16, 16], [16, 4, 16]),
    ],
)
def test_heads_have_the_published_layers(name, head, projector, predictor):
    method = method_of(name, head=head)
    assert widths(method.head) == projector
    if predictor is not None:
        assert widths(method.predictor) == predictor
        assert [type(part) for part in method.predictor] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    if name == "simsiam" and head == "published":
        assert isinstance(method.head[-1], nn.BatchNorm1d) and not method.head[-1].affine


@pytest.mark.parametrize("name, part", [("simsiam", "predictor"), ("simtriplet", "predictor"), ("dira", "adversary")])
def test_the_rate_of_a_predictor_and_of_an_adversary_does_not_decay(name, part):
    values = dict(method=name, head="light", num_epochs=10, num_iterations_per_epoch=10, learning_rate_warmup=0.1)
    recipe = recipe_of(**values)
    model = model_of(unet(), [32, 32], recipe, decoder_stages=3, scale=[1, 1])
    optimizer = build_optimizer(model, recipe)
    schedule = build_schedule(optimizer, recipe)
    rates = []
    for _ in range(100):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    decaying, constant = np.array(rates).T
    assert (constant[10:] == recipe.learning_rate).all() and (constant[:10] == decaying[:10]).all()
    assert (np.diff(decaying[10:]) < 0).all() and decaying[-1] < 0.01 * recipe.learning_rate
    (method,) = model
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {id(p) for p in getattr(method, part).parameters()}


def test_other_methods_have_one_learning_rate():
    recipe = recipe_of(method="byol", head="light")
    assert len(build_optimizer(model_of(unet(), [32, 32], recipe, **ENCODER_ALONE), recipe).param_groups) == 1


# --- the neighbour of SimTriplet -----------------------------------------------------------------------------------------


def test_the_third_view_shows_the_neighbour():
    still = dict(mirroring=False, rotation=0.0, scaling=[1.0, 1.0], translation=0.0, intensity=0.0)
    views = method_of("simtriplet", **still).views
    images = torch.randn(2 * PATCHES, 1, 32, 32)
    numbers = views.draw(StepRandom(0, 0, PATCHES, slice(0, PATCHES), 1, (32, 32)))
    shown = views.make(images, numbers, START)
    for name, expected in (("first", images[:PATCHES]), ("second", images[:PATCHES]), ("neighbour", images[PATCHES:])):
        torch.testing.assert_close(shown[name], expected, rtol=0, atol=1e-4)


def test_a_method_combined_with_simtriplet_gets_no_neighbours():
    step = training_step(PATCHES, PATCHES, recipe_of(method="simtriplet+restoration", head="light"))
    both = torch.cat((batch(PATCHES)["data"], batch(PATCHES)["data"] + 5))
    shown = step.show(both, 0)
    assert len(shown["simtriplet"]["neighbour"]) == PATCHES
    assert {len(view) for view in shown["restoration"].values()} == {PATCHES}
    step({"data": both, "positions": batch(PATCHES)["positions"]}, 0)
    assert not step.was_skipped
