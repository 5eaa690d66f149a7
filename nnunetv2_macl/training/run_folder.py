"""Manage the folder of a run: only one run at a time writes into it, and the files of an earlier run are kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import psutil

from nnunetv2_macl.distributed import rank
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import write_error, write_json

if TYPE_CHECKING:
    from nnunetv2_macl.nnunet import DatasetConfiguration

PRETRAINER = "nnUNetTrainerMACLPretrain"
# The file in the folder of a run with the plan that the run began with.
PLAN_COPY = "macl_plan.json"
LOCK_FILE = ".macl_running.json"
# Names of the cases that a run has seen, by data set. This file stays here when the weights are shared.
_CASES = "macl_cases.json"
# The system computes when a process began from its clock, which may have been set since.
_CLOCK_SECONDS = 5


def pretraining_folder(results: Path, dataset_name: str, plans_name: str, configuration: str) -> Path:
    """Return the folder into which nnU-Net puts pre-training runs, with one folder for each fold.

    Args:
        results: The folder ``nnUNet_results``.
        dataset_name: Full name of the data set.
        plans_name: Plans identifier.
        configuration: Name of the configuration.
    """
    return results / dataset_name / f"{PRETRAINER}__{plans_name}__{configuration}"


def folders_to_start_from(results: Path, configuration: DatasetConfiguration) -> list[Path]:
    """Return the folders of the pre-training runs from which a configuration is fine-tuned, the first with weights first.

    A cascade's second stage has the images of its parent configuration, and the same network except for the stem.
    """
    names = dict.fromkeys((configuration.name, configuration.parent_name))
    dataset, plans = configuration.dataset_name, configuration.plans_name
    return [pretraining_folder(results, dataset, plans, name) for name in names]


def write_cases(folder: Path, cases: Iterable[tuple[str, str]], *, resumed: bool) -> None:
    """Write the names of the cases that a run sees.

    Args:
        folder: Folder of the run.
        cases: Data set and name of each case.
        resumed: Whether the run has seen cases before. The file keeps their names.

    Raises:
        UserError: The file could not be written.
    """
    seen = (cases_seen(folder) or {}) if resumed else {}
    for dataset, case in cases:
        seen.setdefault(dataset, set()).add(case)
    write_json({dataset: sorted(names) for dataset, names in seen.items()}, folder / _CASES)


def cases_seen(folder: Path) -> dict[str, set[str]] | None:
    """Return the names of the cases that a run has seen, by data set; None if its folder does not say."""
    try:
        content = json.loads((folder / _CASES).read_text(encoding="utf-8"))
        return {dataset: set(names) for dataset, names in content.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return None


class RunLock:
    """Locks a folder for one run. A second run is refused, but a lock of a process that has ended is taken over.

    The lock is a file that names the process that holds it. The file is read and written under a lock of the operating
    system, so exactly one of several runs gets a free lock.

    Args:
        folder: Folder to lock.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / LOCK_FILE
        self._held = False

    def acquire(self) -> None:
        """Lock the folder, on rank 0. Does nothing if this object holds the lock.

        Raises:
            UserError: Another run holds the lock; its host, process and start are in the message. Or the folder is read-only.
        """
        if self._held or rank() != 0:
            return
        try:
            with self._open_alone() as stream:
                if other := _living_holder(stream.read()):
                    raise UserError(
                        f"Another run is writing into {self.file.parent}: process {other['pid']} on {other['host']}, since "
                        f"{other.get('started')}. Wait for this process or stop it. If it does not exist any more, type: "
                        f"rm '{self.file}'"
                    )
                stream.seek(0)
                stream.truncate()
                json.dump(_this_process(), stream)
        except OSError as error:
            raise write_error(error, self.file) from error
        self._held = True

    @contextlib.contextmanager
    def _open_alone(self) -> Iterator[TextIO]:
        is_current = False
        while not is_current:
            with open(os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8") as stream:
                # Windows and some file systems have no such lock. Two runs that start at the same moment can then both get
                # the folder.
                with contextlib.suppress(ImportError, OSError):
                    import fcntl

                    fcntl.flock(stream, fcntl.LOCK_EX)
                # The file may have been removed after it was opened, because its lock was released meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    is_current = os.path.samestat(os.stat(self.file), os.fstat(stream.fileno()))
                if is_current:
                    yield stream

    def holder(self) -> dict[str, Any] | None:
        """Return host, process and start of the run that holds the lock; None if there is none.

        A lock of another machine, whose processes cannot be seen from here, counts as held.
        """
        try:
            return _living_holder(self.file.read_text(encoding="utf-8"))
        except OSError:
            return None

    def release(self) -> None:
        """Remove the lock, if this object holds it."""
        if self._held:
            with contextlib.suppress(OSError):
                self.file.unlink(missing_ok=True)
            self._held = False


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "processes": _process_numbers(),
        "pid": os.getpid(),
        "process_start": psutil.Process().create_time(),
        "started": datetime.now().isoformat(" ", "seconds"),
    }


def _living_holder(content: str) -> dict[str, Any] | None:
    """Return the content of a lock file, or None if its process has ended. Another process may have its number by now."""
    try:
        other = json.loads(content)
        ours = _process_numbers()
        here = (other["host"], other.get("processes", ours)) == (socket.gethostname(), ours)
        pid, begun = int(other["pid"]), float(other.get("process_start", math.nan))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # the process was killed while it wrote the file
    if not here:
        return other
    try:
        is_another = pid == os.getpid() or abs(psutil.Process(pid).create_time() - begun) > _CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return None
    return None if is_another else other


def _process_numbers() -> str | None:
    """Return an identifier of the process numbers here, because each container on a host has its own; None if unknown."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def digests_of(names: Iterable[str]) -> dict[str, str]:
    """Return a digest of each name, by which weights say what was left out of their training without telling names."""
    return {hashlib.sha256(name.encode()).hexdigest()[:16]: name for name in names}


def not_left_out(cases: Iterable[str], description: Mapping[str, Any]) -> list[str] | None:
    """Return the cases that a training did not leave out, by the description of its weights; None if it does not say."""
    left_out = description.get("left_out")
    if not isinstance(left_out, list):
        return None
    return sorted(name for digest, name in digests_of(cases).items() if digest not in left_out)


def archive_previous_run(folder: Path, keep: Path, log: Callable[[str], None]) -> None:
    """Move the files of an earlier run into a sub-folder, so that a new run overwrites nothing.

    Args:
        folder: Folder of the run.
        keep: Log file of the new run, which stays.
        log: Called with a message for the user.
    """
    # The W&B folder stays, because nnU-Net has opened it for the new run.
    old = [p for p in folder.iterdir() if p != keep and not p.name.startswith((".", "previous_", "wandb"))]
    if not any(p.suffix == ".pth" for p in old):
        return
    target = folder / f"previous_{datetime.now():%Y%m%d_%H%M%S}"
    number = 1
    while target.exists():
        target, number = target.with_name(f"{target.name}_{number}"), number + 1
    target.mkdir()
    for path in old:
        path.rename(target / path.name)
    log(f"An earlier run was in this folder. Its files were moved to {target}. (--c would have continued the run.)")
