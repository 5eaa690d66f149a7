"""The public names can be imported without nnU-Net's folders, and the import loads no large module."""

import subprocess
import sys

import pytest
from conftest import environment_without_nnunet

import nnunetv2_macl


def run(code):
    """Run code in another process without nnU-Net's variables, and return its output."""
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment_without_nnunet(), capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_importing_the_package_loads_nothing_heavy_and_prints_nothing():
    out = run("import nnunetv2_macl, sys; print([m for m in ('torch', 'nnunetv2', 'matplotlib') if m in sys.modules])")
    assert out == "[]\n"


def test_the_method_is_imported_without_nnunet():
    names = "PretrainingModel, pretrainable, PositionalContrastiveLoss, RandomAffine, MultiLevelContrastiveLoss"
    assert run(f"from nnunetv2_macl import {names}; import sys; print('nnunetv2' in sys.modules)") == "False\n"


def test_every_public_name_can_be_imported():
    for name in nnunetv2_macl._FOUND_IN:
        assert getattr(nnunetv2_macl, name).__name__ == name
        assert name in dir(nnunetv2_macl)
    with pytest.raises(AttributeError, match="no attribute 'MACLLoss'"):
        _ = nnunetv2_macl.MACLLoss
