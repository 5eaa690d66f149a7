"""Recognise errors for lack of memory, and explain them to the user."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from nnunetv2_macl.planning.plan import MACLPlan
from nnunetv2_macl.recipe import AUTO

# Only the CUDA allocator of torch has an error class of its own. MPS and pinned memory, cuDNN and cuBLAS, the CPU allocator and
# oneDNN raise a RuntimeError with one of these texts.
_WORDS = (
    "out of memory",
    "alloc_failed",
    "not enough memory",
    "allocate memory",
    "bad_alloc",
    "bad allocation",
    "could not create a memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of the device or of the machine is too small."""
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)
    )


def out_of_memory_advice(
    plan: MACLPlan, device: str, has_checkpoint: bool, world_size: int, folder: Path, *, in_parts: bool
) -> str:
    """Return the message for the user, with the options that need less memory.

    Args:
        plan: Plan of the run.
        device: Type of the device whose memory ran out.
        has_checkpoint: Whether the run can be continued from a checkpoint.
        world_size: Number of GPUs, 1 without GPUs.
        folder: Folder of the run.
        in_parts: Whether the network allows that a batch is computed in parts.
    """
    at_once = min(plan.patches_at_once, math.ceil(plan.batch_size / world_size))
    size = "x".join(map(str, plan.patch_size))
    problem = f"Memory ran out on {device} with {at_once} patches of {size} at once, of a batch of {plan.batch_size}."
    if has_checkpoint:
        problem += f" The last checkpoint is in {folder}."
    tries = []
    if in_parts and at_once > 1:
        resume = "--c " if has_checkpoint else ""
        longer = ", a third more time" if plan.get_recipe().couples_samples else ""
        tries.append(
            f"{resume}-patches_at_once {max(1, int(at_once * 0.7))} (the same batch in smaller parts: same gradient{longer})"
        )
    smaller = smaller_batch(plan.batch_size, world_size)
    if smaller < plan.batch_size:
        tries.append(f"-batch_size {smaller} in a new run")
        if plan.get_recipe().batch_size == AUTO:
            tries.append(
                f"-gpu_memory {plan.gpu_memory_gb * 0.7:.2g} in a new run, which plans the batch for this memory"
            )
    if tries:
        return f"{problem} Type the same command with {'; or with '.join(tries)}."
    return (
        f"{problem} A smaller batch is not possible. Pre-train another configuration (-c 2d or -c 3d_lowres, if the plan has "
        "it), or plan a smaller network: nnUNetv2_plan_experiment with -gpu_memory_target."
    )


def smaller_batch(batch_size: int, world_size: int = 1) -> int:
    """Return an even number, about 70 % of the batch, and at least two patches for each GPU."""
    return max(2 * world_size, int(batch_size * 0.7) // 2 * 2)
