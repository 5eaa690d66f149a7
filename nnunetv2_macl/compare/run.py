"""Run a whole label-efficiency study: the function behind ``nnUNetv2_macl_compare``."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2_macl import checkpoints, nnunet
from nnunetv2_macl.checkpoints import ENCODER_FILE, NETWORK_FILE
from nnunetv2_macl.compare.folders import (
    RawImages,
    check_arms,
    check_labelled,
    link_unlabelled,
    plan,
    planner,
    plans_name,
    pretraining_images,
    run_command,
)
from nnunetv2_macl.compare.report import FEWEST_PATIENTS, REPORT_FILE, write_overview, write_report
from nnunetv2_macl.compare.split import split_cases
from nnunetv2_macl.compare.splits import write_report_over_splits
from nnunetv2_macl.compare.steps import DONE_FILE, Task, run_steps
from nnunetv2_macl.compare.stopping import ended_by_sigterm
from nnunetv2_macl.compare.study import FINETUNINGS, SCRATCH, STUDY_FILE, Arm, Options, Study, Trial, parse_arm
from nnunetv2_macl.cpu import usable_cores
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.nnunet import TEACHER_VARIABLE, WEIGHTS_VARIABLE
from nnunetv2_macl.patients import patients_of
from nnunetv2_macl.planning.plan import read_plan
from nnunetv2_macl.run import check_device
from nnunetv2_macl.text import first_of, pluralise
from nnunetv2_macl.training import resume
from nnunetv2_macl.training.epoch_log import CURVES_FILE, read_curves
from nnunetv2_macl.training.run_folder import LOCK_FILE, PLAN_COPY, RunLock

logger = logging.getLogger(__name__)


def compare(
    options: Options | Sequence[Options],
    *,
    splits: int = 1,
    folder: Path | None = None,
    device: str = "cuda",
    processes: int = 8,
    jobs: int = 1,
    dry_run: bool = False,
    skip_unreadable: bool = False,
) -> Path:
    """Run or continue a label-efficiency study and return its folder: plan, pre-train, fine-tune each cell, report.

    With several kinds of fine-tuning, the cells and the report of each kind are in a folder with its name, and all kinds share
    the pre-trainings. With several splits, the whole study runs on each split in a folder ``split_K``, and a report over the
    splits is written. ``compare.md`` in ``folder`` always begins with the verdict. An arm whose pre-training or fine-tuning
    fails is left out, and the reports compare the other arms.

    The user's nnU-Net folders are only read. Several processes, on one machine or on several that share ``folder``, divide
    the cells among themselves.

    Args:
        options: The options that define the study, one for each kind of fine-tuning; see `options_by_finetuning`.
        splits: Number of random draws of test, validation and training patients.
        folder: Folder of the study. None: ``macl_compare_DATASET_C`` in the working directory.
        device: ``cuda``, ``cpu`` or ``mps``.
        processes: Number of processes for preprocessing and export.
        jobs: Number of cells that run at the same time.
        dry_run: Only show the split and the cells.
        skip_unreadable: Leave out unlabelled images that cannot be used.

    Raises:
        UserError: A mistake that the user can correct, or an arm failed.
    """
    nnunet.require_folders()
    kinds = [_checked(each) for each in ([options] if isinstance(options, Options) else options)]
    options = kinds[0]
    for name, value in (("--jobs", jobs), ("-np", processes), ("--splits", splits)):
        if value < 1:
            raise UserError(f"{name} must be 1 or more, got {value}.")
    if not dry_run:
        check_device(device)
    images = RawImages.find(options.dataset, skip_unreadable=skip_unreadable)
    planner_name = planner(options) if options.plan is None else None
    # the working directory, because nnU-Net's folders are the user's and are only read
    plans = None if options.plans == "nnUNetPlans" else options.plans
    name = "_".join(filter(None, ("macl_compare", options.dataset, options.configuration, plans)))
    folder = (folder or Path(name)).expanduser().resolve()
    bases = [folder / f"split_{n}" for n in range(splits)] if splits > 1 else [folder]
    # one kind alone continues a study of several kinds
    shares = len(kinds) > 1 or any((base / kind / STUDY_FILE).is_file() for base in bases for kind in FINETUNINGS)
    _check_folder(folder, bases, shares)
    # studies[k][n] is the study of kind k and split n
    studies = [[_study(kind, images, base, n, shares) for n, base in enumerate(bases)] for kind in kinds]
    _check_labels(studies[0])
    for number, of_kind in enumerate(studies):
        for study in of_kind:
            logger.info("%s", describe(study, images) if number == 0 else describe_cells(study))
    if dry_run:
        return folder
    # nothing is written unless all studies can begin or continue
    for study in [study.open(check_only=True) for of_kind in studies for study in of_kind]:
        if (study.planning_folder / DONE_FILE).is_file():
            # check before the new arms are stored in the study
            check_labelled(study, images)
            check_arms(study, images)
    studies = [[study.open() for study in of_kind] for of_kind in studies]
    logger.info("Study in %s", folder)
    work = _Work(images, planner_name, device, processes, jobs, skip_unreadable)
    splits_of_kinds = list(zip(*studies, strict=True))
    left_out: dict[Path, Task] = {}
    failed: list[str] = []
    for of_kind in studies:
        # in the order of the splits, so that the first split is complete early
        steps = [work.steps(study, of_split) for study, of_split in zip(of_kind, splits_of_kinds, strict=True)]
        with ended_by_sigterm():
            run_steps(list(itertools.chain.from_iterable(steps)), jobs, left_out=left_out)
        of_kind, unfinished = _finished(of_kind)
        failed += unfinished
        found = {study.folder / REPORT_FILE: write_report(study) for study in of_kind}
        if splits > 1:
            file = folder / (f"compare_{of_kind[0].options.finetuning}.md" if shares else REPORT_FILE)
            found[file] = write_report_over_splits(of_kind, file)
        for file, sentence in found.items():
            logger.info("\n%s\n\nTables and figure: %s", sentence, file)
        if shares:
            # also before the next kind is trained, which may take days
            reports = {kind: bases[0] / kind / REPORT_FILE for kind in FINETUNINGS}
            if splits > 1:
                reports = {kind: folder / f"compare_{kind}.md" for kind in FINETUNINGS}
            write_overview(
                [
                    (Study.read(bases[0] / kind).options, report)
                    for kind, report in reports.items()
                    if report.is_file() and (bases[0] / kind / STUDY_FILE).is_file()
                ],
                folder / REPORT_FILE,
            )
    if failed:
        raise UserError(
            f"These arms are not in the report, because one of their steps failed: {', '.join(dict.fromkeys(failed))}. "
            "The messages are above. To try again, repeat the command. To go on without these arms, leave them out of --arms."
        )
    return folder


def _finished(studies: Sequence[Study]) -> tuple[list[Study], list[str]]:
    """Return the studies of all splits with the arms that are trained in all of them, and the names of the other arms."""

    def is_finished(arm: Arm) -> bool:
        cells = [(study, cell) for study in studies for cell in study.cells if cell.arm == arm.slug]
        return all((study.cell_folder(cell) / DONE_FILE).is_file() for study, cell in cells)

    arms = {arm.name: is_finished(arm) for arm in studies[0].arms}
    kept = [name for name, is_done in arms.items() if is_done]
    return [replace(s, options=replace(s.options, arms=kept)) for s in studies], [n for n in arms if n not in kept]


def _checked(options: Options) -> Options:
    """Return the options with the full name of the data set and absolute paths. Raise UserError if they cannot be used."""
    options = replace(options, dataset=nnunet.dataset_name(options.dataset))
    options.check()
    if options.plan is not None:
        file = Path(options.plan).expanduser().resolve()
        options = replace(options, plan=str(file), plans=plans_name(file))
    # store absolute paths, because the study may be continued from another working directory
    options = replace(options, arms=[parse_arm(text).name for text in options.arms])
    if options.configuration == "3d_cascade_fullres":
        raise UserError("-c 3d_cascade_fullres needs a first stage for each cell. Compare its stages: -c 3d_lowres")
    there: Sequence[str] = nnunet.SUPPORTED_CONFIGURATIONS
    if options.plan is not None:
        there = list(nnunet.read_json(Path(options.plan), "Give another to --plan.")["configurations"])
    if options.configuration not in there:  # nnU-Net's planning would silently skip it
        raise UserError(
            f"There is no configuration '{options.configuration}'. Use one of these with -c: {', '.join(there)}."
        )
    return options


def _check_folder(folder: Path, bases: Sequence[Path], shares: bool) -> None:
    """Raise UserError if a study of several splits or kinds of fine-tuning cannot begin or continue in a folder.

    Args:
        folder: Folder of the study.
        bases: Folder of each split, or ``folder`` alone.
        shares: Whether the study has a folder for each kind of fine-tuning.
    """
    if len(bases) == 1 and not shares:
        return  # `Study.open` checks the folder of a single study
    for there in dict.fromkeys([folder, *bases]):
        if (there / STUDY_FILE).is_file() and (shares or there == folder):
            kind = Study.read(there).options.finetuning
            raise UserError(
                f"{there} holds a study of one split with one kind of fine-tuning, --finetuning {kind}. Give the options that it "
                "began with, or another folder: -o FOLDER"
            )
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and not names & ({base.name for base in bases} if len(bases) > 1 else FINETUNINGS.keys()):
        raise UserError(
            f"{folder} is not empty and holds no study with these --splits and --finetuning. Give another folder: -o FOLDER"
        )


def _check_labels(studies: list[Study]) -> None:
    """Raise UserError if fractions of labelled cases are other numbers in another split: a report has one row for each number."""
    for study in studies[1:]:
        if study.split.labels != studies[0].split.labels:
            first, other = (" ".join(map(str, s.split.labels)) for s in (studies[0], study))
            raise UserError(
                f"--labels {' '.join(study.options.labels)} are {first} cases in split 0 and {other} in split "
                f"{study.options.split}, because whole patients are drawn. Give numbers of cases: --labels {first}"
            )


def _study(options: Options, images: RawImages, base: Path, number: int, shares: bool) -> Study:
    """Return the study of split ``number`` in the folder ``base``, without writing anything to disk."""
    patients = patients_of(images.labelled, options.group_regex)
    split = split_cases(
        patients,
        test=options.test,
        validation=options.validation,
        labels=options.labels,
        seeds=options.seeds,
        number=number,
    )
    folder = base / options.finetuning if shares else base
    return Study(folder, replace(options, split=number), split, patients, shares=shares)


def describe(study: Study, images: RawImages) -> str:
    """Return the split and the cells as text."""
    split, options = study.split, study.options

    def patients(cases: list[str]) -> str:
        of = f" of {pluralise(len({study.patients[case] for case in cases}), 'patient')}" if options.group_regex else ""
        return pluralise(len(cases), "case") + of

    kept = pretraining_images(study, list(images.unlabelled))
    share = len(images.labelled) - len(split.test) - len(split.validation)
    lines = [
        f"{options.dataset}, {options.configuration}, {options.plans}"
        + (f", split {options.split}" if options.split else ""),
        f"test:        {patients(split.test)}: {first_of(sorted(split.test), 6)}",
        f"validation:  {patients(split.validation)}: {first_of(sorted(split.validation), 6)}",
        f"pre-training: {pluralise(len(study.pretrainings), 'run')} on {share + len(kept)} images, {len(kept)} of them from "
        "imagesUn"
        + (
            f" (the other {len(images.unlabelled) - len(kept)} are of test or validation patients)"
            * (len(kept) < len(images.unlabelled))
        ),
    ]
    if options.group_regex is None:
        lines.append(
            "patients:    each case counts as a patient. If a patient has several images, name the patient with --group_regex "
            "REGEX. Otherwise some images of test patients are trained on"
        )
    if (tested := len({study.patients[case] for case in split.test})) < FEWEST_PATIENTS:
        lines.append(
            f"attention:   {pluralise(tested, 'test patient')} cannot distinguish a difference from chance. Use at least "
            f"{FEWEST_PATIENTS}: --test N"
        )
    for seed, subset in enumerate(split.subsets):
        for labels, cases in subset.items():
            lines.append(f"labelled, seed {seed}, {labels}: {patients(cases)}: {first_of(sorted(cases), 6)}")
    return "\n".join([*lines, describe_cells(study)])


def describe_cells(study: Study) -> str:
    """Return the number, the length and the names of the cells as text."""
    options, split = study.options, study.split
    line = (
        f"fine-tuning by {options.finetuning}: {pluralise(len(study.cells), 'cell')}: {pluralise(len(study.arms), 'arm')} x "
        f"{pluralise(len(split.labels), 'number')} of labels x {pluralise(options.seeds, 'seed')} x "
        f"{pluralise(len(options.rates), 'rate')}, each {pluralise(options.epochs, 'epoch')} of "
        f"{pluralise(options.iterations, 'step')}: {len(study.cells) * options.epochs * options.iterations:,} steps in all"
    )
    return "\n".join([line, *(f"    {cell.name}" for cell in study.cells)])


@dataclass(frozen=True)
class _Work:
    """The steps of a study, and what they need besides the study."""

    images: RawImages
    planner: str | None  # nnU-Net's planner; None if the user has given a plan
    device: str
    processes: int
    jobs: int
    skip_unreadable: bool

    def steps(self, study: Study, of_split: Sequence[Study]) -> list[Task]:
        """Return all steps of a study in the order in which they start.

        Args:
            study: The study.
            of_split: The studies of its split, one for each kind of fine-tuning. They share all steps but the cells.
        """

        def plan_and_check() -> dict[str, Any]:
            done = plan(study, self.images, self.planner, self.processes)
            for other in of_split:
                check_arms(other, self.images)
            return done

        ready = planning = Task("planning and preprocessing", study.planning_folder, plan_and_check)
        uses_unlabelled = any(arm.recipe or arm.trains_on_unlabelled for other in of_split for arm in other.arms)
        if pretraining_images(study, list(self.images.unlabelled)) and uses_unlabelled:
            # preprocess once for all arms, because their trainings may run at the same time
            preprocess = functools.partial(self.preprocess_unlabelled, study)
            folder = study.base / "preprocessing_unlabelled"
            ready = Task("preprocessing of the unlabelled images", folder, preprocess, needs=(planning,))
        pretrained = {
            arm.recipe_and_settings: Task(
                f"pre-training, recipe {','.join([arm.recipe_name, *arm.settings])}",
                study.pretraining_folder(arm),
                functools.partial(self.pretrain, study, arm),
                needs=(ready,),
                part=arm.pretraining_name,
            )
            for arm in study.pretrainings
        }
        trained: dict[Trial, Task] = {}
        # A teacher is trained before its students.
        for cell in sorted(study.cells, key=study.generation):
            arm, teacher = study.arm(cell.arm), study.teacher(cell)
            trained[cell] = Task(
                cell.name,
                study.cell_folder(cell),
                functools.partial(self.run_cell, study, cell),
                needs=(
                    ready if arm.trains_on_unlabelled else planning,
                    *([pretrained[arm.recipe_and_settings]] if arm.recipe else []),
                    *([trained[teacher]] if teacher else []),
                ),
                # without scratch, there is nothing to compare with
                part=None if arm.name == SCRATCH else f"{arm.slug}, {study.options.finetuning}",
            )
        before = dict.fromkeys((planning, ready, *pretrained.values()))
        return [*before, *(trained[cell] for cell in study.cells)]

    def preprocess_unlabelled(self, study: Study) -> dict[str, Any]:
        results, log = study.base / "nnUNet_results", study.planning_folder / "log.txt"
        run_command([*self._pretraining_command(study), "--preprocess_only"], study.environment(results), log)
        return {}

    def pretrain(self, study: Study, arm: Arm) -> dict[str, Any]:
        folder, run = study.pretraining_folder(arm), study.pretraining_run(arm)
        _require_no_other_run(folder)
        # A run writes this file of weights last. It may have been interrupted before its end was recorded.
        if not (run / NETWORK_FILE).is_file() or (run / resume.LATEST).is_file():
            resumes = resume.has_checkpoint(run)
            # all folds of the study have the same validation cases
            command = [*self._pretraining_command(study), "--exclude_fold", "0", "-device", self.device]
            settings = [*study.options.pretrain_settings, *arm.settings]
            start = ["-recipe", str(arm.recipe), *(["--set", *settings] if settings else [])]
            environment = study.environment(folder / "nnUNet_results") | self._share_of_cores()
            run_command([*command, *(["--c"] if resumes else start)], environment, folder / "log.txt")
        # a run whose contrast has collapsed ends without an error if it may go on with restoration
        return _training_seconds(run) | {"collapsed": checkpoints.load(run / ENCODER_FILE).get("collapsed")}

    def _pretraining_command(self, study: Study) -> list[str]:
        """Link the user's unlabelled images, and return the arguments that all commands of the pre-training share."""
        if not any(resume.has_checkpoint(run) or (run / NETWORK_FILE).is_file() for run in study.pretraining_runs):
            # the images stay as they are once the first pre-training has begun, so that all recipes see the same ones
            link_unlabelled(study, self.images)
        options = study.options
        command = ["nnUNetv2_train_macl_pretrain", options.dataset, "-c", options.configuration, "-p", options.plans]
        return [*command, "-np", str(self.processes), *(["--skip_unreadable"] if self.skip_unreadable else [])]

    def run_cell(self, study: Study, cell: Trial) -> dict[str, Any]:
        folder = study.cell_folder(cell)
        _require_no_other_run(folder)
        environment = study.environment(folder) | self._share_of_cores()
        if weights := study.weights(study.arm(cell.arm)):
            environment[WEIGHTS_VARIABLE] = str(weights)
        if teacher := study.teacher(cell):
            results = study.cell_folder(teacher) / study.options.dataset
            environment[TEACHER_VARIABLE] = str(next(results.glob("*__*__*")))
        command = [sys.executable, "-m", "nnunetv2_macl.compare.cell", str(study.folder), cell.name]
        command += ["-device", self.device, "-np", str(self.processes)]
        run_command(command, environment, folder / "log.txt")
        return {}

    def _share_of_cores(self) -> dict[str, str]:
        """Return the variable that limits the threads of one of several trainings at the same time on a CPU."""
        if self.device != "cpu" or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, usable_cores() // self.jobs))}


def _require_no_other_run(folder: Path) -> None:
    """Raise UserError if a process whose study was killed still trains in the folder of a step, and remove stale locks."""
    for file in folder.rglob(LOCK_FILE):
        if file.parent != folder:
            lock = RunLock(file.parent)
            lock.acquire()
            lock.release()


def _training_seconds(run: Path) -> dict[str, Any]:
    """Return the duration of all steps of a pre-training, also of one that was stopped and continued; nothing if unknown."""
    speeds = read_curves(run / CURVES_FILE).get("patches_per_second")
    if not speeds:
        return {}
    plan = read_plan(run / PLAN_COPY)
    patches = plan.get_recipe().num_iterations_per_epoch * plan.batch_size
    return {"seconds": sum(patches / speed for speed in speeds)}
