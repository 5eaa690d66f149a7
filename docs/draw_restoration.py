"""Draw docs/restoration.png: a generated image, what is hidden of it, and what the network restores.

Generate the data with the demonstration, export its folders as it prints them, and pre-train by the recipe restore:

    nnUNetv2_macl_demo
    nnUNetv2_train_macl_pretrain 900 -c 2d -device cpu -recipe restore -num_epochs 16 -num_iterations_per_epoch 50 -batch_size 16
    python docs/draw_restoration.py

The pre-training may also have been stopped. The images are test images, which the pre-training has not seen.
"""

from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from matplotlib.figure import Figure
from nnunetv2.paths import nnUNet_raw, nnUNet_results

from nnunetv2_macl import checkpoints
from nnunetv2_macl.factory import build_model
from nnunetv2_macl.methods.base import Progress, StepRandom
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.planning.plan import read_plan
from nnunetv2_macl.training.run_folder import pretraining_folder

PICTURE = Path(__file__).parent / "restoration.png"
IMAGES = 2
TITLES = ("a slice", "what the network sees", "what it restores")


def main() -> None:
    configuration = DatasetConfiguration.load(900, "nnUNetPlans", "2d")
    name = configuration.dataset_name
    run = pretraining_folder(Path(nnUNet_results), name, "nnUNetPlans", "2d") / "fold_all"
    plan = read_plan(run / "macl_plan.json")
    model = build_model(configuration, plan.geometry, plan.get_recipe())
    final, latest = run / "checkpoint_final.pth", run / "checkpoint_latest.pth"
    model.load_state_dict(checkpoints.load(final if final.is_file() else latest)["network_weights"])
    model.eval()

    files = sorted((Path(nnUNet_raw) / name / "imagesTs").glob("*.nii.gz"))[:IMAGES]
    patches = torch.stack([slice_of(file, plan.patch_size) for file in files])
    (method,) = model
    random = StepRandom(0, 0, len(files), slice(None), 1, tuple(plan.patch_size))
    views = method.views.make(patches, method.views.draw(random), Progress(0, 1, 1))
    with torch.no_grad():
        restored = method.encode(views)["restored"]
    # The loss asks for hidden voxels only, so the visible ones are those of the image.
    restored = torch.where(views["mask"], restored, patches)
    hidden = torch.where(views["mask"], torch.nan, patches)

    figure = Figure(figsize=(6, 2.1 * IMAGES), facecolor="white", layout="constrained")
    axes = figure.subplots(IMAGES, 3)
    for row, images in zip(axes, zip(patches, hidden, restored, strict=True), strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.set_facecolor("#e08214")
            axis.imshow(image[0], cmap="gray", vmin=float(images[0].min()), vmax=float(images[0].max()))
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], TITLES, strict=True):
        axis.set_title(title, fontsize=11)
    figure.savefig(PICTURE, dpi=90)


def slice_of(file: Path, size: list[int]) -> torch.Tensor:
    """Return the middle slice of an image, (1, *size), normalised as the plan of these images asks for."""
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(file))).astype(np.float32)
    image = (image - image.mean()) / image.std()
    return torch.from_numpy(image[len(image) // 2][None, : size[0], : size[1]])


if __name__ == "__main__":
    main()
