"""A run's folder: one run at a time, and nothing of an earlier one lost."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from nnunetv2_macl.distributed import rank
from nnunetv2_macl.errors import UserError


class RunLock:
    """Held while a run writes into a folder; a second run is refused. A lock whose process is gone is taken over."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / ".macl_running.json"
        self._held = False

    def acquire(self) -> None:
        """Raises UserError where another run holds the folder; names its host, process and start."""
        if self._held or rank() != 0:
            return
        mine = json.dumps(
            {"host": socket.gethostname(), "pid": os.getpid(), "started": datetime.now().isoformat(" ", "seconds")}
        )
        for _ in range(2):
            try:
                handle = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                self._refuse_if_alive()
                self.file.unlink(missing_ok=True)
                continue
            with os.fdopen(handle, "w") as stream:
                stream.write(mine)
            self._held = True
            return
        raise UserError(f"{self.file.parent} was taken by another run just now. Wait for it, or use another fold.")

    def holder(self) -> dict[str, Any] | None:
        """Host, pid and start of the run that holds the folder, as far as can be told from here; None where there is none."""
        try:
            other = json.loads(self.file.read_text())
            host, pid = other["host"], int(other["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return None if host == socket.gethostname() and not _alive(pid) else other

    def _refuse_if_alive(self) -> None:
        other = self.holder()
        if other is None:
            return
        raise UserError(
            f"Another run is writing into {self.file.parent}: process {other['pid']} on {other['host']}, since "
            f"{other.get('started')}. Wait for it or stop it. If it is gone, type: rm '{self.file}'"
        )

    def release(self) -> None:
        if self._held:
            self.file.unlink(missing_ok=True)
            self._held = False

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.release()


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def set_aside(folder: Path, keep: Path, say: Callable[[str], None]) -> None:
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
