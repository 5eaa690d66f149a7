"""A run's folder: one run at a time, and nothing of an earlier one lost."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import psutil

from nnunetv2_macl.distributed import rank
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import cannot_write, write_json

PRETRAINER = "nnUNetTrainerMACLPretrain"
# the plan that a run began with, in its folder
PLAN_COPY = "macl_plan.json"
# names of the cases that a run has seen, by data set; they stay in its folder when weights are given to others
_CASES = "macl_cases.json"


def pretraining_folder(results: Path, dataset_name: str, plans_name: str, configuration: str) -> Path:
    """Where nnU-Net puts pre-training runs; the folds are in it.

    Args:
        results: ``nnUNet_results``.
        dataset_name: by its full name.
        plans_name: plans identifier.
        configuration: of the plan.
    """
    return results / dataset_name / f"{PRETRAINER}__{plans_name}__{configuration}"


def write_cases(folder: Path, cases: Iterable[tuple[str, str]], *, resumed: bool) -> None:
    """Write the names of the cases that a run sees.

    Args:
        folder: of the run.
        cases: data set and name of each.
        resumed: whether the run saw other cases before, which are kept.

    Raises:
        UserError: the file could not be written.
    """
    seen = (cases_seen(folder) or {}) if resumed else {}
    for dataset, case in cases:
        seen.setdefault(dataset, set()).add(case)
    write_json({dataset: sorted(names) for dataset, names in seen.items()}, folder / _CASES)


def cases_seen(folder: Path) -> dict[str, set[str]] | None:
    """Return the names of the cases that a run has seen, by data set; None where its folder does not tell."""
    try:
        content = json.loads((folder / _CASES).read_text(encoding="utf-8"))
        return {dataset: set(names) for dataset, names in content.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return None


class RunLock:
    """Held while a run writes into a folder; a second run is refused. A lock whose process is gone is taken over.

    The file says who holds it, and is there as long as it is held. It is read and written under a lock of the operating
    system, so that of several runs that find it free, or find its process gone, one gets it.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / ".macl_running.json"
        self._held = False

    def acquire(self) -> None:
        """Raises UserError where another run holds the folder, with its host, process and start; or if it is read-only."""
        if self._held or rank() != 0:
            return
        try:
            with self._open_alone() as stream:
                self._refuse_if_alive(stream.read())
                stream.seek(0)
                stream.truncate()
                json.dump(_this_process(), stream)
        except OSError as error:
            raise cannot_write(error, self.file) from error
        self._held = True

    @contextlib.contextmanager
    def _open_alone(self) -> Iterator[TextIO]:
        while True:
            with open(os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8") as stream:
                _lock(stream)
                if self._is(stream):
                    yield stream
                    return

    def _is(self, stream: TextIO) -> bool:
        """The file may have been given back, and removed, since it was opened."""
        try:
            return os.path.samestat(os.stat(self.file), os.fstat(stream.fileno()))
        except FileNotFoundError:
            return False

    def holder(self) -> dict[str, Any] | None:
        """Host, pid and start of the run that holds the folder, as far as can be told from here; None where there is none."""
        try:
            return _alive_one(self.file.read_text(encoding="utf-8"))
        except OSError:
            return None

    def _refuse_if_alive(self, content: str) -> None:
        if other := _alive_one(content):
            raise UserError(
                f"Another run is writing into {self.file.parent}: process {other['pid']} on {other['host']}, since "
                f"{other.get('started')}. Wait for it or stop it. If it is gone, type: rm '{self.file}'"
            )

    def release(self) -> None:
        if self._held:
            with contextlib.suppress(OSError):
                self.file.unlink(missing_ok=True)
            self._held = False


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "processes": _process_numbers(),
        "pid": os.getpid(),
        "process_start": _process_start(os.getpid()),
        "started": datetime.now().isoformat(" ", "seconds"),
    }


def _lock(stream: TextIO) -> None:
    # not on Windows, and not on every file system: there the moment between reading and writing is not covered
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(stream, fcntl.LOCK_EX)


def _alive_one(content: str) -> dict[str, Any] | None:
    """Who holds a folder, of what its lock file says; None where its process is gone."""
    try:
        other = json.loads(content)
        ours = _process_numbers()
        here = (other["host"], other.get("processes", ours)) == (socket.gethostname(), ours)
        pid, begun = int(other["pid"]), other.get("process_start")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # nobody's: its writer was killed in the middle
    return None if here and not _alive(pid, begun) else other


def _alive(pid: int, begun: str | None) -> bool:
    """Whether the process that wrote a lock is alive: its number may be another's by now."""
    if pid == os.getpid():
        return False
    if not psutil.pid_exists(pid):
        return False
    now = _process_start(pid)
    return begun is None or now is None or begun == now


def _process_numbers() -> str | None:
    """Whose numbers processes have here: of several containers on a host each counts its own. None where that is not known."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _process_start(pid: int) -> str | None:
    """When a process of this machine began, as Linux counts it; None where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # the second field is the command's name in brackets, with anything in it
        return f"{boot} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return None


def archive_previous_run(folder: Path, keep: Path, say: Callable[[str], None]) -> None:
    """Move what an earlier run left in its folder into a sub-folder, so that a new run overwrites nothing.

    Args:
        folder: of the run.
        keep: this run's own log file.
        say: tells the user.
    """
    # nnU-Net has opened this run's W&B folder by now
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
    say(f"An earlier run was in this folder; it was moved to {target}. (--c would have gone on with it.)")
