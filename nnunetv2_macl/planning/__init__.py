"""nnU-Net plan -> MACL plan: where the branches meet, scale, patch, batch, threshold, memory; each with its reason.

The plan is derived anew at every start, unless the user edited it: then it is used as it stands.
"""
