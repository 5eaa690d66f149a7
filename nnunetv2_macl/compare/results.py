"""Read the results of a study's cells, and choose the learning rate of each arm."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunetv2_macl.compare.statistics import Resampling, in_all, mean_of_classes
from nnunetv2_macl.compare.steps import DONE_FILE
from nnunetv2_macl.compare.study import RESULT_FILE, Study, Trial
from nnunetv2_macl.dataset_json import class_names
from nnunetv2_macl.files import atomic_write
from nnunetv2_macl.nnunet import read_json

MEASURES = ("dice", "hd95", "asd")


@dataclass(frozen=True)
class Group:
    """Results of one arm and one number of labels, at the learning rate with the best Dice on the validation cases.

    S, N, M, C, P: numbers of seeds, test cases, validation cases, classes, and points of the curve.
    """

    rate: float  # learning rate
    # ``dice``, ``hd95`` (mm), ``asd`` (mm), each (S, N, C) on the test cases, NaN where not defined
    measures: dict[str, np.ndarray]
    curve: np.ndarray  # Dice of the validation cases during the training, (P, S, M, C)
    epoch_seconds: float  # duration of an epoch in s, mean over the cells


@dataclass(frozen=True)
class Results:
    """Results of all cells of a study."""

    study: Study  # the study
    classes: list[str]  # names of the C classes
    curve_epochs: list[int]  # epochs of the curves, (P,)
    groups: dict[tuple[str, int], Group]  # by arm and number of labels
    pretraining_seconds: dict[str, float]  # duration of the pre-training in s, by recipe with its settings
    collapsed: dict[str, str]  # why the contrast of a pre-training counts as collapsed, by recipe with its settings

    @classmethod
    def read(cls, study: Study) -> Results:
        """Read the results of a study's cells, all of which must be done."""
        found = {cell: _read(study, cell) for cell in study.cells}
        any_cell = next(iter(found.values()))
        keys = list(dict.fromkeys(row["label"] for row in any_cell["test"]))
        groups = {
            (arm.slug, labels): _group(study, arm.slug, labels, found, len(keys))
            for arm in study.arms
            for labels in study.split.labels
        }
        done = {
            a.recipe_and_settings: read_json(study.pretraining_folder(a) / DONE_FILE, "") for a in study.pretrainings
        }
        seconds = {recipe: content["seconds"] for recipe, content in done.items()}
        collapsed = {recipe: content["collapsed"] for recipe, content in done.items() if content.get("collapsed")}
        names = class_names(read_json(study.raw / "dataset.json", ""))
        return cls(
            study,
            [names.get(key, key) for key in keys],
            [int(e) for e in any_cell["curve"]],
            groups,
            seconds,
            collapsed,
        )

    @property
    def test_bootstrap(self) -> Resampling:
        return self._resampling(self.study.split.test)

    @property
    def validation_bootstrap(self) -> Resampling:
        # sorted, because nnU-Net lists the validation cases by name
        return self._resampling(sorted(self.study.split.validation))

    def _resampling(self, cases: list[str]) -> Resampling:
        return Resampling.draw([self.study.patients[case] for case in cases], self.study.options.seeds)


def _read(study: Study, cell: Trial) -> dict[str, Any]:
    folder = study.cell_folder(cell)
    return read_json(folder / RESULT_FILE, f"To train it again: rm -r '{folder}'")


def _group(study: Study, arm: str, labels: int, found: dict[Trial, dict[str, Any]], classes: int) -> Group:
    seeds = range(study.options.seeds)
    by_rate = {rate: [found[Trial(arm, labels, seed, rate)] for seed in seeds] for rate in study.options.rates}
    curves = {
        # (S, P, M, C) -> (P, S, M, C)
        rate: np.array([list(cell["curve"].values()) for cell in cells], dtype=float).swapaxes(0, 1)
        for rate, cells in by_rate.items()
    }
    whole = Resampling.whole(len(seeds), len(study.split.validation))
    last = in_all([whole.by_class(curve[-1]) for curve in curves.values()])
    at_the_end = {rate: mean_of_classes(dice)[0] for rate, dice in zip(curves, last, strict=True)}
    rate = max(at_the_end, key=lambda r: -np.inf if np.isnan(at_the_end[r]) else at_the_end[r])
    cells = by_rate[rate]
    measures = {
        name: np.array([[row[name] for row in cell["test"]] for cell in cells], dtype=float).reshape(
            len(cells), -1, classes
        )
        for name in MEASURES
    }
    return Group(rate, measures, curves[rate], float(np.mean([cell["epoch_seconds"] for cell in cells])))


def write_csv(results: Results) -> None:
    """Write ``compare.csv``: one line for each cell, test case and class. An undefined measure is empty."""
    study, stream = results.study, io.StringIO(newline="")
    writer = csv.writer(stream)
    columns = ["arm", "labels", "labelled_cases", "seed", "rate", "chosen", "case", "patient", "class"]
    writer.writerow([*columns, "dice", "hd95_mm", "asd_mm"])
    for cell in study.cells:
        found = _read(study, cell)
        used = len(study.split.subsets[cell.seed][cell.labels])
        chosen = int(results.groups[cell.arm, cell.labels].rate == cell.rate)
        for number, row in enumerate(found["test"]):
            name = results.classes[number % len(results.classes)]
            values = ["" if row[key] is None else row[key] for key in MEASURES]
            where = [cell.arm, cell.labels, used, cell.seed, f"{cell.rate:g}", chosen]
            writer.writerow([*where, row["case"], study.patients[row["case"]], name, *values])
    atomic_write(study.folder / "compare.csv", lambda file: file.write(stream.getvalue().encode()))
