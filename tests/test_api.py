"""The public names, and pre-training of any U-Net without nnU-Net's folders."""

import subprocess
import sys

import pytest
import torch
from conftest import environment_without_nnunet
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from steps import embeddings_of, model_of, recipe_of
from torch import nn

import nnunetv2_macl
from nnunetv2_macl.methods.base import Progress


def run(code):
    """Run code in another process without nnU-Net's variables, and return its output."""
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment_without_nnunet(), capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_importing_the_package_loads_nothing_heavy_and_prints_nothing():
    out = run("import nnunetv2_macl, sys; print([m for m in ('torch', 'nnunetv2', 'matplotlib') if m in sys.modules])")
    assert out == "[]\n"


def test_the_method_is_imported_without_nnunet():
    names = "PretrainingModel, pretrainable, PositionalContrastiveLoss, RandomAffine, MultiLevelContrastiveLoss"
    assert run(f"from nnunetv2_macl import {names}; import sys; print('nnunetv2' in sys.modules)") == "False\n"


def test_every_public_name_can_be_imported():
    for name in nnunetv2_macl._FOUND_IN:
        assert getattr(nnunetv2_macl, name).__name__ == name
        assert name in dir(nnunetv2_macl)
    with pytest.raises(AttributeError, match="no attribute 'MACLLoss'"):
        _ = nnunetv2_macl.MACLLoss


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
def test_any_unet_can_be_pre_trained(kind, axes):
    """The loss falls, and the weights of the U-Net itself change."""
    torch.manual_seed(0)
    blocks = "n_conv_per_stage" if kind is PlainConvUNet else "n_blocks_per_stage"
    unet = kind(
        input_channels=1, num_classes=2, n_stages=4, features_per_stage=[4, 8, 16, 16],
        conv_op=(nn.Conv2d, nn.Conv3d)[axes - 2], kernel_sizes=3, strides=[1, 2, 2, 2], n_conv_per_stage_decoder=1,
        conv_bias=True, norm_op=(nn.InstanceNorm2d, nn.InstanceNorm3d)[axes - 2], norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU, **{blocks: 1},
    )  # fmt: skip
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    model = model_of(unet, [32] * axes, recipe_of(own_view_weight=0.5), scale=[2] * axes)
    (method,) = model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    patches = torch.rand(4, 1, *[32] * axes, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0.1, 0.15, 0.5, 0.9])
    totals = []
    for _ in range(8):
        total = method.losses(embeddings_of(model, patches), positions, Progress(0, 1, 8))["total"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < totals[0]
    changed = [key for key, value in unet.state_dict().items() if not torch.equal(value, before[key])]
    assert any(key.startswith("encoder.") for key in changed)
    assert any(key.startswith("decoder.stages.0.") for key in changed)
    assert not any(key.startswith(("decoder.stages.1.", "decoder.seg_layers.")) for key in changed)
