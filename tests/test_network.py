"""MACLNetwork on real dynamic-network-architectures U-Nets."""

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunetv2_macl.losses import MultiLevelContrastiveLoss, down
from nnunetv2_macl.network import InstanceProjector, MACLNetwork


def unet(kind=PlainConvUNet, axes=2, strides=(1, 2, 2, 2), features=(4, 8, 12, 16)):
    conv, norm = ((nn.Conv2d, nn.InstanceNorm2d), (nn.Conv3d, nn.InstanceNorm3d))[axes - 2]
    depth = "n_conv_per_stage" if kind is PlainConvUNet else "n_blocks_per_stage"
    torch.manual_seed(0)
    return kind(
        2,
        len(strides),
        features,
        conv,
        3,
        strides,
        num_classes=3,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=norm,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
        **{depth: 1},
    )


def groups(axes, patches=3, edge=64, scale=2):
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(patches, 2, *[edge] * axes, generator=generator) for _ in range(2)]
    small = [down(x, [edge // scale] * axes) for x in full]
    return small[0], full[0], small[1], full[1]


@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize(
    "decoder_stages, auxiliary_stage, scale", [(1, 4, 2), (2, 4, 4), (2, 3, 2), (1, 3, 1), (0, 4, 1)]
)
def test_branches_meet_on_one_grid(kind, axes, decoder_stages, auxiliary_stage, scale):
    network = MACLNetwork(unet(kind, axes), decoder_stages=decoder_stages, auxiliary_stage=auxiliary_stage)
    outputs = network(*groups(axes, scale=scale))
    assert outputs["dense_dominant"].shape == outputs["dense_auxiliary"].shape
    assert outputs["dense_dominant"].shape[2:] == (64 // 2 ** (auxiliary_stage - 1),) * axes
    assert outputs["global_dominant"].shape == outputs["global_auxiliary"].shape == (3, 128)
    assert outputs["bottleneck_dominant"].shape[2:] == (8 // scale,) * axes
    assert outputs["bottleneck_auxiliary"].shape[2:] == (8,) * axes


def test_every_parameter_is_trained():
    """As DDP demands: no parameter without a gradient."""
    network = MACLNetwork(unet(), decoder_stages=2, auxiliary_stage=4)
    losses = MultiLevelContrastiveLoss()(network(*groups(2, scale=4)), torch.rand(3))
    losses["total"].backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_image_level_alone_builds_and_needs_no_more():
    network = MACLNetwork(unet(), decoder_stages=0, auxiliary_stage=4, pixel_level=False, feature_level=False)
    assert not network.needs_invariance
    _, _, small, full = groups(2, scale=1)
    outputs = network(None, None, small, full)
    assert set(outputs) == {"global_dominant", "global_auxiliary"}
    MultiLevelContrastiveLoss(weight_dense=0, weight_equivariance=0)(outputs, torch.rand(3))["total"].backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_the_unet_itself_is_trained_and_its_names_are_kept():
    whole = unet()
    network = MACLNetwork(whole, decoder_stages=2, auxiliary_stage=4)
    encoder, decoder = network.unet_weights()
    own = whole.state_dict()
    assert all(own[key].data_ptr() == value.data_ptr() for key, value in {**encoder, **decoder}.items())
    assert set(encoder) == {key for key in own if key.startswith("encoder.")}
    assert {key.split(".")[2] for key in decoder} == {"0", "1"}
    with torch.no_grad():
        next(network.encoder.parameters()).add_(1)
    assert torch.equal(whole.state_dict()[next(iter(encoder))], network.unet_weights()[0][next(iter(encoder))])


def test_dominant_branch_is_the_unets_own_decoder():
    """With all decoder stages the dominant map is what the U-Net's segmentation layer reads."""
    whole = unet().eval()
    network = MACLNetwork(whole, decoder_stages=3, auxiliary_stage=4).eval()
    read = []
    whole.decoder.seg_layers[-1].register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    small, _, _, _ = groups(2, scale=1)
    whole(small)
    torch.testing.assert_close(network._dominant(small)[1], read[0])


def test_auxiliary_encoders():
    positions = torch.rand(3)
    independent = MACLNetwork(unet(), decoder_stages=2, auxiliary_stage=4, auxiliary_encoder="independent")
    MultiLevelContrastiveLoss()(independent(*groups(2, scale=4)), positions)["total"].backward()
    assert all(p.grad is not None for p in independent.auxiliary_encoder.parameters())

    ema = MACLNetwork(unet(), decoder_stages=2, auxiliary_stage=4, auxiliary_encoder="ema", ema_decay=0.9)
    before = next(ema.auxiliary_encoder.parameters()).clone()
    MultiLevelContrastiveLoss()(ema(*groups(2, scale=4)), positions)["total"].backward()
    assert all(p.grad is None for p in ema.auxiliary_encoder.parameters())
    with torch.no_grad():
        next(ema.encoder.parameters()).add_(1)
    ema.update_ema()
    torch.testing.assert_close(next(ema.auxiliary_encoder.parameters()), before + 0.1)


def test_standardising_tells_apart_what_instance_norm_made_alike():
    torch.manual_seed(0)
    features = torch.nn.functional.instance_norm(torch.randn(16, 32, 8, 8)).relu()

    def spread(projector):
        return torch.nn.functional.normalize(projector(features)).std(0).mean().item()

    assert spread(InstanceProjector(32)) > 3 * spread(InstanceProjector(32, standardise=False))


@pytest.mark.parametrize(
    "wrong",
    [
        {"decoder_stages": 4},
        {"auxiliary_stage": 1},
        {"auxiliary_encoder": "momentum"},
        {"image_level": False, "pixel_level": False},
    ],
)
def test_arguments_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MACLNetwork(unet(), **({"decoder_stages": 2, "auxiliary_stage": 4} | wrong))


def test_other_networks_are_refused():
    with pytest.raises(NotImplementedError, match="Linear"):
        MACLNetwork(nn.Linear(2, 2), decoder_stages=1, auxiliary_stage=1)
