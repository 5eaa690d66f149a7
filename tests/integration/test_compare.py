"""A real study with planning, pre-training, fine-tuning and prediction; its errors; and what a second start repeats."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import DATASET, hashes
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from test_report import Page
from torch.utils.data import DataLoader

from nnunetv2_macl import checkpoints
from nnunetv2_macl.compare.run import compare
from nnunetv2_macl.compare.study import Options, options_by_finetuning
from nnunetv2_macl.compare.trainer import nnUNetTrainerMACLCompare
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.report import write_report
from nnunetv2_macl.training.epoch_log import read_curves
from nnunetv2_macl.training.seeded import SeededBatches

OPTIONS = Options(
    dataset="901", configuration="2d", plans="nnUNetPlans",
    arms=["scratch", "pretrained"], labels=["2"], seeds=1, rates=[1e-2], test="2",
    validation="1", group_regex=None, epochs=1, iterations=2, batch_size=2, pretrain_epochs=1, pretrain_iterations=1,
    pretrain_batch_size=4, disable_tta=True,
)  # fmt: skip
SHORT = shlex.split(
    "901 -c 2d --arms scratch pretrained --labels 2 --seeds 1 --finetuning sgd --rates 1e-2 --test 2 --validation 1"
    " --epochs 1 --iterations 2 -batch_size 2 --disable_tta -np 1"
    " --pretrain_epochs 1 --pretrain_iterations 1 --pretrain_batch_size 4 -device cpu"
)


def interrupt(command, environment, log, word):
    """Send SIGINT to all processes of a command, like Ctrl-C, as soon as its log contains a word."""
    process = subprocess.Popen(
        [*map(str, command)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not (log.is_file() and word in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    process.wait()


def test_the_command_from_beginning_to_end(workspace, tmp_path, caplog):
    before = hashes(workspace.folder)
    folder = tmp_path / "study"
    # users of containers with little shared memory train without workers
    command, without = ["nnUNetv2_macl_compare", *SHORT, "-o", folder], {"nnUNet_n_proc_DA": "0"}
    command, options = [*command, "--pretrain_iterations", "100"], replace(OPTIONS, pretrain_iterations=100)
    log = folder / "pretraining" / "macl" / "log.txt"
    interrupt(command, workspace.environment | without, log, "Pre-training on")
    assert "Stopped as asked" in log.read_text() and len(list(folder.rglob("done.json"))) == 2
    out = workspace.run(*command, **without)
    assert "2 of 5 steps are done already" in out and "[5/5]" in out and "Too few to tell: 2 test patients" in out
    assert hashes(workspace.folder) == before, "the user's own folders changed"

    split = json.loads((folder / "study.json").read_text())["split"]
    with (folder / "compare.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {(r["arm"], r["case"], r["class"]) for r in rows} == {
        (arm, case, label)
        for arm in ("scratch", "pretrained")
        for case in split["test"]
        for label in ("liver", "vessel")
    }
    assert len(rows) == 8 and all(r["chosen"] == "1" and r["labelled_cases"] == "2" for r in rows)
    assert all(0 <= float(r["dice"]) <= 1 for r in rows if r["dice"])
    text = (folder / "compare.md").read_text()
    assert "**Too few to tell" in text and re.search(r"\| pretrained \| [+-]\d\.\d{3} \([+-]", text)
    assert (folder / "compare.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    raw = folder / "nnUNet_raw" / DATASET
    trained_on = {path.name.rpartition("_")[0] for path in (raw / "imagesTr").iterdir()}
    assert trained_on.isdisjoint(split["test"]) and len(trained_on) == 3
    assert all(path.stat().st_nlink > 1 for path in raw.rglob("*.nii.gz"))  # named again, not copied
    (encoder,) = folder.glob("pretraining/macl/**/macl_encoder.pth")
    # two labelled and four unlabelled images, no test or validation case
    assert checkpoints.load(encoder)["dataset_fingerprint"]["images"] == 6
    taken = next((folder / "cells").glob("pretrained*/**/training_log*")).read_text()
    assert "encoder: 64 of 64 tensors" in taken
    assert "MACL weights from" not in next((folder / "cells").glob("scratch*/**/training_log*")).read_text()

    page = Page(write_report(folder).read_text())
    assert (
        "4 of 4 cells done" not in page.words and "2 of 2 cells done" in page.words and "Too few to tell" in page.words
    )
    assert "Dice above scratch" in page.words and [r[:14] for r in page.references] == ["data:image/png"]
    (folder / "report.html").unlink()

    done = hashes(folder)
    caplog.set_level("INFO", logger="nnunetv2_macl")
    compare(options, folder=folder, device="cpu", processes=1)
    assert "5 of 5 steps are done already" in caplog.text and "[5/5]" not in caplog.text
    assert hashes(folder) == done
    with pytest.raises(UserError, match=r"--epochs 3 \(was 1\)"):
        compare(replace(options, epochs=3), folder=folder, device="cpu", processes=1)
    assert hashes(folder) == done

    # an arm whose weights do not fit is refused, and the study does not change
    (encoder,) = folder.rglob("macl_encoder.pth")
    content = checkpoints.load(encoder)
    content["network_weights"] = {key: value[:3] for key, value in content["network_weights"].items()}
    checkpoints.save(content, tmp_path / "small.pth")
    with pytest.raises(UserError, match=r"are for another network(.|\n)*arm weights:"):
        compare(
            replace(options, arms=[*options.arms, f"weights:{tmp_path / 'small.pth'}"]),
            folder=folder,
            device="cpu",
            processes=1,
        )
    log = "planning/log.txt"
    assert {**hashes(folder), log: ""} == {**done, log: ""}

    # an added arm runs although another one fails, and finished cells do not run again
    arms = [*options.arms, "recipe:restore,decoder_stages=9", "encoder"]
    with pytest.raises(UserError, match=r"restore,decoder_stages=9"):
        compare(replace(options, arms=arms), folder=folder, device="cpu", processes=1)
    assert "restore-decoder_stages-9/log.txt" in caplog.text and "[6/8]" in caplog.text
    text = (folder / "compare.md").read_text()
    assert "| encoder |" in text and re.search(r"further arms.*decoder_stages=9", text)
    # without the arm that failed, the study is complete
    compare(replace(options, arms=[*options.arms, "encoder"]), folder=folder, device="cpu", processes=1)
    now = hashes(folder)
    assert all(now[file] == done[file] for file in done if file.startswith(("cells", "pretraining")))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(dataset="555"), ["'555'", DATASET]),
        (dict(labels=["7"]), ["--labels 7", "only 2 are left"]),
        (dict(group_regex="^patient"), ["--group_regex '^patient'", "case_00"]),
        (dict(arms=["scratch", "magic"]), ["'magic'"]),
        (dict(configuration="3d_cascade_fullres"), ["-c 3d_lowres"]),
        (dict(configuration="2D"), ["'2D'", "3d_fullres, 3d_lowres, 2d"]),
        (dict(plans="nnUNetOtherPlans"), ["nnUNetOtherPlans.json", "nnUNetv2_plan_experiment -d 901"]),
        (dict(plan="/no/plan.json"), ["/no/plan.json does not exist", "--plan FILE.json"]),
        (dict(plan=__file__), ["test_compare.py", "--plan FILE.json"]),
    ],
)
def test_mistakes_are_reported_before_anything_is_written(workspace, tmp_path, change, words):
    with pytest.raises(UserError) as error:
        compare(replace(OPTIONS, **change), folder=tmp_path / "study", device="cpu")
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_each_split_has_a_report_and_all_splits_together_have_one(workspace, tmp_path):
    folder = tmp_path / "study"
    options = replace(OPTIONS, arms=["scratch", "recipe:restore", "recipe:simclr"])
    compare(options, splits=2, folder=folder, device="cpu", processes=1, jobs=2)
    tested = [json.loads((folder / f"split_{number}/study.json").read_text())["split"]["test"] for number in range(2)]
    assert set(tested[0]) != set(tested[1])
    text = (folder / "compare.md").read_text()
    for arm in ("recipe-restore", "recipe-simclr"):
        assert re.search(rf"\| {arm} \| 2 \| [+-]\d\.\d+ \(", text)
    # pre-trainings that run at the same time do not share a recipe
    plans = {
        file.parts[-6]: json.loads(file.read_text())
        for file in folder.glob("split_0/pretraining/*/nnUNet_results/**/macl_plan.json")
    }
    # The duration of a pre-training is that of its steps.
    for file in folder.glob("split_0/pretraining/*/done.json"):
        curves = read_curves(next(file.parent.glob("nnUNet_results/**/epochs.csv")))
        run = next(file.parent.glob("nnUNet_results/**/macl_plan.json"))
        patches = json.loads(run.read_text())["batch_size"] * options.pretrain_iterations
        assert json.loads(file.read_text())["seconds"] == pytest.approx(
            sum(patches / speed for speed in curves["patches_per_second"])
        )
    methods = {plan["recipe"]["method"] for plan in plans.values()}
    assert methods == {"restoration", "simclr"}
    with pytest.raises(UserError, match="one split"):
        compare(options, splits=2, folder=folder / "split_0", device="cpu")


@pytest.mark.slow
def test_the_users_plan_is_used_unchanged(workspace, tmp_path):
    plan = json.loads((workspace.preprocessed / DATASET / "nnUNetPlans.json").read_text())
    plan["plans_name"], plan["dataset_name"] = "myPlans", "Dataset555_Elsewhere"
    plan["configurations"]["2d"]["patch_size"] = [32, 32]
    (tmp_path / "mine.json").write_text(json.dumps(plan))
    folder = tmp_path / "study"
    compare(
        replace(OPTIONS, arms=["scratch"], plan=str(tmp_path / "mine.json")), folder=folder, device="cpu", processes=1
    )
    (used,) = folder.glob("cells/*/*/*__myPlans__2d/plans.json")
    assert json.loads(used.read_text()) == plan | {"dataset_name": DATASET}
    assert str(tmp_path / "mine.json") in (folder / "compare.md").read_text()


@pytest.mark.slow
def test_kinds_of_fine_tuning_share_pre_trainings_and_each_has_a_report(workspace, tmp_path, caplog):
    folder = tmp_path / "study"
    others = {
        key: value
        for key, value in asdict(OPTIONS).items()
        if key not in ("finetuning", "epochs", "iterations", "rates")
    }
    others["arms"] = ["scratch", "recipe:restore,restoration_share=0.5"]
    kinds = options_by_finetuning(["adamw", "paper"], epochs=[1, 2], iterations=[2, 1], **others)
    caplog.set_level("INFO", logger="nnunetv2_macl")
    compare(kinds, folder=folder, device="cpu", processes=1)
    for kind, words in (("adamw", "AdamW"), ("paper", "paper")):
        assert re.search(rf"Fine-tuning .*{words}", (folder / kind / "compare.md").read_text())
        assert len(list((folder / kind).glob("cells/*/result.json"))) == 2
    (plan,) = folder.rglob("macl_plan.json")
    assert json.loads(plan.read_text())["settings"]["restoration_share"] == 0.5
    overview = (folder / "compare.md").read_text()
    assert "AdamW: 1 epoch of 2 steps" in overview and "(paper/compare.md)" in overview
    page = Page(write_report(folder).read_text())
    assert "4 of 4 cells done" in page.words
    assert [r[:14] for r in page.references if not r.endswith(".md")] == ["data:image/png"] * 2
    with pytest.raises(UserError, match=r"--epochs 3 \(was 1\)"):
        compare([replace(kinds[0], epochs=3), kinds[1]], folder=folder, device="cpu", processes=1)


def test_a_case_without_label_is_refused(workspace, tmp_path):
    label = next((workspace.raw / DATASET / "labelsTr").iterdir())
    label.unlink()
    with pytest.raises(UserError, match=label.name.partition(".")[0]):
        compare(OPTIONS, folder=tmp_path / "study", device="cpu")


def test_missing_images_and_keys_are_refused(workspace, tmp_path):
    raw = workspace.raw / DATASET
    for folder in ("imagesTr", "imagesUn"):
        image = next((raw / folder).iterdir())
        image.rename(tmp_path / "aside")
        image.symlink_to(tmp_path / "gone")
        with pytest.raises(UserError, match=image.name):
            compare(OPTIONS, folder=tmp_path / "study", device="cpu", dry_run=True)
        image.unlink()
        (tmp_path / "aside").rename(image)
    image = next((raw / "imagesTr").iterdir())
    image.rename(image.with_name(image.name.replace("_0000", "_0001")))
    with pytest.raises(UserError, match=r"_0001\.nii\.gz.* 1 channel"):
        compare(OPTIONS, folder=tmp_path / "study", device="cpu", dry_run=True)
    description = json.loads((raw / "dataset.json").read_text())
    del description["file_ending"]
    (raw / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="no 'file_ending'"):
        compare(OPTIONS, folder=tmp_path / "study", device="cpu", dry_run=True)


def test_unlabelled_images_of_a_test_patient_are_left_out(workspace, tmp_path, caplog):
    """Some patients have two images, one labelled and one in imagesUn."""
    raw = workspace.raw / DATASET
    for folder in ("imagesTr", "labelsTr", "imagesUn"):
        for number, path in enumerate(sorted((raw / folder).iterdir())):
            ending = "_0000.nii.gz" if folder.startswith("images") else ".nii.gz"
            path.rename(path.with_name(f"p{number}_{folder[-2:].replace('Tr', 'a').replace('Un', 'b')}{ending}"))
    caplog.set_level("INFO", logger="nnunetv2_macl")
    compare(replace(OPTIONS, group_regex=r"^p\d"), folder=tmp_path / "study", device="cpu", dry_run=True)
    assert "2 cells" in caplog.text and "pretrained_2cases_seed0_lr0.01" in caplog.text
    assert not (tmp_path / "study").exists()
    (line,) = re.findall(r"pre-training: .*", caplog.text)
    apart = re.findall(r"(?:test|validation): .*: (.*)", caplog.text)
    left_out = sum(f"p{n}_" in " ".join(apart) for n in range(4))
    assert left_out >= 2 and f"{2 + 4 - left_out} images" in line and re.search(rf"\(.* {left_out} .*patients\)", line)


def test_a_dry_run_warns_of_unknown_patients_and_of_few_cases(workspace, tmp_path, caplog):
    caplog.set_level("INFO", logger="nnunetv2_macl")
    compare(OPTIONS, folder=tmp_path / "study", device="cpu", dry_run=True)
    assert "--group_regex" in caplog.text and re.search(r"attention: .*2 test patients", caplog.text)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["the paper's fine-tuning in 3D", "weights of another network"])
def test_mistakes_that_would_stop_a_cell_are_reported_before_pretraining(workspace, tmp_path, mistake):
    if mistake == "weights of another network":
        # weights of a 2D pre-training do not fit a 3D network
        workspace.pretrain("901", "-c", "2d", epochs=1)
        weights = workspace.run_folder("nnUNetTrainerMACLPretrain") / "macl_encoder.pth"
        change, words = dict(arms=["scratch", "pretrained", f"weights:{weights}"]), "are for another network"
    else:
        change, words = dict(finetuning="paper"), "fine-tunes in 2D, and 3d_fullres is 3D.*--finetuning sgd"
    with pytest.raises(UserError, match=words):
        compare(
            replace(OPTIONS, configuration="3d_fullres", **change), folder=tmp_path / "study", device="cpu", processes=1
        )
    assert not (tmp_path / "study" / "pretraining").exists() and not (tmp_path / "study" / "cells").exists()


@pytest.mark.slow
def test_a_configuration_that_the_plan_lacks_is_refused(workspace, tmp_path):
    with pytest.raises(UserError, match="no configuration '3d_lowres', only 2d"):
        compare(replace(OPTIONS, configuration="3d_lowres"), folder=tmp_path / "study", device="cpu", processes=2)


@pytest.mark.slow
def test_a_killed_study_in_3d_continues(workspace, tmp_path):
    """The study has two numbers of labels and two seeds, runs two cells at a time, and is killed after its first cell."""
    folder = tmp_path / "study"
    more = ["-c", "3d_fullres", "--labels", "1", "2", "--seeds", "2", "--arms", "scratch", "recipe:pcl", "--jobs", "2"]
    command = ["nnUNetv2_macl_compare", *SHORT, *more, "-o", folder]
    process = subprocess.Popen(
        command,
        env=workspace.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    deadline = time.monotonic() + 600
    while not (finished := list(folder.glob("cells/*/done.json"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in finished}
    out = workspace.run(*command)
    assert "steps are done already" in out and "[10/10]" in out
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items())
    with (folder / "compare.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 8 * 2 * 2 and {row["arm"] for row in rows} == {"scratch", "recipe-pcl"}
    assert (
        "recipe-pcl starts from encoder and decoder, pre-trained with recipe pcl" in (folder / "compare.md").read_text()
    )
    assert not list(folder.rglob(".macl_running*"))


# --- the trainer ---------------------------------------------------------------------------------------------------------


def trainer_of(workspace, monkeypatch, name, epochs):
    monkeypatch.setenv("nnUNet_results", str(workspace.folder / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    plans = json.loads((workspace.preprocessed / DATASET / "nnUNetPlans.json").read_text())
    plans["configurations"]["2d"]["batch_size"] = 2
    dataset_json = json.loads((workspace.preprocessed / DATASET / "dataset.json").read_text())
    trainer = nnUNetTrainerMACLCompare(plans | {"continue_training": False}, "2d", 0, dataset_json, torch.device("cpu"))
    trainer.configure_trial(epochs=epochs, iterations=2, rate=1e-2, seed=3, from_scratch=True)
    trainer.save_every = 1
    return trainer


class Interrupted(Exception):
    pass


def test_an_interrupted_training_reaches_the_same_weights(workspace, monkeypatch):
    whole = trainer_of(workspace, monkeypatch, "whole", epochs=2)
    whole.run_training()

    first = trainer_of(workspace, monkeypatch, "parts", epochs=2)
    end_of_epoch = first.on_epoch_end

    def stop():
        end_of_epoch()
        raise Interrupted

    first.on_epoch_end = stop
    with pytest.raises(Interrupted):
        first.run_training()
    second = trainer_of(workspace, monkeypatch, "parts", epochs=2)
    second.load_checkpoint(f"{second.output_folder}/checkpoint_latest.pth")
    second.run_training()

    assert list(second.curve) == list(whole.curve) == [1, 2] and second.curve == whole.curve
    ours, theirs = whole.network.state_dict(), second.network.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    checkpoint = torch.load(f"{second.output_folder}/checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainer"


def test_batches_depend_only_on_seed_and_number(workspace):
    """Batches depend neither on the number of workers nor on earlier random draws."""
    plans = PlansManager(json.loads((workspace.preprocessed / DATASET / "nnUNetPlans.json").read_text()))
    dataset_json = json.loads((workspace.preprocessed / DATASET / "dataset.json").read_text())
    cases = nnUNetDatasetBlosc2(str(workspace.preprocessed / DATASET / "nnUNetPlans_2d"))
    loader = nnUNetDataLoader(cases, 3, (32, 32), (32, 32), plans.get_label_manager(dataset_json), 0.33)
    batches = SeededBatches(loader, (1, 0))
    inside = [batches[step] for step in (3, 4, 5)]
    np.random.rand(5)
    outside = list(DataLoader(batches, None, sampler=[3, 4, 5], num_workers=2))
    for one, other in zip(inside, outside, strict=True):
        assert torch.equal(one["data"], other["data"]) and list(one["keys"]) == list(other["keys"])
    assert not torch.equal(inside[0]["data"], inside[1]["data"])
    assert not torch.equal(inside[0]["data"], SeededBatches(loader, (2, 0))[3]["data"])
