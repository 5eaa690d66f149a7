"""Write DICOM series with SimpleITK as scanners do: one file per slice, with the necessary tags."""

import numpy as np
import SimpleITK as sitk

AXIAL = (1, 0, 0, 0, 1, 0)
SAGITTAL = (0, 1, 0, 0, 0, -1)
CORONAL = (1, 0, 0, 0, 0, -1)


def write_series(
    folder, volume, series, patient="ID 1", name="Doe^Jane", *, modality="MR", image_type="ORIGINAL\\PRIMARY\\M",
    description="t2_tse", orientation=AXIAL, positions=None, spacing=(1.5, 1.5), step=5.0, start=0, compressed=False,
    image_uid=None, burned_in="NO",
):  # fmt: skip
    """Write the slices of a volume (slices, rows, columns) as DICOM files. ``positions``: in mm along the normal."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetUseCompression(compressed)
    normal = np.cross(orientation[:3], orientation[3:])
    # Number the files backwards, so that neither names nor instance numbers are in the order of the positions.
    for number, pixels in enumerate(volume):
        place = normal * (positions[number] if positions is not None else number * step)
        image = sitk.GetImageFromArray(pixels[None].astype(np.int16))
        image.SetSpacing((spacing[1], spacing[0], step))
        tags = {
            "0008|0008": image_type,
            "0008|0018": f"{image_uid or series}.{start + number + 1}",
            "0008|0060": modality,
            "0008|103e": description,
            "0010|0010": name,
            "0010|0020": patient,
            "0010|0030": "19500101",
            "0020|000d": "1.2.3",
            "0020|000e": series,
            "0020|0013": str(len(volume) - number),
            "0020|0032": "\\".join(f"{mm:.6f}" for mm in place),
            "0020|0037": "\\".join(map(str, orientation)),
            "0028|0301": burned_in,
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{len(volume) - number + start:04d}.dcm"))
        writer.Execute(image)


def volume(seed, shape=(8, 24, 32)):
    return np.random.default_rng(seed).integers(-100, 1000, shape)
