"""Adapters of segmentation networks: all registered families, and networks that are rejected."""

import json
import sys
from copy import deepcopy
from dataclasses import replace
from math import prod

import pytest
import torch
from conftest import DATASET
from dynamic_network_architectures.architectures.primus import PrimusS
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from steps import unet
from torch import nn

from nnunetv2_macl.checkpoints import PretrainedWeights
from nnunetv2_macl.cli import doctor, pretrain
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.networks.base import Level, check_adapter, class_name
from nnunetv2_macl.networks.registry import families, family_of, network_types, pretrainable
from nnunetv2_macl.networks.unet import UNet
from nnunetv2_macl.planning.derive import derive_or_load_plan
from nnunetv2_macl.transfer import plan_transfer


def marks(family, network):
    """Mark networks whose smallest patch is large as slow."""
    adapter = family(network, 0)
    size = adapter.only_patch_size or [2 * n for n in adapter.patch_multiple]
    return [pytest.mark.slow] if prod(size) > 32**3 else []


NETWORKS = [
    pytest.param(
        family,
        axes,
        number,
        id=f"{class_name(type(network)).rpartition('.')[2]}-{axes}D",
        marks=marks(family, network),
    )
    for family in families()
    for axes in (2, 3)
    for number, network in enumerate(family.examples(axes))
]
over_networks = pytest.mark.parametrize("family, axes, number", NETWORKS)


def all_stages(network):
    return pretrainable(network, decoder_stages_of(network))


def decoder_stages_of(network):
    return len(family_of(type(network))(network, 0).encoder_levels) - 1


def patches(adapter, count):
    """Return images of the only possible size, or of the smallest size with two bottleneck voxels on each axis."""
    size = adapter.only_patch_size or [2 * n for n in adapter.patch_multiple]
    return torch.randn(count, adapter.image_channels, *size, generator=torch.Generator().manual_seed(0))


def last_map(adapter, images):
    return adapter.decode(adapter.encode(images))[-1]


@over_networks
def test_the_adapter_computes_what_the_network_computes(family, axes, number):
    network = family.examples(axes)[number]
    assert family_of(type(network)) is family_of(class_name(type(network))) is family
    adapter = all_stages(network)
    read = []
    family.last_layer(network).register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    images = patches(adapter, 2)
    network.eval()(images)
    torch.testing.assert_close(last_map(adapter, images), read[0])
    levels = adapter.decoder_levels[:1]
    maps = adapter.decode(adapter.encode(images), stages=len(levels))
    assert torch.equal(maps[0], adapter.encode(images)[-1])
    assert [values.shape[1] for values in maps[1:]] == [level.channels for level in levels]


@over_networks
def test_shapes_are_checked_without_values(family, axes, number):
    network = family.examples(axes)[number].to("meta")
    assert all_stages(network).encoder_levels == all_stages(family.examples(axes)[number]).encoder_levels


@over_networks
def test_weights_have_the_names_of_the_network_and_can_be_loaded_by_them(family, axes, number):
    network, other = (family.examples(axes)[number] for _ in range(2))
    stages = min(1, decoder_stages_of(network))
    adapter, target = pretrainable(network, stages), pretrainable(other, stages)
    encoder, decoder = adapter.trained_weights()
    own = network.state_dict()
    assert encoder and bool(decoder) == bool(stages) and not encoder.keys() & decoder.keys()
    assert all(own[key].data_ptr() == value.data_ptr() for key, value in (encoder | decoder).items())
    assert {family.part_of(key) for key in encoder} == {"encoder"} and all(family.part_of(key) for key in decoder)
    held = {id(parameter) for parameter in adapter.parameters()}
    assert held == {id(value) for key, value in network.named_parameters() if key in encoder | decoder}
    images = patches(adapter, 1)
    assert not torch.equal(last_map(adapter.eval(), images), last_map(target.eval(), images))
    target.load_weights(encoder | decoder)
    assert torch.equal(last_map(adapter, images), last_map(target, images))
    with pytest.raises(KeyError):
        target.load_weights({"no.such.weight": torch.zeros(1)})


@over_networks
def test_a_copy_of_the_encoder_can_replace_the_encoder(family, axes, number):
    adapter = pretrainable(family.examples(axes)[number], 0).eval()
    assert adapter.decoder_levels == [] and adapter.trained_weights()[1] == {}
    copy = deepcopy(adapter.encoder)
    images = patches(adapter, 1)
    before = adapter.encode(images)
    with torch.no_grad():
        for parameter in adapter.encoder.parameters():
            parameter.add_(0.1)
    after, averaged = adapter.encode(images), adapter.encode(images, copy)
    assert all(torch.equal(one, other) for one, other in zip(averaged, before, strict=True))
    assert not torch.equal(after[-1], before[-1])


@over_networks
def test_mixes_samples_says_whether_samples_influence_each_other(family, axes, number):
    adapter = all_stages(family.examples(axes)[number]).train()
    images = patches(adapter, 2)
    together, alone = last_map(adapter, images), torch.cat([last_map(adapter, image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-4) != adapter.mixes_samples


@over_networks
def test_every_weight_is_transferred_to_the_same_network(family, axes, number):
    source, target = (family.examples(axes)[number] for _ in range(2))
    adapter = all_stages(source)
    encoder, decoder = adapter.trained_weights()
    architecture = {"network_class_name": class_name(type(source)), "input_channels": adapter.image_channels}
    fitted = plan_transfer(
        PretrainedWeights([], encoder | decoder, architecture, {}), target.state_dict(), architecture
    )
    target.load_state_dict(target.state_dict() | fitted.weights)
    images = patches(adapter, 1)
    assert torch.equal(last_map(adapter.eval(), images), last_map(all_stages(target).eval(), images))


@over_networks
def test_every_kernel_that_reads_images_is_adapted_to_the_order_of_their_channels(family, axes, number):
    source, target = (family.examples(axes)[number] for _ in range(2))
    adapter = all_stages(source)
    encoder, decoder = adapter.trained_weights()
    architecture = {"network_class_name": class_name(type(source)), "input_channels": adapter.image_channels}
    weights = PretrainedWeights([], encoder | decoder, architecture, {})
    names = [f"MR{channel}" for channel in range(adapter.image_channels)]
    assert len(names) > 1
    fitted = plan_transfer(weights, target.state_dict(), architecture, channel_names=(names, names[::-1]))
    target.load_state_dict(target.state_dict() | fitted.weights)
    images = patches(adapter, 1)
    expected = last_map(adapter.eval(), images)
    torch.testing.assert_close(last_map(all_stages(target).eval(), images.flip(1)), expected, rtol=1e-4, atol=1e-4)


def test_batch_norm_and_dropout_in_held_stages_mix_samples():
    assert pretrainable(unet(nn.BatchNorm2d), 0).mixes_samples
    network = unet()
    network.decoder.stages[2].convs.append(nn.Dropout2d())
    assert [pretrainable(network, stages).mixes_samples for stages in (0, 2, 3)] == [False, False, True]


def test_the_check_changes_no_state():
    network = unet(nn.BatchNorm2d)
    network.encoder.stages[1].eval()
    modes = [module.training for module in network.modules()]
    state, random = deepcopy(network.state_dict()), torch.get_rng_state()
    check_adapter(UNet, network)
    assert [module.training for module in network.modules()] == modes and len(set(modes)) == 2
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_modules_keep_the_order_of_a_saved_optimiser_state():
    adapter = pretrainable(unet(), 2)
    assert list(dict.fromkeys(name.partition(".")[0] for name, _ in adapter.named_parameters())) == [
        "encoder",
        "transpconvs",
        "stages",
    ]
    assert adapter.encoder_levels[-1] == Level(16, (8, 8)) and adapter.decoder_levels == [
        Level(12, (4, 4)),
        Level(8, (2, 2)),
    ]


@pytest.mark.parametrize("stages", [-1, 4])
def test_stages_that_the_network_does_not_have_are_refused(stages):
    with pytest.raises(ValueError, match=f"between 0 and 3, got {stages}"):
        pretrainable(unet(), stages)


class ForgetsTheFirstMap(UNet):
    """An adapter that ignores the encoder's first map but returns maps of the right shapes."""

    def decode(self, maps, stages=None):
        return super().decode([torch.zeros_like(maps[0]), *maps[1:]], stages)


class SaysOtherChannels(UNet):
    def __init__(self, network, decoder_stages):
        super().__init__(network, decoder_stages)
        self.encoder_levels = [Level(5, level.stride) for level in self.encoder_levels]


class ReadsAnotherLayer(UNet):
    @staticmethod
    def last_layer(network):
        return nn.Identity()


@pytest.mark.parametrize(
    "wrong, problem",
    [(ForgetsTheFirstMap, "other values"), (SaysOtherChannels, "its levels say"), (ReadsAnotherLayer, "does not use")],
)
@pytest.mark.parametrize("axes", [2, 3])
def test_a_wrong_adapter_is_rejected(wrong, problem, axes):
    for network in UNet.examples(axes):
        with pytest.raises(UserError, match=f"{wrong.__name__} .*{type(network).__name__} .*{problem}"):
            check_adapter(wrong, network)


class Gated(PlainConvUNet):
    """A network with the attributes of a U-Net that computes something else."""

    def forward(self, x):
        maps = self.encoder(x)
        return self.decoder([*(map.sigmoid() * map for map in maps[:-1]), maps[-1]])


def test_a_subclass_of_an_adapted_network_is_rejected():
    network = unet()
    network.__class__ = Gated
    with pytest.raises(UserError, match=r"test_networks\.Gated cannot be pre-trained.*PlainConvUNet"):
        pretrainable(network, 1)
    with pytest.raises(UserError, match="other values"):
        check_adapter(UNet, network)


@pytest.mark.parametrize("name", [pytest.param(class_name(PrimusS), marks=pytest.mark.slow), class_name(Gated)])
def test_a_plan_with_another_network_is_refused_before_anything_is_done(workspace, target, monkeypatch, capsys, name):
    file = workspace.preprocessed / DATASET / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["2d"]["architecture"]["network_class_name"] = name
    file.write_text(json.dumps(plans))
    before = sorted(workspace.folder.rglob("*"))

    def refusal(entry, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", "901", "-c", "2d", "-device", "cpu", *arguments])
        with pytest.raises(SystemExit) as end:
            entry()
        return end.value.code, capsys.readouterr().out

    code, out = refusal(doctor.doctor_entry, "--json")
    (plan,) = [result for result in json.loads(out)["results"] if result["check"] == "plan"]
    message, _ = refusal(pretrain.pretrain_entry)
    assert code == 1 and plan["status"] == "wrong"
    for words in (plan["message"], message):
        assert f"{file}, 2d: The network {name} cannot be pre-trained" in words
        assert all(known.rpartition(".")[2] in words for known in network_types())
    # nnU-Net's own command reads the plan without the check of this package.
    with pytest.raises(UserError, match="cannot be pre-trained"):
        derive_or_load_plan(replace(target, plans_manager=PlansManager(plans)))
    assert sorted(workspace.folder.rglob("*")) == before
