"""Unlabelled images -> preprocessed cases, with nnU-Net's own preprocessor and DATASET's plan."""
