"""MACL with U-Nets of dynamic-network-architectures."""

from types import SimpleNamespace

import pytest
import steps
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from steps import embeddings_of, model_of, recipe_of
from torch import nn

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.factory import build_model
from nnunetv2_macl.methods.base import Geometry, Progress
from nnunetv2_macl.methods.heads import GlobalProjectionHead
from nnunetv2_macl.methods.statistics import embedding_variance


def unet(kind=PlainConvUNet, axes=2, strides=(1, 2, 2, 2), features=(4, 8, 12, 16), has_norm=True):
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
        norm_op=norm if has_norm else None,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
        **{depth: 1},
    )


def images(axes=2, patches=3, edge=64):
    return torch.randn(patches, 2, *[edge] * axes, generator=torch.Generator().manual_seed(0))


def macl(whole=None, scale=4, axes=2, decoder_stages=2, auxiliary_stage=4, **values):
    """Return a model, its method, and the total loss of a few patches."""
    levels = dict(decoder_stages=decoder_stages, auxiliary_stage=auxiliary_stage, scale=[scale] * axes)
    model = model_of(whole or unet(axes=axes), [64] * axes, recipe_of(**values), **levels)
    (method,) = model
    losses = method.losses(embeddings_of(model, images(axes)), torch.rand(3, 3), Progress(0, 1, 1))
    return model, method, losses["total"]


@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize(
    "decoder_stages, auxiliary_stage, scale", [(1, 4, 2), (2, 4, 4), (2, 3, 2), (1, 3, 1), (0, 4, 1)]
)
def test_both_branches_have_dense_maps_on_one_grid(kind, axes, decoder_stages, auxiliary_stage, scale):
    levels = dict(decoder_stages=decoder_stages, auxiliary_stage=auxiliary_stage, scale=[scale] * axes)
    outputs = embeddings_of(model_of(unet(kind, axes), [64] * axes, **levels), images(axes))
    assert outputs["dense_dominant"].shape == outputs["dense_auxiliary"].shape
    assert outputs["dense_dominant"].shape[2:] == (64 // 2 ** (auxiliary_stage - 1),) * axes
    assert outputs["global_dominant"].shape == outputs["global_auxiliary"].shape == (3, 128)
    assert outputs["bottleneck_dominant"].shape[2:] == (8 // scale,) * axes
    assert outputs["bottleneck_auxiliary"].shape[2:] == (8,) * axes


@pytest.mark.parametrize("encoder", ["shared", "ema"])
def test_batch_norm_standardises_each_group_of_views_separately(encoder):
    """So the invariance group has the same maps with and without the variance group."""
    found = []
    for weight in (0.0, 1.0):
        recipe = recipe_of(weight_global=weight, auxiliary_encoder=encoder)
        model = model_of(steps.unet(nn.BatchNorm2d), [32, 32], recipe, scale=[2, 2])
        found.append(embeddings_of(model, images(edge=32)[:, :1]))
    for name in ("dense_dominant", "bottleneck_dominant", "bottleneck_auxiliary"):
        torch.testing.assert_close(found[0][name], found[1][name], msg=name)


def test_with_only_the_image_level_no_other_modules_are_built():
    model, method, loss = macl(decoder_stages=0, scale=1, weight_dense=0.0, weight_equivariance=0.0)
    assert not method.views.has_invariance
    assert set(embeddings_of(model, images())) == {"global_dominant", "global_auxiliary"}
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_only_an_averaged_encoder_has_no_dropout():
    rates = {}
    for kind in ("independent", "ema"):
        whole = unet()
        whole.encoder.stages[0].append(nn.Dropout2d(0.3))
        _, method, _ = macl(whole, auxiliary_encoder=kind)
        rates[kind] = [part.p for part in method.auxiliary_encoder.modules() if isinstance(part, nn.Dropout2d)]
    assert rates == {"independent": [0.3], "ema": [0.0]}


def test_an_independent_encoder_gets_gradients_and_an_averaged_one_follows():
    _, independent, loss = macl(auxiliary_encoder="independent")
    loss.backward()
    assert all(p.grad is not None for p in independent.auxiliary_encoder.parameters())

    model, ema, loss = macl(auxiliary_encoder="ema", ema_decay=0.9)
    before = next(ema.auxiliary_encoder.parameters()).clone()
    loss.backward()
    assert all(p.grad is None for p in ema.auxiliary_encoder.parameters())
    with torch.no_grad():
        next(model.network.encoder.parameters()).add_(1)
    ema.after_step({}, Progress(0, 1, 1))
    torch.testing.assert_close(next(ema.auxiliary_encoder.parameters()), before + 0.1)


def test_standardising_separates_embeddings_that_instance_norm_made_similar():
    torch.manual_seed(0)
    features = torch.nn.functional.instance_norm(torch.randn(16, 32, 8, 8)).relu()

    def spread(projector):
        return torch.nn.functional.normalize(projector(features)).std(0).mean().item()

    assert spread(GlobalProjectionHead(32)) > 3 * spread(GlobalProjectionHead(32, batch_norm=False))


def test_without_an_image_level_the_vectors_of_one_location_show_whether_images_differ():
    """Instance norm gives all images the same mean over locations, so means would count as collapsed."""
    _, method, _ = macl(weight_global=0.0, weight_equivariance=0.0)
    maps = [torch.nn.functional.instance_norm(torch.randn(16, 8, 4, 4)) for _ in range(2)]
    vectors = method.representations({"dense_dominant": maps[0], "dense_auxiliary": maps[1]})
    for of_one_location, dense in zip(vectors, maps, strict=True):
        assert any(torch.equal(of_one_location, dense[:, :, row, column]) for row in range(4) for column in range(4))
    assert embedding_variance(vectors[0]) > 0.5


@pytest.mark.parametrize("wrong", [{"decoder_stages": 4}, {"auxiliary_stage": 1}])
def test_stages_that_the_network_lacks_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        macl(**wrong)


@pytest.mark.parametrize("negatives, shares", [("location", (1, 0)), ("image", (0, 1)), ("both", (0.5, 0.5))])
def test_the_recipe_selects_the_negatives_of_the_pixel_level(negatives, shares):
    recipe = recipe_of(dense_negatives=negatives, weight_dense=0.8, weight_equivariance=0.0)
    model = model_of(unet(), [64, 64], recipe, scale=[2, 2])
    (method,) = model
    assert recipe.losses == {
        "global": 1.0,
        **{name: 0.8 * share for name, share in zip(("dense", "locations"), shares, strict=True) if share},
    }
    embeddings = embeddings_of(model, images())
    losses = method.losses(embeddings, torch.rand(3, 3), Progress(0, 1, 1))
    total = sum(weight * losses[name] for name, weight in recipe.losses.items())
    assert losses.keys() == recipe.losses.keys() | {"total"}
    torch.testing.assert_close(losses["total"], total)


def test_only_zero_padding_reveals_the_edge_of_the_patch():
    """The features of a constant image vary near the border with zeros, and are constant with any other padding."""
    configuration = SimpleNamespace(channel_names=["MR"] * 2, channels_without_zscore=())
    geometry = Geometry(1, 4, [2, 2], [64, 64])
    spread = {}
    for mode in ("zeros", "reflect", "replicate", "circular"):
        whole = unet(has_norm=False)
        model = build_model(configuration, geometry, recipe_of(padding_mode=mode), whole)
        # Check only the encoder, because transposed convolutions add a pattern of their own.
        maps = model.network.encode(torch.ones(1, 2, 64, 64))
        spread[mode] = max(float(m.detach().flatten(2).std(-1).max()) for m in maps)
    assert spread.pop("zeros") > 1e-3
    assert max(spread.values()) < 1e-5


# The small views of MACL have half of the patch's edge, and those of SwAV less than half.
@pytest.mark.parametrize("method, scale, patch", [("macl", 2, [64, 16]), ("swav", 1, [128, 24])])
def test_reflection_of_a_single_voxel_is_refused(method, scale, patch):
    configuration = SimpleNamespace(channel_names=["MR"] * 2, channels_without_zscore=())
    recipe = recipe_of(method=method, padding_mode="reflect")
    with pytest.raises(UserError, match="padding_mode"):
        build_model(configuration, Geometry(1, 4, [scale] * 2, patch), recipe, unet())
