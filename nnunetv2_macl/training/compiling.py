"""Recognise errors of torch.compile, and explain them to the user."""

from __future__ import annotations

_MODULES = ("torch._dynamo", "torch._inductor", "triton")


def is_compile_error(error: BaseException) -> bool:
    """Return whether an error comes from torch.compile, and not from the compiled code."""
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
        "(python3-dev) and a GPU of compute capability 7.0 or newer. Install them, or train without torch.compile, which gives "
        f"the same result. Type:\n    nnUNet_compile=f {command}"
    )
