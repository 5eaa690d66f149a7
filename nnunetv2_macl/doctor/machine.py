"""Checks of the machine's limits: shared memory, disk space and open files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_macl.doctor.result import NOTE, OK, PROBLEM, Result

if TYPE_CHECKING:  # this module needs torch, which may be missing
    from nnunetv2_macl.data import Reading

_SHARED_MEMORY = Path("/dev/shm")
# Docker's default is 64 MiB. Data workers, nnU-Net's own too, put whole batches there.
_ENOUGH_SHARED_GIB = 1
# Space for the checkpoints of a run, fine-tuned models, and the preprocessed images of a small data set.
_LEAST_DISK_GIB = 10
_LEAST_OPEN_FILES = 1024


_MORE_SHARED_MEMORY = (
    "# in Kubernetes: an emptyDir of medium Memory on /dev/shm\ndocker run --shm-size=8g ...\n"
    "# or, after nnU-Net has planned, load data without workers\nexport nnUNet_n_proc_DA=0"
)


def shared_memory(folder: Path = _SHARED_MEMORY) -> Result:
    """Return whether there is enough shared memory for the workers that load data."""
    if not folder.is_dir():
        return Result(OK, "shared memory: not limited on this system")
    size = shutil.disk_usage(folder).total / 2**30
    message, values = f"shared memory {size:.2g} GiB", {"gib": size}
    if size >= _ENOUGH_SHARED_GIB:
        return Result(OK, message, values=values)
    if os.environ.get("nnUNet_n_proc_DA") == "0":
        return Result(NOTE, f"{message}: data are loaded without workers (nnUNet_n_proc_DA=0)", values=values)
    message += ": enough only for small patches. nnU-Net's own training uses it, too"
    return Result(NOTE, message, _MORE_SHARED_MEMORY, values)


def shared_memory_of_plan(reading: Reading, batch_bytes: int, folder: Path = _SHARED_MEMORY) -> Result:
    """Return whether the batches of a plan, read as ``reading`` says, fit into the shared memory that is free."""
    batch, values = f"batches of {batch_bytes / 2**20:.3g} MiB", {"needed_gib": reading.needed / 2**30}
    if not (reading.workers and folder.is_dir()):
        return Result(OK, f"{batch} need no shared memory", values=values)
    free, needed = shutil.disk_usage(folder).free, f"{reading.needed / 2**20:,.3g} MiB of shared memory"
    message = f"{batch}, read ahead by {reading.workers} worker(s), take {needed}"
    if reading.needed > free:
        return Result(PROBLEM, f"{message}, and {free / 2**20:,.3g} MiB are free", _MORE_SHARED_MEMORY, values)
    return Result(OK, message, values=values)


def free_disk(variable: str) -> Result:
    """Return whether there is enough disk space for the folder that a variable of nnU-Net names."""
    folder = os.environ[variable]
    free = shutil.disk_usage(folder).free / 2**30
    message = f"{free:.0f} GiB free in {variable}"
    if free < _LEAST_DISK_GIB:
        fix = f'# make space in {folder}, or name a larger disk\nexport {variable}="/larger/disk"'
        return Result(PROBLEM, f"{message}: runs need {_LEAST_DISK_GIB} GiB or more", fix, {"gib": free})
    return Result(OK, message, values={"gib": free})


def open_files() -> Result:
    """Return whether a process may open the files of many cases at once."""
    try:
        import resource
    except ImportError:  # Windows
        return Result(OK, "open files: not limited on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft in (resource.RLIM_INFINITY, -1) or soft >= _LEAST_OPEN_FILES:
        return Result(OK, f"open files: up to {soft:,}", values={"limit": soft})
    possible = 4096 if hard in (resource.RLIM_INFINITY, -1) else min(4096, hard)
    message = f"open files: up to {soft}, and training with workers needs {_LEAST_OPEN_FILES} or more"
    return Result(PROBLEM, message, f"ulimit -n {possible}", {"limit": soft})
