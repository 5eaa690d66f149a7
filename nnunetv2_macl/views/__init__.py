"""What may be done to a patch before a network sees it: random spatial and intensity views, masks, downsampling.

Random numbers are drawn once, from a generator that is passed, and then applied. Applying runs on the device of the patches.

Source: MACL section III (invariance group, variance group, down).
"""

from nnunetv2_macl.losses import down
from nnunetv2_macl.views.affine import SpatialViews
from nnunetv2_macl.views.intensity import IntensityNumbers, IntensityViews
from nnunetv2_macl.views.masking import draw_mask, enlarge_mask, hidden_blocks, standardise

__all__ = [
    "IntensityNumbers",
    "IntensityViews",
    "SpatialViews",
    "down",
    "draw_mask",
    "enlarge_mask",
    "hidden_blocks",
    "standardise",
]
