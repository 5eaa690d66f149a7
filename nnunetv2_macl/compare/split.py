"""Who is tested on, who is validated on, and whose labels are used: always whole patients, drawn from a seed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nnunetv2_macl.errors import UserError

# the seed of nnU-Net's own splits
SPLIT_SEED = 12345


@dataclass(frozen=True)
class Split:
    """Cases by their use."""

    test: list[str]  # neither pre-training nor fine-tuning touches these or other images of their patients
    validation: list[str]  # for the choice of the learning rate and the curves; not pre-trained on either
    # ``subsets[seed][labels]`` are the labelled cases; those of fewer labels are among those of more
    subsets: list[dict[int, list[str]]]

    @property
    def labels(self) -> list[int]:
        return list(self.subsets[0])


def patients_of(cases: Iterable[str], group_regex: str | None, option: str = "--group_regex") -> dict[str, str]:
    """Return the patient of each case: the first group of ``group_regex``, or all that it matches. None: each case its own.

    Raises:
        UserError: The regular expression is wrong, or does not match a case; names it.
    """
    if group_regex is None:
        return {case: case for case in cases}
    try:
        pattern = re.compile(group_regex)
    except re.error as error:
        raise UserError(f"{option} '{group_regex}' is no regular expression: {error}. Correct it.") from None
    patients = {}
    for case in cases:
        match = pattern.search(case)
        if match is None or not (match[1] if pattern.groups else match[0]):
            raise UserError(
                f"{option} '{group_regex}' finds no patient in the name of case {case}. Give one that does for each case: "
                "'^[^_]+' takes what stands before the first _. Leave it out where each case is a patient."
            )
        patients[case] = match[1] if pattern.groups else match[0]
    return patients


def number_of_cases(amount: str, total: int, option: str) -> int:
    """Return a number of cases, given as such (``5``) or as a part of the total (``0.1``, ``10%``, ``100%``) to an ``option``.

    Raises:
        UserError: The amount is neither a whole number from 1, nor a fraction between 0 and 1, nor a percentage up to 100.
    """
    text = amount.strip()
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = np.nan
    if text.endswith("%"):
        value /= 100
        fraction = 0 < value <= 1
        whole = False
    else:
        fraction = 0 < value < 1
        whole = value >= 1 and value.is_integer()
    if not (fraction or whole):
        raise UserError(
            f"{option} must be a number of cases from 1, a fraction between 0 and 1, or a percentage up to 100%, got '{amount}'."
        )
    return int(value) if whole else max(1, round(value * total))


def split_cases(
    patients: Mapping[str, str], *, test: str, validation: str, labels: Sequence[str], seeds: int, number: int = 0
) -> Split:
    """Draw the split. Whole patients are taken until there are as many cases as asked for, so there may be a few more.

    Args:
        patients: Patient of each case.
        test, validation: Amounts, see `number_of_cases`; fractions are of all cases.
        labels: Amounts; fractions are of the cases that are neither for test nor for validation.
        seeds: Number of draws of labelled cases.
        number: Of the split. Each number draws other patients.

    Raises:
        UserError: There are too few cases, or two of ``labels`` are the same number.
    """
    by_patient: dict[str, list[str]] = {}
    for case in sorted(patients):
        by_patient.setdefault(patients[case], []).append(case)

    def shuffled(names: Sequence[str], *seed: int) -> list[str]:
        return [str(name) for name in np.random.default_rng((SPLIT_SEED, *seed)).permutation(list(names))]

    def take(order: Sequence[str], wanted: int, why: str) -> list[str]:
        taken: list[str] = []
        for patient in order:
            if len(taken) >= wanted:
                break
            taken += by_patient[patient]
        if len(taken) < wanted:
            raise UserError(f"{why}, and only {len(taken)} are left. Ask for less, or add cases.")
        return taken

    # the first split has the seed that studies of one split always had
    order = shuffled(list(by_patient), *((2, number) if number else ()))
    count = number_of_cases(test, len(patients), "--test")
    tested = take(order, count, f"--test {test} is {count} of {len(patients)} cases")
    order = [patient for patient in order if by_patient[patient][0] not in tested]
    count = number_of_cases(validation, len(patients), "--validation")
    validated = take(order, count, f"--validation {validation} is {count} of {len(patients)} cases")
    order = [patient for patient in order if by_patient[patient][0] not in validated]

    left = sum(len(by_patient[patient]) for patient in order)
    used_otherwise = f"beside {len(tested)} for test and {len(validated)} for validation"
    counts: dict[int, str] = {}
    for amount in labels:
        count = number_of_cases(amount, left, "--labels")
        if count in counts:
            raise UserError(f"--labels {counts[count]} and {amount} are both {count} of {left} cases. Leave one out.")
        counts[count] = amount
    subsets = []
    for seed in range(seeds):
        drawn = shuffled(order, 1, seed)
        subsets.append(
            {
                count: take(drawn, count, f"--labels {counts[count]} is {count} cases {used_otherwise}")
                for count in sorted(counts)
            }
        )
    for fewer, more in zip(sorted(counts), sorted(counts)[1:], strict=False):
        # in one draw they may: another seed, added later, cannot take back what the study began with
        if all(len(subset[fewer]) == len(subset[more]) for subset in subsets):
            raise UserError(
                f"--labels {counts[fewer]} and {counts[more]} come to the same patients, as whole patients are taken. "
                "Leave one out."
            )
    return Split(tested, validated, subsets)
