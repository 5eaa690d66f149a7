"""Collect the images of a folder tree as the unlabelled images of a raw data set."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import multiprocessing
import os
import re
import shutil
import stat
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_macl.collecting.dicom import (
    Slice,
    group_series,
    is_dicom,
    read_header,
    sort_slices,
    why_not,
    why_unreadable,
)
from nnunetv2_macl.collecting.pseudonyms import IMAGE_NAME, Pseudonyms, load_key
from nnunetv2_macl.collecting.table import LEFT_OUT, TAKEN, Row, append_row, read_table, write_table
from nnunetv2_macl.collecting.voxels import NIFTI_ENDINGS, Job, initialise_worker, make_image
from nnunetv2_macl.cpu import usable_cores
from nnunetv2_macl.dataset_json import channel_names
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import is_utf8, write_error
from nnunetv2_macl.main_guard import require_main_guard
from nnunetv2_macl.messages import progress_bar
from nnunetv2_macl.nnunet import read_dataset_json
from nnunetv2_macl.patients import patients_of
from nnunetv2_macl.preprocessing.sources import UNLABELLED_FOLDER, require_target
from nnunetv2_macl.raw_data import DESCRIPTION, raw_data_set, write_description
from nnunetv2_macl.text import pluralise
from nnunetv2_macl.training.run_folder import RunLock

logger = logging.getLogger(__name__)

NEW_DATA_SET = "Collected"
DEFAULT_PRIVATE_FOLDER = "~/nnunetv2_macl_private"
# A folder in imagesUn, which may be on another disk, so that moving a finished image into place is atomic.
_WORK_FOLDER = ".collecting"
# Channel names that are a DICOM modality, or a usual name of one, with this modality: PS3.3, C.7.3.1.1.1
_MODALITIES = {"CT": "CT", "MR": "MR", "MRI": "MR", "PT": "PT", "PET": "PT", "US": "US", "NM": "NM", "MG": "MG"}


@dataclass(frozen=True)
class Candidate:
    """An image that can be made: its row in the table, and its files in their order."""

    row: Row
    files: list[str]


def collect(
    source: Path,
    dataset: str,
    *,
    modality: str | None = None,
    link: bool = False,
    min_slices: int = 5,
    keep_derived: bool = False,
    patient_regex: str | None = None,
    private_folder: Path = Path(DEFAULT_PRIVATE_FOLDER),
    processes: int = 8,
) -> Path:
    """Write one image for each DICOM series and NIfTI file of a folder tree into ``imagesUn`` of a raw data set.

    Images that exist already are not written again, so a run that was stopped continues.

    Args:
        source: Folder of the tree. It is only read.
        dataset: Raw data set with one channel, by its id or name. It is created if it does not exist.
        modality: DICOM modality to take; None if all series have the same one.
        link: Make hard links to NIfTI files instead of copies, if they have the ending of the data set.
        min_slices: Leave out series and volumes with fewer slices.
        keep_derived: Take series whose image type is derived or secondary, too.
        patient_regex: Regular expression whose first group, or whole match, is the patient in the path of a NIfTI file.
            None: the patient is the first folder below ``source``, or the file name.
        private_folder: Folder of the key of the pseudonyms and of the table. Only its owner may read them.
        processes: Number of images that are read and written at the same time.

    Returns:
        The table of what was taken and left out, with the reasons.

    Raises:
        UserError: A wrong option, another kind of data set, several modalities, or a full disk.
    """
    require_main_guard()
    source, private_folder = source.expanduser().resolve(), private_folder.expanduser().resolve()
    if not source.is_dir():
        raise UserError(f"{source} is not a folder. Give the folder of the images.")
    for option, value in (("-np", processes), ("--min_slices", min_slices)):
        if value < 1:
            raise UserError(f"{option} must be 1 or more, got {value}.")
    patients_of((), patient_regex, "--patient_regex")  # a mistake shows before the tree is read
    folder = raw_data_set(dataset, NEW_DATA_SET)
    if source.is_relative_to(folder.resolve()):
        raise UserError(
            f"{source} is in the data set {folder.name} itself. Give a folder elsewhere, or another data set: -d"
        )
    if private_folder.is_relative_to(folder.resolve()):
        raise UserError(
            f"{private_folder} is in the data set, which others may get. Give another folder: --private_folder FOLDER"
        )
    channel, ending = _channel_and_ending(folder)
    _require_modality(channel, modality, folder)
    pseudonyms = load_key(private_folder)
    table = private_folder / f"{folder.name}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(folder)
    lock.acquire()
    try:
        earlier = read_table(table)
        if any(row.key not in ("", pseudonyms.fingerprint) for row in earlier):
            raise UserError(
                f"{table} lists images that were named with another key than the one in {table.parent}, so the same patients "
                "would get other pseudonyms. Put the old key back, or collect into a new data set: -d"
            )
        images = folder / UNLABELLED_FOLDER
        require_target(images)
        _require_listed(images, earlier, table)
        # This removes a last line that a killed run has cut short.
        write_table(earlier, table)
        taken = {row.series for row in earlier if row.taken == TAKEN}
        slices, files, left_out = _read_tree(source, folder)
        series, others = _series_candidates(slices, taken, pseudonyms, ending, min_slices, keep_derived)
        identities: dict[str, set[str]] = defaultdict(set)
        for each in slices:
            first, *deeper = Path(each.file).relative_to(source).parts
            if deeper:
                identities[first].add(each.patient)
        niftis, lost = _nifti_candidates(files, source, pseudonyms, ending, patient_regex, identities)
        candidates, of_others, modality = _select([*niftis, *series], modality, source)
        _require_modality(channel, modality, folder)
        left_out += others + lost + of_others
        rows = []
        if candidates:
            if not (folder / DESCRIPTION).is_file():
                if modality is None:
                    raise UserError(
                        f"{folder / DESCRIPTION} does not exist, and these images do not say their modality. Give it, for "
                        "example: --modality MR"
                    )
                write_description(folder, [modality], {"background": 0}, 0, ending)
            images.mkdir(exist_ok=True)
            rows = _make(candidates, earlier, images, table, min_slices, link, processes)
        rows += left_out
        write_table([*_still_valid(earlier, rows, source), *rows], table)
    except KeyboardInterrupt:
        raise UserError("Stopped. Type the same command again to continue. Finished images are kept.") from None
    except OSError as error:
        raise write_error(error, folder) from error
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # removes only an empty folder
            folder.rmdir()
    _summarise(rows, images, table)
    if not candidates:
        raise UserError(f"{source} holds no image that can be used. {table} lists its files with the reasons.")
    return table


def _still_valid(earlier: list[Row], rows: list[Row], source: Path) -> list[Row]:
    """Return the earlier rows to keep: images that were taken, and files of other trees that were left out.

    Rows of images that do not exist are kept too, because the images may have been moved, or may be in another
    nnUNet_raw, and no other file tells whose they are.
    """
    new = {row.image for row in rows if row.image}
    return [
        row
        for row in earlier
        if row.image not in new and (row.taken == TAKEN or not Path(row.source).is_relative_to(source))
    ]


def _channel_and_ending(folder: Path) -> tuple[str | None, str]:
    """Return the channel of a data set, None if it is new, and its file ending.

    Raises UserError if images of one channel cannot be written for it.
    """
    file = folder / DESCRIPTION
    if not file.is_file():
        return None, ".nii.gz"
    description = read_dataset_json(file, "Correct it, or give another data set: -d")
    channels, ending = channel_names(description), description["file_ending"]
    if len(channels) != 1:
        raise UserError(
            f"{folder.name} has {len(channels)} channels ({', '.join(channels)}), and a series is one channel. Give "
            "a data set of one channel or a new number: -d"
        )
    if ending not in SimpleITKIO.supported_file_endings:
        raise UserError(
            f"{folder.name} has files that end in {ending}, and volumes are written as "
            f"{', '.join(SimpleITKIO.supported_file_endings)}. Give another data set or a new number: -d"
        )
    return channels[0], ending


def _require_modality(channel: str | None, modality: str | None, folder: Path) -> None:
    """Raise UserError if the channel of a data set is another modality, because nnU-Net normalises by the channel."""
    expected = _MODALITIES.get((channel or "").upper())
    if expected and modality not in (None, expected):
        raise UserError(
            f"The channel of {folder.name} is {channel}, and the modality of the images is {modality}. Give another data "
            f"set (-d), or take only images of this modality: --modality {expected}"
        )


def _require_listed(images: Path, earlier: list[Row], table: Path) -> None:
    """Raise UserError if images were collected with another table, because all would be collected again."""
    listed = {row.image for row in earlier}
    others = sorted(path.name for path in images.glob("p*") if IMAGE_NAME.match(path.name) and path.name not in listed)
    if others:
        raise UserError(
            f"{images} holds {pluralise(len(others), 'collected image')} that {table} does not list, for example "
            f"{others[0]}. Give the private folder with which they were collected, so that no patient gets a second "
            "pseudonym: --private_folder FOLDER. If it is lost, collect into a new data set: -d"
        )


def _read_tree(source: Path, folder: Path) -> tuple[list[Slice], list[Path], list[Row]]:
    """Return the headers of the DICOM files of a tree, its NIfTI files, and a row for each other file."""
    slices: list[Slice] = []
    nifti: list[Path] = []
    left_out: list[Row] = []
    logger.info("Looking through %s", source)
    bar = progress_bar(_files(source, folder), unit="file")
    for number, file in enumerate(bar, 1):
        if bar.disable and number % 10_000 == 0:
            logger.info("Looked at %d files", number)
        kind = "other"
        try:
            if not is_utf8(str(file)):
                left_out.append(Row(LEFT_OUT, "its path is not in UTF-8. Rename it", kind=kind, source=str(file)))
            elif file.name.lower().endswith(NIFTI_ENDINGS):
                nifti.append(file)
            elif not stat.S_ISREG(file.stat().st_mode):
                left_out.append(Row(LEFT_OUT, "no regular file", kind=kind, source=str(file)))
            elif is_dicom(file):
                kind = "DICOM"
                slices.append(read_header(file))
            else:
                left_out.append(Row(LEFT_OUT, "neither DICOM nor NIfTI", kind=kind, source=str(file)))
        except OSError as error:
            left_out.append(Row(LEFT_OUT, f"cannot be read: {error.strerror}", kind=kind, source=str(file)))
        except (RuntimeError, ValueError) as error:
            reason = f"cannot be read: {why_unreadable(file, error)}"
            left_out.append(Row(LEFT_OUT, reason, kind=kind, source=str(file)))
    return slices, nifti, left_out


def _files(source: Path, folder: Path) -> Iterator[Path]:
    """Yield the files of a tree in the order of their paths, without the data set's own.

    Links to folders are not followed.
    """

    def fail(error: OSError) -> None:
        logger.warning("Left out: %s cannot be read: %s", error.filename, error.strerror)

    target = folder.resolve()
    for root, folders, files in os.walk(source, onerror=fail):
        folders[:] = sorted(name for name in folders if Path(root, name) != target)
        for name in sorted(files):
            yield Path(root, name)


def _series_candidates(
    slices: list[Slice], taken: set[str], pseudonyms: Pseudonyms, ending: str, min_slices: int, keep_derived: bool
) -> tuple[list[Candidate], list[Row]]:
    """Return the series that make one volume each, and a row for each other series.

    Images in several series belong to the one in ``taken``, the series that were collected earlier.
    """
    candidates, left_out = [], []
    first_of = {s.series: s for s in reversed(slices)}
    for uid, series in group_series(sorted(slices, key=lambda s: s.series not in taken)).items():
        first = first_of[uid]
        images = sorted(s.image for s in series.slices)
        row = Row(
            TAKEN,
            f"{pluralise(series.copies, 'duplicate file')} left out" if series.copies else "",
            f"{pseudonyms.case(first.patient, uid)}_0000{ending}",
            pseudonyms.patient(first.patient),
            "DICOM",
            first.modality,
            first.description,
            len(series.slices) + series.copies,
            first.file,
            uid,
            hashlib.sha256("\n".join(images).encode(errors="surrogateescape")).hexdigest(),
            key=pseudonyms.fingerprint,
        )
        if reason := why_not(series, min_slices, keep_derived):
            left_out.append(replace(row, taken=LEFT_OUT, reason=reason, image=""))
        else:
            candidates.append(Candidate(row, [s.file for s in sort_slices(series.slices)]))
    return candidates, left_out


def _nifti_candidates(
    files: list[Path],
    source: Path,
    pseudonyms: Pseudonyms,
    ending: str,
    patient_regex: str | None,
    identities: Mapping[str, set[str]],
) -> tuple[list[Candidate], list[Row]]:
    """Return the NIfTI files that are there, and a row for each link that leads nowhere.

    The patient is the first folder below the source. If all DICOM files in this folder have one patient ID, it is that patient:
    volumes that were converted from them are often there too.

    Args:
        identities: Patient IDs of the DICOM files in each first folder, by the name of the folder.
    """
    candidates, left_out = [], []
    paths = [file.relative_to(source) for file in files]
    patients = patients_of([path.as_posix() for path in paths], patient_regex, "--patient_regex")
    for file, path in zip(files, paths, strict=True):
        patient = patients[path.as_posix()]
        if patient_regex is None:
            # the first folder below the source, or the name of the file
            patient = path.parts[0] if len(path.parts) > 1 else re.sub(r"(?i)\.nii(\.gz)?$", "", path.name)
            if len(path.parts) > 1 and len(ids := identities.get(path.parts[0], set())) == 1:
                (patient,) = ids
        try:
            status = file.stat()
        except OSError as error:
            left_out.append(Row(LEFT_OUT, f"cannot be read: {error.strerror}", kind="NIfTI", source=str(file)))
            continue
        row = Row(
            TAKEN,
            "",
            f"{pseudonyms.case(patient, path.as_posix())}_0000{ending}",
            pseudonyms.patient(patient),
            "NIfTI",
            source=str(file),
            content=f"{status.st_size} {status.st_mtime_ns}",
            key=pseudonyms.fingerprint,
        )
        candidates.append(Candidate(row, [str(file)]))
    return candidates, left_out


def _select(
    candidates: list[Candidate], modality: str | None, source: Path
) -> tuple[list[Candidate], list[Row], str | None]:
    """Return the candidates of the modality, rows for the others, and the modality, which NIfTI files do not have."""
    # An empty modality is as unknown as that of a NIfTI file.
    there = Counter(c.row.modality for c in candidates if c.row.kind == "DICOM" and c.row.modality)
    if modality is None and len(there) > 1:
        counts = ", ".join(f"{pluralise(number, f'{name} image')}" for name, number in there.most_common())
        raise UserError(
            f"{source} holds several modalities ({counts}), and a channel has one. Choose one, for example: --modality "
            f"{there.most_common(1)[0][0]}"
        )
    modality = modality or next(iter(there), None)
    taken = [c for c in candidates if c.row.kind == "NIfTI" or c.row.modality in (modality, "", None)]
    reason = f"another modality than {modality}"
    others = [
        replace(c.row, taken=LEFT_OUT, reason=reason, image="")
        for c in candidates
        if c.row.kind == "DICOM" and c.row.modality not in (modality, "", None)
    ]
    return taken, others, modality


def _make(
    candidates: list[Candidate],
    earlier: list[Row],
    images: Path,
    table: Path,
    min_slices: int,
    link: bool,
    processes: int,
) -> list[Row]:
    """Make the images that do not exist yet. Return a row for each candidate.

    An image from another tree is never replaced, except a DICOM series by the same series with more slices. An image that was
    moved to the training or test images of the data set is not made again: it would be pre-trained on. Nor is one that the table
    lists and that is not there any more, because it may have been renamed or removed on purpose.
    """
    made = {row.image: row for row in earlier if row.taken == TAKEN}
    work = images.resolve() / _WORK_FOLDER
    # A run that was killed leaves this folder, and may have written its last row without the image.
    unfinished = earlier[-1] if earlier and work.exists() else None
    shutil.rmtree(work, ignore_errors=True)
    done, incomplete, todo, moved, removed = [], [], [], 0, 0
    for candidate in candidates:
        if any((images.with_name(folder) / candidate.row.image).is_file() for folder in ("imagesTr", "imagesTs")):
            earlier_row = made.get(candidate.row.image)
            done.append(replace(candidate.row, voxels=earlier_row.voxels if earlier_row else candidate.row.voxels))
            moved += 1
            continue
        row, image, here = made.get(candidate.row.image), images / candidate.row.image, len(candidate.files)
        from_elsewhere = row is not None and row.source != candidate.row.source
        is_done = image.is_file() or row is not unfinished
        if row and row.content == candidate.row.content and is_done:
            done.append(replace(candidate.row, voxels=row.voxels))
            removed += not image.is_file()
        elif candidate.row.kind == "DICOM" and from_elsewhere and here <= (slices := _slices_of_series(image)):
            reason = f"duplicate: {image.name} has {slices} slices of this series, and here are {here}"
            incomplete.append(replace(candidate.row, taken=LEFT_OUT, reason=reason, image=""))
        else:
            todo.append(candidate)
    if done:
        logger.info("Already collected: %s", pluralise(len(done), "image"))
    if moved:
        logger.info("%s of them are in imagesTr or imagesTs, and are not written to %s again", moved, images)
    if removed:
        logger.warning(
            "WARNING: %s of them are not in %s any more, and are not written again. To get them back, delete their lines in %s",
            removed, images, table,
        )  # fmt: skip
    rows = [*done, *incomplete]
    if not todo:
        return rows
    # Images with the name of an earlier one come first, so that a collision is found before any image is written.
    todo.sort(key=lambda candidate: candidate.row.image not in made)
    image_of = {row.voxels: row.image for row in made.values() if row.voxels and (images / row.image).is_file()}
    work.mkdir()
    # Use spawn, as nnU-Net does, because forked processes inherit locks that are held.
    pool = ProcessPoolExecutor(
        min(processes, len(todo), usable_cores()), multiprocessing.get_context("spawn"), initialise_worker
    )
    try:
        jobs: list[tuple[Row, Path, Future]] = []
        for number, candidate in enumerate(todo):
            row, is_dicom = candidate.row, candidate.row.kind == "DICOM"
            target = work / f"{number}{row.image[row.image.index('.') :]}"
            job = Job(candidate.files, str(target), is_dicom, min_slices, link)
            jobs.append((row, target, pool.submit(make_image, job)))
        bar = progress_bar(jobs, unit="image")
        for number, (row, target, future) in enumerate(bar, 1):
            result = future.result()
            if result.failed:
                hint = " Leave out --link if the images are on another disk." if link else ""
                raise UserError(
                    f"{images / row.image} could not be written: {result.failed}. Make space or check the permissions, and "
                    f"type the same command again to continue.{hint}"
                )
            twin = image_of.get(result.voxels) if result.voxels else None
            if result.left_out:
                row = replace(row, taken=LEFT_OUT, reason=result.left_out, image="")
            elif twin not in (None, row.image):
                row = replace(row, taken=LEFT_OUT, reason=f"duplicate: the same voxels as {twin}", image="")
                target.unlink()
            else:
                other = made.get(row.image)
                if row.kind == "NIfTI" and other and other.source != row.source and other.voxels != result.voxels:
                    raise UserError(
                        f"{row.source} and {other.source} have the same path below the folder that you gave, so they would "
                        "become one image of one patient. The earlier image is kept. Give a folder that holds both trees, and "
                        "a regular expression that tells their patients apart, such as --patient_regex '^[^/]+/[^/]+' for two "
                        "folders"
                    )
                row = replace(row, voxels=result.voxels)
                image_of[row.voxels] = row.image
                # An image that is replaced is removed first, so that the new row never describes the old image.
                (images / row.image).unlink(missing_ok=True)
            # The row is written before the image, so that the table lists each image even if the run is killed.
            append_row(row, table)
            if row.taken == TAKEN:
                os.replace(target, images / row.image)
            rows.append(row)
            if bar.disable and number % max(1, len(todo) // 10) == 0:
                logger.info("Read %d of %d images", number, len(todo))
    except BrokenProcessPool:
        # the pool begins the images in this order
        left = [row.source for row, _, job in jobs if not job.done() or job.exception()]
        raise UserError(
            "A process was killed, most likely because memory ran out or because an image crashed its reader. It read one "
            f"of: {', '.join(left[:processes])}. Finished images are kept. Type the same command again with -np 1."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        with contextlib.suppress(OSError):
            shutil.rmtree(work)
    return rows


def _slices_of_series(image: Path) -> int:
    """Return the number of slices of an image that was made from a series, or 0 if the image cannot be read."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(image))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return 0
    return reader.GetSize()[2]


def _summarise(rows: list[Row], images: Path, table: Path) -> None:
    taken = [row for row in rows if row.taken == TAKEN]
    patients = len({row.patient for row in taken})
    logger.info("%s of %s in %s", pluralise(len(taken), "image"), pluralise(patients, "patient"), images)
    reasons = Counter(
        ("DICOM series" if row.series else f"{row.kind} file", re.split(r"[:;(]", row.reason)[0].strip())
        for row in rows
        if row.taken == LEFT_OUT
    )
    for (what, reason), number in reasons.most_common():
        logger.info("Left out: %d %s: %s", number, what, reason)
    logger.info("%s lists all sources, and why images were left out. Keep it private: it identifies patients.", table)
