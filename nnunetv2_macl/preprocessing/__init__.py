"""Preprocessing of unlabelled images with nnU-Net's preprocessor and the plan of the data set to fine-tune on."""
