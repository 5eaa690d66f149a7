"""Semi-supervised training: targets, mixing, views, and the trainer in a small training on generated data."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from conftest import DATASET, Workspace, set_folders
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_macl.compare.study import Options, parse_arm
from nnunetv2_macl.data import MASK_ENDING
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import resource_folder, sha256
from nnunetv2_macl.nnunet import GROUP_VARIABLE, TEACHER_VARIABLE, DatasetConfiguration
from nnunetv2_macl.planning.derive import derive_plan
from nnunetv2_macl.planning.plan import plan_file, write_plan
from nnunetv2_macl.preprocessing.cases import preprocess_unlabelled
from nnunetv2_macl.recipe import load_recipe
from nnunetv2_macl.report.finetuned import describe_pseudo_labels
from nnunetv2_macl.semi_supervised.mixing import Patches, consistency, copy_paste
from nnunetv2_macl.semi_supervised.pseudo_labels import Teacher
from nnunetv2_macl.semi_supervised.rounds import self_train, write_labels
from nnunetv2_macl.semi_supervised.self_training import model_folder, nnUNetTrainerMACLSelfTraining
from nnunetv2_macl.semi_supervised.settings import SemiSettings, parse_semi_settings
from nnunetv2_macl.semi_supervised.targets import LabelTargets, RegionTargets
from nnunetv2_macl.semi_supervised.trainer import nnUNetTrainerMACLSemi
from nnunetv2_macl.semi_supervised.unlabelled import UnlabelledDataset, WeakAndStrong
from nnunetv2_macl.synthetic import generate_dataset
from nnunetv2_macl.training.finetune import nnUNetTrainerMACL

REGIONS = {"labels": {"background": 0, "organ": [1, 2], "vessel": 2}, "regions_class_order": [1, 2]}


class TwoSteps(nnUNetTrainerMACL):
    """Two epochs of two steps, with a checkpoint after each epoch."""

    from_scratch = True
    finetuning_epochs = 2

    def initialize(self):
        super().initialize()
        self.num_iterations_per_epoch = 2
        self.num_val_iterations_per_epoch = 1
        self.save_every = 1


class Short(TwoSteps, nnUNetTrainerMACLSemi):
    """Semi-supervised training."""


@pytest.fixture
def trainer_of(workspace, monkeypatch):
    """A function that returns a trainer of the generated data set, with small batches and other entries of dataset.json."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")

    def make(trainer=Short, *, fold=0, folder=workspace.preprocessed / DATASET, **dataset_json):
        plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": False}
        plans["configurations"]["2d"]["batch_size"] = 2
        content = json.loads((folder / "dataset.json").read_text()) | dataset_json
        return trainer(plans, "2d", fold, content, torch.device("cpu"))

    return make


def logits_of(*probabilities):
    """Logits (1, C, 1, voxels) of a softmax, given the probabilities of each voxel."""
    return torch.tensor(probabilities).T[None, :, None].log()


def test_hard_labels_of_confident_voxels():
    logits = logits_of((0.9, 0.05, 0.05), (0.1, 0.3, 0.6), (0.02, 0.96, 0.02))
    assert LabelTargets(3).from_logits(logits, 0.8).flatten().tolist() == [0, 3, 1]
    assert LabelTargets(3).from_logits(logits, 0.0).flatten().tolist() == [0, 2, 1]


def test_a_voxel_is_ignored_where_one_region_is_uncertain():
    probabilities = torch.tensor([[0.95, 0.9, 0.02], [0.05, 0.6, 0.01]])[None, :, None]
    target = RegionTargets(2).from_logits(probabilities.logit(), 0.8)
    assert target.dtype == torch.bool
    assert target[0, :, 0].int().tolist() == [[1, 1, 0], [0, 1, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    "targets, values",
    [(LabelTargets(3), torch.randint(0, 3, (2, 1, 9, 12))), (RegionTargets(2), torch.rand(2, 2, 9, 12) > 0.5)],
)
def test_copy_paste_uses_each_voxel_once_and_keeps_image_and_target_together(targets, values):
    # Each image tells by its sign where a voxel comes from.
    labelled = Patches(torch.rand(2, 1, 9, 12) + 1, targets.from_labels(values))
    unlabelled = Patches(-torch.rand(2, 1, 9, 12) - 1, targets.from_labels(values))
    lessons = copy_paste(labelled, unlabelled, targets, np.random.default_rng(0))
    used = torch.zeros(2, 1, 9, 12)
    for lesson in lessons:
        is_labelled = lesson.images > 0
        assert torch.equal(~targets.ignored(lesson.labels), is_labelled)
        assert torch.equal(targets.ignored(lesson.pseudo_labels), is_labelled)
        assert torch.equal(lesson.images[is_labelled], labelled.images[is_labelled])
        kept = is_labelled.expand_as(lesson.labels)
        assert torch.equal(lesson.labels[kept], labelled.target[kept])
        used += is_labelled
    assert (used == 1).all() and sum(lesson.share for lesson in lessons) == 1
    inside = (lessons[0].images > 0).float().mean()
    assert inside == pytest.approx(6 * 8 / (9 * 12))


def test_consistency_leaves_patches_as_they_are():
    labelled, unlabelled = (Patches(torch.rand(1, 1, 4, 4), torch.ones(1, 1, 4, 4)) for _ in range(2))
    first, second = consistency(labelled, unlabelled, LabelTargets(2), np.random.default_rng(0))
    assert first.images is labelled.images and first.pseudo_labels is None
    assert second.images is unlabelled.images and second.labels is None


def test_the_weight_rises_with_the_share_of_the_training():
    settings = SemiSettings(weight=2.0, ramp=0.5)
    assert settings.weight_at(0) == pytest.approx(2 * math.exp(-5))
    assert settings.weight_at(0.25) == pytest.approx(2 * math.exp(-1.25))
    assert settings.weight_at(0.5) == settings.weight_at(1) == 2
    assert SemiSettings(ramp=0).weight_at(0) == 1


@pytest.mark.parametrize(
    "text, words",
    [
        ("confidence=1.5", "confidence must be between 0 and 1, got 1.5"),
        ("weight=-1", "weight must be 0 or more"),
        ("ramp=much", "ramp must be a number, got 'much'"),
        ("mixing=blend", "consistency, copy_paste"),
        ("temperature=2", "no setting 'temperature'"),
    ],
)
def test_wrong_settings_are_named(text, words):
    with pytest.raises(UserError, match=words):
        parse_semi_settings([text], "Arm")


def test_arms_of_compare():
    arm = parse_arm("semi,mixing=copy_paste,confidence=0.9:recipe:macl,seed=3")
    assert arm.semi == ("confidence=0.9", "mixing=copy_paste") and arm.recipe == "macl" and arm.settings == ("seed=3",)
    assert parse_arm(arm.name) == arm
    plain = parse_arm("semi:scratch")
    assert plain.semi == () and plain.recipe is None and plain.slug == "semi-scratch"
    assert parse_arm("scratch").semi is None
    for wrong in ("semi:", "semi", "semi:nothing", "semi:semi:scratch", "semi,alpha=1:scratch"):
        with pytest.raises(UserError):
            parse_arm(wrong)


def test_the_paper_s_fine_tuning_has_no_semi_supervised_arm(workspace):
    options = Options(
        DATASET, "2d", "nnUNetPlans", ["scratch", "semi:scratch"], ["2"], 1, [1e-2], "1", "1", None, 1, 1, None, None,
        None, None, True, finetuning="paper",
    )  # fmt: skip
    with pytest.raises(UserError, match="--finetuning sgd or adamw"):
        options.check()


def test_both_views_have_one_geometry_and_the_strong_one_other_intensities(trainer_of):
    trainer = trainer_of()
    trainer.initialize()
    (loader, _) = (iterator for iterator in trainer.get_dataloaders())
    batch = next(loader)
    weak, strong = batch["weak"], batch["strong"]
    assert weak.shape == strong.shape == batch["data"].shape and not torch.equal(weak, strong)
    # Anatomy is in the same place: brighter or noisier, it still correlates.
    for one, other in zip(weak, strong, strict=True):
        assert np.corrcoef(one.flatten(), other.flatten())[0, 1] > 0.7


def test_the_strong_view_is_masked_as_nnunet_masks_its_own():
    noise = RandomTransform(MultiplicativeBrightnessTransform((2, 2), synchronize_channels=True), 0.6)
    views = WeakAndStrong(ComposeTransforms([noise, MaskImageTransform([0])]))
    image, outside = torch.ones(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int16)
    outside[:, :2] = -1
    weak, strong = views(image.clone(), outside)["image"]
    inside = 1.0 + outside[0]
    assert torch.equal(weak, inside) and torch.equal(strong, 2 * inside)


@pytest.fixture
def masked(workspace):
    """A plan that normalises within the nonzero region and resamples, with an image that is 0 outside of an ellipse."""
    file = workspace.preprocessed / DATASET / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    configuration = plans["configurations"]["2d"]
    configuration |= {"use_mask_for_norm": [True], "spacing": [0.8 * mm for mm in configuration["spacing"]]}
    file.write_text(json.dumps(plans))
    image = sitk.ReadImage(workspace.raw / DATASET / "imagesUn" / "case_005_0000.nii.gz")
    voxels = sitk.GetArrayFromImage(image)
    y, x = (np.linspace(-1, 1, n) for n in voxels.shape[1:])
    voxels = np.where(x**2 + y[:, None] ** 2 < 0.7, np.abs(voxels) + 1, 0)
    ellipse = sitk.GetImageFromArray(voxels)
    ellipse.CopyInformation(image)
    sitk.WriteImage(ellipse, workspace.raw / DATASET / "imagesUn" / "case_005_0000.nii.gz")
    return DatasetConfiguration.load(DATASET, "nnUNetPlans", "2d"), voxels, image


def test_the_mask_of_an_unlabelled_image_is_nnunets(masked):
    """Resampling leaves no exact zeros outside of the mask, so the mask is stored, as nnU-Net stores that of labelled images."""
    target, voxels, image = masked
    case = next(c for c in preprocess_unlabelled(target, [], processes=1).cases if c.name == "case_005")
    data, segmentation, _, _ = UnlabelledDataset([case], in_mask=True).load_case(case.file)
    properties = {"spacing": list(image.GetSpacing())[::-1]}
    expected, labels, _ = DefaultPreprocessor(verbose=False).run_case_npy(
        voxels[None], np.zeros_like(voxels[None], np.int8), properties, target.plans_manager, target.manager,
        target.dataset_json,
    )  # fmt: skip
    np.testing.assert_allclose(data[:], expected, atol=1e-6)
    np.testing.assert_array_equal(segmentation, labels)
    outside = labels < 0
    assert 0.2 < outside.mean() < 0.6 and np.abs(expected[outside]).max() > 0.01


def test_images_preprocessed_without_masks_are_preprocessed_again(masked):
    target, _, _ = masked
    cases = preprocess_unlabelled(target, [], processes=1).cases
    assert all(Path(case.file).with_suffix(MASK_ENDING).is_file() for case in cases)
    folder = Path(cases[0].file).parent
    for record in folder.glob("*.json"):
        content = json.loads(record.read_text())
        content["made_from"]["plan"] = target.preprocessing_checksum()
        record.write_text(json.dumps(content))
    (folder / ".index").unlink()
    for file in folder.glob(f"*{MASK_ENDING}"):
        file.unlink()
    assert preprocess_unlabelled(target, [], processes=1).cases == cases
    assert all(Path(case.file).with_suffix(MASK_ENDING).is_file() for case in cases)


def test_the_partial_loss_is_nnunets_loss_where_no_voxel_is_ignored(trainer_of):
    for dataset_json in ({}, REGIONS):
        trainer = trainer_of(**dataset_json)
        trainer.initialize()
        (loader, _) = (iterator for iterator in trainer.get_dataloaders())
        batch = next(loader)
        output = trainer.network(batch["data"])
        ours = trainer._partial_loss_of(output, trainer.targets.from_labels(batch["target"][0]))
        torch.testing.assert_close(ours, trainer.loss(output, batch["target"]))


def weights_after(trainer, *, confidence=0.5, weight=1.0, mixing="consistency"):
    trainer.semi = SemiSettings(mixing, confidence, weight, ramp=0)
    trainer.run_training()
    return {key: value.clone() for key, value in trainer.network.state_dict().items()}


@pytest.mark.parametrize("labels", [{}, REGIONS])
def test_pseudo_labels_change_the_training_and_no_confident_voxel_leaves_it_as_it_is(trainer_of, labels):
    plain = weights_after(trainer_of(**labels), weight=0)
    unsure = trainer_of(**labels)
    losses = []
    end_of_epoch = unsure.on_train_epoch_end
    unsure.on_train_epoch_end = lambda outputs: (losses.extend(outputs), end_of_epoch(outputs))
    empty = weights_after(unsure, confidence=1)
    assert losses and all(np.isnan(step["unlabelled_loss"]) and np.isfinite(step["loss"]) for step in losses)
    taught = weights_after(trainer_of(**labels))
    for key, value in plain.items():
        torch.testing.assert_close(empty[key], value, rtol=1e-4, atol=1e-5)
    assert any((taught[key] - value).abs().max() > 1e-4 for key, value in plain.items())


@pytest.mark.slow
def test_a_data_set_with_an_ignore_label_of_its_own_and_two_channels(tmp_path, monkeypatch, trainer_of):
    space = Workspace(tmp_path / "other")
    generate_dataset(space.raw / DATASET, labelled=5, unlabelled=2, test=0, shape=(8, 40, 48), channels=2)
    file = space.raw / DATASET / "dataset.json"
    content = json.loads(file.read_text()) | {"labels": {"background": 0, "liver": 1, "ignore": 2}}
    file.write_text(json.dumps(content))
    command = ("nnUNetv2_plan_and_preprocess", "-d", "901", "-c", "2d", "-npfp", "1", "-np", "1")
    space.run(*command, nnUNet_n_proc_DA="1")  # nnU-Net cannot plan without a worker
    set_folders(monkeypatch, space.folder)
    plain, taught = (
        weights_after(trainer_of(folder=space.preprocessed / DATASET), weight=weight, mixing="copy_paste")
        for weight in (0, 1)
    )
    assert all(torch.isfinite(value).all() for value in taught.values())
    assert any((taught[key] - value).abs().max() > 1e-4 for key, value in plain.items())


def test_a_continued_training_ends_with_the_same_weights(trainer_of):
    whole = weights_after(trainer_of(), mixing="copy_paste")

    class Stops(Short):
        def on_epoch_end(self):
            super().on_epoch_end()
            raise KeyboardInterrupt

    first = trainer_of(Stops)
    # the folder of a trainer is named after its class
    with pytest.raises(KeyboardInterrupt):
        weights_after(first, mixing="copy_paste")
    second = trainer_of()
    second.load_checkpoint(f"{first.output_folder}/checkpoint_latest.pth")
    continued = weights_after(second, mixing="copy_paste")
    for key, value in whole.items():
        assert torch.equal(continued[key], value), key


def test_checkpoints_are_stock_and_the_final_one_has_no_teacher(trainer_of):
    trainer = trainer_of()
    weights_after(trainer)
    content = torch.load(f"{trainer.output_folder}/checkpoint_final.pth", weights_only=False)
    assert content["trainer_name"] == "nnUNetTrainer" and content["macl_teacher"] is None


def test_images_of_validation_patients_are_never_used(trainer_of, workspace, monkeypatch):
    """Cases 0 to 4 are labelled, 5 to 8 are not. There are two patients: cases with an even and with an odd last digit."""
    splits = [{"train": ["case_000", "case_002"], "val": ["case_001"]}]
    (workspace.preprocessed / DATASET / "splits_final.json").write_text(json.dumps(splits))

    def names(fold=0):
        trainer = trainer_of(fold=fold)
        trainer.initialize()
        return {case.name for case in trainer.unlabelled_cases()}

    assert names() == {f"case_00{n}" for n in (3, 4, 5, 6, 7, 8)}
    monkeypatch.setenv(GROUP_VARIABLE, "([0248]|[1357])$")
    trainer = trainer_of()
    with pytest.raises(UserError, match="case_006"):
        trainer.initialize()
        trainer.unlabelled_cases()
    monkeypatch.setenv(GROUP_VARIABLE, "case_00[02468]|case_00(?=[1357])")
    assert names() == {"case_004", "case_006", "case_008"}
    # all cases are trained on, so none is held out
    monkeypatch.delenv(GROUP_VARIABLE)
    assert names("all") == {f"case_00{n}" for n in (5, 6, 7, 8)}


def test_no_unlabelled_image_is_explained(trainer_of, workspace):
    shutil.rmtree(workspace.raw / DATASET / "imagesUn")
    shutil.rmtree(workspace.preprocessed / DATASET / "nnUNetPlans_macl_2d")
    with pytest.raises(SystemExit, match="no unlabelled image to learn from"):
        trainer_of().run_training()


def test_a_cascade_is_refused(trainer_of):
    trainer = trainer_of()
    trainer.is_cascaded = True
    # It needs no pre-training to be refused.
    trainer.from_scratch = False
    with pytest.raises(SystemExit, match="first stage"):
        trainer.run_training()


def test_an_image_of_another_data_set_may_have_the_name_of_a_validation_case(trainer_of, workspace):
    shutil.copytree(workspace.raw / DATASET, workspace.raw / "Dataset902_Other")
    shutil.rmtree(workspace.raw / "Dataset902_Other" / "imagesUn")
    trainer = trainer_of()
    trainer.initialize()
    target = DatasetConfiguration.load(DATASET, "nnUNetPlans", "2d")
    plan = derive_plan(target, load_recipe("restore", resource_folder("plans")))
    write_plan(replace(plan, unlabelled_datasets=["Dataset902_Other"]), plan_file(target))
    validation = trainer.do_split()[1]
    folders = {Path(case.file).parent.name for case in trainer.unlabelled_cases() if case.name in validation}
    assert folders == {"Dataset902_Other"}


# --- self-training ---------------------------------------------------------------------------------------------------------


class Student(TwoSteps, nnUNetTrainerMACLSelfTraining):
    """Self-training."""


class Teaches(Student):
    """A plain training, which learns enough to find foreground."""

    def initialize(self):
        super().initialize()
        self.num_iterations_per_epoch = 15
        self.initial_lr = 0.05

    def check(self):
        """A plain training needs no teacher."""

    def training_loader(self, loader):
        return loader


@pytest.fixture(scope="module")
def trained_model():
    """Return the folder that keeps the model of the teacher, because it is the same in each test."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "model"


@pytest.fixture
def teacher(trainer_of, trained_model, monkeypatch):
    """Train the model that the students of a test learn from, or copy it from an earlier test."""
    trainer = trainer_of(Teaches)
    if trained_model.is_dir():
        shutil.copytree(trained_model, trainer.output_folder_base, dirs_exist_ok=True)
    else:
        trainer.run_training()
        shutil.copytree(trainer.output_folder_base, trained_model)
    monkeypatch.setenv(TEACHER_VARIABLE, trainer.output_folder_base)
    return trainer


def pseudo_label_files(trainer):
    return sorted(Path(trainer.output_folder, "pseudo_labels").glob("*/*.b2nd"))


def test_the_teacher_labels_the_unlabelled_images_once(trainer_of, teacher):
    student = trainer_of(Student)
    student.run_training()
    files = pseudo_label_files(student)
    assert [file.stem for file in files] == [case.name for case in sorted(student.unlabelled_cases())]
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(teacher.output_folder_base, (0,), "checkpoint_final.pth")
    case = next(case for case in student.unlabelled_cases() if case.name == files[0].stem)
    image = torch.from_numpy(np.asarray(blosc2.open(case.file)[:]))
    expected = predictor.predict_sliding_window_return_logits(image).argmax(0)
    written = torch.from_numpy(blosc2.open(str(files[0]))[0])
    assert (written == expected).float().mean() > 0.999
    assert (
        torch.load(f"{student.output_folder}/checkpoint_final.pth", weights_only=False)["trainer_name"]
        == "nnUNetTrainer"
    )

    before = [file.stat().st_mtime_ns for file in files]
    trainer_of(Student).run_training()
    assert [file.stat().st_mtime_ns for file in files] == before
    # An image that has changed is labelled again, also if its size is the same.
    os.utime(case.file, ns=(1, 1))
    trainer_of(Student).run_training()
    changed = [file.stem for file, time in zip(files, before, strict=True) if file.stat().st_mtime_ns > time]
    assert changed == [case.name]
    before = [file.stat().st_mtime_ns for file in files]
    # A model that was trained again labels the images again.
    content = torch.load(f"{teacher.output_folder}/checkpoint_final.pth", weights_only=False)
    torch.save(content | {"_best_ema": 1.0}, f"{teacher.output_folder}/checkpoint_final.pth")
    trainer_of(Student).run_training()
    assert all(file.stat().st_mtime_ns > time for file, time in zip(files, before, strict=True))


def test_a_model_with_the_labels_of_another_teacher_is_not_continued(trainer_of, teacher):
    labels = Path(trainer_of(nnUNetTrainerMACLSelfTraining).output_folder) / "pseudo_labels"
    labels.mkdir(parents=True)
    (labels / "teacher.json").write_text(json.dumps({"fold_folder": "/models/other", "sha256": "0", "labels": []}))
    with pytest.raises(UserError, match="/models/other"):
        self_train(DATASET, "2d", "0", teacher=teacher.output_folder_base, device="cpu")


def test_a_training_is_not_continued_with_the_labels_of_another_teacher(trainer_of, teacher, monkeypatch):
    first = trainer_of(Student)
    first.run_training()
    other = Path(teacher.output_folder_base).with_name(
        f"Other__{'__'.join(teacher.output_folder_base.split('__')[1:])}"
    )
    shutil.copytree(teacher.output_folder_base, other)
    content = torch.load(other / "fold_0" / "checkpoint_final.pth", weights_only=False)
    torch.save(content | {"_best_ema": 1.0}, other / "fold_0" / "checkpoint_final.pth")
    monkeypatch.setenv(TEACHER_VARIABLE, str(other))
    before = [file.stat().st_mtime_ns for file in pseudo_label_files(first)]
    second = trainer_of(Student)
    second.load_checkpoint(f"{first.output_folder}/checkpoint_final.pth")
    with pytest.raises(SystemExit, match=re.escape(f"{TEACHER_VARIABLE}={teacher.output_folder_base}")):
        second.run_training()
    assert [file.stat().st_mtime_ns for file in pseudo_label_files(first)] == before


def test_a_folder_with_the_name_of_the_trainer_is_not_taken_for_the_model(trainer_of, teacher, monkeypatch, tmp_path):
    target = DatasetConfiguration.load(DATASET, "nnUNetPlans", "2d")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Teaches").mkdir()
    assert model_folder(target, "Teaches") == Path(teacher.output_folder_base)


def test_the_order_of_regions_counts(teacher):
    """The outputs of the network have the order of the regions."""
    regions = {"background": 0, "organ": [1, 2], "vessel": 2, "rest": 1}
    file = Path(teacher.output_folder_base, "dataset.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"labels": regions, "regions_class_order": [1, 2, 1]}))
    target = DatasetConfiguration.load(DATASET, "nnUNetPlans", "2d")
    load = partial(Teacher(Path(teacher.output_folder_base), 0).load, target, torch.device("cpu"))
    target.dataset_json.update({"labels": regions, "regions_class_order": [1, 2, 1]})
    load()
    target.dataset_json["labels"] = dict(reversed(regions.items()))
    with pytest.raises(UserError, match="labels"):
        load()
    target.dataset_json.update({"labels": regions, "regions_class_order": [1, 1, 2]})
    with pytest.raises(UserError, match="labels"):
        load()


def test_half_of_the_patches_are_of_labelled_images(trainer_of, teacher):
    student = trainer_of(Student)
    student.initialize()
    loader = student.training_loader(single_threaded_loader(student))
    names = np.concatenate([loader.get_indices() for _ in range(200)])
    labelled = np.isin(names, student.do_split()[0]).mean()
    assert labelled == pytest.approx(0.5, abs=0.1)
    assert set(names) == {*student.do_split()[0], *(case.file for case in student.unlabelled_cases())}


def single_threaded_loader(trainer):
    training, _ = nnUNetTrainer.get_dataloaders(trainer)
    return training.data_loader


def test_a_continued_self_training_ends_with_the_same_weights(trainer_of, teacher):
    whole = trainer_of(Student)
    whole.run_training()

    class StopsStudent(Student):
        def on_epoch_end(self):
            super().on_epoch_end()
            raise KeyboardInterrupt

    first = trainer_of(StopsStudent)
    with pytest.raises(KeyboardInterrupt):
        first.run_training()
    second = trainer_of(Student)
    second.load_checkpoint(f"{first.output_folder}/checkpoint_latest.pth")
    second.run_training()
    for key, value in whole.network.state_dict().items():
        assert torch.equal(second.network.state_dict()[key], value), key


def test_a_missing_teacher_is_named_with_the_command_and_the_models_that_exist(trainer_of, teacher, monkeypatch):
    monkeypatch.delenv(TEACHER_VARIABLE)
    with pytest.raises(SystemExit, match=r"(?s)-tr nnUNetTrainerMACL.*nnUNet_macl_teacher=Teaches"):
        trainer_of(Student).run_training()
    monkeypatch.setenv(TEACHER_VARIABLE, "Student")
    with pytest.raises(SystemExit, match="being trained"):
        trainer_of(Student).run_training()


def test_a_pretraining_run_is_no_teacher(trainer_of, teacher, monkeypatch):
    fold = Path(teacher.output_folder)
    (fold / "macl_plan.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"(?s)does not segment.*nnUNetv2_train 901 2d 0 -tr nnUNetTrainerMACL"):
        trainer_of(Student).run_training()
    monkeypatch.delenv(TEACHER_VARIABLE)
    with pytest.raises(SystemExit) as error:
        trainer_of(Student).run_training()
    assert "Teaches" not in str(error.value)


def test_a_teacher_may_have_another_patch_size(teacher):
    target = DatasetConfiguration.load(DATASET, "nnUNetPlans", "2d")
    target.plans_manager.plans["configurations"]["2d"]["patch_size"] = [32, 32]
    assert Teacher(Path(teacher.output_folder_base), 0).load(target, torch.device("cpu"))


def test_labels_are_exported_for_readable_images_and_nothing_else_is_written(teacher, workspace, tmp_path):
    target = DatasetConfiguration.load(DATASET, "nnUNetPlans", "2d")
    (workspace.raw / DATASET / "imagesUn" / "case_006_0000.nii.gz").write_bytes(b"damaged")
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "case_005.nii.gz").write_text("corrected")
    write_labels(Teacher(Path(teacher.output_folder_base), 0), target, labels, "cpu")
    assert sorted(path.name for path in labels.iterdir()) == [f"case_00{n}.nii.gz" for n in (5, 7, 8)]
    assert (labels / "case_005.nii.gz").read_text() == "corrected"


def test_no_image_to_export_is_reported_before_the_training(teacher, workspace, tmp_path):
    shutil.rmtree(workspace.raw / DATASET / "imagesUn")
    shutil.rmtree(workspace.preprocessed / DATASET / "nnUNetPlans_macl_2d")
    with pytest.raises(UserError, match="--export_labels"):
        self_train(
            DATASET, "2d", "0", teacher=teacher.output_folder_base, export_labels=tmp_path / "labels", device="cpu"
        )


def test_an_error_that_the_user_can_correct_ends_a_training_without_a_traceback(trainer_of):
    class Full(Teaches):
        def on_epoch_end(self):
            raise UserError("the disk is full")

    with pytest.raises(SystemExit, match="the disk is full"):
        trainer_of(Full).run_training()


@pytest.mark.parametrize(
    "entry, what",
    [({"labels": {"background": 0, "other": 1}}, "labels"), ({"channel_names": {"0": "T2"}}, "channels")],
)
def test_a_teacher_of_other_labels_or_channels_is_refused(trainer_of, teacher, entry, what):
    with pytest.raises(SystemExit, match=what):
        trainer_of(Student, **entry).run_training()


def test_a_teacher_that_cannot_be_loaded_is_named(trainer_of, teacher):
    file = Path(teacher.output_folder, "checkpoint_final.pth")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SystemExit, match=r"(?s)Teaches__nnUNetPlans__2d.*nnUNet_macl_teacher"):
        trainer_of(Student).run_training()
    Path(teacher.output_folder_base, "plans.json").unlink()
    with pytest.raises(SystemExit, match=r"plans\.json"):
        trainer_of(Student).run_training()


def test_a_teacher_that_finds_nothing_is_refused(trainer_of, teacher):
    file = f"{teacher.output_folder}/checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    for key, value in content["network_weights"].items():
        if "seg_layers" in key and key.endswith("bias"):
            value[0] = 100
    torch.save(content, file)
    with pytest.raises(SystemExit, match="no foreground"):
        trainer_of(Student).run_training()


def test_the_report_shows_the_labels_of_the_teacher(trainer_of, teacher):
    student = trainer_of(Student)
    student.run_training()
    shown = describe_pseudo_labels(Path(student.output_folder))
    assert dict(shown["facts"])["Images"] == str(len(pseudo_label_files(student)))
    # The labels of an image that a later training did not use do not count.
    teacher_file = Path(student.output_folder) / "pseudo_labels" / "teacher.json"
    made_by = json.loads(teacher_file.read_text())
    teacher_file.write_text(json.dumps(made_by | {"labels": made_by["labels"][1:]}))
    fewer = describe_pseudo_labels(Path(student.output_folder))
    assert dict(fewer["facts"])["Images"] == str(len(pseudo_label_files(student)) - 1)
    # An image without any label has no confidence.
    records = [file.with_suffix(".json") for file in pseudo_label_files(student)[1:]]
    for number, file in enumerate(records):
        values = {"foreground": 0.0, "confidence": 0.0} if number else {"foreground": 0.1, "confidence": 0.75}
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    facts = dict(describe_pseudo_labels(Path(student.output_folder))["facts"])
    assert facts["Without any label"] == str(len(records) - 1) and facts["Confidence"].startswith("0.750")
    # An image that has changed since is not shown with its former labels.
    image = json.loads(records[0].read_text())["image"]
    os.utime(image, ns=(1, 1))
    assert describe_pseudo_labels(Path(student.output_folder))["pictures"] == []
    # Without any label there is neither a confidence nor a picture.
    records[0].write_text(json.dumps(json.loads(records[0].read_text()) | {"foreground": 0.0}))
    none = describe_pseudo_labels(Path(student.output_folder))
    assert "Confidence" not in dict(none["facts"]) and none["pictures"] == []
    assert len(shown["pictures"]) == 3 and all(
        row["predicted"].startswith("data:image/png") for row in shown["pictures"]
    )
    assert describe_pseudo_labels(Path(teacher.output_folder)) is None


def test_a_teacher_that_has_seen_validation_cases_is_reported(trainer_of, teacher):
    """The teacher's folds may have been others."""
    validation = Path(teacher.output_folder) / "validation"
    validation.mkdir(exist_ok=True)
    student = trainer_of(Student)
    (mine,) = student.do_split()[1]
    for name, is_reported in ((mine, False), (student.do_split()[0][0], True)):
        for file in validation.iterdir():
            file.unlink()
        (validation / f"{name}.nii.gz").touch()
        student.check()
        words = rf"WARNING: .*was trained with other folds.*{mine}"
        assert bool(re.search(words, Path(student.log_file).read_text())) == is_reported


def test_a_checkpoint_of_another_teacher_is_not_taken_for_the_new_training(trainer_of, teacher, monkeypatch):
    """A training that was started again, and killed after the labelling, leaves the checkpoint of the former training."""
    monkeypatch.setenv("nnUNet_extTrainer", "")
    settings = {"from_scratch": True, "finetuning_epochs": 1, "finetuning_iterations": 2}
    for key, value in settings.items():
        monkeypatch.setattr(nnUNetTrainerMACLSelfTraining, key, value)
    run = self_train(DATASET, "2d", "0", teacher=teacher.output_folder_base, device="cpu")
    file = Path(teacher.output_folder, "checkpoint_final.pth")
    torch.save(torch.load(file, weights_only=False) | {"_best_ema": 1.0}, file)
    labels = run / "pseudo_labels" / "teacher.json"
    labels.write_text(json.dumps(json.loads(labels.read_text()) | {"sha256": sha256(file)}))
    with pytest.raises(UserError, match="from an earlier training"):
        self_train(DATASET, "2d", "0", teacher=teacher.output_folder_base, device="cpu")


def test_a_training_that_continues_with_other_images_says_so(trainer_of, teacher, workspace):
    first = trainer_of(Student)
    first.run_training()
    (workspace.raw / DATASET / "imagesUn" / "case_006_0000.nii.gz").unlink()
    second = trainer_of(Student)
    second.load_checkpoint(f"{first.output_folder}/checkpoint_best.pth")
    second.unlabelled_cases()
    number = len(pseudo_label_files(first))
    words = rf"WARNING: this training began with {number} unlabelled images, and continues with {number - 1},"
    assert re.search(words, Path(second.log_file).read_text())


def test_two_commands_do_not_train_in_one_folder(teacher, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", "")
    target = DatasetConfiguration.load(DATASET, "nnUNetPlans", "2d")
    run = model_folder(target, nnUNetTrainerMACLSelfTraining.__name__) / "fold_0"
    run.mkdir(parents=True)
    holder = (
        "import sys, time, pathlib; from nnunetv2_macl.training.run_folder import RunLock; "
        "RunLock(pathlib.Path(sys.argv[1])).acquire(); print(flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", holder, str(run)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        with pytest.raises(UserError, match="Another run is writing"):
            self_train(DATASET, "2d", "0", teacher=teacher.output_folder_base, device="cpu")
        other.kill()


def test_a_folder_that_cannot_take_the_labels_is_reported_before_the_training(teacher, workspace, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        self_train(
            DATASET, "2d", "0", teacher=teacher.output_folder_base, export_labels=tmp_path / "file", device="cpu"
        )
    assert not list((workspace.results / DATASET).glob("nnUNetTrainerMACLSelfTraining*"))


def test_labels_that_cannot_be_written_are_an_error(teacher, workspace, tmp_path, monkeypatch):
    target = DatasetConfiguration.load(DATASET, "nnUNetPlans", "2d")
    model, labels = Teacher(Path(teacher.output_folder_base), 0), tmp_path / "labels"
    usage = shutil.disk_usage(tmp_path)
    (workspace.raw / DATASET / "imagesUn" / "case_005_0000.nii.gz").write_bytes(b"damaged")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="the disk is full"):
        patch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=0))
        write_labels(model, target, labels, "cpu")
    for image in (workspace.raw / DATASET / "imagesUn").iterdir():
        image.write_bytes(b"damaged")
    with pytest.raises(UserError, match="No label could be written"):
        write_labels(model, target, labels, "cpu")


def test_an_arm_of_self_training_needs_the_arm_of_its_teacher():
    arm = parse_arm("self_train:recipe:restore")
    assert arm.teacher == parse_arm("recipe:restore").slug and arm.recipe == "restore"
    second = parse_arm("self_train:self_train:scratch")
    assert second.teacher == parse_arm("self_train:scratch").slug
    assert parse_arm("self_train:semi:scratch").semi is None
    with pytest.raises(UserError, match="semi:self_train"):
        parse_arm("semi:self_train:scratch")
    options = Options(
        "D", "2d", "P", ["scratch", "self_train:pretrained"], ["2"], 1, [0.01], "2", "2", None, 1, 1, *[None] * 4, False
    )
    with pytest.raises(UserError, match="pretrained"):
        options.check()


def test_the_command_names_a_missing_teacher_before_it_trains(teacher, workspace, monkeypatch):
    monkeypatch.delenv(TEACHER_VARIABLE)
    with pytest.raises(UserError, match=r"(?s)-tr nnUNetTrainerMACL\b.*-tr Teaches"):
        self_train(DATASET, "2d", "0", device="cpu")
    assert not list((workspace.results / DATASET).glob("nnUNetTrainerMACLSelfTraining*"))


def test_a_command_that_is_stopped_says_how_to_continue(teacher, monkeypatch):
    def stop(trainer):
        raise KeyboardInterrupt

    monkeypatch.setenv("nnUNet_extTrainer", "")
    monkeypatch.setattr(nnUNetTrainerMACLSelfTraining, "on_train_start", stop)
    with pytest.raises(UserError, match="nnUNetTrainerMACLSelfTraining was stopped"):
        self_train(DATASET, "2d", "0", teacher=teacher.output_folder_base, device="cpu")
    assert os.environ[TEACHER_VARIABLE] == teacher.output_folder_base


def test_a_command_that_is_stopped_early_goes_on_where_it_was(teacher, monkeypatch):
    """nnU-Net writes its first regular checkpoint after 50 epochs, and before that only the one of the best epoch."""
    settings = {"from_scratch": True, "finetuning_epochs": 2, "finetuning_iterations": 2}
    for key, value in settings.items():
        monkeypatch.setattr(nnUNetTrainerMACLSelfTraining, key, value)
    monkeypatch.setenv("nnUNet_extTrainer", "")
    finished = []
    on_epoch_end = nnUNetTrainerMACLSelfTraining.on_epoch_end

    def stop_after_the_first(trainer):
        finished.append(trainer.current_epoch)
        on_epoch_end(trainer)
        if len(finished) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(nnUNetTrainerMACLSelfTraining, "on_epoch_end", stop_after_the_first)
    with pytest.raises(UserError, match="was stopped"):
        self_train(DATASET, "2d", "0", teacher=teacher.output_folder_base, device="cpu")
    fold = self_train(DATASET, "2d", "0", teacher=teacher.output_folder_base, device="cpu")
    assert finished == [0, 1] and (fold / "checkpoint_final.pth").is_file()


@pytest.mark.slow
def test_two_rounds_by_the_command_and_the_labels_as_images(trainer_of, teacher, workspace, monkeypatch, tmp_path):
    for key, value in {"from_scratch": True, "finetuning_epochs": 1, "finetuning_iterations": 2}.items():
        monkeypatch.setattr(nnUNetTrainerMACLSelfTraining, key, value)
    monkeypatch.setenv("nnUNet_extTrainer", "")
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "case_005.nii.gz").write_text("corrected")

    def two_rounds():
        return self_train(
            DATASET,
            "2d",
            "0",
            teacher=teacher.output_folder_base,
            rounds=2,
            export_labels=labels,
            device="cpu",
        )

    fold = two_rounds()
    assert fold.parent.name.startswith("nnUNetTrainerMACLSelfTraining_round2__")
    first = fold.parents[1] / fold.parent.name.replace("_round2", "") / "fold_0"
    taught_by = [
        json.loads((run / "pseudo_labels" / "teacher.json").read_text())["fold_folder"] for run in (first, fold)
    ]
    assert taught_by == [teacher.output_folder, str(first)]
    assert sorted(path.name for path in labels.glob("*.nii.gz")) == [f"case_00{n}.nii.gz" for n in (5, 6, 7, 8)]
    assert (labels / "case_005.nii.gz").read_text() == "corrected"
    image = sitk.ReadImage(workspace.raw / DATASET / "imagesUn" / "case_006_0000.nii.gz")
    assert sitk.ReadImage(labels / "case_006.nii.gz").GetSize() == image.GetSize()
    done = (fold / "checkpoint_final.pth").stat().st_mtime_ns
    assert two_rounds() == fold and (fold / "checkpoint_final.pth").stat().st_mtime_ns == done
    # A training that was stopped in its validation is only validated.
    summary = fold / "validation" / "summary.json"
    summary.unlink()
    assert two_rounds() == fold and summary.is_file() and (fold / "checkpoint_final.pth").stat().st_mtime_ns == done
