"""Encode pictures as data inside the page."""

from __future__ import annotations

import base64
import io

import matplotlib.image
import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image

from nnunetv2_macl.report.curves import COLOURS

# largest edge of a slice in the page, in pixels
_EDGE = 160


def window_intensity(image: np.ndarray) -> np.ndarray:
    """Return a slice (H, W) with intensities between the 1st and the 99th percentile scaled to 0 to 1."""
    low, high = np.percentile(image, (1, 99))
    return np.clip((image - low) / max(high - low, 1e-6), 0, 1)


def png(image: np.ndarray) -> str:
    """Return a picture (H, W) or (H, W, 3) with values from 0 to 1 as data for ``src``, no larger than the page shows it."""
    step = max(1, int(np.ceil(max(image.shape[:2]) / _EDGE)))
    image = image[::step, ::step]
    stream = io.BytesIO()
    if image.ndim == 2:
        Image.fromarray((image * 255).astype(np.uint8)).save(stream, "png", optimize=True)
    else:
        matplotlib.image.imsave(stream, np.ascontiguousarray(image), format="png")
    return data_uri(stream.getvalue(), "png")


def data_uri(content: bytes, kind: str) -> str:
    """Return an encoded picture as data for ``src``. ``kind`` is its MIME subtype, as in image/png."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def coloured(grey_slice: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return a slice with each label in its own colour over the image, (H, W, 3).

    Args:
        grey_slice: (H, W), 0 to 1.
        labels: (H, W).
    """
    picture = np.repeat(grey_slice[..., None], 3, -1)
    for label in (value for value in np.unique(labels) if value > 0):
        mask = labels == label
        picture[mask] = 0.45 * picture[mask] + 0.55 * np.asarray(to_rgb(COLOURS[(int(label) - 1) % len(COLOURS)]))
    return picture


def labelled_slice(image: np.ndarray, *labels: np.ndarray) -> list[str]:
    """Return the slice of a volume with the most foreground, and this slice with each labels in colour, as data for ``src``.

    Args:
        image: (D, H, W).
        *labels: (D, H, W) each. The first ones with foreground decide which slice is shown.
    """
    foreground = next((each for each in labels if (each > 0).any()), labels[0]) > 0
    z = int(foreground.sum((1, 2)).argmax())
    grey_slice = window_intensity(image[z])
    return [png(grey_slice), *(png(coloured(grey_slice, each[z])) for each in labels)]
