"""The pre-training methods, one file each. `base.py` defines what a method is."""
