"""From the cells' results to the report: choice of the learning rate, undefined values, tables and figure."""

import csv
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from test_compare_study import OPTIONS, PATIENTS, SPLIT

from nnunetv2_macl.compare.report import differences, write_report
from nnunetv2_macl.compare.results import Results
from nnunetv2_macl.compare.steps import DONE_FILE
from nnunetv2_macl.compare.study import RESULT_FILE, Study
from nnunetv2_macl.report.study import describe_study
from nnunetv2_macl.training.run_folder import write_cases

EPOCHS = [1, 3, 5]
# gain in Dice on the test cases; the rate 0.01 is better on the test cases, and 0.001 on the validation cases
GAIN = {"scratch": 0.0, "encoder": 0.0, "pretrained": 0.08, "recipe-pcl": -0.2}


def write(content, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def fill_study(study, gains):
    """Write made-up results of each cell. The first test case lacks class 2, but scratch and encoder predict it there."""
    gains = GAIN | gains
    write({"labels": {"background": 0, "heart": 1, "lung": 2}}, study.raw / "dataset.json")
    write({"seconds": 9, "planner": "ExperimentPlanner", "unlabelled": 7}, study.planning_folder / DONE_FILE)
    for arm in study.pretrainings:
        write({"seconds": 3600}, study.pretraining_folder(arm) / DONE_FILE)
    for cell in study.cells:
        rng = np.random.default_rng(cell.seed)
        noise = np.random.default_rng(list(GAIN).index(cell.arm)).normal(0, 0.004, 100)
        better = cell.rate == 1e-3
        level = 0.6 + 0.02 * cell.labels + gains[cell.arm]
        rows = []
        for number, case in enumerate(SPLIT.test):
            for label in ("1", "2"):
                dice = level + rng.normal(0, 0.05) + noise[number] + (0.05 if not better else 0)
                row = {"case": case, "label": label, "dice": dice, "hd95": 10 * (1 - dice), "asd": 3 * (1 - dice)}
                if number == 0 and label == "2":
                    row |= {"dice": 0.0 if cell.arm in ("scratch", "encoder") else None, "hd95": None, "asd": None}
                rows.append(row)
        curve = {
            str(epoch): [[level * (1 - 1 / (2 * epoch)) - 0.1 * (not better)] * 2 for _ in SPLIT.validation]
            for epoch in EPOCHS
        }
        write({"test": rows, "curve": curve, "epoch_seconds": 30.0}, study.cell_folder(cell) / RESULT_FILE)


@pytest.fixture
def study(tmp_path):
    study = Study(tmp_path / "study", OPTIONS, SPLIT, PATIENTS).open()
    fill_study(study, {})
    return study


def test_the_rate_is_chosen_on_the_validation_cases(study):
    results = Results.read(study)
    assert {group.rate for group in results.groups.values()} == {1e-3}
    assert results.classes == ["heart", "lung"] and results.curve_epochs == EPOCHS
    group = results.groups["pretrained", 3]
    assert group.measures["dice"].shape == (2, len(SPLIT.test), 2) and group.curve.shape == (3, 2, 4, 2)
    assert math.isnan(group.measures["dice"][0, 0, 1])
    assert results.groups["scratch", 3].measures["dice"][0, 0, 1] == 0


def test_differences_have_the_sign_of_the_true_gain(study):
    found = differences(Results.read(study))
    assert {arm: {d.sign for d in by_labels.values()} for arm, by_labels in found.items()} == {
        "encoder": {0},
        "pretrained": {1},
        "recipe-pcl": {-1},
    }
    # the gain is 0.08, plus the effect of the class that scratch predicts by mistake
    assert 0.08 < found["pretrained"][3].value < 0.14


def test_the_verdict_does_not_count_patients_without_a_dice(study):
    assert "pretrained is better" in write_report(study)
    for cell in study.cells:
        file = study.cell_folder(cell) / RESULT_FILE
        content = json.loads(file.read_text())
        for row in content["test"][8:] if cell.arm == "pretrained" else []:
            row["dice"] = None
        write(content, file)
    sentence = write_report(study)
    assert "4 test patients" in sentence and "better" not in sentence


def test_validation_cases_are_resampled_by_patient_in_the_order_of_the_curves(study):
    """nnU-Net sorts cases by name, but the split is in random order."""
    order = sorted(SPLIT.validation)
    assert order != SPLIT.validation
    patients = {case: "twin" if case in (order[0], order[-1]) else case for case in PATIENTS}
    results = Results.read(replace(study, patients=patients))
    drawn = results.validation_bootstrap.cases
    assert (drawn[:, 0] == drawn[:, -1]).all() and (drawn[:, 0] != drawn[:, 1]).any()


def test_the_report_has_verdict_tables_and_figure(study):
    sentence = write_report(study)
    assert (
        "pretrained is better than scratch" in sentence
        and "recipe-pcl is worse" in sentence
        and "encoder is not" in sentence
    )
    text = (study.folder / "compare.md").read_text()
    assert sentence.partition("\n")[0] in text
    # without --group_regex the patients are unknown
    assert "--group_regex" in text and "test or validation patient" not in text
    tables = {
        title: table.split("\n\n")[0] for title, _, table in (part.partition("\n\n") for part in text.split("## "))
    }
    rows = {
        row.split("|")[1].strip(): row for row in tables["Learning rate, chosen on the validation cases"].splitlines()
    }
    assert rows["pretrained"].split("|")[2:4] == [" 0.001 ", " 0.001 "]
    reached = {
        row.split("|")[1].strip(): row.split("|")[2].strip()
        for row in next(table for title, table in tables.items() if title.startswith("Epochs until")).splitlines()
    }
    assert reached["scratch"].startswith("5 (5 to 5)") and reached["pretrained"].startswith("3 (3 to 3), 90 s")
    assert reached["recipe-pcl"] == "never"
    assert "2 of 40 not defined" in tables["HD95 in mm on 10 test cases"]
    assert "+0.1" in tables["Dice above scratch, on the same cases and seeds"]
    assert "few seeds" in text and re.search("33 images .* 7 of them from imagesUn", text)
    assert (study.folder / "compare.png").stat().st_size > 20_000
    assert "collapsed" not in text


def test_collapsed_pre_trainings_and_the_images_that_were_seen_are_named(study):
    arm = next(arm for arm in study.arms if arm.slug == "recipe-pcl")
    write({"seconds": 60, "collapsed": "embeddings are equal"}, study.pretraining_folder(arm) / DONE_FILE)
    run = study.pretraining_run(arm)
    run.mkdir(parents=True)
    write_cases(run, [(OPTIONS.dataset, case) for case in (*list(PATIENTS)[:3], "new_1", "new_2")], resumed=False)
    write_report(study)
    text = (study.folder / "compare.md").read_text()
    assert "recipe pcl has collapsed:** embeddings are equal" in text
    assert "5 images without their labels, 2 of them from imagesUn (pcl)" in text


def test_a_study_whose_picture_is_missing_has_a_page(study):
    write_report(study)
    assert "data:image/png" in describe_study(study.folder)["results"]
    (study.folder / "compare.png").unlink()
    assert "picture is missing" in describe_study(study.folder)["results"]

    with (study.folder / "compare.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(study.cells) * len(SPLIT.test) * 2
    assert {row["chosen"] for row in rows if row["rate"] == "0.001"} == {"1"}
    assert {row["chosen"] for row in rows if row["rate"] == "0.01"} == {"0"}
    empty = [row for row in rows if not row["dice"]]
    assert {(row["case"], row["class"]) for row in empty} == {(SPLIT.test[0], "lung")}
    assert {row["arm"] for row in empty} == {"pretrained", "recipe-pcl"}
