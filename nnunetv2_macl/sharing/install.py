"""Installation of shared weights where fine-tuning finds them. Packages are checked, and nothing is overwritten."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shlex
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nnunetv2_macl import checkpoints
from nnunetv2_macl.checkpoints import DECODER_FILE, ENCODER_FILE
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import umask
from nnunetv2_macl.nnunet import folders_with_id
from nnunetv2_macl.sharing.package import FORMAT, FORMAT_VERSION, MANIFEST, MEMBERS, SUMS
from nnunetv2_macl.training.commands import plans_option
from nnunetv2_macl.training.run_folder import pretraining_folder

logger = logging.getLogger(__name__)

_CHUNK = 2**20
_FOLDER_NAMES = {
    "dataset_name": re.compile(r"Dataset\d{3}_[\w+-][\w.+-]*"),
    "plans_name": re.compile(r"[\w+-][\w.+-]*"),
    "configuration": re.compile(r"[\w+-][\w.+-]*"),
}


def install(file: Path, results: Path) -> Path:
    """Put the weights of a package into nnU-Net's results folder, where ``nnUNetTrainerMACL`` finds them. Return their folder.

    Raises:
        UserError: The file is damaged or no package, the folder exists already, or another data set has the same id.
    """
    with open_package(file) as archive:
        manifest = read_manifest(archive, file)
        names = {key: str(manifest.get(key)) for key in _FOLDER_NAMES}
        for key, name in names.items():
            if not _FOLDER_NAMES[key].fullmatch(name):
                raise UserError(f"{file} names a {key} that no folder can have: {name!r}. Use another file.")
        _require_own_id(names["dataset_name"], file, results)
        folder = pretraining_folder(results, **names) / "fold_all"
        if folder.exists() or folder.is_symlink():
            there = sorted(path.name for path in folder.iterdir())[:5] if folder.is_dir() else []
            raise UserError(
                f"{folder} exists already, with {', '.join(there) or 'nothing in it'}, and is not overwritten. Move it away "
                f"first, for example: {shlex.join(['mv', str(folder), f'{folder}_before'])}"
            )
        _extract(archive, file, folder)
    options = f"{names['configuration']} 0 -tr nnUNetTrainerMACL{plans_option(names['plans_name'])}"
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
def open_package(file: Path) -> Iterator[zipfile.ZipFile]:
    """Open a package, which holds the files of `MEMBERS` and nothing else.

    Raises:
        UserError: The file does not exist, is damaged, or holds other files.
    """
    if not file.is_file():
        raise UserError(f"There is no file {file}. Check the path.")
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(f"{file} is not a ZIP file, or is damaged: {error}. Get it again.") from None
    with archive:
        names = archive.namelist()
        # a path in a name could lead out of the folder
        if others := sorted(set(names) - set(MEMBERS)):
            raise UserError(f"{file} holds {others[0]!r}, which does not belong in a package. Use another file.")
        if missing := sorted(set(MEMBERS) - set(names)):
            raise UserError(f"{file} is not a complete package of nnunetv2_macl: {', '.join(missing)} is missing.")
        yield archive


def read_manifest(archive: zipfile.ZipFile, file: Path) -> dict[str, Any]:
    """Return the manifest of a package. Raises UserError for one of another format."""
    try:
        manifest = json.loads(archive.read(MANIFEST))
    except (ValueError, RecursionError, zipfile.BadZipFile, OSError, EOFError) as error:
        raise UserError(f"{file}: {MANIFEST} cannot be read: {error}. Get the file again.") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{file} is no package of nnunetv2_macl. Use another file.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{file} has format version {manifest.get('format_version')!r}, this nnunetv2_macl reads {FORMAT_VERSION}. "
            "Update nnunetv2_macl in the way you installed it."
        )
    return manifest


def verify(archive: zipfile.ZipFile, file: Path, into: Path | None = None) -> None:
    """Compare every member of a package with its checksum, and write the members ``into`` a folder if one is given.

    Raises:
        UserError: A member is damaged or has no checksum. The message names the member.
    """
    try:
        lines = archive.read(SUMS).decode().splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        for name in MEMBERS:
            with contextlib.ExitStack() as stack:
                stream = stack.enter_context(archive.open(name))
                target = stack.enter_context((into / name).open("xb")) if into else None
                digest = _copy(stream, target)
            if name != SUMS and sums.get(name) != digest:
                raise UserError(
                    f"{file} is damaged: {name} does not have the checksum that {SUMS} gives. Get it again."
                )
    except (ValueError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{file} is damaged: {error}. Get it again.") from None
    except OSError as error:
        raise UserError(f"{file} could not be unpacked: {error.strerror or error}.") from None


def _copy(source: Any, target: BinaryIO | None) -> str:
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        if target is not None:
            target.write(chunk)
    return digest.hexdigest()


def _extract(archive: zipfile.ZipFile, file: Path, folder: Path) -> None:
    """Unpack into a temporary folder, check the files, and give the folder its name last."""
    made = [path for path in folder.parents if not path.exists()]
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        needed, free = sum(m.file_size for m in archive.infolist()), shutil.disk_usage(folder.parent).free
        if needed > free:
            raise UserError(f"{file} needs {needed:,} bytes in {folder.parent}, and {free:,} are free. Make space.")
        temporary = Path(tempfile.mkdtemp(prefix=".macl_install_", dir=folder.parent))
        verify(archive, file, into=temporary)
        for name in (ENCODER_FILE, DECODER_FILE):
            checkpoints.load_weights(temporary / name)
        temporary.chmod(0o777 & ~umask())
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"{file} could not be installed into {folder}: {error.strerror or error}.") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for path in made:
            # Remove the folders that were made here, if they are empty.
            with contextlib.suppress(OSError):
                path.rmdir()
