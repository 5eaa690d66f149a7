"""Advice when memory runs out, also in a real process whose address space is too small for the batch."""

import re
import sys

import pytest
import torch

from nnunetv2_macl.planning.derive import derive_or_load_plan
from nnunetv2_macl.training.out_of_memory import is_out_of_memory, out_of_memory_advice, smaller_batch


# slow, and not in the quick suite, because builds of torch need different amounts of the address space
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_the_advice_of_a_smaller_batch_helps(workspace):
    command = "ulimit -v 5500000; exec nnUNetv2_train_macl_pretrain 901 -c 2d -device cpu -np 1 -batch_size"
    short = "-num_epochs 2 -num_iterations_per_epoch 1"
    out = workspace.run("bash", "-c", f"{command} 600 {short}", code=1)
    assert "Traceback" not in out
    message = re.search(r"Error: Memory ran out on cpu with 600 patches of .*", out)[0]
    assert (
        "-patches_at_once 420 " in message
        and "-batch_size 420 in a new run" in message
        and "-gpu_memory" not in message
    )  # the batch was not planned
    # the advice helps, and files of the failed run do not disturb
    assert "Fine-tune from them" in workspace.run("bash", "-c", f"{command} 600 -patches_at_once 20 {short}")


def test_the_advice_for_a_planned_batch_names_the_memory(workspace, target):
    plan = derive_or_load_plan(target)
    message = out_of_memory_advice(plan, "cuda", True, 1, workspace.folder, in_parts=True)
    assert f"a batch of {plan.batch_size}." in message and f"-batch_size {smaller_batch(plan.batch_size)}" in message
    assert "-gpu_memory 5.6" in message and "The last checkpoint is in" in message and "--c -patches_at_once" in message
    assert "patches_at_once" not in out_of_memory_advice(plan, "cuda", False, 1, workspace.folder, in_parts=False)
    smallest = derive_or_load_plan(target, values={"batch_size": 2, "patches_at_once": 1})
    message = out_of_memory_advice(smallest, "cuda", False, 1, workspace.folder, in_parts=True)
    assert "-batch_size" not in message and "-c 2d" in message


def test_smaller_batches_are_even_and_have_at_least_two_patches_per_gpu():
    assert [smaller_batch(n) for n in (32, 24, 16, 5, 4, 3, 2)] == [22, 16, 10, 2, 2, 2, 2]
    assert smaller_batch(8, world_size=4) == 8


def test_only_errors_for_lack_of_memory_are_recognised():
    with pytest.raises(RuntimeError) as too_large:
        torch.empty(2**59)
    assert is_out_of_memory(too_large.value)
    # as ITK says it
    assert is_out_of_memory(RuntimeError("Failed to allocate memory for image."))
    with pytest.raises(RuntimeError) as wrong_shape:
        torch.zeros(2) @ torch.zeros(3)
    assert not is_out_of_memory(wrong_shape.value)
