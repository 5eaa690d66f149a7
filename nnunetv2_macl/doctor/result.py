"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

OK, PROBLEM, NOTE = "right", "wrong", "note"


@dataclass(frozen=True)
class Result:
    """Of one check."""

    check: str  # its name, the same at every call
    status: str  # ``right``; ``wrong``, which something should be done about; or ``note``, which is neither
    message: str  # what was found, with values
    fix: str | None = None  # the commands that correct it, or what to type next, one line each
    values: dict[str, Any] = field(default_factory=dict)  # the numbers in ``message``, for programs
