"""The tasks of a pre-training run besides training. Each task is one callback; `base.Callback` is their interface."""
