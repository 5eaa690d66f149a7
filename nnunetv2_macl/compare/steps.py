"""Run each step of a study once, in one process or in several, also on several machines that share the study's folder.

Each step has a folder. ``done.json``, which is written last, marks the step as done. A lock file in the folder names the
process that runs the step.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import CannotWriteError, write_error, write_json
from nnunetv2_macl.text import duration
from nnunetv2_macl.training.run_folder import RunLock

logger = logging.getLogger(__name__)

DONE_FILE = "done.json"


class StepError(UserError):
    """A step failed, for a reason that may not concern the other steps."""


@dataclass(frozen=True)
class Task:
    """A step: a function that writes its results to a folder of its own."""

    name: str
    folder: Path
    run: Callable[[], dict[str, Any]]  # returns the content of ``done.json``
    needs: tuple[Task, ...] = ()  # tasks that must be done first
    # what is left out if this step raises `StepError`, for example an arm; None: all steps stop
    part: str | None = None

    @property
    def is_done(self) -> bool:
        return (self.folder / DONE_FILE).is_file()


def run_steps(
    steps: Sequence[Task], jobs: int, poll_seconds: float = 5.0, left_out: dict[Path, Task] | None = None
) -> None:
    """Run all steps that are not done, and wait for steps that other processes run.

    If a step raises `StepError`, the other steps of its part and the steps that need it are left out.

    Args:
        steps: The steps, in the order in which they start.
        jobs: Number of steps that run at the same time.
        poll_seconds: Time in s between two looks at the steps of other processes.
        left_out: Steps that an earlier call left out, by folder. This call adds its own.

    Raises:
        UserError: A step without a part failed, or a folder cannot be written. Steps that are running finish first.
    """
    work = _TaskQueue(steps, poll_seconds, {} if left_out is None else left_out)
    with ThreadPoolExecutor(jobs) as pool:
        workers = [pool.submit(work.run) for _ in range(jobs)]
        try:
            for worker in workers:
                worker.result()
        finally:
            # without this, the pool would run the remaining steps after an error or Ctrl-C
            work.stop()


class _TaskQueue:
    def __init__(self, steps: Sequence[Task], poll_seconds: float, left_out: dict[Path, Task]) -> None:
        self._todo = [step for step in steps if not step.is_done]
        self._total, self._done = len(steps), len(steps) - len(self._todo)
        self._poll_seconds = poll_seconds
        self._left_out = left_out
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._reported: set[str] = set()
        if self._done:
            logger.info("%d of %d steps are done already", self._done, self._total)

    def stop(self) -> None:
        self._stop.set()

    def run(self) -> None:
        try:
            while not self._stop.is_set():
                claimed = self._claim()
                if claimed is None:
                    if not self._todo:
                        return
                    self._stop.wait(self._poll_seconds)
                    continue
                step, lock = claimed
                try:
                    self._do(step)
                except StepError as error:
                    if step.part is None:
                        raise
                    with self._guard:
                        self._left_out[step.folder] = step
                    logger.error("%s\nThe study goes on with the other arms.", error)
                finally:
                    lock.release()
        except BaseException:
            self.stop()
            raise

    def _claim(self) -> tuple[Task, RunLock] | None:
        """Return the first step that can run now and its lock, and drop steps that other processes have done."""
        with self._guard:
            for step in list(self._todo):
                if step.is_done:
                    self._todo.remove(step)
                    self._done += 1
                    continue
                needed = [need.folder for need in step.needs]
                others = [other for other in self._left_out.values() if not other.is_done]
                if any(other.part == step.part or other.folder in needed for other in others):
                    self._todo.remove(step)
                    self._left_out[step.folder] = step
                    continue
                if not all(need.is_done for need in step.needs):
                    continue
                lock = RunLock(step.folder)
                try:
                    step.folder.mkdir(parents=True, exist_ok=True)
                    lock.acquire()
                except OSError as error:
                    raise write_error(error, step.folder) from error
                except CannotWriteError:
                    raise
                except UserError as held:
                    if step.name not in self._reported:
                        self._reported.add(step.name)
                        logger.info("Waiting: %s", held)
                    continue
                if step.is_done:  # another process finished the step just before this one got the lock
                    lock.release()  # type: ignore[unreachable]
                    continue
                self._todo.remove(step)
                return step, lock
        return None

    def _do(self, step: Task) -> None:
        began = perf_counter()
        logger.info("%s ...", step.name)
        result = step.run()
        seconds = perf_counter() - began
        write_json({"seconds": seconds} | result, step.folder / DONE_FILE)
        with self._guard:
            self._done += 1
            logger.info("[%d/%d] %s, done in %s", self._done, self._total, step.name, duration(seconds))
