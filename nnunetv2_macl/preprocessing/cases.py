"""Preprocessing of unlabelled images, each once.

A case is two files: ``CASE.b2nd`` (C, *volume) float32 and, written last, ``CASE.json``, which says what it was made from. A
case whose JSON agrees with the images and the plan is done; any other is made again. So that a start need not open each, what
is done is listed in an index, see `index`. nnU-Net's own folders are only read.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import blosc2
import nibabel
import numpy as np
from nibabel.openers import ImageOpener
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params
from tqdm import tqdm

from nnunetv2_macl.cores import usable_cores
from nnunetv2_macl.data import Case
from nnunetv2_macl.distributed import rank
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import write_json, write_whole
from nnunetv2_macl.nnunet import Configuration, raw_folder
from nnunetv2_macl.preprocessing.index import Index
from nnunetv2_macl.preprocessing.sources import UNLABELLED_FOLDER, CaseFiles, Source, find_sources, training_cases
from nnunetv2_macl.processes import end_with_parent

logger = logging.getLogger(__name__)

# gzip makes nothing smaller than by this
_MOST_COMPRESSED = 1032
# 16 GiB, beyond which a spacing is wrong rather than an image large
_MOST_VOXELS = 2**32


@dataclass(frozen=True)
class Preprocessed:
    """What there is to pre-train on, and which images were left out."""

    cases: list[Case]
    skipped: dict[Path, str]

    def __repr__(self) -> str:
        return f"{len(self.cases)} cases, {len(self.skipped)} left out"


def unlabelled_folder(configuration: Configuration) -> Path:
    """Where the preprocessed unlabelled cases lie: beside nnU-Net's own folder, so that its splits never see them."""
    return configuration.folder / f"{configuration.plans_name}_macl_{configuration.name}"


def preprocess_unlabelled(
    configuration: Configuration,
    datasets: Sequence[str],
    *,
    processes: int,
    skip_unreadable: bool = False,
    channel_map: Mapping[str, str] | None = None,
    part: slice = slice(None),
) -> Preprocessed:
    """Preprocess all unlabelled images that are not done yet.

    Args:
        configuration: whose plan is used.
        datasets: further raw data sets, by full name.
        processes: at work at a time.
        skip_unreadable: leave images out that cannot be used, instead of stopping.
        channel_map: see `find_sources`.
        part: of each data set's cases, in the order of their names: what this machine does.

    Raises:
        UserError: an image that cannot be used (named), or too little space.
    """
    signature = configuration.preprocessing_checksum()
    folder = unlabelled_folder(configuration)
    cases, todo, made, indices = [], [], [], []
    skipped: dict[Path, str] = {}
    sources = find_sources(configuration, datasets, channel_map)
    _require_raw_images(configuration, folder / configuration.dataset_name, sources)
    labelled = {case.name for case in training_cases(configuration)}
    for source in sources:
        if source.dataset_name == configuration.dataset_name and (twice := labelled & source.cases.keys()):
            some = ", ".join(sorted(twice)[:3]) + (", ..." if len(twice) > 3 else "")
            logger.info(
                "%d images in %s are labelled cases too, and count once: %s", len(twice), UNLABELLED_FOLDER, some
            )
            source = replace(source, cases={name: c for name, c in source.cases.items() if name not in twice})
        for name, reason in source.incomplete.items():
            _skip_or_raise(reason, folder / source.dataset_name / name, skipped, skip_unreadable)
        index = Index(folder / source.dataset_name, signature)
        indices.append(index)
        for name, files in list(source.cases.items())[part]:
            target = folder / source.dataset_name / name
            cases.append(Case(name, f"{target}.b2nd"))
            made_from = {"files": files.made_from, "channels": files.channels, "plan": signature}
            made_from["reader"] = source.reader.__name__
            if not index.is_done(name, made_from):
                todo.append((files, source.reader, target, made_from))
                made.append((index, name, made_from))
    if todo:
        _require_space(configuration, folder, len(todo))
        logger.info("Preprocessing %d unlabelled cases into %s", len(todo), folder)
        _run(configuration, todo, processes, skipped, skip_unreadable)
        for index in indices:
            index.look_again()
        for index, name, made_from in made:
            index.is_done(name, made_from)
    if rank() == 0:
        for index in indices:
            index.write()
    left_out = {f"{target}.b2nd" for target in skipped}
    ready = Preprocessed([case for case in cases if case.file not in left_out], skipped)
    if todo or skipped:
        logger.info("Unlabelled images: %d are ready, %d are left out", len(ready.cases), len(skipped))
    return ready


def _require_raw_images(configuration: Configuration, folder: Path, sources: Sequence[Source]) -> None:
    """Raises UserError where only preprocessed images are left: whether they are those of now cannot be told."""
    raw = raw_folder(configuration.dataset_name) / UNLABELLED_FOLDER
    if raw.exists() or any(source.dataset_name == configuration.dataset_name for source in sources):
        return
    if there := len(list(folder.glob("*.b2nd"))):
        raise UserError(
            f"{raw} does not exist, and {folder} holds {there} images that were preprocessed from it. Bring it back, a link will "
            f"do; or, to go on without them: rm -r {shlex.quote(str(folder))}"
        )


def _skip_or_raise(reason: str, target: Path, skipped: dict[Path, str], skip_unreadable: bool) -> None:
    if not skip_unreadable:
        raise UserError(f"{reason} Correct it, or go on without such images: --skip_unreadable")
    logger.warning("Left out: %s", reason)
    skipped[target] = reason


def _require_space(configuration: Configuration, folder: Path, cases: int) -> None:
    """Compare the free space with what the cases would take uncompressed, at the median size of the training cases."""
    shape = configuration.manager.median_image_size_in_voxels
    if len(shape) == 2:  # the slices of a volume are not in the configuration
        shape = [configuration.plans_manager.original_median_shape_after_transp[0], *shape]
    needed = int(cases * len(configuration.channel_names) * math.prod(float(n) for n in shape) * 4)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"Preprocessing {cases} unlabelled cases into {folder} needs about {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free. Make space, or set nnUNet_preprocessed to a larger disk."
        )


def _run(
    configuration: Configuration, todo: list[tuple], processes: int, skipped: dict[Path, str], skip_unreadable: bool
) -> None:
    # spawn, as nnU-Net does: forked children inherit locks that are held
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(processes, len(todo), usable_cores()),
        mp_context=context,
        initializer=_initialise,
        initargs=(configuration,),
    ) as pool:
        futures = {pool.submit(_preprocess_case, *job): job for job in todo}
        bar = tqdm(as_completed(futures), total=len(todo), unit="case", disable=not sys.stderr.isatty())
        try:
            for number, future in enumerate(bar, 1):
                error = future.result()
                if error is not None:
                    _skip_or_raise(error, futures[future][2], skipped, skip_unreadable)
                if bar.disable and number % max(1, len(todo) // 10) == 0:
                    logger.info("Preprocessed %d of %d", number, len(todo))
        except BrokenProcessPool:
            # begun in this order
            left = [job[0].files[0] for future, job in futures.items() if not future.done() or future.exception()]
            raise UserError(
                "A preprocessing process was killed, most likely for want of memory, or by an image that its reader cannot "
                f"stand. It was at one of: {', '.join(left[:processes])}. What is done stays done: start again, with fewer "
                "processes (-np 1)."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_configuration: Configuration


def _initialise(configuration: Configuration) -> None:
    global _configuration
    _configuration = configuration
    blosc2.set_nthreads(1)
    end_with_parent()


def _preprocess_case(
    case: CaseFiles, reader: type[BaseReaderWriter], target: Path, made_from: dict[str, Any]
) -> str | None:
    """Preprocess one case. Returns what is wrong with it, or None."""
    names = ", ".join(case.files)
    try:
        for file in case.files:
            check_nifti(file)
        images, properties = reader().read_images(case.files)
    except Exception as error:
        reason = str(error).strip().splitlines()
        return f"{names} cannot be used: {reason[-1] if reason else type(error).__name__}."
    if case.channels is not None:
        if images.ndim != 4 or len(images) != case.channels_there:
            return f"{names} holds {len(images)} channel(s); its data set has {case.channels_there}, one a file or all in one."
        images = images[case.channels]
    if wrong := _whats_wrong(images):
        return f"{names} {wrong}"
    if (axes := len(properties["spacing"])) != 3:
        return f"{names} cannot be used: it has the spacing of {axes} axes, and values of other meaning on the third."
    resampled = _resampled_shape(images.shape[1:], properties["spacing"])
    if not 0 < math.prod(resampled) <= _MOST_VOXELS:
        return (
            f"{names} cannot be used: at the plan's spacing it would have {'x'.join(map(str, resampled))} voxels. "
            f"Is its spacing of {', '.join(f'{mm:g}' for mm in properties['spacing'])} mm right?"
        )
    manager = _configuration.manager
    try:
        data, _, properties = manager.preprocessor_class(verbose=False).run_case_npy(
            images, None, properties, _configuration.plans_manager, manager, _configuration.dataset_json
        )
    except Exception as error:
        return f"{names} cannot be preprocessed: {type(error).__name__}: {error}."
    data = np.ascontiguousarray(data, dtype=np.float32)
    if not np.isfinite(data).all() or not np.ptp(data.reshape(len(data), -1), axis=1).any():
        largest = f"{np.abs(images).max():g}"
        return f"{names} cannot be used: nothing is left of it after normalisation. Its largest value is {largest}."
    _write_case(data, target, made_from, [float(s) for s in properties["spacing"]])
    return None


def nifti_is_cut_short(file: str) -> bool:
    """Whether a NIfTI file has another size than its header says. Reads no more than the header and the last bytes."""
    wanted = _promised_bytes(nibabel.load(file))
    with open(file, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        if file.endswith(".gz"):
            if size * _MOST_COMPRESSED < wanted:
                return True
            stream.seek(-4, os.SEEK_END)
            size = int.from_bytes(stream.read(), "little")  # a gzip file ends with its size, modulo 2^32
            return size != wanted % 2**32
    return size != wanted


def _promised_bytes(image: Any) -> int:
    return int(image.dataobj.offset) + math.prod(image.shape) * image.get_data_dtype().itemsize


def check_nifti_header(file: str) -> None:
    """Raise ValueError for what ITK's NIfTI reader passes over in a header: a spacing of 0, for which it takes 1; complex
    numbers, of which it leaves the imaginary part out.
    """
    image: Any = nibabel.load(file)
    if image.get_data_dtype().kind == "c":
        raise ValueError("it holds complex numbers")
    with ImageOpener(file) as stream:  # nibabel corrects what it loads
        spacing = np.abs(type(image.header).from_fileobj(stream, check=False)["pixdim"][1:4])
    if not (np.isfinite(spacing) & (spacing > 0)).all():
        raise ValueError(f"its spacing is {', '.join(f'{mm:g}' for mm in spacing)} mm")


def check_nifti(file: str) -> None:
    """Raise ValueError for what ITK's NIfTI reader passes over: a header as above; a file cut short, and NaN, for which it
    fills in 0.
    """
    if not file.endswith((".nii", ".nii.gz")):
        return
    check_nifti_header(file)
    image: Any = nibabel.load(file)
    dtype = image.get_data_dtype()
    size, promised = os.stat(file).st_size, _promised_bytes(image)
    if size * (_MOST_COMPRESSED if file.endswith(".gz") else 1) < promised:
        raise ValueError(f"it was cut short: {size:,} bytes of the {promised:,} that its header promises")
    if not nifti_is_cut_short(file) and dtype.kind != "f":
        return
    # read whole: fails where data are missing
    if not np.isfinite(np.asanyarray(image.dataobj)).all():
        raise ValueError("it holds NaN or infinite values")


def _resampled_shape(shape: Sequence[int], spacing: Sequence[float]) -> list[int]:
    """Voxels an axis at the plan's spacing, as nnU-Net will make them; in 2D the slices stay."""
    order, target = _configuration.plans_manager.transpose_forward, _configuration.manager.spacing
    shape, spacing = [shape[axis] for axis in order], [spacing[axis] for axis in order]
    target = [*spacing[: len(spacing) - len(target)], *target]
    return [round(n * mm / wanted) for n, mm, wanted in zip(shape, spacing, target, strict=True)]


def _whats_wrong(images: np.ndarray) -> str | None:
    channels = len(_configuration.channel_names)
    if images.ndim != 4:
        return f"has {images.ndim - 1} dimensions; nnU-Net takes images of 2 or 3."
    if not images.size:
        return f"is empty: its shape is {images.shape}."
    if len(images) != channels:
        return f"has {len(images)} channels or time points; {_configuration.dataset_name} has {channels}."
    if not np.isfinite(images).all():
        return "holds NaN or infinite values."
    if not np.ptp(images.reshape(len(images), -1), axis=1).any():
        return f"is constant: every voxel is {images.flat[0]:g}."
    return None


def _write_case(data: np.ndarray, target: Path, made_from: dict[str, Any], spacing: list[float]) -> None:
    file = Path(f"{target}.b2nd")
    Path(f"{target}.json").unlink(missing_ok=True)
    blocks, chunks = comp_blosc2_params(data.shape, tuple(_configuration.patch_size), data.itemsize)
    # nnU-Net's LZ4HC would take half of the time of a case, for files that are 4 % smaller and read no faster
    cparams = {"codec": blosc2.Codec.LZ4, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1, "clevel": 9}
    # in memory first: blosc2 does not say why a file could not be written
    content = blosc2.asarray(data, chunks=chunks, blocks=blocks, cparams=cparams).to_cframe()
    write_whole(file, lambda stream: stream.write(content), needed=len(content))
    record = {
        "shape": list(data.shape),
        "original_spacing": spacing,
        "bytes": len(content),
        "made_from": made_from,
    }
    write_json(record, Path(f"{target}.json"))
