"""Sharing of weights: write them to one file, install them where fine-tuning finds them, and inspect them.

A package is a ZIP file without folders. It holds the weights, the MACL plan, nnU-Net's fingerprint, a model card, and the
SHA-256 checksum of each file in the format of ``sha256sum -c``. It holds no image, no name of a case, and no path.
"""
