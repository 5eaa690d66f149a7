"""Two processes of torchrun give the weights of one process, write once, and do not hang if one dies."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import DATASET

from nnunetv2_macl import checkpoints
from nnunetv2_macl.run import pretrain

PRETRAIN = "nnUNetTrainerMACLPretrain"


def torchrun(*arguments):
    command = "-m torch.distributed.run --standalone --nproc_per_node 2 --no-python nnUNetv2_train_macl_pretrain"
    return [sys.executable, *shlex.split(f"{command} 901 -c 2d -device cpu -batch_size 5"), *arguments]


def test_two_processes_make_the_weights_of_one(workspace, tmp_path):
    # not AdamW, which divides by the size of the gradient and so amplifies rounding errors
    recipe = tmp_path / "sgd.json"
    recipe.write_text(json.dumps({"inherits_from": "macl", "optimizer": "sgd", "learning_rate": 0.01}))
    short = dict(num_epochs=2, num_iterations_per_epoch=2, recipe=recipe)
    folder = pretrain(DATASET, "2d", device="cpu", batch_size=5, **short)
    alone = checkpoints.load(folder / "macl_network.pth")["network_weights"]
    out = workspace.run(*torchrun("-num_epochs", "2", "-num_iterations_per_epoch", "2", "-recipe", recipe))
    together = checkpoints.load(folder / "macl_network.pth")["network_weights"]
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert out.count("Epoch 1 ") == 1 and out.count("MACL plan of") == 1
    assert len(list(folder.glob("training_log_*"))) == 1 and len(list(folder.glob("previous_*"))) == 1


MEANWHILE = """
from nnunetv2_macl import run
from nnunetv2_macl.planning.derive import derive_or_load_plan
short = dict(num_epochs=1, num_iterations_per_epoch=1, batch_size=4)
preprocess = run.preprocess_unlabelled
def while_another_command_plans(target, *arguments, **named):
    derive_or_load_plan(target, recipe="simclr", values=short)
    return preprocess(target, *arguments, **named)
run.preprocess_unlabelled = while_another_command_plans
run.pretrain(901, "2d", device="cpu", **short)
run.preprocess_unlabelled = preprocess
run.pretrain(901, "2d", device="cpu", plan_only=True)
run.pretrain(901, "2d", device="cpu", exclude_fold=0, **short)
"""


@pytest.mark.slow
def test_a_plan_that_another_command_writes_during_the_start_is_not_used(workspace, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(MEANWHILE)
    workspace.run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script)
    trained_by = workspace.run_folder(PRETRAIN) / "macl_plan.json"
    assert json.loads(trained_by.read_text())["recipe"]["method"] == "macl+restoration"
    # a script may call the function several times, for example for several folds
    assert (workspace.run_folder(PRETRAIN, fold=0) / checkpoints.ENCODER_FILE).is_file()
    trained = json.loads((workspace.run_folder(PRETRAIN) / "macl_plan.json").read_text())["recipe"]
    assert trained["method"] == "macl+restoration"


def test_a_mistake_is_reported_once_and_ends_all_processes(workspace):
    out = workspace.run(*torchrun("-recipe", "nope"), code=1)
    assert out.count("recipe 'nope'") == 1


@pytest.mark.slow
def test_the_job_ends_if_one_process_dies(workspace):
    command = torchrun("-num_epochs", "100", "-num_iterations_per_epoch", "100")
    log = workspace.folder / "torchrun.txt"
    with log.open("w") as stream:
        job = subprocess.Popen(command, env=workspace.environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 300
        while "Pre-training on" not in log.read_text():
            assert job.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        time.sleep(2)
        ranks = [p for p in psutil.Process(job.pid).children() if p.environ().get("RANK") == "1"]
        os.kill(ranks[0].pid, signal.SIGKILL)
        assert job.wait(60) != 0
        assert "exitcode" in log.read_text()
    finally:
        for process in (*psutil.Process(os.getpid()).children(recursive=True),):
            process.kill()


@pytest.mark.slow
def test_signals_are_forwarded_to_the_ranks(workspace):
    workspace.pretrain("901", "-c", "2d", "--plan_only", epochs=100, steps=100)
    script = (
        "if __name__ == '__main__':\n"
        "    from nnunetv2_macl.training.launch import train\n"
        f"    train(device='cpu', num_gpus=2, dataset_name_or_id='{DATASET}', configuration='2d', fold='all',"
        f" trainer_class_name='{PRETRAIN}')\n"
    )
    file, log = workspace.folder / "start.py", workspace.folder / "start.txt"
    file.write_text(script)
    with log.open("w") as stream:
        job = subprocess.Popen(
            [sys.executable, file], env=workspace.environment, stdout=stream, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + 300
    while "Pre-training on" not in log.read_text():
        assert job.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    time.sleep(3)
    job.terminate()
    assert job.wait(60) == 128 + signal.SIGTERM, log.read_text()
    assert "--c" in log.read_text() and (workspace.run_folder(PRETRAIN) / "checkpoint_latest.pth").is_file()
