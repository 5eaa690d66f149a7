"""Lines that set a variable, in the words of the shell in use."""

from __future__ import annotations

import os

import shellingham

# what stands for the output of our command, in every shell but fish
_TRAINERS = "$(nnUNetv2_macl_trainers)"
_PROFILES = {"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "~/.config/fish/config.fish", "powershell": "$PROFILE"}


def shell_in_use() -> str:
    """``bash``, ``zsh``, ``fish`` or ``powershell``: what the command was typed in, as far as that can be told."""
    try:
        name = shellingham.detect_shell()[0]
    except (shellingham.ShellDetectionFailure, OSError, NotImplementedError):
        name = "powershell" if os.name == "nt" else os.path.basename(os.environ.get("SHELL", "bash"))
    return {"pwsh": "powershell"}.get(name, name if name in _PROFILES else "bash")


def set_variable(name: str, value: str, shell: str) -> str:
    """The line that sets an environment variable now."""
    if shell == "fish":
        return f'set -gx {name} "{value}"'
    if shell == "powershell":
        return f'$env:{name} = "{value}"'
    return f'export {name}="{value}"'


def for_good(shell: str) -> str:
    """How a variable is set in every new shell."""
    environment = os.environ.get("CONDA_DEFAULT_ENV")
    if environment and environment != "base":
        return f'conda env config vars set NAME="VALUE"\nconda activate {environment}'
    return f"# put these lines into {_PROFILES[shell]}"


def set_trainers(shell: str, first: bool = False) -> str:
    """The line that lets nnU-Net find our trainers; folders that the variable names already are kept.

    Args:
        shell: in use.
        first: look in our folder before the others.
    """
    others = "$env:nnUNet_extTrainer" if shell == "powershell" else "$nnUNet_extTrainer"
    folders = [_TRAINERS]
    if os.environ.get("nnUNet_extTrainer"):
        folders.insert(1 if first else 0, others)
    if shell == "powershell":
        # a colon after a name would belong to it
        folders = [folder.replace(others, f"$({others})") for folder in folders]
    if shell == "fish":
        return f"set -gx nnUNet_extTrainer {os.pathsep.join(folders).replace(_TRAINERS, '(nnUNetv2_macl_trainers)')}"
    return set_variable("nnUNet_extTrainer", os.pathsep.join(folders), shell)
