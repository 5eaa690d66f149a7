"""Checks of a machine and a data set. Each problem comes with the command that fixes it.

A check is a function that returns a `Result`. An error in a check becomes a result, too.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from nnunetv2_macl import __version__
from nnunetv2_macl.doctor import environment, machine
from nnunetv2_macl.doctor.result import NOTE, OK, PROBLEM, Result

__all__ = ["NOTE", "OK", "PROBLEM", "Result", "as_json", "as_lines", "run_checks"]

# Whether something is written into the folder, by its variable.
_FOLDERS = {"nnUNet_raw": False, "nnUNet_preprocessed": True, "nnUNet_results": True}
_OTHER_SHELLS = (
    "The lines are for bash, zsh and other POSIX shells. In fish, type set -gx NAME VALUE; in PowerShell, type "
    "$env:NAME = 'VALUE'. They set a variable only in the current shell. To set it in every new shell:"
)


def run_checks(
    dataset: str | None = None, configuration: str | None = None, plans: str = "nnUNetPlans", device: str = "cuda"
) -> Iterator[Result]:
    """Check this machine, and a data set if one is given by name or id. Yield each result as soon as it is known."""
    wrong = set()
    checks: list[tuple[str, Callable[[], Result]]] = [
        ("python", environment.python_version),
        ("torch", partial(environment.torch_and_device, device)),
        ("compile", partial(environment.compiling, device)),
        ("nnunet", environment.nnunet_version),
        *((name, partial(environment.folder_variable, name, written)) for name, written in _FOLDERS.items()),
        ("nnUNet_extTrainer", environment.trainers_are_found),
        ("wandb", environment.wandb_is_installed),
        ("shared_memory", machine.shared_memory),
        ("open_files", machine.open_files),
        *((f"disk_{name}", partial(machine.free_disk, name)) for name, written in _FOLDERS.items() if written),
    ]
    for name, check in checks:
        if name.removeprefix("disk_") in wrong:
            continue
        for result in _guarded(name, (run() for run in (check,))):
            wrong |= {result.check} if result.status == PROBLEM else set()
            yield result
    if wrong & {*_FOLDERS, "nnUNet_extTrainer"}:
        environment_name = os.environ.get("CONDA_DEFAULT_ENV", "base")
        every_shell = "# put these lines into ~/.bashrc, or ~/.zshrc in zsh"
        if environment_name != "base":
            every_shell = f'conda env config vars set NAME="VALUE"\nconda activate {environment_name}'
        yield Result(NOTE, _OTHER_SHELLS, every_shell, check="shell")
    if dataset is None:
        return
    if needed := wrong & {"torch", "nnunet", *_FOLDERS}:
        words = f"{dataset} is checked once these are fixed: {', '.join(sorted(needed))}"
        yield Result(NOTE, words, check="dataset")
        return

    def of_dataset() -> Iterator[Result]:
        # This module needs torch and nnU-Net, which may be missing.
        from nnunetv2_macl.doctor.dataset import dataset_checks

        yield from dataset_checks(dataset, configuration, plans, device)

    yield from _guarded("dataset", of_dataset())


def _guarded(name: str, results: Iterator[Result]) -> Iterator[Result]:
    """Yield the results of checks. Hide what nnU-Net prints, and turn an error into a result."""
    while True:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                result = next(results)
        except StopIteration:
            return
        except Exception as error:
            message = f"this could not be checked: {type(error).__name__}: {error}"
            yield Result(PROBLEM, message, check=name)
            return
        yield replace(result, check=result.check or name)


def as_lines(result: Result) -> str:
    """Return a result as lines for the screen."""
    mark = {OK: "  ok   ", PROBLEM: "  WRONG", NOTE: "  --   "}[result.status]
    first, *more = result.message.splitlines() or [""]
    lines = [f"{mark} {first}", *(f"        {line}" for line in more)]
    lines += [f"        > {line}" for line in (result.fix or "").splitlines()]
    return "\n".join(lines)


def as_json(results: Iterable[Result]) -> dict[str, Any]:
    """Return all results as plain JSON types."""
    results = list(results)
    return {
        "nnunetv2_macl": __version__,
        "python": sys.version.split()[0],
        "right": all(result.status != PROBLEM for result in results),
        "results": [asdict(result) for result in results],
    }
