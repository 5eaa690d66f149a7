"""A study's folder keeps its options, and each step runs once, in whichever process."""

import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import psutil
import pytest

from nnunetv2_macl import checkpoints
from nnunetv2_macl.checkpoints import ENCODER_FILE, NETWORK_FILE
from nnunetv2_macl.cli.compare import _compare_parser
from nnunetv2_macl.compare.folders import (
    RawImages,
    _labelled_files,
    _link,
    _state,
    check_labelled,
    link_unlabelled,
    planner,
    run_command,
)
from nnunetv2_macl.compare.run import _check_folder, _Work
from nnunetv2_macl.compare.split import split_cases
from nnunetv2_macl.compare.steps import DONE_FILE, StepError, Task, run_steps
from nnunetv2_macl.compare.stopping import ended_by_sigterm
from nnunetv2_macl.compare.study import Options, Study, options_by_finetuning, parse_arm, study_folders
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import resource_folder
from nnunetv2_macl.nnunet import GROUP_VARIABLE

PATIENTS = {f"c{n:02d}": f"c{n:02d}" for n in range(40)}
OPTIONS = Options(
    dataset="Dataset901_Generated", configuration="2d", plans="nnUNetPlans",
    arms=["scratch", "encoder", "pretrained", "recipe:pcl"],
    labels=["3", "6"], seeds=2, rates=[1e-2, 1e-3], test="25%", validation="10%", group_regex=None, epochs=5, iterations=4,
    batch_size=None, pretrain_epochs=None, pretrain_iterations=None, pretrain_batch_size=None, disable_tta=False,
)  # fmt: skip
IMAGES = RawImages({}, {}, {})
SPLIT = split_cases(PATIENTS, test="25%", validation="10%", labels=["3", "6"], seeds=2)


def test_reading_a_study_returns_what_was_written(tmp_path):
    begun = Study(tmp_path / "study", OPTIONS, SPLIT, PATIENTS).open()
    assert begun == Study.read(tmp_path / "study") == Study(tmp_path / "study", OPTIONS, SPLIT, PATIENTS).open()
    assert len(begun.cells) == 4 * 2 * 2 * 2 and len({cell.name for cell in begun.cells}) == len(begun.cells)
    for cell in begun.cells:
        split = begun.splits[begun.fold(cell)]
        assert split == {"train": SPLIT.subsets[cell.seed][cell.labels], "val": SPLIT.validation}
    assert not set(SPLIT.test) & {case for split in begun.splits for cases in split.values() for case in cases}


def test_adding_arms_and_seeds_keeps_the_earlier_draws(tmp_path):
    begun = Study(tmp_path, OPTIONS, SPLIT, PATIENTS).open()
    begun.write_splits()
    more = replace(OPTIONS, seeds=4, arms=[*OPTIONS.arms, "recipe:paper"])
    split = split_cases(PATIENTS, test="25%", validation="10%", labels=["3", "6"], seeds=4)
    grown = Study(tmp_path, more, split, PATIENTS).open()
    assert grown == Study.read(tmp_path) and len(grown.cells) == 5 * 4 * 2 * 2
    grown.write_splits()
    assert json.loads(grown.splits_file.read_text()) == grown.splits and grown.splits[:4] == begun.splits
    assert {cell: begun.fold(cell) for cell in begun.cells} == {cell: grown.fold(cell) for cell in begun.cells}
    with pytest.raises(UserError, match=r"--seeds 2 \(was 4\)"):
        Study(tmp_path, replace(more, seeds=2), SPLIT, PATIENTS).open()


def test_arms_that_a_command_leaves_out_stay_in_the_folder(tmp_path):
    Study(tmp_path, OPTIONS, SPLIT, PATIENTS).open()
    fewer = Study(tmp_path, replace(OPTIONS, arms=["scratch", "recipe:paper", "encoder"]), SPLIT, PATIENTS).open()
    assert {cell.arm for cell in fewer.cells} == {"scratch", "recipe-paper", "encoder"}
    assert fewer.arms_left_out == ["pretrained", "recipe:pcl"]
    assert Study.read(tmp_path).options.arms == [*OPTIONS.arms, "recipe:paper"]
    # a file with the name of an arm in the folder would overwrite its cells
    (tmp_path / "pcl.json").write_text('{"inherits_from": "macl"}')
    with pytest.raises(UserError, match="two arms have the name recipe-pcl"):
        Study(tmp_path, replace(OPTIONS, arms=["scratch", f"recipe:{tmp_path / 'pcl.json'}"]), SPLIT, PATIENTS).open()


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(epochs=9), "--epochs 9 (was 5)"),
        (dict(batch_size=4), "-batch_size 4 (was None)"),
        (dict(rates=[1e-2]), "--rates 0.01 (was 0.01 0.001)"),
        (dict(configuration="3d_fullres", seeds=1), "-c 3d_fullres (was 2d), --seeds 1 (was 2)"),
    ],
)
def test_the_error_names_options_that_changed(tmp_path, change, words):
    Study(tmp_path, OPTIONS, SPLIT, PATIENTS).open()
    with pytest.raises(UserError) as error:
        Study(tmp_path, replace(OPTIONS, **change), SPLIT, PATIENTS).open()
    assert words in str(error.value) and "-o FOLDER" in str(error.value)


def test_kinds_of_fine_tuning_differ_only_in_their_length_and_rates():
    others = {k: v for k, v in asdict(OPTIONS).items() if k not in ("finetuning", "epochs", "iterations", "rates")}
    short, long = options_by_finetuning(["adamw", "sgd"], **others)
    assert replace(short, finetuning="sgd", epochs=100, iterations=250, rates=[1e-2, 1e-3]) == long
    trainers = runpy.run_path(str(resource_folder("trainers") / "nnUNetTrainerMACL.py"))
    trainer = trainers["nnUNetTrainerMACL_short"]
    assert (short.finetuning, short.rates) == (trainer.finetuning_optimizer, [trainer.finetuning_lr])
    assert (short.epochs, short.iterations) == (trainer.finetuning_epochs, trainer.finetuning_iterations)
    long, short = options_by_finetuning(["sgd", "adamw"], epochs=[4, 2], iterations=[3, 1], **others)
    assert (long.epochs, long.iterations, short.epochs, short.iterations) == (4, 3, 2, 1)
    for of_all in options_by_finetuning(["sgd", "adamw"], epochs=[1], iterations=[2], rates=[1e-2], **others):
        assert (of_all.epochs, of_all.iterations, of_all.rates) == (1, 2, [1e-2])
    for wrong in (dict(epochs=[]), dict(iterations=[1, 2, 3])):
        with pytest.raises(UserError, match=f"--{next(iter(wrong))}.*--finetuning sgd"):
            options_by_finetuning(["sgd", "adamw"], **wrong, **others)
    with pytest.raises(UserError, match="twice"):
        options_by_finetuning(["sgd", "sgd"], **others)


def test_kinds_of_fine_tuning_share_images_and_pre_trainings(tmp_path):
    studies = [
        Study(tmp_path / kind, replace(OPTIONS, finetuning=kind), SPLIT, PATIENTS, shares=True).open()
        for kind in ("adamw", "sgd")
    ]
    assert [Study.read(tmp_path / kind) for kind in ("adamw", "sgd")] == studies
    assert study_folders(tmp_path) == [tmp_path / "adamw", tmp_path / "sgd"]
    for shared in ("raw", "preprocessed", "planning_folder"):
        assert getattr(studies[0], shared) == getattr(studies[1], shared)
    arm = studies[0].pretrainings[0]
    assert studies[0].pretraining_run(arm) == studies[1].pretraining_run(arm)
    assert studies[0].cell_folder(studies[0].cells[0]) != studies[1].cell_folder(studies[1].cells[0])


def test_a_failed_step_names_the_users_image_and_not_the_link_of_the_study(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "/users/raw")
    code = (
        "import os, sys; sys.exit(f'{os.environ[\"nnUNet_raw\"]}/Dataset901_A/imagesUn/a_0000.nii.gz cannot be used')"
    )
    with pytest.raises(StepError, match=r"\n/users/raw/Dataset901_A/imagesUn/a_0000\.nii\.gz cannot"):
        run_command([sys.executable, "-c", code], {"nnUNet_raw": f"{tmp_path}/nnUNet_raw"}, tmp_path / "log.txt")


@pytest.mark.parametrize("splits, shares", [(2, False), (1, True), (2, True)])
def test_a_folder_with_another_kind_of_study_is_refused(tmp_path, splits, shares):
    def check(folder):
        _check_folder(folder, [folder / f"split_{n}" for n in range(splits)] if splits > 1 else [folder], shares)

    check(tmp_path)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match="not empty"):
        check(tmp_path)
    Study(tmp_path / "one", OPTIONS, SPLIT, PATIENTS).open()
    with pytest.raises(UserError, match="--finetuning sgd"):
        check(tmp_path / "one")
    Study(tmp_path / "splits" / "split_0", OPTIONS, SPLIT, PATIENTS).open()
    if shares and splits > 1:
        with pytest.raises(UserError, match="--finetuning sgd"):
            check(tmp_path / "splits")


def test_a_further_kind_of_fine_tuning_needs_the_options_of_the_pre_trainings(tmp_path):
    short, long = replace(OPTIONS, finetuning="adamw"), replace(OPTIONS, epochs=9)
    Study(tmp_path / "adamw", short, SPLIT, PATIENTS, shares=True).open()
    with pytest.raises(UserError, match=r"--pretrain_epochs 7 \(was None\)"):
        Study(tmp_path / "sgd", replace(long, pretrain_epochs=7), SPLIT, PATIENTS, shares=True).open()
    Study(tmp_path / "sgd", long, SPLIT, PATIENTS, shares=True).open(check_only=True)
    assert not (tmp_path / "sgd").exists()
    Study(tmp_path / "sgd", long, SPLIT, PATIENTS, shares=True).open()
    more = replace(short, seeds=4), split_cases(PATIENTS, test="25%", validation="10%", labels=["3", "6"], seeds=4)
    Study(tmp_path / "adamw", *more, PATIENTS, shares=True).open(check_only=True)
    assert Study.read(tmp_path / "adamw").options.seeds == 2
    grown = Study(tmp_path / "adamw", *more, PATIENTS, shares=True).open()
    grown.write_splits()
    Study.read(tmp_path / "sgd").write_splits()
    assert json.loads(grown.splits_file.read_text()) == grown.splits


def test_a_further_kind_of_fine_tuning_needs_the_files_of_the_pre_trainings(tmp_path):
    """Otherwise the weights of one recipe would be reported as those of another."""
    recipe = tmp_path / "mine.json"
    recipe.write_text('{"inherits_from": "restore"}')
    short = replace(OPTIONS, finetuning="adamw", arms=["scratch", f"recipe:{recipe}"])
    folder = tmp_path / "study"
    Study(folder / "adamw", short, SPLIT, PATIENTS, shares=True).open()
    recipe.write_text('{"inherits_from": "restore", "learning_rate": 0.5}')
    with pytest.raises(UserError, match=r"the file .*mine\.json"):
        Study(folder / "sgd", replace(short, finetuning="sgd"), SPLIT, PATIENTS, shares=True).open()
    other = tmp_path / "elsewhere" / "mine.json"
    other.parent.mkdir()
    other.write_text('{"inherits_from": "pcl"}')
    recipe.write_text('{"inherits_from": "restore"}')
    with pytest.raises(UserError, match="mine"):
        Study(
            folder / "sgd",
            replace(short, finetuning="sgd", arms=["scratch", f"recipe:{other}"]),
            SPLIT,
            PATIENTS,
            shares=True,
        ).open()


def test_processes_that_begin_a_study_at_once_share_it(tmp_path):
    for trial in range(20):
        opened, start = [], threading.Barrier(4)

        def begin(folder=tmp_path / str(trial), opened=opened, start=start):
            start.wait()
            opened.append(Study(folder, OPTIONS, SPLIT, PATIENTS).open())

        threads = [threading.Thread(target=begin) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(opened) == 4
        assert [path.name for path in (tmp_path / str(trial)).iterdir()] == ["study.json"]


@pytest.mark.parametrize("links", [True, False])
def test_a_repaired_image_replaces_the_old_one(tmp_path, monkeypatch, links):
    if not links:  # os.link fails across disks
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError()))
    image, of_the_study = tmp_path / "case.nii.gz", tmp_path / "study" / "case.nii.gz"
    for content in (b"damaged", b"repaired"):
        (tmp_path / "new").write_bytes(content)
        (tmp_path / "new").replace(image)
        _link(image, of_the_study, "case")
        assert of_the_study.read_bytes() == content


def test_a_copied_image_is_copied_once_and_keeps_its_time(tmp_path, monkeypatch):
    """An unlabelled image with another time would be preprocessed again."""
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError()))
    image, copy = tmp_path / "case.nii.gz", tmp_path / "study" / "case.nii.gz"
    image.write_bytes(b"image")
    os.utime(image, (1e9, 1e9))
    _link(image, copy, "case")
    first = copy.stat()
    _link(image, copy, "case")
    assert copy.stat().st_ino == first.st_ino and copy.stat().st_mtime == 1e9


def test_files_that_another_process_is_writing_stay(tmp_path):
    study, image = Study(tmp_path / "study", OPTIONS, SPLIT, PATIENTS), tmp_path / "a_0000.tif"
    image.write_text("image")
    unfinished = study.raw / "imagesUn" / ".b_0000.tif.xyz.tmp"
    unfinished.parent.mkdir(parents=True)
    unfinished.touch()
    link_unlabelled(study, RawImages({}, {"a": [str(image)]}, {}))
    assert sorted(path.name for path in unfinished.parent.iterdir()) == [unfinished.name, image.name]


def test_the_variable_of_the_patients_is_that_of_the_study(tmp_path, monkeypatch):
    monkeypatch.setenv(GROUP_VARIABLE, "^other")
    study = Study(tmp_path, OPTIONS, SPLIT, PATIENTS)
    assert study.environment(tmp_path)[GROUP_VARIABLE] == ""
    study = replace(study, options=replace(OPTIONS, group_regex="^p"))
    assert study.environment(tmp_path)[GROUP_VARIABLE] == "^p"


def test_a_label_that_has_changed_since_the_planning_is_named(tmp_path):
    study, image, label = (
        Study(tmp_path / "study", OPTIONS, SPLIT, PATIENTS),
        tmp_path / "a_0000.tif",
        tmp_path / "a.tif",
    )
    for file in (image, label):
        file.write_text("first")
    images = RawImages({"a": {"images": [str(image)], "label": str(label)}}, {}, {})
    study.planning_folder.mkdir(parents=True)
    done = {"labelled_files": {name: _state(file) for name, file in _labelled_files(images).items()}}
    (study.planning_folder / "done.json").write_text(json.dumps(done))
    check_labelled(study, images)
    os.utime(label, (1e9, 1e9))  # for example a copy of the data set
    check_labelled(study, images)
    label.write_text("other")
    with pytest.raises(UserError, match=r"a\.tif has changed .*-o FOLDER"):
        check_labelled(study, images)


def test_the_study_follows_changes_of_the_unlabelled_images(tmp_path):
    """One image is corrected, one removed, one added. A spacing file is linked and removed with its image."""
    study, images = Study(tmp_path / "study", OPTIONS, SPLIT, PATIENTS), tmp_path / "imagesUn"
    images.mkdir()

    def follow(*files):
        cases = {file[: -len("_0000.tif")]: [str(images / file)] for file in files}
        link_unlabelled(study, RawImages({}, cases, {}))
        return {path.name: path.read_text() for path in (study.raw / "imagesUn").iterdir()}

    for name in ("a_0000.tif", "b_0000.tif", "b.json"):
        (images / name).write_text("first")
    assert follow("a_0000.tif", "b_0000.tif") == {"a_0000.tif": "first", "b_0000.tif": "first", "b.json": "first"}
    (images / "a_0000.tif").unlink()
    (images / "a_0000.tif").write_text("corrected")
    (images / "c_0000.tif").write_text("new")
    assert follow("a_0000.tif", "c_0000.tif") == {"a_0000.tif": "corrected", "c_0000.tif": "new"}
    assert (images / "b_0000.tif").read_text() == "first"  # the user's file is not deleted


def test_the_option_in_the_error_leaves_unusable_images_out(tmp_path, monkeypatch):
    folder = tmp_path / OPTIONS.dataset
    for name in ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "imagesUn/b_0000.nii.gz", "imagesUn/c_0001.nii.gz"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    description = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(description))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    with pytest.raises(UserError, match=r"c_0001\.nii\.gz.*--skip_unreadable"):
        RawImages.find(OPTIONS.dataset)
    assert list(RawImages.find(OPTIONS.dataset, skip_unreadable=True).unlabelled) == ["b"]
    assert _compare_parser().parse_args(["901", "-c", "2d", "--skip_unreadable"]).skip_unreadable


def test_a_folder_without_a_study_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no study"):
        Study(tmp_path, OPTIONS, SPLIT, PATIENTS).open()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="is a file"):
        Study(tmp_path / "thesis.txt", OPTIONS, SPLIT, PATIENTS).open()
    Study(tmp_path / "study", OPTIONS, SPLIT, PATIENTS).open()
    with pytest.raises(UserError, match="other cases"):
        Study(tmp_path / "study", OPTIONS, SPLIT, PATIENTS | {"c99": "c99"}).open()
    (tmp_path / "study" / "study.json").write_text('{"options": {}}')
    with pytest.raises(UserError, match="cannot read the study"):
        Study.read(tmp_path / "study")


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(arms=["pretrained"]), "--arms must .*scratch"),
        (dict(arms=["scratch", "magic"]), "no arm 'magic'"),
        (dict(arms=["scratch", "recipe:nope"]), "recipe 'nope'"),
        (dict(arms=["scratch", "recipe:macl,temprature=0.2"]), "unknown key 'temprature'. Did you mean 'temperature'?"),
        (dict(arms=["scratch", "recipe:macl,temperature=hot"]), "'temperature' must be a valid number, got 'hot'"),
        (dict(arms=["scratch", "recipe:macl,rotation=270"]), "'rotation' must be less than or equal to 180, got 270"),
        (dict(arms=["scratch", "recipe:restore,weight_restoration=0"]), "nothing to learn from"),
        (dict(arms=["scratch", "recipe:macl,num_epochs=5"], pretrain_epochs=3), "'num_epochs' is set to 3 and to 5"),
        (dict(arms=["scratch", "weights:/no/file.pth"]), "/no/file.pth"),
        (dict(arms=["scratch", "pretrained", "pretrained"]), "--arms: two arms .*pretrained"),
        (dict(epochs=0), "--epochs must be 1 or more, got 0"),
        (dict(batch_size=0), "-batch_size must be 1 or more"),
        (dict(pretrain_batch_size=1), "--pretrain_batch_size must be 2 or more"),
        (dict(rates=[2.0]), "--rates .*got 2"),
        (dict(rates=[0.1, 0.1]), "--rates .*twice: 0.1 0.1"),
    ],
)
def test_invalid_values_are_refused(change, words):
    OPTIONS.check()
    with pytest.raises(UserError, match=words):
        replace(OPTIONS, **change).check()


def test_two_recipe_files_of_one_name_are_refused(tmp_path):
    files = [tmp_path / name / "mine.json" for name in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text('{"inherits_from": "macl"}')
    one_twice = [f"recipe:{files[0]}", f"semi:recipe:{files[0]}"]
    replace(OPTIONS, arms=["scratch", *one_twice]).check()
    with pytest.raises(UserError, match=r"(?s)a/mine\.json.*b/mine\.json"):
        replace(OPTIONS, arms=["scratch", f"recipe:{files[0]}", f"semi:recipe:{files[1]}"]).check()


def test_teachers_are_trained_before_their_students(tmp_path):
    arms = ["self_train:self_train:scratch", "self_train:scratch", "scratch"]
    study = Study(tmp_path, replace(OPTIONS, arms=arms), SPLIT, PATIENTS)
    order = [cell.arm for cell in sorted(study.cells, key=study.generation)]
    assert list(dict.fromkeys(order)) == [parse_arm(text).slug for text in arms[::-1]]


def test_arms_define_the_initial_weights(tmp_path, monkeypatch):
    study = Study(tmp_path, OPTIONS, SPLIT, PATIENTS)
    weights = {arm.slug: study.weights(arm) for arm in study.arms}
    assert weights["scratch"] is None and weights["encoder"] == weights["pretrained"] / "macl_encoder.pth"
    assert weights["recipe-pcl"] != weights["pretrained"] and weights["recipe-pcl"].name == "fold_0"
    (tmp_path / "mine.json").write_text('{"inherits_from": "macl"}')
    monkeypatch.chdir(tmp_path)
    assert parse_arm("recipe:mine.json").recipe == str(tmp_path / "mine.json")


def test_an_arm_may_set_keys_of_its_recipe(tmp_path, monkeypatch):
    arm = parse_arm("recipe:macl,temperature=0.20,scaling=[0.8,1.2],optimizer=sgd")
    assert (arm.recipe, arm.settings) == ("macl", ("optimizer=sgd", "scaling=[0.8, 1.2]", "temperature=0.2"))
    # order and spelling of the settings do not matter
    assert parse_arm("recipe:macl,optimizer=sgd,scaling=[0.80, 1.2],temperature=0.2") == parse_arm(arm.name) == arm
    arms = ["recipe:macl_0.1", "recipe:macl_0.1,temperature=0.2", "recipe:macl_0.1,temperature=0.25"]
    study = Study(tmp_path, replace(OPTIONS, arms=["scratch", "pretrained", "encoder", *arms]), SPLIT, PATIENTS)
    assert len({arm.slug for arm in study.arms}) == 6 and len(study.pretrainings) == 4
    assert len({study.pretraining_folder(arm) for arm in study.pretrainings}) == 4
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.json", "a,b=c.json"):
        (tmp_path / name).write_text('{"inherits_from": "macl"}')
        assert parse_arm(f"recipe:{name}").recipe == str(tmp_path / name)
    with_settings = parse_arm("recipe:a,b.json,seed=1")
    assert (with_settings.recipe, with_settings.settings) == (str(tmp_path / "a,b.json"), ("seed=1",))


# --- steps ---------------------------------------------------------------------------------------------------------------


class Work:
    """Create steps that record in ``done`` that they ran."""

    def __init__(self, folder):
        self.folder = folder
        self.done = []

    def step(self, name, *needs, action=lambda: None, part=None):
        def run():
            action()
            self.done.append(name)
            return {"name": name}

        return Task(name, self.folder / name, run, needs, part)


def test_steps_run_once_and_after_the_steps_that_they_need(tmp_path):
    work = Work(tmp_path)
    plan = work.step("plan")
    pretrain = work.step("pretrain", plan)
    steps = [plan, pretrain, work.step("scratch", plan), work.step("pretrained", pretrain)]
    run_steps(steps, jobs=3, poll_seconds=0.01)
    assert sorted(work.done) == ["plan", "pretrain", "pretrained", "scratch"]
    assert work.done[0] == "plan" and work.done.index("pretrained") > work.done.index("pretrain")
    assert json.loads((tmp_path / "pretrained" / DONE_FILE).read_text())["name"] == "pretrained"
    run_steps(steps, jobs=2, poll_seconds=0.01)
    assert len(work.done) == 4
    assert not list(tmp_path.rglob(".macl_running*"))


def test_a_read_only_folder_ends_the_study_with_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    work = Work(tmp_path / "file")
    with pytest.raises(UserError, match=r"file/first could not be written: Not a directory"):
        run_steps([work.step("first"), work.step("second")], jobs=2, poll_seconds=0.01)


def test_a_failed_step_stops_the_study_and_runs_again_later(tmp_path):
    work = Work(tmp_path)
    broken = [True]

    def fail():
        if broken:
            raise UserError("the disk is full")

    first, second = work.step("first"), work.step("second", action=fail)
    steps = [first, second, work.step("third", second)]
    with pytest.raises(UserError, match="the disk is full"):
        run_steps(steps, jobs=1, poll_seconds=0.01)
    assert work.done == ["first"] and not second.is_done
    broken.clear()
    run_steps(steps, jobs=1, poll_seconds=0.01)
    assert work.done == ["first", "second", "third"]


def test_other_arms_are_trained_if_one_arm_fails(tmp_path):
    work = Work(tmp_path)
    broken = [True]

    def fail():
        if broken:
            raise StepError("the embeddings have collapsed")

    plan = work.step("plan")
    pretrain = work.step("pretrain", plan, action=fail, part="recipe")
    first = work.step("pretrained 0", pretrain, part="pretrained")
    student = work.step("student", first, part="student")
    steps = [plan, pretrain, first, student, work.step("scratch 0", plan), work.step("scratch 1", plan)]
    # this arm fails in its second training, so it is not trained a third time
    steps += [work.step(f"other {n}", plan, action=fail if n == 1 else lambda: None, part="other") for n in range(3)]
    left_out = {}
    run_steps(steps, jobs=1, poll_seconds=0.01, left_out=left_out)
    assert work.done == ["plan", "scratch 0", "scratch 1", "other 0"]
    assert {step.name for step in left_out.values()} == {"pretrain", "pretrained 0", "student", "other 1", "other 2"}
    # what failed is not tried again for another kind of fine-tuning
    run_steps([plan, pretrain, work.step("long", pretrain, part="long")], 1, poll_seconds=0.01, left_out=left_out)
    assert len(work.done) == 4
    broken.clear()
    run_steps(steps, jobs=2, poll_seconds=0.01)
    assert all(step.is_done for step in steps)


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def claim(folder, host, pid):
    folder.mkdir(parents=True)
    file = folder / ".macl_running.json"
    file.write_text(json.dumps({"host": host, "pid": pid, "started": "2026-01-01 10:00:00"}))
    return file


def test_another_process_takes_over_the_step_of_a_dead_process(tmp_path, sleeper):
    work = Work(tmp_path)
    claim(tmp_path / "cell", socket.gethostname(), sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    run_steps([work.step("cell")], jobs=1, poll_seconds=0.01)
    assert work.done == ["cell"]


def test_the_lock_of_a_pretraining_that_was_killed_at_its_end_is_removed(tmp_path, sleeper):
    study = Study(tmp_path, OPTIONS, SPLIT, PATIENTS)
    run = study.pretraining_run(parse_arm("recipe:pcl"))
    lock = claim(run, socket.gethostname(), sleeper.pid)
    (run / NETWORK_FILE).touch()
    checkpoints.save({"collapsed": "equal embeddings"}, run / ENCODER_FILE)
    # The process still runs, so the study stops and does not leave the arm out.
    work = _Work(IMAGES, None, "cpu", 1, 1, skip_unreadable=False)
    with pytest.raises(UserError, match=f"process {sleeper.pid}") as error:
        work.pretrain(study, parse_arm("recipe:pcl"))
    assert not isinstance(error.value, StepError)
    sleeper.kill()
    sleeper.wait()
    assert work.pretrain(study, parse_arm("recipe:pcl")) == {"collapsed": "equal embeddings"} and not lock.exists()


SLEEPING = """
import subprocess, sys
from pathlib import Path
from nnunetv2_macl.compare.steps import Task, run_steps
from nnunetv2_macl.compare.stopping import ended_by_sigterm
folder = Path(sys.argv[1])
def work():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "begun").write_text(str(child.pid))
    child.wait()
with ended_by_sigterm():
    run_steps([Task("cell", folder / "cell", work)], jobs=1)
"""


def test_sigterm_ends_a_job_with_its_child_process_and_lock(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SLEEPING, str(tmp_path)])
    deadline = time.monotonic() + 60
    while not (begun := tmp_path / "begun").is_file() or not begun.read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    assert (tmp_path / "cell" / ".macl_running.json").is_file()
    process.terminate()
    assert process.wait(30) == 143 and not list((tmp_path / "cell").iterdir())
    assert not psutil.pid_exists(int(begun.read_text()))


def _on_sigterm(_):
    return signal.getsignal(signal.SIGTERM)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_pool_workers_keep_the_default_sigterm_handler(tmp_path):
    with ended_by_sigterm(), multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_on_sigterm, range(2)) == [signal.SIG_DFL] * 2 and _on_sigterm(0) != signal.SIG_DFL
    assert _on_sigterm(0) == signal.SIG_DFL


FORKING = """
import os, signal
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
from nnunetv2_macl.compare.stopping import ended_by_sigterm

with ended_by_sigterm():
    child = os.fork()
    if not child:
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_signal_that_arrives_during_a_fork_ends_the_child():
    """Otherwise a pool would wait for ever for a worker that it ended right after its start."""
    out = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=60).stdout
    assert out.split() == [str(-signal.SIGTERM), "set()"]


def test_a_message_names_the_machine_whose_step_is_waited_for(tmp_path, caplog):
    work = Work(tmp_path)
    file = claim(tmp_path / "theirs", "another-machine", 4242)
    caplog.set_level("INFO", logger="nnunetv2_macl")

    def they_finish():
        deadline = time.monotonic() + 20
        while not (tmp_path / "ours" / DONE_FILE).is_file() and time.monotonic() < deadline:
            time.sleep(0.01)
        (tmp_path / "theirs" / DONE_FILE).write_text("{}")
        file.unlink()

    them = threading.Thread(target=they_finish)
    them.start()
    run_steps([work.step("theirs"), work.step("ours")], jobs=1, poll_seconds=0.01)
    them.join()
    assert work.done == ["ours"]
    waiting = [record.getMessage() for record in caplog.records if "another-machine" in record.getMessage()]
    assert len(waiting) == 1 and "4242" in waiting[0] and "2026-01-01" in waiting[0]
    assert f"rm '{file}'" in waiting[0]


SHARING = """
import sys, time
from pathlib import Path
from nnunetv2_macl.compare.steps import Task, run_steps

folder = Path(sys.argv[1])

def step(name):
    def run():
        time.sleep(0.1)
        with (folder / "log").open("a") as log:
            log.write(f"{name} ")
        return {}
    return Task(name, folder / name, run)

run_steps([step(f"cell{n}") for n in range(20)], jobs=2, poll_seconds=0.02)
"""


def test_two_processes_divide_the_steps(tmp_path):
    both = [subprocess.Popen([sys.executable, "-c", SHARING, tmp_path]) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert sorted((tmp_path / "log").read_text().split()) == sorted(f"cell{n}" for n in range(20))


@pytest.mark.parametrize("kind", ["weights", "recipe", "plan"])
def test_files_that_changed_after_the_study_began_are_refused(tmp_path, monkeypatch, kind):
    file = tmp_path / f"mine.{'pth' if kind == 'weights' else 'json'}"
    monkeypatch.setattr("nnunetv2_macl.formats.load_weights", lambda path: SimpleNamespace(files=[path]))
    file.write_bytes(b"first")
    options = (
        replace(OPTIONS, plan=str(file)) if kind == "plan" else replace(OPTIONS, arms=["scratch", f"{kind}:{file}"])
    )
    Study(tmp_path / "study", options, SPLIT, PATIENTS).open()
    file.write_bytes(b"second")
    with pytest.raises(UserError, match=f"the file {file}"):
        Study(tmp_path / "study", options, SPLIT, PATIENTS).open()


@pytest.mark.parametrize("network, is_refused", [("attention_unet.AttentionUNet", True), (None, False)])
def test_a_plan_with_another_network_is_not_planned_anew(tmp_path, monkeypatch, network, is_refused):
    """nnU-Net's planner would plan its own network under the name of the plan."""
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    name = (
        f"nnunetv2_macl.networks.{network}"
        if network
        else "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    )
    plan = {
        "configurations": {"2d": {"architecture": {"network_class_name": name}}},
        "experiment_planner_used": "ExperimentPlanner",
    }
    file = tmp_path / OPTIONS.dataset / "nnUNetPlans_other.json"
    file.parent.mkdir()
    file.write_text(json.dumps(plan))
    options = replace(OPTIONS, plans="nnUNetPlans_other")
    if is_refused:
        with pytest.raises(UserError, match=re.escape(f"--plan {file}")):
            planner(options)
    else:
        assert planner(options) == "ExperimentPlanner"
