"""Checks of what the operating system allows: shared memory, disk, open files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nnunetv2_macl.doctor.result import NOTE, RIGHT, WRONG, Result
from nnunetv2_macl.doctor.shell import set_variable, shell_in_use

_SHARED_MEMORY = Path("/dev/shm")
# Docker gives 64 MiB; workers hand over whole batches
_LEAST_SHARED_GIB = 1
# a run's checkpoints, fine-tuned models and what nnU-Net preprocesses of a small data set
_LEAST_DISK_GIB = 10
_LEAST_OPEN_FILES = 1024


def shared_memory(folder: Path = _SHARED_MEMORY) -> Result:
    """Whether the workers that load data have room to hand it over."""
    check = "shared_memory"
    if not folder.is_dir():
        return Result(check, RIGHT, "shared memory: not limited on this system")
    size = shutil.disk_usage(folder).total / 2**30
    words, values = f"shared memory {size:.2g} GiB", {"gib": size}
    if size >= _LEAST_SHARED_GIB:
        return Result(check, RIGHT, words, values=values)
    if os.environ.get("nnUNet_n_proc_DA") == "0":
        return Result(check, NOTE, f"{words}: data are loaded without workers (nnUNet_n_proc_DA=0)", values=values)
    mend = "# in Kubernetes: an emptyDir of medium Memory on /dev/shm\ndocker run --shm-size=8g ...\n"
    mend += f"# or load data without workers, once nnU-Net has planned\n{set_variable('nnUNet_n_proc_DA', '0', shell_in_use())}"
    return Result(check, WRONG, f"{words}: too little for data loading, which then dies of a bus error", mend, values)


def free_disk(variable: str) -> Result:
    """Whether there is room where nnU-Net writes.

    Args:
        variable: ``nnUNet_preprocessed`` or ``nnUNet_results``, set.
    """
    folder = os.environ[variable]
    free = shutil.disk_usage(folder).free / 2**30
    words, check = f"{free:.0f} GiB free in {variable}", f"disk_{variable}"
    if free < _LEAST_DISK_GIB:
        mend = f"# make space in {folder}, or name a larger disk\n"
        mend += set_variable(variable, "/larger/disk", shell_in_use())
        return Result(check, WRONG, f"{words}: runs need {_LEAST_DISK_GIB} GiB or more", mend, {"gib": free})
    return Result(check, RIGHT, words, values={"gib": free})


def open_files() -> Result:
    """Whether a process may open the files of many cases at once."""
    check = "open_files"
    try:
        import resource
    except ImportError:  # Windows
        return Result(check, RIGHT, "open files: not limited on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft in (resource.RLIM_INFINITY, -1) or soft >= _LEAST_OPEN_FILES:
        return Result(check, RIGHT, f"open files: up to {soft:,}", values={"limit": soft})
    possible = 4096 if hard in (resource.RLIM_INFINITY, -1) else min(4096, hard)
    words = f"open files: up to {soft}, and training with workers needs {_LEAST_OPEN_FILES} or more"
    return Result(check, WRONG, words, f"ulimit -n {possible}", {"limit": soft})
