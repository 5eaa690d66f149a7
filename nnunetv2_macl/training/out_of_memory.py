"""When memory runs out all the same: what happened, and what to type."""

from __future__ import annotations

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


def smaller_batch(batch_size: int, world_size: int = 1) -> int:
    """About 70 % of the batch, even, at least two patches a GPU."""
    return max(2 * world_size, int(batch_size * 0.7) // 2 * 2)


def out_of_memory_advice(plan: MACLPlan, device: str, finished_epochs: int, world_size: int, folder: Path) -> str:
    """What the user is told.

    Args:
        plan: of the run.
        device: where memory ran out.
        finished_epochs: of the run.
        world_size: number of GPUs, 1 without.
        folder: of the run.
    """
    smaller = smaller_batch(plan.batch_size, world_size)
    happened = (
        f"Memory ran out on {device} with a batch of {plan.batch_size} patches of {'x'.join(map(str, plan.patch_size))}"
    )
    if smaller >= plan.batch_size:
        mend = (
            "This is the smallest batch there is. Pre-train another configuration (-c 2d or -c 3d_lowres, where the plan has "
            "it), or plan a smaller network: nnUNetv2_plan_experiment with -gpu_memory_target"
        )
    else:
        mend = f"Start anew with a smaller one. Type: -batch_size {smaller}"
        if plan.recipe["batch_size"] == AUTO:
            mend += f", or have it planned for less than {plan.gpu_memory_gb:g} GB: -gpu_memory {plan.gpu_memory_gb * 0.7:.2g}"
    kept = ""
    if finished_epochs:
        kept = (
            f" The {finished_epochs} finished epochs are kept in {folder}; --c would go on from there, but with the same "
            "batch: it cannot be changed within a run."
        )
    return f"{happened}. {mend}.{kept}"
