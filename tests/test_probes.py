"""Probes have known values on known features, and a run logs them."""

import math

import blosc2
import numpy as np
import pytest
import torch

from nnunetv2_macl import checkpoints, probes
from nnunetv2_macl.preprocessing.sources import training_cases


def test_alignment_and_uniformity_of_known_vectors():
    one = torch.eye(4)
    assert probes.alignment(one, 3 * one) == pytest.approx(0)
    assert probes.alignment(one, one.roll(1, 0)) == pytest.approx(2)
    assert probes.alignment(one, -one) == pytest.approx(4)
    assert probes.uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-5)
    # the squared distance of two orthogonal unit vectors is 2
    assert probes.uniformity(one) == pytest.approx(-4)


def test_effective_rank_is_the_number_of_directions_with_equal_variance():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 8, generator=generator)
    assert probes.effective_rank(noise) == pytest.approx(8, rel=1e-3)
    assert probes.effective_rank(noise[:, :3] @ torch.linalg.qr(noise[:8].T)[0][:3]) == pytest.approx(3, rel=1e-3)
    assert probes.effective_rank(torch.ones(10, 8)) == 1


def test_locations_are_spread_over_a_large_map():
    columns = torch.arange(256.0).expand(4, 1, 256, 256)
    some = probes._some_locations(columns, patches=16)
    assert len(some) == pytest.approx(20_000 / 4, rel=0.05) and len(some.unique()) == 256
    assert len(probes._some_locations(columns[..., :8, :8], patches=16)) == 4 * 64


class _Linear(torch.nn.Module):
    """A network whose features are the image and noise, on a grid of half the resolution."""

    def encode(self, images):
        return [images]

    def decode(self, maps):
        (images,) = maps
        pooled = torch.nn.functional.avg_pool2d(images, 2)
        noise = torch.randn(len(images), 3, *pooled.shape[2:], generator=torch.Generator().manual_seed(0))
        return [torch.cat((pooled, noise), 1)]


def test_a_linear_probe_finds_only_classes_that_the_features_contain(target):
    cases = training_cases(target)
    probe = probes.Probe(target, cases, [], [32, 32], 0)
    assert len(probe.fitted) == 3 and len(probe.measured) == 2 and probe.classes == [1, 2]
    images, labels = probe.fitted[0]
    assert images.shape == (12, 1, 32, 32) and labels.shape == (12, 32, 32)
    # each patch is centred on a voxel of a class
    assert all((label[16, 16] > 0) for label in labels)
    informative = (
        [(label[:, None].float(), label) for _, label in probe.fitted],
        [(label[:, None].float(), label) for _, label in probe.measured],
    )
    uninformative = [[(torch.zeros_like(image), label) for image, label in part] for part in informative]
    probe.fitted, probe.measured = informative
    assert probe._linear_dice(_Linear(), torch.device("cpu"), 5) > 0.8
    probe.fitted, probe.measured = uninformative
    assert probe._linear_dice(_Linear(), torch.device("cpu"), 5) < 0.3
    # ignored locations are used neither for fitting nor for measuring
    probe.fitted, probe.measured = informative
    probe.classes, probe.ignored = [1], [2]
    labels = np.concatenate([probe._locations(_Linear(), torch.device("cpu"), 5, case)[1] for case in probe.measured])
    assert set(labels.tolist()) == {0, 1}
    # at most so many locations, spread over all patches
    _, every = probe._locations(_Linear(), torch.device("cpu"), 5, probe.measured[0])
    _, some = probe._locations(_Linear(), torch.device("cpu"), 5, probe.measured[0], 100)
    assert 50 < len(some) <= 100 and set(some) == set(every)
    # a rare structure may be in no location that is fitted
    fitted = probe.fitted
    probe.fitted = [(image, torch.zeros_like(label)) for image, label in fitted]
    assert math.isnan(probe._linear_dice(_Linear(), torch.device("cpu"), 5))
    probe.fitted = fitted
    probe.measured = []
    assert math.isnan(probe._linear_dice(_Linear(), torch.device("cpu"), 5))


def test_a_case_without_classes_and_with_voxels_outside_nnunets_mask(target):
    name = training_cases(target)[0].name
    file = target.cases_folder / f"{name}_seg.b2nd"
    labels = np.full_like(blosc2.open(str(file))[:], 3)
    labels[:, :, :20] = -1
    file.unlink()
    blosc2.asarray(labels, urlpath=str(file))
    images, patches = probes._labelled_patches(target, name, [1, 2], [32, 32], (0, 0))
    assert images.shape == (12, 1, 32, 32) and set(patches.unique().tolist()) == {0, 3}


@pytest.mark.slow
def test_probes_do_not_change_the_training(workspace, tmp_path):
    recipe = tmp_path / "probed.json"
    recipe.write_text('{"inherits_from": "macl", "probe_every": 2}')
    out = workspace.pretrain("901", "-c", "2d", "-recipe", recipe, epochs=3)
    assert out.count("Probe: linear Dice ") == 2
    folder = workspace.run_folder("nnUNetTrainerMACLPretrain")
    log = checkpoints.load(folder / "checkpoint_final.pth")["logging"]
    dice = log[probes.LINEAR_DICE]
    assert math.isnan(dice[0]) and 0 <= dice[1] <= 1 and 0 <= dice[2] <= 1
    assert all(log[key][1] >= 1 for key in log if key.startswith(probes.EFFECTIVE_RANK))
    assert log[probes.UNIFORMITY][1] < 0 and log[probes.ALIGNMENT][1] > 0
    assert "Dice of a linear probe" in (folder / "report.html").read_text()
    weights = checkpoints.load(folder / "macl_encoder.pth")["network_weights"]
    workspace.pretrain("901", "-c", "2d", "-recipe", "macl", epochs=3)
    without = checkpoints.load(folder / "macl_encoder.pth")["network_weights"]
    assert all(torch.equal(weights[key], without[key]) for key in weights)
