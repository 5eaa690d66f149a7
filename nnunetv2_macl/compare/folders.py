"""The study's own three nnU-Net folders: raw images by a second name, planned and preprocessed from its training share."""

from __future__ import annotations

import functools
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_macl.compare.split import patients_of
from nnunetv2_macl.compare.study import Options, Study
from nnunetv2_macl.dataset_json import channel_names
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import atomic_write, resource_folder, write_json
from nnunetv2_macl.nnunet import preprocessed_folder, raw_folder, read_dataset_json, read_json
from nnunetv2_macl.preprocessing.sources import (
    UNLABELLED_FOLDER,
    RawFile,
    drop_second_names,
    group_channels,
    named_in_header,
    pick_channels,
    sidecars,
)
from nnunetv2_macl.text import pluralise

logger = logging.getLogger(__name__)

DEFAULT_PLANS, DEFAULT_PLANNER = "nnUNetPlans", "ExperimentPlanner"


@dataclass(frozen=True)
class RawImages:
    """The user's raw data set."""

    labelled: dict[str, dict[str, Any]]  # by case, its ``images`` and its ``label``
    unlabelled: dict[str, list[str]]  # by case, the images in ``imagesUn``
    dataset_json: dict[str, Any]  # of the data set

    @classmethod
    def find(cls, dataset: str, *, skip_unreadable: bool = False) -> RawImages:
        """Return the images of a raw data set, without the unlabelled ones that lack something where they may be skipped.

        Raises UserError: no data set, no cases, or a case without a label, with a channel missing, or whose image is a link to
        what is not there; names it.
        """
        folder = raw_folder(dataset)
        fix = "The study needs the raw data set: put it there."
        dataset_json = read_dataset_json(folder / "dataset.json", fix, labels=True)
        if not (folder / "imagesTr").is_dir() and "dataset" not in dataset_json:
            raise UserError(f"{folder / 'imagesTr'} does not exist. Put the labelled cases there and in labelsTr.")
        _require_no_dead_links(folder / "imagesTr")
        labelled = get_filenames_of_train_images_and_targets(str(folder), dict(dataset_json))
        names, ending = channel_names(dataset_json), dataset_json["file_ending"]
        for case, entry in labelled.items():
            _require_channels(case, entry["images"], len(names), None if "dataset" in dataset_json else ending)
            if not os.path.isfile(entry["label"]):
                raise UserError(
                    f"Case {case} has no label: {entry['label']} does not exist. Put it there, or the image into "
                    f"{folder / UNLABELLED_FOLDER}."
                )
        used = {RawFile.inspect(file).identity for entry in labelled.values() for file in entry["images"]}
        files = group_channels(folder / UNLABELLED_FOLDER, ending)
        unlabelled, wrong = pick_channels(files, list(range(len(names))), names)
        for reason in wrong.values():
            if not skip_unreadable:
                raise UserError(
                    f"{reason} Correct it, take the case out of {folder / UNLABELLED_FOLDER}, or go on without such images: "
                    "--skip_unreadable"
                )
            logger.warning("Left out: %s", reason)
        return cls(
            {str(case): entry for case, entry in labelled.items()},
            {case: found.files for case, found in drop_second_names(unlabelled, used).items()},
            dataset_json,
        )


def _require_no_dead_links(folder: Path) -> None:
    """Raises UserError for a link to what is not there: nnU-Net would pass over it."""
    for file in folder.iterdir() if folder.is_dir() else ():
        if not file.exists():
            raise UserError(
                f"{file} is a link to {os.path.realpath(file)}, which is not there. Mount it, or remove the link."
            )


def _require_channels(case: str, images: Sequence[str], channels: int, ending: str | None) -> None:
    """Raise UserError unless a labelled case has all images, one for each channel or one for all channels.

    ``ending`` is None where dataset.json lists the files, which may have any name.
    """
    for file in images:
        if not os.path.isfile(file):
            raise UserError(f"Case {case}: {file} does not exist. Put it there, or take the case out.")
    wanted = [f"{case}_{channel:04d}{ending}" for channel in range(channels)]
    found = [os.path.basename(file) for file in images]
    if (ending is None and len(found) not in (1, channels)) or (
        ending is not None and found not in (wanted, wanted[:1])
    ):
        raise UserError(
            f"Case {case} has {', '.join(found)}, and the data set has {pluralise(channels, 'channel')}: {', '.join(wanted)}. "
            "Put what is missing there, or take the case out."
        )


def pretraining_images(study: Study, unlabelled: Sequence[str]) -> list[str]:
    """The cases of ``imagesUn`` that are pre-trained on: none of a patient who is tested or validated on.

    Raises:
        UserError: ``--group_regex`` does not match a name.
    """
    kept_apart = {study.patients[case] for case in (*study.split.test, *study.split.validation)}
    patients = patients_of(unlabelled, study.options.group_regex)
    return [case for case in unlabelled if patients[case] not in kept_apart]


def planner(options: Options) -> str:
    """The nnU-Net planner that makes plans of the name asked for.

    Raises:
        UserError: the data set has no such plan that would tell.
    """
    if options.plans == DEFAULT_PLANS:
        return DEFAULT_PLANNER
    file = preprocessed_folder(options.dataset) / f"{options.plans}.json"
    number = int(options.dataset[7:10])
    fix = f"-p {options.plans} is planned anew from the training share, by the planner that {file} names. Type: "
    content = read_json(file, f"{fix}nnUNetv2_plan_experiment -d {number} -pl PLANNER")
    if not isinstance(content, dict) or not content.get("experiment_planner_used"):
        raise UserError(f"{file} names no planner. {fix}nnUNetv2_plan_experiment -d {number} -pl PLANNER")
    return str(content["experiment_planner_used"])


def plans_name(plan: Path) -> str:
    """Of a plan that is taken as it stands. Raises UserError: not a nnU-Net plan."""
    content = read_json(plan, "Give a nnU-Net plan: --plan FILE.json")
    if not isinstance(content, dict) or not {"plans_name", "configurations"} <= content.keys():
        raise UserError(f"{plan} is no nnU-Net plan. Give one: --plan FILE.json")
    return str(content["plans_name"])


def plan(study: Study, images: RawImages, planner_name: str | None, processes: int) -> dict[str, Any]:
    """Link the raw images, and have nnU-Net plan (unless a plan was given) and preprocess the training share.

    Raises:
        UserError: The plan has no such configuration, or nnU-Net failed.
    """
    options = study.options
    _link_images(study, images)
    _require_no_rest(study)
    processes_asked = ["-np", str(processes)]
    number, log = options.dataset[7:10], study.planning_folder / "log.txt"
    # nnU-Net's planner cannot do without a worker, which the training may
    environment = study.environment(study.folder / "nnUNet_results") | {"nnUNet_n_proc_DA": "1"}
    run = functools.partial(run_command, environment=environment, log=log)
    if options.plan is None:
        command = ["nnUNetv2_plan_and_preprocess", "-d", number, "-c", options.configuration, "-pl", str(planner_name)]
        run([*command, "-overwrite_plans_name", options.plans, "-npfp", str(processes), *processes_asked, "--no_pbar"])
    else:
        run(["nnUNetv2_extract_fingerprint", "-d", number, *processes_asked])
        given = read_json(Path(options.plan), "Put it back, or give another folder: -o FOLDER")
        write_json(given | {"dataset_name": options.dataset}, study.plan_file)
        # what nnU-Net's planning would have left there
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
    if options.batch_size is not None:
        configurations[options.configuration]["batch_size"] = options.batch_size
        write_json(content, study.plan_file)
    study.write_splits()
    check_arms(study, images)
    kept = pretraining_images(study, list(images.unlabelled))
    return {"planner": planner_name, "unlabelled": len(kept), "unlabelled_left_out": len(images.unlabelled) - len(kept)}


def check_arms(study: Study, images: RawImages) -> None:
    """Check before the hours of pre-training whether a cell of a planned study could not be trained.

    Raises:
        UserError: The way of fine-tuning is not for such data, or the weights are of a network too unlike the plan's.
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
                f"{options.dataset} has overlapping regions, and the paper's cross-entropy wants one label a voxel. Give "
                f"--finetuning sgd, {fix}"
            )
    environment = study.environment(study.folder / "nnUNet_results")
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
            raise UserError(f"{error}\n\nThe study cannot have the arm {arm.name}: give others, {fix}") from None


def _require_no_rest(study: Study) -> None:
    """What a planning that was killed left behind is made again: nnU-Net would take it for done."""
    if study.preprocessed.is_dir():
        shutil.rmtree(study.preprocessed)


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
    """Have the study's unlabelled images follow the user's, who may correct, add or remove some before training."""
    folder = study.raw / UNLABELLED_FOLDER
    wanted: set[str] = set()
    for case in pretraining_images(study, list(images.unlabelled)):
        for file in map(Path, images.unlabelled[case]):
            _link(file, folder / file.name, case)
            names = file.name, f"{case}.json", *sidecars(file.name), *named_in_header(str(file))
            wanted |= {name for name in names if (file.parent / name).exists()}
    for link in folder.iterdir() if folder.is_dir() else ():
        if link.name not in wanted:
            link.unlink()


def _link(file: Path, link: Path, case: str) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    # what is read with an image, and the spacing file of a TIFF's label
    names = dict(zip(sidecars(file.name), sidecars(link.name), strict=False)) | {f"{case}.json": f"{case}.json"}
    names |= {name: name for name in named_in_header(str(file))}
    beside = [(file.parent / theirs, link.parent / ours) for theirs, ours in names.items()]
    for source, target in ((file, link), *beside):
        if not source.exists() or (target.exists() and target.samefile(source)):
            continue
        # of an image that was mended since
        target.unlink(missing_ok=True)
        try:
            os.link(source.resolve(), target)
        except OSError:  # another disk, or not allowed
            with source.open("rb") as stream:
                atomic_write(target, functools.partial(shutil.copyfileobj, stream))


def run_command(command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
    """Run a command, what it says into a file.

    Raises:
        UserError: it failed; shows how the file ends.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # the environment's own scripts first, also where it was not activated
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    # what it says is in the log when it says it
    ours = {"PATH": path, "nnUNet_extTrainer": str(resource_folder("trainers")), "PYTHONUNBUFFERED": "1"}
    with log.open("a") as stream:
        process = subprocess.run(
            command, env={**os.environ, **ours, **environment}, stdout=stream, stderr=subprocess.STDOUT
        )
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise UserError(
            f"'{shlex.join(command)}' failed with code {process.returncode}; what is done stays done. When it is mended, type "
            f"the command that you began with, and not those of {log}, which are for inside of the study. It ends with\n{tail}"
        )
