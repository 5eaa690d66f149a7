"""MACL pre-training on unlabelled images for nnU-Net v2."""

__version__ = "0.1.0"
