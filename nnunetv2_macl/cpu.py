"""How many CPU cores there are to use."""

import os


def usable_cores() -> int:
    """Those that this process may run on: a container or a cluster's job may have fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
