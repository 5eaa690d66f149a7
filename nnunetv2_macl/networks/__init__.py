"""Segmentation networks: adapters for pre-training, and classes of our own, which a nnU-Net plan names."""
