"""Write files completely or not at all, and detect damaged files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from nnunetv2_macl.errors import UserError

_TEMPORARY = ".tmp"
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def atomic_write(
    file: Path, write: Callable[[BinaryIO], Any], *, needed: int | None = None, private: bool = False
) -> None:
    """Write a file completely or not at all, even if the process is killed.

    Args:
        file: File to write. An existing file is replaced in one step.
        write: Function that writes the content to a stream.
        needed: Bytes to write, for the message if the disk is full.
        private: Whether only the owner may read the file.

    Raises:
        UserError: There is no space or no permission. The message names the file.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{file.name[:100]}.", suffix=_TEMPORARY, dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as opened:
                stream = _ErrorCapturingStream(opened)
                try:
                    write(stream)  # type: ignore[arg-type]
                    stream.flush()
                except Exception as error:
                    if stream.error is None:
                        raise
                    # torch.save hides the cause, a full disk for example, behind its own error.
                    raise stream.error from error
                os.fsync(opened.fileno())
            with contextlib.suppress(OSError):  # the owner of a mounted file may be another user
                mask = os.umask(0)  # the permissions that new files do not get
                os.umask(mask)
                os.chmod(temporary, 0o600 if private else 0o666 & ~mask)
            os.replace(temporary, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise write_error(error, file, needed) from error


class _ErrorCapturingStream:
    """A stream that keeps the error of a failed write."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        return self._remember(self._stream.write, data)

    def flush(self) -> None:
        self._remember(self._stream.flush)

    def _remember(self, method: Callable, *arguments: Any) -> Any:
        try:
            return method(*arguments)
        except OSError as error:
            self.error = error
            raise


class CannotWriteError(UserError):
    """Says that a file cannot be written: the disk is full, or the permission is missing."""


def write_error(error: OSError, file: Path, needed: int | None = None) -> CannotWriteError:
    """Return the user error for a failed write to a file or a folder. ``needed`` is the number of bytes to write."""
    if error.errno not in _FULL:
        return CannotWriteError(
            f"{file} could not be written: {error.strerror or error}. Check the folder's permissions and try again."
        )
    takes = f"{needed:,} bytes needed, " if needed else ""
    try:
        free = f"{shutil.disk_usage(file if file.is_dir() else file.parent).free:,} bytes"
    except OSError:
        free = "an unknown number of bytes"
    return CannotWriteError(
        f"{file} could not be written: the disk is full ({takes}{free} free). Make space and try again."
    )


def is_permission_or_space_error(error: OSError) -> bool:
    """Return whether the disk is full or the permission is missing, which the user can fix."""
    return error.errno in (*_FULL, *_REFUSED)


def is_utf8(path: str) -> bool:
    """Return whether a path is in UTF-8. Other paths would end the process, if they were given to SimpleITK.

    Raises:
        UserError: Python takes paths for ones of another encoding, so that even those in UTF-8 cannot be used.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        if (encoding := sys.getfilesystemencoding()) != "utf-8":
            name = os.fsencode(path).decode(errors="replace")
            raise UserError(
                f"Python takes names of files for {encoding}, so it cannot read {name}. Type: export PYTHONUTF8=1"
            ) from None
        return False
    return True


# names that Windows gives to devices, also with an ending
_OF_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
_LONGEST_NAME = 100


def why_not_a_name(name: str) -> str | None:
    """Return why a text cannot be the name of a file or folder on every system, or None if it can."""
    if wrong := sorted({c for c in name if not c.isprintable() or c in '/\\<>:"|?*'}):
        return f"it contains {wrong[0]!r}"
    if not name or name[0] == "." or name[-1] in ". ":
        return "it is empty, begins with a dot, or ends with a dot or a space"
    if _OF_DEVICES.fullmatch(name):
        return "Windows gives this name to a device"
    return f"it has more than {_LONGEST_NAME} characters" if len(name) > _LONGEST_NAME else None


def is_inflated(member: zipfile.ZipInfo) -> bool:
    """Return whether a member of a ZIP file that should hold weights grows when it is unpacked.

    Weights are stored without compression. A small file whose members grow could fill the disk or the memory.
    """
    return member.file_size > 1.1 * member.compress_size + 2**20


def remove_temporary(folder: Path, *, older_than: float = 0) -> None:
    """Remove the temporary files that killed processes left in a folder, if they are older than ``older_than`` seconds."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if not (entry.name.startswith(".") and entry.name.endswith(_TEMPORARY)):
                continue
            with contextlib.suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime >= older_than:
                    os.unlink(entry.path)


def write_json(content: Any, file: Path) -> None:
    """Write JSON with nnU-Net's indentation. Raise UserError as `atomic_write` does."""
    text = (json.dumps(content, indent=4, ensure_ascii=False) + "\n").encode()
    atomic_write(file, lambda stream: stream.write(text), needed=len(text))


def write_if_absent(content: Any, file: Path) -> None:
    """Write JSON unless the file exists. If several processes do this at once, only one writes the file."""
    mine = file.with_name(f".{file.name}.{uuid.uuid4().hex}{_TEMPORARY}")
    write_json(content, mine)
    try:
        os.link(mine, file)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not file.exists():
            os.replace(mine, file)
    finally:
        mine.unlink(missing_ok=True)


# --- checksums -----------------------------------------------------------------------------------------------------------


def checksum_path(file: Path) -> Path:
    """Return the path of a file's checksum, ``FILE.sha256``, which has the format of sha256sum."""
    return file.with_name(f"{file.name}.sha256")


def write_checksum(file: Path) -> None:
    """Write the checksum of a file next to it. Raise UserError as `atomic_write` does."""
    line = f"{sha256(file)}  {file.name}\n".encode()
    atomic_write(checksum_path(file), lambda stream: stream.write(line), needed=len(line))


def verify(file: Path) -> bool:
    """Check a file of this package for damage, without loading it.

    Returns:
        True if the file agrees with its checksum file; False if it has none, and only the checksums inside the file agree.

    Raises:
        UserError: The file is damaged or cannot be read. The message names the file.
    """
    fix = "The file was cut short or changed after it was written. Use another copy."
    try:
        with open(file, "rb"):  # a missing file is no damaged one
            pass
        if checksum_path(file).is_file():
            wanted = checksum_path(file).read_text(encoding="utf-8", errors="replace").split()[:1]
            if wanted != [sha256(file)]:
                raise UserError(f"{file} is damaged: its SHA-256 is not the one in {checksum_path(file).name}. {fix}")
            return True
        # torch.save writes a zip archive with a checksum of each tensor, but torch.load does not check it.
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if (bad := archive.testzip()) is not None:
                    raise UserError(f"{file} is damaged: the checksum of {bad} in it is wrong. {fix}")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file} does not exist. Check the path.") from None
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(f"{file} cannot be read: {error.strerror}. Check the path and its permissions.") from None
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{file} is damaged: {error}. {fix}") from None
    return False


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


# --- files of the package ---------------------------------------------------------------------------------------


def resource_folder(name: str) -> Path:
    """Return the folder ``trainers`` or ``plans``. A wheel has it in the package, an editable install next to the package."""
    package = Path(__file__).resolve().parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name


def trainer_folders() -> str:
    """Return a value for nnUNet_extTrainer: the folder of our trainers, and the other folders that it names now.

    Our folder comes first, because nnU-Net takes the first class with a name, and others may hold an older version.
    """
    others = [folder for folder in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if folder.strip()]
    return os.pathsep.join(dict.fromkeys([str(resource_folder("trainers")), *others]))
