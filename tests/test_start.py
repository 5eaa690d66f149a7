"""Pre-training that starts from existing weights."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import DATASET, same
from faults.tools import after_step
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from steps import recipe_of
from torch import nn

from nnunetv2_macl import checkpoints, formats
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.factory import build_model
from nnunetv2_macl.files import sha256
from nnunetv2_macl.planning.derive import derive_or_load_plan
from nnunetv2_macl.planning.plan import describe, plan_file, read_plan
from nnunetv2_macl.run import pretrain
from nnunetv2_macl.sharing.model_card import model_card
from nnunetv2_macl.start import plan_start, start_from_weights
from nnunetv2_macl.training import resume
from nnunetv2_macl.training.finetune import nnUNetTrainerMACL
from nnunetv2_macl.transfer import kernel_norms

PRETRAIN = "nnUNetTrainerMACLPretrain"
SHORT = dict(num_epochs=1, num_iterations_per_epoch=3, batch_size=4)


@pytest.fixture
def nnunet_file(workspace):
    """Return a checkpoint of nnU-Net's own trainer whose weights differ from those of any fresh network."""
    folder = workspace.preprocessed / DATASET
    plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    trainer = nnUNetTrainer(plans, "2d", 0, json.loads((folder / "dataset.json").read_text()), torch.device("cpu"))
    trainer.initialize()
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            nn.init.normal_(parameter, std=0.2)
    file = workspace.folder / "checkpoint_final.pth"
    trainer.save_checkpoint(str(file))
    return file


def network_of(target, plan):
    return build_model(target, plan.geometry, plan.get_recipe())


@pytest.mark.parametrize("auxiliary_encoder", ["shared", "ema", "independent"])
def test_every_encoder_gets_the_weights(target, nnunet_file, auxiliary_encoder):
    plan = derive_or_load_plan(target, recipe="macl", values={"auxiliary_encoder": auxiliary_encoder})
    start = plan_start(nnunet_file, target, plan.geometry, plan.get_recipe())
    network = network_of(target, plan)
    start_from_weights(network, target, start, rescale=False)
    theirs = formats.load_weights(nnunet_file).weights
    encoder, decoder = network.network.trained_weights()
    assert decoder and all(torch.equal(value, theirs[key]) for key, value in {**encoder, **decoder}.items())
    if auxiliary_encoder != "shared":
        state = network.methods["macl"].auxiliary_encoder.state_dict()
        assert all(torch.equal(value, theirs[f"encoder.{key}"]) for key, value in state.items())


def test_for_sgd_kernels_get_the_norms_of_fresh_ones(target, nnunet_file):
    plan = derive_or_load_plan(target)
    start = plan_start(nnunet_file, target, plan.geometry, plan.get_recipe())
    network = network_of(target, plan)
    fresh = kernel_norms(network)
    start_from_weights(network, target, start, rescale=True)
    assert fresh and kernel_norms(network) == pytest.approx(fresh, rel=1e-5)


def test_the_plan_records_the_weights_only_if_there_are_any(target, nnunet_file):
    file = plan_file(target)
    derive_or_load_plan(target)
    assert "pretrained_weights" not in json.loads(file.read_text())
    plan = derive_or_load_plan(target, pretrained_weights=nnunet_file)
    assert read_plan(file) == plan
    start = json.loads(file.read_text())["pretrained_weights"]
    assert start["files"] == {nnunet_file.name: sha256(nnunet_file)} and start["path"] == str(nnunet_file)
    assert (start["origin"], start["dataset_name"], start["fold"]) == ("nnU-Net", DATASET, 0)
    assert start["encoder"] == "64 of 64" and start["decoder"].startswith(start["decoder"].split()[-1])
    words = describe(plan)
    assert all(line in words for line in start["transfer"]) and "decoder.stages.0" in words
    content = json.loads(file.read_text()) | {"pretrained_weights": {"path": 3}}
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="'pretrained_weights' must be null"):
        read_plan(file)


def test_the_plan_records_what_the_weights_had_started_from(target, nnunet_file, workspace):
    """nnU-Net's weights have seen labels, also if a second pre-training starts from the first one."""
    options = dict(device="cpu", num_epochs=1, num_iterations_per_epoch=1, batch_size=4)
    first = pretrain(DATASET, "2d", pretrained_weights=nnunet_file, exclude_fold=1, **options)
    second = pretrain(DATASET, "2d", pretrained_weights=first, exclude_fold=1, **options)
    start = json.loads((second / "macl_plan.json").read_text())["pretrained_weights"]
    assert (start["origin"], start["started_from"]["origin"], start["started_from"]["fold"]) == ("MACL", "nnU-Net", 0)
    plans = target.plans_manager.plans | {"continue_training": False}
    trainer = nnUNetTrainerMACL(plans, "2d", 1, target.dataset_json, torch.device("cpu"))
    trainer.initialize()
    trainer.load_macl_weights(formats.load_weights(second))
    assert re.search(
        rf"WARNING.*nnU-Net weights .*{DATASET}, fold 0.*with their labels", Path(trainer.log_file).read_text()
    )


def test_an_edited_plan_takes_the_weights(target, nnunet_file):
    derive_or_load_plan(target)
    file = plan_file(target)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"out_of_plane_rotation": 1.0}))
    plan = derive_or_load_plan(target, pretrained_weights=nnunet_file)
    assert plan.out_of_plane_rotation == 1 and plan.pretrained_weights["encoder"] == "64 of 64"


def test_weights_that_cannot_be_used_are_refused(target, nnunet_file, workspace):
    plan, recipe = derive_or_load_plan(target), recipe_of()
    content = checkpoints.load(nnunet_file)
    architecture = content["init_args"]["plans"]["configurations"]["2d"]["architecture"]["arch_kwargs"]
    architecture["features_per_stage"] = [33, 65, 129, 257]
    content["network_weights"] = {key: torch.cat([v, v[:1]]) for key, v in content["network_weights"].items()}
    checkpoints.save(content, workspace.folder / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth .*-pretrained_weights"):
        plan_start(workspace.folder / "other.pth", target, plan.geometry, recipe)
    with pytest.raises(UserError, match=r"no pre-trained weights at .*nowhere"):
        plan_start(workspace.folder / "nowhere", target, plan.geometry, recipe)
    start = plan_start(nnunet_file, target, plan.geometry, recipe)
    shutil.copy(workspace.folder / "other.pth", nnunet_file)
    with pytest.raises(UserError, match=r"checkpoint_final\.pth .*-pretrained_weights"):
        start_from_weights(network_of(target, plan), target, start, rescale=False)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_stopped_run_continues_bit_for_bit_without_the_file(workspace, nnunet_file, monkeypatch):
    folder = workspace.run_folder(PRETRAIN)
    common = dict(device="cpu", processes=1)
    pretrain(DATASET, "2d", pretrained_weights=nnunet_file, **common, **SHORT)
    whole = checkpoints.load(folder / resume.FINAL)["network_weights"]
    exported = checkpoints.load(folder / checkpoints.ENCODER_FILE)
    assert exported["macl_plan"]["pretrained_weights"]["files"] == {nnunet_file.name: sha256(nnunet_file)}
    assert sha256(nnunet_file)[:16] in model_card(exported, "unknown")
    assert "encoder.stages.0" in (folder / "report.html").read_text()
    (log,) = folder.glob("training_log_*")
    assert "The run starts from nnU-Net weights" in log.read_text() and "encoder.stages.0" in log.read_text()
    # Three steps of AdamW change no weight by more than this.
    theirs = formats.load_weights(nnunet_file).weights
    assert all((value - theirs[key]).abs().max() < 0.01 for key, value in exported["network_weights"].items())

    kill = after_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with kill, pytest.raises(SystemExit):
        pretrain(DATASET, "2d", pretrained_weights=nnunet_file, **common, **SHORT)
    nnunet_file.unlink()
    other = workspace.folder / "other.pth"
    with pytest.raises(UserError, match=rf"-pretrained_weights {other} \(was {nnunet_file}\)"):
        pretrain(DATASET, "2d", continue_training=True, pretrained_weights=other, **common)
    pretrain(DATASET, "2d", continue_training=True, pretrained_weights=nnunet_file, **common)
    assert same(checkpoints.load(folder / resume.FINAL)["network_weights"], whole)


@pytest.mark.slow
def test_a_run_can_start_from_its_own_folder_on_two_ranks(workspace):
    """The earlier run is moved aside after its weights were read. Rank 0 sends the weights to the other rank."""
    workspace.pretrain("901", "-c", "2d")
    run = workspace.run_folder(PRETRAIN)
    before = formats.load_weights(run).weights
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    command += ["nnUNetv2_train_macl_pretrain", "901", "-c", "2d", "-device", "cpu", "-batch_size", "4"]
    short = ("-num_epochs", "1", "-num_iterations_per_epoch", "2")
    out = workspace.run(*command, *short, "-pretrained_weights", run)
    assert out.count("The run starts from MACL weights") == 1
    after = formats.load_weights(run).weights
    assert all((after[key] - before[key]).abs().max() < 0.01 for key in before)
    assert len(list(run.glob("previous_*"))) == 1


@pytest.mark.slow
def test_nnunets_own_command_names_ours(workspace, nnunet_file):
    out = workspace.run(
        "nnUNetv2_train", "901", "2d", "all", "-tr", PRETRAIN, "-device", "cpu", "-pretrained_weights", nnunet_file,
        code=1,
    )  # fmt: skip
    assert f"nnUNetv2_train_macl_pretrain 901 -c 2d -device cpu -pretrained_weights {nnunet_file}" in out
    assert "Traceback" not in out
