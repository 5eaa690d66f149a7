"""Installation of shared weights where fine-tuning finds them. Packages are checked, and nothing is overwritten."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnunetv2_macl import checkpoints
from nnunetv2_macl.checkpoints import DECODER_FILE, ENCODER_FILE
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import is_inflated, sha256, write_error
from nnunetv2_macl.nnunet import folders_with_id
from nnunetv2_macl.sharing.package import (
    FOLDER_NAMES,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    MEMBERS,
    SUMS,
    why_not_installable,
)
from nnunetv2_macl.training.commands import plans_option
from nnunetv2_macl.training.run_folder import pretraining_folder

logger = logging.getLogger(__name__)

# No text of a package is larger.
_LARGEST_TEXT = 64 * 2**20


def install(file: Path, results: Path) -> Path:
    """Put the weights of a package into nnU-Net's results folder, where ``nnUNetTrainerMACL`` finds them. Return their folder.

    Raises:
        UserError: The file is damaged or no package, the folder exists already or cannot be written, or another data set has the
            same id.
    """
    try:
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(error, results) from error
    with unpacked(file, results) as (manifest, package):
        if why := why_not_installable(manifest):
            raise UserError(f"{file} cannot be installed: {why}. Use another file.")
        names: dict[str, str] = {key: manifest[key] for key in FOLDER_NAMES}
        _require_own_id(names["dataset_name"], file, results)
        folder = pretraining_folder(results, **names) / "fold_all"
        if folder.exists() or folder.is_symlink():
            there = sorted(path.name for path in folder.iterdir())[:5] if folder.is_dir() else []
            raise UserError(
                f"{folder} exists already, with {', '.join(there) or 'nothing in it'}, and is not overwritten. Move it away "
                f"first, for example: {shlex.join(['mv', str(folder), f'{folder}_before'])}"
            )
        for name in (ENCODER_FILE, DECODER_FILE):
            checkpoints.load_weights(package / name)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            package.rename(folder)
        except OSError as error:
            raise write_error(error, folder) from error
    options = f"{shlex.quote(names['configuration'])} 0 -tr nnUNetTrainerMACL{plans_option(names['plans_name'])}"
    logger.info(
        "Installed into %s\nFine-tune %s from them:\n    nnUNetv2_train %d %s\n"
        "or any other data set:\n    nnUNet_macl_weights=%s nnUNetv2_train DATASET %s",
        folder, names["dataset_name"], int(names["dataset_name"][7:10]), options, shlex.quote(str(folder)), options,
    )  # fmt: skip
    return folder


def _require_own_id(dataset_name: str, file: Path, results: Path) -> None:
    """Raise UserError if another data set has the id, because nnU-Net then finds neither data set by its id."""
    others = [path for path in folders_with_id(dataset_name[7:10], results) if path.name != dataset_name]
    if others:
        raise UserError(
            f"{file} holds weights of {dataset_name}, and here id {int(dataset_name[7:10])} is {others[0]}. nnU-Net finds "
            "neither of two data sets with the same id. Unpack the weights elsewhere and name them when you fine-tune:\n"
            f"    unzip {shlex.quote(str(file))} -d {shlex.quote(dataset_name + '_weights')}\n"
            f"    nnUNet_macl_weights={shlex.quote(dataset_name + '_weights')} nnUNetv2_train DATASET ... -tr nnUNetTrainerMACL"
        )


@contextlib.contextmanager
def unpacked(file: Path, within: Path | None = None) -> Iterator[tuple[dict[str, Any], Path]]:
    """Unpack a package into a temporary folder, check all its files, and yield its manifest and the folder.

    Args:
        file: The package. It holds the files of `MEMBERS` and nothing else.
        within: Where the temporary folder is made. None: where the system makes such folders.

    Raises:
        UserError: The file does not exist, is damaged, is no package of this version, or the disk is full.
    """
    if not file.is_file():
        raise UserError(f"There is no file {file}. Check the path.")
    remedy = "Make space, or name another folder for temporary files: export TMPDIR=/path/to/folder"
    if within is not None:
        remedy = f"Make space in {within}, or check its permissions: ls -ld {shlex.quote(str(within))}"
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".macl_install_", dir=within)
    except OSError as error:
        raise UserError(f"{file} could not be unpacked: {error.strerror or error}. {remedy}") from error
    with temporary as scratch:
        folder = Path(scratch) / "package"
        try:
            with zipfile.ZipFile(file) as archive:
                # a path in a name could lead out of the folder
                if wrong := sorted(set(archive.namelist()) ^ set(MEMBERS)):
                    why = "is missing" if wrong[0] in MEMBERS else "does not belong in it"
                    raise UserError(f"{file} is no package of nnunetv2_macl: {wrong[0]!r} {why}. Use another file.")
                if hostile := _hostile_member(archive):
                    raise UserError(f"{file} is no package of nnunetv2_macl: {hostile}. Use another file.")
                needed, free = sum(m.file_size for m in archive.infolist()), shutil.disk_usage(scratch).free
                if needed > free:
                    raise UserError(f"{file} needs {needed:,} bytes in {scratch}, and {free:,} are free. {remedy}")
                archive.extractall(folder)
            lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
            sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
            if bad := [name for name in MEMBERS if name != SUMS and sums.get(name) != sha256(folder / name)]:
                raise UserError(
                    f"{file} is damaged: {bad[0]} does not have the checksum that {SUMS} gives. Get it again."
                )
            manifest = json.loads((folder / MANIFEST).read_bytes())
        except OSError as error:
            raise UserError(f"{file} could not be unpacked: {error.strerror or error}. {remedy}") from None
        except (ValueError, zipfile.BadZipFile, EOFError, RuntimeError) as error:
            raise UserError(f"{file} is damaged, or no ZIP file: {error}. Get it again.") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UserError(f"{file} is no package of nnunetv2_macl. Use another file.")
        if manifest.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{file} has format version {manifest.get('format_version')!r}, this nnunetv2_macl reads {FORMAT_VERSION}. "
                "Update nnunetv2_macl in the way you installed it."
            )
        yield manifest, folder


def _hostile_member(archive: zipfile.ZipFile) -> str | None:
    """Return which member of a package could fill disk or memory, or replaces another one, and None if there is none."""
    names: set[str] = set()
    for member in archive.infolist():
        if member.filename in names:
            return f"it holds {member.filename!r} twice"
        names.add(member.filename)
        is_too_large = is_inflated(member) if member.filename.endswith(".pth") else member.file_size > _LARGEST_TEXT
        if is_too_large:
            return f"{member.filename!r} would become {member.file_size:,} bytes"
    return None
