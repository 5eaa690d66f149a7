"""Derive the MACL plan from nnU-Net's plan: stages, scale, patch, batch, threshold and memory, each with its reason.

The plan is derived again at every start, unless the user edited it. An edited plan is used unchanged.
"""
