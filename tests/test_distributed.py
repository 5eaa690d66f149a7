"""Ranks of torch.distributed against one process with the whole batch."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nnunetv2_macl import distributed
from nnunetv2_macl.losses import DenseContrastiveLoss, PositionalContrastiveLoss

PATCHES = 7  # divides by neither 2 nor 3


def inputs():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, PATCHES, 6, 4, generator=generator, dtype=torch.float64)
    positions = torch.rand(PATCHES, 3, generator=generator)
    weights = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return images, positions, weights


def loss_of(images, weights, positions, gather=lambda x: x):
    """Both contrastive losses of maps (n, 5, 4) that a shared weight makes of images (n, 6, 4)."""
    dominant, auxiliary = (gather(torch.einsum("nip,ic->ncp", x, weights)) for x in images)
    positions = gather(positions)
    dense = DenseContrastiveLoss(threshold=0.3)(dominant, auxiliary, positions)
    return PositionalContrastiveLoss(threshold=0.3)(dominant.mean(-1), auxiliary.mean(-1), positions) + dense


def rank_process(rank, world, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    images, positions, weights = inputs()
    weights.requires_grad_()
    first, last = distributed.share(PATCHES)
    loss = loss_of(images[:, first:last], weights, positions[first:last], distributed.gather)
    loss.backward()
    dist.all_reduce(weights.grad)  # as DDP averages
    torch.save((loss.detach(), weights.grad / world), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_give_loss_and_gradient_of_one_process(tmp_path, world):
    images, positions, weights = inputs()
    weights.requires_grad_()
    whole = loss_of(images, weights, positions)
    whole.backward()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    mp.spawn(rank_process, (world, port, str(tmp_path)), nprocs=world)
    for rank in range(world):
        loss, gradient = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(loss, whole.detach(), rtol=1e-9, atol=0)
        torch.testing.assert_close(gradient, weights.grad, rtol=1e-9, atol=1e-12)


def test_one_process_has_it_all():
    assert distributed.share(PATCHES) == (0, PATCHES) and distributed.rank() == 0
    tensor = torch.zeros(3)
    assert distributed.gather(tensor) is tensor
