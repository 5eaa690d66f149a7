"""Segmentation networks: adapters for pre-training, and classes of our own, which an nnU-Net plan names."""
