"""Adapters of segmentation networks for pre-training, and segmentation networks that an nnU-Net plan can name."""
