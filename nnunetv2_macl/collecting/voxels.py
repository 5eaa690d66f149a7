"""Read a DICOM series or a NIfTI file, check its voxels, and write it as an image.

The header of an image that is made from DICOM holds only the geometry. A NIfTI file keeps its header.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import shutil
import signal
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from nnunetv2_macl.collecting.dicom import why_unreadable
from nnunetv2_macl.processes import end_with_parent
from nnunetv2_macl.text import last_line

# A NIfTI file with no more different values than this, all of them integers, is taken for a segmentation.
_MAX_LABELS = 16
# So is one with more integers, if more than this fraction of the neighbours of a voxel have its value. The median over
# the values was 0.82 and more in label maps of brain, heart and hippocampus, and 0.11 and less in scans and templates.
_SHARE_OF_EQUAL_NEIGHBOURS = 0.5
# An image is written only if this much disk space stays free.
_SPARE_BYTES = 64 * 2**20
NIFTI_ENDINGS = (".nii.gz", ".nii")
# The voxels of a NIfTI file begin after this many bytes.
_NIFTI_HEADER = 352


class Job(NamedTuple):
    """An image to make."""

    files: list[str]  # Slices of a DICOM series in their order, or one NIfTI file
    target: str  # File to write
    is_dicom: bool  # Whether the files are DICOM
    min_slices: int  # Volumes of fewer slices are left out
    link: bool  # Make a hard link to a NIfTI file that need not be converted


class Made(NamedTuple):
    """The result of a job."""

    left_out: str = ""  # Why no image was made, or ""
    voxels: str = ""  # SHA-256 of voxels and geometry
    failed: str = ""  # Why a good image could not be written, or ""


def initialise_worker() -> None:
    """Leave Ctrl-C to the main process, and exit when the main process exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    end_with_parent()


def make_image(job: Job) -> Made:
    """Read the files of a job, check them, and write the image."""
    try:
        image = read_series(job.files) if job.is_dicom else _read_nifti(job.files[0])
        if reason := _why_not(image, job):
            return Made(left_out=reason)
    except Exception as error:  # SimpleITK, GDCM and nibabel raise many kinds of errors for damaged files
        reason = why_unreadable(job.files[0], error) if job.is_dicom else last_line(error)
        return Made(left_out=f"cannot be read: {reason}")
    try:
        _write(image, job)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:  # of the source, whose end ITK does not check
        return Made(left_out=f"cannot be read: {last_line(error)}")
    except Exception as error:
        return Made(failed=str(error).strip())
    return Made(voxels=_checksum(image))


def read_series(files: list[str]) -> sitk.Image:
    """Return the slices of a DICOM series, in the order of ``files``, as int16 if that holds all values, else float32."""
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames(files)
    # SimpleITK would use the pixel type of the first slice for all, but each slice of PET has its own slope.
    reader.SetOutputPixelType(sitk.sitkFloat32)
    image = reader.Execute()
    array = sitk.GetArrayViewFromImage(image)
    if np.array_equal(array, np.rint(array)) and array.min() >= -(2**15) and array.max() < 2**15:
        image = sitk.Cast(image, sitk.sitkInt16)
    return image


def _read_nifti(file: str) -> sitk.Image:
    # nnU-Net takes seconds to import, and DICOM files do not need it.
    from nnunetv2_macl.preprocessing.reading import check_nifti

    check_nifti(file)
    return sitk.ReadImage(file)


def write_image(image: sitk.Image, file: Path) -> None:
    """Write an image, compressed if the format allows it.

    Raises:
        OSError: The image could not be written completely. ITK reports this for most formats, but not for NIfTI.
    """
    try:
        sitk.WriteImage(image, str(file), useCompression=True)
    except RuntimeError as error:
        raise OSError(errno.EIO, last_line(error)) from error
    if not file.name.endswith(NIFTI_ENDINGS):
        return
    voxels = image.GetNumberOfPixels() * image.GetSizeOfPixelComponent() * image.GetNumberOfComponentsPerPixel()
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            size = sum(map(len, iter(partial(stream.read, 2**20), b"")))
    except (EOFError, zlib.error, gzip.BadGzipFile):
        size = 0
    if size < _NIFTI_HEADER + voxels:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _why_not(image: sitk.Image, job: Job) -> str | None:
    if image.GetDimension() > 3 and max(image.GetSize()[3:]) > 1:
        return f"4D: {image.GetSize()[3]} volumes; extract the volume that you want and collect it"
    if image.GetNumberOfComponentsPerPixel() > 1:
        return f"colour image or vectors: {image.GetNumberOfComponentsPerPixel()} values for each voxel"
    if image.GetDimension() < 3:
        return f"2D: its size is {'x'.join(map(str, image.GetSize()))}, and only volumes are collected"
    if min(image.GetSize()) < job.min_slices:
        return f"its size is {'x'.join(map(str, image.GetSize()))}; a volume needs --min_slices {job.min_slices}"
    array = sitk.GetArrayViewFromImage(image)
    if not np.isfinite(array).all():
        return "holds NaN or infinite values"
    if array.min() == array.max():
        return f"constant: every voxel is {array.flat[0]:g}"
    if not job.is_dicom and _is_segmentation(array):
        return f"a segmentation: its voxels hold {len(np.unique(array))} different labels"
    return None


def _is_segmentation(array: np.ndarray) -> bool:
    lines = array.reshape(-1, array.shape[-1])
    # Check some lines first, because sorting all voxels takes seconds.
    for part in (lines[:: max(1, len(lines) // 1000)], lines):
        values = np.unique(part)
        if not np.array_equal(values, np.rint(values)):
            return False
        if len(values) > _MAX_LABELS:
            return _has_areas(part)
    return True


def _has_areas(lines: np.ndarray) -> bool:
    """Return whether most values fill areas, as labels do. In scans, only values such as the background do."""
    left, right = lines[:, :-1], lines[:, 1:]
    inside = (left != 0) & (right != 0)
    left, right = left[inside], right[inside]
    if not left.size:
        return False
    _, number, counts = np.unique(left, return_inverse=True, return_counts=True)
    equal = np.bincount(number, weights=left == right) / counts
    return bool(np.median(equal) > _SHARE_OF_EQUAL_NEIGHBOURS)


def _write(image: sitk.Image, job: Job) -> None:
    source, target = job.files[0], Path(job.target)
    ending = next((ending for ending in NIFTI_ENDINGS if target.name.endswith(ending)), target.suffix)
    same_format = not job.is_dicom and source.lower().endswith(ending)
    if same_format and job.link:
        os.link(os.path.realpath(source), target)
        return
    needed = os.path.getsize(source) if same_format else image.GetNumberOfPixels() * image.GetSizeOfPixelComponent()
    free = shutil.disk_usage(target.parent).free
    if free < needed + _SPARE_BYTES:
        raise OSError(f"up to {needed:,} bytes are needed, and {free:,} are free")
    if same_format and ending == ".nii":
        shutil.copyfile(source, target)
        return
    if same_format:
        # compressed again, because the header of a compressed file may hold its original name and time
        with gzip.open(source) as content, target.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, 0) as compressed:
            shutil.copyfileobj(content, compressed, 2**20)
        return
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)
    write_image(image, target)


def _checksum(image: sitk.Image) -> str:
    geometry = (*image.GetSize(), *np.round([*image.GetSpacing(), *image.GetOrigin(), *image.GetDirection()], 3) + 0.0)
    digest = hashlib.sha256(repr([float(n) for n in geometry]).encode())
    # Convert to one type, so that equal images of different types have the same checksum.
    digest.update(np.ascontiguousarray(sitk.GetArrayViewFromImage(image), dtype=np.float32).data)
    return digest.hexdigest()
