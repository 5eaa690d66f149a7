"""The result of a check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

OK, PROBLEM, NOTE = "right", "wrong", "note"


@dataclass(frozen=True)
class Result:
    """What one check found."""

    status: str  # ``right``; ``wrong``, a problem to fix; or ``note``, for information
    message: str  # What was found, with values
    fix: str | None = None  # Commands that fix the problem, or the next command, one per line
    values: dict[str, Any] = field(default_factory=dict)  # The numbers in ``message``, for programs
    check: str = ""  # Name of the check


def ask(module: str, *arguments: str, timeout: float, **environment: str) -> dict[str, Any]:
    """Run a module of the doctor in another process. Return its last line, which is JSON, or an ``error``."""
    command = [sys.executable, "-m", f"nnunetv2_macl.doctor.{module}", *arguments]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=os.environ | environment)
        return json.loads(process.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"it took more than {timeout:.0f} s"}
    except (IndexError, ValueError):
        last_line = (process.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"the process ended with code {process.returncode}: {last_line}"}
