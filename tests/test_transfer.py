"""Transfer of weights from one U-Net to another."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import set_folders
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nnunetv2_macl import checkpoints
from nnunetv2_macl.checkpoints import PretrainedWeights
from nnunetv2_macl.cli.weights import transfer_entry
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.transfer import (
    ADAPTED,
    AS_IT_IS,
    NOT_TAKEN,
    fit_input_channels,
    kernel_norms,
    plan_transfer,
    rescale_kernels,
)

KINDS = [PlainConvUNet, ResidualEncoderUNet]
FEATURES = [4, 8, 12, 16]


def architecture(kind=PlainConvUNet, axes=2, features=FEATURES, channels=1, strides=None, kernels=None, depth=1):
    conv, norm = (("Conv2d", "InstanceNorm2d"), ("Conv3d", "InstanceNorm3d"))[axes - 2]
    stages = len(features)
    blocks = "n_conv_per_stage" if kind is PlainConvUNet else "n_blocks_per_stage"
    return {
        "network_class_name": f"{kind.__module__}.{kind.__name__}",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": features,
            "conv_op": f"torch.nn.{conv}",
            "kernel_sizes": kernels or [[3] * axes] * stages,
            "strides": strides or [[1] * axes] + [[2] * axes] * (stages - 1),
            blocks: [depth] * stages,
            "n_conv_per_stage_decoder": [1] * (stages - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.{norm}",
            "norm_op_kwargs": {"affine": True},
        },
        "input_channels": channels,
    }


def unet(architecture, classes=2, seed=0):
    kwargs = dict(architecture["arch_kwargs"])
    for key in [key for key in ("conv_op", "norm_op", "dropout_op") if kwargs.get(key)]:
        kwargs[key] = getattr(nn, kwargs[key].rpartition(".")[2])
    kind = {k.__name__: k for k in KINDS}[architecture["network_class_name"].rpartition(".")[2]]
    torch.manual_seed(seed)
    network = kind(
        input_channels=architecture["input_channels"],
        num_classes=classes,
        deep_supervision=True,
        **{"nonlin": nn.LeakyReLU} | kwargs,
    )
    # Give all norms different weights, as training does.
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


def pretrained_weights(architecture, trained=("encoder.", "decoder.transpconvs.0.", "decoder.stages.0.")):
    weights = {k: v for k, v in unet(architecture, seed=1).state_dict().items() if k.startswith(trained)}
    return PretrainedWeights([Path("macl_encoder.pth")], weights, architecture, {})


def transfer(theirs, ours, trained=("encoder.", "decoder.transpconvs.", "decoder.stages."), classes=2, **options):
    """Return the transfer, the weights of the source, and the weights of the target before and after loading."""
    source, network = pretrained_weights(theirs, trained), unet(ours, classes)
    fitted = plan_transfer(source, network.state_dict(), ours, **options)
    after = unet(ours, classes)
    after.load_state_dict({**network.state_dict(), **fitted.weights})
    return fitted, source.weights, network.state_dict(), after.state_dict()


def rows(fitted):
    return {row.part: row for row in fitted.rows}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_dropout", ["source", "target"])
def test_dropout_in_one_of_the_networks_changes_nothing(kind, has_dropout):
    """Dropout gives the norms other numbers in ``all_modules``, one of the two names of each weight."""
    plain, dropout = architecture(kind), architecture(kind)
    dropout["arch_kwargs"] |= {"dropout_op": "torch.nn.Dropout2d", "dropout_op_kwargs": {"p": 0.1}}
    theirs, ours = (dropout, plain) if has_dropout == "source" else (plain, dropout)
    fitted, source, _, after = transfer(theirs, ours)
    encoder = [key for key in after if key.startswith("encoder.")]
    assert fitted.count("encoder") == (len(encoder), len(encoder))
    assert all(torch.equal(after[key], source[key]) for key in source if key in after and ".all_modules." not in key)
    assert len({after[key].data_ptr() for key in encoder}) < len(encoder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", [2, 3])
def test_the_same_network_takes_all_trained_weights(kind, axes):
    own = architecture(kind, axes)
    fitted, theirs, before, after = transfer(own, own, ("encoder.", "decoder.transpconvs.0.", "decoder.stages.0."))
    assert fitted.difference is None
    assert all(torch.equal(after[key], theirs[key]) for key in theirs)
    # The decoder names the same parameters again. Loading old values there would undo the transfer.
    assert {f"decoder.{key}" for key in theirs if key.startswith("encoder.")} <= fitted.weights.keys()
    rest = [key for key in after if key not in theirs and not key.startswith("decoder.encoder.")]
    assert rest and all(torch.equal(after[key], before[key]) for key in rest)
    table = rows(fitted)
    assert table["decoder.stages.0"].how == AS_IT_IS and table["decoder.stages.1"].why == "not pre-trained"
    assert table["decoder.seg_layers"].how == NOT_TAKEN and "segmentation layers" in table["decoder.seg_layers"].why
    encoder = [key for key in after if key.startswith("encoder.")]
    assert fitted.count("encoder") == (len(encoder), len(encoder))
    decoder = [key for key in after if key.startswith("decoder.") and not key.startswith("decoder.encoder.")]
    assert fitted.count("decoder") == (len([key for key in theirs if key.startswith("decoder.")]), len(decoder))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", [2, 3])
def test_kernels_get_their_norms_back_and_the_function_stays(kind, axes):
    network, image = unet(architecture(kind, axes)), torch.randn(2, 1, *[32] * axes)
    fresh = kernel_norms(network)
    assert len(fresh) >= 7
    with torch.no_grad():
        for name in fresh:
            for parameter in network.get_submodule(name).conv.parameters():
                parameter.mul_(3)
        before = network(image)
        grown = kernel_norms(network)
        rescale_kernels(network, fresh)
        after = network(image)
    assert all(grown[name] == pytest.approx(3 * norm, rel=1e-5) for name, norm in fresh.items())
    assert kernel_norms(network) == pytest.approx(fresh, rel=1e-5)
    for one, other in zip(after, before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.std()))


@pytest.mark.parametrize(
    "changed",
    [
        {"norm_op": "torch.nn.BatchNorm2d"},
        {"norm_op_kwargs": {"affine": True, "track_running_stats": True}},
        {"nonlin_first": True, "nonlin": nn.SiLU, "nonlin_kwargs": {}},
    ],
    ids=["batch norm", "running statistics", "activation before the norm"],
)
def test_kernels_whose_scale_matters_are_not_rescaled(changed):
    own = architecture()
    own["arch_kwargs"] |= changed
    assert kernel_norms(unet(own)) == {}


def test_kernels_before_an_activation_that_scales_with_its_input_are_rescaled():
    own = architecture()
    own["arch_kwargs"] |= {"nonlin_first": True}
    assert len(kernel_norms(unet(own))) >= 7


@pytest.mark.parametrize("kind, stem", [(PlainConvUNet, "encoder.stages.0"), (ResidualEncoderUNet, "encoder.stem")])
@pytest.mark.parametrize("channels, wanted", [(1, 3), (2, 3), (3, 1), (4, 2)])
def test_another_number_of_channels_keeps_the_response_to_equal_inputs(kind, stem, channels, wanted):
    theirs, ours = architecture(kind, channels=channels), architecture(kind, channels=wanted)
    fitted, _, _, after = transfer(theirs, ours)
    source, target = unet(theirs, seed=1), unet(ours)
    target.load_state_dict(after)
    image = torch.randn(2, 1, 16, 16)
    expected = source.encoder(image.expand(-1, channels, -1, -1))
    for got, want in zip(target.encoder(image.expand(-1, wanted, -1, -1)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    row = rows(fitted)[stem]
    assert row.how == ADAPTED and row.taken == row.tensors
    assert f"{channels} image channels there, {wanted} here" in row.why
    assert rows(fitted)["encoder.stages.1"].how == AS_IT_IS


@given(own=st.integers(1, 5), wanted=st.integers(1, 5))
def test_every_input_channel_counts(own, wanted):
    weight = torch.randn(3, own, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(own))
    fitted = fit_input_channels(weight, wanted)
    assert fitted.shape == (3, wanted, 3, 3)
    torch.testing.assert_close(fitted.sum(1), weight.sum(1))
    # Compare with a loop over channels.
    for channel in range(wanted):
        if wanted >= own:
            copies = len(range(channel % own, wanted, own))
            torch.testing.assert_close(fitted[:, channel], weight[:, channel % own] / copies)
        else:
            torch.testing.assert_close(fitted[:, channel], weight[:, channel::wanted].sum(1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_channels_in_another_order_are_matched_by_name(kind):
    own = architecture(kind, channels=3)
    names = ["T1", "T2", "FLAIR"], ["FLAIR", "T1", "T2"]
    fitted, theirs, _, after = transfer(own, own, channel_names=names)
    stem = next(key for key in after if key.startswith("encoder.") and key.endswith(".conv.weight"))
    assert torch.equal(after[stem], theirs[stem][:, [2, 0, 1]])
    assert torch.equal(after[stem.replace(".conv.", ".all_modules.0.")], after[stem])
    part = next(row for row in fitted.rows if stem.startswith(f"{row.part}."))
    assert part.how == ADAPTED and part.why == "channels T1, T2, FLAIR there, FLAIR, T1, T2 here: put in this order"
    changed = [key for key in theirs if not torch.equal(after[key], theirs[key])]
    assert changed and all(
        key.split(".conv.")[0].split(".all_modules.")[0] == stem.split(".conv.")[0] for key in changed
    )


@pytest.mark.parametrize("names", [(["T1", "T2"], ["CT", "T2"]), (["T1", "T1"], ["T1", "T2"])])
def test_channels_with_other_names_are_reported(names):
    own = architecture(channels=2)
    fitted, theirs, _, after = transfer(own, own, channel_names=names)
    assert all(torch.equal(after[key], value) for key, value in theirs.items() if ".seg_layers." not in key)
    assert fitted.rows[0].how == AS_IT_IS and ", ".join(names[0]) in fitted.rows[0].why


def test_weights_in_another_file_are_reported():
    source = replace(pretrained_weights(architecture(), ("encoder.",)), elsewhere=frozenset(["decoder.stages.0.x"]))
    table = rows(plan_transfer(source, unet(architecture()).state_dict(), architecture()))
    assert table["decoder.stages.0"].why == "pre-trained, but not in this file: give the run's folder"
    assert table["decoder.stages.1"].why == "not pre-trained"


def test_zero_channels_are_refused():
    with pytest.raises(ValueError, match="channels must be 1 or more, got 0"):
        fit_input_channels(torch.zeros(1, 1, 3, 3), 0)


@pytest.mark.parametrize("channels, images, segmentations", [(2, 2, 3), (1, 2, 1), (3, 1, 2)])
def test_the_segmentation_channels_of_a_cascade_start_fresh(channels, images, segmentations):
    theirs, ours = architecture(channels=channels), architecture(channels=images + segmentations)
    fitted, source, before, after = transfer(theirs, ours, image_channels=images)
    key = "encoder.stages.0.0.convs.0.conv.weight"
    expected = source[key] if channels == images else fit_input_channels(source[key], images)
    torch.testing.assert_close(after[key][:, :images], expected)
    assert torch.equal(after[key][:, images:], before[key][:, images:])
    row = rows(fitted)["encoder.stages.0"]
    assert row.how == ADAPTED and f"{segmentations} further input channels" in row.why
    assert ("image channels there" in row.why) == (channels != images)


def test_another_number_of_classes_changes_nothing_else():
    own = architecture()
    fitted, theirs, _, _ = transfer(own, own, classes=7)
    assert theirs.keys() <= fitted.weights.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "theirs, ours, offset, shift",
    [
        ([4, 8, 12, 16], [4, 8, 12, 16, 20], 0, -1),
        ([4, 8, 12, 16, 20], [4, 8, 12, 16], 0, 1),
        ([8, 12, 16], [4, 8, 12, 16], -1, 0),
        ([4, 8, 12, 16], [8, 12, 16], 1, 0),
    ],
    ids=["one more at the bottom", "one less at the bottom", "one more at the top", "one less at the top"],
)
def test_networks_with_one_stage_more_or_less(kind, theirs, ours, offset, shift):
    """``offset`` leads from the target's encoder stage to the source's, and ``shift`` from decoder stage to decoder stage."""
    fitted, source, before, after = transfer(architecture(kind, features=theirs), architecture(kind, features=ours))
    name = "convs.0" if kind is PlainConvUNet else "blocks.0.conv2"
    inner = f"0.{name}" if kind is PlainConvUNet else name
    encoder_pairs = 0
    for stage in range(len(ours)):
        key, own = f"encoder.stages.{stage + offset}.{inner}.conv.weight", f"encoder.stages.{stage}.{inner}.conv.weight"
        if key in source and source[key].shape == after[own].shape:
            assert torch.equal(after[own], source[key]), own
            encoder_pairs += 1
    assert encoder_pairs >= 2
    decoder_pairs = 0
    for stage in range(len(ours) - 1):
        for part, rest in (("transpconvs", "weight"), ("stages", "convs.0.conv.weight")):
            own, key = f"decoder.{part}.{stage}.{rest}", f"decoder.{part}.{stage + shift}.{rest}"
            if key in source and source[key].shape == after[own].shape:
                assert torch.equal(after[own], source[key]), own
                decoder_pairs += 1
            else:
                assert torch.equal(after[own], before[own]), own
    assert decoder_pairs >= 2
    if offset:
        assert f"from encoder.stages.{2 + offset}" in rows(fitted)["encoder.stages.2"].why
    assert any(row.why == "no such stage there" for row in fitted.rows) == (len(ours) > len(theirs))


def test_an_encoder_that_fits_is_not_given_up_for_decoder_stages():
    """Only the first decoder stage is trained. It fits the stage that is one stage less deep."""
    theirs, ours = architecture(features=[4, 8, 16, 16, 16]), architecture(features=[4, 8, 16, 16])
    fitted, *_ = transfer(theirs, ours, ("encoder.", "decoder.transpconvs.0.", "decoder.stages.0."))
    taken, tensors = fitted.count("encoder")
    assert taken == tensors and rows(fitted)["decoder.stages.0"].how == NOT_TAKEN


def test_other_strides_are_reported_and_other_kernels_not_taken():
    strides = [[1, 1], [2, 2], [2, 2], [2, 1]]
    fitted, _, _, _ = transfer(architecture(strides=strides), architecture())
    assert "stride [2, 1] there, [2, 2] here" in rows(fitted)["encoder.stages.3"].why
    assert rows(fitted)["encoder.stages.3"].how == AS_IT_IS
    # The kernel of a transposed convolution has the size of the stride.
    assert rows(fitted)["decoder.transpconvs.0"].how == NOT_TAKEN
    assert "[16, 12, 2, 1] there, [16, 12, 2, 2] here" in rows(fitted)["decoder.transpconvs.0"].why

    kernels = [[1, 3], [3, 3], [3, 3], [3, 3]]
    fitted, _, before, after = transfer(architecture(kernels=kernels), architecture())
    row = rows(fitted)["encoder.stages.0"]
    assert row.how == NOT_TAKEN and "[4, 1, 1, 3] there, [4, 1, 3, 3] here" in row.why
    # A norm without its convolution would be useless.
    for rest in ("norm.weight", "conv.bias", "all_modules.1.weight"):
        key = f"encoder.stages.0.0.convs.0.{rest}"
        assert torch.equal(after[key], before[key])


def test_a_deeper_stage_is_taken_as_far_as_it_goes():
    fitted, _, _, _ = transfer(architecture(depth=1), architecture(depth=2))
    row = rows(fitted)["encoder.stages.2"]
    assert (row.taken, row.tensors, row.how) == (8, 16, AS_IT_IS)
    assert "encoder.stages.2.0.convs.1.conv.weight is not there" in row.why


@pytest.mark.parametrize(
    "theirs, ours, first",
    [
        (architecture(axes=2), architecture(axes=3), "arch_kwargs.conv_op is torch.nn.Conv2d there"),
        (
            architecture(features=[5, 9, 13, 17]),
            architecture(),
            r"arch_kwargs.features_per_stage is \[5, 9, 13, 17\] there",
        ),
        (
            architecture(PlainConvUNet),
            architecture(ResidualEncoderUNet),
            "arch_kwargs.n_blocks_per_stage is None there",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_first_difference(theirs, ours, first):
    with pytest.raises(UserError, match=rf"macl_encoder\.pth .* 0\.0% of .*{first}.*Type THIS"):
        transfer(theirs, ours, advice="Type THIS")


def test_less_than_a_quarter_of_the_encoder_is_refused():
    """Two of four stages fit, and hold few of the parameters."""
    theirs, ours = architecture(features=[4, 8, 40, 80]), architecture(features=[4, 8, 16, 32])
    with pytest.raises(UserError, match=r"[1-9]\.\d% .* 25%"):
        transfer(theirs, ours)
    fitted, *_ = transfer(architecture(features=[4, 8, 16, 80]), architecture(features=[4, 8, 16, 16]))
    assert fitted.count("encoder") == (24, 32)


def test_weights_without_an_encoder_are_refused():
    with pytest.raises(UserError, match=r" 0\.0% of"):
        transfer(architecture(), architecture(), trained=("decoder.stages.",))


def test_the_table_has_a_line_for_every_part():
    fitted, *_ = transfer(architecture(channels=1), architecture(channels=2))
    lines = fitted.table().splitlines()
    assert len(lines) == 1 + 4 + 3 + 3 + 1
    assert lines[0].split() == ["part", "tensors", "loaded", "how", "why"]
    assert lines[1].startswith("encoder.stages.0") and "8 of 8" in lines[1] and "adapted" in lines[1]


# --- the command -----------------------------------------------------------------------------------------------------------

DATASET = "Dataset903_Cascade"


@pytest.fixture
def show(tmp_path, monkeypatch, capsys):
    """Return a function that runs the command on a planned data set with a cascade, and returns its output."""
    set_folders(monkeypatch, tmp_path)
    folder = tmp_path / "nnUNet_preprocessed" / DATASET
    folder.mkdir(parents=True)
    labels = {"background": 0, "liver": 1, "tumour": 2}
    dataset = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz", "numTraining": 1}
    own = architecture(axes=3)
    network = {**own, "arch_kwargs": own["arch_kwargs"] | {"nonlin": "torch.nn.LeakyReLU"}}
    network["_kw_requires_import"] = ["conv_op", "norm_op", "nonlin"]
    del network["input_channels"]
    configurations = {
        "3d_lowres": {"architecture": network, "patch_size": [16, 16, 16], "next_stage": "3d_cascade_fullres"},
        "3d_fullres": {
            "architecture": network,
            "patch_size": [16, 16, 16],
            "normalization_schemes": ["CTNormalization"],
        },
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    }
    plans = {"dataset_name": DATASET, "plans_name": "nnUNetPlans", "configurations": configurations}
    plans["label_manager"] = "LabelManager"
    (folder / "dataset.json").write_text(json.dumps(dataset))
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))

    def command(pretrained, *arguments):
        state = unet(pretrained, seed=1).state_dict()
        checkpoints.export_weights(
            tmp_path,
            encoder={k: v for k, v in state.items() if k.startswith("encoder.")},
            decoder={},
            unet_weights=state,
            description={"architecture": pretrained, "configuration": "3d_fullres"},
        )
        monkeypatch.setattr(
            sys, "argv", ["nnUNetv2_macl_transfer", str(tmp_path / "macl_encoder.pth"), DATASET, *arguments]
        )
        transfer_entry()
        return capsys.readouterr().out

    return command


def test_the_command_shows_what_a_cascades_second_stage_takes(show):
    out = show(architecture(axes=3), "-c", "3d_cascade_fullres")
    assert f"macl_encoder.pth\nfor {DATASET}, nnUNetPlans, 3d_cascade_fullres: another network, " in out
    first = next(line for line in out.splitlines() if line.startswith("encoder.stages.0"))
    assert "8 of 8" in first and "adapted" in first and "2 further input channels" in first
    assert "not pre-trained" in out and "segmentation layers" in out


def test_the_command_has_the_default_configuration_of_pre_training(show):
    assert f"{DATASET}, nnUNetPlans, 3d_fullres" in show(architecture(axes=3))


def test_the_command_refuses_and_names_the_pre_training_that_fits(show):
    with pytest.raises(SystemExit, match=r"nnUNetv2_train_macl_pretrain 903 -c 3d_cascade_fullres$"):
        show(architecture(axes=2), "-c", "3d_cascade_fullres")
    with pytest.raises(SystemExit, match="has no configuration '4d'"):
        show(architecture(axes=3), "-c", "4d")
