"""The doctor: finds what is really wrong, names what mends it, and never ends in a traceback."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import DATASET, environment_without_nnunet

from nnunetv2_macl import doctor
from nnunetv2_macl.cli.doctor import doctor_entry
from nnunetv2_macl.data import Reading
from nnunetv2_macl.doctor import dataset, environment, finder, machine
from nnunetv2_macl.doctor.measure import plan_in_use
from nnunetv2_macl.files import resource_folder
from nnunetv2_macl.nnunet import FOLDER_VARIABLES
from nnunetv2_macl.planning.prepare import derive_or_load_plan

# a class of the same name that is no subclass of ours
OTHER = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

class nnUNetTrainerMACL(nnUNetTrainer):
    pass
"""


@pytest.fixture
def bare(monkeypatch):
    """None of nnU-Net's variables is set: that is when people need the doctor."""
    for name in (*FOLDER_VARIABLES, "nnUNet_extTrainer", "nnUNet_macl_weights", "CONDA_DEFAULT_ENV"):
        monkeypatch.delenv(name, raising=False)


def run(monkeypatch, capsys, *arguments):
    """The command in this process: exit code and what it printed."""
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_macl_doctor", *arguments])
    with pytest.raises(SystemExit) as end:
        doctor_entry()
    return end.value.code, capsys.readouterr().out


def test_nothing_set_is_told_line_by_line(bare, monkeypatch, capsys):
    code, out = run(monkeypatch, capsys, "4", "-device", "cpu")
    assert code == 1
    for name in FOLDER_VARIABLES:
        assert f'> export {name}="/path/to/{name}"' in out
    assert '> export nnUNet_extTrainer="$(nnUNetv2_macl_trainers)"' in out
    assert "~/.bashrc" in out and "set -gx NAME VALUE" in out
    assert "4 is looked at when this is mended" in out and "4 to mend" in out
    assert len(out.splitlines()) < 40, "more than a screen"


def test_json_is_json_and_nothing_else(bare, monkeypatch, capsys):
    code, out = run(monkeypatch, capsys, "-device", "cpu", "--json")
    content = json.loads(out)
    assert code == 1 and content["right"] is False
    wrong = [r["check"] for r in content["results"] if r["status"] == "wrong"]
    assert wrong == [*FOLDER_VARIABLES, "nnUNet_extTrainer"]
    assert all(r["mend"] for r in content["results"] if r["status"] == "wrong")


def test_a_fresh_process_without_variables_has_no_traceback(bare, tmp_path):
    """As it is typed: nnU-Net itself complains about unset variables when it is imported; none of that is shown."""
    command = [sys.executable, "-c", "from nnunetv2_macl.cli.doctor import doctor_entry; doctor_entry()", "--json"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment_without_nnunet())
    assert process.returncode == 1 and json.loads(process.stdout) and "Traceback" not in process.stderr


@pytest.mark.parametrize("value", ["missing", "file"])
def test_folders_that_are_none(value, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / value))
    result = environment.folder_variable("nnUNet_raw")
    assert result.status == doctor.PROBLEM and str(tmp_path / value) in result.message and result.fix


def test_a_check_that_fails_is_a_result(monkeypatch):
    def broken():
        raise RuntimeError("no such machine")

    monkeypatch.setattr(machine, "open_files", broken)
    (result,) = [r for r in doctor.run_checks(device="cpu") if r.check == "open_files"]
    assert result.status == doctor.PROBLEM and "no such machine" in result.message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device_says_how_to_go_on_without():
    result = environment.torch_and_device("cuda")
    assert result.status == doctor.PROBLEM and "-device cpu" in result.fix
    assert environment.torch_and_device("cpu").status == doctor.OK
    assert "got 'gpu'" in environment.torch_and_device("gpu").message


# --- the trainer, as nnU-Net finds it ---------------------------------------------------------------------------------------


def test_our_trainer_is_found(monkeypatch, tmp_path):
    """In a process of its own, and through a user's own subclass's file as well: the class is the same."""
    (tmp_path / "mine.py").write_text("from nnunetv2_macl.training.finetune import nnUNetTrainerMACL\n")
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), str(resource_folder("trainers"))]))
    result = environment.trainers_are_found()
    assert result.status == doctor.OK, result


def test_another_class_of_the_name_is_told_with_its_file(monkeypatch, tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    file = tmp_path / "package" / "old_copy.py"
    file.write_text(OTHER)
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), str(resource_folder("trainers"))]))
    assert finder.find("nnUNetTrainerMACL") == {"ours": False, "file": str(file)}
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(resource_folder("trainers")), str(tmp_path)]))
    assert finder.find("nnUNetTrainerMACL")["ours"] is True


def test_a_hidden_trainer_is_mended_by_the_line_that_is_shown(monkeypatch, tmp_path):
    (tmp_path / "old_copy.py").write_text(OTHER)
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    result = environment.trainers_are_found()
    assert result.status == doctor.PROBLEM and f"{tmp_path / 'old_copy.py'} won" in result.message
    assert result.fix.splitlines()[-1] == 'export nnUNet_extTrainer="$(nnUNetv2_macl_trainers):$nnUNet_extTrainer"'


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
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")  # what is told to do is enough
    assert machine.shared_memory(tmp_path).status == doctor.NOTE
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setattr(machine, "_LEAST_DISK_GIB", 1e-6)  # what is free where the tests run is not their subject
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


def test_a_data_set_with_everything_measured_and_nothing_written(workspace):
    """Three real steps, more than the plan asks for; one image cut short, one empty."""
    target = dataset.DatasetConfiguration.load("901", "nnUNetPlans", "2d")
    derive_or_load_plan(target, values={"num_epochs": 1, "num_iterations_per_epoch": 2, "batch_size": 4})
    images = workspace.raw / DATASET / "imagesUn"
    cut, empty = sorted(images.iterdir())[:2]
    cut.write_bytes(cut.read_bytes()[:-4] + b"\0\0\0\1")
    empty.write_bytes(b"")
    before = _hashes(workspace.folder)
    results = {r.check: r for r in dataset.dataset_checks("901", "2d", "nnUNetPlans", "cpu")}
    assert _hashes(workspace.folder) == before
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


def test_a_plan_of_an_older_nnunet_plan_is_derived_anew_as_a_start_would(workspace):
    target = dataset.DatasetConfiguration.load("901", "nnUNetPlans", "2d")
    derive_or_load_plan(target, values={"batch_size": 4, "num_epochs": 7}, skip_unreadable=True)
    file = workspace.preprocessed / DATASET / "nnUNetPlans.json"
    content = json.loads(file.read_text())
    content["configurations"]["2d"]["patch_size"] = [32, 32]
    file.write_text(json.dumps(content))
    target = dataset.DatasetConfiguration.load("901", "nnUNetPlans", "2d")
    plan, origin = plan_in_use(target)
    assert plan.patch_size == [32, 32] and plan.batch_size == 4 and plan.get_recipe().num_epochs == 7
    assert plan.skip_unreadable and "derived anew" in dataset.macl_plan(plan, origin).message


def test_what_a_run_leaves_out_is_no_mistake(workspace):
    file = next((workspace.raw / DATASET / "imagesUn").iterdir())
    file.write_bytes(b"")
    target = dataset.DatasetConfiguration.load("901", "nnUNetPlans", "2d")
    sources = dataset.sources_in_use(target, ())
    assert dataset.readable(target, sources, skip_unreadable=False).status == doctor.PROBLEM
    left_out = dataset.readable(target, sources, skip_unreadable=True)
    assert left_out.status == doctor.NOTE and str(file) in left_out.message


def test_a_name_that_nnunet_does_not_take(workspace):
    (workspace.raw / "Dataset4_Heart").mkdir()
    (result,) = dataset.dataset_checks("Dataset4_Heart", "2d", "nnUNetPlans", "cpu")
    assert result.status == doctor.PROBLEM and "DatasetXXX_NAME" in result.message


def _hashes(folder):
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_mistakes_about_the_data_set_are_results(workspace, monkeypatch):
    def only(*arguments):
        (*_, last) = dataset.dataset_checks(*arguments, "cpu")
        return last

    assert "no data set '555'" in only("555", "2d", "nnUNetPlans").message
    assert "no configuration '3d_lowres'" in only("901", "3d_lowres", "nnUNetPlans").message
    monkeypatch.setenv("nnUNet_macl_weights", "/nowhere")
    target = dataset.DatasetConfiguration.load("901", "nnUNetPlans", "2d")
    assert dataset.weights(target, "cpu").fix.endswith("nnUNet_macl_weights")
    # there, and of no use
    for name, words in (("", "no macl_encoder.pth"), ("cut.pth", "cannot be loaded")):
        (workspace.folder / "cut.pth").write_bytes(b"PK")
        monkeypatch.setenv("nnUNet_macl_weights", str(workspace.folder / name))
        result = dataset.weights(target, "cpu")
        assert (
            result.status == doctor.PROBLEM and words in result.message and result.fix.endswith("nnUNet_macl_weights")
        )
    next((workspace.preprocessed / DATASET).glob("nnUNetPlans_2d")).rename(workspace.preprocessed / "away")
    assert only("901", "2d", "nnUNetPlans").fix.startswith("nnUNetv2_preprocess -d 901")


def test_a_measurement_that_takes_too_long_is_ended(workspace):
    target = dataset.DatasetConfiguration.load("901", "nnUNetPlans", "2d")
    result = dataset.estimate(target, [], "cpu", timeout=0.5)
    assert result.status == doctor.PROBLEM and "more than 0 s on cpu" in result.message


def test_what_torch_compile_needs(monkeypatch, tmp_path):
    assert environment.compiling("cpu").status == doctor.OK
    monkeypatch.delenv("nnUNet_compile", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    found = environment.compiling("cuda")
    assert found.status == doctor.PROBLEM and "a C compiler" in found.message and "nnUNet_compile" in found.fix
    monkeypatch.setenv("nnUNet_compile", "f")
    assert environment.compiling("cuda").status == doctor.OK
