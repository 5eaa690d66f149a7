"""Draw ``progress.png`` during the training."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from time import monotonic

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.monitoring import plot_progress


class ProgressPicture:
    """Draws the curves of a run in a separate thread, at most once per ``every`` seconds.

    Drawing takes about one second, and would slow down a run whose epochs take a few seconds.

    Args:
        file: File of the picture.
        title: Title of the picture.
        every: Shortest time between two pictures, in seconds.
    """

    def __init__(self, file: Path, title: str, every: float = 60.0) -> None:
        self.file, self.title, self.every = file, title, every
        self._drawn_at: float | None = None
        self._thread: threading.Thread | None = None

    def update(self, log: dict[str, list], *, is_last: bool = False) -> None:
        """Draw the log if it is time for it. The last picture is always drawn, and this method waits for it."""
        due = self._drawn_at is None or monotonic() - self._drawn_at >= self.every
        if not (due or is_last):
            return
        self.wait()
        self._drawn_at = monotonic()
        # Copy the log, because it grows while it is drawn.
        values = {key: list(value) for key, value in log.items()}
        self._thread = threading.Thread(target=self._draw, args=(values,), name="progress.png")
        self._thread.start()
        if is_last:
            self.wait()

    def wait(self) -> None:
        """Wait for the picture that is being drawn, if there is one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _draw(self, log: dict[str, list]) -> None:
        # A picture that cannot be written is no reason to end a run.
        with contextlib.suppress(UserError):
            plot_progress(log, self.file, self.title)
