"""The study's own nnU-Net folders: links to the raw images, and plans and preprocessed images of the training share."""

from __future__ import annotations

import functools
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nnunetv2
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_macl.compare.steps import DONE_FILE, StepError
from nnunetv2_macl.compare.study import Options, Study
from nnunetv2_macl.dataset_json import channel_names
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import atomic_write, resource_folder, sha256, write_json
from nnunetv2_macl.nnunet import preprocessed_folder, raw_folder, read_dataset_json, read_json
from nnunetv2_macl.patients import patients_of
from nnunetv2_macl.preprocessing.sources import (
    UNLABELLED_FOLDER,
    drop_second_names,
    group_channels,
    identities_of,
    named_in_header,
    pick_channels,
    sidecars,
)
from nnunetv2_macl.text import pluralise

logger = logging.getLogger(__name__)

# the networks that nnU-Net's own planners plan
_PLANNED_NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet")
DEFAULT_PLANS, DEFAULT_PLANNER = "nnUNetPlans", "ExperimentPlanner"
# exit codes of a command that a signal has stopped, also without a handler
_STOPPED = {code for number in (signal.SIGINT, signal.SIGTERM) for code in (128 + number, -number)}


@dataclass(frozen=True)
class RawImages:
    """The user's raw data set."""

    labelled: dict[str, dict[str, Any]]  # ``images`` and ``label`` of each case, by case
    unlabelled: dict[str, list[str]]  # files in ``imagesUn`` of each case, by case
    dataset_json: dict[str, Any]  # content of the data set's ``dataset.json``

    @classmethod
    def find(cls, dataset: str, *, skip_unreadable: bool = False) -> RawImages:
        """Return the images of a raw data set. With ``skip_unreadable``, incomplete unlabelled cases are left out.

        Raises:
            UserError: There is no data set or no case; or a case lacks a label or a channel, or its image is a broken link.
                The message names the case.
        """
        folder = raw_folder(dataset)
        fix = "The study needs the raw data set. Put it there."
        dataset_json = read_dataset_json(folder / "dataset.json", fix, labels=True)
        training = folder / "imagesTr"
        if not training.is_dir() and "dataset" not in dataset_json:
            raise UserError(f"{training} does not exist. Put the labelled cases there and in labelsTr.")
        for file in training.iterdir() if training.is_dir() else ():
            if not file.exists():  # nnU-Net would silently skip the case
                there = os.path.realpath(file)
                raise UserError(f"{file} is a link to {there}, which does not exist. Mount it, or remove the link.")
        labelled = get_filenames_of_train_images_and_targets(str(folder), dict(dataset_json))
        names, ending = channel_names(dataset_json), dataset_json["file_ending"]
        for case, entry in labelled.items():
            _require_channels(case, entry["images"], len(names), None if "dataset" in dataset_json else ending)
            if not os.path.isfile(entry["label"]):
                raise UserError(
                    f"Case {case} has no label: {entry['label']} does not exist. Put it there, or the image into "
                    f"{folder / UNLABELLED_FOLDER}."
                )
        used = identities_of(entry["images"] for entry in labelled.values())
        files = group_channels(folder / UNLABELLED_FOLDER, ending)
        unlabelled, wrong = pick_channels(files, list(range(len(names))), names)
        for reason in wrong.values():
            if not skip_unreadable:
                raise UserError(
                    f"{reason} Correct it, remove the case from {folder / UNLABELLED_FOLDER}, or leave such images out: "
                    "--skip_unreadable"
                )
            logger.warning("Left out: %s", reason)
        return cls(
            {str(case): entry for case, entry in labelled.items()},
            {case: found.files for case, found in drop_second_names(unlabelled, used, set()).items()},
            dataset_json,
        )


def _require_channels(case: str, images: Sequence[str], channels: int, ending: str | None) -> None:
    """Raise UserError unless a labelled case has all images, one for each channel or one for all channels.

    Args:
        case: Name of the case.
        images: Its image files.
        channels: Number of channels of the data set.
        ending: File ending. None: dataset.json lists the files, which may have any name.
    """
    for file in images:
        if not os.path.isfile(file):
            raise UserError(f"Case {case}: {file} does not exist. Put it there, or remove the case.")
    wanted = [f"{case}_{channel:04d}{ending}" for channel in range(channels)]
    found = [os.path.basename(file) for file in images]
    if (ending is None and len(found) not in (1, channels)) or (
        ending is not None and found not in (wanted, wanted[:1])
    ):
        raise UserError(
            f"Case {case} has {', '.join(found)}, and the data set has {pluralise(channels, 'channel')}: {', '.join(wanted)}. "
            "Add the missing files, or remove the case."
        )


def pretraining_images(study: Study, unlabelled: Sequence[str]) -> list[str]:
    """Return the cases of ``imagesUn`` to pre-train on, which exclude those of test and validation patients.

    Raises:
        UserError: ``--group_regex`` does not match a name.
    """
    excluded = {study.patients[case] for case in (*study.split.test, *study.split.validation)}
    patients = patients_of(unlabelled, study.options.group_regex)
    return [case for case in unlabelled if patients[case] not in excluded]


def planner(options: Options) -> str:
    """Return the nnU-Net planner that makes plans of the given name.

    Raises:
        UserError: The data set has no plans of this name, or the plans do not name their planner.
    """
    if options.plans == DEFAULT_PLANS:
        return DEFAULT_PLANNER
    file = preprocessed_folder(options.dataset) / f"{options.plans}.json"
    number = int(options.dataset[7:10])
    fix = f"The study plans -p {options.plans} anew on its training share, with the planner that {file} names. Type: "
    content = read_json(file, f"{fix}nnUNetv2_plan_experiment -d {number} -pl PLANNER")
    if not isinstance(content, dict) or not content.get("experiment_planner_used"):
        raise UserError(f"{file} names no planner. {fix}nnUNetv2_plan_experiment -d {number} -pl PLANNER")
    name = str(content["experiment_planner_used"])
    configuration = content.get("configurations", {}).get(options.configuration, {})
    network = configuration.get("architecture", {}).get("network_class_name", _PLANNED_NETWORKS[0])
    planners = str(Path(nnunetv2.__file__).parent / "experiment_planning")
    if not network.endswith(_PLANNED_NETWORKS) and recursive_find_python_class(
        planners, name, "nnunetv2.experiment_planning"
    ):
        raise UserError(
            f"{file} has the network {network}, and its planner, {name}, would plan another network for the study. Use the plan "
            f"as it is: --plan {shlex.quote(str(file))}"
        )
    return name


def plans_name(plan: Path) -> str:
    """Return the name of the plans that a file holds.

    Raises:
        UserError: The file is not an nnU-Net plan.
    """
    content = read_json(plan, "Give an nnU-Net plan: --plan FILE.json")
    if not isinstance(content, dict) or not {"plans_name", "configurations"} <= content.keys():
        raise UserError(f"{plan} is no nnU-Net plan. Give one: --plan FILE.json")
    return str(content["plans_name"])


def plan(study: Study, images: RawImages, planner_name: str | None, processes: int) -> dict[str, Any]:
    """Link the raw images, plan the training share with nnU-Net unless a plan was given, and preprocess it.

    Raises:
        UserError: The plan does not have the configuration of the study, or nnU-Net failed.
    """
    options = study.options
    _link_images(study, images)
    if study.preprocessed.is_dir():
        # nnU-Net would take the files of an interrupted planning for complete
        shutil.rmtree(study.preprocessed)
    processes_asked = ["-np", str(processes)]
    number, log = options.dataset[7:10], study.planning_folder / "log.txt"
    # the user may train with nnUNet_n_proc_DA=0, but nnU-Net's planner needs a worker
    environment = study.environment(study.base / "nnUNet_results") | {"nnUNet_n_proc_DA": "1"}
    run = functools.partial(run_command, environment=environment, log=log)
    if options.plan is None:
        command = ["nnUNetv2_plan_and_preprocess", "-d", number, "-c", options.configuration, "-pl", str(planner_name)]
        run([*command, "-overwrite_plans_name", options.plans, "-npfp", str(processes), *processes_asked, "--no_pbar"])
    else:
        run(["nnUNetv2_extract_fingerprint", "-d", number, *processes_asked])
        given = read_json(Path(options.plan), "Put it back, or give another folder: -o FOLDER")
        write_json(given | {"dataset_name": options.dataset}, study.plan_file)
        # nnU-Net's planning would have written this file
        shutil.copyfile(study.raw / "dataset.json", study.preprocessed / "dataset.json")
        run(
            [
                "nnUNetv2_preprocess",
                "-d",
                number,
                "-plans_name",
                options.plans,
                "-c",
                options.configuration,
                *processes_asked,
            ]
        )
    content = read_json(study.plan_file, "")
    configurations = content["configurations"]
    if options.configuration not in configurations:
        raise UserError(
            f"nnU-Net's plan for the training share has no configuration '{options.configuration}', only "
            f"{', '.join(configurations)}. Give one of these with -c, and another folder: -o FOLDER"
        )
    configuration = PlansManager(content).get_configuration(options.configuration).configuration
    if options.plan is None:
        _compare_with_users_plan(options, configuration)
    if options.batch_size is not None:
        configurations[options.configuration]["batch_size"] = options.batch_size
        write_json(content, study.plan_file)
    study.write_splits()
    kept = pretraining_images(study, list(images.unlabelled))
    return {
        "planner": planner_name,
        "unlabelled": len(kept),
        "unlabelled_left_out": len(images.unlabelled) - len(kept),
        "patch_size": configuration["patch_size"],
        "batch_size": options.batch_size or configuration["batch_size"],
        "labelled_files": {name: _state(file) for name, file in _labelled_files(images).items()},
    }


def _compare_with_users_plan(options: Options, planned: dict[str, Any]) -> None:
    """Log in what the study's plan differs from the user's plan of the same name, which may have been made with other options."""
    file = preprocessed_folder(options.dataset) / f"{options.plans}.json"
    if not file.is_file():
        return
    try:
        theirs = PlansManager(str(file)).get_configuration(options.configuration).configuration
    except ValueError:  # no such configuration
        return
    keys = ("preprocessor_name", "spacing", "patch_size", "batch_size")
    changed = [key for key in keys if theirs.get(key) != planned.get(key)]
    if different := [f"{key} {planned.get(key)} (yours: {theirs.get(key)})" for key in changed]:
        logger.info(
            "The plan of the study, from its training share, differs from yours in %s. To use yours: --plan %s, and another "
            "folder: -o FOLDER",
            ", ".join(different), shlex.quote(str(file)),
        )  # fmt: skip


def _labelled_files(images: RawImages) -> dict[str, Path]:
    """Return the files of the labelled cases, by names that stay the same if the data set is moved."""
    files = {}
    for case, entry in images.labelled.items():
        for number, file in enumerate(map(Path, (*entry["images"], entry["label"]))):
            files[f"{case}, {number}"] = file
            for name in dict.fromkeys((*sidecars(file.name), *named_in_header(str(file)))):
                if file.with_name(name).is_file():
                    files[f"{case}, {number}, {name}"] = file.with_name(name)
    return files


def _state(file: Path) -> list[Any]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, sha256(file)]


def check_labelled(study: Study, images: RawImages) -> None:
    """Check that the labelled images and the labels are those that the study was planned with.

    Otherwise some cells would be measured against other labels than the cells that are done.

    Raises:
        UserError: A file has changed. The message names it.
    """
    planned = read_json(study.planning_folder / DONE_FILE, "").get("labelled_files", {})
    for name, file in _labelled_files(images).items():
        was = planned.get(name)  # None: a study of an earlier version
        found = file.stat()
        if was is None or was[:2] == [found.st_size, found.st_mtime_ns]:
            continue
        if sha256(file) != was[2]:
            raise UserError(
                f"{file} has changed since the study in {study.folder} began, so its trainings cannot be compared with further "
                "ones. Put the earlier file back, or begin a study with the new file: -o FOLDER"
            )


def check_arms(study: Study, images: RawImages) -> None:
    """Check, before hours of pre-training, that every cell of a planned study can be trained.

    Raises:
        UserError: The kind of fine-tuning does not support the data, or an arm's weights do not fit the plan's network.
    """
    options = study.options
    fix = "and another folder: -o FOLDER"
    if options.finetuning == "paper":
        configuration = PlansManager(read_json(study.plan_file, "")).get_configuration(options.configuration)
        if len(configuration.patch_size) != 2:
            raise UserError(
                f"The paper fine-tunes in 2D, and {options.configuration} is 3D. Give --finetuning sgd, {fix}"
            )
        if any(isinstance(label, list) and len(label) > 1 for label in images.dataset_json["labels"].values()):
            raise UserError(
                f"{options.dataset} has overlapping regions, and the paper's cross-entropy needs one label per voxel. Give "
                f"--finetuning sgd, {fix}"
            )
    environment = study.environment(study.base / "nnUNet_results")
    for arm in study.arms:
        if arm.weights is None:
            continue
        command = [
            "nnUNetv2_macl_transfer",
            arm.weights,
            options.dataset,
            "-c",
            options.configuration,
            "-p",
            options.plans,
        ]
        try:
            run_command(command, environment, study.planning_folder / "log.txt")
        except UserError as error:
            raise UserError(f"{error}\n\nThe study cannot use the arm {arm.name}. Give other arms, {fix}") from None


def _link_images(study: Study, images: RawImages) -> None:
    ending = images.dataset_json["file_ending"]
    tested = set(study.split.test)
    for case, entry in images.labelled.items():
        where = "Ts" if case in tested else "Tr"
        for channel, file in enumerate(entry["images"]):
            _link(Path(file), study.raw / f"images{where}" / f"{case}_{channel:04d}{ending}", case)
        _link(Path(entry["label"]), study.raw / f"labels{where}" / f"{case}{ending}", case)
    link_unlabelled(study, images)
    description = {key: value for key, value in images.dataset_json.items() if key != "dataset"}
    write_json(description | {"numTraining": len(images.labelled) - len(tested)}, study.raw / "dataset.json")


def link_unlabelled(study: Study, images: RawImages) -> None:
    """Update the links to the user's unlabelled images, which the user may correct, add or remove before training."""
    folder = study.raw / UNLABELLED_FOLDER
    wanted: set[str] = set()
    for case in pretraining_images(study, list(images.unlabelled)):
        for file in map(Path, images.unlabelled[case]):
            _link(file, folder / file.name, case)
            names = file.name, f"{case}.json", *sidecars(file.name), *named_in_header(str(file))
            wanted |= {name for name in names if (file.parent / name).exists()}
    for link in folder.iterdir() if folder.is_dir() else ():
        # Names with a dot are files that another process is writing.
        if link.name not in wanted and not link.name.startswith("."):
            link.unlink(missing_ok=True)


def _link(file: Path, link: Path, case: str) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    # further files that are read with an image, and the spacing file of a TIFF label
    names = dict(zip(sidecars(file.name), sidecars(link.name), strict=False)) | {f"{case}.json": f"{case}.json"}
    names |= {name: name for name in named_in_header(str(file))}
    companions = [(file.parent / theirs, link.parent / ours) for theirs, ours in names.items()]
    for source, target in ((file, link), *companions):
        if not source.exists() or _is_current(target, source):
            continue
        # The target is missing, or an older version of the file. It is replaced in one step, because others may read it.
        new = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            os.link(source.resolve(), new)
            os.replace(new, target)
        except OSError:  # hard links are impossible across disks, and forbidden on some file systems
            with source.open("rb") as stream:
                atomic_write(target, functools.partial(shutil.copyfileobj, stream))
            # An unlabelled image with another time counts as another image, and is preprocessed again.
            os.utime(target, ns=(source.stat().st_atime_ns, source.stat().st_mtime_ns))


def _is_current(target: Path, source: Path) -> bool:
    """Return whether a file is a link to another one, or a copy with its size and time."""
    if not target.exists():
        return False
    if target.samefile(source):
        return True
    ours, theirs = target.stat(), source.stat()
    # Some disks store whole seconds, or every second one.
    return ours.st_size == theirs.st_size and abs(ours.st_mtime - theirs.st_mtime) <= 2


def run_command(command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
    """Run a command and append its output to a file.

    Raises:
        StepError: The command failed. The message shows the end of the file.
        UserError: A signal has stopped the command.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # this environment's scripts come first, because the environment may not be activated
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    # unbuffered, so that the log is always current
    ours = {"PATH": path, "nnUNet_extTrainer": str(resource_folder("trainers")), "PYTHONUNBUFFERED": "1"}
    with log.open("a") as stream:
        process = subprocess.run(
            command, env={**os.environ, **ours, **environment}, stdout=stream, stderr=subprocess.STDOUT
        )
    if process.returncode in _STOPPED:
        raise UserError(
            f"'{shlex.join(command)}' was stopped. To continue, run the command that started the study again."
        )
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        # the unlabelled images of the study are links to the user's
        links = rf"{re.escape(environment['nnUNet_raw'])}(?=/\w+/{UNLABELLED_FOLDER}/)"
        tail = re.sub(links, lambda _: os.environ["nnUNet_raw"], tail)
        raise StepError(
            f"'{shlex.join(command)}' failed with exit code {process.returncode}. Finished steps are kept. Fix the cause, then "
            f"repeat the command that started the study. Do not run the commands in {log}, which work only inside of the "
            f"study. The log ends with:\n{tail}"
        )
