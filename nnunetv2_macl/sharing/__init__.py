"""Weights for others: written to one file, installed where fine-tuning finds them, looked into.

A package is a ZIP file of a few files that all lie at its top: the weights, the MACL plan, nnU-Net's fingerprint, a model card,
and the SHA-256 checksum of each, as ``sha256sum -c`` reads them. Nothing of a patient is in it, and no path.
"""
