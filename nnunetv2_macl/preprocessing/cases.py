"""Preprocess each unlabelled image once.

A case is two files: ``CASE.b2nd`` (C, *volume) float32 and, written last, ``CASE.json``, which records the images and the plan
that it was made from. If the plan normalises within a mask, ``CASE.mask`` (1, *volume) int8 is -1 outside of it and 0 inside. A
case is made again if its record does not match. The `index` lists the cases that are done, so that a new run need not open every
record. nnU-Net's own folders are only read.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
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
import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params

from nnunetv2_macl.cpu import usable_cores
from nnunetv2_macl.data import MASK_ENDING, Case
from nnunetv2_macl.distributed import rank
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import atomic_write, remove_temporary, write_error, write_json
from nnunetv2_macl.main_guard import require_main_guard
from nnunetv2_macl.messages import progress_bar, show_any_character
from nnunetv2_macl.nnunet import DatasetConfiguration, raw_folder
from nnunetv2_macl.preprocessing.index import Index
from nnunetv2_macl.preprocessing.reading import (
    SingleSliceError,
    UnusableImageError,
    planned_spacing,
    read_case,
    single_slice_problem,
)
from nnunetv2_macl.preprocessing.sources import (
    UNLABELLED_FOLDER,
    CaseFiles,
    Identity,
    Source,
    drop_second_names,
    find_sources,
    labelled_identities,
    training_cases,
)
from nnunetv2_macl.processes import end_with_parent
from nnunetv2_macl.text import first_of, pluralise
from nnunetv2_macl.training.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

# Seconds. No case takes longer, so a temporary file that is older was left by a process that was killed.
_ABANDONED = 6 * 3600.0

# smallest share of their size that compressed cases are expected to take
_STRONGEST_COMPRESSION = 0.5


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
    """Return the folder of the preprocessed unlabelled cases. nnU-Net's splits do not see it.

    Plans whose labelled cases are in one folder share this one too, because they preprocess in the same way.
    """
    name = configuration.parent_name
    return configuration.folder / f"{configuration.manager.data_identifier.removesuffix(f'_{name}')}_macl_{name}"


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
    """Return the index of the preprocessed cases of a source.

    The patch size decides only how nnU-Net stores a case in chunks, so plans with other patches share the cases.
    """
    with_masks = ""
    if configuration.normalises_in_mask:
        # version 0.1 wrote no masks
        values = configuration.manager.configuration
        with_masks = f" with masks {values['resampling_fn_seg']} {values['resampling_fn_seg_kwargs']}"
    signature, former = (configuration.preprocessing_checksum(of_storage=n) + with_masks for n in (False, True))
    return Index(unlabelled_folder(configuration) / source.dataset_name, signature, former)


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
                error, is_single_slice = future.result()
                if error is not None:
                    _skip_or_raise(error, futures[future][2], skipped, skip_unreadable or is_single_slice)
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
        return str(error), isinstance(error, SingleSliceError)
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
    if flat := single_slice_problem(configuration, case):
        raise SingleSliceError(flat)
    names, manager = ", ".join(case.files), configuration.manager
    images, properties = read_case(configuration, case, reader)
    if not resample:
        properties = properties | {"spacing": planned_spacing(configuration, properties["spacing"])}
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
