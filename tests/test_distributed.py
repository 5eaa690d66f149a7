"""Several ranks give the same results as one process with the whole batch."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from steps import batch, gradients, recipe_of, training_step
from torch import nn

from nnunetv2_macl import distributed

PATCHES = 7  # not divisible by the numbers of ranks, 2 and 3
# with every loss and every augmentation
RECIPE = recipe_of(own_view_weight=0.5, weight_restoration=1.0, intensity=1.0, equivariance_form="standardised")


def representations_of(step):
    """Return the embeddings of the whole batch, as the probes measure them."""
    step.model.eval()
    found = step.representations(batch(PATCHES)["data"], 0)
    step.model.train()
    return found


def rank_process(rank, world, port, folder, at_once, norm):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    step = training_step(PATCHES, at_once, RECIPE, norm=norm)
    if rank == 0:
        torch.save(representations_of(step), f"{folder}/representations.pt")
    first, last = distributed.local_slice(PATCHES)
    mine = {key: value[first:last] for key, value in batch(PATCHES).items()}
    measured = step(mine, 0)
    torch.save((measured, gradients(step), step.model.state_dict()), f"{folder}/{rank}.pt")
    with distributed.rank_zero_first() as is_first:
        assert is_first == (rank == 0)
    assert distributed.any_rank(rank == world - 1) and not distributed.any_rank(False)
    # The gradients of the network are sent during the last backward pass, although the heads have none in it.
    network = step.model.network
    gradient_sum = distributed.GradientSum(network, step.model.methods)
    with gradient_sum.last_backward():
        sum(maps.sum() for maps in network.decode(network.encode(mine["data"]))).backward()
    assert len(gradient_sum._sent) == len(gradient_sum._buckets) - 1
    gradient_sum.finish()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "world, at_once, norm", [(2, PATCHES, nn.InstanceNorm2d), (3, 1, nn.InstanceNorm2d), (2, PATCHES, nn.BatchNorm2d)]
)
def test_ranks_have_the_losses_gradients_and_weights_of_one_process(tmp_path, world, at_once, norm):
    whole = training_step(PATCHES, PATCHES, RECIPE, norm=norm)
    representations = representations_of(whole)
    measured = whole(batch(PATCHES), 0)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    mp.spawn(rank_process, (world, port, str(tmp_path), at_once, norm), nprocs=world)
    for theirs, ours in zip(torch.load(tmp_path / "representations.pt"), representations, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-8, atol=1e-11)
    for rank in range(world):
        theirs, their_gradients, their_state = torch.load(tmp_path / f"{rank}.pt")
        assert theirs == pytest.approx(measured, rel=1e-9)
        for name, gradient in gradients(whole).items():
            torch.testing.assert_close(their_gradients[name], gradient, rtol=1e-8, atol=1e-11, msg=name)
        for name, value in whole.model.state_dict().items():
            torch.testing.assert_close(their_state[name], value, rtol=1e-8, atol=1e-10, msg=name)


def test_one_process_has_the_whole_batch():
    assert distributed.local_slice(PATCHES) == (0, PATCHES) and distributed.rank() == 0
    tensor = torch.zeros(3)
    assert distributed.gather(tensor, 3) is tensor and distributed.any_rank(True) and not distributed.any_rank(False)
