"""Read the folder of a pre-training run that is finished, running or stopped: plan, curves, state and images."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_macl import checkpoints
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.nnunet import DatasetConfiguration, read_dataset_json, read_json
from nnunetv2_macl.planning.plan import MACLPlan, read_plan
from nnunetv2_macl.preprocessing.cases import unlabelled_folder
from nnunetv2_macl.training import resume
from nnunetv2_macl.training.epoch_log import CURVES_FILE, read_curves
from nnunetv2_macl.training.run_folder import PLAN_COPY, RunLock, cases_seen

FINISHED, RUNNING, STOPPED = "finished", "running", "stopped"
_IMAGES = re.compile(r"Pre-training on (\d+) images.*left out as unreadable: (\d+)")
STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?: ")


@dataclass(frozen=True)
class Run:
    """The content of a pre-training run's folder."""

    folder: Path  # folder of the run
    configuration: DatasetConfiguration  # nnU-Net's configuration, from the copies in the run's folder
    plan: MACLPlan  # plan of the run
    state: str  # ``finished``, ``running`` or ``stopped``
    # one value per epoch, by the keys of nnU-Net's logger; from a checkpoint, else from ``epochs.csv``
    log: dict[str, list[float]]
    device: str  # type of the device of the training
    weights: dict[str, Any] | None  # of the pre-training network; None before the first checkpoint
    images: int | None  # number of images; None if the log does not name it
    skipped: int  # number of images that were left out
    seen: (
        dict[str, set[str]] | None
    )  # names of the cases that the run has seen, by data set; None if its folder does not say
    collapsed: str | None  # why the run counts as collapsed, or None
    warnings: list[str]  # warnings in the log
    versions: dict[str, str]  # versions of the packages that made the run

    @property
    def fold(self) -> str:
        return self.folder.name.removeprefix("fold_")

    @property
    def trainer(self) -> str:
        """Return the name of the trainer class, which may be the user's own."""
        # TRAINER__PLANS__CONFIGURATION/fold_F
        return self.folder.resolve().parent.name.split("__")[0]

    @property
    def epochs(self) -> int:
        """Return the number of finished epochs."""
        return len(self.log.get("train_losses", []))


def read_run(folder: Path) -> Run:
    """Read the folder of a run, or of an earlier run in it (``previous_DATE``).

    Raises:
        UserError: The folder holds no run, or a damaged one. The message names the file.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Give a pre-training run's folder: .../fold_all")
    if not (folder / PLAN_COPY).is_file():
        inner = sorted(str(path.parent) for path in folder.glob(f"**/{PLAN_COPY}") if "previous_" not in str(path))
        where = f"Give one of: {', '.join(inner[:5])}" if inner else "Give a pre-training run's folder: .../fold_all"
        raise UserError(f"{folder} holds no {PLAN_COPY}, so no pre-training has begun in it. {where}")
    plan = read_plan(folder / PLAN_COPY)
    above = folder.parent.parent if folder.name.startswith("previous_") else folder.parent
    fix = (
        "nnU-Net copies this file from nnUNet_preprocessed, so copy it again. Weights that nnUNetv2_macl_install has installed "
        "have no such file and no report. nnUNetv2_macl_inspect describes them."
    )
    configuration = DatasetConfiguration(
        plan.dataset_name,
        plan.plans_name,
        plan.configuration,
        PlansManager(read_json(above / "plans.json", fix)),
        read_dataset_json(above / "dataset.json", fix),
    )
    lines = log_lines(folder)
    images, skipped = None, 0
    for line in lines:
        if match := _IMAGES.search(line):
            images, skipped = int(match[1]), int(match[2])
    file, checkpoint = _newest_checkpoint(folder)
    log = checkpoint.get("logging") or {}
    if not log.get("train_losses"):
        log = read_curves(folder / CURVES_FILE)
    state = RUNNING if RunLock(folder).holder() else STOPPED
    if file == resume.FINAL:
        state = FINISHED
    exported = folder / checkpoints.ENCODER_FILE
    versions = checkpoints.package_versions()
    if state == FINISHED and exported.is_file():
        versions = checkpoints.load(exported).get("package_versions", versions)
    return Run(
        folder=folder,
        configuration=configuration,
        plan=plan,
        state=state,
        log={key: values for key, values in log.items() if isinstance(values, list)},
        device=device_of(folder),
        weights=resume.weights_of(checkpoint) if "network_weights" in checkpoint else None,
        images=images,
        skipped=skipped,
        seen=cases_seen(folder),
        collapsed=checkpoint.get("collapsed"),
        warnings=list(dict.fromkeys(STAMP.sub("", line).strip() for line in lines if "WARNING" in line)),
        versions=versions,
    )


def _newest_checkpoint(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """Return name and content of the newest good checkpoint; None and nothing if there is no checkpoint.

    Raises:
        UserError: All checkpoints are damaged.
    """
    damaged = None
    for name in resume.CHECKPOINTS:
        if (folder / name).is_file():
            try:
                return name, checkpoints.load(folder / name)
            except UserError as error:
                damaged = error
    if damaged:
        raise damaged
    return None, {}


def device_of(folder: Path) -> str:
    """Return the type of the device from nnU-Net's debug.json, or ``cuda`` if the file is missing."""
    file = folder / "debug.json"
    content = read_json(file, f"Remove {file}, which is only for debugging.") if file.is_file() else {}
    return str(content.get("device", "cuda")).partition(":")[0]


def log_lines(folder: Path) -> list[str]:
    """Return the lines of all log files in their order, because a continued run has several log files."""
    # by the time in the name, because a copied folder has other times; nnU-Net does not pad months and days with zeros
    files = sorted(folder.glob("training_log_*.txt"), key=lambda file: [int(n) for n in re.findall(r"\d+", file.stem)])
    return [line.rstrip() for file in files for line in file.read_text(errors="replace").splitlines()]


def has_seen(run: Run, dataset: str, case: str) -> bool:
    """Return whether a run has seen a case, or True if its folder does not say."""
    return run.seen is None or case in run.seen.get(dataset, set())


def unlabelled_records(run: Run) -> list[Path]:
    """Return the records of the unlabelled images that a run has seen, by source; none without nnUNet_preprocessed.

    Cases with a record are complete, because the record is written last.
    """
    try:
        folder = unlabelled_folder(run.configuration)
    except KeyError:
        return []
    names = sorted({run.plan.dataset_name, *run.plan.unlabelled_datasets})
    records = (record for name in names for record in sorted((folder / name).glob("*.json")))
    return [record for record in records if has_seen(run, record.parent.name, record.stem)]


def image_sources(run: Run) -> list[dict[str, Any]]:
    """Return each source of images: ``name``, number of ``images``, ``size`` in voxels and ``spacing`` in mm, (images, 3) each.

    Labelled images are read from nnU-Net's fingerprint, unlabelled ones from the records of preprocessing.
    """
    sources = []
    fingerprint = run.folder.parent / "dataset_fingerprint.json"
    if fingerprint.is_file():
        content = read_json(fingerprint, "")
        if content.get("shapes_after_crop"):
            sources.append(
                {
                    "name": f"{run.plan.dataset_name}, labelled (labels are not read)"
                    + (f", before fold {run.fold} is left out" if run.fold != "all" else ""),
                    "images": len(content["shapes_after_crop"]),
                    "size": np.asarray(content["shapes_after_crop"], dtype=float),
                    "spacing": np.asarray(content["spacings"], dtype=float),
                }
            )
    for folder, files in itertools.groupby(unlabelled_records(run), key=lambda file: file.parent):
        records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        sources.append(
            {
                "name": f"{folder.name}, unlabelled",
                "images": len(records),
                "size": np.asarray([record["shape"][1:] for record in records], dtype=float),
                "spacing": np.asarray([record["original_spacing"] for record in records], dtype=float),
            }
        )
    return sources
