"""Read DICOM headers, and find the series that are scans of one volume.

The headers are read by SimpleITK (GDCM), which nnU-Net depends on already. Attribute names and their tags are those of
the DICOM standard, PS3.3 and PS3.6.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from nnunetv2_macl.text import last_line, pluralise

# Files with these endings are DICOM. Other files are DICOM if they have the preamble of the standard.
DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
# Modalities of objects that are no scans: PS3.3, C.7.3.1.1.1
_NO_SCANS = {"SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "SR", "PR", "KO", "REG", "DOC", "FID"}
_LOCALIZER = re.compile(r"locali[sz]er|scout|survey|topogram|surview|scanogram|\b3[ -]?pl(ane)?\b", re.IGNORECASE)
# (0002,0010) in the file meta information, which is in explicit VR little endian: PS3.10, 7.1
_TRANSFER_SYNTAX = re.compile(rb"\x02\x00\x10\x00UI..([0-9.]+)", re.DOTALL)
# Slices are parallel if their direction cosines differ by no more than this.
_PARALLEL = 1e-3
# Distances of neighbouring slices may differ from their median by this fraction. Rounding in headers causes less.
_UNEVEN = 0.05
# Allowed sideways shift per distance. A gantry tilt of half a degree shifts slices by 0.9 % of their distance.
_TILT = 0.01


class Slice(NamedTuple):
    """The values that are needed from the header of one DICOM file."""

    file: str  # Path of the file
    image: str  # SOP Instance UID, or the path where the header has none
    series: str  # Series Instance UID, or the folder where the header has none
    patient: str  # Patient ID; without it, name and date of birth; without these, the Study Instance UID
    modality: str  # CT, MR, ...
    image_type: tuple[str, ...]  # For example ("ORIGINAL", "PRIMARY", "M")
    description: str  # Series Description and Protocol Name
    position: tuple[float, ...] | None  # Image Position (Patient) in mm, or None
    orientation: tuple[float, ...] | None  # Image Orientation (Patient), six direction cosines, or None
    shape: tuple[str, str]  # Rows and columns
    spacing: tuple[float, ...] | None  # Pixel Spacing in mm
    frames: int  # Number of Frames
    channels: int  # Samples per Pixel, 3 for colour
    is_annotated: bool = False  # Whether Burned In Annotation is YES


@dataclass
class Series:
    """The files of one Series Instance UID, each image once."""

    slices: list[Slice] = field(default_factory=list)  # One for each image, in the order of their paths
    copies: int = 0  # Number of further files that hold the same images


def is_dicom(file: Path) -> bool:
    """Return whether a file is a DICOM object by its ending or by the preamble of the standard (PS3.10, 7.1).

    A ``DICOMDIR`` lists the files of a medium and is no image.
    """
    if file.name.upper() == "DICOMDIR":
        return False
    if file.suffix.lower() in DICOM_ENDINGS:
        return True
    with open(file, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def read_header(file: Path) -> Slice:
    """Read the header of a DICOM file without its voxels.

    Raises:
        RuntimeError: SimpleITK cannot read the file.
        ValueError: A value in the header that must be a number is not a number.
    """
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(file))
    reader.ReadImageInformation()
    there = set(reader.GetMetaDataKeys())

    def text(tag: str) -> str:
        # Keep one copy of texts that all slices of a series share, because an archive may have millions of slices.
        return sys.intern(reader.GetMetaData(tag).strip(" \0")) if tag in there else ""

    born = f"{text('0010|0010')} {text('0010|0030')}".strip()
    return Slice(
        file=str(file),
        image=text("0008|0018") or str(file),
        series=text("0020|000e") or str(file.parent),
        patient=text("0010|0020") or born or text("0020|000d") or str(file.parent),
        modality=text("0008|0060").upper(),
        image_type=tuple(part.strip().upper() for part in text("0008|0008").split("\\")),
        description=" ".join(dict.fromkeys(part for tag in ("0008|103e", "0018|1030") if (part := text(tag)))),
        position=_numbers(text("0020|0032"), 3),
        orientation=_numbers(text("0020|0037"), 6),
        shape=(text("0028|0010"), text("0028|0011")),
        spacing=_numbers(text("0028|0030"), 2),
        frames=int(text("0028|0008") or 1),
        channels=int(text("0028|0002") or 1),
        is_annotated=text("0028|0301").upper() == "YES",
    )


@lru_cache(maxsize=10_000)
def _numbers(text: str, count: int) -> tuple[float, ...] | None:
    values = tuple(float(part) for part in text.split("\\") if part.strip())
    return values if len(values) == count and np.isfinite(values).all() else None


def why_unreadable(file: str | Path, error: Exception) -> str:
    """Return why a DICOM file cannot be read, with its transfer syntax. SimpleITK does not decompress all syntaxes."""
    with open(file, "rb") as stream:
        found = _TRANSFER_SYNTAX.search(stream.read(4096))
    if not found:
        return last_line(error)
    syntax = found[1].decode().rstrip(".")
    return (
        f"{last_line(error)} (transfer syntax {syntax}); it is damaged, holds no image, or is compressed in a way that "
        "SimpleITK does not read: gdcmconv --raw decompresses it"
    )


def group_series(slices: Iterable[Slice]) -> dict[str, Series]:
    """Group slices by their series. An image in several files counts once, in the series where it is met first."""
    series: dict[str, Series] = defaultdict(Series)
    seen: set[str] = set()
    for header in slices:
        if header.image in seen:
            series[header.series].copies += 1
        else:
            seen.add(header.image)
            series[header.series].slices.append(header)
    return dict(series)


def why_not(series: Series, min_slices: int, keep_derived: bool) -> str | None:
    """Return why a series cannot be taken as one volume, or None if it can.

    Derived images are reformatted, averaged, lossily compressed, ...
    """
    slices = series.slices
    if not slices:
        return "duplicate: each of its images is in another series already"
    first = slices[0]
    if first.modality in _NO_SCANS:
        return f"no scan: its modality is {first.modality}"
    if any("LOCALIZER" in s.image_type for s in slices) or _LOCALIZER.search(first.description):
        return "localizer"
    if not keep_derived and (derived := next((s for s in slices if _is_derived(s)), None)):
        return f"derived: its image type is {'/'.join(derived.image_type)}; --keep_derived includes such series"
    if any(s.frames > 1 for s in slices):
        return "multi-frame file: convert it with dcm2niix and collect the NIfTI file"
    if any(s.channels > 1 for s in slices):
        return "colour image"
    if any(s.is_annotated for s in slices):
        return "its header says that text is burned into the image, which may be the patient's name"
    if len(slices) < min_slices:
        return f"{pluralise(len(slices), 'single slice')}; a series needs --min_slices {min_slices}"
    if any(s.position is None or s.orientation is None or s.spacing is None for s in slices):
        return "no position, orientation or pixel spacing in the header of a slice"
    return _geometry(slices)


def _is_derived(header: Slice) -> bool:
    return "DERIVED" in header.image_type[:1] or "SECONDARY" in header.image_type[1:2]


def _geometry(slices: list[Slice]) -> str | None:
    orientations = np.array([s.orientation for s in slices])
    if np.ptp(orientations, axis=0).max() > _PARALLEL:
        number = len({tuple(np.round(o, 2)) for o in orientations})
        return f"mixed orientation: its slices have {max(number, 2)} orientations"
    sizes = {(s.shape, tuple(np.round(np.array(s.spacing), 4))) for s in slices}
    if len(sizes) > 1:
        return "slices of different sizes or pixel spacings"
    if len(slices) == 1:
        return None
    along = _positions(slices)
    distances = np.diff(np.sort(along))
    # Positions that differ by less than a hundredth of a pixel are equal. The pixels of micro-CT are a few micrometres.
    equal = 0.01 * min(slices[0].spacing or (1.0,))
    typical = float(np.median(distances[distances > equal])) if (distances > equal).any() else 0.0
    places = Counter(np.round(along / equal).tolist())
    if len(places) < len(slices):
        several = max(places.values())
        if len(places) == 1:
            return f"one slice position with {several} images (a time series)"
        return (
            f"4D: up to {several} images at each of {len(places)} slice positions (time points, echoes, directions); "
            "convert the volume that you want with dcm2niix and collect the NIfTI file"
        )
    if np.abs(distances - typical).max() > _UNEVEN * typical:
        at = int(np.abs(distances - typical).argmax())
        gap = f"{distances[at]:.2f} mm from slice {at + 1} to {at + 2}"
        return f"missing slices: {gap}, and {typical:.2f} mm between others"
    ordered = sort_slices(slices)
    moved = np.subtract(ordered[-1].position, ordered[0].position)  # type: ignore[arg-type]
    sideways = moved - np.dot(moved, _normal(slices)) * _normal(slices)
    if np.linalg.norm(sideways) > _TILT * np.linalg.norm(moved):
        return "gantry tilt: its slices are not at right angles; convert it with dcm2niix and collect the NIfTI file"
    return None


def _normal(slices: list[Slice]) -> np.ndarray:
    """Return the unit vector at right angles to the slices, in patient coordinates."""
    row, column = np.array(slices[0].orientation).reshape(2, 3)
    normal = np.cross(row, column)
    return normal / np.linalg.norm(normal)


def _positions(slices: list[Slice]) -> np.ndarray:
    """Return the position of each slice along the normal, in mm."""
    return np.array([s.position for s in slices]) @ _normal(slices)


def sort_slices(slices: list[Slice]) -> list[Slice]:
    """Return the slices of a series in the order of their positions along the normal."""
    return [slices[i] for i in np.argsort(_positions(slices), kind="stable")]
