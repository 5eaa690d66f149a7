"""Views of a patch: random spatial and intensity changes, crops, masks and downsampling.

Random numbers are drawn on the CPU from a given generator, and then applied on the device of the patches.

Source: MACL section III (invariance group, variance group, down).
"""

from nnunetv2_macl.losses import downsample
from nnunetv2_macl.views.affine import RandomAffine, resample
from nnunetv2_macl.views.crops import Crops, RandomCrops
from nnunetv2_macl.views.intensity import IntensityNumbers, RandomIntensity
from nnunetv2_macl.views.masking import enlarge_mask, mask_block_sizes, sample_mask, standardise

__all__ = [
    "Crops",
    "IntensityNumbers",
    "RandomAffine",
    "RandomCrops",
    "RandomIntensity",
    "downsample",
    "enlarge_mask",
    "mask_block_sizes",
    "resample",
    "sample_mask",
    "standardise",
]
