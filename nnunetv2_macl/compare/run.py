"""The study from beginning to end: what the command does, as a function."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunetv2_macl import nnunet
from nnunetv2_macl.checkpoints import NETWORK_FILE
from nnunetv2_macl.compare.folders import (
    RawImages,
    check_arms,
    link_unlabelled,
    plan,
    planner,
    plans_name,
    pretraining_images,
    run_command,
)
from nnunetv2_macl.compare.report import FEWEST_PATIENTS, write_report
from nnunetv2_macl.compare.split import patients_of, split_cases
from nnunetv2_macl.compare.splits import write_report_over_splits
from nnunetv2_macl.compare.steps import DONE_FILE, Task, run_steps
from nnunetv2_macl.compare.stopping import ended_by_sigterm
from nnunetv2_macl.compare.study import STUDY_FILE, Arm, Options, Study, Trial, parse_arm
from nnunetv2_macl.cpu import usable_cores
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.nnunet import GROUP_VARIABLE, TEACHER_VARIABLE, WEIGHTS_VARIABLE
from nnunetv2_macl.run import check_device
from nnunetv2_macl.text import pluralise
from nnunetv2_macl.training import resume
from nnunetv2_macl.training.run_folder import RunLock

logger = logging.getLogger(__name__)


def compare(
    options: Options,
    *,
    splits: int = 1,
    folder: Path | None = None,
    device: str = "cuda",
    processes: int = 8,
    jobs: int = 1,
    dry_run: bool = False,
    skip_unreadable: bool = False,
) -> Path:
    """Run or continue a label-efficiency study: plan, pre-train, fine-tune each cell, report. Return the study's folder.

    With several splits the whole study runs on each, in a folder ``split_K``, and a report over the splits is written.

    nnU-Net's folders of the user are only read. Started several times, on one machine or on several that share ``folder``,
    the cells are shared out.

    Args:
        options: What makes the study.
        splits: Number of random draws of test, validation and training patients.
        folder: Of the study. None: ``macl_compare_DATASET_C`` in the working directory.
        device: ``cuda``, ``cpu`` or ``mps``.
        processes: For preprocessing and export.
        jobs: Number of cells at a time.
        dry_run: Show split and cells, and stop.
        skip_unreadable: Leave out unlabelled images that cannot be used.

    Raises:
        UserError: A mistake that the user can correct.
    """
    nnunet.require_folders()
    options = replace(options, dataset=nnunet.dataset_name(options.dataset))
    options.check()
    if options.plan is not None:
        file = Path(options.plan).expanduser().resolve()
        options = replace(options, plan=str(file), plans=plans_name(file))
    # the same files, wherever the study is started from next time
    options = replace(options, arms=[parse_arm(text).name for text in options.arms])
    for name, value in (("--jobs", jobs), ("-np", processes), ("--splits", splits)):
        if value < 1:
            raise UserError(f"{name} must be 1 or more, got {value}.")
    if options.configuration == "3d_cascade_fullres":
        raise UserError("-c 3d_cascade_fullres needs a first stage for each cell. Compare its stages: -c 3d_lowres")
    _check_configuration(options)
    if not dry_run:
        check_device(device)
    images = RawImages.find(options.dataset, skip_unreadable=skip_unreadable)
    planner_name = planner(options) if options.plan is None else None
    folder = (folder or Path(_default_name(options))).expanduser().resolve()
    if splits > 1 and (folder / STUDY_FILE).is_file():
        raise UserError(f"{folder} holds a study of one split. Leave out --splits, or give another folder: -o FOLDER")
    studies = [_study(replace(options, split=n), images, folder / f"split_{n}") for n in range(splits)]
    if splits == 1:
        studies = [replace(studies[0], folder=folder)]
    for study in studies:
        logger.info("%s", describe(study, images))
    if dry_run:
        return folder
    for study in studies:
        if (study.planning_folder / DONE_FILE).is_file():
            # before it takes further arms in
            check_arms(study, images)
    studies = [Study.open(study.folder, study.options, study.split, study.patients) for study in studies]
    logger.info("Study in %s", folder)
    steps = [_steps(study, images, planner_name, device, processes, jobs, skip_unreadable) for study in studies]
    with ended_by_sigterm():
        # split by split, so that the first report is complete early
        run_steps(list(itertools.chain.from_iterable(steps)), jobs)
    for study in studies:
        logger.info("\n%s", write_report(study))
    if splits > 1:
        logger.info("\n%s", write_report_over_splits(studies, folder))
    return folder


def _study(options: Options, images: RawImages, folder: Path) -> Study:
    """Return the study of a split, nothing of which is on disk yet."""
    patients = patients_of(images.labelled, options.group_regex)
    split = split_cases(
        patients,
        test=options.test,
        validation=options.validation,
        labels=options.labels,
        seeds=options.seeds,
        number=options.split,
    )
    return Study(folder, options, split, patients)


def _check_configuration(options: Options) -> None:
    """Before anything is written: nnU-Net's planning takes a while, and passes over what it does not know."""
    there: Sequence[str] = nnunet.SUPPORTED_CONFIGURATIONS
    if options.plan is not None:
        there = list(nnunet.read_json(Path(options.plan), "Give another to --plan.").get("configurations", {}))
    if options.configuration not in there:
        raise UserError(
            f"There is no configuration '{options.configuration}'. Take one of these with -c: {', '.join(there)}."
        )


def _default_name(options: Options) -> str:
    # outside nnU-Net's own folders, which are the user's
    return "_".join(
        [
            "macl_compare",
            options.dataset,
            options.configuration,
            *([options.plans] if options.plans != "nnUNetPlans" else []),
        ]
    )


def describe(study: Study, images: RawImages) -> str:
    """Split and cells in words."""
    split, options = study.split, study.options

    def patients(cases: list[str]) -> str:
        of = f" of {pluralise(len({study.patients[case] for case in cases}), 'patient')}" if options.group_regex else ""
        return pluralise(len(cases), "case") + of

    kept = pretraining_images(study, list(images.unlabelled))
    share = len(images.labelled) - len(split.test) - len(split.validation)
    lines = [
        f"{options.dataset}, {options.configuration}, {options.plans}"
        + (f", split {options.split}" if options.split else ""),
        f"test:        {patients(split.test)}: {_names(split.test)}",
        f"validation:  {patients(split.validation)}: {_names(split.validation)}",
        f"pre-training: {share + len(kept)} images, {len(kept)} of them from imagesUn"
        + (
            f" ({len(images.unlabelled) - len(kept)} there are of patients above)"
            * (len(kept) < len(images.unlabelled))
        ),
    ]
    if options.group_regex is None:
        lines.append(
            "patients:    each case counts as one of its own; where several images are of one patient, say which, or test "
            "patients are trained on too: --group_regex REGEX"
        )
    if (tested := len({study.patients[case] for case in split.test})) < FEWEST_PATIENTS:
        lines.append(
            f"attention:   {pluralise(tested, 'test patient')} will not tell a difference from chance, at least "
            f"{FEWEST_PATIENTS} do: --test N"
        )
    for seed, subset in enumerate(split.subsets):
        for labels, cases in subset.items():
            lines.append(f"labelled, seed {seed}, {labels}: {patients(cases)}: {_names(cases)}")
    lines.append(
        f"{pluralise(len(study.cells), 'cell')}: {pluralise(len(study.arms), 'arm')} x "
        f"{pluralise(len(split.labels), 'number')} of labels x {pluralise(options.seeds, 'seed')} x "
        f"{pluralise(len(options.rates), 'rate')}, each {pluralise(options.epochs, 'epoch')} of "
        f"{pluralise(options.iterations, 'step')}: {len(study.cells) * options.epochs * options.iterations:,} steps in all, "
        f"beside {pluralise(len(study.pretrainings), 'pre-training')}"
    )
    lines += [f"    {cell.name}" for cell in study.cells]
    return "\n".join(lines)


def _names(cases: list[str], shown: int = 6) -> str:
    return ", ".join(sorted(cases)[:shown]) + (", ..." if len(cases) > shown else "")


def _steps(
    study: Study,
    images: RawImages,
    planner_name: str | None,
    device: str,
    processes: int,
    jobs: int,
    skip_unreadable: bool,
) -> list[Task]:
    planning = Task(
        "planning and preprocessing",
        study.planning_folder,
        functools.partial(plan, study, images, planner_name, processes),
    )
    preprocessing = Task(
        "preprocessing of the unlabelled images",
        study.folder / "preprocessing_unlabelled",
        functools.partial(_preprocess_unlabelled, study, images, processes, skip_unreadable),
        needs=(planning,),
    )
    # once for all recipes, whose pre-trainings may run at the same time
    ready = preprocessing if pretraining_images(study, list(images.unlabelled)) and study.pretrainings else planning
    steps = list(dict.fromkeys((planning, ready)))
    pretrained = {
        arm.recipe_and_settings: Task(
            f"pre-training, recipe {','.join([Path(str(arm.recipe)).stem, *arm.settings])}",
            study.pretraining_folder(arm),
            functools.partial(_pretrain, study, images, arm, device, processes, skip_unreadable),
            needs=(ready,),
        )
        for arm in study.pretrainings
    }
    steps += pretrained.values()
    trained: dict[Trial, Task] = {}
    # A teacher is trained before its students.
    for cell in sorted(study.cells, key=lambda cell: study.teacher(cell) is not None):
        arm, teacher = study.arm(cell.arm), study.teacher(cell)
        trained[cell] = Task(
            cell.name,
            study.cell_folder(cell),
            functools.partial(_run_cell, study, cell, device, processes, jobs),
            needs=(
                pretrained[arm.recipe_and_settings] if arm.recipe else planning,
                *([trained[teacher]] if teacher else []),
            ),
        )
    steps += [trained[cell] for cell in study.cells]
    return steps


def _pretrain(
    study: Study, images: RawImages, arm: Arm, device: str, processes: int, skip_unreadable: bool
) -> dict[str, Any]:
    options, folder, run = study.options, study.pretraining_folder(arm), study.pretraining_run(arm)
    # of the weights the last that is written
    weights, goes_on = run / NETWORK_FILE, resume.has_checkpoint(run)
    if weights.is_file() and not (run / resume.LATEST).is_file():
        # ended, and stopped before that was written down: its lock goes with it, unless it is still at its report
        lock = RunLock(run)
        lock.acquire()
        lock.release()
        return {}
    command = _pretraining_command(study, images, processes, skip_unreadable)
    # each fold has the validation cases of all
    command += ["--exclude_fold", "0", "-device", device]
    settings = [*options.pretrain_settings, *arm.settings]
    if goes_on:
        command += ["--c"]
    else:
        command += ["-recipe", str(arm.recipe), *(["--set", *settings] if settings else [])]
    run_command(command, study.environment(folder / "nnUNet_results"), folder / "log.txt")
    if not weights.is_file():  # Ctrl-C is for all processes, and it ends as it was asked to
        raise UserError(f"Pre-training in {run} was stopped. To go on, type the same command again.")
    return {}


def _preprocess_unlabelled(study: Study, images: RawImages, processes: int, skip_unreadable: bool) -> dict[str, Any]:
    command = _pretraining_command(study, images, processes, skip_unreadable)
    results, log = study.folder / "nnUNet_results", study.planning_folder / "log.txt"
    run_command([*command, "--preprocess_only"], study.environment(results), log)
    return {}


def _pretraining_command(study: Study, images: RawImages, processes: int, skip_unreadable: bool) -> list[str]:
    """Return what every command of our pre-training has in common, after linking the user's unlabelled images."""
    if not any(_has_begun(study, other) for other in study.arms if other.recipe is not None):
        # all recipes see the same images: those that the user has by the time the first one begins
        link_unlabelled(study, images)
    options = study.options
    command = ["nnUNetv2_train_macl_pretrain", options.dataset, "-c", options.configuration, "-p", options.plans]
    return [*command, "-np", str(processes), *(["--skip_unreadable"] if skip_unreadable else [])]


def _has_begun(study: Study, arm: Arm) -> bool:
    """Return whether something was trained on the unlabelled images for an arm."""
    run = study.pretraining_run(arm)
    return resume.has_checkpoint(run) or (run / NETWORK_FILE).is_file()


def _run_cell(study: Study, cell: Trial, device: str, processes: int, jobs: int) -> dict[str, Any]:
    folder = study.cell_folder(cell)
    # The variable of the user's shell may be meant for another training, so the study replaces it.
    environment = study.environment(folder) | {GROUP_VARIABLE: study.options.group_regex or ""}
    if weights := study.weights(study.arm(cell.arm)):
        environment[WEIGHTS_VARIABLE] = str(weights)
    if teacher := study.teacher(cell):
        results = study.cell_folder(teacher) / study.options.dataset
        environment[TEACHER_VARIABLE] = str(next(results.glob("*__*__*")))
    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, usable_cores() // jobs))
    command = [sys.executable, "-m", "nnunetv2_macl.compare.cell", str(study.folder), cell.name]
    run_command([*command, "-device", device, "-np", str(processes)], environment, folder / "log.txt")
    return {}
