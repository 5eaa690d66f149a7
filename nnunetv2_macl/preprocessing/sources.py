"""Find the images to pre-train on, and the files that make up a case."""

from __future__ import annotations

import contextlib
import fnmatch
import io
import itertools
import os
import re
import shlex
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_macl.data import Case
from nnunetv2_macl.dataset_json import channel_names
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import is_utf8
from nnunetv2_macl.nnunet import SUPPORTED_CONFIGURATIONS, DatasetConfiguration, raw_folder, read_dataset_json
from nnunetv2_macl.text import first_of, pluralise

UNLABELLED_FOLDER = "imagesUn"
_FILES_AT_ONCE = 16

# number of images that may be damaged before the reader is chosen by the file ending alone
_MOST_TRIED = 20
# Endings of the same format. A reader of one ending reads the other.
_SAME_FORMAT = ((".nii.gz", ".nii"), (".tif", ".tiff"))

# The line in the header of a MetaImage or NRRD image that names its data file, and the lines below it.
_DATA_FILE = re.compile(rb"^(?:ElementDataFile *=|data ?file:) *([^\r\n]+)(.*)", re.MULTILINE | re.DOTALL)
_LONGEST_HEADER = 1 << 16

# device and inode of a file, which are the same for every name of it
Identity = tuple[int, int]


class CaseFiles(NamedTuple):
    """Files of one case in the order of DATASET's channels, or one file and the channels to take from it."""

    files: list[str]
    channels: list[int] | None
    # Number of channels in each file
    channels_in_file: int
    # Name, size in bytes and time of change in ns of each file, and of the files that are read with it
    fingerprint: list[list[str | int]]
    identities: Sequence[Identity] = ()


class RawFile(NamedTuple):
    """An image file.

    Attributes:
        problem: Why the file cannot be used; None if it can.
        companions: Fingerprints of the other files that are read with the image.
    """

    path: str
    fingerprint: list[str | int] = []
    identity: Identity = (0, 0)
    problem: str | None = None
    companions: list[list[str | int]] = []

    @classmethod
    def inspect(cls, path: str) -> RawFile:
        """Check a file without opening it. Links are followed, as nnU-Net follows them."""
        if not is_utf8(path):
            printable = os.fsencode(path).decode(errors="replace")
            return cls(printable, problem=f"{printable} has a name that is not in UTF-8. Rename it.")
        try:
            found = os.stat(path)
        except (OSError, ValueError) as error:
            return cls(path, problem=f"{path} cannot be read: {getattr(error, 'strerror', error)}.")
        if not stat.S_ISREG(found.st_mode):
            return cls(path, problem=f"{path} is no file, but a folder or a device.")
        folder, name = os.path.split(path)
        return cls(path, _as_made_from(name, found), (found.st_dev, found.st_ino), companions=_companions(folder, name))


def _as_made_from(name: str, status: os.stat_result) -> list[str | int]:
    return [name, status.st_size, status.st_mtime_ns]


def _companions(folder: str, name: str) -> list[list[str | int]]:
    there: list[list[str | int]] = []
    for other in dict.fromkeys((*sidecars(name), *named_in_header(os.path.join(folder, name)))):
        with contextlib.suppress(OSError):
            there.append(_as_made_from(other, os.stat(os.path.join(folder, other))))
    return there


def sidecars(name: str) -> list[str]:
    """Return the names of files that may be read with an image: the spacing of a TIFF, or the voxels of a header."""
    stem, ending = os.path.splitext(name)
    if ending.lower() in (".tif", ".tiff"):
        return [f"{re.sub(r'_[0-9]{4}$', '', stem)}.json"]  # as nnU-Net's Tiff3DIO names it
    detached = {".mhd": (".raw", ".zraw"), ".nhdr": (".raw", ".raw.gz"), ".hdr": (".img", ".img.gz"), ".img": (".hdr",)}
    return [f"{stem}{other}" for other in detached.get(ending.lower(), ())]


def named_in_header(image: str) -> list[str]:
    """Return the names of the data files that a detached header names; an empty list for other images.

    A data file may have another name than the header, because users often rename only the header. A header names one file,
    ``LIST`` and one file on each line below, or a pattern and the range of its numbers, such as ``slice%03d.raw 1 20 1``.
    Only files in the folder of the header are returned.

    Args:
        image: Path of the image's file.
    """
    if not image.lower().endswith((".mhd", ".nhdr")):
        return []
    try:
        with open(image, "rb") as stream:
            named = _DATA_FILE.search(stream.read(_LONGEST_HEADER))
    except OSError:
        return []  # the reader says why
    name = os.fsdecode(named[1]).strip() if named else ""
    names = [name]
    if named and name.startswith("LIST"):
        names = [line.strip() for line in os.fsdecode(named[2]).splitlines()]
    elif numbered := re.match(r"(\S*)%\d*d(\S*)", name):
        names = fnmatch.filter(sorted(os.listdir(os.path.dirname(image))), "*".join(numbered.groups()))
    return [name for name in names if name not in ("", "LOCAL") and name == os.path.basename(name)]


@dataclass(frozen=True)
class Source:
    """The unlabelled images of one raw data set."""

    dataset_name: str  # Full name of the data set
    cases: dict[str, CaseFiles]  # Files by case
    invalid_cases: dict[str, str]  # Why a case cannot be used, by case
    reader: type[BaseReaderWriter]  # Class that reads the images
    ignored_files: list[str]  # FOLDER/FILE of files that are not named as images


def find_sources(
    configuration: DatasetConfiguration, datasets: Sequence[str], channel_map: Mapping[str, str] | None = None
) -> list[Source]:
    """Return DATASET's ``imagesUn``, and ``imagesTr`` and ``imagesUn`` of further raw data sets.

    Args:
        configuration: Configuration of DATASET.
        datasets: Full names of the further data sets.
        channel_map: Maps names of DATASET's channels to their names in the other data sets, where they differ.

    Raises:
        UserError: A data set is missing, has other channels, or has no image.
    """
    sources = []
    own = raw_folder(configuration.dataset_name) / UNLABELLED_FOLDER
    ending = configuration.dataset_json["file_ending"]
    files = group_channels(own, ending)
    if files:
        channels = list(range(len(configuration.channel_names)))
        cases, invalid_cases = pick_channels(files, channels, configuration.channel_names)
        reader = configuration.plans_manager.image_reader_writer_class
        sources.append(Source(configuration.dataset_name, cases, invalid_cases, reader, ignored_files(own, ending)))
    elif left := ignored_files(own, ending):
        raise UserError(
            f"{own} holds no file with a name of an nnU-Net image (CASE_0000{ending}), but it holds "
            f"{os.path.basename(left[0])}. {_how_to_name(own / os.path.basename(left[0]), ending)}"
        )
    return sources + [_other_dataset(configuration, name, channel_map or {}) for name in datasets]


def _how_to_name(file: Path, ending: str) -> str:
    """Return how to make the images of a folder readable. ``file`` is one of them, or a folder of images."""
    if file.is_dir():
        return f"Folders in it are not searched. Move their images into it, with names like CASE_0000{ending}."
    own = next((each for each in _endings(ending) if file.name.lower().endswith(each)), None)
    if own:
        return f"Rename the files, one per channel: CASE_0000{own}, CASE_0001{own}, ..."
    convert = "import sys, SimpleITK as s; s.WriteImage(s.ReadImage(sys.argv[1]), sys.argv[2])"
    return (
        f"The files have another format. Convert them, one per channel, to CASE_0000{ending}, CASE_0001{ending}, ..., for "
        f'example: python -c "{convert}" {shlex.quote(file.as_posix())} CASE_0000{ending}. To convert DICOM, '
        "type nnUNetv2_macl_collect -h."
    )


def _other_dataset(configuration: DatasetConfiguration, name: str, channel_map: Mapping[str, str]) -> Source:
    folder = raw_folder(name)
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist, so there are no images of {name} to use. Put them there or leave out -u."
        )
    file = folder / "dataset.json"
    fix = "Write one, as for any nnU-Net data set: channel_names and file_ending are needed."
    dataset_json = read_dataset_json(file, fix)
    theirs = channel_names(dataset_json)
    channels = _match_channels(configuration, name, theirs, channel_map)
    ending = dataset_json["file_ending"]
    left = ignored_files(folder / UNLABELLED_FOLDER, ending)
    if "dataset" in dataset_json:  # nnU-Net's other way to name files is a list
        listed = _listed_images(folder, dataset_json)
        if bad := [
            case for case in listed if case != os.path.basename(case) or case in ("", ".", "..") or "\\" in case
        ]:
            raise UserError(
                f"{file} lists a case {bad[0]!r}, which cannot be the name of a file. Correct it, or leave out -u."
            )
        files = {
            case: {channel: RawFile.inspect(path) for channel, path in enumerate(entry["images"])}
            for case, entry in listed.items()
        }
    else:
        files = group_channels(folder / "imagesTr", ending)
        left = ignored_files(folder / "imagesTr", ending) + left
    for case, more in group_channels(folder / UNLABELLED_FOLDER, ending).items():
        if case in files:
            raise UserError(
                f"{name} has a case {case} both in imagesTr and in {UNLABELLED_FOLDER}. Rename one of them in "
                f"{folder / UNLABELLED_FOLDER}."
            )
        files[case] = more
    if not files:
        raise UserError(f"No image found in {folder / 'imagesTr'} or {folder / UNLABELLED_FOLDER} (CASE_0000{ending}).")
    cases, invalid_cases = pick_channels(files, channels, theirs)
    reader = _reader(configuration, dataset_json, cases, folder)
    return Source(name, cases, invalid_cases, reader, left)


def _listed_images(folder: Path, dataset_json: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the images that dataset.json lists, by case. The labels need not exist."""
    unlabelled = {case: entry | {"label": ""} for case, entry in dataset_json["dataset"].items()}
    return get_filenames_of_train_images_and_targets(str(folder), dataset_json | {"dataset": unlabelled})


def _reader(
    configuration: DatasetConfiguration, dataset_json: dict[str, Any], cases: dict[str, CaseFiles], folder: Path
) -> type[BaseReaderWriter]:
    """Return the reader of a data set.

    This is the reader of the plan, because it decides the order of the axes, unless it cannot read the files or the data set
    asks for another one.
    """
    ending, own = dataset_json["file_ending"], configuration.plans_manager.image_reader_writer_class
    if not cases or ("overwrite_image_reader_writer" not in dataset_json and ending in own.supported_file_endings):
        return own
    for case in itertools.islice(cases.values(), _MOST_TRIED):
        # Hide the tracebacks that nnU-Net prints for every reader that fails.
        with contextlib.suppress(RuntimeError, OSError), contextlib.redirect_stderr(io.StringIO()):
            return determine_reader_writer_from_dataset_json(dataset_json, case.files[0], verbose=False)
    try:
        # No example can be read. With the reader for the file ending, each damaged case gets an error of its own.
        return determine_reader_writer_from_dataset_json(dataset_json, None, verbose=False)
    except (RuntimeError, OSError) as error:
        raise UserError(f"nnU-Net has no reader for {folder}: {error} Leave {folder.name} out of -u.") from None


def _match_channels(
    configuration: DatasetConfiguration, name: str, theirs: list[str], channel_map: Mapping[str, str]
) -> list[int]:
    """Return for each channel of DATASET the number of the other data set's channel with the same name."""
    ours = configuration.channel_names
    if unknown := [key for key in channel_map if key not in ours]:
        raise UserError(f"--channel_map: {configuration.dataset_name} has no channel {unknown[0]!r}, it has {ours}.")
    # One map serves several data sets, so a data set may also have the channel under DATASET's own name.
    wanted = [channel_map[c] if channel_map.get(c) in theirs else c for c in ours]
    if wanted == theirs:
        return list(range(len(ours)))
    if all(theirs.count(channel) == 1 for channel in wanted) and len(set(wanted)) == len(wanted):
        return [theirs.index(channel) for channel in wanted]
    lacking, free = [c for c in ours if c not in theirs], [c for c in theirs if c not in ours]
    pairs = [f"{mine}={their}" for mine, their in zip(lacking, free, strict=False)]
    example = f"Give the names that belong together, for example: {shlex.join(['--channel_map', *pairs])}; or leave"
    raise UserError(
        f"{configuration.dataset_name} has the channels {ours}, {name} has {theirs}. "
        f"{example if lacking and len(pairs) == len(lacking) else 'Leave'} {name} out of -u."
    )


def require_target(folder: Path) -> None:
    """Raise UserError if a folder is a link that leads nowhere, for example to a disk that is not mounted."""
    if folder.is_symlink() and not folder.exists():
        raise UserError(
            f"{folder} is a link to {os.path.realpath(folder)}, which does not exist. Mount it, or remove the link."
        )


def group_channels(folder: Path, ending: str) -> dict[str, dict[int, RawFile]]:
    """Return the files CASE_0000ENDING, CASE_0001ENDING, ... of a folder by case and channel.

    Raises:
        UserError: The folder is a link that leads nowhere, or cannot be read.
    """
    require_target(folder)
    if not folder.is_dir():
        return {}
    try:
        images = _images_among(os.listdir(folder), ending)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}. Check its permissions.") from None
    cases: dict[str, dict[int, RawFile]] = defaultdict(dict)
    files = _inspect_all([os.path.join(folder, name) for name in images])
    for (case, channel), file in zip(images.values(), files, strict=True):
        cases[case][channel] = file
    return dict(cases)


def _inspect_all(paths: Sequence[str]) -> list[RawFile]:
    # A network file system may take milliseconds per file, but answers many requests at once, so use threads. Each thread gets
    # its share of the files at once, because passing single files to threads takes ten times as long as a fast disk.
    parts = [paths[first::_FILES_AT_ONCE] for first in range(min(_FILES_AT_ONCE, len(paths)))]
    found: list[RawFile] = [RawFile("")] * len(paths)
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        for first, files in enumerate(pool.map(lambda part: [RawFile.inspect(path) for path in part], parts)):
            found[first::_FILES_AT_ONCE] = files
    return found


def _images_among(names: Iterable[str], ending: str) -> dict[str, tuple[str, int]]:
    """Return case and channel of each name of an image. Of two files of one image, only the one with the planned ending."""
    endings = "|".join(map(re.escape, _endings(ending)))
    pattern = re.compile(rf"(?P<case>.+)_(?P<channel>\d{{4}})(?i:{endings})", re.DOTALL)
    chosen: dict[tuple[str, int], str] = {}
    # Names with the planned ending come first.
    for name in sorted(names, key=lambda name: (not name.endswith(ending), name)):
        # macOS writes a file ._FILE for each FILE on disks of other systems
        if not name.startswith("._") and (match := pattern.fullmatch(name)):
            chosen.setdefault((match["case"], int(match["channel"])), name)
    return {name: image for image, name in sorted(chosen.items(), key=lambda item: item[1])}


def _endings(ending: str) -> tuple[str, ...]:
    """Return all endings, in lower case, of the format that an ending names."""
    return next((same for same in _SAME_FORMAT if ending.lower() in same), (ending.lower(),))


def pick_channels(
    files: dict[str, dict[int, RawFile]], channels: list[int], names: list[str]
) -> tuple[dict[str, CaseFiles], dict[str, str]]:
    """Return the files of each case in the order of ``channels``, and the problem of each case that cannot be used."""
    cases: dict[str, CaseFiles] = {}
    invalid_cases: dict[str, str] = {}
    # A single file holds all channels, as in RGB images, unless most cases have several files.
    one_file = len(names) > 1 and 2 * sum(len(by_channel) > 1 for by_channel in files.values()) < len(files)
    for case, by_channel in files.items():
        missing = [c for c in channels if c not in by_channel]
        unknown = [c for c in by_channel if c >= len(names)]
        wrong = [f.problem for c, f in by_channel.items() if f.problem and (c in channels or len(by_channel) == 1)]
        if wrong:
            invalid_cases[case] = wrong[0]
        elif one_file and list(by_channel) == [0]:
            cases[case] = _case_files(list(by_channel.values()), channels, len(names))
        elif missing or unknown:
            what = (
                f"lacks channel {names[missing[0]]} (_{missing[0]:04d})" if missing else f"has a file _{unknown[0]:04d}"
            )
            invalid_cases[case] = (
                f"Case {case} {what}, and the data set has the channels {names}: "
                f"{', '.join(file.path for file in by_channel.values())}."
            )
        else:
            cases[case] = _case_files([by_channel[c] for c in channels], None, 1)
    return cases, invalid_cases


def _case_files(files: Sequence[RawFile], channels: list[int] | None, channels_in_file: int) -> CaseFiles:
    fingerprint = [file.fingerprint for file in files]
    # The channels of a case share one spacing file.
    for file in files:
        fingerprint += [other for other in file.companions if other not in fingerprint]
    return CaseFiles(
        [file.path for file in files], channels, channels_in_file, fingerprint, [file.identity for file in files]
    )


def drop_second_names(
    cases: dict[str, CaseFiles], labelled: set[Identity], seen: set[frozenset[Identity]]
) -> dict[str, CaseFiles]:
    """Return the cases that show no labelled image and are not in ``seen``, and add them to ``seen``.

    A link gives an image a second name. By this name it could be used twice, or although it is held out. Different cases may
    share a file, such as an empty image that stands for a missing channel.

    Args:
        cases: Files by case.
        labelled: Identities of the labelled images, see `identities_of`.
        seen: Identities of each case that is used already.
    """
    kept = {}
    for name, case in cases.items():
        files = frozenset(case.identities)
        if labelled.isdisjoint(files) and files not in seen:
            kept[name] = case
            seen.add(files)
    return kept


def identities_of(cases: Iterable[Iterable[str]]) -> set[Identity]:
    """Return the identity of each file of some cases, without files that different cases share.

    Args:
        cases: Paths of the files of each case.
    """
    different = {frozenset(RawFile.inspect(file).identity for file in files) for files in cases}
    counts = Counter(identity for files in different for identity in files)
    return {identity for identity, number in counts.items() if number == 1}


def labelled_identities(configuration: DatasetConfiguration) -> set[Identity]:
    """Return the identities of the raw images of DATASET's labelled cases, see `identities_of`."""
    folder, content = raw_folder(configuration.dataset_name), configuration.dataset_json
    listed = _listed_images(folder, content).values() if "dataset" in content else []
    there = group_channels(folder / "imagesTr", content["file_ending"]).values()
    return identities_of(
        [*(entry["images"] for entry in listed), *([file.path for file in files.values()] for files in there)]
    )


def spacing_warning(source: Source, configuration: DatasetConfiguration) -> str | None:
    """Return a message if nnU-Net assumes a spacing of 1 for images of a source, or for those of the plan; None otherwise."""
    if issubclass(source.reader, Tiff3DIO):
        files = [
            case.files[0]
            for case in source.cases.values()
            if not any(str(made[0]).endswith(".json") for made in case.fingerprint)
        ]
        return _no_spacing_message(files) if files else None
    planned = configuration.plans_manager.image_reader_writer_class
    without = [reader for reader in (source.reader, planned) if issubclass(reader, NaturalImage2DIO)]
    if len(without) != 1:
        return None
    lacking = source.dataset_name if without[0] is source.reader else configuration.dataset_name
    return (
        f"The files of {lacking} hold no spacing, so nnU-Net assumes 1 on each axis. The images of {source.dataset_name} are "
        f"resampled to the plan's spacing all the same ({', '.join(f'{mm:g}' for mm in configuration.manager.spacing)}), and may "
        f"get a wrong size. If so, leave {source.dataset_name} out of -u."
    )


def _no_spacing_message(files: Sequence[str]) -> str:
    """Return a message that names the TIFF files without a spacing file."""
    missing = os.path.join(os.path.dirname(files[0]), sidecars(os.path.basename(files[0]))[0])
    return (
        f"nnU-Net assumes a spacing of 1 on each axis for {pluralise(len(files), 'TIFF image')} without a spacing file: "
        f"{first_of(files, 3)}. "
        f'To set the spacing, write {missing} with, for example, {{"spacing": [3, 0.5, 0.5]}}'
    )


def ignored_files(folder: Path, ending: str) -> list[str]:
    """Return FOLDER/FILE of the files in a folder that are not named as nnU-Net images and are not read with one."""
    if not folder.is_dir():
        return []
    names = os.listdir(folder)
    images = _images_among(names, ending)
    used = {
        *images,
        *(other for name in images for other in (*sidecars(name), *named_in_header(os.path.join(folder, name)))),
    }
    return [f"{folder.name}/{name}" for name in sorted(names) if not (name.startswith(".") or name in used)]


def training_cases(configuration: DatasetConfiguration) -> list[Case]:
    """Return DATASET's training cases as nnU-Net has preprocessed them. Labels are not opened.

    Raises:
        UserError: nnU-Net has not preprocessed the configuration, or has done so in another format than .b2nd.
    """
    folder = configuration.cases_folder
    fix = f"Type: nnUNetv2_preprocess -d {configuration.id} -plans_name {configuration.plans_name} -c {configuration.name}"
    if not folder.is_dir():
        manager = configuration.plans_manager
        others = [c for c in SUPPORTED_CONFIGURATIONS if c in manager.available_configurations]
        ready = [c for c in others if (configuration.folder / manager.get_configuration(c).data_identifier).is_dir()]
        fix += f", or use a preprocessed configuration: -c {' or '.join(ready)}" if ready else ""
        raise UserError(
            f"nnU-Net has not preprocessed {configuration.dataset_name} for {configuration.name} yet: there is no {folder}. {fix}"
        )
    names = sorted(
        entry.name[: -len(".b2nd")]
        for entry in os.scandir(folder)
        if entry.name.endswith(".b2nd") and not entry.name.endswith("_seg.b2nd")
    )
    if not names:
        raise UserError(f"{folder} holds no case in nnU-Net's current format (.b2nd). {fix}")
    return [Case(name, str(folder / f"{name}.b2nd")) for name in names]
