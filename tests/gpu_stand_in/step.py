"""Run a training step of each recipe on the stand-in: ``python step.py SHAPE RECIPE ...`` prints a line of JSON for each.

``libstandin.so`` must be preloaded, and the variable ``STAND_IN`` must hold its path.
"""

import ctypes
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import library as operators

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.gpu import SHAPES, batches
from benchmarks.planned import planned
from benchmarks.step import training_step

LIBRARY = ctypes.CDLL(os.environ["STAND_IN"])
CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_long)


def check(*tensors):
    kinds = {(t.dtype, t.device) for t in tensors if t is not None}
    if len(kinds) > 1:
        raise RuntimeError(f"a convolution of tensors of {kinds}")


def spread(values, axes):
    return list(values) * axes if len(values) == 1 else list(values)


def convolution(x, weight, padding, stride, dilation, groups, *_):
    check(x, weight)
    axes = x.dim() - 2
    p, s, d = (spread(values, axes) for values in (padding, stride, dilation))
    size = [(x.shape[2 + i] + 2 * p[i] - d[i] * (weight.shape[2 + i] - 1) - 1) // s[i] + 1 for i in range(axes)]
    return x.new_empty([len(x), len(weight), *size])


def transposed_convolution(x, weight, padding, output_padding, stride, dilation, groups, *_):
    check(x, weight)
    axes = x.dim() - 2
    p, s, d, o = (spread(values, axes) for values in (padding, stride, dilation, output_padding))
    size = [(x.shape[2 + i] - 1) * s[i] - 2 * p[i] + d[i] * (weight.shape[2 + i] - 1) + o[i] + 1 for i in range(axes)]
    return x.new_empty([len(x), weight.shape[1] * groups, *size])


def convolution_backward(
    gradient, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, mask
):
    check(gradient, x, weight)
    return (
        torch.empty_like(x) if mask[0] else None,
        torch.empty_like(weight) if mask[1] else None,
        gradient.sum([0, *range(2, gradient.dim())]) if mask[2] else None,
    )


def waits_of(run):
    """Return the calls in which the CPU waited for the GPU. Copies from page-locked memory do not wait."""
    waits = []

    def note(name, _):
        if "pinned" not in name.decode() and not name.startswith(b"COPY"):
            waits.append(name.decode())

    callback = CALLBACK(note)
    LIBRARY.fk_set_sync_callback(callback)
    run()
    LIBRARY.fk_set_sync_callback(CALLBACK(0))
    return waits


def main(shape, recipes):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    operators.impl("aten::cudnn_convolution", "CUDA", convolution)
    operators.impl("aten::cudnn_convolution_transpose", "CUDA", transposed_convolution)
    operators.impl("aten::convolution_backward", "CUDA", convolution_backward)
    device = torch.device("cuda", 0)
    fingerprint, name = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder, planned(fingerprint, name, Path(folder)) as configuration:
        for recipe in recipes:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            step = training_step(configuration, device, recipe)
            batch = batches(step)
            for number in range(2):
                step(batch(number), number)
            if step.recipe.trains_in_stages:
                # also a step of the second stage, which trains other weights
                step(batch(2), step.steps - 1)
            allocated = torch.cuda.max_memory_allocated() / 2**30
            waits = waits_of(lambda step=step, batch=batch: step(batch(2), 2))
            found = {
                "recipe": recipe,
                "waits": waits,
                "allocated": allocated,
                "planned": step.plan.memory_mixed_precision_gib,
            }
            print(json.dumps(found), flush=True)
            del step, batch


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
