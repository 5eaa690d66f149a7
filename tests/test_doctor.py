"""The doctor finds real problems, names the commands that fix them, and never ends in a traceback."""

import json
import os
import shutil
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from conftest import DATASET, environment_without_nnunet, hashes
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_macl import checkpoints, doctor
from nnunetv2_macl.cli.doctor import doctor_entry, trainers_entry
from nnunetv2_macl.data import Reading
from nnunetv2_macl.doctor import dataset, environment, finder, machine
from nnunetv2_macl.doctor.measure import plan_in_use
from nnunetv2_macl.files import resource_folder, trainer_folders
from nnunetv2_macl.nnunet import FOLDER_VARIABLES
from nnunetv2_macl.planning.derive import derive_or_load_plan

# A class with the name of ours that is no subclass of ours.
OTHER = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

class nnUNetTrainerMACL(nnUNetTrainer):
    pass
"""


@pytest.fixture
def bare(monkeypatch):
    """Unset all variables of nnU-Net and of this package."""
    for name in (*FOLDER_VARIABLES, "nnUNet_extTrainer", "nnUNet_macl_weights", "CONDA_DEFAULT_ENV"):
        monkeypatch.delenv(name, raising=False)


def run(monkeypatch, capsys, *arguments):
    """Run the command in this process. Return its exit code and its output."""
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_macl_doctor", *arguments])
    with pytest.raises(SystemExit) as end:
        doctor_entry()
    return end.value.code, capsys.readouterr().out


def test_each_unset_variable_gets_a_line_that_sets_it(bare, monkeypatch, capsys):
    code, out = run(monkeypatch, capsys, "4", "-device", "cpu")
    assert code == 1
    for name in FOLDER_VARIABLES:
        assert f'> export {name}="/path/to/{name}"' in out
    assert '> export nnUNet_extTrainer="$(nnUNetv2_macl_trainers)"' in out
    assert "~/.bashrc" in out and "set -gx NAME VALUE" in out
    assert f"  --    4 is checked once these are fixed: {', '.join(sorted(FOLDER_VARIABLES))}" in out
    assert out.count("WRONG") == 4 and "4 problems" in out
    assert len(out.splitlines()) < 40, "more than a screen"


def test_with_json_the_output_is_only_json(bare, monkeypatch, capsys):
    code, out = run(monkeypatch, capsys, "-device", "cpu", "--json")
    content = json.loads(out)
    assert code == 1 and content["right"] is False
    wrong = [r["check"] for r in content["results"] if r["status"] == "wrong"]
    assert wrong == [*FOLDER_VARIABLES, "nnUNet_extTrainer"]
    assert all(r["fix"] for r in content["results"] if r["status"] == "wrong")


def test_a_fresh_process_without_variables_has_no_traceback(bare, tmp_path):
    """nnU-Net prints warnings about unset variables when it is imported. The output has none of them."""
    command = [sys.executable, "-c", "from nnunetv2_macl.cli.doctor import doctor_entry; doctor_entry()", "--json"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment_without_nnunet())
    assert process.returncode == 1 and json.loads(process.stdout) and "Traceback" not in process.stderr


@pytest.mark.parametrize("value", ["missing", "file"])
def test_a_missing_folder_and_a_file_are_problems(value, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / value))
    result = environment.folder_variable("nnUNet_raw")
    assert result.status == doctor.PROBLEM and str(tmp_path / value) in result.message and result.fix


def test_no_folder_with_the_name_of_the_home_sign_is_proposed(monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "~/not there")
    assert environment.folder_variable("nnUNet_raw").fix == 'export nnUNet_raw="$HOME/not there"'


def test_a_check_that_fails_is_a_result(monkeypatch):
    def broken():
        raise RuntimeError("no such machine")

    monkeypatch.setattr(machine, "open_files", broken)
    (result,) = [r for r in doctor.run_checks(device="cpu") if r.check == "open_files"]
    assert result.status == doctor.PROBLEM and "no such machine" in result.message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_the_fix_is_the_cpu():
    result = environment.torch_and_device("cuda")
    assert result.status == doctor.PROBLEM and "-device cpu" in result.fix
    assert environment.torch_and_device("cpu").status == doctor.OK
    assert "got 'gpu'" in environment.torch_and_device("gpu").message


@pytest.mark.parametrize(
    "version, is_old", [("2.5.1+cu124", True), ("1.13.0", True), ("2.6.0", False), ("2.14.1+cpu", False)]
)
def test_a_torch_that_may_run_code_from_files_is_noted(version, is_old):
    right = doctor.Result(doctor.OK, f"torch {version}", values={"device": "cpu"})
    result = environment.noting_old_torch(right, version)
    assert (result != right) is is_old and result.values == right.values
    if is_old:
        assert result.status == doctor.NOTE and result.fix.endswith("pip install --upgrade torch")


# --- the trainer, as nnU-Net finds it ---------------------------------------------------------------------------------------


def test_our_trainer_is_found(monkeypatch, tmp_path):
    """The doctor finds it in another process, also through a file of the user that imports it."""
    (tmp_path / "mine.py").write_text("from nnunetv2_macl.training.finetune import nnUNetTrainerMACL\n")
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), str(resource_folder("trainers"))]))
    result = environment.trainers_are_found()
    assert result.status == doctor.OK, result


def test_another_class_with_the_name_is_reported_with_its_file(monkeypatch, tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    file = tmp_path / "package" / "old_copy.py"
    file.write_text(OTHER)
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), str(resource_folder("trainers"))]))
    assert finder.find("nnUNetTrainerMACL") == {"ours": False, "file": str(file)}
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(resource_folder("trainers")), str(tmp_path)]))
    assert finder.find("nnUNetTrainerMACL")["ours"] is True


def test_the_line_that_is_shown_brings_a_hidden_trainer_back(monkeypatch, tmp_path):
    (tmp_path / "old_copy.py").write_text(OTHER)
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    result = environment.trainers_are_found()
    assert result.status == doctor.PROBLEM and str(tmp_path / "old_copy.py") in result.message
    assert result.fix.splitlines()[-1] == 'export nnUNet_extTrainer="$(nnUNetv2_macl_trainers)"'
    monkeypatch.setenv("nnUNet_extTrainer", trainer_folders())
    assert environment.trainers_are_found().status == doctor.OK


def test_the_trainers_command_keeps_the_users_own_folders(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_macl_trainers"])
    ours, mine, other = str(resource_folder("trainers")), str(tmp_path / "mine"), str(tmp_path / "other")
    for before, after in (
        ([], [ours]),
        ([mine, other], [ours, mine, other]),
        ([mine, ours], [ours, mine]),
        ([ours, mine, "", mine], [ours, mine]),
    ):
        monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(before))
        trainers_entry()
        assert capsys.readouterr().out == os.pathsep.join(after) + "\n"


@pytest.mark.parametrize(
    ("content", "words"), [("import not_installed\n", "not_installed"), ("def broken(:\n", "SyntaxError")]
)
def test_a_broken_module_in_the_folder_is_named(monkeypatch, tmp_path, content, words):
    file = tmp_path / "a_broken.py"
    file.write_text(content)
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), str(resource_folder("trainers"))]))
    found = finder.find("nnUNetTrainerMACL")
    assert words in found["error"] and found["file"] == str(file)


# --- the machine ------------------------------------------------------------------------------------------------------------


def test_limits_of_the_machine(monkeypatch, tmp_path):
    assert machine.shared_memory(tmp_path / "nowhere").status == doctor.OK
    monkeypatch.setattr(machine, "_ENOUGH_SHARED_GIB", 1e9)
    assert "--shm-size" in machine.shared_memory(tmp_path).fix
    free = shutil.disk_usage(tmp_path).free
    fits, too_much = Reading(1, 1, free // 2), Reading(1, 1, free * 2)
    assert machine.shared_memory_of_plan(fits, 2**20, tmp_path).status == doctor.OK
    refused = machine.shared_memory_of_plan(too_much, 2**20, tmp_path)
    assert refused.status == doctor.PROBLEM and "--shm-size" in refused.fix
    assert machine.shared_memory_of_plan(Reading(0, 0, 0), 2**20, tmp_path).status == doctor.OK
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")  # the fix is enough
    assert machine.shared_memory(tmp_path).status == doctor.NOTE
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setattr(machine, "_LEAST_DISK_GIB", 1e-6)  # so that any machine has enough
    assert machine.free_disk("nnUNet_results").status == doctor.OK
    monkeypatch.setattr(machine, "_LEAST_DISK_GIB", 1e9)
    assert str(tmp_path) in machine.free_disk("nnUNet_results").fix


def test_the_open_file_limit():
    resource = pytest.importorskip("resource", reason="no such limit on Windows")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        result = machine.open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert result.status == doctor.PROBLEM and result.fix.startswith("ulimit -n ") and result.values == {"limit": 256}


# --- a data set -------------------------------------------------------------------------------------------------------------


def test_a_data_set_is_checked_and_measured_without_writing(workspace, target):
    """The three steps are more than the plan has. One image is cut short, and one is empty."""
    derive_or_load_plan(target, values={"num_epochs": 1, "num_iterations_per_epoch": 2, "batch_size": 4})
    images = workspace.raw / DATASET / "imagesUn"
    cut, empty = sorted(images.iterdir())[:2]
    cut.write_bytes(cut.read_bytes()[:-4] + b"\0\0\0\1")
    empty.write_bytes(b"")
    before = hashes(workspace.folder)
    results = {r.check: r for r in dataset.dataset_checks("901", "2d", "nnUNetPlans", "cpu")}
    assert hashes(workspace.folder) == before
    assert results["images"].values == {"labelled": 5, "unlabelled": 4}
    assert (
        results["readable"].values == {"files": 4, "skipped": 2, "read": 2}
        and "--skip_unreadable" in results["readable"].fix
    )
    assert (
        f"{cut} cannot be used" in results["readable"].message
        and f"{empty} cannot be used" in results["readable"].message
    )
    measured = results["estimate"].values
    assert results["estimate"].status == doctor.NOTE
    steps = measured["steps_per_epoch"] * measured["epochs"]
    assert steps == 2
    assert measured["hours"] == pytest.approx(measured["seconds_per_step"] * steps / 3600)
    assert 0 < measured["seconds_per_step"] < 60 and 0.05 < measured["memory_gib"] < 16 and measured["run_gib"] > 0
    assert results["weights"].fix == "nnUNetv2_train_macl_pretrain 901 -c 2d -device cpu"


def test_a_plan_of_an_older_nnunet_plan_is_derived_anew_as_in_a_run(workspace, target):
    derive_or_load_plan(target, values={"batch_size": 4, "num_epochs": 7}, skip_unreadable=True)
    file = workspace.preprocessed / DATASET / "nnUNetPlans.json"
    content = json.loads(file.read_text())
    content["configurations"]["2d"]["patch_size"] = [32, 32]
    file.write_text(json.dumps(content))
    target = dataset.DatasetConfiguration.load("901", "nnUNetPlans", "2d")
    plan, origin = plan_in_use(target)
    assert plan.patch_size == [32, 32] and plan.batch_size == 4 and plan.get_recipe().num_epochs == 7
    assert plan.skip_unreadable and "derived anew" in dataset.macl_plan(plan, origin).message


def test_images_that_a_run_leaves_out_are_no_problem(workspace, target):
    file = next((workspace.raw / DATASET / "imagesUn").iterdir())
    file.write_bytes(b"")
    sources = dataset.sources_in_use(target, ())
    assert dataset.readable(target, sources, "cpu", skip_unreadable=False).status == doctor.PROBLEM
    left_out = dataset.readable(target, sources, "cpu", skip_unreadable=True)
    assert left_out.status == doctor.NOTE and str(file) in left_out.message


def test_a_name_that_nnunet_does_not_accept_is_a_problem(workspace):
    (workspace.raw / "Dataset4_Heart").mkdir()
    (result,) = dataset.dataset_checks("Dataset4_Heart", "2d", "nnUNetPlans", "cpu")
    assert result.status == doctor.PROBLEM and "DatasetXXX_NAME" in result.message


def test_a_cascade_starts_from_the_weights_of_its_parent_configuration(workspace, target):
    plans = deepcopy(target.plans_manager.plans)
    plans["configurations"]["second"] = {"inherits_from": "2d", "previous_stage": "2d"}
    cascaded = dataset.DatasetConfiguration.from_plans(PlansManager(plans), "second", target.dataset_json)
    weights, folder = {"encoder.a": torch.ones(1)}, workspace.run_folder("nnUNetTrainerMACLPretrain")
    description = {"architecture": target.architecture(), "configuration": "2d"}
    checkpoints.export_weights(folder, encoder=weights, decoder={}, unet_weights=weights, description=description)
    for configuration in (target, cascaded):
        result = dataset.weights(configuration, "cpu")
        assert result.status == doctor.OK and str(folder.parent) in result.message
        assert f"nnUNetv2_train 901 {configuration.name} 0 " in result.fix


def test_user_errors_about_the_data_set_are_results(workspace, target, monkeypatch):
    def only(*arguments):
        (*_, last) = dataset.dataset_checks(*arguments, "cpu")
        return last

    assert "no data set '555'" in only("555", "2d", "nnUNetPlans").message
    assert "no configuration '3d_lowres'" in only("901", "3d_lowres", "nnUNetPlans").message
    monkeypatch.setenv("nnUNet_macl_weights", "/nowhere")
    assert dataset.weights(target, "cpu").fix.endswith("nnUNet_macl_weights")
    # Weights that exist and cannot be used.
    for name, words in (("", "no macl_encoder.pth"), ("cut.pth", "cannot be loaded")):
        (workspace.folder / "cut.pth").write_bytes(b"PK")
        monkeypatch.setenv("nnUNet_macl_weights", str(workspace.folder / name))
        result = dataset.weights(target, "cpu")
        assert (
            result.status == doctor.PROBLEM and words in result.message and result.fix.endswith("nnUNet_macl_weights")
        )
    next((workspace.preprocessed / DATASET).glob("nnUNetPlans_2d")).rename(workspace.preprocessed / "away")
    assert only("901", "2d", "nnUNetPlans").fix.startswith("nnUNetv2_preprocess -d 901")


def test_a_measurement_that_takes_too_long_is_stopped(target):
    result = dataset.estimate(target, [], "cpu", timeout=0.5)
    assert result.status == doctor.PROBLEM and "cpu" in result.message and "-c 2d" in result.fix


def test_torch_compile_needs_a_compiler(monkeypatch, tmp_path):
    assert environment.compiling("cpu").status == doctor.OK
    monkeypatch.delenv("nnUNet_compile", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    found = environment.compiling("cuda")
    assert found.status == doctor.PROBLEM and "a C compiler" in found.message and "nnUNet_compile" in found.fix
    monkeypatch.setenv("nnUNet_compile", "f")
    assert environment.compiling("cuda").status == doctor.OK
