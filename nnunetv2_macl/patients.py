"""Find the patient of a case in its name, and leave out the images of patients that a model is validated on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence, Set

from nnunetv2_macl.data import Case
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.nnunet import GROUP_VARIABLE


def patients_of(cases: Iterable[str], group_regex: str | None, option: str = "--group_regex") -> dict[str, str]:
    """Return the patient of each case.

    Args:
        cases: Names of cases.
        group_regex: Its first group, or its match, is the patient. None: each case is a patient.
        option: The option that sets ``group_regex``, for messages.

    Raises:
        UserError: The regular expression is invalid, or does not match a case. The message names the case.
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
                f"{option} '{group_regex}' finds no patient in the name {case}. Give an expression that matches every name: "
                "'^[^_]+' takes the text before the first _."
            )
        patients[case] = match[1] if pattern.groups else match[0]
    return patients


def group_regex() -> str | None:
    """Return the regular expression in the variable ``nnUNet_macl_group_regex``, or None."""
    return os.environ.get(GROUP_VARIABLE) or None


def patients_by_variable(cases: Iterable[str]) -> dict[str, str] | None:
    """Return the patient of each case by the variable ``nnUNet_macl_group_regex``, or None if it is not set.

    Raises:
        UserError: The regular expression is invalid, or does not match a case.
    """
    if (expression := group_regex()) is None:
        return None
    return patients_of(cases, expression, f"The variable {GROUP_VARIABLE}")


def of_other_patients(cases: Sequence[Case], held_out: Set[str]) -> list[Case]:
    """Return the cases that are of none of the patients of the held-out cases.

    The variable ``nnUNet_macl_group_regex`` says which part of a name is the patient. Without it, all cases are returned.

    Args:
        cases: Cases of any data set.
        held_out: Names of the cases that a model is validated on.

    Raises:
        UserError: The regular expression is invalid, or does not match a name.
    """
    patients = patients_by_variable([*(case.name for case in cases), *sorted(held_out)]) if held_out else None
    if patients is None:
        return list(cases)
    theirs = {patients[name] for name in held_out}
    return [case for case in cases if patients[case.name] not in theirs]
