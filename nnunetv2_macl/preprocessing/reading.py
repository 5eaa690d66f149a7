"""Read the image files of a case, and say why an image cannot be used."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
import tifffile
from nibabel.openers import ImageOpener
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.planning.memory import is_above_zero
from nnunetv2_macl.preprocessing.sources import CaseFiles, named_in_header, sidecars
from nnunetv2_macl.text import last_line
from nnunetv2_macl.training.out_of_memory import is_out_of_memory

# The highest compression ratio of gzip.
_MOST_COMPRESSED = 1032
# 16 GiB. A larger image most likely has a wrong spacing.
_MOST_VOXELS = 2**32
# The first bytes of a NIfTI file are the size of its header, 348, in either byte order.
_NIFTI_STARTS = (b"\x5c\x01\0\0", b"\0\0\x01\x5c")
_GZIP_START = b"\x1f\x8b"


class UnusableImageError(Exception):
    """Says that an image cannot be used. The message names its files and the reason."""


class SingleSliceError(UnusableImageError):
    """Says that an image is a single slice that the configuration cannot use. A run leaves it out even without an option."""


def single_slice_problem(configuration: DatasetConfiguration, case: CaseFiles) -> str | None:
    """Return why a single slice cannot be used. Return None for a volume, and for a slice that a 2D configuration can use.

    Scouts and localizers are common in archives. nnU-Net's resampling would repeat the slice into a volume, or a line of it into
    a slice if the plan's slices have another orientation.
    """
    axes = configuration.plans_manager.transpose_forward[-len(configuration.patch_size) :]
    for file in case.files:
        # An image that cannot be read is reported when it is read.
        with contextlib.suppress(Exception):
            size = _voxels(file)
            volume = [1] * (3 - len(size)) + size
            if size and 0 not in size and any(volume[axis] == 1 for axis in axes):
                shape = "x".join(map(str, size))
                trained_on = "volumes" if len(axes) == 3 else "slices of another orientation"
                return (
                    f"{file} is a single slice ({shape} voxels), and {configuration.name} is trained on {trained_on}."
                )
    return None


def _voxels(file: str) -> list[int]:
    """Return the number of voxels on each axis from the header, in the order in which nnU-Net reads them."""
    if _is_nifti(file):
        return list(nibabel.load(file).shape[:3])[::-1]  # type: ignore[attr-defined]
    if file.lower().endswith((".tif", ".tiff")):
        shape, is_colour = _shape_of_tiff(file)
        return shape[:-1] if is_colour else shape
    header = sitk.ImageFileReader()
    header.SetFileName(file)
    header.ReadImageInformation()
    return list(header.GetSize())[:3][::-1]


def _shape_of_tiff(file: str) -> tuple[list[int], bool]:
    """Return the shape of a TIFF, and whether its last axis holds the samples of a voxel, such as red, green and blue."""
    with tifffile.TiffFile(file) as tiff:
        return list(tiff.series[0].shape), tiff.series[0].axes.endswith("S")


def _is_nifti(file: str) -> bool:
    return file.lower().endswith((".nii", ".nii.gz"))


def read_case(
    configuration: DatasetConfiguration, case: CaseFiles, reader: type[BaseReaderWriter]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Read a case as nnU-Net does, and also check it. Return its voxels (C, *volume) and nnU-Net's properties.

    Raises:
        UnusableImageError: The case cannot be read, or cannot be used.
        MemoryError: The memory of the machine is too small.
    """
    names, printed = ", ".join(case.files), io.StringIO()
    try:
        for file in case.files:
            _check_data_file(file)
            check_nifti(file)
            if issubclass(reader, Tiff3DIO):
                _check_tiff(file)
        # nnU-Net prints what is wrong with the channels of a case, and raises an error without a message.
        with contextlib.redirect_stdout(printed):
            images, properties = reader().read_images(case.files)
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError(names) from error
        told = [line.strip() for line in printed.getvalue().splitlines() if "ERROR" in line]
        reason = last_line(error) if str(error).strip() or not told else told[-1]
        raise UnusableImageError(f"{names} cannot be used: {reason}.{_lower_case_endings(case.files)}") from error
    print(printed.getvalue(), end="")
    if case.channels is not None:
        # Where most cases have one file, it may hold all channels, or the first one alone.
        is_first_alone = case.channels == [0] and len(images) == 1
        if images.ndim != 4 or (len(images) != case.channels_in_file and not is_first_alone):
            raise UnusableImageError(
                f"{names} holds {len(images)} channel(s); its data set has {case.channels_in_file}. Put each channel into its "
                "own file, or all into one."
            )
        images = images[case.channels]
    if wrong := _image_problem(configuration, images):
        raise UnusableImageError(f"{names} {wrong}")
    if (axes := len(properties["spacing"])) != 3:
        raise UnusableImageError(
            f"{names} cannot be used: it has a spacing for {axes} axes, so the third axis is not one of space."
        )
    planned = planned_spacing(configuration, properties["spacing"])
    resampled = [
        round(n * mm / new) for n, mm, new in zip(images.shape[1:], properties["spacing"], planned, strict=True)
    ]
    if not 0 < math.prod(resampled) <= _MOST_VOXELS:
        raise UnusableImageError(
            f"{names} cannot be used: at the plan's spacing it would have {'x'.join(map(str, resampled))} voxels. "
            f"Is its spacing of {', '.join(f'{mm:g}' for mm in properties['spacing'])} mm right?"
        )
    return images, properties


def check_nifti(file: str) -> None:
    """Raise ValueError for a NIfTI file that nnU-Net cannot use, or that ITK's reader misreads.

    Readers cannot read a file that was renamed from .nii to .nii.gz or back. ITK replaces a spacing of 0 by 1, drops the
    imaginary part of complex numbers, and reads 0 for missing data and for NaN.
    """
    if not _is_nifti(file):
        return
    stem, is_gzip = re.sub(r"(?i)(\.nii|\.nii\.gz)$", "", file), file.lower().endswith(".gz")
    with open(file, "rb") as stream:
        start = stream.read(4)
        size = stream.seek(0, os.SEEK_END)
    if is_gzip and start in _NIFTI_STARTS:
        raise ValueError(
            f"its name says that it is compressed, but it is not. Rename it to {stem}.nii, which is read, too"
        )
    if not is_gzip and start.startswith(_GZIP_START):
        raise ValueError(
            f"it is compressed, but its name does not say so. Rename it to {stem}.nii.gz, which is read, too"
        )
    image: Any = nibabel.load(file)
    dtype = image.get_data_dtype()
    if dtype.kind == "c":
        raise ValueError("it holds complex numbers")
    if dtype.fields or math.prod(image.shape[4:]) > 1:
        raise ValueError(
            "it holds several values in each voxel, as RGB does, and nnU-Net reads one value per voxel from NIfTI files"
        )
    with ImageOpener(file) as stream:  # nibabel corrects what it loads
        header = type(image.header).from_fileobj(stream, check=False)
        spacing = np.abs(header["pixdim"][1 : 1 + min(3, int(header["dim"][0]))])
    if not (np.isfinite(spacing) & (spacing > 0)).all():
        raise ValueError(f"its spacing is {', '.join(f'{mm:g}' for mm in spacing)} mm")
    promised = int(image.dataobj.offset) + math.prod(image.shape) * dtype.itemsize
    if size * (_MOST_COMPRESSED if is_gzip else 1) < promised:
        raise ValueError(f"it was cut short: {size:,} bytes of the {promised:,} that its header promises")
    if is_gzip:
        with open(file, "rb") as stream:
            stream.seek(-4, os.SEEK_END)
            size = int.from_bytes(stream.read(), "little")  # a gzip file ends with its size, modulo 2^32
        promised %= 2**32
    # The size may also differ for intact files: compressed ones of several parts, as bgzip writes them, and ones with bytes after
    # the image. Reading the whole file fails if data are missing.
    if (size != promised or dtype.kind == "f") and not np.isfinite(np.asanyarray(image.dataobj)).all():
        raise ValueError("it holds NaN or infinite values")


def _lower_case_endings(files: Sequence[str]) -> str:
    """Return how to rename files whose endings are not in lower case, because some readers do not know such endings."""
    commands = []
    for folder, name in map(os.path.split, files):
        lower = re.sub(r"(?<=_\d{4})\..*", lambda ending: ending[0].lower(), name)
        if lower != name:
            commands.append(shlex.join(["mv", os.path.join(folder, name), os.path.join(folder, lower)]))
    return f" Some readers know only endings in lower case. Type: {'; '.join(commands)}" if commands else ""


def _check_data_file(image: str) -> None:
    """Raise ValueError if a file with voxels that a header names is missing, or the other file of a pair."""
    folder, name = os.path.split(image)
    there = os.path.exists
    missing = [other for other in named_in_header(image) if not there(os.path.join(folder, other))]
    pair = sidecars(name) if name.lower().endswith((".hdr", ".img")) else []
    if not any(there(os.path.join(folder, other)) for other in pair):
        missing += pair[:1]
    if missing:
        raise ValueError(f"its other file {os.path.join(folder, missing[0])} is missing")


def _check_tiff(image: str) -> None:
    """Raise ValueError if nnU-Net's reader of 3D TIFFs would misread one, or cannot use its spacing file.

    The reader takes colours for an axis of space. Without a spacing file, it uses a spacing of 1 on each axis.
    """
    if _shape_of_tiff(image)[1]:
        raise ValueError("it is a colour image, and nnU-Net reads one value per voxel from 3D TIFF files")
    file = Path(image).parent / sidecars(os.path.basename(image))[0]
    if not file.exists():
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        spacing = content.get("spacing") if isinstance(content, dict) else None
    except (OSError, ValueError) as error:
        raise ValueError(f"its spacing file {file} cannot be read: {error}") from None
    numbers = spacing if isinstance(spacing, list) else []
    if len(numbers) != 3 or not all(is_above_zero(mm) for mm in numbers):
        got = json.dumps(content)[:100]
        raise ValueError(f'its spacing file {file} must be like {{"spacing": [3, 0.5, 0.5]}}, and is {got}')


def _image_problem(configuration: DatasetConfiguration, images: np.ndarray) -> str | None:
    channels = len(configuration.channel_names)
    if images.ndim != 4:
        return f"has {images.ndim - 1} dimensions; nnU-Net takes images of 2 or 3."
    if not images.size:
        return f"is empty: its shape is {images.shape}."
    if len(images) != channels:
        return f"has {len(images)} channels or time points; {configuration.dataset_name} has {channels}."
    if not np.isfinite(images).all():
        return "holds NaN or infinite values."
    if not np.ptp(images.reshape(len(images), -1), axis=1).any():
        return f"is constant: every voxel is {images.flat[0]:g}."
    return None


def planned_spacing(configuration: DatasetConfiguration, spacing: Sequence[float]) -> list[float]:
    """Return the spacing of each axis of a file after nnU-Net's resampling. In 2D, the slices keep their distance."""
    target, planned = configuration.manager.spacing, list(spacing)
    for axis, mm in zip(configuration.plans_manager.transpose_forward[-len(target) :], target, strict=True):
        planned[axis] = mm
    return planned
