"""Pre-training on small volumes, with nnU-Net's real planning, preprocessing and training loop."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DATASET, hashes, same
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_macl import checkpoints
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.nnunet import GROUP_VARIABLE
from nnunetv2_macl.run import pretrain
from nnunetv2_macl.synthetic import generate_dataset
from nnunetv2_macl.training.commands import command_to_go_on
from nnunetv2_macl.training.pretrain import nnUNetTrainerMACLPretrain
from nnunetv2_macl.training.run_folder import LOCK_FILE, cases_seen

PRETRAIN = "nnUNetTrainerMACLPretrain"
EXPORTED = ("macl_encoder.pth", "macl_decoder.pth", "macl_network.pth")


def files_of_nnunet(folder):
    return {path: value for path, value in hashes(folder).items() if "_macl_" not in path}


def stock_network(workspace, plans="nnUNetPlans"):
    """Return nnU-Net's own network for the plan."""
    folder = workspace.preprocessed / DATASET
    manager = PlansManager(json.loads((folder / f"{plans}.json").read_text()))
    return nnUNetTrainer.build_network_architecture(manager, manager.get_configuration("2d"), 1, 3, True)


def test_the_command_from_beginning_to_end(workspace):
    generate_dataset(workspace.raw / "Dataset902_Other", labelled=2, unlabelled=0, test=0, shape=(6, 40, 48), seed=3)
    shutil.rmtree(workspace.raw / DATASET / "labelsTr")  # pre-training never opens labels
    before = files_of_nnunet(workspace.preprocessed)
    out = workspace.pretrain("901", "-c", "2d", "-u", "902", "-recipe", "macl", epochs=2, steps=3)

    assert files_of_nnunet(workspace.preprocessed) == before, "nnU-Net's own files changed"
    assert "Pre-training on 11 images" in out  # 5 in imagesTr, 4 in imagesUn, 2 in the other data set
    lines = re.findall(r"Epoch \d+ .*L_g [\d.]+  L_d [\d.]+  L_R [\d.]+ .*patches/s .* left", out)
    assert len(lines) == 2
    assert "nnUNetv2_train 901 2d 0 -tr nnUNetTrainerMACL" in out

    folder = workspace.run_folder(PRETRAIN)
    files = {path.name for path in folder.iterdir()}
    expected = {"checkpoint_final.pth", "progress.png", "views.png", "debug.json", "macl_plan.json", *EXPORTED}
    assert expected <= files and "checkpoint_latest.pth" not in files
    assert any(name.startswith("training_log_") for name in files)
    assert not any(name.endswith(".tmp") or name.startswith(".macl_running") for name in files)

    assert {name: len(cases) for name, cases in cases_seen(folder).items()} == {DATASET: 9, "Dataset902_Other": 2}

    encoder, decoder, network = (checkpoints.load(folder / name) for name in EXPORTED)
    saved = checkpoints.load(folder / "checkpoint_final.pth")
    # Version 0.1.0 continues from these keys.
    assert " ".join(sorted(saved)) == (
        "collapse collapsed current_epoch epoch_sums format_version grad_scaler_state group_regex images kind logging "
        "lr_scheduler_state network_weights optimizer_state run step trainer_name"
    )
    checkpoint = saved["network_weights"]
    own = stock_network(workspace).state_dict()
    whole = network["network_weights"]
    assert whole.keys() == own.keys()
    for key, value in {**encoder["network_weights"], **decoder["network_weights"]}.items():
        assert torch.equal(value, whole[key]) and value.shape == own[key].shape
    assert same(encoder["network_weights"], {k: v for k, v in whole.items() if k.startswith("encoder.")})
    in_checkpoint = {k.removeprefix("network."): v for k, v in checkpoint.items() if k.startswith("network.encoder.")}
    assert same(encoder["network_weights"], in_checkpoint)
    stages = encoder["macl_plan"]["decoder_stages"]
    assert {k.split(".")[2] for k in decoder["network_weights"]} == {str(i) for i in range(stages)}
    for content in (encoder, decoder, network):
        assert content["architecture"]["input_channels"] == 1
        assert content["dataset_fingerprint"]["images"] == 11 and content["dataset_fingerprint"]["nnunet"]
        assert content["recipe"]["weight_dense"] == 0.01 and content["epochs"] == 2 and content["collapsed"] is None
        assert content["final_losses"]["train_losses/global"] > 0
        assert content["package_versions"]["nnunetv2"]
        # the default recipe has two methods
        assert [text.split()[0] for text in content["citations"]] == ["Zeng", "Xie", "Isensee"]

    moved = workspace.pretrain("901", "-c", "2d")
    assert "An earlier run was in this folder" in moved
    (previous,) = folder.glob("previous_*")
    assert checkpoints.load(previous / "macl_encoder.pth")["epochs"] == 2
    assert (
        "Preprocessing 2 unlabelled cases into" in out and "unlabelled cases into" not in moved
    )  # preprocessed cases are used again


def test_the_seed_determines_the_weights(workspace):
    options = dict(device="cpu", num_epochs=1, num_iterations_per_epoch=2, batch_size=4)

    def weights(**more):
        folder = pretrain(DATASET, "2d", **(options | more))
        return checkpoints.load(folder / "macl_encoder.pth")["network_weights"]

    one, again, other = weights(), weights(), weights(seed=7)
    assert same(one, again) and not same(one, other)
    assert not same(one, {k: v for k, v in stock_network(workspace).state_dict().items() if k in one})


def test_other_images_of_validation_patients_are_left_out(workspace, monkeypatch):
    """Cases 0 to 4 are labelled, 5 to 8 are not. There are two patients: cases with an even and with an odd last digit."""
    options = {"device": "cpu", "exclude_fold": 0, "num_epochs": 1, "num_iterations_per_epoch": 1}
    splits = [{"train": ["case_000", "case_002", "case_003", "case_004"], "val": ["case_001"]}]
    (workspace.preprocessed / DATASET / "splits_final.json").write_text(json.dumps(splits))

    def seen():
        return cases_seen(pretrain(DATASET, "2d", **options))[DATASET]

    assert seen() == {f"case_00{n}" for n in (0, 2, 3, 4, 5, 6, 7, 8)}
    monkeypatch.setenv(GROUP_VARIABLE, "case_00[02468]|case_00(?=[1357])")
    assert seen() == {f"case_00{n}" for n in (0, 2, 4, 6, 8)}
    monkeypatch.setenv(GROUP_VARIABLE, "^case")
    with pytest.raises(UserError, match=rf"unset {GROUP_VARIABLE}"):
        seen()


@pytest.mark.slow
def test_nnunets_command_with_a_fold_equals_ours_with_an_excluded_fold(workspace, monkeypatch):
    # nnU-Net's command does not respect this variable, and another number of threads adds numbers in another order.
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    workspace.pretrain("901", "-c", "2d", "--exclude_fold", "1")
    folder = workspace.run_folder(PRETRAIN, fold=1)
    ours = checkpoints.load(folder / "macl_encoder.pth")
    split = json.loads((workspace.preprocessed / DATASET / "splits_final.json").read_text())
    assert ours["dataset_fingerprint"]["images"] == 9 - len(split[1]["val"])
    out = workspace.run("nnUNetv2_train", "901", "2d", "1", "-tr", PRETRAIN, "-device", "cpu")
    assert "validation images of fold 1" in out
    theirs = checkpoints.load(folder / "macl_encoder.pth")
    assert same(ours["network_weights"], theirs["network_weights"])


def test_nnunets_command_derives_a_missing_plan(workspace):
    """The test ends at the first log line of the training, because the default length would take too long."""
    command = ["nnUNetv2_train", "901", "2d", "all", "-tr", PRETRAIN, "-device", "cpu"]
    process = subprocess.Popen(
        command, env=workspace.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        for line in process.stdout:
            if "Pre-training on" in line:
                break
    finally:
        process.kill()
        process.wait()
    assert "on 9 images, 16 epochs of 250 steps" in line
    assert (workspace.preprocessed / DATASET / "nnUNetPlans_macl_2d.json").is_file()


@pytest.mark.slow
def test_the_commands_that_a_users_trainer_prints(workspace, target):
    mine = workspace.folder / "mine"
    mine.mkdir()
    (mine / f"{PRETRAIN}_mine.py").write_text(
        "from nnunetv2_macl.training.pretrain import nnUNetTrainerMACLPretrain\n\n"
        f"class {PRETRAIN}_mine(nnUNetTrainerMACLPretrain):\n    save_every_seconds = 60\n"
    )
    both = os.pathsep.join([workspace.environment["nnUNet_extTrainer"], str(mine)])
    workspace.pretrain("901", "-c", "2d", "--plan_only", epochs=3, steps=1)
    command = ["nnUNetv2_train", "901", "2d", "all", "-tr", f"{PRETRAIN}_mine", "-device", "cpu"]
    out = workspace.run(*command, nnUNet_extTrainer=both)
    folder = workspace.run_folder(f"{PRETRAIN}_mine")
    assert (folder / "macl_encoder.pth").is_file() and f"export nnUNet_macl_weights={folder}" in out
    resume = command_to_go_on(target, "all", "cpu", f"{PRETRAIN}_mine")
    assert resume == " ".join([*command, "--c"])


@pytest.mark.parametrize(
    "recipe",
    [
        "pcl",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("simclr", "moco", "byol", "simsiam", "simtriplet")),
        *(
            pytest.param(f"table6_{name}", marks=pytest.mark.slow)
            for name in ("ema_encoder_one_stage", "independent_encoder_one_stage", "two_stages_no_downsampling")
        ),
    ],
)
def test_recipes_run(workspace, recipe):
    folder = pretrain(
        DATASET, "2d", recipe=recipe, device="cpu", num_epochs=2, num_iterations_per_epoch=1, batch_size=4
    )
    weights = checkpoints.load(folder / "macl_decoder.pth")["network_weights"]
    assert bool(weights) == recipe.startswith("table6")


def test_a_run_of_one_epoch_has_only_the_first_training_stage(workspace):
    folder = pretrain(
        DATASET, "2d", recipe="table6_two_stages_downsampling", device="cpu", num_epochs=1, num_iterations_per_epoch=2,
        batch_size=4,
    )  # fmt: skip
    torch.manual_seed(12345)
    made = stock_network(workspace).state_dict()
    trained = checkpoints.load(folder / "macl_network.pth")["network_weights"]
    # The second stage does not change the encoder.
    assert any(not torch.equal(made[k], v) for k, v in trained.items() if k.startswith("encoder."))


def test_a_validation_leaves_no_lock(target):
    """On another machine, a lock that is left over would look like that of a run."""
    plans = target.plans_manager.plans | {"continue_training": False}
    trainer = nnUNetTrainerMACLPretrain(plans, "2d", "all", target.dataset_json, torch.device("cpu"))
    trainer.initialize()
    lock = Path(trainer.output_folder) / LOCK_FILE
    assert lock.is_file()
    trainer.perform_actual_validation()
    assert not lock.exists()


def test_collapse_is_reported_and_logged_and_stops_the_run(workspace, tmp_path):
    recipe = tmp_path / "collapses.json"
    values = {"threshold": 1.0, "limit_positives": False, "weight_dense": 0.0, "weight_equivariance": 10.0}
    values |= {"standardise_projector": False, "collapse_patience": 2, "optimizer": "sgd"}
    recipe.write_text(json.dumps({"inherits_from": "paper", "decoder_stages": 1, "scale": 2} | values))
    out = workspace.pretrain("901", "-c", "2d", "-recipe", recipe, code=1, epochs=4, steps=20)
    assert "COLLAPSED" in out and "own_view_weight" in out and "was stopped" in out
    folder = workspace.run_folder(PRETRAIN)
    # follow the instructions to continue anyway
    plan, command = re.search(r"set collapse_patience to 0 in (\S+) and type:\n +(.*--c)$", out, re.M).groups()
    Path(plan).write_text(Path(plan).read_text().replace('"collapse_patience": 2', '"collapse_patience": 0'))
    assert "The run ended COLLAPSED" in workspace.run(*command.split())
    assert checkpoints.load(folder / "checkpoint_final.pth")["collapsed"]
    assert "COLLAPSED" in next(folder.glob("training_log_*")).read_text()
    assert not list(folder.glob(".macl_running*"))


@pytest.mark.slow
def test_2d_files_with_all_channels_in_one_file(workspace):
    """nnU-Net's own reader reads PNG files, which have no slice axis and all channels in one file."""
    import numpy as np
    from skimage import io

    rng = np.random.default_rng(0)
    raw = workspace.raw / "Dataset903_Photos"
    for folder, count in (("imagesTr", 5), ("labelsTr", 5), ("imagesUn", 3)):
        (raw / folder).mkdir(parents=True)
        for i in range(count):
            shape = (40, 48) if folder == "labelsTr" else (40, 48, 3)
            name = (
                f"{folder[:6]}{i}.png" if folder == "labelsTr" else f"{'labels' if count == 5 else 'new'}{i}_0000.png"
            )
            values = rng.integers(0, 2 if folder == "labelsTr" else 255, shape).astype(np.uint8)
            io.imsave(raw / folder / name, values, check_contrast=False)
    description = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "thing": 1}}
    (raw / "dataset.json").write_text(json.dumps(description | {"numTraining": 5, "file_ending": ".png"}))
    workspace.run("nnUNetv2_plan_and_preprocess", "-d", "903", "-c", "2d", "-npfp", "1", "-np", "1")
    folder = pretrain(903, "2d", device="cpu", num_epochs=1, num_iterations_per_epoch=1, batch_size=4)
    content = checkpoints.load(folder / "macl_encoder.pth")
    assert content["architecture"]["input_channels"] == 3 and content["dataset_fingerprint"]["images"] == 8


def test_a_second_run_in_a_folder_is_refused(workspace):
    folder = workspace.run_folder(PRETRAIN)
    folder.mkdir(parents=True)
    lock = folder / ".macl_running.json"
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        import socket

        lock.write_text(json.dumps({"host": socket.gethostname(), "pid": sleeper.pid, "started": "now"}))
        out = workspace.pretrain("901", "-c", "2d", code=1)
        assert f"process {sleeper.pid} on {socket.gethostname()}" in out and "Traceback" not in out
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(dataset=555), ["'555'", DATASET]),
        (dict(dataset="Dataset555_None"), ["Dataset555_None", DATASET]),
        (dict(dataset="hippo"), ["'hippo'", DATASET]),
        (dict(plans="Nope"), ["Nope.json", "-p nnUNetPlans", "nnUNetv2_plan_and_preprocess -d 901"]),
        (dict(configuration="4d"), ["'4d'", "2d"]),
        (dict(configuration="3d_fullres"), ["nnUNetv2_preprocess -d 901", "-c 2d"]),
        (dict(recipe="nope"), ["'nope'", "macl"]),
        (dict(exclude_fold=9), ["--exclude_fold 9", "0 to 4"]),
        (dict(device="gpu"), ["cuda, cpu, mps", "'gpu'"]),
        (dict(num_epochs=0), ["num_epochs", "equal to 1", "got 0"]),
        (dict(batch_size=1), ["batch_size", "equal to 2", "got 1"]),
        (dict(num_gpus=2), ["-num_gpus 2", "cuda"]),
        (dict(unlabelled=["Dataset777_No"]), ["Dataset777_No"]),
        (dict(unlabelled=[901]), ["-u", DATASET, "itself"]),
        (dict(continue_training=True), ["fold_all", "--c"]),
    ],
)
def test_mistakes_are_explained_and_nothing_is_written(workspace, arguments, words):
    before = files_of_nnunet(workspace.folder)
    options = dict(dataset="901", configuration="2d", device="cpu", num_epochs=1) | arguments
    with pytest.raises(UserError) as error:
        pretrain(options.pop("dataset"), options.pop("configuration"), **options)
    assert all(word in str(error.value) for word in words), error.value
    assert files_of_nnunet(workspace.folder) == before
    assert not list(workspace.results.rglob("*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(workspace):
    with pytest.raises(UserError, match="no CUDA device"):
        pretrain("901", "2d")


def test_mistakes_on_the_command_line_end_with_code_1_and_no_traceback(workspace):
    out = workspace.run("nnUNetv2_train_macl_pretrain", "555", "-device", "cpu", code=1)
    assert "Error: There is no data set '555'" in out and "Traceback" not in out
    environment = {key: value for key, value in workspace.environment.items() if not key.startswith("nnUNet_")}
    process = subprocess.run(["nnUNetv2_train_macl_pretrain", "901"], env=environment, capture_output=True, text=True)
    assert process.returncode == 1 and "export nnUNet_raw=" in process.stderr and "Traceback" not in process.stderr


def test_changed_options_are_named_when_a_run_continues(workspace):
    generate_dataset(workspace.raw / "Dataset902_Other", labelled=1, unlabelled=0, test=0, shape=(6, 40, 48))
    options = dict(device="cpu", unlabelled=[902, "902"])
    pretrain("901", "2d", num_epochs=1, num_iterations_per_epoch=1, batch_size=4, **options)
    with pytest.raises(UserError, match=r"batch_size=8 \(was 4\)") as error:
        pretrain("901", "2d", batch_size=8, recipe="macl", continue_training=True, **options)
    assert "-u" not in str(error.value) and "-recipe" not in str(error.value)
    # keys of restoration, which this setting switches off
    switched_off = dict(weight_restoration=0.0, num_epochs=1, num_iterations_per_epoch=1, batch_size=4, **options)
    folder = pretrain("901", "2d", **switched_off)
    (folder / "checkpoint_final.pth").rename(folder / "checkpoint_latest.pth")
    pretrain("901", "2d", continue_training=True, **switched_off)
    with pytest.raises(UserError, match="weight_restoration=1"):
        pretrain("901", "2d", continue_training=True, **(switched_off | {"weight_restoration": 1.0}))
    pretrain("901", "2d", num_epochs=1, num_iterations_per_epoch=1, batch_size=4, **options)
    with pytest.raises(UserError, match=r"-recipe restore \(was macl\)"):
        pretrain("901", "2d", recipe="restore", continue_training=True, **options)
    # a run that writes no weights takes none away
    with pytest.raises(UserError, match="--disable_checkpointing"):
        pretrain("901", "2d", num_epochs=1, num_iterations_per_epoch=1, disable_checkpointing=True, **options)
    assert len(list(workspace.run_folder(PRETRAIN).glob("macl_*.pth"))) == 3


@pytest.mark.slow
def test_a_run_continues_without_an_image_that_became_unreadable(workspace):
    options = dict(device="cpu", num_iterations_per_epoch=1, batch_size=4)
    folder = pretrain("901", "2d", num_epochs=1, **options)
    (folder / "checkpoint_final.pth").rename(folder / "checkpoint_latest.pth")
    (workspace.raw / DATASET / "imagesUn" / "case_005_0000.nii.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"case_005.*--skip_unreadable"):
        pretrain("901", "2d", device="cpu", continue_training=True)
    pretrain("901", "2d", device="cpu", continue_training=True, skip_unreadable=True)
    log = "".join(file.read_text() for file in folder.glob("training_log_*.txt"))
    assert "Pre-training on 8 images" in log and "left out as unreadable: 1" in log and "Left out: " in log
    assert "case_005_0000.nii.gz" in log and "case_005" not in (folder / "report.html").read_text()
    with pytest.raises(UserError, match=r"--channel_map \{'MR0': 'CT'\} \(was \{\}\)"):
        pretrain("901", "2d", device="cpu", continue_training=True, channel_map={"MR0": "CT"})


@pytest.mark.slow
def test_a_run_that_continues_in_smaller_parts_reaches_nearly_the_same_weights(workspace):
    options = dict(device="cpu", batch_size=4, recipe="paper")
    folder = pretrain("901", "2d", num_epochs=2, num_iterations_per_epoch=1, **options)
    whole = checkpoints.load(folder / "macl_encoder.pth")["network_weights"]
    shutil.rmtree(folder)
    pretrain("901", "2d", num_epochs=2, num_iterations_per_epoch=1, **options)
    (folder / "checkpoint_final.pth").unlink()
    pretrain("901", "2d", device="cpu", continue_training=True, patches_at_once=1)
    assert json.loads((folder / "macl_plan.json").read_text())["patches_at_once"] == 1
    cut = checkpoints.load(folder / "macl_encoder.pth")["network_weights"]
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-3, atol=1e-4, msg=name)
