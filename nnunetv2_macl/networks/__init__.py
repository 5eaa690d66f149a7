"""Segmentation networks that dynamic-network-architectures cannot express. A nnU-Net plan names their classes."""
