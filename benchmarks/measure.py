"""Time several functions in turn, so that other load on the machine slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


class Row(NamedTuple):
    """A line of the table. ``bar`` is the required ``ratio``, and ``holds`` says whether it is met, or None without a bar."""

    name: str
    what: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    bar: str
    holds: bool | None


def at_most(name: str, what: str, ours: float, theirs: float, unit: str, bar: float) -> Row:
    """Return a row that requires ours / theirs to be at most ``bar``."""
    ratio = ours / theirs
    return Row(name, what, ours, theirs, unit, ratio, f"at most {bar:g}", ratio <= bar)


def at_least(
    name: str, what: str, ours: float, theirs: float, unit: str, bar: float, ratio: float | None = None
) -> Row:
    """Return a row that requires ``ratio``, by default ours / theirs, to be at least ``bar``."""
    ratio = ours / theirs if ratio is None else ratio
    return Row(name, what, ours, theirs, unit, ratio, f"at least {bar:g}", ratio >= bar)


def side_by_side(*runs: Callable[[], object], repeats: int = 5) -> list[float]:
    """Return the median seconds of each function. The functions run in turn, after one run of each to warm up."""
    seconds: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for kept, run in zip(seconds, runs, strict=True):
            took = timed(run)
            if repeat:
                kept.append(took)
    return [statistics.median(kept) for kept in seconds]


def timed(run: Callable[[], object]) -> float:
    """Return the seconds that a function takes, including its work on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_allocated(run: Callable[[], T]) -> tuple[T, int]:
    """Return the result of a function, and the peak memory that torch's CPU allocator added during the run, bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return result, peak
