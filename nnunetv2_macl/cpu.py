"""The number of usable CPU cores."""

import os


def usable_cores() -> int:
    """Return the number of cores that this process may use. A container or a cluster job may limit it."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
