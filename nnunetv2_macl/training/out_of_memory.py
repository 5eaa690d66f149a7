"""When memory runs out all the same: what happened, and what to type."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from nnunetv2_macl.planning.plan import MACLPlan
from nnunetv2_macl.recipe import AUTO

# what CUDA and MPS, cuDNN and cuBLAS, the CPU allocator and oneDNN say
_WORDS = (
    "out of memory",
    "alloc_failed",
    "not enough memory",
    "can't allocate memory",
    "bad_alloc",
    "could not create a memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)
    )


def out_of_memory_advice(
    plan: MACLPlan, device: str, has_checkpoint: bool, world_size: int, folder: Path, *, in_parts: bool
) -> str:
    """What the user is told.

    Args:
        plan: of the run.
        device: where memory ran out.
        has_checkpoint: Whether the run can be continued from one.
        world_size: number of GPUs, 1 without.
        folder: of the run.
        in_parts: whether the network's batch can be computed in parts.
    """
    at_once = min(plan.patches_at_once, math.ceil(plan.batch_size / world_size))
    size = "x".join(map(str, plan.patch_size))
    told = f"Memory ran out on {device} with {at_once} patches of {size} at once, of a batch of {plan.batch_size}."
    if has_checkpoint:
        told += f" The last checkpoint is in {folder}."
    tries = []
    if in_parts and at_once > 1:
        go_on = "--c " if has_checkpoint else ""
        longer = ", a third more time" if plan.get_recipe().couples_samples else ""
        tries.append(
            f"{go_on}-patches_at_once {max(1, int(at_once * 0.7))} (the same batch in parts: same gradient{longer})"
        )
    smaller = smaller_batch(plan.batch_size, world_size)
    if smaller < plan.batch_size:
        tries.append(f"-batch_size {smaller} in a new run")
        if plan.get_recipe().batch_size == AUTO:
            tries.append(f"-gpu_memory {plan.gpu_memory_gb * 0.7:.2g} in a new run, which plans its batch for that")
    if tries:
        return f"{told} Type the same command with {'; or with '.join(tries)}."
    return (
        f"{told} This is the least there can be. Pre-train another configuration (-c 2d or -c 3d_lowres, where the plan has it), "
        "or plan a smaller network: nnUNetv2_plan_experiment with -gpu_memory_target."
    )


def smaller_batch(batch_size: int, world_size: int = 1) -> int:
    """About 70 % of the batch, even, at least two patches a GPU."""
    return max(2 * world_size, int(batch_size * 0.7) // 2 * 2)
