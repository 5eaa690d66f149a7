"""Preprocess each unlabelled image once.

A case is two files: ``CASE.b2nd`` (C, *volume) float32 and, written last, ``CASE.json``, which records the images and the plan
that it was made from. If the plan normalises within a mask, ``CASE.mask`` (1, *volume) int8 is -1 outside of it and 0 inside. A
case is made again if its record does not match. The `index` lists the cases that are done, so that a new run need not open every
record. nnU-Net's own folders are only read.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import blosc2
import nibabel
import numpy as np
import SimpleITK as sitk
import tifffile
from nibabel.openers import ImageOpener
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params

from nnunetv2_macl.cpu import usable_cores
from nnunetv2_macl.data import MASK_ENDING, Case
from nnunetv2_macl.distributed import rank
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import atomic_write, remove_temporary, write_error, write_json
from nnunetv2_macl.main_guard import require_main_guard
from nnunetv2_macl.messages import progress_bar, show_any_character
from nnunetv2_macl.nnunet import DatasetConfiguration, raw_folder
from nnunetv2_macl.planning.memory import is_above_zero
from nnunetv2_macl.preprocessing.index import Index
from nnunetv2_macl.preprocessing.sources import (
    UNLABELLED_FOLDER,
    CaseFiles,
    Identity,
    Source,
    drop_second_names,
    find_sources,
    labelled_identities,
    named_in_header,
    sidecars,
    training_cases,
)
from nnunetv2_macl.processes import end_with_parent
from nnunetv2_macl.text import first_of, last_line, pluralise
from nnunetv2_macl.training.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

# Seconds. No case takes longer, so a temporary file that is older was left by a process that was killed.
_ABANDONED = 6 * 3600.0

# smallest share of their size that compressed cases are expected to take
_STRONGEST_COMPRESSION = 0.5
# The highest compression ratio of gzip.
_MOST_COMPRESSED = 1032
# 16 GiB. A larger image most likely has a wrong spacing.
_MOST_VOXELS = 2**32

# The first bytes of a NIfTI file are the size of its header, 348, in either byte order.
_NIFTI_STARTS = (b"\x5c\x01\0\0", b"\0\0\x01\x5c")
_GZIP_START = b"\x1f\x8b"


@dataclass(frozen=True)
class Preprocessed:
    """The cases to pre-train on, and the skipped images: path of the case without ending -> reason."""

    cases: list[Case]
    skipped: dict[Path, str]

    def __repr__(self) -> str:
        return f"{len(self.cases)} cases, {len(self.skipped)} left out"


_found: Preprocessed | None = None


@contextmanager
def images_found(found: Preprocessed | None) -> Iterator[None]:
    """Within this context and process, let `found_images` return what `preprocess_unlabelled` has just found.

    Checking tens of thousands of images a second time would take as long as the rest of the start.
    """
    global _found
    _found = found
    try:
        yield
    finally:
        _found = None


def found_images() -> Preprocessed | None:
    """Return what `images_found` was given, or None outside of its context."""
    return _found


def unlabelled_folder(configuration: DatasetConfiguration) -> Path:
    """Return the folder of the preprocessed unlabelled cases. nnU-Net's splits do not see it."""
    return configuration.folder / f"{configuration.plans_name}_macl_{configuration.name}"


def preprocess_unlabelled(
    configuration: DatasetConfiguration,
    datasets: Sequence[str],
    *,
    processes: int,
    skip_unreadable: bool = False,
    channel_map: Mapping[str, str] | None = None,
    part: slice = slice(None),
) -> Preprocessed:
    """Preprocess all unlabelled images that are not done yet.

    Args:
        configuration: Configuration whose plan is used.
        datasets: Further raw data sets, by full name.
        processes: Number of cases that are preprocessed at the same time.
        skip_unreadable: Leave out images that cannot be used, instead of stopping.
        channel_map: See `find_sources`.
        part: Cases of each data set, in the order of their names, that this machine preprocesses.

    Raises:
        UserError: An image cannot be used, or there is too little disk space. The message names the image or the folder.
    """
    folder = unlabelled_folder(configuration)
    cases, todo, made, indices = [], [], [], []
    skipped: dict[Path, str] = {}
    for source in sources_in_use(configuration, datasets, channel_map):
        for name, reason in source.invalid_cases.items():
            _skip_or_raise(reason, folder / source.dataset_name / name, skipped, skip_unreadable)
        index = index_of(configuration, source)
        remove_temporary(index.folder, older_than=_ABANDONED)
        indices.append(index)
        for name, files in list(source.cases.items())[part]:
            target = os.path.join(folder, source.dataset_name, name)
            cases.append(Case(name, f"{target}.b2nd"))
            fingerprint = made_of(source, files, index)
            if not index.is_done(name, fingerprint):
                todo.append((files, source.reader, Path(target), fingerprint))
                made.append((index, name, fingerprint))
    if todo:
        _require_space(configuration, folder, len(todo))
        logger.info("Preprocessing %d unlabelled cases into %s", len(todo), folder)
        _run(configuration, todo, processes, skipped, skip_unreadable)
        for index in indices:
            index.refresh()
        for index, name, fingerprint in made:
            index.is_done(name, fingerprint)
    if rank() == 0:
        for index in indices:
            index.write()
    left_out = {f"{target}.b2nd" for target in skipped}
    ready = Preprocessed([case for case in cases if case.file not in left_out], skipped)
    if todo or skipped:
        logger.info("Unlabelled images: %d are ready, %d are left out", len(ready.cases), len(skipped))
    return ready


def sources_in_use(
    configuration: DatasetConfiguration, datasets: Sequence[str], channel_map: Mapping[str, str] | None = None
) -> list[Source]:
    """Return the sources of `find_sources` without the images that are labelled cases, too.

    Raises:
        UserError: `find_sources` raises it, or the raw images of preprocessed cases are missing.
    """
    sources = find_sources(configuration, datasets, channel_map)
    _require_raw_images(configuration, unlabelled_folder(configuration) / configuration.dataset_name, sources)
    labelled = {case.name for case in training_cases(configuration)}
    images, seen = labelled_identities(configuration), set[frozenset[Identity]]()
    return [
        _counted_once(source, labelled if source.dataset_name == configuration.dataset_name else set(), images, seen)
        for source in sources
    ]


def _counted_once(source: Source, labelled: set[str], images: set[Identity], seen: set[frozenset[Identity]]) -> Source:
    named_otherwise = {name: files for name, files in source.cases.items() if name not in labelled}
    cases = drop_second_names(named_otherwise, images, seen)
    if twice := sorted(named_otherwise.keys() - cases.keys()):
        logger.info(
            "%d images of %s are also labelled cases or have a second name. Each is used once: %s",
            len(twice), source.dataset_name, first_of(twice, 3),
        )  # fmt: skip
    if same_name := sorted(source.cases.keys() - named_otherwise.keys()):
        logger.warning(
            "%s of %s have the name of a labelled case and are NOT used, because they may be the same images. "
            "If they are other images, rename them: %s",
            pluralise(len(same_name), "unlabelled image"), source.dataset_name, first_of(same_name, 3),
        )  # fmt: skip
    return replace(source, cases=cases)


def index_of(configuration: DatasetConfiguration, source: Source) -> Index:
    """Return the index of the preprocessed cases of a source."""
    signature = configuration.preprocessing_checksum()
    if configuration.normalises_in_mask:
        # version 0.1 wrote no masks
        values = configuration.manager.configuration
        signature += f" with masks {values['resampling_fn_seg']} {values['resampling_fn_seg_kwargs']}"
    return Index(unlabelled_folder(configuration) / source.dataset_name, signature)


def made_of(source: Source, files: CaseFiles, index: Index) -> dict[str, Any]:
    """Return what a case is made from, in the form of its record and of the index."""
    fingerprint = {"files": files.fingerprint, "channels": files.channels, "plan": index.signature}
    return fingerprint | {"reader": source.reader.__name__}


def _require_raw_images(configuration: DatasetConfiguration, folder: Path, sources: Sequence[Source]) -> None:
    """Raise UserError if the raw images are missing, because preprocessed ones cannot be checked without them."""
    raw = raw_folder(configuration.dataset_name) / UNLABELLED_FOLDER
    if any(source.dataset_name == configuration.dataset_name for source in sources):
        return
    if there := len(list(folder.glob("*.json"))):
        raise UserError(
            f"{raw} {'is empty' if raw.exists() else 'is missing'}, but {folder} holds {there} images that were preprocessed "
            f"from it. Mount or restore {UNLABELLED_FOLDER} (a link is enough), or delete the preprocessed images: "
            f"rm -r {shlex.quote(str(folder))}"
        )


def _skip_or_raise(reason: str, target: Path, skipped: dict[Path, str], skip_unreadable: bool) -> None:
    if not skip_unreadable:
        raise UserError(f"{reason} Correct the image, or leave out such images: --skip_unreadable")
    logger.warning("Left out: %s", reason)
    skipped[target] = reason


def bytes_on_disk(configuration: DatasetConfiguration, cases: int) -> int:
    """Estimate the bytes of preprocessed cases without compression, from the median shape of the training cases."""
    shape = configuration.manager.median_image_size_in_voxels
    if len(shape) == 2:  # the slices of a volume are not in the configuration
        shape = [configuration.plans_manager.original_median_shape_after_transp[0], *shape]
    return int(cases * len(configuration.channel_names) * math.prod(float(n) for n in shape) * 4)


def _require_space(configuration: DatasetConfiguration, folder: Path, cases: int) -> None:
    """Raise UserError if the disk is too small for the cases, and warn if it may be, because compression is not known."""
    needed = bytes_on_disk(configuration, cases)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    message = (
        f"Preprocessing {cases} unlabelled cases into {folder} may need up to {needed / 2**30:.1f} GiB, and "
        f"{free / 2**30:.1f} GiB are free. Make space, or set nnUNet_preprocessed to a larger disk."
    )
    if needed * _STRONGEST_COMPRESSION > free:
        raise UserError(message)
    if needed > free:
        logger.warning("WARNING: %s", message)


def _run(
    configuration: DatasetConfiguration,
    todo: list[tuple],
    processes: int,
    skipped: dict[Path, str],
    skip_unreadable: bool,
) -> None:
    require_main_guard()
    # Use spawn, as nnU-Net does, because forked processes inherit locks that are held.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(processes, len(todo), usable_cores()),
        mp_context=context,
        initializer=_initialise,
        initargs=(configuration,),
    ) as pool:
        futures = {pool.submit(_preprocess_case, *job): job for job in todo}
        bar = progress_bar(as_completed(futures), total=len(todo), unit="case")
        try:
            for number, future in enumerate(bar, 1):
                error, is_flat = future.result()
                if error is not None:
                    _skip_or_raise(error, futures[future][2], skipped, skip_unreadable or is_flat)
                if bar.disable and number % max(1, len(todo) // 10) == 0:
                    logger.info("Preprocessed %d of %d", number, len(todo))
        except BrokenProcessPool:
            # The pool starts the jobs in this order.
            left = [job[0].files[0] for future, job in futures.items() if not future.done() or future.exception()]
            raise UserError(
                "A preprocessing process was killed, most likely because memory ran out or because an image crashed its "
                f"reader. It read one of: {', '.join(left[:processes])}. Finished cases are kept. Start again with fewer "
                "processes: -np 1"
            ) from None
        except MemoryError as error:
            raise UserError(
                f"The memory of this machine is too small to preprocess {error} with {processes} processes. Finished cases are "
                "kept. Start again with fewer processes: -np 1"
            ) from None
        except KeyboardInterrupt:
            raise UserError("Stopped. Type the same command again to continue. Finished cases are kept.") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_configuration: DatasetConfiguration


def _initialise(configuration: DatasetConfiguration) -> None:
    global _configuration
    _configuration = configuration
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes, and the parent ends this one
    show_any_character()
    blosc2.set_nthreads(1)
    end_with_parent()


def _preprocess_case(
    case: CaseFiles, reader: type[BaseReaderWriter], target: Path, fingerprint: dict[str, Any]
) -> tuple[str | None, bool]:
    """Preprocess and write a case. Return the problem or None, and whether to skip the case even without --skip_unreadable."""
    try:
        data, outside, spacing = preprocess_case(_configuration, case, reader)
    except UnusableImageError as error:
        return str(error), isinstance(error, FlatImageError)
    # Until all files are written, the case is not done. The index knows a case by its image.
    replaced = [".json", ".b2nd"] if _configuration.normalises_in_mask else [".json"]
    for file in (Path(f"{target}{ending}") for ending in replaced):
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise write_error(error, file) from error
    if _configuration.normalises_in_mask:
        _write_array(outside, Path(f"{target}{MASK_ENDING}"))
    _write_case(data, target, fingerprint, spacing)
    return None, False


class UnusableImageError(Exception):
    """Says that an image cannot be used. The message names its files and the reason."""


class FlatImageError(UnusableImageError):
    """Says that an image is a single slice that the configuration cannot use. A run leaves it out even without an option."""


def preprocess_case(
    configuration: DatasetConfiguration, case: CaseFiles, reader: type[BaseReaderWriter], *, resample: bool = True
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Read and preprocess a case as nnU-Net does.

    Args:
        configuration: Configuration whose plan is used.
        case: Files of the case.
        reader: Class that reads the files.
        resample: Whether to resample to the plan's spacing. A check of the image leaves out this step, which takes the most time.

    Returns:
        tuple: Voxels (C, *volume) float32; (1, *volume) int8 that is -1 outside of the nonzero region and 0 inside; spacing, mm.

    Raises:
        UnusableImageError: The case cannot be read, or cannot be used.
        MemoryError: The memory of the machine is too small.
    """
    if flat := whats_flat(configuration, case):
        raise FlatImageError(flat)
    names, manager = ", ".join(case.files), configuration.manager
    images, properties = read_case(configuration, case, reader)
    if not resample:
        properties = properties | {"spacing": _planned_spacing(configuration, properties["spacing"])}
    try:
        data, outside, properties = manager.preprocessor_class(verbose=False).run_case_npy(
            images, None, properties, configuration.plans_manager, manager, configuration.dataset_json
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError(names) from error
        raise UnusableImageError(f"{names} cannot be preprocessed: {type(error).__name__}: {error}.") from error
    data = np.ascontiguousarray(data, dtype=np.float32)
    if not np.isfinite(data).all() or not np.ptp(data.reshape(len(data), -1), axis=1).any():
        largest = f"{np.abs(images).max():g}"
        raise UnusableImageError(
            f"{names} cannot be used: nothing is left of it after normalisation. Its largest value is {largest}."
        )
    return data, outside, [float(mm) for mm in properties["spacing"]]


def whats_flat(configuration: DatasetConfiguration, case: CaseFiles) -> str | None:
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
    if wrong := _whats_wrong(configuration, images):
        raise UnusableImageError(f"{names} {wrong}")
    if (axes := len(properties["spacing"])) != 3:
        raise UnusableImageError(
            f"{names} cannot be used: it has a spacing for {axes} axes, so the third axis is not one of space."
        )
    planned = _planned_spacing(configuration, properties["spacing"])
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


def _planned_spacing(configuration: DatasetConfiguration, spacing: Sequence[float]) -> list[float]:
    """Return the spacing of each axis of a file after nnU-Net's resampling. In 2D, the slices keep their distance."""
    target, planned = configuration.manager.spacing, list(spacing)
    for axis, mm in zip(configuration.plans_manager.transpose_forward[-len(target) :], target, strict=True):
        planned[axis] = mm
    return planned


def _whats_wrong(configuration: DatasetConfiguration, images: np.ndarray) -> str | None:
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


def _write_case(data: np.ndarray, target: Path, fingerprint: dict[str, Any], spacing: list[float]) -> None:
    written = _write_array(data, Path(f"{target}.b2nd"))
    record = {
        "shape": list(data.shape),
        "original_spacing": spacing,
        "bytes": written,
        "made_from": fingerprint,
    }
    write_json(record, Path(f"{target}.json"))


def _write_array(data: np.ndarray, file: Path) -> int:
    """Write an array (C, *volume) in nnU-Net's file format. Return the size of the file."""
    blocks, chunks = comp_blosc2_params(data.shape, tuple(_configuration.patch_size), data.itemsize)
    # nnU-Net's LZ4HC would take half of the time of a case. Its files are 4 % smaller and not faster to read.
    cparams = {"codec": blosc2.Codec.LZ4, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1, "clevel": 9}
    # Compress in memory, because blosc2 does not say why a file could not be written.
    content = blosc2.asarray(data, chunks=chunks, blocks=blocks, cparams=cparams).to_cframe()
    atomic_write(file, lambda stream: stream.write(content), needed=len(content))
    return len(content)
