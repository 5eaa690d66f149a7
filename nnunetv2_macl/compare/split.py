"""Draw the test cases, the validation cases and the labelled cases: always whole patients, from a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nnunetv2_macl.errors import UserError

# nnU-Net uses this seed for its own splits
SPLIT_SEED = 12345


@dataclass(frozen=True)
class Split:
    """The test cases, the validation cases and the labelled cases of a study."""

    test: list[str]  # neither pre-training nor fine-tuning uses these or other images of their patients
    validation: list[str]  # select the learning rate and give the curves; pre-training does not use them either
    # ``subsets[seed][labels]`` are the labelled cases; a smaller subset is part of the larger ones of its seed
    subsets: list[dict[int, list[str]]]

    @property
    def labels(self) -> list[int]:
        return list(self.subsets[0])


def number_of_cases(amount: str, total: int, option: str) -> int:
    """Return a number of cases.

    Args:
        amount: A number (``5``) or a part of the total (``0.1``, ``10%``, ``100%``).
        total: Number of all cases.
        option: The option that sets ``amount``, for messages.

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
        # 1.0 may be meant as all cases, so it is refused
        whole = value >= 1 and value.is_integer() and "." not in text
    if not (fraction or whole):
        raise UserError(
            f"{option} must be a number of cases from 1, a fraction between 0 and 1, or a percentage up to 100%, got '{amount}'."
        )
    return int(value) if whole else max(1, round(value * total))


def split_cases(
    patients: Mapping[str, str], *, test: str, validation: str, labels: Sequence[str], seeds: int, number: int = 0
) -> Split:
    """Draw the split. Whole patients are drawn until the amount is reached, so a part may have a few more cases.

    Args:
        patients: Patient of each case.
        test, validation: Amounts, see `number_of_cases`. Fractions are of all cases.
        labels: Amounts. Fractions are of the cases that are neither for test nor for validation.
        seeds: Number of draws of labelled cases.
        number: Index of the split. Each index draws other patients.

    Raises:
        UserError: There are too few cases, or two of ``labels`` give the same number or the same patients.
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
            raise UserError(f"{why}, but only {len(taken)} are left. Ask for fewer, or add cases.")
        return taken

    # split 0 keeps the seed of earlier versions, which had one split
    order = shuffled(list(by_patient), *((2, number) if number else ()))
    count = number_of_cases(test, len(patients), "--test")
    tested = take(order, count, f"--test {test} is {count} of {len(patients)} cases")
    order = [patient for patient in order if by_patient[patient][0] not in tested]
    count = number_of_cases(validation, len(patients), "--validation")
    validated = take(order, count, f"--validation {validation} is {count} of {len(patients)} cases")
    order = [patient for patient in order if by_patient[patient][0] not in validated]

    left = sum(len(by_patient[patient]) for patient in order)
    used_otherwise = f"in addition to {len(tested)} for test and {len(validated)} for validation"
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
        # equal sizes in some draws are allowed, because a seed that is added later must not make a study invalid
        if all(len(subset[fewer]) == len(subset[more]) for subset in subsets):
            raise UserError(
                f"--labels {counts[fewer]} and {counts[more]} draw the same patients, because whole patients are drawn. "
                "Leave one out."
            )
    return Split(tested, validated, subsets)
