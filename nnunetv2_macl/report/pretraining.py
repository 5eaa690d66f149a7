"""Collect the text and pictures of the page about a pre-training run."""

from __future__ import annotations

import io
import math
import shlex
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from nnunetv2_macl import monitoring
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.methods.registry import citations_of, loss_labels, methods_of
from nnunetv2_macl.monitoring import lines_of
from nnunetv2_macl.nnunet import WEIGHTS_VARIABLE
from nnunetv2_macl.planning.plan import start_in_short
from nnunetv2_macl.recipe import defaults_of, meaning
from nnunetv2_macl.report.curves import loss_curves, other_curves
from nnunetv2_macl.report.features import Features, compute_feature_figures
from nnunetv2_macl.report.pictures import data_uri, png, window_intensity
from nnunetv2_macl.report.run import FINISHED, Run, image_sources, read_run
from nnunetv2_macl.training.commands import SHORT_FINETUNER, command_to_fine_tune, command_to_go_on
from nnunetv2_macl.training.run_folder import PRETRAINER

TEMPLATE = "run.html.jinja"
_VIEWS_BYTES = 2 * 2**20


def describe_run(folder: Path, device: str) -> dict[str, Any]:
    """Return the values of the template for a run, finished or not. Raises UserError if the run is damaged."""
    run = read_run(folder)
    try:
        features, no_features = compute_feature_figures(run, device), None
    except UserError as error:
        features, no_features = None, str(error)
    recipe = run.plan.get_recipe()
    defaults = defaults_of(recipe.method)
    lines = [key for loss in recipe.losses for key in lines_of(loss)]
    return {
        "run": run,
        "recipe": [
            (key, value, meaning(key), value != defaults.get(key, value)) for key, value in recipe.as_dict().items()
        ],
        "has_collapse_line": "collapse" in lines,
        "plan": run.plan.values_with_reasons(),
        "sources": [s | {key: _range(s[key]) for key in ("size", "spacing")} for s in image_sources(run)],
        "losses": {title: Markup(svg) for title, svg in loss_curves(run.log).items()},
        "others": {title: Markup(svg) for title, svg in other_curves(run.log).items()},
        "summary": _summary(run),
        "views": _views(run.folder / "views.png"),
        "features": features and _features_as_pictures(features),
        "no_features": no_features,
        "advice": monitoring.collapse_advice(recipe) if run.collapsed else None,
        "commands": _commands(run),
        "citations": citations_of(methods_of(recipe.method)),
    }


def _range(values: np.ndarray) -> str:
    """Return the median of (images, 3) values as text, with the range of each axis if the values differ."""
    low, high = values.min(0), values.max(0)
    return _axes(low) if (low == high).all() else f"{_axes(np.median(values, 0))} ({_axes(low)} to {_axes(high)})"


def _axes(values: np.ndarray) -> str:
    return " × ".join(f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in values)


def _summary(run: Run) -> list[tuple[str, str]]:
    """Return the rows of the summary, name and value."""
    log, recipe = run.log, run.plan.get_recipe()
    rows = [("State", f"{run.state}, {run.epochs} of {recipe.num_epochs} epochs")]
    if run.plan.recipe_source:
        rows.append(("Recipe", run.plan.recipe_source))
    if run.images is not None:
        left_out = f", {run.skipped} left out as unreadable" if run.skipped else ""
        rows.append(("Trained on", f"{run.images} images, none of their labels{left_out}"))
    if run.fold != "all":
        rows.append(("Left out", f"the validation images of fold {run.fold}"))
    if run.plan.pretrained_weights is not None:
        rows.append(("Started from", start_in_short(run.plan.pretrained_weights)))
    for key, name in loss_labels().items():
        # A loss is NaN in the epochs that do not train it.
        if values := [value for value in log.get(f"train_losses/{key}", []) if math.isfinite(value)]:
            lines = log.get("references/collapse") if "collapse" in lines_of(key) else None
            rows.append(
                (name, f"{values[0]:.3f} → {values[-1]:.3f}" + (f" (collapse: {lines[-1]:.3f})" if lines else ""))
            )
    speed = [value for value in log.get("patches_per_second", []) if value > 0]
    if speed:
        # from the speed and not from timestamps, because timestamps include the time between a stop and --c
        seconds = recipe.num_iterations_per_epoch * run.plan.batch_size / np.asarray(speed)
        rows.append(("Speed", f"{np.median(speed):.3g} patches per second, {np.median(seconds):.3g} s per epoch"))
        rows.append(("Time", str(timedelta(seconds=round(float(seconds.sum()))))))
        left = recipe.num_epochs - run.epochs
        if run.state != FINISHED and left > 0:
            rows.append(("Remaining", str(timedelta(seconds=round(float(np.median(seconds)) * left)))))
    return rows


def _commands(run: Run) -> list[tuple[str, str]]:
    """Return the next commands, and the purpose of each."""
    folder = shlex.quote(str(run.folder))
    if run.state != FINISHED:
        resume = command_to_go_on(run.configuration, run.fold, run.device, run.trainer)
        commands = [(resume, "continue this run, if it was stopped")]
        return [*commands, (f"nnUNetv2_macl_report {folder}", "write this report again")]
    return [
        ('export nnUNet_extTrainer="$(nnUNetv2_macl_trainers)"', "let nnU-Net find the trainers"),
        *([] if run.trainer == PRETRAINER else [(f"export {WEIGHTS_VARIABLE}={folder}", "name these weights")]),
        (
            command_to_fine_tune(run.configuration, run.fold, run.device, SHORT_FINETUNER),
            "fine-tune on the labelled images with nnU-Net, for 800 steps",
        ),
        (command_to_fine_tune(run.configuration, run.fold, run.device), "or for nnU-Net's 1000 epochs"),
        (f"nnUNetv2_macl_transfer {folder} DATASET -c CONFIGURATION", "show which weights another network would take"),
        (f"nnUNetv2_macl_export {folder} -o weights.zip", "write one file for others, without names and paths"),
    ]


def _features_as_pictures(features: Features) -> dict[str, Any]:
    def shown(index: int) -> str:
        return png(window_intensity(features.slices[index]))

    return {
        "coloured": [
            {"slice": shown(i), **{when: png(colours[i]) for when, colours in features.colours.items()}}
            for i in range(len(features.colours["after"]))
        ],
        "queries": [
            {
                "slice": shown(i),
                **{when: [shown(j) for j in rows[i]] for when, rows in features.neighbours.items()},
            }
            for i in range(len(features.neighbours["after"]))
        ],
        "distances": features.distances,
        "chance": features.chance,
        "patches": len(features.slices),
    }


def _views(file: Path) -> str | None:
    """Return the run's picture of the first batch as data for ``src``, or None if it is missing or too large."""
    try:
        content = file.read_bytes()
        if len(content) <= _VIEWS_BYTES:
            return data_uri(content, "png")
        stream = io.BytesIO()
        with Image.open(file) as image:
            image.convert("RGB").save(stream, "jpeg", quality=80)
        return data_uri(stream.getvalue(), "jpeg") if stream.tell() <= _VIEWS_BYTES else None
    except OSError:
        return None
