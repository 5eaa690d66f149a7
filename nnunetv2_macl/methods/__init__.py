"""Pre-training methods, one file each. `base.py` says what a method is."""
