"""The losses of all methods, and reference values for reading their curves.

The losses depend only on embeddings and positions, and not on nnU-Net, paths, ranks or loggers.

Source: Zeng et al., "Multi-level Asymmetric Contrastive Learning for Medical Image Segmentation Pre-training", IEEE JBHI
2026, https://arxiv.org/abs/2309.11876. Positives by position: Zeng et al., "Positional Contrastive Learning for
Volumetric Medical Image Segmentation", MICCAI 2021, https://arxiv.org/abs/2106.09157.
"""

from nnunetv2_macl.losses.clustering import sinkhorn, swapped_prediction
from nnunetv2_macl.losses.contrastive import (
    DenseContrastiveLoss,
    LocationContrastiveLoss,
    PositionalContrastiveLoss,
    contrast,
    positive_mask,
    positive_weights,
)
from nnunetv2_macl.losses.distillation import DistillationLoss
from nnunetv2_macl.losses.equivariance import EquivarianceLoss
from nnunetv2_macl.losses.fused import MAX_SIMILARITIES, similarities_on_meta
from nnunetv2_macl.losses.interpolation import LINEAR_MODE, downsample
from nnunetv2_macl.losses.multi_level import MultiLevelContrastiveLoss
from nnunetv2_macl.losses.pairs import negative_cosine, queue_contrast
from nnunetv2_macl.losses.partitions import PartitionContrastiveLoss, partition_masks, region_contrast
from nnunetv2_macl.losses.precision import at_least_float32, autocast_disabled
from nnunetv2_macl.losses.references import ReferenceValues, reference_values

__all__ = [
    "LINEAR_MODE",
    "MAX_SIMILARITIES",
    "DenseContrastiveLoss",
    "DistillationLoss",
    "EquivarianceLoss",
    "LocationContrastiveLoss",
    "MultiLevelContrastiveLoss",
    "PartitionContrastiveLoss",
    "PositionalContrastiveLoss",
    "ReferenceValues",
    "at_least_float32",
    "autocast_disabled",
    "contrast",
    "downsample",
    "negative_cosine",
    "partition_masks",
    "positive_mask",
    "positive_weights",
    "queue_contrast",
    "reference_values",
    "region_contrast",
    "similarities_on_meta",
    "sinkhorn",
    "swapped_prediction",
]
