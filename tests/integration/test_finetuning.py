"""Fine-tuning, prediction and sharing with nnU-Net's own commands, from pre-trained weights."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DATASET, Workspace
from test_report import Page

from nnunetv2_macl import checkpoints
from nnunetv2_macl.checkpoints import PretrainedWeights
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.nnunet import GROUP_VARIABLE
from nnunetv2_macl.preprocessing.sources import training_cases
from nnunetv2_macl.report import write_report
from nnunetv2_macl.training.finetune import nnUNetTrainerMACL
from nnunetv2_macl.training.run_folder import cases_seen, digests_of, write_cases

QUICK = "nnUNetTrainerMACL_quick"
# a user's own trainer, which is in the user's own folder
QUICK_TRAINER = f"""
from nnunetv2_macl.training.finetune import nnUNetTrainerMACL

class {QUICK}(nnUNetTrainerMACL):
    finetuning_epochs = 2
    warmup_epochs = 1

    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_iterations_per_epoch = 2
        self.num_val_iterations_per_epoch = 1
        self.save_every = 1
"""


@pytest.fixture(scope="module")
def pretrained(planned, tmp_path_factory):
    """Return a workspace with a pre-trained data set, a user's own trainer, and a training with this trainer."""
    space = planned.copy(tmp_path_factory.mktemp("pretrained") / "nnunet")
    space.pretrain("901", "-c", "2d")
    trainers = space.folder / "my_trainers"
    trainers.mkdir()
    (trainers / f"{QUICK}.py").write_text(QUICK_TRAINER)
    both = os.pathsep.join([space.environment["nnUNet_extTrainer"], str(trainers)])
    space.train = lambda *arguments, **options: space.run(
        "nnUNetv2_train", "901", "2d", *arguments, "-device", "cpu", **({"nnUNet_extTrainer": both} | options)
    )
    space.out = space.train("0", "-tr", QUICK, "--npz")
    return space


def load(file):
    return torch.load(file, map_location="cpu", weights_only=False)


def test_the_log_names_the_transferred_weights(pretrained):
    assert "encoder: 64 of 64 tensors" in pretrained.out
    assert re.search(r"decoder: [1-9]\d* of 60 tensors", pretrained.out)
    assert "decoder.seg_layers" in pretrained.out and "segmentation layers" in pretrained.out
    assert "fold_all/macl_encoder.pth" in pretrained.out and "--exclude_fold 0" in pretrained.out
    assert "1 of this fold's 1 validation cases were among the pre-training images" in pretrained.out
    assert "Mean Validation Dice" in pretrained.out


def test_training_starts_from_the_weights(pretrained):
    """Two short epochs with a warm-up change the encoder only a little."""
    weights = checkpoints.load(pretrained.run_folder("nnUNetTrainerMACLPretrain") / "macl_encoder.pth")[
        "network_weights"
    ]
    trained = load(pretrained.run_folder(QUICK, fold=0) / "checkpoint_final.pth")["network_weights"]
    key = "encoder.stages.1.0.convs.0.conv.weight"
    moved = (trained[key] - weights[key]).norm() / weights[key].norm()
    assert 0 < moved < 0.2


def new_trainer(workspace):
    folder = workspace.preprocessed / DATASET
    plans, dataset_json = (json.loads((folder / name).read_text()) for name in ("nnUNetPlans.json", "dataset.json"))
    plans["continue_training"] = False
    return nnUNetTrainerMACL(plans, "2d", 0, dataset_json, torch.device("cpu"))


def test_an_unknown_optimiser_is_refused(workspace, monkeypatch):
    monkeypatch.setattr(nnUNetTrainerMACL, "finetuning_optimizer", "AdamW")
    with pytest.raises(SystemExit, match=r"'AdamW'.*'adamw'"):
        new_trainer(workspace).initialize()


def test_a_network_that_is_initialised_before_the_training_keeps_its_weights_and_the_log_says_so(
    workspace, monkeypatch
):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = new_trainer(workspace)
    trainer.initialize()
    before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    trainer.on_train_start()
    assert all(torch.equal(before[key], value) for key, value in trainer.network.state_dict().items())
    assert "-pretrained_weights" in next(Path(trainer.output_folder).glob("training_log*")).read_text()
    trainer.save_checkpoint(str(workspace.folder / "checkpoint.pth"))
    origin = load(workspace.folder / "checkpoint.pth")["macl"]
    assert origin["trainer"] == "nnUNetTrainerMACL" and "weights" not in origin


def test_a_pretraining_that_was_stopped_is_continued_and_not_begun_again(workspace, monkeypatch):
    trainer = new_trainer(workspace)
    folder = workspace.run_folder("nnUNetTrainerMACLPretrain", fold=0)
    folder.mkdir(parents=True)
    (folder / "checkpoint_latest.pth").touch()
    with pytest.raises(UserError, match=r"(?s)not finished.*--exclude_fold 0 -device cpu --c"):
        trainer._find_weights()


def test_the_warning_about_the_start_of_a_pretraining_names_the_split(workspace, target):
    """A pre-training may have started from weights of the same fold under another split."""
    trainer = new_trainer(workspace)
    trainer.initialize()
    encoder = {key: value for key, value in trainer.network.state_dict().items() if key.startswith("encoder.")}
    (held_out,) = trainer.do_split()[1]
    log = Path(trainer.log_file)
    for left_out, is_reported in ((held_out, False), ("case_of_before", True)):
        start = {"dataset_name": DATASET, "fold": "0", "origin": "MACL", "left_out": list(digests_of([left_out]))}
        description = {"dataset_name": "Dataset902_Archive", "macl_plan": {"pretrained_weights": start}}
        before = len(log.read_text())
        files = [Path("macl_encoder.pth")]
        trainer.load_macl_weights(PretrainedWeights(files, encoder, target.architecture(), description))
        assert ("WARNING: the pre-training started from" in log.read_text()[before:]) == is_reported


@pytest.mark.parametrize("optimizer, rate, size", [("sgd", 1e-2, 1), ("adamw", 3e-3, 3)])
def test_only_for_sgd_are_kernels_scaled_to_their_initial_norms(workspace, target, monkeypatch, optimizer, rate, size):
    monkeypatch.setattr(nnUNetTrainerMACL, "finetuning_optimizer", optimizer)
    trainer = new_trainer(workspace)
    assert trainer.initial_lr == rate
    trainer.initialize()
    fresh = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    kernels = [key for key, value in fresh.items() if key.startswith("encoder.") and value.ndim > 2]
    grown = {key: -3 * fresh[key] for key in kernels}
    encoder = {key: value for key, value in fresh.items() if key.startswith("encoder.")} | grown
    architecture = target.architecture()
    trainer.load_macl_weights(PretrainedWeights([Path("macl_encoder.pth")], encoder, architecture, {}))
    after = trainer.network.state_dict()
    assert len(kernels) > 8
    for key in kernels:
        torch.testing.assert_close(after[key], -size * fresh[key])
    log = next(Path(trainer.output_folder).glob("training_log*")).read_text()
    assert ("kernels before an instance norm are scaled" in log) == (optimizer == "sgd")


def test_a_warning_names_validation_images_that_pretraining_saw(target):
    plans = target.plans_manager.plans | {"continue_training": False}
    trainer = nnUNetTrainerMACL(plans, "2d", 1, target.dataset_json, torch.device("cpu"))
    trainer.initialize()
    encoder = {key: value for key, value in trainer.network.state_dict().items() if key.startswith("encoder.")}
    log = Path(trainer.log_file)
    left_out = sorted(digests_of(trainer.do_split()[1]))
    for description, seen in (
        ({"dataset_name": DATASET, "fold": "all"}, True),
        ({"dataset_name": DATASET, "fold": "0"}, True),
        ({"dataset_name": DATASET, "fold": "1"}, False),
        ({"dataset_name": DATASET, "fold": "0", "left_out": left_out}, False),
        ({"dataset_name": DATASET, "fold": "1", "left_out": left_out[1:]}, True),
        ({"dataset_name": "Dataset902_Archive", "fold": "all"}, False),
        ({"dataset_name": "Dataset902_Archive", "dataset_fingerprint": {"unlabelled_datasets": [DATASET]}}, True),
    ):
        # the weights are not in the folder of their run
        before = len(log.read_text())
        files = [Path("macl_encoder.pth")]
        trainer.load_macl_weights(PretrainedWeights(files, encoder, target.architecture(), description))
        logged = log.read_text()[before:]
        assert ("among the pre-training images" in logged) == seen
        assert ("nnUNetv2_train_macl_pretrain 901 -c 2d --exclude_fold 1 -device cpu" in logged) == seen


def test_validation_cases_that_a_run_saw_are_named_for_any_fold(target, tmp_path, monkeypatch):
    """The split may have changed since the pre-training, and another data set may contain the same cases."""
    names = [case.name for case in training_cases(target)]
    splits = [{"train": names[2:], "val": names[:2]}, {"train": names[:3], "val": names[3:]}]
    (target.folder / "splits_final.json").write_text(json.dumps(splits))
    plans = target.plans_manager.plans | {"continue_training": False}
    trainer = nnUNetTrainerMACL(plans, "2d", 0, target.dataset_json, torch.device("cpu"))
    trainer.initialize()
    encoder = {key: value for key, value in trainer.network.state_dict().items() if key.startswith("encoder.")}

    def logged(description, *seen):
        before = Path(trainer.log_file).read_text()
        write_cases(tmp_path, seen, resumed=False)
        files = [tmp_path / "macl_encoder.pth"]
        trainer.load_macl_weights(PretrainedWeights(files, encoder, target.architecture(), description))
        return Path(trainer.log_file).read_text()[len(before) :]

    other = {"dataset_name": "Dataset902_Archive", "fold": "all"}
    own = [(DATASET, name) for name in names]
    for description in ({"dataset_name": DATASET, "fold": "0"}, {"dataset_name": DATASET, "fold": "all"}, other):
        out = logged(description, *own[1:])
        assert "1 of this fold's 2 validation cases were among the pre-training images" in out
        assert f"labels: {names[1]}. To leave them out: nnUNetv2_train_macl_pretrain 901 -c 2d --exclude_fold 0" in out
        assert "were among" not in logged(description, *own[2:])
        # cases of another data set with the same names
        assert "were among" not in logged(description, *(("Dataset902_Archive", name) for name in names))
    # other images of validation patients, if the names tell the patients
    monkeypatch.setenv(GROUP_VARIABLE, r"^case_00\d|^new")
    scans = (DATASET, f"{names[0]}_late"), ("Dataset902_Archive", f"{names[1]}_late"), ("Dataset902_Archive", "new_0")
    out = logged(other, *scans)
    assert f"{names[0]}_late, {names[1]}_late. To leave them out" in out and "new_0" not in out
    assert "To leave them out" not in logged(other, scans[2])
    # An expression for the names of this data set need not match those of another one, and the training is possible.
    monkeypatch.setenv(GROUP_VARIABLE, r"^case_00\d")
    assert "It is not known whether" in logged(other, *scans)
    monkeypatch.delenv(GROUP_VARIABLE)
    assert "To leave them out" not in logged(other, *scans)
    # a continued run keeps the cases that it saw before
    write_cases(tmp_path, own[:1], resumed=False)
    write_cases(tmp_path, own[4:], resumed=True)
    assert cases_seen(tmp_path) == {DATASET: {names[0], names[4]}}
    supervised = {"kind": "nnunet", "dataset_name": DATASET, "fold": 1}
    assert "with the labels" in logged(supervised) and "with the labels" not in logged(supervised | {"fold": 0})


def test_checkpoints_name_nnunets_own_trainer(pretrained):
    checkpoint = load(pretrained.run_folder(QUICK, fold=0) / "checkpoint_final.pth")
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    assert checkpoint["macl"]["trainer"] == QUICK and checkpoint["macl"]["recipe"]["weight_restoration"] == 1.0


def test_continuing_and_validating_need_no_pretrained_weights(pretrained):
    nowhere = {"nnUNet_macl_weights": str(pretrained.folder / "nowhere")}
    folder = pretrained.run_folder(QUICK, fold=0)
    assert "Mean Validation Dice" in pretrained.train("0", "-tr", QUICK, "--val", **nowhere)
    shutil.copy(folder / "checkpoint_final.pth", folder / "kept.pth")
    (folder / "checkpoint_final.pth").rename(folder / "checkpoint_latest.pth")
    out = pretrained.train("0", "-tr", QUICK, "--c", **nowhere)
    assert "MACL weights from" not in out and "Training done" in out
    assert load(folder / "checkpoint_final.pth")["macl"]["trainer"] == QUICK


@pytest.fixture
def bare(tmp_path):
    """Return variables with which importing this package raises an error."""
    shadow = tmp_path / "shadow"
    (shadow / "nnunetv2_macl").mkdir(parents=True)
    (shadow / "nnunetv2_macl" / "__init__.py").write_text("raise ImportError('not on this machine')")
    return {"PYTHONPATH": str(shadow), "nnUNet_extTrainer": ""}


def test_prediction_without_this_package(pretrained, bare, tmp_path):
    """Importing this package raises an error, but nnU-Net predicts, exports and installs."""
    images = pretrained.raw / DATASET / "imagesTs"
    predict = ("nnUNetv2_predict", "-d", "901", "-c", "2d", "-tr", QUICK, "-f", "0", "-device", "cpu", "-i", images)
    predict += ("-npp", "1", "-nps", "1")
    pretrained.run(*predict, "-o", tmp_path / "here", **bare)
    assert len(list((tmp_path / "here").glob("*.nii.gz"))) == 1

    archive = tmp_path / "model.zip"
    export = ("nnUNetv2_export_model_to_zip", "-d", "901", "-o", archive, "-c", "2d", "-tr", QUICK, "-f", "0")
    pretrained.run(*export, **bare)
    elsewhere = Workspace(tmp_path / "elsewhere")
    elsewhere.run("nnUNetv2_install_pretrained_model_from_zip", archive, **bare)
    elsewhere.run(*predict, "-o", tmp_path / "there", **bare)
    one, other = (next((tmp_path / folder).glob("*.nii.gz")).read_bytes() for folder in ("here", "there"))
    assert one == other


@pytest.mark.slow
def test_nnunet_finds_the_best_configuration(pretrained):
    out = pretrained.run(
        "nnUNetv2_find_best_configuration", "901", "-c", "2d", "-tr", QUICK, "-f", "0", "--disable_ensembling"
    )
    assert "nnUNetv2_predict" in out and QUICK in out


@pytest.mark.slow
def test_nnunets_option_takes_precedence_over_the_variable(pretrained):
    network = pretrained.run_folder("nnUNetTrainerMACLPretrain") / "macl_network.pth"
    out = pretrained.train("0", "-tr", QUICK, "-pretrained_weights", network, nnUNet_macl_weights="/nowhere")
    assert "Loading pretrained weights from file" in out and "MACL weights from" not in out


def test_the_variable_names_the_weights(pretrained):
    encoder = pretrained.run_folder("nnUNetTrainerMACLPretrain") / "macl_encoder.pth"
    out = pretrained.train("2", "-tr", QUICK, nnUNet_macl_weights=str(encoder))
    assert "encoder: 64 of 64" in out and "decoder: 0 of 60" in out


@pytest.mark.slow
def test_nnssl_weights_of_a_network_with_other_channels(pretrained, tmp_path):
    """The command shows the same table as the log of the training."""
    content = checkpoints.load(pretrained.run_folder("nnUNetTrainerMACLPretrain") / "macl_encoder.pth")
    architecture, weights = content["architecture"], content["network_weights"]
    stem = [key for key in weights if key.startswith("encoder.stages.0.0.convs.0.") and weights[key].ndim == 4]
    weights |= {key: weights[key].repeat(1, 3, 1, 1) for key in stem}
    plan = {
        "architecture_plans": {"arch_class_name": "PlainConvUNet", "arch_kwargs": architecture["arch_kwargs"]},
        "pretrain_plan": {"configurations": {"onemmiso": {}}},
        "pretrain_num_input_channels": 3,
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stages.0",
    }
    file = tmp_path / "nnssl.pth"
    checkpoints.save({"network_weights": weights, "nnssl_adaptation_plan": plan, "citations": ["cite me"]}, file)
    shown = pretrained.run("nnUNetv2_macl_transfer", file, "901", "-c", "2d")
    assert "another network, input_channels is 3 there and 1 here" in shown
    table = shown[shown.index("part ") :].strip().splitlines()
    assert "3 image channels there, 1 here" in table[1] and "adapted" in table[1]
    out = pretrained.train("3", "-tr", QUICK, nnUNet_macl_weights=str(file))
    assert "nnssl weights from" in out and "encoder: 64 of 64" in out and "decoder: 0 of 60" in out
    assert all(line in out for line in table)
    assert load(pretrained.run_folder(QUICK, fold=3) / "checkpoint_final.pth")["macl"]["citations"] == ["cite me"]


def test_fine_tuning_before_pre_training_names_the_command(planned, tmp_path):
    space = planned.copy(tmp_path / "nnunet")
    out = space.run("nnUNetv2_train", "901", "2d", "0", "-tr", "nnUNetTrainerMACL_5epochs", "-device", "cpu", code=1)
    assert "nnUNetv2_train_macl_pretrain 901 -c 2d" in out and "Traceback" not in out
    assert not list(space.results.rglob("*.*")), "something was written"


@pytest.mark.parametrize("trainer", ["nnUNetTrainerMACL", "nnUNetTrainerMACLSemi", "nnUNetTrainerMACLSelfTraining"])
def test_nnunet_finds_the_variants_of_a_trainer(trainer, monkeypatch):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunetv2_macl.files import resource_folder

    monkeypatch.setenv("nnUNet_extTrainer", str(resource_folder("trainers")))
    for epochs in (1, 5, 10, 20, 50, 100, 250, 500):
        variant = f"_{epochs}epoch{'s' if epochs > 1 else ''}"
        found = recursive_find_trainer_class_by_name(trainer + variant)
        assert found.finetuning_epochs == epochs
        assert getattr(found, "default_teacher", f"nnUNetTrainerMACL{variant}") == f"nnUNetTrainerMACL{variant}"


def test_the_report_of_a_fine_tuned_model(pretrained, tmp_path):
    folder = pretrained.run_folder(QUICK, fold=0)
    pretrained.run("nnUNetv2_macl_report", folder, "-o", tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    case = next((folder / "validation").glob("*.nii.gz")).name.partition(".")[0]
    for words in (
        "finished", "2 epochs", "4 training and 1 validation cases", "encoder: 64 of 64 tensors", case, "liver",
        f"nnUNetv2_predict -d 901 -c 2d -f 0 -tr {QUICK}", "were among the pre-training images",
    ):  # fmt: skip
        assert words in page.words, words
    assert all(r.startswith(("data:image/", "#")) for r in page.references)
    # slice, labels and prediction of the only validation case
    assert sum(r.startswith("data:image/") for r in page.references) == 3

    copy = shutil.copytree(folder.parent, tmp_path / folder.parent.name) / "fold_0"
    (copy / "checkpoint_final.pth").unlink()
    shutil.rmtree(copy / "validation")
    words = Page(write_report(copy).read_text()).words
    assert "not finished" in words and f"nnUNetv2_train 901 2d 0 -tr {QUICK} -device cpu --c" in words
