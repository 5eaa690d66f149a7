"""Requirements of every method with every network. New methods and networks are tested without a change of this file."""

import math
import os
import socket
from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from contract_tools import PATCHES, STEPS_OF_AN_EPOCH, all_cases, batch_of, make_volumes, prepare, state_of
from steps import gradients

from nnunetv2_macl import checkpoints
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.factory import build_model, load_optimizer
from nnunetv2_macl.methods.registry import loss_labels, methods_of
from nnunetv2_macl.planning.memory import MemoryEstimate, _LiveMemory

RANKS = 2
ONE_PER_FAMILY = all_cases(one_per_family=True)


def over(cases, is_quick):
    marked = [pytest.param(case, id=case.name, marks=[] if is_quick(case) else pytest.mark.slow) for case in cases]
    return pytest.mark.parametrize("case", marked)


over_cases = over(all_cases(), lambda case: case.is_quick)
# Long tests run only U-Nets in the quick suite.
over_families = over(ONE_PER_FAMILY, lambda case: case.is_quick and case.has_unet)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Return generated volumes with the largest number of channels of all example networks."""
    of_one_recipe = [case for case in ONE_PER_FAMILY if case.recipe == ONE_PER_FAMILY[0].recipe]
    channels = max(prepare(case).step.model.network.image_channels for case in of_one_recipe)
    return make_volumes(tmp_path_factory.mktemp("volumes") / "Dataset001_Contract", channels)


def assert_close(found, expected):
    """Assert that named tensors in float64 agree."""
    found, expected = dict(found), dict(expected)
    assert found.keys() == expected.keys() and expected
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-8, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


def test_losses_have_different_short_names_in_the_log():
    """The report identifies the losses of a run by the short names in its log."""
    names = [label.partition(",")[0] for label in loss_labels().values()]
    assert sorted(names) == sorted(set(names))


@over_cases
def test_losses_are_finite_and_declared(case, volumes):
    step = prepare(case, torch.float32).step
    methods = methods_of(step.recipe.method)
    declared = {name for method in methods for name in (*method.loss_labels, *method.statistics(step.recipe))}
    found = set()
    for number in (0, STEPS_OF_AN_EPOCH):
        data = batch_of(step, volumes, number)
        measured = step(data, number)
        assert not step.was_skipped and all(map(math.isfinite, measured.values()))
        found |= measured.keys()
        assert measured.keys() <= declared | {"total", "embedding_variance", "embedding_rank"}
        shown = step.show(data["data"], number)
        for method in methods:
            assert method.view_titles.keys() <= shown[method.name].keys()
            assert {len(view) for view in shown[method.name].values()} == {PATCHES}
    # A method that trains in stages has some losses in some stages only.
    assert step.recipe.losses.keys() <= found


@over_cases
def test_only_trained_parameters_get_a_gradient_and_all_of_them_do(case, volumes):
    step, network, _ = prepare(case, torch.float32)
    reached = set()
    for number in (0, STEPS_OF_AN_EPOCH):
        before = {name: parameter.clone() for name, parameter in step.model.named_parameters()}
        step(batch_of(step, volumes, number), number)
        trained = {name: parameter for name, parameter in step.model.named_parameters() if parameter.requires_grad}
        for name, parameter in trained.items():
            if parameter.grad is None:
                # The method withholds the gradient at this step, so momentum must not change the parameter either.
                assert torch.equal(parameter, before[name]), name
            # The gradient of a bias before a norm is only rounding.
            elif parameter.ndim == 1 or parameter.grad.norm() > 1e-6:
                reached.add(name)
    assert reached == trained.keys()
    held = {id(parameter) for parameter in step.model.parameters()}
    assert all(parameter.grad is None for parameter in network.parameters() if id(parameter) not in held)
    assert all(parameter.grad is None for parameter in step.model.parameters() if not parameter.requires_grad)
    optimised = [id(parameter) for group in step.optimizer.param_groups for parameter in group["params"]]
    assert optimised == [id(parameter) for parameter in trained.values()]


@over_cases
def test_a_batch_in_parts_gives_the_same_step(case, volumes):
    if prepare(case).step.model.network.mixes_samples:
        with pytest.raises(UserError, match="batch norm or dropout"):
            prepare(case, patches_at_once=2)
        return
    for number in case.first_steps:
        whole, parts = (prepare(case, patches_at_once=at_once).step for at_once in (PATCHES, 2))
        measured = [step(batch_of(step, volumes, number), number) for step in (whole, parts)]
        assert measured[1] == pytest.approx(measured[0], rel=1e-9)
        assert_close(gradients(parts), gradients(whole))
        assert_close(parts.model.state_dict(), whole.model.state_dict())


def results_of(case, volumes):
    """Return losses, gradients and weights after each of the first steps of a case."""
    results = []
    for number in case.first_steps:
        step = prepare(case).step
        results.append((step(batch_of(step, volumes, number), number), gradients(step), step.model.state_dict()))
    return results


def rank_process(rank, port, folder, volumes, cases):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    for case in cases:
        torch.save(results_of(case, volumes), f"{folder}/{case.name}_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results_of_ranks(volumes, tmp_path_factory):
    """Return a function to the folder of the ranks' results. Quick and slow cases each share one slow start of the ranks."""

    @cache
    def folder_of(is_quick):
        folder = tmp_path_factory.mktemp("ranks")
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        cases = [case for case in ONE_PER_FAMILY if case.is_quick == is_quick]
        mp.spawn(rank_process, (port, str(folder), volumes, cases), nprocs=RANKS)
        return folder

    return folder_of


@over_families
def test_two_ranks_give_the_same_step_as_one(case, volumes, results_of_ranks):
    expected = results_of(case, volumes)
    for rank in range(RANKS):
        found = torch.load(results_of_ranks(case.is_quick) / f"{case.name}_{rank}.pt", weights_only=True)
        for theirs, ours in zip(found, expected, strict=True):
            assert theirs[0] == pytest.approx(ours[0], rel=1e-9)
            assert_close(theirs[1], ours[1])
            assert_close(theirs[2], ours[2])


@over_cases
def test_a_resumed_run_gives_bit_identical_weights(case, volumes, tmp_path):
    whole, resumed = (prepare(case, torch.float32).step for _ in range(2))
    first, *others = range(STEPS_OF_AN_EPOCH - 1, STEPS_OF_AN_EPOCH + 2)
    whole(batch_of(whole, volumes, first), first)
    states = {"network_weights": whole.model.state_dict(), "optimizer_state": whole.optimizer.state_dict()}
    checkpoints.save(states, tmp_path / "checkpoint.pth")
    with torch.no_grad():
        for values in resumed.model.state_dict().values():
            values.zero_()
    checkpoint = checkpoints.load(tmp_path / "checkpoint.pth")
    resumed.model.load_state_dict(checkpoint["network_weights"])
    load_optimizer(resumed.optimizer, checkpoint["optimizer_state"])
    resumed.scheduler.last_epoch = 1
    for number in others:
        assert resumed(batch_of(resumed, volumes, number), number) == whole(batch_of(whole, volumes, number), number)
    found, expected = dict(state_of(resumed)), dict(state_of(whole))
    assert found.keys() == expected.keys()
    assert not [name for name, values in expected.items() if not torch.equal(found[name], values)]


@over_families
def test_the_loss_falls(case, volumes):
    step = prepare(case, torch.float32, optimizer="adamw", learning_rate=2e-3).step
    # Use the same patches and views in each step, because random batches would hide the effect of a few steps.
    losses = [step(batch_of(step, volumes, 0), 0)["total"] for _ in range(30)]
    before, after = losses[0], losses[-1]
    assert after < before


@over_cases
def test_exported_weights_are_those_of_the_network(case, volumes, tmp_path):
    step, network, configuration = prepare(case, torch.float32)
    before = {name: values.clone() for name, values in network.state_dict().items()}
    for number in (0, STEPS_OF_AN_EPOCH):
        step(batch_of(step, volumes, number), number)
    encoder, decoder = step.model.network.trained_weights()
    fresh = case.network().state_dict()
    description = {"configuration": configuration.name, "architecture": configuration.architecture()}
    checkpoints.export_weights(tmp_path, encoder=encoder, decoder=decoder, unet_weights=fresh, description=description)
    exported = checkpoints.load_weights(tmp_path).weights
    own, names = network.state_dict(), checkpoints.first_names(network.state_dict())
    assert {name: values.shape for name, values in exported.items()} == {name: own[name].shape for name in exported}
    assert all(torch.equal(values, own[name]) for name, values in exported.items())
    changed = {names[name] for name, values in own.items() if not torch.equal(values, before[name])}
    trained = {names[name] for name in exported}
    # A bias before a norm may not change in two steps, and buffers with indices of positions are never trained.
    kept = [own[name] for name in trained - changed]
    assert changed <= trained and all(values.ndim == 1 or not values.is_floating_point() for values in kept)
    whole = checkpoints.load(tmp_path / checkpoints.NETWORK_FILE)["network_weights"]
    assert {name: values.shape for name, values in whole.items()} == {n: values.shape for n, values in own.items()}
    network.load_state_dict(whole)


@over_families
def test_loaded_weights_reach_all_copies_of_the_network(case):
    step, network, configuration = prepare(case, torch.float32)
    encoder, decoder = step.model.network.trained_weights()
    step.model.load_weights({name: values + 1 for name, values in (encoder | decoder).items()})
    # A model that is built now copies the loaded weights. Its heads have the same weights as in `prepare`.
    torch.manual_seed(1)
    expected = build_model(configuration, step.plan.geometry, step.recipe, network)
    assert_close(step.model.state_dict(), expected.state_dict())


@over_families
def test_the_memory_plan_agrees_with_a_real_step(case, volumes):
    step, _, configuration = prepare(case, torch.float32, size=4 if case.axes == 2 else 1)
    estimate = MemoryEstimate(configuration, step.plan.geometry, step.recipe).gib(PATCHES) * 2**30
    # A method that trains in stages may need more memory in the second half.
    halves = (0, STEPS_OF_AN_EPOCH) if step.recipe.trains_in_stages else (0,)
    in_use = []
    for number in halves:
        data = batch_of(step, volumes, number)
        step(data, number)
        step.optimizer.zero_grad(set_to_none=True)
        held = {values.data_ptr(): values.nbytes for _, values in state_of(step)}
        # Do not use the profiler, because convolutions with few channels need large workspaces on a CPU, which it would count.
        with _LiveMemory(int) as memory:
            step(data, number + 1)
        in_use.append(sum(held.values()) + data["data"].nbytes + memory.most)
    assert estimate == pytest.approx(max(in_use), rel=0.15)
