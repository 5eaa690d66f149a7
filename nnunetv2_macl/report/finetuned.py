"""Collect the page about a fine-tuned model: origin of its weights, curves, and results on the validation cases."""

from __future__ import annotations

import contextlib
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from markupsafe import Markup
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_macl.checkpoints import ORIGINS
from nnunetv2_macl.dataset_json import class_names
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.nnunet import DatasetConfiguration, raw_folder, read_dataset_json, read_json
from nnunetv2_macl.report.curves import BLUE, COLOURS, GREEN, ORANGE, draw_curves
from nnunetv2_macl.report.pictures import labelled_slice
from nnunetv2_macl.report.run import FINISHED, STAMP, STOPPED, device_of, log_lines
from nnunetv2_macl.semi_supervised.pseudo_labels import PSEUDO_LABELS_FOLDER, TEACHER_FILE, image_state
from nnunetv2_macl.text import pluralise
from nnunetv2_macl.training.commands import command_to_train, device_option, plans_option
from nnunetv2_macl.training.finetune import GIVEN_WEIGHTS
from nnunetv2_macl.training.run_folder import PLAN_COPY

TEMPLATE = "finetuned.html.jinja"
_ORIGIN = re.compile(rf"({'|'.join(map(re.escape, ORIGINS.values()))}) weights from ")
_ABOUT_WEIGHTS = re.compile(r"  |WARNING: (these weights|the pre-training)")
# lines of nnU-Net's log, one per epoch
_VALUES = {
    "rate": re.compile(r"Current learning rate: (\S+)"),
    "train": re.compile(r"train_loss (\S+)"),
    "validation": re.compile(r"val_loss (\S+)"),
    "seconds": re.compile(r"Epoch time: (\S+) s"),
}
_EPOCH = re.compile(r"^Epoch (\d+)$")
_PSEUDO_DICE = re.compile(r"Pseudo dice \[(.*)\]")
_NUMBER = re.compile(r"(?:np\.float\d+\()?(-?[\d.]+(?:e-?\d+)?|nan)")


def is_training(folder: Path) -> bool:
    """Return whether a folder is a fold of a training by nnU-Net, and not a pre-training run."""
    # TRAINER__PLANS__CONFIGURATION/fold_F
    is_fold = folder.resolve().parent.name.count("__") == 2 and (folder.parent / "plans.json").is_file()
    return is_fold and any(folder.glob("training_log_*.txt")) and not (folder / PLAN_COPY).is_file()


def describe_training(folder: Path) -> dict[str, Any]:
    """Return the values of the template for a training, finished or not. Raises UserError for damaged files."""
    fix = "nnU-Net copied this file from nnUNet_preprocessed. Copy it again."
    trainer, plans_name, configuration_name = folder.resolve().parent.name.split("__")
    plans = PlansManager(read_json(folder.parent / "plans.json", fix))
    configuration = DatasetConfiguration(
        plans.dataset_name,
        plans_name,
        configuration_name,
        plans,
        read_dataset_json(folder.parent / "dataset.json", fix, labels=True),
    )
    lines = [STAMP.sub("", line) for line in log_lines(folder)]
    epochs = _epochs(lines)
    is_finished = (folder / "checkpoint_final.pth").is_file() and _is_complete(lines)
    summary = folder / "validation" / "summary.json"
    validation = (
        read_json(summary, f"Remove {summary} and validate again: nnUNetv2_train ... --val")
        if is_finished and summary.is_file()
        else None
    )
    manager, names = plans.get_label_manager(configuration.dataset_json), class_names(configuration.dataset_json)
    keys = map(str, manager.foreground_regions if manager.has_regions else manager.foreground_labels)
    classes = {key: names.get(key, key) for key in keys}
    fold = folder.name.removeprefix("fold_")
    return {
        "name": f"{configuration.dataset_name}, {configuration.name}",
        "trainer": trainer,
        "fold": fold,
        "plans_name": plans_name,
        "state": FINISHED if is_finished else STOPPED,
        "summary": _summary(epochs, validation, lines),
        "origin": _origin(lines),
        "curves": _curves(epochs, classes),
        "by_class": [
            (name, _number(validation["mean"].get(key, {}).get("Dice"))) for key, name in classes.items() if validation
        ],
        "by_case": [
            (_case_name(row, configuration), [_number(row["metrics"].get(key, {}).get("Dice")) for key in classes])
            for row in _worst_first(validation)
        ],
        "classes": list(classes.values()),
        "pictures": _pictures(folder, configuration, validation),
        "pseudo_labels": describe_pseudo_labels(folder),
        "commands": _commands(folder, configuration, trainer, is_finished, validation is not None),
    }


def _epochs(lines: list[str]) -> dict[int, dict[str, Any]]:
    """Return the values of each finished epoch. If a training was repeated or continued, its later values count."""
    epochs: dict[int, dict[str, Any]] = {}
    current: dict[str, Any] = {}
    number = None
    for line in lines:
        if match := _EPOCH.match(line):
            number, current = int(match[1]), {}
            epochs = {before: values for before, values in epochs.items() if before < number}
        for key, pattern in _VALUES.items():
            if match := pattern.match(line):
                current[key] = float(match[1])
        if match := _PSEUDO_DICE.match(line):
            current["dice"] = [float(value) for value in _NUMBER.findall(match[1])]
        if number is not None and "seconds" in current:
            epochs[number] = current
    return epochs


def _is_complete(lines: list[str]) -> bool:
    """Return whether the last training in the logs is complete, because the final checkpoint may be of an earlier one."""
    ends = [line == "Training done." for line in lines if line == "Training done." or _EPOCH.match(line)]
    return not ends or ends[-1]


def _summary(
    epochs: dict[int, dict[str, Any]], validation: dict[str, Any] | None, lines: list[str]
) -> list[tuple[str, str]]:
    rows = [("Trained", pluralise(len(epochs), "epoch"))]
    split = [line for line in lines if line.startswith("This split has")]
    if split:
        rows.append(("On", split[-1].removeprefix("This split has ").rstrip(".")))
    if validation:
        rows.append(
            ("Dice", f"{validation['foreground_mean']['Dice']:.3f}, mean of the classes on the validation cases")
        )
    seconds = [values["seconds"] for values in epochs.values()]
    if seconds:
        time = timedelta(seconds=round(sum(seconds)))
        rows.append(("Time", f"{time}, {np.median(seconds):.3g} s per epoch"))
    return rows


def _origin(lines: list[str]) -> list[str]:
    """Return the trainer's messages about its initial weights; empty for a training from scratch."""
    starts = [number for number, line in enumerate(lines) if _ORIGIN.match(line) or line.startswith(GIVEN_WEIGHTS)]
    if not starts:
        return []
    about = lines[starts[-1] :]
    if about[0].startswith(GIVEN_WEIGHTS):
        return ["weights of nnU-Net's option -pretrained_weights, whose file the log does not name"]
    others = [number for number, line in enumerate(about) if number and not _ABOUT_WEIGHTS.match(line)]
    end = others[0] if others else len(about)
    names = ", ".join(Path(part.strip()).name for part in _ORIGIN.sub("", about[0]).split(","))
    origin = _ORIGIN.match(about[0])
    return [f"{origin[1] if origin else ''} weights, {names}", *(line.removeprefix("  ") for line in about[1:end])]


def _curves(epochs: dict[int, dict[str, Any]], classes: dict[str, str]) -> dict[str, Markup]:
    if not epochs:
        return {}

    def values(key: str) -> list[float]:
        return [epoch.get(key, float("nan")) for epoch in epochs.values()]

    losses: list[Any] = [
        (values("train"), BLUE, "-", "training"),
        (values("validation"), ORANGE, "-", "validation patches"),
    ]
    figures = {"Loss": draw_curves(losses, "loss", from_zero=False)}
    dice = [epoch["dice"] for epoch in epochs.values() if "dice" in epoch]
    if dice:
        lines: list[Any] = [
            (list(of_class), COLOURS[number % len(COLOURS)], "-", name)
            for number, (name, of_class) in enumerate(zip(classes.values(), zip(*dice, strict=True), strict=False))
        ]
        figures["Dice on validation patches, as nnU-Net estimates it"] = draw_curves(lines, "dice", from_zero=True)
    figures["Learning rate"] = draw_curves(
        [(values("rate"), GREEN, "-", "learning rate")], "rate", from_zero=True, legend=False
    )
    return {title: Markup(svg) for title, svg in figures.items()}


def _case_name(row: dict[str, Any], configuration: DatasetConfiguration) -> str:
    return Path(row["prediction_file"]).name.removesuffix(configuration.dataset_json["file_ending"])


def _mean_dice(row: dict[str, Any]) -> float:
    values = np.array([metrics["Dice"] for metrics in row["metrics"].values()], dtype=float)
    return float(np.nanmean(values)) if (~np.isnan(values)).any() else float("nan")


def _worst_first(validation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return nnU-Net's rows of the cases, sorted by Dice. Cases without a Dice, which contain no class, come last."""
    rows = validation["metric_per_case"] if validation else []
    return sorted(rows, key=lambda row: (np.isnan(_mean_dice(row)), _mean_dice(row)))


def _number(value: float | None) -> str:
    return "not defined" if value is None or np.isnan(value) else f"{value:.3f}"


def _pictures(
    folder: Path, configuration: DatasetConfiguration, validation: dict[str, Any] | None
) -> list[dict[str, str]]:
    """Return image, labels and prediction of the worst, the middle and the best validation case.

    The pictures show the slice with the most foreground. Returns an empty list if the images are not accessible.
    """
    rows = [row for row in _worst_first(validation) if not np.isnan(_mean_dice(row))]
    if not rows:
        return []
    try:
        images = get_filenames_of_train_images_and_targets(
            str(raw_folder(configuration.dataset_name)), dict(configuration.dataset_json)
        )
    except (UserError, OSError, KeyError):  # nnUNet_raw is not set, or the images are on another machine
        return []
    # in this order, because two cases have no middle one, and one case is only the worst
    shown = {len(rows) // 2: "middle", len(rows) - 1: "best", 0: "worst"}
    reader = configuration.plans_manager.image_reader_writer_class()
    pictures = []
    for number, which in sorted(shown.items()):
        row = rows[number]
        case = _case_name(row, configuration)
        prediction = folder / "validation" / Path(row["prediction_file"]).name
        try:
            image = reader.read_images(images[case]["images"])[0][0]
            reference, predicted = (reader.read_seg(str(file))[0][0] for file in (images[case]["label"], prediction))
        except (KeyError, OSError, RuntimeError):
            continue
        shown_as = dict(
            zip(("image", "reference", "predicted"), labelled_slice(image, reference, predicted), strict=True)
        )
        pictures.append({"case": f"{which}: {case}, Dice {_number(_mean_dice(row))}"} | shown_as)
    return pictures


def describe_pseudo_labels(folder: Path) -> dict[str, Any] | None:
    """Return facts and pictures of the labels that a teacher gave to unlabelled images, or None if there are none.

    The pictures show the images for which the confidence of the teacher is lowest, in the middle, and highest.
    """
    labels = folder / PSEUDO_LABELS_FOLDER
    try:
        made_by = read_json(labels / TEACHER_FILE, "")
        records = []
        for file in (labels / name for name in made_by["labels"]):
            record = read_json(file.with_suffix(".json"), "")
            if float(record["foreground"]):
                records.append((float(record["confidence"]), file, Path(record["image"]), record["made_from"]))
    except (UserError, KeyError, TypeError, ValueError):
        return None
    records.sort(key=lambda record: record[0])
    facts = [
        ("Images", str(len(made_by["labels"]))),
        ("Without any label", str(len(made_by["labels"]) - len(records))),
    ]
    if records:
        mean = np.mean([confidence for confidence, *_ in records])
        facts.append(("Confidence", f"{mean:.3f}, mean probability of the foreground voxels"))
    with contextlib.suppress(UserError, KeyError, TypeError, ValueError):
        summary = read_json(Path(made_by["fold_folder"]) / "validation" / "summary.json", "")
        dice = float(summary["foreground_mean"]["Dice"])
        facts.append(("Dice of the teacher", f"{dice:.3f}, mean of the classes on the validation cases"))
    shown = {len(records) // 2: "middle", len(records) - 1: "most confident", 0: "least confident"} if records else {}
    pictures = []
    for number, which in sorted(shown.items()):
        confidence, file, image, made_from = records[number]
        with contextlib.suppress(OSError, RuntimeError):  # The preprocessed images are elsewhere.
            if not image_state(image).items() <= made_from.items():
                continue  # The image was preprocessed again since.
            volumes = (blosc2.open(urlpath=str(each), mode="r")[0] for each in (image, file))
            shown_as = dict(zip(("image", "predicted"), labelled_slice(*volumes), strict=True))
            pictures.append({"case": f"{which}: {image.stem}, {confidence:.3f}"} | shown_as)
    return {"facts": facts, "pictures": pictures}


def _commands(
    folder: Path, configuration: DatasetConfiguration, trainer: str, is_finished: bool, is_validated: bool
) -> list[tuple[str, str]]:
    fold, options = folder.name.removeprefix("fold_"), plans_option(configuration.plans_name)
    train = command_to_train(configuration, fold, device_of(folder), trainer)
    options += device_option(device_of(folder))
    if not is_finished:
        return [(f"{train} --c", "continue this training, if it was stopped")]
    predict = f"nnUNetv2_predict -d {configuration.id} -c {configuration.name} -f {fold} -tr {trainer}{options}"
    commands = [(f"{predict} -i IMAGES -o PREDICTIONS", "segment images, on any machine with nnU-Net")]
    if not is_validated:
        commands.append((f"{train} --val", "predict and measure the validation cases"))
    compare = f"nnUNetv2_macl_compare {configuration.id} -c {configuration.name}{options}"
    return [*commands, (compare, "measure on separate test cases whether pre-training helps")]
