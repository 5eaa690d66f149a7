"""Side by side in one run: ways of doing one thing in turn, so that a busy machine slows them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


class Row(NamedTuple):
    """A line of the table. ``ratio`` is what the bar speaks of; ``holds`` says whether it is met, None where there is no bar."""

    name: str
    what: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    bar: str
    holds: bool | None


def at_most(name: str, what: str, ours: float, theirs: float, unit: str, bar: float) -> Row:
    ratio = ours / theirs
    return Row(name, what, ours, theirs, unit, ratio, f"at most {bar:g}", ratio <= bar)


def at_least(
    name: str, what: str, ours: float, theirs: float, unit: str, bar: float, ratio: float | None = None
) -> Row:
    """``ratio`` where it is not ours over theirs."""
    ratio = ours / theirs if ratio is None else ratio
    return Row(name, what, ours, theirs, unit, ratio, f"at least {bar:g}", ratio >= bar)


def side_by_side(*runs: Callable[[], object], repeats: int = 5) -> list[float]:
    """Median seconds of each, run in turn after a run of each to warm up."""
    seconds: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for kept, run in zip(seconds, runs, strict=True):
            took = timed(run)
            if repeat:
                kept.append(took)
    return [statistics.median(kept) for kept in seconds]


def timed(run: Callable[[], object]) -> float:
    """Seconds, with a GPU waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_allocated(run: Callable[[], T]) -> tuple[T, int]:
    """What a run returns, and the most bytes that torch's CPU allocator held during it beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return result, peak
