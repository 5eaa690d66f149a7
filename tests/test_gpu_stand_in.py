"""On a stand-in for a GPU, a step of every recipe has all tensors on the device, waits once and takes the planned memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnunetv2_macl.files import resource_folder

HERE = Path(__file__).parent / "gpu_stand_in"
RECIPES = sorted(file.stem for file in resource_folder("plans").glob("*.json"))


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    header = Path(torch.__file__).parents[1] / "nvidia" / "nccl" / "include" / "nccl.h"
    if sys.platform != "linux" or shutil.which("g++") is None or not header.is_file():
        pytest.skip("the stand-in needs Linux, g++ and torch with NVIDIA's libraries from PyPI")
    command = [sys.executable, str(HERE / "build.py"), str(tmp_path_factory.mktemp("stand_in"))]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, f"The stand-in does not build with torch {torch.__version__}: {built.stderr[-3000:]}"
    return built.stdout.strip()


def run(library, shape, recipes):
    # no expandable segments, because the stand-in lacks their functions
    settings = {"LD_PRELOAD": library, "STAND_IN": library, "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:1024"}
    settings["LD_LIBRARY_PATH"] = str(Path(library).parent)
    command = [sys.executable, str(HERE / "step.py"), shape, *recipes]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return {row["recipe"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize(
    "shape, recipes",
    [
        ("2D, 64x64", RECIPES),
        pytest.param("3D", ["restore", "macl", "macl_0.1", "table6_ema_encoder_one_stage"], marks=pytest.mark.slow),
    ],
    ids=["2D", "3D"],
)
def test_a_step_waits_once_and_takes_the_planned_memory(stand_in, shape, recipes):
    rows = run(stand_in, shape, recipes)
    assert set(rows) == set(recipes)
    for name, row in rows.items():
        assert len(row["waits"]) <= 2, f"{name} waits for {row['waits']}"
        assert row["allocated"] <= row["planned"] * 1.02 + 0.01, f"{name}: {row}"
