"""Other formats: independent readers read what we write, and we read files that were not written by our code."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import DATASET
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from test_transfer import KINDS, architecture, unet

from nnunetv2_macl import checkpoints, formats
from nnunetv2_macl.cli.weights import export_entry, inspect_entry
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.sharing.inspect import inspect
from nnunetv2_macl.training.initial_weights import load_transfer
from nnunetv2_macl.transfer import ADAPTED, plan_transfer


def preprocessing(axes=3, normalization="ZScoreNormalization"):
    return {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing": [2.5, 0.7, 0.8][-axes:],
        "patch_size": [16, 24, 32][-axes:],
        "normalization_schemes": [normalization],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
        "original_median_spacing_after_transp": [2.5, 0.7, 0.8],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
    }


@pytest.fixture
def run(tmp_path):
    """Return a function that writes the weights of a pre-training run, and returns its folder and its U-Net."""

    def write(kind=PlainConvUNet, axes=3, **changes):
        own = architecture(kind, axes, features=[4, 8, 12], channels=2)
        # nnU-Net's plans contain the full names of classes.
        own["arch_kwargs"] |= {"nonlin": "torch.nn.LeakyReLU", "dropout_op": None}
        network = unet({**own, "arch_kwargs": {k: v for k, v in own["arch_kwargs"].items() if k != "nonlin"}}, seed=3)
        state = network.state_dict()
        checkpoints.export_weights(
            tmp_path / "run",
            encoder={k: v for k, v in state.items() if k.startswith("encoder.")},
            decoder={k: v for k, v in state.items() if k.startswith(("decoder.stages.0.", "decoder.transpconvs.0."))},
            unet_weights=state,
            description={
                "architecture": own,
                "dataset_name": "Dataset901_Generated",
                "plans_name": "nnUNetPlans",
                "configuration": "3d_fullres",
                "preprocessing": preprocessing(axes),
                "citations": [checkpoints.MACL_CITATION, checkpoints.NNUNET_CITATION],
            }
            | changes,
        )
        return tmp_path / "run", network

    return write


def export(monkeypatch, capsys, *arguments):
    """Run the command and return its output."""
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_macl_export", *map(str, arguments)])
    export_entry()
    return capsys.readouterr().out


def test_a_tensor_under_several_names_is_written_once(run):
    """A convolution's weight has two names in the encoder of a U-Net, and four in the whole network."""
    folder, network = run()
    parameters = {"encoder": network.encoder.parameters(), "network": network.parameters()}
    for kind, own in parameters.items():
        weights = checkpoints.load(folder / f"macl_{kind}.pth")["network_weights"]
        storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in weights.values()}
        assert sum(storages.values()) == sum(parameter.numel() * 4 for parameter in own)


# --- nnssl's format, read as nnU-Net's master branch reads it --------------------------------------------------------------


def read_as_nnunet_master(file, classes):
    """Return a U-Net for fine-tuning from an nnssl checkpoint.

    This follows the description of the format: the plan gives the class and its arguments, and all weights below
    key_to_encoder and key_to_stem are loaded into the submodules of these names.
    """
    content = torch.load(file, weights_only=True, map_location="cpu")
    plan = content["nnssl_adaptation_plan"]
    arch = plan["architecture_plans"]
    # The plans file for fine-tuning is made from these values.
    configuration = next(iter(plan["pretrain_plan"]["configurations"].values()))
    patch_size = plan["recommended_downstream_patchsize"]
    assert len(configuration["spacing"]) == len(configuration["patch_size"]) == len(patch_size) == 3
    assert plan["key_to_lpe"] is None
    for name in plan["keys_to_in_proj"]:
        assert content["network_weights"][f"{name}.weight"].shape[1] == plan["pretrain_num_input_channels"]
    json.dumps([plan, content["citations"]])
    for citation in content["citations"]:
        assert citation["type"] and citation["name"] and citation["apa_citations"]
    assert content["citations"][1]["apa_citations"] == [checkpoints.MACL_CITATION]
    assert all(isinstance(arch["arch_kwargs"][key], str) for key in arch["arch_kwargs_requiring_import"])
    network = unet(
        {
            "network_class_name": arch["arch_class_name"],
            "arch_kwargs": {k: v for k, v in arch["arch_kwargs"].items() if k != "nonlin"},
            "input_channels": plan["pretrain_num_input_channels"],
        },
        classes,
    )
    weights = content["network_weights"]
    for key in ("key_to_encoder", "key_to_stem"):
        prefix = plan[key] + "."
        below = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        network.get_submodule(getattr(network, key)).load_state_dict(below, strict=True)
    return network


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", [".", checkpoints.ENCODER_FILE, checkpoints.NETWORK_FILE])
def test_nnssl_is_read_by_nnunets_master_branch(run, tmp_path, monkeypatch, capsys, kind, source):
    folder, network = run(kind)
    out = export(monkeypatch, capsys, folder / source, "-o", tmp_path / "nnssl.pth", "--format", "nnssl")
    assert f"nnUNetv2_preprocess_like_nnssl -d DATASET -n NAME -pc {tmp_path / 'nnssl.pth'}" in out
    assert "ZScoreNormalization" not in out
    read = read_as_nnunet_master(tmp_path / "nnssl.pth", classes=5)
    image = torch.randn(1, 2, 16, 24, 32)
    for got, want in zip(read.encoder(image), network.encoder(image), strict=True):
        assert torch.equal(got, want)


def test_an_nnssl_file_records_how_the_images_were_preprocessed(run, tmp_path, monkeypatch, capsys):
    folder, _ = run(preprocessing=preprocessing(normalization="CTNormalization"))
    out = export(monkeypatch, capsys, folder, "-o", tmp_path / "nnssl.pth", "--format", "nnssl")
    assert "CTNormalization" in out
    plan = checkpoints.load(tmp_path / "nnssl.pth")["nnssl_adaptation_plan"]
    pretrain = plan["pretrain_plan"]
    assert pretrain["dataset_name"] == "Dataset901_Generated" and pretrain["image_reader_writer"] == "SimpleITKIO"
    (configuration,) = pretrain["configurations"].values()
    assert configuration["spacing"] == [2.5, 0.7, 0.8] and configuration["resampling_fn_mask_kwargs"]["is_seg"]
    assert configuration["patch_size"] == plan["recommended_downstream_patchsize"] == [16, 24, 32]
    assert configuration["normalization_schemes"] == ["CTNormalization"]
    assert plan["pretrain_num_input_channels"] == 2
    # nnssl can read the plan only if it has exactly these fields.
    assert " ".join(sorted(pretrain)) == (
        "configurations dataset_name experiment_planner_used image_reader_writer "
        "original_median_spacing_after_transp plans_name transpose_backward transpose_forward"
    )
    assert " ".join(sorted(configuration)) == (
        "data_identifier normalization_schemes patch_size preprocessor_name resampling_fn_data "
        "resampling_fn_data_kwargs resampling_fn_mask resampling_fn_mask_kwargs spacing spacing_style "
        "use_mask_for_norm"
    )
    assert " ".join(sorted(plan)) == (
        "architecture_plans key_to_encoder key_to_lpe key_to_stem keys_to_in_proj pretrain_num_input_channels "
        "pretrain_plan recommended_downstream_patchsize"
    )


def test_weights_that_nnssl_cannot_hold_are_refused(run, tmp_path):
    target = tmp_path / "nnssl.pth"
    folder, _ = run(axes=2)
    with pytest.raises(UserError, match=r"2D.*--format nnunet"):
        formats.export(folder, target, "nnssl")
    folder, _ = run()
    with pytest.raises(UserError, match=r"macl_decoder\.pth .*encoder\.stages\.0"):
        formats.export(folder / checkpoints.DECODER_FILE, target, "nnssl")
    folder, _ = run(preprocessing=None)
    with pytest.raises(UserError, match=r"macl_encoder\.pth.*preprocessed"):
        formats.export(folder, target, "nnssl")
    with pytest.raises(UserError, match="--format must be one of nnssl, nnunet, zip, got 'onnx'"):
        formats.export(folder, target, "onnx")
    with pytest.raises(UserError, match="is a folder"):
        formats.export(folder, tmp_path, "nnunet")
    assert not target.exists()


def test_a_mistake_at_the_command_line_is_explained(run, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"no pre-trained weights at .*nowhere"):
        export(monkeypatch, capsys, tmp_path / "nowhere", "-o", tmp_path / "a.pth", "--format", "nnunet")


# --- nnU-Net's format, read by nnU-Net --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", [".", checkpoints.ENCODER_FILE, checkpoints.NETWORK_FILE])
def test_nnunet_takes_the_whole_network(run, tmp_path, monkeypatch, capsys, kind, source):
    folder, network = run(kind)
    file = tmp_path / "nnunet.pth"
    out = export(monkeypatch, capsys, folder / source, "-o", file, "--format", "nnunet")
    assert f"-pretrained_weights {file}" in out
    fresh = unet(architecture(kind, 3, features=[4, 8, 12], channels=2), classes=6)
    load_pretrained_weights(fresh, file)
    theirs, ours = network.state_dict(), fresh.state_dict()
    trained = ("encoder.",) if source == checkpoints.ENCODER_FILE else ("encoder.", "decoder.stages.0.")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs if key.startswith(trained))
    assert not torch.equal(ours["decoder.stages.1.convs.0.conv.weight"], theirs["decoder.stages.1.convs.0.conv.weight"])
    # This package can read the file, too, and takes only the trained weights.
    again = formats.load_weights(file)
    assert again.weights.keys() == formats.load_weights(folder / source).weights.keys()
    assert again.architecture == formats.load_weights(folder / source).architecture


def test_nnunet_takes_the_network_of_a_cascades_second_stage(run, tmp_path, monkeypatch, capsys):
    """The network has two more inputs than images have channels."""
    folder, network = run(network_input_channels=4)
    file = tmp_path / "my weights" / "whole.pth"
    file.parent.mkdir()
    out = export(monkeypatch, capsys, folder, "-o", file, "--format", "nnunet")
    assert f"-pretrained_weights '{file}'" in out
    second_stage = unet(architecture(axes=3, features=[4, 8, 12], channels=4))
    before = second_stage.state_dict()["encoder.stages.0.0.convs.0.conv.weight"].clone()
    load_pretrained_weights(second_stage, file)
    stem = second_stage.state_dict()["encoder.stages.0.0.convs.0.conv.weight"]
    assert torch.equal(stem[:, :2], network.state_dict()["encoder.stages.0.0.convs.0.conv.weight"])
    assert stem.shape == before.shape
    again = formats.load_weights(file)
    assert again.weights["encoder.stages.0.0.convs.0.conv.weight"].shape[1] == 2


def test_a_decoder_that_is_in_another_file_is_reported(run, tmp_path, caplog):
    folder, _ = run()
    caplog.set_level("INFO", logger="nnunetv2_macl")
    formats.export(folder / checkpoints.ENCODER_FILE, tmp_path / "a.pth", "nnunet")
    assert "no decoder" in caplog.text
    caplog.clear()
    formats.export(folder, tmp_path / "b.pth", "nnunet")
    assert "no decoder" not in caplog.text


def test_fresh_layers_are_the_same_each_time_and_leave_the_random_state_alone(run):
    weights = formats.load_weights(run()[0])
    before = torch.random.get_rng_state()
    one = formats.as_nnunet(weights)["network_weights"]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(1)
    other = formats.as_nnunet(weights)["network_weights"]
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("format_name", formats.FORMATS)
@pytest.mark.parametrize(
    "changes",
    [
        {"network_class_name": "os.system"},
        {"conv_op": "os.system"},
        {"conv_op": "torch.nn.modules.module.os.system"},
        {"conv_op": "torch.nn.init.os"},
    ],
)
def test_a_file_cannot_make_other_code_run(run, tmp_path, format_name, changes):
    folder, _ = run()
    content = checkpoints.load(folder / checkpoints.ENCODER_FILE)
    where = content["architecture"] if "network_class_name" in changes else content["architecture"]["arch_kwargs"]
    where |= changes
    checkpoints.save(content, tmp_path / "hostile.pth")
    with pytest.raises(UserError, match=r"hostile\.pth names the network"):
        formats.export(tmp_path / "hostile.pth", tmp_path / "out.pth", format_name)


def test_weights_that_do_not_fit_their_architecture_are_refused(run, tmp_path):
    folder, _ = run()
    content = checkpoints.load(folder / checkpoints.ENCODER_FILE)
    content["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 16]
    checkpoints.save(content, tmp_path / "edited.pth")
    with pytest.raises(UserError, match=r"edited\.pth .*encoder\.stages\.2\.\S+ is \[12, 8, 3, 3, 3\] in the file"):
        formats.export(tmp_path / "edited.pth", tmp_path / "out.pth", "nnunet")


# --- nnssl's checkpoints, as nnssl writes them -------------------------------------------------------------------------------


def nnssl_checkpoint(own, state, prefix="", **changes):
    """Return the content of a checkpoint of an nnssl trainer. The names of its weights have a ``prefix``."""
    kind = own["network_class_name"].rpartition(".")[2]
    stem = "encoder.stages.0" if kind == "PlainConvUNet" else "encoder.stem"
    plan = {
        "architecture_plans": {
            "arch_class_name": kind,
            "arch_kwargs": own["arch_kwargs"],
            "arch_kwargs_requiring_import": ["conv_op", "norm_op"],
        },
        "pretrain_plan": {"configurations": {"onemmiso": {"patch_size": (160, 160, 160), "spacing": [1, 1, 1]}}},
        "pretrain_num_input_channels": own["input_channels"],
        "recommended_downstream_patchsize": (160, 160, 160),
        "key_to_encoder": f"{prefix}encoder.stages",
        "key_to_stem": f"{prefix}{stem}",
        "keys_to_in_proj": (f"{prefix}{stem}.convs.0.conv", f"{prefix}{stem}.convs.0.all_modules.0"),
        "key_to_lpe": None,
    }
    return {
        "network_weights": {f"{prefix}{key}": value for key, value in state.items()},
        "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01}]},
        "trainer_name": "BaseMAETrainer",
        "citations": [{"type": "Dataset", "name": "OpenMind", "apa_citations": ["Someone (2024)"]}],
        "nnssl_adaptation_plan": plan | changes,
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["", "online_network."])
def test_an_nnssl_checkpoint_gives_its_encoder(tmp_path, kind, prefix):
    own = architecture(kind, 3, features=[4, 8, 12])
    state = unet(own, seed=5).state_dict()
    checkpoints.save(nnssl_checkpoint(own, state, prefix), tmp_path / "checkpoint_final.pth")
    weights = formats.load_weights(tmp_path / "checkpoint_final.pth")
    encoder = {key for key in state if key.startswith("encoder.")}
    assert weights.weights.keys() == encoder
    assert all(torch.equal(weights.weights[key], state[key]) for key in encoder)
    assert weights.description["citations"] == ["OpenMind: Someone (2024)"]
    ours = architecture(kind, 3, features=[4, 8, 12], channels=3)
    fitted = plan_transfer(weights, unet(ours).state_dict(), ours)
    assert fitted.count("encoder") == (len(encoder), len(encoder)) and fitted.count("decoder")[0] == 0
    assert fitted.rows[0].how == ADAPTED
    assert fitted.difference == "input_channels is 1 there and 3 here"


def test_a_network_that_nnssl_stores_only_by_name(tmp_path):
    """The architecture that is derived from the name has the right number of parameters."""
    own = architecture(ResidualEncoderUNet, 3)
    named = {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    checkpoints.save(nnssl_checkpoint(own, {}, architecture_plans=named), tmp_path / "resencl.pth")
    found = formats.load_weights(tmp_path / "resencl.pth").architecture
    assert found["network_class_name"] == f"{ResidualEncoderUNet.__module__}.ResidualEncoderUNet"
    with torch.device("meta"):
        kwargs = {k: v for k, v in found["arch_kwargs"].items() if k not in ("conv_op", "norm_op", "nonlin")}
        network = ResidualEncoderUNet(
            1,
            conv_op=torch.nn.Conv3d,
            norm_op=torch.nn.InstanceNorm3d,
            nonlin=torch.nn.LeakyReLU,
            num_classes=1,
            **kwargs,
        )
    # ResEnc L has 102 million parameters.
    assert 100e6 < sum(parameter.numel() for parameter in network.parameters()) < 104e6


def test_nnssl_checkpoints_of_other_networks_and_damaged_ones_are_named(tmp_path):
    own = architecture(ResidualEncoderUNet, 3)
    state = unet(own).state_dict()
    file = tmp_path / "checkpoint.pth"
    primus = {"arch_class_name": "PrimusM", "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    checkpoints.save(nnssl_checkpoint(own, state, architecture_plans=primus), file)
    with pytest.raises(UserError, match=r"checkpoint\.pth holds weights of the network 'PrimusM'"):
        formats.load_weights(file)
    content = nnssl_checkpoint(own, state)
    del content["nnssl_adaptation_plan"]["key_to_stem"]
    checkpoints.save(content, file)
    with pytest.raises(UserError, match=r"checkpoint\.pth .*'key_to_stem'"):
        formats.load_weights(file)
    # Older checkpoints hold numbers of NumPy.
    torch.save(nnssl_checkpoint(own, state) | {"_best_ema": np.float64(0.5)}, file)
    assert formats.load_weights(file).weights


# --- nnU-Net's own checkpoints, as nnU-Net writes them ------------------------------------------------------------------------


def nnunet_trainer(folder, fold=0):
    """Return nnU-Net's own trainer of the planned data set, at the beginning of a training."""
    plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    dataset_json = json.loads((folder / "dataset.json").read_text())
    trainer = nnUNetTrainer(plans, "2d", fold, dataset_json, torch.device("cpu"))
    trainer.initialize()
    return trainer


def test_a_checkpoint_of_nnunet_is_taken_as_weights(workspace, target, tmp_path, monkeypatch, capsys):
    trainer = nnunet_trainer(workspace.preprocessed / DATASET)
    # nnU-Net's log and its best Dice are numbers of NumPy.
    trainer._best_ema = np.float64(0.5)
    trainer.logger.log("train_losses", np.float32(0.25), 0)
    trainer.logger.log("dice_per_class_or_region", [np.float64(0.5), np.float64(np.nan)], 0)
    file = tmp_path / "checkpoint_final.pth"
    trainer.save_checkpoint(str(file))
    state = trainer.network.state_dict()

    found = formats.load_weights(file)
    assert found.architecture == target.architecture() and found.description["fold"] == 0
    _, fitted = load_transfer(file, target)
    assert fitted.difference is None
    for part in ("encoder", "decoder"):
        own = [key for key in state if key.startswith(f"{part}.") and not key.startswith("decoder.encoder.")]
        taken, tensors = fitted.count(part)
        assert (taken, tensors) == (len([key for key in own if ".seg_layers." not in key]), len(own))
    assert all(torch.equal(value, state[key]) for key, value in fitted.weights.items())

    monkeypatch.setattr(sys, "argv", ["nnUNetv2_macl_inspect", str(file)])
    inspect_entry()
    assert "checkpoint of nnU-Net's training with labels" in capsys.readouterr().out
    # the folder of the fold names the file in it
    with pytest.raises(UserError, match=r"Give one of: .*checkpoint_final\.pth"):
        formats.load_weights(tmp_path)


def nnunet_checkpoint(own, state, **configuration):
    """Return the content of a checkpoint of nnU-Net for a plan with one configuration."""
    planned = {"architecture": {**own, "_kw_requires_import": ["conv_op", "norm_op"]}, "patch_size": [16, 16, 16]}
    planned |= {"pool_op_kernel_sizes": own["arch_kwargs"]["strides"], "normalization_schemes": ["ZScoreNormalization"]}
    plans = {"dataset_name": "Dataset900_There", "plans_name": "nnUNetPlans", "configurations": {}}
    plans["configurations"]["3d_fullres"] = planned | configuration
    return {
        "network_weights": state,
        "trainer_name": "nnUNetTrainer",
        "init_args": {
            "plans": plans,
            "configuration": "3d_fullres",
            "fold": "all",
            "dataset_json": {"channel_names": {"0": "T1", "1": "T2"}},
            "device": torch.device("cpu"),
        },
        "current_epoch": 1000,
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
def test_a_second_stage_of_a_cascade_gives_its_weights_for_images(tmp_path, kind, prefix):
    """Its first convolution also takes the first stage's segmentation, here of three labels."""
    own = architecture(kind, 3, features=[4, 8, 12], channels=2)
    state = unet(own | {"input_channels": 5}, seed=5).state_dict()
    content = nnunet_checkpoint(own, {prefix + key: value for key, value in state.items()}, previous_stage="3d_lowres")
    torch.save(content, tmp_path / "cascade.pth")
    weights = formats.load_weights(tmp_path / "cascade.pth")
    assert {value.shape[1] for key, value in weights.weights.items() if state[key].ndim > 2 and
            state[key].shape[1] != value.shape[1]} == {2}  # fmt: skip
    fitted = plan_transfer(weights, unet(own).state_dict(), weights.architecture)
    encoder = len([key for key in state if key.startswith("encoder.")])
    assert fitted.difference is None and fitted.count("encoder") == (encoder, encoder)
    # nnU-Net's own option takes the whole network with its further inputs.
    formats.export(tmp_path / "cascade.pth", tmp_path / "whole.pth", "nnunet")
    load_pretrained_weights(unet(own | {"input_channels": 5}, classes=3), tmp_path / "whole.pth")


def test_an_exported_checkpoint_keeps_its_origin(workspace, tmp_path):
    """Weights of nnU-Net were trained with labels."""
    nnunet_trainer(workspace.preprocessed / DATASET).save_checkpoint(str(tmp_path / "nnunet.pth"))
    found = formats.load_weights(tmp_path / "nnunet.pth")
    checkpoints.save(formats.as_nnunet(found), tmp_path / "exported.pth")
    exported = formats.load_weights(tmp_path / "exported.pth")
    assert (exported.kind, exported.origin) == ("nnunet", "nnU-Net")
    assert "nnU-Net" in inspect(tmp_path / "exported.pth")
    own = replace(found, description=found.description | {"kind": "macl_encoder"})
    assert "origin_kind" not in formats.as_nnunet(own)


@pytest.mark.parametrize("kind", KINDS)
def test_networks_that_moved_are_found_as_in_nnunet(tmp_path, kind):
    """Plans of older versions of nnU-Net name modules that no longer exist, and nnU-Net searches the class."""
    own = architecture(kind, 3, features=[4, 8, 12], channels=2)
    old = {"network_class_name": f"dynamic_network_architectures.architectures.former_module.{kind.__name__}"}
    content = nnunet_checkpoint(own | old, unet(own, seed=5).state_dict())
    arguments = content["init_args"]
    plans = PlansManager(arguments["plans"])
    configuration = DatasetConfiguration.from_plans(plans, "3d_fullres", arguments["dataset_json"])
    configuration.check_network()
    assert configuration.architecture() == own and configuration.strides == own["arch_kwargs"]["strides"]
    torch.save(content, tmp_path / "checkpoint_final.pth")
    weights = formats.load_weights(tmp_path / "checkpoint_final.pth")
    for theirs in (weights, replace(weights, architecture=own | old)):
        fitted = plan_transfer(theirs, unet(own).state_dict(), own)
        assert len(set(fitted.count("encoder"))) == 1
    formats.export(tmp_path / "checkpoint_final.pth", tmp_path / "whole.pth", "nnunet")
    assert formats.load_weights(tmp_path / "whole.pth").architecture == own


def test_checkpoints_of_nnunet_that_cannot_be_used_are_explained(tmp_path):
    own = architecture(axes=3, features=[4, 8, 12], channels=2)
    file = tmp_path / "checkpoint_final.pth"
    whole = nnunet_checkpoint(own, unet(own).state_dict())
    for key, value, words in (
        ("init_args", {}, "'plans'"),
        ("init_args", whole["init_args"] | {"plans": None}, "plan"),
        ("init_args", whole["init_args"] | {"configuration": "2d"}, "plan"),
        ("init_args", whole["init_args"] | {"dataset_json": {}}, "channel_names"),
        ("network_weights", {key: value / 0 for key, value in whole["network_weights"].items()}, "holds NaN"),
        ("network_weights", {}, "no weights"),
        ("network_weights", None, "plan|no weights"),
    ):
        torch.save(whole | {key: value}, file)
        with pytest.raises(UserError, match=words) as error:
            formats.load_weights(file)
        assert str(file) in str(error.value) and "damaged" not in str(error.value)
    # A checkpoint of another library.
    torch.save({"epoch": 3, "state_dict": {}}, file)
    with pytest.raises(UserError, match=r"The file holds epoch, state_dict\. .*checkpoint of nnU-Net v2"):
        formats.load_weights(file)


class _Hostile:
    """An object that runs code when it is loaded."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code in a file was run')",)


def test_code_in_a_checkpoint_is_not_run_and_is_named(tmp_path):
    own = architecture(axes=3, features=[4, 8, 12], channels=2)
    file = tmp_path / "checkpoint_final.pth"
    torch.save(nnunet_checkpoint(own, unet(own).state_dict()) | {"logging": _Hostile()}, file)
    with pytest.raises(UserError, match=r"more than tensors and plain values, namely \S*\.exec") as error:
        formats.load_weights(file)
    assert "damaged" not in str(error.value) and "\x1b" not in str(error.value)


@pytest.mark.parametrize("given", ["model_final_checkpoint.model", "model_final_checkpoint.model.pkl", "."])
def test_checkpoints_of_nnunet_v1_are_recognised_by_their_names(tmp_path, given):
    for name in ("model_final_checkpoint.model", "model_final_checkpoint.model.pkl"):
        (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(UserError, match=r"model_final_checkpoint\.model\S* is a checkpoint of nnU-Net v1"):
        formats.load_weights(tmp_path / given)


def test_a_checkpoint_of_nnunet_v1_is_recognised_by_its_content(tmp_path):
    content = {"epoch": 1, "state_dict": {}, "optimizer_state_dict": {}, "plot_stuff": ([], [], [], [])}
    torch.save(content, tmp_path / "renamed.pth")
    with pytest.raises(UserError, match="is a checkpoint of nnU-Net v1"):
        formats.load_weights(tmp_path / "renamed.pth")
