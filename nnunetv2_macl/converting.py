"""Convert the data sets of the paper (Section IV-A) from the layouts of their organisers to nnU-Net's raw format.

nnU-Net itself converts ACDC (``nnunetv2.dataset_conversion.Dataset027_ACDC``), BraTS 2018 (``Dataset042_BraTS18``),
KiTS (``Dataset220_KiTS2023``) and the Medical Segmentation Decathlon (``nnUNetv2_convert_MSD_dataset``: heart,
hippocampus, spleen).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from PIL import Image

from nnunetv2_macl.collecting.dicom import read_header, sort_slices, why_unreadable
from nnunetv2_macl.collecting.voxels import read_series, write_image
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import write_error, write_json
from nnunetv2_macl.messages import progress_bar
from nnunetv2_macl.nnunet import read_json
from nnunetv2_macl.preprocessing.reading import check_nifti
from nnunetv2_macl.preprocessing.sources import UNLABELLED_FOLDER
from nnunetv2_macl.raw_data import DESCRIPTION, raw_data_set, write_description
from nnunetv2_macl.text import first_of, last_line, pluralise
from nnunetv2_macl.training.run_folder import RunLock

logger = logging.getLogger(__name__)

TRAINING, TEST = "imagesTr", "imagesTs"
LABELS = "labelsTr"
BACKGROUND = {"background": 0}
# Official value of MM-WHS -> value for nnU-Net: https://zmiclab.github.io/zxh/0/mmwhs/data.html
_MMWHS = {0: 0, 500: 1, 600: 2, 420: 3, 550: 4, 205: 5, 820: 6, 850: 7}
_MMWHS_NAMES = (
    "left ventricle", "right ventricle", "left atrium", "right atrium", "myocardium of the left ventricle",
    "ascending aorta", "pulmonary artery",
)  # fmt: skip
# First and last grey value of each organ, around 63, 126, 189 and 252: https://chaos.grand-challenge.org/Data/
_CHAOS = {"liver": (55, 70), "right kidney": (110, 135), "left kidney": (175, 200), "spleen": (240, 255)}
_CHAOS_SEQUENCES = {
    "t2spir": ("T2SPIR", "DICOM_anon"),
    "t1in": ("T1DUAL", "DICOM_anon/InPhase"),
    "t1out": ("T1DUAL", "DICOM_anon/OutPhase"),
}
_IMAGECHD_NAMES = (
    "left ventricle", "right ventricle", "left atrium", "right atrium", "myocardium", "aorta", "pulmonary artery"
)  # fmt: skip
# The file in an unfinished data set that says what is converted into it
_MARKER = ".converting.json"
# A mask of ISIC is 0 or 255. This value and above are lesion.
_ISIC_LESION = 128


@dataclass(frozen=True)
class RawCase:
    """A case to write."""

    name: str  # Name in the raw data set
    folder: str  # ``imagesTr``, ``imagesTs`` or ``imagesUn``
    write_image: Callable[[Path], object]  # Writes the image to a file
    # Writes the label map to a file; None for a case without labels
    write_label: Callable[[Path], object] | None = None

    def files(self, ending: str) -> dict[Path, Callable[[Path], object]]:
        """Return what writes each file of the case in the order of writing, by its path in the data set."""
        label = {} if self.write_label is None else {Path(LABELS) / f"{self.name}{ending}": self.write_label}
        return label | {Path(self.folder) / f"{self.name}_0000{ending}": self.write_image}


@dataclass(frozen=True)
class RawDataSet:
    """A data set in the layout of its organisers, ready to be written."""

    name: str  # Name after the number
    channels: list[str]  # Names of the channels of an image file
    labels: Iterable[str]  # Label names, in the order of their values from 1
    file_ending: str  # Ending of images and labels
    reference: str  # Where label values and layout are documented
    cases: list[RawCase]  # The cases


def mmwhs(source: Path, modality: str = "ct") -> RawDataSet:
    """Read MM-WHS 2017: ``ct_train/ct_train_1001_image.nii.gz``, ``..._label.nii.gz``, ``ct_test/ct_test_2001_image.nii.gz``.

    Labels (https://zmiclab.github.io/zxh/0/mmwhs/data.html): 500 left ventricle, 600 right ventricle, 420 left atrium,
    550 right atrium, 205 myocardium of the left ventricle, 820 ascending aorta, 850 pulmonary artery. A few voxels of
    one label file are 421; they count as 420. ``ct``, which the paper uses, and ``mr`` are data sets of their own.
    """
    values = _MMWHS | {421: _MMWHS[420]}
    images = _find(source, rf"{modality}_train_(?P<case>\d+)_image\.nii(\.gz)?")
    labels = _find(source, rf"{modality}_train_(?P<case>\d+)_label\.nii(\.gz)?")
    _require(images, labels, source, f"{modality}_train_1001_image.nii.gz with {modality}_train_1001_label.nii.gz")
    test = _find(source, rf"{modality}_test_(?P<case>\d+)_image\.nii(\.gz)?")
    return RawDataSet(
        f"MMWHS{modality.upper()}",
        [modality.upper()],
        _MMWHS_NAMES,
        ".nii.gz",
        "https://zmiclab.github.io/zxh/0/mmwhs/",
        _nifti_cases(f"{modality}_", images, labels, values) + _nifti_cases(f"{modality}_", test, {}, values, TEST),
    )


def hvsmr(source: Path) -> RawDataSet:
    """Read HVSMR 2016: ``training_axial_full_pat0.nii.gz``, ``..._pat0-label.nii.gz``, ``testing_axial_full_pat10.nii.gz``.

    The organisers have images in ``Training dataset`` and labels in ``Ground truth``. Labels
    (http://segchd.csail.mit.edu/data.html): 1 myocardium, 2 blood pool.
    """
    images = _find(source, r"training_axial_full_pat(?P<case>\d+)\.nii(\.gz)?")
    labels = _find(source, r"training_axial_full_pat(?P<case>\d+)-label\.nii(\.gz)?")
    _require(images, labels, source, "training_axial_full_pat0.nii.gz with training_axial_full_pat0-label.nii.gz")
    test = _find(source, r"testing_axial_full_pat(?P<case>\d+)\.nii(\.gz)?")
    values = {0: 0, 1: 1, 2: 2}
    return RawDataSet(
        "HVSMR",
        ["MR"],
        ("myocardium", "blood pool"),
        ".nii.gz",
        "http://segchd.csail.mit.edu/",
        _nifti_cases("pat", images, labels, values) + _nifti_cases("pat", test, {}, values, TEST),
    )


def imagechd(source: Path, labelled: bool = False) -> RawDataSet:
    """Read ImageCHD: ``ct_1001_image.nii.gz``, ``ct_1001_label.nii.gz``.

    The paper pre-trains on it without labels, so its images become unlabelled ones unless ``labelled``. Labels (Xu et al.,
    ImageCHD, MICCAI 2020): 1 left ventricle, 2 right ventricle, 3 left atrium, 4 right atrium, 5 myocardium, 6 aorta,
    7 pulmonary artery.
    """
    images = _find(source, r"ct_(?P<case>\d+)_image\.nii(\.gz)?")
    labels = _find(source, r"ct_(?P<case>\d+)_label\.nii(\.gz)?") if labelled else {}
    _require(images, labels if labelled else images, source, "ct_1001_image.nii.gz with ct_1001_label.nii.gz")
    values = {value: value for value in range(len(_IMAGECHD_NAMES) + 1)}
    folder = TRAINING if labelled else UNLABELLED_FOLDER
    names = _IMAGECHD_NAMES if labelled else ()
    reference = "Xu et al., ImageCHD, MICCAI 2020"
    return RawDataSet(
        "ImageCHD", ["CT"], names, ".nii.gz", reference, _nifti_cases("ct_", images, labels, values, folder)
    )


def chaos(source: Path, sequences: Iterable[str] = ("t2spir",)) -> RawDataSet:
    """Read the MR images of CHAOS 2019: ``MR/1/T2SPIR/DICOM_anon/*.dcm`` with ``MR/1/T2SPIR/Ground/*.png``.

    ``T1DUAL`` has ``DICOM_anon/InPhase`` and ``DICOM_anon/OutPhase``, and one ``Ground`` for both. Grey values of the
    masks (https://chaos.grand-challenge.org/Data/): about 63 liver, 126 right kidney, 189 left kidney, 252 spleen.
    Each sequence (``t2spir``, the paper's; ``t1in``; ``t1out``) is a case of its own, named after its patient, with one
    channel. Patients without masks, those of ``Test_Sets``, become test images.
    """
    cases = []
    found = {path.parent for path in source.resolve().rglob("T*") if path.name in ("T1DUAL", "T2SPIR")}
    patients = sorted(path for path in found if path.name.isdecimal() and path.parent.name == "MR")
    for patient in patients:
        for sequence in sequences:
            folder, images = _CHAOS_SEQUENCES[sequence]
            slices = sorted((patient / folder / images).glob("*.dcm"), key=_last_number)
            masks = sorted((patient / folder / "Ground").glob("*.png"), key=_last_number)
            if not slices:
                raise UserError(
                    f"{patient / folder / images} holds no .dcm file. Unpack the archive of CHAOS again, or give other "
                    "--sequences."
                )
            if masks and len(masks) != len(slices):
                raise UserError(
                    f"{patient / folder} has {len(slices)} slices in {images} and {len(masks)} masks in Ground. Each "
                    "slice needs one: unpack the archive of CHAOS again."
                )
            name = f"mr{int(patient.name):02d}_{sequence}"
            label = partial(_write_chaos_masks, slices, masks) if masks else None
            cases.append(RawCase(name, TRAINING if masks else TEST, partial(_write_series, slices), label))
    if not any(case.write_label for case in cases):
        raise _wrong_layout(source, "MR/1/T2SPIR/DICOM_anon/*.dcm with MR/1/T2SPIR/Ground/*.png")
    return RawDataSet("CHAOS", ["MR"], _CHAOS, ".nii.gz", "https://chaos.grand-challenge.org/", cases)


def isic2018(source: Path, grey: bool = False) -> RawDataSet:
    """Read the training images of ISIC 2018, task 1, as colour images, or as ``grey`` ones, which the paper uses.

    The organisers (https://challenge.isic-archive.com/data/#2018) have
    ``ISIC2018_Task1-2_Training_Input/ISIC_0000000.jpg`` and
    ``ISIC2018_Task1_Training_GroundTruth/ISIC_0000000_segmentation.png``, whose lesion is 255.
    """
    inputs, truths = "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"
    images = _find(source, r"ISIC_(?P<case>\d+)\.jpe?g", inputs)
    labels = _find(source, r"ISIC_(?P<case>\d+)_segmentation\.png", truths)
    expected = f"{inputs}/ISIC_0000000.jpg with {truths}/ISIC_0000000_segmentation.png"
    _require(images, labels, source, expected)
    cases = [
        RawCase(
            f"ISIC_{case}",
            TRAINING,
            partial(_write_photograph, image, grey),
            partial(_write_isic_mask, labels[case], image),
        )
        for case, image in images.items()
    ]
    channels = ["grey"] if grey else ["R", "G", "B"]
    return RawDataSet("ISIC2018", channels, ["lesion"], ".png", "https://challenge.isic-archive.com/data/#2018", cases)


def convert(data_set: RawDataSet, dataset: str) -> Path:
    """Write a raw data set with an id or name, and return its folder.

    Files that exist already are kept, so a conversion that was stopped continues.

    Raises:
        UserError: The data set is complete already, the folder holds something else, a file cannot be converted, or the
            disk is full.
    """
    folder = raw_data_set(dataset, data_set.name)
    if (folder / DESCRIPTION).exists():
        raise UserError(f"{folder} is a complete data set and is not overwritten. Give another id: -d")
    work = folder / ".converting"
    ending = data_set.file_ending
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder)
        lock.acquire()
        try:
            _begin(data_set, folder)
            for case in progress_bar(data_set.cases, unit="case"):
                for file, write in case.files(ending).items():
                    if not (folder / file).is_file():
                        try:
                            (folder / file).parent.mkdir(exist_ok=True)
                            write(work / file.name)
                            os.replace(work / file.name, folder / file)
                        except OSError as error:
                            raise write_error(error, folder / file) from error
            trained = sum(case.folder == TRAINING for case in data_set.cases)
            labels = BACKGROUND | {name: value for value, name in enumerate(data_set.labels, 1)}
            write_description(folder, data_set.channels, labels, trained, ending, reference=data_set.reference)
            (folder / _MARKER).unlink()
        finally:
            shutil.rmtree(work, ignore_errors=True)
            lock.release()
    except KeyboardInterrupt:
        raise UserError("Stopped. Type the same command again to continue. Finished images are kept.") from None
    except OSError as error:
        raise write_error(error, folder) from error
    logger.info("%s, %d of them labelled, in %s", pluralise(len(data_set.cases), "case"), trained, folder)
    return folder


def _begin(data_set: RawDataSet, folder: Path) -> None:
    """Write down what is converted into a folder. Raise UserError if the folder holds anything else."""
    marker = folder / _MARKER
    mine = {"name": data_set.name, "channels": data_set.channels, "labels": list(data_set.labels)}
    there = shlex.quote(str(folder))
    remedy = f"Give another id (-d), or move the folder away: mv {there} {there}_before"
    if marker.is_file():
        begun = read_json(marker, remedy)
        if begun != mine:
            raise UserError(
                f"{folder} is an unfinished conversion of {json.dumps(begun)}, and you convert {json.dumps(mine)}. To continue, "
                f"type the earlier command with the same options. {remedy}"
            )
        own = {file for case in data_set.cases for file in case.files(data_set.file_ending)}
    else:
        own = set()
    files = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    if others := sorted(file for file in files if file not in own and not any(p.startswith(".") for p in file.parts)):
        raise UserError(f"{folder} holds {others[0]}, which is not of this conversion. {remedy}")
    write_json(mine, marker)


# --- files of a layout ---------------------------------------------------------------------------------------------


def _find(source: Path, pattern: str, parent: str | None = None) -> dict[str, Path]:
    """Return the files below ``source`` whose names match, by the group ``case``. ``parent`` is the name of their folder."""
    found: dict[str, Path] = {}
    for file in sorted(source.rglob("*")):
        if parent not in (None, file.parent.name):
            continue
        if match := re.fullmatch(pattern, file.name):
            if match["case"] in found:
                raise UserError(f"{found[match['case']]} and {file} are the same case. Remove one of them.")
            found[match["case"]] = file
    return found


def _require(images: Mapping[str, Path], labels: Mapping[str, Path], source: Path, expected: str) -> None:
    if not images or not labels:
        raise _wrong_layout(source, expected)
    if lonely := sorted(images.keys() ^ labels.keys()):
        file = images.get(lonely[0]) or labels[lonely[0]]
        what = "label" if lonely[0] in images else "image"
        raise UserError(f"{file} has no {what}; expected {expected}. Unpack the archive of the organisers again.")


def _wrong_layout(source: Path, expected: str) -> UserError:
    if not source.is_dir():
        return UserError(f"{source} is not a folder. Give the folder of the data set, which holds {expected}.")
    names = sorted(path.name for path in source.iterdir())
    there = first_of(names, 5) or "nothing"
    return UserError(f"{source} should hold {expected}, in any subfolder; it holds {there}.")


def _last_number(file: Path) -> tuple[int, str]:
    numbers = re.findall(r"\d+", file.stem)
    return (int(numbers[-1]) if numbers else 0, file.name)


# --- volumes -------------------------------------------------------------------------------------------------------


def _nifti_cases(
    prefix: str,
    images: Mapping[str, Path],
    labels: Mapping[str, Path],
    values: Mapping[int, int],
    folder: str = TRAINING,
) -> list[RawCase]:
    return [
        RawCase(
            f"{prefix}{case}",
            folder,
            partial(_write_nifti, image),
            partial(_write_labels, labels[case], image, values) if case in labels else None,
        )
        for case, image in images.items()
    ]


def _read(file: Path) -> sitk.Image:
    try:
        check_nifti(str(file))  # ITK reads zeros from a file that was cut short
        return sitk.ReadImage(str(file))
    except Exception as error:  # SimpleITK and nibabel raise many kinds of errors for damaged files
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} cannot be read: {last_line(error)}. Unpack it again from the organisers' archive.")


def _write_nifti(image: Path, target: Path) -> None:
    volume = _read(image)  # Finds a damaged file before it is copied
    if image.name.endswith(".nii.gz"):
        shutil.copyfile(image, target)
    else:
        write_image(volume, target)


def _write_labels(label: Path, image: Path, values: Mapping[int, int], target: Path) -> None:
    """Write a label map with consecutive values from 0, in the geometry of its image."""
    labels, volume = _read(label), _read(image)
    if labels.GetSize() != volume.GetSize():
        raise UserError(
            f"{label} has the size {labels.GetSize()} and {image} has {volume.GetSize()}. Unpack both from the "
            "archive again."
        )
    array = np.rint(sitk.GetArrayViewFromImage(labels)).astype(np.int64)
    there = np.unique(array)
    if unknown := sorted(set(there.tolist()) - set(values)):
        raise UserError(
            f"{label} holds the values {', '.join(map(str, unknown))}, which are no labels of this data set "
            f"({', '.join(map(str, values))}). Correct the file."
        )
    mapped = np.array([values[value] for value in there.tolist()], dtype=np.uint8)
    _write_array(mapped[np.searchsorted(there, array)], volume, target)
    geometry = (labels.GetOrigin(), labels.GetSpacing(), labels.GetDirection())
    wanted = (volume.GetOrigin(), volume.GetSpacing(), volume.GetDirection())
    if any(not np.allclose(a, b, atol=1e-2) for a, b in zip(geometry, wanted, strict=True)):
        logger.warning(
            "The header of %s has another geometry than that of its image. The image's geometry is used.", label
        )


def _write_array(array: np.ndarray, reference: sitk.Image, target: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.CopyInformation(reference)
    write_image(image, target)


def _read_slices(slices: list[Path]) -> tuple[sitk.Image, list[int]]:
    """Return the volume of DICOM slices, and for each position in it the number of the slice."""
    try:
        headers = [read_header(file) for file in slices]
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"A file in {slices[0].parent} cannot be read: {last_line(error)}. Unpack the archive again."
        ) from None
    if any(header.position is None or header.orientation is None for header in headers):
        raise UserError(f"A file in {slices[0].parent} does not say where its slice is. Unpack the archive again.")
    order = [header.file for header in sort_slices(headers)]
    try:
        volume = read_series(order)
    except RuntimeError as error:
        raise UserError(
            f"{slices[0].parent} cannot be read: {why_unreadable(order[0], error)}. Unpack the archive again."
        ) from None
    names = [str(file) for file in slices]
    return volume, [names.index(file) for file in order]


def _write_series(slices: list[Path], target: Path) -> None:
    volume, _ = _read_slices(slices)
    for key in volume.GetMetaDataKeys():
        volume.EraseMetaData(key)
    write_image(volume, target)


def _write_chaos_masks(slices: list[Path], masks: list[Path], target: Path) -> None:
    """Write the masks, which are in the order of the slices' file numbers, in the order of the slices in space."""
    volume, order = _read_slices(slices)
    array = np.stack([_chaos_labels(masks[number], volume) for number in order])
    _write_array(array, volume, target)


def _chaos_labels(mask: Path, volume: sitk.Image) -> np.ndarray:
    with _opened(mask) as image:
        grey = np.array(image.convert("L"))
    if grey.shape != volume.GetSize()[1::-1]:
        raise UserError(
            f"{mask} has {grey.shape[1]}x{grey.shape[0]} pixels, its slice {volume.GetSize()[0]}x{volume.GetSize()[1]}."
        )
    labels = np.zeros(grey.shape, dtype=np.uint8)
    for value, (first, last) in enumerate(_CHAOS.values(), 1):
        labels[(grey >= first) & (grey <= last)] = value
    if unknown := np.unique(grey[(labels == 0) & (grey > 0)]).tolist():
        raise UserError(
            f"{mask} holds the grey values {unknown}, which are none of CHAOS ({_CHAOS}). Correct the file."
        )
    return labels


# --- photographs ---------------------------------------------------------------------------------------------------


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """Open an image of Pillow for reading. Raise UserError if it is damaged, which may only show when its pixels are read."""
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's errors for damaged files
        raise _unreadable(file, error) from None


def _write_photograph(file: Path, grey: bool, target: Path) -> None:
    with _opened(file) as image:
        pixels = image.convert("L" if grey else "RGB")
    pixels.save(target)


def _write_isic_mask(file: Path, photograph: Path, target: Path) -> None:
    with _opened(photograph) as image:
        size = image.size
    with _opened(file) as mask:
        lesion = np.array(mask.convert("L")) >= _ISIC_LESION
    if lesion.shape != size[::-1]:
        raise UserError(f"{file} has {lesion.shape[::-1]} pixels and {photograph} has {size}. Unpack both again.")
    Image.fromarray(lesion.astype(np.uint8)).save(target)
