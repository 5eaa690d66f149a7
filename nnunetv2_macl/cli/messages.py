"""The user's mistakes as sentences."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from nnunetv2_macl.errors import UserError


def run(action: Callable[[], object]) -> None:
    """Show the user his mistakes as sentences, with exit code 1."""
    logger = logging.getLogger("nnunetv2_macl")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        action()
    except (UserError, NotImplementedError) as error:
        sys.exit(f"\nError: {error}")
    finally:
        logger.removeHandler(handler)
