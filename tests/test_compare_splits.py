"""The report over several splits: its values and its verdict."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from test_compare_report import fill_study
from test_compare_study import OPTIONS, PATIENTS, SPLIT

from nnunetv2_macl.compare import splits
from nnunetv2_macl.compare.report import differences, write_overview
from nnunetv2_macl.compare.report import write_report as write_report_of_one
from nnunetv2_macl.compare.results import Results
from nnunetv2_macl.compare.run import _check_labels
from nnunetv2_macl.compare.splits import spreads, write_report_over_splits
from nnunetv2_macl.compare.statistics import Estimate, student_interval
from nnunetv2_macl.compare.steps import DONE_FILE
from nnunetv2_macl.compare.study import Study
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.report import write_report
from nnunetv2_macl.report.study import describe_study


@pytest.fixture
def studies(tmp_path):
    made = []
    for number in range(3):
        study = Study(tmp_path / f"split_{number}", OPTIONS, SPLIT, PATIENTS).open()
        fill_study(study, gains={"pretrained": 0.02 + 0.03 * number})
        made.append(study)
    return made


def test_the_spread_has_the_difference_of_each_split(studies):
    results = [Results.read(study) for study in studies]
    found = spreads(results)
    for (arm, labels), spread in found.items():
        assert spread.repeats == tuple(differences(result)[arm][labels].value for result in results)
    pretrained = found["pretrained", SPLIT.labels[0]]
    assert np.allclose(np.diff(pretrained.repeats), 0.03, atol=1e-6)
    # wider than for independent values, because all splits draw from the same patients
    tested = len({PATIENTS[case] for case in SPLIT.test})
    others = len(set(PATIENTS.values())) - tested
    low, high = student_interval(pretrained.repeats)
    assert (pretrained.high - pretrained.low) / (high - low) == pytest.approx(math.sqrt(1 + 3 * tested / others))


def test_the_report_has_a_row_for_each_arm_and_number_of_labels(studies, tmp_path):
    sentence = write_report_over_splits(studies, tmp_path / "compare.md")
    text = (tmp_path / "compare.md").read_text()
    arms = {arm.slug for arm in studies[0].arms}
    rows = re.findall(r"^\| (\S+) \| (\d+) \|", text, re.M)
    above = {(arm, str(labels)) for arm in arms - {"scratch"} for labels in SPLIT.labels}
    assert sorted(rows) == sorted([*above, *((arm, str(n)) for arm in arms for n in SPLIT.labels)])
    assert sentence.splitlines()[0] in text


def test_splits_in_which_no_arm_learned_have_no_conclusion(studies, tmp_path):
    for study in studies:
        fill_study(study, gains=dict.fromkeys(("scratch", "encoder", "pretrained", "recipe-pcl"), -0.65))
    assert "No conclusion" in write_report_over_splits(studies, tmp_path / "compare.md")


def test_fractions_that_are_other_numbers_in_another_split_are_refused(studies):
    _check_labels(studies)
    other = replace(SPLIT, subsets=[{n + 1: cases for n, cases in subset.items()} for subset in SPLIT.subsets])
    with pytest.raises(UserError, match=f"--labels {min(SPLIT.labels)}"):
        _check_labels([*studies, replace(studies[0], split=other)])


def test_the_report_of_all_splits_is_one_page(studies, tmp_path):
    write_report_over_splits(studies, tmp_path / "compare.md")
    (studies[1].cell_folder(studies[1].cells[0]) / "done.json").unlink(missing_ok=True)
    values = describe_study(tmp_path)
    assert values["splits"] == 3 and values["cells"] == 3 * len(studies[0].cells)
    assert values["done"] + len(values["left"]) == values["cells"]
    assert any(cell.startswith("split_1/") for cell in values["left"])
    assert "split_2" in write_report(tmp_path).read_text()


def test_the_interval_over_splits_is_students():
    # by hand: mean 2, standard deviation 1, t with two degrees of freedom 4.3027
    low, high = student_interval([1.0, 2.0, 3.0])
    assert math.isclose(low, 2 - 4.302652729 / math.sqrt(3)) and math.isclose(high, 2 + 4.302652729 / math.sqrt(3))
    assert Estimate(2.0, low, high).sign == 0
    assert Estimate(1.0, *student_interval((0.9, 1.0, 1.1))).sign == 1
    assert Estimate(0.3, *student_interval((0.3,))).sign == 0


def test_splits_share_the_rules_of_one_split(studies, tmp_path, monkeypatch):
    """A page over splits says which pre-training has collapsed, and no verdict for very few patients."""
    arm = next(arm for arm in studies[1].arms if arm.slug == "recipe-pcl")
    done = studies[1].pretraining_folder(arm) / DONE_FILE
    done.write_text(json.dumps(json.loads(done.read_text()) | {"collapsed": "embeddings are equal"}))
    write_report_over_splits(studies, tmp_path / "compare.md")
    number = studies[1].options.split
    assert (
        f"recipe pcl of split {number} has collapsed:** embeddings are equal" in (tmp_path / "compare.md").read_text()
    )
    monkeypatch.setattr(splits, "FEWEST_PATIENTS", 100)
    assert "Too few to tell" in write_report_over_splits(studies, tmp_path / "compare.md")


def test_the_page_of_all_kinds_has_the_cautions_of_each(studies, tmp_path):
    study = studies[0]
    arm = next(arm for arm in study.arms if arm.slug == "recipe-pcl")
    done = study.pretraining_folder(arm) / DONE_FILE
    done.write_text(json.dumps(json.loads(done.read_text()) | {"collapsed": "embeddings are equal"}))
    write_report_of_one(study)
    write_overview([(study.options, study.folder / "compare.md")], tmp_path / "compare.md")
    text = (tmp_path / "compare.md").read_text()
    assert "has collapsed:** embeddings are equal" in text and "There are few seeds" in text
    assert f"({study.folder.name}/compare.png)" in text


def test_class_names_are_plain_text_in_a_table(studies):
    description = studies[0].raw / "dataset.json"
    content = json.loads(description.read_text())
    first = next(name for name in content["labels"] if name != "background")
    content["labels"] = {"a|b [c](d)" if name == first else name: value for name, value in content["labels"].items()}
    description.write_text(json.dumps(content))
    write_report_of_one(studies[0])
    assert "a|b [c](d) 0." in describe_study(studies[0].folder)["results"]
