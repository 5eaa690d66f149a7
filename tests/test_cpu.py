"""The number of cores that a process may use."""

import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_a_process_bound_to_one_core_uses_one():
    script = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from nnunetv2_macl.training.launch import prepare_process; prepare_process('cpu'); "
        "import torch; from nnunetv2_macl.cpu import usable_cores; print(usable_cores(), torch.get_num_threads())"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split()[-2:] == ["1", "1"]


def test_the_variable_of_the_threads_is_respected():
    script = (
        "from nnunetv2_macl.training.launch import prepare_process; prepare_process('cpu'); "
        "import torch; print(torch.get_num_threads())"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split()[-1] == "1"
