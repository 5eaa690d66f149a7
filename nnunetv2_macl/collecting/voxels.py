"""Read a DICOM series or a NIfTI file, check its voxels, and write it as one image without names in its header."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from nnunetv2_macl.collecting.dicom import last_line, why_unreadable
from nnunetv2_macl.processes import end_with_parent

# NIfTI files of so few different values, all of them whole numbers, are segmentations rather than images
_MAX_LABELS = 16
# An image is written only if this much disk space stays free.
_SPARE_BYTES = 64 * 2**20
NIFTI_ENDINGS = (".nii.gz", ".nii")


class Job(NamedTuple):
    """One image to make."""

    files: list[str]  # Slices of a DICOM series in their order, or one NIfTI file
    target: str  # File to write
    is_dicom: bool  # Whether the files are DICOM
    min_slices: int  # Volumes of fewer slices are left out
    link: bool  # Make a hard link to a NIfTI file, where it need not be converted


class Made(NamedTuple):
    """What came of a job."""

    left_out: str = ""  # Why no image was made, or ""
    voxels: str = ""  # SHA-256 of voxels and geometry
    failed: str = ""  # Why the image could not be written although it is a good one, or ""


def initialise_worker() -> None:
    """Leave Ctrl-C to the main process, and end when that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    end_with_parent()


def make_image(job: Job) -> Made:
    """Read the files of a job, check them, and write the image."""
    try:
        image = read_series(job.files) if job.is_dicom else _read_nifti(job.files[0])
        if reason := _why_not(image, job):
            return Made(left_out=reason)
    except Exception as error:  # SimpleITK, GDCM and nibabel raise of every kind for damaged files
        reason = why_unreadable(job.files[0], error) if job.is_dicom else last_line(error)
        return Made(left_out=f"cannot be read: {reason}")
    try:
        _write(image, job)
    except Exception as error:  # SimpleITK raises RuntimeError where the disk is full, too
        return Made(failed=str(error).strip())
    return Made(voxels=_checksum(image))


def read_series(files: list[str]) -> sitk.Image:
    """Read the slices of a DICOM series, in their order, as int16 where that holds all values, else as float32."""
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames(files)
    # the type of the first slice would be that of all, and slices of PET have slopes of their own
    reader.SetOutputPixelType(sitk.sitkFloat32)
    image = reader.Execute()
    array = sitk.GetArrayViewFromImage(image)
    if np.array_equal(array, np.rint(array)) and array.min() >= -(2**15) and array.max() < 2**15:
        image = sitk.Cast(image, sitk.sitkInt16)
    return image


def _read_nifti(file: str) -> sitk.Image:
    # nnU-Net takes seconds to import, and DICOM does without
    from nnunetv2_macl.preprocessing.cases import check_nifti

    check_nifti(file)
    return sitk.ReadImage(file)


def _why_not(image: sitk.Image, job: Job) -> str | None:
    if image.GetDimension() > 3 and max(image.GetSize()[3:]) > 1:
        return f"4D: {image.GetSize()[3]} volumes; take the one that you want out of it and collect that"
    if image.GetNumberOfComponentsPerPixel() > 1:
        return f"colour image or vectors: {image.GetNumberOfComponentsPerPixel()} values for each voxel"
    if image.GetDimension() < 3 or min(image.GetSize()) < job.min_slices:
        return f"its size is {'x'.join(map(str, image.GetSize()))}; a volume needs --min_slices {job.min_slices}"
    array = sitk.GetArrayViewFromImage(image)
    if not np.isfinite(array).all():
        return "holds NaN or infinite values"
    if array.min() == array.max():
        return f"constant: every voxel is {array.flat[0]:g}"
    if not job.is_dicom and _is_segmentation(array):
        return f"a segmentation: it holds only {len(np.unique(array))} different whole numbers"
    return None


def _is_segmentation(array: np.ndarray) -> bool:
    # a few voxels first: sorting all of them takes seconds
    for part in (array.ravel()[:: max(1, array.size // 10_000)], array):
        values = np.unique(part)
        if len(values) > _MAX_LABELS or not np.array_equal(values, np.rint(values)):
            return False
    return True


def _write(image: sitk.Image, job: Job) -> None:
    source, target = job.files[0], Path(job.target)
    same_format = not job.is_dicom and source.lower().endswith(_ending(target))
    if same_format and job.link:
        os.link(os.path.realpath(source), target)
        return
    needed = os.path.getsize(source) if same_format else image.GetNumberOfPixels() * image.GetSizeOfPixelComponent()
    free = shutil.disk_usage(target.parent).free
    if free < needed + _SPARE_BYTES:
        raise OSError(f"up to {needed:,} bytes are needed, and {free:,} are free")
    if same_format:
        shutil.copyfile(source, target)
        return
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)
    sitk.WriteImage(image, str(target), useCompression=True)


def _ending(target: Path) -> str:
    return next((ending for ending in NIFTI_ENDINGS if target.name.endswith(ending)), target.suffix)


def _checksum(image: sitk.Image) -> str:
    geometry = (*image.GetSize(), *np.round([*image.GetSpacing(), *image.GetOrigin(), *image.GetDirection()], 3) + 0.0)
    digest = hashlib.sha256(repr([float(n) for n in geometry]).encode())
    # as numbers, so that a type of more bytes makes no difference
    digest.update(np.ascontiguousarray(sitk.GetArrayViewFromImage(image), dtype=np.float32).data)
    return digest.hexdigest()
