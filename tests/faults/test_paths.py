"""Spaces and non-ASCII letters in every path, in a locale that supports only ASCII."""

import pytest
from conftest import DATASET

from nnunetv2_macl import checkpoints
from nnunetv2_macl.files import verify


@pytest.mark.slow
def test_paths_may_contain_spaces_and_any_letters(planned, tmp_path):
    space = planned.copy(tmp_path / "Männer & Frauen, 日本" / "nn unet")
    images = space.raw / DATASET / "imagesUn"
    for number, file in enumerate(sorted(images.iterdir())):
        file.rename(images / f"Fall {number} größer_0000.nii.gz")
    recipe = space.folder / "rezept ü.json"
    recipe.write_text('{"inherits_from": "macl", "description": "größer"}', encoding="utf-8")
    out = space.pretrain("901", "-c", "2d", "-recipe", recipe, LC_ALL="C", LANG="C", steps=1)
    assert "Traceback" not in out
    folder = space.run_folder("nnUNetTrainerMACLPretrain")
    assert verify(folder / "macl_encoder.pth")
    assert checkpoints.load(folder / "macl_encoder.pth")["dataset_fingerprint"]["images"] == 9
