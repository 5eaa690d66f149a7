"""Splits are disjoint, nested and reproducible, and contain whole patients."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nnunetv2_macl.compare.split import number_of_cases, split_cases
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.patients import patients_of


@st.composite
def cohorts(draw):
    """Draw patients with one to four cases each."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=12, max_size=40))
    return {f"p{p:02d}_t{t}": f"p{p:02d}" for p, size in enumerate(sizes) for t in range(size)}


@settings(max_examples=60, deadline=None)
@given(cohorts(), st.integers(1, 4), st.integers(1, 3), st.sampled_from(["20%", "0.3", "3"]))
def test_splits_are_disjoint_nested_reproducible_and_of_whole_patients(patients, fewest, seeds, test):
    options = dict(test=test, validation="10%", labels=[str(fewest + 8), str(fewest)], seeds=seeds)
    try:
        split = split_cases(patients, **options)
    except UserError:
        assume(False)
    assert split == split_cases(dict(reversed(patients.items())), **options)
    assert split.labels == [fewest, fewest + 8]
    assert len(split.test) >= number_of_cases(test, len(patients), "--test")
    for subset in split.subsets:
        few, more = subset[fewest], subset[fewest + 8]
        assert set(few) < set(more) and fewest <= len(few) < fewest + 4
        whole = [set(split.test), set(split.validation), set(more)]
        for number, cases in enumerate(whole):
            mine = {patients[case] for case in cases}
            assert {case for case in patients if patients[case] in mine} == cases, "a patient was divided"
            assert all(mine.isdisjoint({patients[c] for c in other}) for other in whole[number + 1 :])


def test_seeds_draw_other_labelled_cases_and_the_same_test_cases():
    patients = {f"c{n}": f"c{n}" for n in range(40)}
    split = split_cases(patients, test="25%", validation="10%", labels=["5"], seeds=4)
    assert (len(split.test), len(split.validation)) == (10, 4)
    assert len({tuple(subset[5]) for subset in split.subsets}) == 4
    assert split.test == split_cases(patients, test="25%", validation="10%", labels=["8"], seeds=1).test


@pytest.mark.parametrize(
    "amount, number", [("5", 5), ("0.1", 4), ("10%", 4), (" 1e1 ", 10), ("0.001", 1), ("1", 1), ("2.5%", 1)]
)
def test_amounts_are_numbers_or_parts_of_all_cases(amount, number):
    assert number_of_cases(amount, 40, "--labels") == number


@pytest.mark.parametrize("amount", ["0", "-3", "1.0", "1.5", "0%", "101%", "150%", "many", "", "nan", "inf"])
def test_invalid_amounts_are_refused(amount):
    with pytest.raises(UserError, match=f"--labels .*got '{amount}'"):
        number_of_cases(amount, 40, "--labels")


def test_a_regular_expression_finds_patients():
    cases = ["patient01_frame1", "patient01_frame9", "patient02_frame1"]
    assert patients_of(cases, r"^patient\d+")["patient01_frame9"] == "patient01"
    assert patients_of(cases, r"^patient(\d+)_")["patient02_frame1"] == "02"
    assert patients_of(cases, None) == {case: case for case in cases}
    with pytest.raises(UserError, match=r"--group_regex .*case_1"):
        patients_of([*cases, "case_1"], r"^patient\d+")
    with pytest.raises(UserError, match=r"--group_regex '\('"):
        patients_of(cases, "(")


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(labels=["20"]), ["--labels 20", "only 13 are left", "5 for test", "2 for validation"]),
        (dict(test="30"), ["--test 30", "only 20 are left"]),
        (dict(validation="17"), ["--validation 17", "only 15 are left"]),
        (dict(labels=["4", "30%"]), ["--labels 4 and 30%", "both 4 of 13"]),
    ],
)
def test_too_few_cases_are_refused(options, words):
    patients = {f"c{n}": f"c{n}" for n in range(20)}
    with pytest.raises(UserError) as error:
        split_cases(patients, **(dict(test="25%", validation="10%", labels=["5"], seeds=1) | options))
    assert all(word in str(error.value) for word in words), error.value


def test_numbers_of_labels_that_draw_the_same_patients_are_refused():
    patients = {f"p{p}_t{t}": f"p{p}" for p in range(10) for t in range(4)}
    with pytest.raises(UserError, match="--labels 5 and 6"):
        split_cases(patients, test="4", validation="4", labels=["5", "6"], seeds=1)
    # the same patients in some draws only are accepted, because more seeds must not make a study invalid
    sizes = {f"p{p}_t{t}": f"p{p}" for p in range(10) for t in range(2 + p % 2)}
    split = split_cases(sizes, test="4", validation="4", labels=["5", "6"], seeds=8)
    numbers = [[len(cases) for cases in subset.values()] for subset in split.subsets]
    assert {fewer == more for fewer, more in numbers} == {True, False}


def test_splits_draw_other_patients_and_split_0_is_the_default():
    patients = {f"p{n // 2:02d}_t{n % 2}": f"p{n // 2:02d}" for n in range(80)}
    options = dict(test="20", validation="8", labels=["8"], seeds=2)
    splits = [split_cases(patients, **options, number=number) for number in range(3)]
    assert splits[0] == split_cases(patients, **options)
    tested = [{patients[case] for case in split.test} for split in splits]
    assert tested[0] != tested[1] != tested[2] != tested[0]
    for split in splits:
        used = [*split.test, *split.validation, *split.subsets[0][8]]
        assert len({patients[case] for case in used}) * 2 == len(used), "a patient is in two parts"
