"""Format numbers and lists as text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def pluralise(number: int, what: str) -> str:
    """Return a number with its noun: ``1 case``, ``2 cases``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def join_words(items: Iterable[object]) -> str:
    """Return the items as a list in text: ``a, b and c``."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last


def first_of(names: Sequence[str], number: int = 10) -> str:
    """Return the first names as a list in text: ``a, b, ...``."""
    return ", ".join(names[:number]) + ", ..." * (len(names) > number)


def duration(seconds: float) -> str:
    """Return a duration as text: ``90 s``, ``5 min``, ``2.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size_text(gib: float) -> str:
    """Return a size in GiB as text, in MiB if it is below 1 GiB."""
    return f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.0f} MiB"


def last_line(error: Exception) -> str:
    """Return the reason from an error, for one of SimpleITK without the places in its source code."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # ITK adds the last error of the system, which may be an older one
    told = [line for line in lines if not line.startswith("Reason: ")] or lines
    return re.sub(r"^(?:s?itk::ERROR: |ITK ERROR: )?(?:\w+\(0x[0-9a-f]+\): )?", "", told[-1].strip()).rstrip(". ")
