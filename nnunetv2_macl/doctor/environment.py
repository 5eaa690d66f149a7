"""Checks of the installed packages and of nnU-Net's environment variables."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import shutil
import sys
import sysconfig
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nnunetv2_macl.cpu import usable_cores
from nnunetv2_macl.doctor.result import NOTE, OK, PROBLEM, Result, ask
from nnunetv2_macl.text import pluralise

TRAINER = "nnUNetTrainerMACL"
_OLDEST_PYTHON = (3, 10)
_FIND_TIMEOUT = 180
# Before this version, torch.load with weights_only runs code from some files.
_SAFE_TORCH = (2, 6)
_HOW_TO_INSTALL_TORCH = "# https://pytorch.org/get-started/locally shows the command for your system, for example\n"
_SET_TRAINERS = 'export nnUNet_extTrainer="$(nnUNetv2_macl_trainers)"'


def python_version() -> Result:
    """Return whether Python is new enough."""
    message = f"Python {platform.python_version()} in {sys.prefix}"
    if sys.version_info < _OLDEST_PYTHON:
        return Result(PROBLEM, f"{message}: 3.10 or newer is needed", "conda create -n macl python=3.12")
    return Result(OK, message)


def wandb_is_installed() -> Result:
    """Return whether W&B is installed, if nnU-Net's variable switches it on."""
    from nnunetv2_macl.nnunet import lacks_wandb  # after the check that nnU-Net can be imported

    if lacks_wandb():
        return Result(PROBLEM, "nnUNet_wandb_enabled is set, but W&B is not installed", "pip install wandb")
    return Result(OK, "Weights & Biases (W&B) is switched off, or is installed")


def torch_and_device(device: str) -> Result:
    """Return whether torch is installed and can compute on the device, and note a torch that is too old."""
    result = _torch_on(device)
    return noting_old_torch(result, importlib.import_module("torch").__version__) if result.status == OK else result


def noting_old_torch(result: Result, version: str) -> Result:
    """Return the result, as a note if this version of torch may run code from files with weights."""
    if tuple(map(int, re.findall(r"\d+", version)[:2])) >= _SAFE_TORCH:
        return result
    words = "before 2.6, torch cannot load some checkpoints of nnU-Net, and is less safe with files from elsewhere"
    return replace(
        result,
        status=NOTE,
        message=f"{result.message}; {words}",
        fix=f"{_HOW_TO_INSTALL_TORCH}pip install --upgrade torch",
    )


def _torch_on(device: str) -> Result:
    if device not in ("cuda", "cpu", "mps"):
        words = f"-device must be cuda, cpu or mps, got '{device}'"
        return Result(PROBLEM, words, "nnUNetv2_macl_doctor -device cpu")
    install = f"{_HOW_TO_INSTALL_TORCH}pip install --force-reinstall torch"
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        return Result(PROBLEM, f"torch cannot be imported: {_short(error)}", install)
    message = f"torch {torch.__version__}"
    without = "# to try the commands without a GPU, add to each: -device cpu"
    if device == "cpu":
        return Result(OK, f"{message} on the CPU, {pluralise(usable_cores(), 'core')}", values={"device": "cpu"})
    if device == "mps":
        if not torch.backends.mps.is_available():
            return Result(PROBLEM, f"{message} finds no Apple GPU (mps)", without)
        return Result(OK, f"{message} on an Apple GPU", values={"device": "mps"})
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return Result(PROBLEM, f"{message} is built without CUDA", f"{install}\n{without}")
        look = "# check the driver and the GPU. In a container: docker run --gpus all\nnvidia-smi"
        message += f" is built for CUDA {torch.version.cuda} and finds no device"
        return Result(PROBLEM, message, f"{look}\n{without}")
    gpu = torch.cuda.get_device_properties(0)
    message += f", CUDA {torch.version.cuda}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    if torch.cuda.device_count() > 1:
        message += f", and {torch.cuda.device_count() - 1} more"
    try:
        (torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")).sum().item()
    except Exception as error:
        return Result(PROBLEM, f"{message}, which cannot compute: {_short(error)}", f"{install}\n{without}")
    return Result(OK, message, values={"device": "cuda", "gpu_memory_gib": gpu.total_memory / 2**30})


def compiling(device: str) -> Result:
    """Return whether torch.compile can work, which nnU-Net uses on GPUs unless ``nnUNet_compile`` is false."""
    switched_off = os.environ.get("nnUNet_compile", "t").lower() not in ("true", "1", "t")
    if device != "cuda" or os.name == "nt" or switched_off:
        return Result(OK, "torch.compile is not used")
    missing, fix = [], []
    if not (shutil.which(os.environ.get("CC", "")) or any(map(shutil.which, ("gcc", "cc", "clang")))):
        missing.append("a C compiler")
        fix.append("sudo apt-get install gcc")
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        missing.append("Python's headers")
        fix.append(f"sudo apt-get install python{sys.version_info.major}.{sys.version_info.minor}-dev")
    torch = importlib.import_module("torch")
    if torch.cuda.is_available() and (capability := torch.cuda.get_device_capability()) < (7, 0):
        missing.append(f"a GPU of compute capability 7.0 or newer (this one: {capability[0]}.{capability[1]})")
    if not missing:
        return Result(OK, "torch.compile has a C compiler and Python's headers")
    fix += ["# or train without torch.compile, which is somewhat slower", "export nnUNet_compile=f"]
    message = f"torch.compile, which nnU-Net uses on GPUs, needs {' and '.join(missing)}"
    return Result(PROBLEM, message, "\n".join(fix))


def nnunet_version() -> Result:
    """Return whether nnU-Net is installed and searches nnUNet_extTrainer (since 2.8.0)."""
    fix = 'pip install --upgrade "nnunetv2>=2.8.1"'
    message = "nnU-Net"
    with contextlib.suppress(PackageNotFoundError):
        message = f"nnU-Net {version('nnunetv2')}"
    try:
        paths = importlib.import_module("nnunetv2.paths")
    except Exception as error:
        return Result(PROBLEM, f"nnU-Net cannot be imported: {_short(error)}", fix)
    if not hasattr(paths, "nnUNet_extTrainer"):
        return Result(PROBLEM, f"{message} does not know nnUNet_extTrainer, which 2.8.0 introduced", fix)
    return Result(OK, f"{message}, which finds trainers through nnUNet_extTrainer")


def folder_variable(name: str, written: bool = True) -> Result:
    """Return whether a folder variable of nnU-Net names a folder that can be read and, if ``written``, written."""
    example = f'export {name}="/path/to/{name}"'
    value = os.environ.get(name)
    if not value:
        return Result(PROBLEM, f"{name} is not set: nnU-Net does not know where the data are", example)
    folder = Path(value)
    if folder.is_file():
        return Result(PROBLEM, f"{name} names a file: {value}", example)
    if not folder.is_dir():
        fix = f'mkdir -p "{value}"\n# or, if it is elsewhere\n{example}'
        if value.startswith("~"):
            # shells keep this sign in quotes, and nnU-Net does not replace it
            fix = f'export {name}="$HOME{value[1:]}"'
        return Result(PROBLEM, f"{name} names a folder that does not exist: {value}", fix)
    if not os.access(folder, os.R_OK | os.X_OK | (os.W_OK if written else 0)):
        words = f"{name}: no permission to {'write' if written else 'read'} in {value}"
        return Result(PROBLEM, words, f'ls -ld "{value}"')
    return Result(OK, f"{name}={value}")


def trainers_are_found() -> Result:
    """Return whether nnU-Net finds our fine-tuning trainer in the way that its commands search for it."""
    value = os.environ.get("nnUNet_extTrainer")
    if not value:
        return Result(PROBLEM, f"nnUNet_extTrainer is not set: nnU-Net does not find {TRAINER}", _SET_TRAINERS)
    found = ask("finder", TRAINER, timeout=_FIND_TIMEOUT)
    file = found.get("file")
    if found.get("ours"):
        return Result(OK, f"nnU-Net finds {TRAINER} through nnUNet_extTrainer")
    if "error" not in found:
        fix = f"# rename the class {TRAINER} in {file}, or let nnU-Net search our folder first\n{_SET_TRAINERS}"
        words = f"{TRAINER} is hidden by another class with this name in {file}"
        return Result(PROBLEM, words, fix, {"file": file})
    if file:
        words = f"nnU-Net's search stops at {file}, which cannot be imported: {found['error']}"
        fix = "# correct that file, or move it out of the folders in nnUNet_extTrainer"
        return Result(PROBLEM, words, fix, {"file": file})
    return Result(PROBLEM, f"nnU-Net does not find {TRAINER} in {value}: {found['error'][:100]}", _SET_TRAINERS)


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
