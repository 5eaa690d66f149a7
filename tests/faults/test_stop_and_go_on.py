"""A run that is stopped and continued has the same result as a run without a stop."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import DATASET, same, set_folders

from faults.tools import after_step
from nnunetv2_macl import checkpoints
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.nnunet import GROUP_VARIABLE
from nnunetv2_macl.run import pretrain
from nnunetv2_macl.training import resume
from nnunetv2_macl.training.pretrain import nnUNetTrainerMACLPretrain
from nnunetv2_macl.training.signals import Signals

pytestmark = [pytest.mark.usefixtures("own_signals"), pytest.mark.skipif(sys.platform == "win32", reason="signals")]
EPOCHS, STEPS = 2, 4
PRETRAIN = "nnUNetTrainerMACLPretrain"


def run(**options):
    size = {} if options.get("continue_training") else dict(
        num_epochs=EPOCHS, num_iterations_per_epoch=STEPS, batch_size=4, recipe="macl"
    )  # fmt: skip
    return pretrain(DATASET, "2d", device="cpu", processes=1, **size, **options)


def stopped_run(monkeypatch, step, number=signal.SIGTERM, **options):
    """Start a run that gets a signal during a step, and return its exit code."""
    with after_step(monkeypatch, step, lambda: os.kill(os.getpid(), number)), pytest.raises(SystemExit) as stop:
        run(**options)
    return stop.value.code


def result(folder):
    """Return the results of a run that do not depend on the time."""
    final = checkpoints.load(folder / resume.FINAL)
    log = {key: value for key, value in final["logging"].items() if "timestamps" not in key and "second" not in key}
    state = final["optimizer_state"]["state"]
    optimizer = {f"{p}.{k}": v for p, values in state.items() for k, v in values.items() if isinstance(v, torch.Tensor)}
    return (
        final["network_weights"],
        optimizer,
        log,
        (final["step"], final["current_epoch"], final["lr_scheduler_state"]),
    )


def text_log(folder):
    return "\n".join(file.read_text() for file in sorted(folder.glob("training_log_*")))


@pytest.fixture(scope="module")
def whole(planned, tmp_path_factory):
    """Return the result of a run without a stop."""
    space = planned.copy(tmp_path_factory.mktemp("whole") / "nnunet")
    with pytest.MonkeyPatch.context() as patch:
        set_folders(patch, space.folder)
        return result(run())


@pytest.mark.parametrize(
    "step, number",
    [
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.slow),
        (STEPS - 1, signal.SIGINT),
        pytest.param(STEPS + 2, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_continued_run_has_bit_identical_results(workspace, monkeypatch, capfd, whole, step, number):
    assert stopped_run(monkeypatch, step, number) == 128 + number
    folder = workspace.run_folder(PRETRAIN)
    out = capfd.readouterr().out
    assert f"Stopped as asked, after {step + 1} of {EPOCHS * STEPS} steps" in out
    (command,) = re.findall(r"^ +(nnUNetv2_train_macl_pretrain .*)$", out, re.MULTILINE)
    assert command == "nnUNetv2_train_macl_pretrain 901 -c 2d -device cpu --c"
    assert checkpoints.load(folder / resume.LATEST)["step"] == step + 1
    assert not (folder / ".macl_running.json").exists() and not (folder / resume.FINAL).exists()
    run(continue_training=True)
    weights, optimizer, log, rest = result(folder)
    assert same(weights, whole[0]) and same(optimizer, whole[1]) and optimizer
    assert log == whole[2] and rest == whole[3]
    losses = [re.findall(rf"Epoch {n}  (loss .*?)  [\d.]+ s ", text_log(folder)) for n in range(EPOCHS)]
    assert [len(lines) for lines in losses] == [1] * EPOCHS  # each epoch is logged once
    assert not any(
        name.startswith(("checkpoint_latest", "checkpoint_previous", "previous_")) for name in os.listdir(folder)
    )


@pytest.mark.slow
def test_an_epoch_that_stops_before_its_first_step_is_logged_once(workspace, monkeypatch):
    original = nnUNetTrainerMACLPretrain.on_train_epoch_start

    def stop(self):
        original(self)
        if self.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(nnUNetTrainerMACLPretrain, "on_train_epoch_start", stop)
        run()
    assert stopped.value.code == 128 + signal.SIGTERM
    folder = workspace.run_folder(PRETRAIN)
    assert checkpoints.load(folder / resume.LATEST)["step"] == STEPS
    run(continue_training=True)
    log = checkpoints.load(folder / resume.FINAL)["logging"]
    assert len(log["lrs"]) == len(log["epoch_start_timestamps"]) == EPOCHS
    assert "logging issue" not in text_log(folder)


def test_a_signal_to_all_processes_stops_the_command(workspace):
    command = ["nnUNetv2_train_macl_pretrain", "901", "-c", "2d", "-device", "cpu", "-np", "1", "-batch_size", "4"]
    command += ["-num_epochs", "2", "-num_iterations_per_epoch", "10000"]
    process = subprocess.Popen(
        command, env=workspace.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    folder, lines = workspace.run_folder(PRETRAIN), []
    try:
        for line in process.stdout:
            lines.append(line)
            if "Pre-training on" in line:
                break
        while not (folder / "views.png").exists() and process.poll() is None:  # wait for the first step
            os.sched_yield()
        os.killpg(process.pid, signal.SIGTERM)  # like a cluster, which also signals the data worker
        lines += process.stdout.readlines()
        assert process.wait(60) == 128 + signal.SIGTERM, "".join(lines[-30:])
    finally:
        process.kill()
    assert "Stopped as asked" in "".join(lines) and "Traceback" not in "".join(lines)
    assert checkpoints.load(folder / resume.LATEST)["step"] >= 1


def test_sigusr1_writes_a_checkpoint(workspace, monkeypatch, whole):
    seen = []
    folder = workspace.run_folder(PRETRAIN)
    original = resume.rotate_checkpoint

    def keep(latest):
        original(latest)
        seen.append(latest.exists())

    monkeypatch.setattr(resume, "rotate_checkpoint", keep)
    with after_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGUSR1)):
        run()
    assert len(seen) == 2  # on demand, and at the end of the first epoch
    assert all(same(a, b) for a, b in zip(result(folder)[:2], whole[:2], strict=True))


def test_a_run_continues_from_the_previous_checkpoint_alone(workspace, monkeypatch, whole):
    """nnU-Net does not know the name of this checkpoint, and would start a new run."""
    stopped_run(monkeypatch, STEPS + 1)
    folder = workspace.run_folder(PRETRAIN)
    (folder / resume.LATEST).unlink()
    run(continue_training=True)
    assert same(result(folder)[0], whole[0]) and not list(folder.glob("previous_*"))
    (folder / resume.FINAL).write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoint_final\.pth.*Leave out --c"):
        run(continue_training=True)


def test_changed_images_are_reported(workspace, monkeypatch, capfd):
    stopped_run(monkeypatch, 1)
    next((workspace.raw / DATASET / "imagesUn").iterdir()).unlink()
    stopped_run(monkeypatch, 2, continue_training=True)
    assert re.search("WARNING: .*images have changed", capfd.readouterr().out)


def test_a_run_does_not_continue_with_other_patients(workspace, monkeypatch):
    """Otherwise a cluster that starts the run again in another shell might train on images of validation patients."""
    monkeypatch.setenv(GROUP_VARIABLE, "^case_00.")
    stopped_run(monkeypatch, 1, exclude_fold=0)
    monkeypatch.delenv(GROUP_VARIABLE)
    with pytest.raises(UserError, match=rf"export {GROUP_VARIABLE}='\^case_00\.'"):
        run(continue_training=True, exclude_fold=0)
    monkeypatch.setenv(GROUP_VARIABLE, "^case_00.")
    assert stopped_run(monkeypatch, 2, continue_training=True, exclude_fold=0) == 143


def test_a_case_that_vanishes_stops_the_run_with_a_checkpoint(workspace, monkeypatch):
    folder = workspace.run_folder(PRETRAIN)

    def vanish():
        for file in (workspace.preprocessed / DATASET / "nnUNetPlans_macl_2d" / DATASET).glob("*.b2nd"):
            file.unlink()

    with after_step(monkeypatch, 0, vanish), pytest.raises(UserError, match=r"\.b2nd cannot be read.*--c"):
        pretrain(DATASET, "2d", device="cpu", processes=1, num_epochs=1, num_iterations_per_epoch=30, batch_size=4)
    assert checkpoints.load(folder / resume.LATEST)["step"] >= 1


def test_a_killed_worker_ends_the_run_with_the_command_to_type(workspace):
    command = ["nnUNetv2_train_macl_pretrain", "901", "-c", "2d", "-device", "cpu", "-np", "1", "-batch_size", "4"]
    log = workspace.folder / "said.txt"
    with log.open("w") as stream:
        run = subprocess.Popen(command, env=workspace.environment, stdout=stream, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 90
    while not (workspace.run_folder(PRETRAIN) / "views.png").exists():
        assert run.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    for child in psutil.Process(run.pid).children():
        if "tracker" not in "".join(child.cmdline()):
            child.kill()
    assert run.wait(60) == 1, log.read_text()
    message = r"data worker was killed.*nnUNet_n_proc_DA=2 nnUNetv2_train_macl_pretrain 901 -c 2d -device cpu --c"
    assert re.search(message, log.read_text(), re.DOTALL) and "Traceback" not in log.read_text()
    assert not (workspace.run_folder(PRETRAIN) / ".macl_running.json").exists()


def test_ten_steps_without_a_finite_gradient_stop_the_run(workspace, monkeypatch):
    from nnunetv2_macl.data import PretrainingBatches

    original = PretrainingBatches.__getitem__

    def spoilt(self, step):
        batch = original(self, step)
        batch["data"] *= float("nan") if step >= 2 else 1
        return batch

    monkeypatch.setattr(PretrainingBatches, "__getitem__", spoilt)
    with pytest.raises(UserError, match=r"10 steps.*bad_batch\.pth"):
        pretrain(DATASET, "2d", device="cpu", processes=1, num_epochs=9, num_iterations_per_epoch=6, batch_size=4)
    folder = workspace.run_folder(PRETRAIN)
    bad = checkpoints.load(folder / "bad_batch.pth")
    assert bad["step"] == 11 and bad["data"].isnan().all() and len(bad["cases"]) == 4
    latest = checkpoints.load(folder / resume.LATEST)
    assert latest["logging"]["skipped_steps"] == [4.0]
    assert all(value.isfinite().all() for value in latest["network_weights"].values())


def test_a_second_signal_stops_at_once():
    process = Path(__file__).with_name("stop_twice.py")
    done = subprocess.run([sys.executable, str(process)], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGTERM and done.stdout.split() == ["first"], done


def test_a_signal_that_torchrun_repeats_is_no_second_signal(monkeypatch):
    from nnunetv2_macl.training import signals as module

    monkeypatch.setattr(module, "world_size", lambda: 2)
    signals = Signals()
    signals.install()
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.pending_requests() == (True, False)
    signals.restore()


def test_all_ranks_follow_a_signal_to_one_rank(tmp_path):
    import torch.multiprocessing as mp

    from faults.tools import ask_rank

    mp.spawn(ask_rank, (2, str(tmp_path)), nprocs=2)
    requests = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert requests[0] == requests[1] == [[False, False], [False, True], [False, False], [True, False]]
