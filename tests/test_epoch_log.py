"""The speed in the line of an epoch, and the times at which the picture is drawn."""

from types import SimpleNamespace

import pytest
from steps import recipe_of

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.training.callbacks.outputs import Pictures
from nnunetv2_macl.training.epoch_log import Epoch, EpochSums, read_curves, write_curves

LOG = {"lrs": [0.1], "patches_per_second": [5.0], "train_losses/restoration": [0.5]}


def sums(*steps):
    made = EpochSums()
    for seconds, is_warm in steps:
        made.add({"total": 1.0}, skipped=False)
        made.add_time(seconds, is_warm=is_warm)
    return made


def test_speed_and_remaining_time_exclude_compilation():
    epoch = Epoch(0, 3, 8, sums((60, False), (2, True), (2, True)), recipe_of())
    assert epoch.patches_per_second == 4.0
    # two more epochs of three steps of two seconds, with four seconds between epochs
    assert epoch.line(between_epochs=4.0).endswith("0:00:20 left")


@pytest.mark.parametrize("loss, is_shown", [("partition", True), ("region", False)])
def test_a_reference_value_is_shown_only_for_its_own_loss(loss, is_shown):
    """The two halves of GCL train different losses, and the value at collapse is that of the first half."""
    made = EpochSums(steps=1, seconds=1.0, sums={"total": 1.0, loss: 1.0})
    assert ("(collapse" in Epoch(0, 2, 8, made, recipe_of(method="gcl")).line()) == is_shown


def test_a_loss_that_some_steps_do_not_train_has_the_mean_of_the_others():
    made = EpochSums()
    for measured in ({"total": 1.0, "partition": 4.0}, {"total": 3.0, "partition": 2.0}, {"total": 5.0, "region": 7.0}):
        made.add(measured, skipped=False)
    made.add({"total": float("nan")}, skipped=True)
    assert made.means() == {"total": 3.0, "partition": 3.0, "region": 7.0}


def test_an_epoch_without_warm_steps_has_a_speed():
    assert Epoch(0, 1, 8, sums((4, False), (4, False)), recipe_of()).patches_per_second == 2.0


def test_the_picture_is_drawn_at_the_start_at_the_end_and_at_intervals(tmp_path):
    plans = SimpleNamespace(dataset_name="Dataset901_Generated")
    trainer = SimpleNamespace(
        output_folder=tmp_path, plans_manager=plans, configuration_name="2d", fold="all", log_of_epochs=LOG
    )
    pictures, file = Pictures(trainer), tmp_path / "progress.png"
    pictures.on_epoch_end(is_last=False)
    first = file.read_bytes()
    file.unlink()
    pictures.on_epoch_end(is_last=False)
    assert not file.exists() and (tmp_path / "epochs.csv").is_file()
    pictures.on_epoch_end(is_last=True)
    assert file.read_bytes() == first
    (tmp_path / "file").write_text("")
    pictures.folder = tmp_path / "file"  # a picture that cannot be written raises no error
    pictures.on_epoch_end(is_last=True)


def test_the_curves_are_read_as_they_were_written_and_damage_is_named(tmp_path):
    file = tmp_path / "epochs.csv"
    assert read_curves(file) == {}
    log = {"train_losses": [1.5, 0.1 + 0.2], "lrs": [1e-3, 1e-9]}
    write_curves(log | {"epoch_end_timestamps": [1.0]}, file)
    assert read_curves(file)["train_losses"] == [1.5]  # only whole epochs
    write_curves(log, file)
    assert read_curves(file) == log
    for damage in ("epoch,lrs\n0,abc\n", "epoch,lrs\n0\n"):
        file.write_text(damage)
        with pytest.raises(UserError, match=r"epochs\.csv"):
            read_curves(file)
