"""Semi-supervised training: nnU-Net's own training that also learns from unlabelled images."""
