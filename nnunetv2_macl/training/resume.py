"""Find the newest good checkpoint of a run, and rename damaged ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nnunetv2_macl import checkpoints
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import atomic_write, write_error

FINAL, LATEST, PREVIOUS = "checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_previous.pth"
# The newest comes first.
CHECKPOINTS = (FINAL, LATEST, PREVIOUS)
KIND = "macl_checkpoint"
FORMAT_VERSION = 2


# Names of the parts of a model in version 0.1, and their present names.
_FORMER_NAMES = {
    "encoder": "network.encoder",
    "transpconvs": "network.transpconvs",
    "decoder_stages": "network.stages",
    "restoration_head": "methods.restoration.restoration_head",
    **{
        name: f"methods.macl.{name}"
        for name in (
            "auxiliary_encoder",
            "instance_projector_dominant",
            "instance_projector_auxiliary",
            "pixel_projector",
        )
    },
}


def weights_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the weights of a checkpoint by their present names. A checkpoint of version 0.1 has other names."""
    split = {key: key.partition(".") for key in checkpoint["network_weights"]}
    return {
        f"{_FORMER_NAMES.get(first, first)}.{rest}": checkpoint["network_weights"][key]
        for key, (first, _, rest) in split.items()
    }


def rotate_checkpoint(latest: Path) -> None:
    """Keep the latest checkpoint as the previous one before it is replaced.

    The file gets a second name and keeps its first one, so it is not lost if the process is killed here.

    Raises:
        UserError: The folder cannot be written.
    """
    if not latest.is_file():
        return
    previous, link = latest.with_name(PREVIOUS), latest.with_name(f".{PREVIOUS}.tmp")
    try:
        link.unlink(missing_ok=True)
        try:
            os.link(latest, link)
        except OSError:  # a file system without hard links
            atomic_write(link, lambda stream: stream.write(latest.read_bytes()), needed=latest.stat().st_size)
        os.replace(link, previous)
    except OSError as error:
        raise write_error(error, previous) from error


def load_checkpoint(folder: Path, run: dict[str, Any], log: Callable[[str], None]) -> dict[str, Any] | None:
    """Load the newest good checkpoint of a run. Damaged ones that are newer are renamed to ``.corrupt``.

    Args:
        folder: Folder of the run.
        run: Content that identifies the run in its checkpoints.
        log: Called with a message for the user.

    Returns:
        The checkpoint, or None if there is no file of one. It is on the CPU, so that it takes no GPU memory. The
        optimiser moves each value to the device that it needs.

    Raises:
        UserError: A checkpoint has another format version, or all checkpoints are damaged or of another run. No file is renamed
            then.
    """
    bad: dict[Path, str] = {}
    for file in (folder / name for name in CHECKPOINTS):
        if not file.is_file():
            continue
        try:
            checkpoint = _read(file, run)
        except _BadCheckpointError as error:
            bad[file] = str(error)
            continue
        for other, reason in bad.items():
            aside = _quarantine(other)
            log(f"WARNING: {reason} The file was renamed to {aside.name}. The run continues from {file.name}.")
        return checkpoint
    if bad or any(folder.glob("checkpoint_*.corrupt*")):
        reasons = " ".join(bad.values()) or "All checkpoints were damaged, see the files that end in .corrupt."
        raise UserError(f"No checkpoint in {folder} can be continued. {reasons} Leave out --c to start a new run.")
    return None


def has_checkpoint(folder: Path) -> bool:
    """Return whether ``--c`` has a checkpoint to continue from."""
    return any((folder / name).is_file() for name in CHECKPOINTS)


class _BadCheckpointError(Exception):
    """A checkpoint that the run cannot continue from. The message says why."""


def _read(file: Path, run: dict[str, Any]) -> dict[str, Any]:
    try:
        checkpoint = checkpoints.load(file)
    except UserError as error:
        raise _BadCheckpointError(str(error)) from error
    if checkpoint.get("kind") != KIND:
        raise _BadCheckpointError(f"{file} is no checkpoint of MACL pre-training.")
    version = checkpoint.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file} has format version {version!r}, but this nnunetv2_macl reads {FORMAT_VERSION}. "
            "Continue with the version of nnunetv2_macl that wrote the file, or leave out --c to start a new run."
        )
    theirs = checkpoint.get("run")
    if theirs != run:
        difference = checkpoints.first_difference(theirs or {}, run)
        raise _BadCheckpointError(f"{file} belongs to another run: {difference}.")
    return checkpoint


def _quarantine(file: Path) -> Path:
    """Rename a damaged checkpoint, and return its new path."""
    aside, number = file.with_name(f"{file.name}.corrupt"), 1
    while aside.exists():
        aside, number = file.with_name(f"{file.name}.corrupt{number}"), number + 1
    try:
        file.rename(aside)
    except OSError as error:
        raise write_error(error, aside) from error
    return aside
