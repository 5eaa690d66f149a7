"""Report the results of a study over several random splits of the patients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunetv2_macl.compare.report import (
    FEWEST_PATIENTS,
    MIN_MEANINGFUL_DICE,
    REPORT_FILE,
    collapse_notes,
    differences,
    no_conclusion,
    number,
    patients_with_defined_dice,
    too_few_patients,
    with_interval,
)
from nnunetv2_macl.compare.results import Results
from nnunetv2_macl.compare.statistics import Estimate, Resampling, student_interval
from nnunetv2_macl.compare.study import SCRATCH, Study
from nnunetv2_macl.files import atomic_write
from nnunetv2_macl.text import join_words, pluralise


def spreads(results: Sequence[Results]) -> dict[tuple[str, int], Estimate]:
    """Return the gain in Dice over scratch, by arm and number of labelled cases, for the studies of several splits."""
    found = [differences(result) for result in results]
    study = results[0].study
    tested = len({study.patients[case] for case in study.split.test})
    overlap = tested / (len(set(study.patients.values())) - tested)
    return {
        (arm, labels): Estimate(float(np.mean(values)), *student_interval(values, overlap), values)
        for arm, by_labels in found[0].items()
        for labels in by_labels
        for values in [tuple(difference[arm][labels].value for difference in found)]
    }


def write_report_over_splits(studies: Sequence[Study], file: Path) -> str:
    """Write the report of studies that differ only in their split, and return the verdict.

    Args:
        studies: One study for each split. Their cells must be done.
        file: File of the report, in a folder that contains the studies' folders.
    """
    results = [Results.read(study) for study in studies]
    options = studies[0].options
    found = spreads(results)
    means = [_mean_dice(result, *group) for result in results for group in result.groups]
    best = max((value for value in means if not np.isnan(value)), default=0.0)
    # The splits share the rule of one split: with fewer patients, chance decides.
    patients = min(map(patients_with_defined_dice, results))
    if patients < FEWEST_PATIENTS:
        sentence = too_few_patients(patients)
    else:
        sentence = no_conclusion(best) if best < MIN_MEANINGFUL_DICE else _verdict(found, len(studies))
    lines = [f"# Does pre-training help? {options.dataset}, {options.configuration}, {len(studies)} splits", ""]
    lines += [f"**{sentence}**", ""]
    for study, result in zip(studies, results, strict=True):
        lines += [line for text in collapse_notes(result, f"split {study.options.split}") for line in (text, "")]
    header = "".join(f" split {study.options.split} |" for study in studies)
    lines += ["## Dice on the test cases", ""]
    lines += [f"| arm | labelled cases | mean |{header}", f"|---|---|---|{'---|' * len(studies)}"]
    for arm in studies[0].arms:
        for labels in studies[0].split.labels:
            dice = [_mean_dice(result, arm.slug, labels) for result in results]
            lines.append(_row(arm.slug, labels, number(float(np.mean(dice))), list(map(number, dice))))
    lines += ["", "## Dice above scratch, on the same cases and seeds", ""]
    lines += [f"| arm | labelled cases | mean, 95 % interval |{header}", f"|---|---|---|{'---|' * len(studies)}"]
    for (slug, labels), spread in found.items():
        lines.append(_row(slug, labels, with_interval(spread, "+"), [number(value, "+") for value in spread.repeats]))
    lines += ["", "## How this was measured", ""]
    reports = [
        (study.options.split, (study.folder / REPORT_FILE).relative_to(file.parent).as_posix()) for study in studies
    ]
    lines += [
        f"- Each split draws other test, validation and training patients, and has {pluralise(options.seeds, 'seed')}.",
        "- The interval is Student's, over the splits. It is widened as Nadeau and Bengio (2003) propose, because all splits "
        "draw from the same patients.",
        f"- Each split has its own report: {join_words(f'[{n}]({report})' for n, report in reports)}.",
    ]
    if studies[0].arms_left_out:
        lines.append(
            f"- The study has further arms, which failed or which its last command did not name: "
            f"{join_words(studies[0].arms_left_out)}."
        )
    text = "\n".join(lines) + "\n"
    atomic_write(file, lambda stream: stream.write(text.encode()))
    return sentence


def _row(arm: str, labels: int, mean: str, values: list[str]) -> str:
    return f"| {' | '.join([arm, str(labels), mean, *values])} |"


def _mean_dice(results: Results, arm: str, labels: int) -> float:
    values = results.groups[arm, labels].measures["dice"]
    return float(Resampling.whole(*values.shape[:2]).mean(values)[0])


def _verdict(found: dict[tuple[str, int], Estimate], splits: int) -> str:
    if not found:
        return f"Only {SCRATCH} was trained, so there is nothing to compare it with."
    words = {1: "better than scratch", -1: "worse than scratch", 0: "not distinguishable from scratch"}
    clauses = [
        f"{arm} with {labels} labelled cases is {words[spread.sign]} ({spread.value:+.3f} Dice)"
        for (arm, labels), spread in found.items()
    ]
    return f"Over {splits} splits, {'; '.join(clauses)}."
