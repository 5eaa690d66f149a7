"""The message for a computer where torch.compile does not work: what happened, and what to type."""

from __future__ import annotations

_MODULES = ("torch._dynamo", "torch._inductor", "triton")


def is_compile_error(error: BaseException) -> bool:
    """Return whether an error comes from torch.compile, not from what is compiled."""
    return type(error).__module__.startswith(_MODULES)


def compile_advice(error: BaseException, command: str) -> str:
    """Return the message for the user.

    Args:
        error: An error for which `is_compile_error` is True.
        command: The command that the user typed.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    return (
        f"torch.compile, which nnU-Net uses on GPUs, does not work here: {reason}. It needs a C compiler, Python's headers "
        "(python3-dev) and a GPU of compute capability 7.0 or newer. Install them, or train without it, at the same result. "
        f"Type:\n    nnUNet_compile=f {command}"
    )
