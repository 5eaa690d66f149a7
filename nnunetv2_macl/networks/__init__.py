"""Adapters of segmentation networks for pre-training, and segmentation networks that an nnU-Net plan can name."""

# The names of the networks that nnUNetv2_macl_network plans.
NAMES = (
    "attention_unet", "uctransnet", "rolling_unet", "ukan", "primus", "primus_v2", "primus_v3", "swin_unetr", "unetr", "paper",
)  # fmt: skip
