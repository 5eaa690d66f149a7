"""Restoration of masked voxels: mask, head and loss, alone and together with MACL, in whole batches and in parts."""

import pytest
import torch
from steps import batch, gradients, recipe_of, training_step

from nnunetv2_macl import checkpoints
from nnunetv2_macl.methods.restoration import ReconstructionHead, restoration_loss
from nnunetv2_macl.views import enlarge_mask, mask_block_sizes, sample_mask, standardise

ALONE = dict(weight_global=0.0, weight_dense=0.0, weight_equivariance=0.0, weight_restoration=1.0)


@pytest.mark.parametrize("size, block", [((16, 24), (4, 8)), ((4, 16, 8), (1, 8, 4))])
@pytest.mark.parametrize("share, hidden", [(0.6, None), (0.0, 1), (1.0, -1)])
def test_a_mask_covers_the_given_fraction_of_blocks(size, block, share, hidden):
    grid = [n // b for n, b in zip(size, block, strict=True)]
    blocks = torch.tensor(grid).prod().item()
    mask = enlarge_mask(sample_mask(5, size, [block], share, torch.Generator().manual_seed(0)), size)
    assert mask.shape == (5, 1, *size) and mask.dtype == torch.bool
    wanted = round(share * blocks) if hidden is None else hidden % blocks
    cells = torch.nn.functional.avg_pool2d if len(size) == 2 else torch.nn.functional.avg_pool3d
    shares = cells(mask.float(), block)
    assert set(shares.unique().tolist()) == {0.0, 1.0}
    assert (shares.flatten(1).sum(1) == wanted).all()
    assert len({tuple(row.tolist()) for row in shares.flatten(1)}) > 1 or wanted in (0, blocks)


def test_each_patch_has_one_of_the_block_sizes():
    mask = sample_mask(40, (32, 32), [(4, 4), (16, 16)], 0.5, torch.Generator().manual_seed(0))
    assert mask.shape == (40, 1, 8, 8)
    mask = enlarge_mask(mask, (32, 32))
    whole = {
        block: [
            set(shares.unique().tolist()) == {0.0, 1.0}
            for shares in torch.nn.functional.avg_pool2d(mask.float(), block)
        ]
        for block in (4, 16)
    }
    assert all(whole[4]) and 10 < sum(whole[16]) < 30
    assert (mask.float().flatten(1).mean(1) == 0.5).all()


@pytest.mark.parametrize(
    "strides, blocks",
    [
        ([(1, 1), (2, 2), (4, 4), (8, 8), (16, 16)], [(4, 4), (8, 8), (16, 16)]),
        ([(1, 1, 1), (1, 2, 2), (2, 4, 4), (2, 4, 4), (4, 8, 8)], [(2, 4, 4), (4, 8, 8)]),
        ([(1, 1), (2, 2)], [(2, 2)]),
    ],
    ids=["2D", "anisotropic", "shallow"],
)
def test_block_sizes_are_the_strides_of_encoder_stages(strides, blocks):
    assert mask_block_sizes(strides) == blocks


def views(step, patches, number):
    shown = step.show(patches, number)["restoration"]
    return shown["masked"], shown["target"], shown["mask"]


def test_a_step_masks_voxels_with_a_new_mask_each_time():
    step = training_step(6, 6, recipe_of(**ALONE))
    patches = batch(6)["data"] + 10
    shown, whole, mask = views(step, patches, 0)
    assert whole is patches
    raw = training_step(6, 6, recipe_of(**ALONE), unnormalised=(0,))
    shown_raw = views(raw, patches, 0)[0]
    assert torch.equal(shown_raw[~mask], patches[~mask])
    for image, part, hidden in zip(patches, shown_raw, mask, strict=True):
        torch.testing.assert_close(part[hidden], image.mean().expand(int(hidden.sum())))
    assert torch.equal(shown, torch.where(mask, 0, patches)) and 0.5 < mask.float().mean() < 0.7
    assert not torch.equal(mask, views(step, patches, 1)[2])


def test_channels_of_any_scale_are_restored_on_one_scale():
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(3, 3, 6, 5, generator=generator)
    images = plain.clone()
    images[:, 1] = 30_000 + 8_000 * images[:, 1]
    images[2, 1] = 30_000.1
    kept = images.clone()
    whole, zero = standardise(images, [1])
    assert torch.equal(images, kept) and torch.equal(whole[:, [0, 2]], images[:, [0, 2]])
    assert whole[:2, 1].mean((1, 2)).tolist() == pytest.approx([0, 0], abs=1e-5)
    assert whole[:2, 1].std((1, 2), correction=0).tolist() == pytest.approx([1, 1], abs=1e-4)
    assert not whole[2, 1].any()
    assert not zero[:, [0, 2]].any() and zero[:, 1].flatten().tolist() == pytest.approx(
        images[:, 1].mean((1, 2)).tolist(), rel=1e-6
    )


def test_it_learns_from_channels_that_nnunet_does_not_normalise():
    """Images in HU give similar losses if their channels are standardised. Otherwise nothing is learned."""
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.interpolate(torch.randn(8, 1, 4, 4, generator=generator), (32, 32), mode="bicubic")
    images = (images - images.mean((2, 3), keepdim=True)) / images.std((2, 3), correction=0, keepdim=True)
    losses, recipe = {}, recipe_of(**ALONE, optimizer="adamw", learning_rate=3e-3)
    for name, patches, channels in (
        ("z-scored", images, ()),
        ("HU", 500 * images - 300, (0,)),
        ("HU, not standardised", 500 * images - 300, ()),
    ):
        step = training_step(8, 8, recipe, dtype=torch.float32, unnormalised=channels)
        batches = {"data": patches, "positions": torch.rand(8, 3)}
        losses[name] = [step(batches, number)["restoration"] for number in range(40)]
    # The losses differ a little, because the zero padding has another intensity in HU.
    assert losses["HU"] == pytest.approx(losses["z-scored"], rel=0.2)
    assert losses["z-scored"][-1] < 0.6 * losses["z-scored"][0]
    assert losses["HU, not standardised"][-1] > 0.9 * losses["HU, not standardised"][0]


@pytest.mark.parametrize("block", [(4, 2), (1, 4, 2)])
def test_each_location_predicts_its_own_block(block):
    head = ReconstructionHead(3, 2, block)
    maps = torch.zeros(1, 3, *[3] * len(block))
    before = head(maps)
    assert before.shape == (1, 2, *[3 * n for n in block])
    where = (1, 2, 0)[-len(block) :]
    maps[(0, slice(None), *where)] = 1
    changed = (head(maps) != before).any(1)[0]
    inside = tuple(slice(i * n, (i + 1) * n) for i, n in zip(where, block, strict=True))
    assert changed[inside].all() and changed.sum() == torch.tensor(block).prod()


def test_the_loss_is_the_mean_over_masked_voxels():
    images, mask = torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0, :2] = mask[1, 0, 3, 3] = True
    restored = torch.full((2, 3, 4, 4), 100.0)
    restored[0, :, 0, 0], restored[0, :, 0, 1], restored[1, :, 3, 3] = 1, 3, 2
    assert restoration_loss(restored, images, mask).tolist() == [5, 4]


def test_with_macl_the_gradient_is_the_sum_of_both():
    plain, both = training_step(5, 5, recipe_of()), training_step(5, 5, recipe_of(weight_restoration=1.0))
    alone = training_step(5, 5, recipe_of(**ALONE))
    both.model.load_state_dict({**both.model.state_dict(), **plain.model.state_dict()})
    shared = {key: value for key, value in both.model.state_dict().items() if key in alone.model.state_dict()}
    alone.model.load_state_dict(shared)
    measured = [step(batch(5), 0) for step in (plain, both, alone)]
    assert measured[1]["total"] == pytest.approx(measured[0]["total"] + measured[2]["total"])
    key = "network.encoder.stages.1.0.convs.0.conv.weight"
    # Each gradient is clipped separately, so test whether the sum is in the plane of the two others.
    one, two, three = (gradients(step)[key].flatten() for step in (plain, both, alone))
    basis = torch.stack((one, three), 1)
    left = two - basis @ torch.linalg.lstsq(basis, two[:, None]).solution[:, 0]
    assert left.norm() < 1e-6 * two.norm()


def test_a_run_with_only_restoration(workspace):
    out = workspace.pretrain("901", "-c", "2d", "-recipe", "restore", epochs=2)
    folder = workspace.run_folder("nnUNetTrainerMACLPretrain")
    assert "L_R" in out and "L_g" not in out and "COLLAPSED" not in out
    log = checkpoints.load(folder / "checkpoint_final.pth")["logging"]
    assert len(log["train_losses/restoration"]) == 2 and not {"positives", "embedding_variance"} & log.keys()
    assert (folder / "macl_decoder.pth").is_file() and (folder / "views.png").is_file()
    assert (folder / "progress.png").is_file() and "L_R, restoration" in (folder / "report.html").read_text()
