"""Packages hold the weights and no private data, and hostile or damaged packages leave nothing behind."""

import getpass
import hashlib
import io
import json
import stat
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import set_folders
from test_formats import preprocessing
from test_transfer import architecture, unet

from nnunetv2_macl import checkpoints
from nnunetv2_macl.cli.weights import export_entry, inspect_entry, install_entry
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.nnunet import dataset_name
from nnunetv2_macl.planning.derive import derive_or_load_plan
from nnunetv2_macl.planning.plan import is_edited, plan_file, with_checksum
from nnunetv2_macl.sharing import install as installing
from nnunetv2_macl.sharing.inspect import inspect
from nnunetv2_macl.sharing.install import install
from nnunetv2_macl.sharing.model_card import model_card
from nnunetv2_macl.sharing.package import MEMBERS, SUMS, without_paths, write_package

NAME = "Mueller_Anna_1951"
HOME = "/home/dr.mueller/study"
INSTALLED = "Dataset901_Generated/nnUNetTrainerMACLPretrain__nnUNetPlans__3d_fullres/fold_all"


def started_from(path):
    files = {"macl_encoder.pth": "0" * 64}
    return {"path": path, "files": files, "origin": "MACL", "encoder": "1 of 1", "decoder": "0 of 1", "transfer": []}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a run whose files hold names and paths wherever a user could have put them."""
    folder = tmp_path_factory.mktemp("study") / "run"
    own = architecture(axes=3, features=[4, 8, 12])
    own["arch_kwargs"] |= {"nonlin": "torch.nn.LeakyReLU", "dropout_op": None}
    state = unet({**own, "arch_kwargs": {k: v for k, v in own["arch_kwargs"].items() if k != "nonlin"}}).state_dict()
    recipe = {"description": f"for {NAME} in {HOME}", "weight_global": 1.0, "num_epochs": 3}
    checkpoints.export_weights(
        folder,
        encoder={k: v for k, v in state.items() if k.startswith("encoder.")},
        decoder={k: v for k, v in state.items() if k.startswith(("decoder.stages.0.", "decoder.transpconvs.0."))},
        unet_weights=state,
        description={
            "architecture": own,
            "preprocessing": preprocessing(3),
            "dataset_name": "Dataset901_Generated",
            "plans_name": "nnUNetPlans",
            "configuration": "3d_fullres",
            "fold": "all",
            "citations": [checkpoints.MACL_CITATION, checkpoints.NNUNET_CITATION],
            "dataset_fingerprint": {
                "images": 7,
                "unlabelled_datasets": [],
                "channel_names": ["MR"],
                "nnunet": {
                    "shapes_after_crop": [[10, 20, 30]] * 3,
                    "spacings": [[2.5, 1.0, 1.0]] * 3,
                    "cases": [NAME],
                },
            },
            "macl_plan": with_checksum(
                {
                    "patch_size": [16, 24, 32],
                    "batch_size": 2,
                    "recipe": dict(recipe),
                    # where a path ends cannot be seen in these
                    "pretrained_weights": started_from(f"/scratch/O'Brien/{NAME}")
                    | {"started_from": started_from(f"@data/{NAME}") | {"started_from": started_from(f"(old)/{NAME}")}},
                    "reasons": {"threshold": f"as in {HOME}/{NAME}.json, asked for", "batch_size": "it fits"},
                }
            ),
            "recipe": recipe,
            "epochs": 3,
            "final_losses": {"train_losses/global": 1.25},
            "collapsed": None,
            "skipped": {f"{HOME}/{NAME}_0000.nii.gz": "empty"},
        },
    )
    (folder / "training_log_1.txt").write_text(NAME)
    return folder


@pytest.fixture(scope="module")
def package(run, tmp_path_factory):
    file = tmp_path_factory.mktemp("package") / "weights.zip"
    write_package(run, file, "cc-by-4.0")
    return file


def members(file):
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(file, content, **attributes):
    with zipfile.ZipFile(file, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a name that occurs twice
        for name, data in content.items() if isinstance(content, dict) else content:
            member = zipfile.ZipInfo(name)
            member.external_attr = attributes.get(name, 0o644) << 16
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, data)
    return file


def resummed(content):
    """Return the content with matching checksums."""
    lines = [f"{hashlib.sha256(data).hexdigest()}  {name}" for name, data in content.items() if name != SUMS]
    return content | {SUMS: "\n".join(lines).encode()}


# --- writing ----------------------------------------------------------------------------------------------------------------


def test_no_names_and_no_paths_in_the_bytes_of_any_member(package, run):
    """Members that hold weights are archives, so their own members are searched, too."""
    private = [NAME, "Mueller", "dr.mueller", "/home/", HOME, str(run), str(run.parent), str(Path.home())]
    private += [getpass.getuser()] if getpass.getuser() != "root" else []

    def look(name, data):
        for word in private:
            for encoding in ("utf-8", "utf-16-le"):
                assert word.encode(encoding) not in data, f"{word} in {name}"
        if name.endswith(".pth"):
            inner = zipfile.ZipFile(io.BytesIO(data))
            for part in inner.namelist():
                look(f"{name}/{part}", inner.read(part))

    content = members(package)
    assert set(content) == set(MEMBERS)
    for name, data in content.items():
        look(name, data)
    look("the archive", package.read_bytes())


def test_the_card_and_the_plan_describe_the_weights(package):
    content = members(package)
    card = content["README.md"].decode()
    assert card.startswith("---\nlicense: cc-by-4.0\nlibrary_name: nnunetv2\n") and card.count("\n---\n") == 1
    for words in ("| images | 7 |", "10 x 20 x 30 voxels", "2.5 x 1 x 1 mm", "JBHI 2026", "`batch_size`: it fits"):
        assert words in card
    assert json.loads(content["dataset_fingerprint.json"])["spacings"] == [[2.5, 1.0, 1.0]] * 3
    assert json.loads(content["macl_plan.json"])["reasons"]["threshold"] == "as in (path removed)"


def test_checksums_are_those_of_sha256sum(package, tmp_path):
    content = members(package)
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    lines = dict(reversed(line.split("  ")) for line in content[SUMS].decode().splitlines())
    assert lines == {name: hashlib.sha256(data).hexdigest() for name, data in content.items() if name != SUMS}


def test_the_same_weights_give_the_same_bytes(package, run, tmp_path):
    write_package(run, tmp_path / "again.zip", "cc-by-4.0")
    assert (tmp_path / "again.zip").read_bytes() == package.read_bytes()


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("see '/data/Anna M/case.nii.gz' now", "see '(path removed)' now"),
        ("see /data/Anna Mueller/case.nii.gz", "see (path removed)"),
        ("C:/Users/anna/x.nii", "(path removed)"),
        (r"C:\Users\anna\x.nii", "(path removed)"),
        (r"\\server\share\x", "(path removed)"),
        ("~/x/y", "(path removed)"),
        ("file:///data/x", "(path removed)"),
        ("https://arxiv.org/abs/2309.11876", "https://arxiv.org/abs/2309.11876"),
        ("τ / this, N/8, 10.1109/JBHI.2026", "τ / this, N/8, 10.1109/JBHI.2026"),
        ("torch.nn.modules.conv.Conv2d", "torch.nn.modules.conv.Conv2d"),
    ],
)
def test_texts_that_look_like_paths_are_removed(text, cleaned):
    assert without_paths({"a": [text]}) == {"a": [cleaned]}


def test_the_ending_gives_the_format_and_mistakes_are_explained(run, tmp_path, monkeypatch, capsys):
    def export(*arguments):
        monkeypatch.setattr(sys, "argv", ["nnUNetv2_macl_export", *map(str, arguments)])
        export_entry()
        return capsys.readouterr().out

    assert "nnUNetv2_macl_install a.zip" in export(run, "-o", tmp_path / "a.zip")
    for arguments, words in (
        ((run, "-o", tmp_path / "a.pth"), "a.pth does not end in .zip"),
        ((run / "macl_encoder.pth", "-o", tmp_path / "b.zip"), f"Give the run's folder: {run}"),
        ((tmp_path / "nowhere", "-o", tmp_path / "b.zip"), "There is no folder"),
    ):
        with pytest.raises(SystemExit) as end:
            export(*arguments)
        assert words in str(end.value)
    assert not (tmp_path / "b.zip").exists()


# --- installing -------------------------------------------------------------------------------------------------------------


def test_the_same_weights_are_installed_where_fine_tuning_finds_them(package, run, tmp_path, monkeypatch, capsys):
    set_folders(monkeypatch, tmp_path)
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_macl_install", str(package)])
    install_entry()
    assert "nnUNetv2_train 901 3d_fullres 0 -tr nnUNetTrainerMACL" in capsys.readouterr().out
    folder = tmp_path / "nnUNet_results" / INSTALLED
    here, there = checkpoints.load_weights(run), checkpoints.load_weights(folder)
    assert here.weights.keys() == there.weights.keys() and here.architecture == there.architecture
    assert all(torch.equal(here.weights[key], there.weights[key]) for key in here.weights)
    assert sorted(p.name for p in folder.iterdir()) == sorted(MEMBERS)
    assert stat.S_IMODE(folder.stat().st_mode) & 0o500 == 0o500
    assert [p.name for p in folder.parent.iterdir()] == ["fold_all"], "another file was left there"
    # Installed weights can be shared again.
    write_package(folder, tmp_path / "onwards.zip")
    with pytest.raises(SystemExit, match=r"fold_all .*README\.md"):
        install_entry()


def test_an_id_of_another_data_set_is_refused_with_another_way(package, tmp_path, monkeypatch):
    set_folders(monkeypatch, tmp_path)
    (tmp_path / "nnUNet_preprocessed" / "Dataset901_Ours").mkdir(parents=True)
    with pytest.raises(UserError, match=r"901.*Dataset901_Ours") as error:
        install(package, tmp_path / "nnUNet_results")
    assert not list((tmp_path / "nnUNet_results").iterdir())
    # The folder that the proposed command makes holds weights.
    assert f"unzip {package} -d Dataset901_Generated_weights\n" in str(error.value)
    with zipfile.ZipFile(package) as archive:
        archive.extractall(tmp_path / "weights")
    assert checkpoints.load_weights(tmp_path / "weights").weights
    # If two data sets have the id already, the message names both.
    (tmp_path / "nnUNet_results" / "Dataset901_Theirs").mkdir(parents=True)
    with pytest.raises(UserError, match="Several data sets have the id 901: Dataset901_Ours, Dataset901_Theirs"):
        dataset_name("901")


def test_the_commands_name_plans_that_are_not_nnunets_default(package, tmp_path, caplog, capsys):
    other = replace(members(package), "manifest.json", b"nnUNetPlans", b"nnUNetResEncUNetLPlans")
    caplog.set_level("INFO", logger="nnunetv2_macl")
    folder = install(write(tmp_path / "a.zip", other), tmp_path / "my results")
    assert folder.parent.name.endswith("__nnUNetResEncUNetLPlans__3d_fullres")
    lines = caplog.messages[-1].splitlines()
    options = "3d_fullres 0 -tr nnUNetTrainerMACL -p nnUNetResEncUNetLPlans"
    assert lines[2].strip() == f"nnUNetv2_train 901 {options}"
    assert lines[4].strip() == f"nnUNet_macl_weights='{folder}' nnUNetv2_train DATASET {options}"
    assert f"nnUNetv2_train YOUR_DATASET {options}" in model_card(
        {"plans_name": "nnUNetResEncUNetLPlans"} | DESCRIBED, "x"
    )


DESCRIBED = {"configuration": "3d_fullres", "recipe": {"method": "restoration"}}


def test_the_card_of_restoration_does_not_mention_contrast():
    card = model_card(DESCRIBED, "x")
    assert "contrastive" not in card and "masked-image-modelling" in card


def replace(content, name, old, new):
    assert old in content[name]
    return resummed(content | {name: content[name].replace(old, new)})


def with_nan(content):
    weights = torch.load(io.BytesIO(content["macl_encoder.pth"]), weights_only=True)
    weights["network_weights"][weights["trained_keys"][0]].fill_(torch.nan)
    torch.save(weights, stream := io.BytesIO())
    return resummed(content | {"macl_encoder.pth": stream.getvalue()})


HOSTILE = {
    "absolute": lambda c: [*c.items(), ("/tmp/macl_escaped", b"x")],
    "parent": lambda c: [*c.items(), ("../../macl_escaped", b"x")],
    "backslash": lambda c: [*c.items(), ("..\\macl_escaped", b"x")],
    "folder": lambda c: [*c.items(), ("sub/", b"")],
    "another file": lambda c: [*c.items(), ("trainer.py", b"print()")],
    "one missing": lambda c: {k: v for k, v in c.items() if k != "macl_decoder.pth"},
    "no checksums": lambda c: c | {SUMS: b""},
    "garbled checksums": lambda c: c | {SUMS: b"\xff\xfe\x00"},
    "changed weights": lambda c: c | {"macl_encoder.pth": c["macl_encoder.pth"][:-200] + bytes(200)},
    "changed card": lambda c: c | {"README.md": b"mine"},
    "path in the data set": lambda c: replace(c, "manifest.json", b'"Dataset901_Generated"', b'"Dataset901_../../x"'),
    "path in the plans": lambda c: replace(c, "manifest.json", b'"nnUNetPlans"', b'"../../nnUNetPlans"'),
    "path in the configuration": lambda c: replace(c, "manifest.json", b'"3d_fullres"', b'"3d_fullres/../../x"'),
    "device of Windows": lambda c: replace(c, "manifest.json", b'"nnUNetPlans"', b'"NUL.Plans"'),
    "no plans": lambda c: replace(c, "manifest.json", b'"nnUNetPlans"', b"null"),
    "digits that are not ASCII": lambda c: replace(
        c, "manifest.json", b"Dataset901_", "Dataset\u0669\u0660\u0661_".encode()
    ),
    "control character": lambda c: replace(c, "manifest.json", b'"nnUNetPlans"', b'"nnUNet\\u001bPlans"'),
    "twice the same": lambda c: [*c.items(), ("README.md", c["README.md"])],
    "a text that fills the memory": lambda c: resummed(c | {"manifest.json": c["manifest.json"] + b" " * (65 * 2**20)}),
    "no manifest": lambda c: resummed(c | {"manifest.json": b"[]"}),
    "a later version": lambda c: replace(c, "manifest.json", b'"format_version": 1', b'"format_version": 9'),
    "weights that are not numbers": with_nan,
    "no weights": lambda c: resummed(c | {"macl_encoder.pth": b"not weights"}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_and_damaged_packages_leave_nothing_behind(case, package, tmp_path):
    file = write(tmp_path / "hostile.zip", HOSTILE[case](members(package)))
    with pytest.raises(UserError, match=r"hostile\.zip|macl_encoder\.pth"):
        install(file, tmp_path / "results")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["hostile.zip", "results"]
    assert not Path("/tmp/macl_escaped").exists()


@pytest.mark.parametrize("name", ["macl_encoder.pth", "macl_plan.json"])
def test_members_that_would_fill_the_disk_are_not_unpacked(name, package, tmp_path):
    file = write(tmp_path / "hostile.zip", resummed(members(package) | {name: bytes(65 * 2**20)}))
    assert file.stat().st_size < 2**20
    with pytest.raises(UserError, match=rf"{name}' would become 68,157,440 bytes"):
        inspect(file)


def test_a_wrong_size_in_the_table_of_contents_is_detected(package, tmp_path):
    """The table of contents gives half of the size of a member."""
    data = bytearray(write(tmp_path / "lie.zip", members(package)).read_bytes())
    with zipfile.ZipFile(tmp_path / "lie.zip") as archive:
        member = archive.getinfo("macl_encoder.pth")
        at = data.rindex(b"PK\x01\x02", 0, data.rindex(b"macl_encoder.pth"))
        data[at + 24 : at + 28] = (member.file_size // 2).to_bytes(4, "little")
    (tmp_path / "lie.zip").write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        install(tmp_path / "lie.zip", tmp_path / "results")
    assert not list((tmp_path / "results").iterdir())


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06", b"no zip"])
def test_a_file_that_is_no_zip_is_refused(content, tmp_path):
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.zip"):
        install(tmp_path / "a.zip", tmp_path / "results")
    with pytest.raises(UserError, match="There is no file"):
        install(tmp_path / "b.zip", tmp_path / "results")


def test_a_package_that_is_cut_short_anywhere_is_refused(package, tmp_path):
    whole = package.read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        file = tmp_path / "cut.zip"
        file.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match=r"cut\.zip"):
            install(file, tmp_path / "results")
    assert not list((tmp_path / "results").iterdir())


def test_names_with_spaces_and_parentheses_are_exported_and_installed(package, tmp_path, caplog):
    named = members(package)
    for old, new in ((b"Dataset901_Generated", b"Dataset901_Heart (old)"), (b'"nnUNetPlans"', b'"my plans"')):
        named = replace(named, "manifest.json", old, new)
    caplog.set_level("INFO", logger="nnunetv2_macl")
    folder = install(write(tmp_path / "a.zip", named), tmp_path / "results")
    assert folder.parent.parent.name == "Dataset901_Heart (old)" and "__my plans__" in folder.parent.name
    assert "-p 'my plans'" in caplog.messages[-1]


@pytest.mark.parametrize(
    "name", ["Dataset901_a/b", "Dataset901_" + "x" * 100, "Dataset901_a.", "Dataset\u0669\u0660\u0661_a"]
)
def test_no_package_is_written_that_cannot_be_installed(run, tmp_path, name):
    for file in ("macl_encoder.pth", "macl_decoder.pth"):
        checkpoints.save(checkpoints.load(run / file) | {"dataset_name": name}, tmp_path / "run" / file)
    with pytest.raises(UserError, match=r"could not be installed: its dataset_name.*--format nnunet"):
        write_package(tmp_path / "run", tmp_path / "a.zip")
    assert not (tmp_path / "a.zip").exists()


def test_folders_that_cannot_be_written_are_reported(package, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"file/results could not be written: Not a directory"):
        install(package, tmp_path / "file" / "results")
    monkeypatch.setattr(installing.tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"weights\.zip could not be unpacked: No such file.*export TMPDIR"):
        inspect(package)


def test_a_full_disk_is_reported(package, tmp_path, monkeypatch):
    free = installing.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(installing.shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match="and 10 are free"):
        install(package, tmp_path / "results")
    assert not list((tmp_path / "results").rglob("*"))


# --- inspecting -------------------------------------------------------------------------------------------------------------


def test_each_kind_of_file_is_described(package, run, monkeypatch, capsys):
    for file, words in (
        (package, ["package", "cc-by-4.0", "7 files"]),
        (run / "macl_encoder.pth", ["encoder weights", "macl_encoder.pth.sha256"]),
        (run / "macl_decoder.pth", ["decoder weights"]),
        (run / "macl_network.pth", ["whole nnU-Net network"]),
    ):
        monkeypatch.setattr(sys, "argv", ["nnUNetv2_macl_inspect", str(file)])
        inspect_entry()
        out = capsys.readouterr().out
        for word in [*words, "Dataset901_Generated", "16 x 24 x 32 voxels", "L_g 1.250", "torch", "JBHI 2026"]:
            assert word in out, (file, word)


def test_a_plan_from_elsewhere_does_not_control_the_terminal(workspace, target):
    derive_or_load_plan(target)
    file = plan_file(target)
    content = json.loads(file.read_text())
    file.write_text(
        json.dumps(content | {"dataset_name": "Dataset901_\x1b[31mX", "reasons": {"threshold": "\x1b]0;x"}})
    )
    out = inspect(file)
    assert "edited" in out and "threshold" in out and "\x1b" not in out
    with pytest.raises(UserError, match=r"nnUNetPlans\.json is no file of nnunetv2_macl"):
        inspect(workspace.preprocessed / "Dataset901_Generated" / "nnUNetPlans.json")


def test_a_checkpoint_is_described_and_unknown_files_are_refused(tmp_path):
    checkpoints.save(
        {
            "kind": "macl_checkpoint",
            "current_epoch": 2,
            "logging": {"train_losses/dense": [3.0, 2.5]},
            "run": {"macl_plan": {"dataset_name": "Dataset901_X", "recipe": {"num_epochs": 9}}},
            "collapsed": "L_g is 5.919\x1b[31m",
        },
        tmp_path / "checkpoint_latest.pth",
    )
    out = inspect(tmp_path / "checkpoint_latest.pth")
    assert "2 of 9" in out and "L_d 2.500" in out and "L_g is 5.919" in out and "\x1b" not in out
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("hello")
    checkpoints.save({"kind": "macl_encoder", "architecture": 3, "network_weights": {}}, tmp_path / "odd.pth")
    for name, words in (
        ("other.pth", "no file of nnunetv2_macl"),
        ("text.pth", "cannot be loaded"),
        ("odd.pth", "is damaged"),
        ("none.pth", "no file"),
    ):
        with pytest.raises(UserError, match=words):
            inspect(tmp_path / name)
    with pytest.raises(UserError, match=r"Give a file in it: checkpoint_latest\.pth"):
        inspect(tmp_path)


def test_a_damaged_package_is_refused(package, tmp_path):
    content = members(package)
    with pytest.raises(UserError, match=r"a\.zip is damaged.*README\.md"):
        inspect(write(tmp_path / "a.zip", content | {"README.md": b"mine"}))


def test_what_a_package_leaves_out_is_no_edit_of_its_plan(package):
    plan = json.loads(members(package)["macl_plan.json"])
    assert plan["recipe"]["description"] == "" and not is_edited(plan)
