"""A user's mistake inside nnU-Net's own commands ends in its message, not in a traceback."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nnunetv2_macl.errors import UserError


def user_errors_end_the_run(method: Callable) -> Callable:
    """Turn a UserError of a trainer's method into an exit with code 1 that shows the message alone.

    nnU-Net's commands have no place for a user's mistake: they would print a traceback. A run that ends before it wrote
    anything but its log leaves nothing behind.
    """

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except UserError as error:
            self.print_to_log_file(f"Error: {error}", also_print_to_console=False)
            _leave_nothing(Path(self.output_folder), Path(self.log_file))
            raise SystemExit(f"\nError: {error}") from error

    return wrapped


def _leave_nothing(folder: Path, log: Path) -> None:
    # another rank may be at it too
    with contextlib.suppress(OSError):
        if any(path != log and not path.name.startswith(".") for path in folder.iterdir()):
            return
        log.unlink(missing_ok=True)
        # fold, trainer and data set, as far as nothing else is in them
        for empty in (folder, folder.parent, folder.parent.parent):
            empty.rmdir()
