"""A run's checkpoints: which one to go on from, and what becomes of a damaged one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nnunetv2_macl import checkpoints
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import cannot_write, write_whole

FINAL, LATEST, PREVIOUS = "checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_previous.pth"
# the newest first
CHECKPOINTS = (FINAL, LATEST, PREVIOUS)
KIND = "macl_checkpoint"
FORMAT_VERSION = 2


# What version 0.1 called the parts of a model.
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
    """Return the weights of a checkpoint by their names in the model; a checkpoint of version 0.1 has other names."""
    split = {key: key.partition(".") for key in checkpoint["network_weights"]}
    return {
        f"{_FORMER_NAMES.get(first, first)}.{rest}": checkpoint["network_weights"][key]
        for key, (first, _, rest) in split.items()
    }


def keep_previous(latest: Path) -> None:
    """Give the latest checkpoint a second name before it is replaced. It keeps its own: a kill here costs nothing.

    Raises:
        UserError: the folder cannot be written.
    """
    if not latest.is_file():
        return
    previous, link = latest.with_name(PREVIOUS), latest.with_name(f".{PREVIOUS}.tmp")
    try:
        link.unlink(missing_ok=True)
        try:
            os.link(latest, link)
        except OSError:  # a file system without hard links
            write_whole(link, lambda stream: stream.write(latest.read_bytes()), needed=latest.stat().st_size)
        os.replace(link, previous)
    except OSError as error:
        raise cannot_write(error, previous) from error


def load_checkpoint(folder: Path, run: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest good checkpoint of a run; damaged ones in front of it are renamed ``.corrupt``.

    Args:
        folder: of the run.
        run: what a checkpoint of this run says of its run.
        say: tells the user.

    Returns:
        The checkpoint, on the CPU, where an optimiser keeps its numbers of steps: they would be waited for on a GPU. None where
        there is no file of one.

    Raises:
        UserError: one of a newer version, or none of those that are there is good. Nothing is renamed then.
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
            aside = _set_aside(other)
            say(f"WARNING: {reason} It is kept as {aside.name}; the run goes on from {file.name}.")
        return checkpoint
    if bad or any(folder.glob("checkpoint_*.corrupt*")):
        reasons = " ".join(bad.values()) or "All that was there was damaged, see the files that end in .corrupt."
        raise UserError(f"No checkpoint in {folder} is good to go on from. {reasons} Leave out --c to start anew.")
    return None


def has_checkpoint(folder: Path) -> bool:
    """Whether ``--c`` has something to go on from."""
    return any((folder / name).is_file() for name in CHECKPOINTS)


class _BadCheckpointError(Exception):
    """Says what is wrong with a checkpoint."""


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
            f"{file} has format version {version!r}, this nnunetv2_macl reads {FORMAT_VERSION}. "
            "Go on with the nnunetv2_macl that wrote it, or leave out --c to start anew."
        )
    theirs = checkpoint.get("run")
    if theirs != run:
        difference = checkpoints.first_difference(theirs or {}, run)
        raise _BadCheckpointError(f"{file} is of another run: {difference}.")
    return checkpoint


def _set_aside(file: Path) -> Path:
    aside, number = file.with_name(f"{file.name}.corrupt"), 1
    while aside.exists():
        aside, number = file.with_name(f"{file.name}.corrupt{number}"), number + 1
    try:
        file.rename(aside)
    except OSError as error:
        raise cannot_write(error, aside) from error
    return aside


def remove_previous(folder: Path) -> None:
    """Once the run is through and exported."""
    with contextlib.suppress(OSError):
        (folder / PREVIOUS).unlink(missing_ok=True)
