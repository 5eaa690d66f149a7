"""Collect the images of a folder tree, DICOM series and NIfTI files, as unlabelled images of an nnU-Net raw data set."""
