"""Files: written whole or not at all, and told apart from damaged ones."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
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


def atomic_write(file: Path, write: Callable[[BinaryIO], Any], *, needed: int | None = None) -> None:
    """Write a file so that it is there complete or not at all, whatever happens meanwhile.

    Args:
        file: to write; one that is there is replaced at once.
        write: writes the content to a stream.
        needed: bytes that it will write, to be told where the disk is full.

    Raises:
        UserError: no space or no permission; names the file.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{file.name}.", suffix=_TEMPORARY, dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as opened:
                stream = _ErrorCapturingStream(opened)
                try:
                    write(stream)  # type: ignore[arg-type]
                    stream.flush()
                except Exception as error:
                    if stream.error is None:
                        raise
                    # torch.save answers a full disk with an error of its own
                    raise stream.error from error
                os.fsync(opened.fileno())
            with contextlib.suppress(OSError):  # a mount whose files are another's
                os.chmod(temporary, 0o666 & ~umask())
            os.replace(temporary, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise write_error(error, file, needed) from error


class _ErrorCapturingStream:
    """A stream that remembers why it could not be written to."""

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
    """The disk is full, or its owner said no."""


def write_error(error: OSError, file: Path, needed: int | None = None) -> CannotWriteError:
    """Return what to tell the user of an error in writing a file or into a folder that takes ``needed`` bytes."""
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
    """Whether the disk is full or its owner said no, which the user can mend."""
    return error.errno in (*_FULL, *_REFUSED)


def umask() -> int:
    """Permissions that new files shall not have."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def remove_temporary(folder: Path, *, older_than: float = 0) -> None:
    """Remove what `atomic_write` left where its process was killed, if it is ``older_than`` that many seconds."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if not (entry.name.startswith(".") and entry.name.endswith(_TEMPORARY)):
                continue
            with contextlib.suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime >= older_than:
                    os.unlink(entry.path)


def write_json(content: Any, file: Path) -> None:
    """JSON, indented as nnU-Net does. Raises UserError as `atomic_write` does."""
    text = (json.dumps(content, indent=4, ensure_ascii=False) + "\n").encode()
    atomic_write(file, lambda stream: stream.write(text), needed=len(text))


def write_if_absent(content: Any, file: Path) -> None:
    """JSON, whole, unless the file is there by then: of several processes at once, one writes it."""
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
    """``FILE.sha256``, in the format of sha256sum."""
    return file.with_name(f"{file.name}.sha256")


def write_checksum(file: Path) -> None:
    line = f"{sha256(file)}  {file.name}\n".encode()
    atomic_write(checksum_path(file), lambda stream: stream.write(line), needed=len(line))


def verify(file: Path) -> bool:
    """Check a file of ours for damage, without loading it.

    Returns:
        True where its side-car says so; False where there is no side-car, and only the checksums within the file agree.

    Raises:
        UserError: the file is not what was written, or cannot be read; names it.
    """
    fix = "It was cut short, or changed since it was written: take another copy."
    try:
        if checksum_path(file).is_file():
            wanted = checksum_path(file).read_text(encoding="utf-8", errors="replace").split()[:1]
            if wanted != [sha256(file)]:
                raise UserError(f"{file} is damaged: its SHA-256 is not the one in {checksum_path(file).name}. {fix}")
            return True
        # torch.save writes a zip archive with a checksum of each tensor, and torch.load does not look at it
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if (bad := archive.testzip()) is not None:
                    raise UserError(f"{file} is damaged: the checksum of {bad} in it is wrong. {fix}")
    except FileNotFoundError:
        raise UserError(f"{file} does not exist. Check the path.") from None
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(f"{file} cannot be read: {error.strerror}. Check the path and its permissions.") from None
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{file} is damaged: {error}. {fix}") from None
    return False


def sha256(file: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


# --- what comes with the package ---------------------------------------------------------------------------------------


def resource_folder(name: str) -> Path:
    """The folder ``trainers`` or ``plans``. A wheel has it in the package, and an editable install next to the package."""
    package = Path(__file__).resolve().parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name


def trainer_folders() -> str:
    """Return a value for nnUNet_extTrainer: the folder of our trainers, and the other folders that it names now.

    Our folder comes first, because nnU-Net takes the first class with a name, and others may hold an older version.
    """
    others = [folder for folder in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if folder.strip()]
    return os.pathsep.join(dict.fromkeys([str(resource_folder("trainers")), *others]))
