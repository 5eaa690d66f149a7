"""The report of a fine-tuned model, from logs and summaries in nnU-Net's format."""

import json
import os

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from nnunetv2_macl.checkpoints import ORIGINS
from nnunetv2_macl.report.curves import COLOURS, draw_curves
from nnunetv2_macl.report.finetuned import _epochs, _worst_first, describe_training
from nnunetv2_macl.report.pictures import coloured
from nnunetv2_macl.training.finetune import GIVEN_WEIGHTS

ABOUT = """2026-01-01 00:00:00.0: MACL weights from /data/my run/macl_encoder.pth, /data/my run/macl_decoder.pth
  encoder: 64 of 64 tensors loaded
  decoder: 8 of 60 tensors loaded
  for SGD, kernels before an instance norm are scaled to their initial norms; the function is the same
  The weights are from another network: input_channels is 2 there and 1 here
  part  tensors loaded  how  why
  The images of this fold's validation cases were among the pre-training images, without their labels. To leave them out: X
2026-01-01 00:00:01.0: WARNING: these weights are from a run that collapsed: L_g
2026-01-01 00:00:02.0: something else
"""


def log(epochs, complete=True, rate=0.01):
    lines = []
    for epoch in epochs:
        lines += [f"Epoch {epoch}", f"Current learning rate: {rate}", "train_loss -0.5", "val_loss -0.4"]
        lines += ["Pseudo dice [np.float32(0.5)]", "Epoch time: 10.0 s"]
    return "\n".join([ABOUT, *lines, *(["Training done."] if complete else [])]) + "\n"


@pytest.fixture
def folder(workspace, target):
    """Return the folder of a finished training without a validation."""
    folder = workspace.run_folder("nnUNetTrainerMACL", fold=0)
    folder.mkdir(parents=True)
    (folder.parent / "plans.json").write_text(json.dumps(target.plans_manager.plans))
    (folder.parent / "dataset.json").write_text(json.dumps(target.dataset_json))
    (folder / "checkpoint_final.pth").touch()
    write_log(folder, 1, log(range(3)))
    return folder


def write_log(folder, number, text):
    file = folder / f"training_log_{number}.txt"
    file.write_text(text)
    # a folder that was copied has other times
    os.utime(file, (1000 - number, 1000 - number))


def summary(**dice):
    return {
        "foreground_mean": {"Dice": 0.5},
        "mean": {"1": {"Dice": 0.5}},
        "metric_per_case": [
            {"prediction_file": f"/v/{case}.nii.gz", "metrics": {"1": {"Dice": value}}} for case, value in dice.items()
        ],
    }


def test_all_messages_about_the_weights_are_shown(folder):
    shown = describe_training(folder)["origin"]
    assert shown[0] == "MACL weights, macl_encoder.pth, macl_decoder.pth" and len(shown) == 8
    assert "input_channels is 2" in shown[4] and shown[-1].startswith("WARNING: these weights")


@pytest.mark.parametrize("kind", ORIGINS)
def test_the_origin_of_the_weights_is_named(folder, kind):
    warning = (
        "2026-01-01 00:00:01.0: WARNING: the pre-training started from nnU-Net weights that may have seen the cases"
    )
    about = ABOUT.replace("MACL weights from", f"{ORIGINS[kind]} weights from").replace(
        "\n2026-01-01 00:00:02.0", f"\n{warning}\n"
    )
    write_log(folder, 2, about)
    shown = describe_training(folder)["origin"]
    assert shown[0].startswith(f"{ORIGINS[kind]} weights, macl_encoder.pth") and shown[-1].endswith("seen the cases")


def test_weights_of_nnunets_option_are_not_taken_for_a_start_from_scratch(folder):
    write_log(folder, 2, f"2026-01-01 00:00:03.0: {GIVEN_WEIGHTS}, for example by -pretrained_weights.\n")
    assert "-pretrained_weights" in describe_training(folder)["origin"][0]


def test_names_of_classes_are_no_formulas_and_may_begin_with_an_underscore():
    lines = [([0.1, 0.2], COLOURS[0], "-", label) for label in ("_hidden", "a $x^{2$ b", r"$\foo$")]
    assert "_hidden" in draw_curves(lines, "classes", from_zero=True)


def test_commands_name_device_and_plans(folder):
    (folder / "debug.json").write_text('{"device": "cpu"}')
    commands = [command for command, _ in describe_training(folder)["commands"]]
    assert len(commands) == 3 and all("-device cpu" in command for command in commands)


def test_only_the_last_training_in_a_folder_is_shown(folder):
    (folder / "validation").mkdir()
    (folder / "validation" / "summary.json").write_text(json.dumps(summary(a=0.9)))
    finished = describe_training(folder)
    assert finished["state"] == "finished" and finished["by_case"][0][0] == "a"
    write_log(folder, 2, log(range(2), complete=False))
    again = describe_training(folder)
    assert again["state"] == "stopped" and again["summary"][0] == ("Trained", "2 epochs") and again["by_case"] == []
    write_log(folder, 3, log([2, 3]))  # --c
    assert describe_training(folder)["summary"][0] == ("Trained", "4 epochs")
    write_log(folder, 4, ABOUT)  # --val
    assert describe_training(folder)["state"] == "finished"


def test_epochs_of_an_earlier_training_are_dropped():
    lines = (log([0, 1, 2], rate=1) + log([1], rate=2)).splitlines()
    assert {epoch: values["rate"] for epoch, values in _epochs(lines).items()} == {0: 1, 1: 2}


def test_cases_without_a_dice_come_last_and_names_may_have_dots(folder):
    nan = float("nan")
    rows = _worst_first(summary(a=0.9, b=nan, c=0.2, d=0.95, e=0.5))
    assert [row["prediction_file"][3] for row in rows] == list("ceadb")
    (folder / "validation").mkdir()
    names = {"1.3.6.1.4": 0.9, "1.3.6.2.7": nan}
    (folder / "validation" / "summary.json").write_text(json.dumps(summary(**names)))
    assert [name for name, _ in describe_training(folder)["by_case"]] == ["1.3.6.1.4", "1.3.6.2.7"]


def test_the_colour_of_a_label_does_not_depend_on_the_other_labels():
    grey = np.zeros((1, 2))
    both, alone = coloured(grey, np.array([[1, 2]])), coloured(grey, np.array([[0, 2]]))
    assert (both[0, 1] == alone[0, 1]).all() and (alone[0, 0] == 0).all()
    np.testing.assert_allclose(alone[0, 1], 0.55 * np.asarray(to_rgb(COLOURS[1])))
