"""Generated data sets that nnU-Net plans and preprocesses once per session."""

import contextlib
import hashlib
import locale
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# few processes, because test machines have few cores
os.environ.setdefault("nnUNet_n_proc_DA", "1")
os.environ.setdefault("nnUNet_def_n_proc", "1")
# Two pytest processes share the cores, and small tensors are faster in one thread. Waiting threads must not occupy the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# this environment's commands come first, because the environment may not be activated
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

import torch

from nnunetv2_macl.files import resource_folder
from nnunetv2_macl.nnunet import FOLDER_VARIABLES, DatasetConfiguration
from nnunetv2_macl.synthetic import generate_dataset

DATASET = "Dataset901_Generated"
# For nnU-Net's commands on tiny data: each process that they start imports torch, which takes longer than its work.
FEW_PROCESSES = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}


def environment_without_nnunet() -> dict[str, str]:
    """Return the environment without nnU-Net's variables, with the import path of this process."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")}
    return kept | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def set_folders(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Set nnU-Net's variables to its three folders in a folder."""
    for name in FOLDER_VARIABLES:
        monkeypatch.setenv(name, str(folder / name))


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within the context, the system lets this process write no file of more bytes, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of each file in a folder, by its path in the folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Return whether two state dicts have the same names and bit-identical values."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class Workspace:
    """nnU-Net's three folders, and commands run in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw, self.preprocessed, self.results = (folder / name for name in FOLDER_VARIABLES)
        for path in (self.raw, self.preprocessed, self.results):
            path.mkdir(parents=True, exist_ok=True)

    def copy(self, folder: Path) -> "Workspace":
        """Return a workspace in another folder with a copy of all files."""
        shutil.copytree(self.folder, folder)
        return Workspace(folder)

    @property
    def environment(self) -> dict[str, str]:
        folders = {name: str(self.folder / name) for name in FOLDER_VARIABLES}
        return dict(os.environ) | folders | {"nnUNet_extTrainer": str(resource_folder("trainers"))}

    def run(self, *command: str, code: int = 0, timeout: float = 600, **environment: str) -> str:
        """Run a command and return its output. Fail unless it exits with ``code``."""
        process = subprocess.run(
            [str(part) for part in command],
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",  # nnU-Net prints progress bars in UTF-8 in any locale
            errors="replace",
            timeout=timeout,
        )
        assert process.returncode == code, f"{command} exited with {process.returncode}:\n{process.stdout[-6000:]}"
        return process.stdout

    def pretrain(self, *arguments: str, code: int = 0, epochs: int = 1, steps: int = 2, **environment: str) -> str:
        short = ("-num_epochs", epochs, "-num_iterations_per_epoch", steps, "-batch_size", 4) if epochs else ()
        command = ("nnUNetv2_train_macl_pretrain", *arguments, "-device", "cpu", "-np", "1", *short)
        return self.run(*command, code=code, **environment)

    def run_folder(self, trainer: str, plans: str = "nnUNetPlans", configuration: str = "2d", fold="all") -> Path:
        return self.results / DATASET / f"{trainer}__{plans}__{configuration}" / f"fold_{fold}"


@pytest.fixture(autouse=True)
def restored_locale():
    """Restore the locale, because the reader of DICOM files sets it to C, in which files are read as ASCII."""
    before = locale.setlocale(locale.LC_CTYPE)
    yield
    locale.setlocale(locale.LC_CTYPE, before)


def plan_dataset(space: Workspace) -> None:
    """Generate a data set, and plan and preprocess it in 2D with nnU-Net."""
    generate_dataset(space.raw / DATASET, labelled=5, unlabelled=4, test=1, shape=(8, 40, 48))
    space.run("nnUNetv2_plan_and_preprocess", "-d", "901", "-c", "2d", "-npfp", "1", "-np", "1")
    # preprocess the unlabelled images here, so that the tests do not repeat it
    space.pretrain("901", "-c", "2d", "--disable_checkpointing")
    shutil.rmtree(space.results)
    space.results.mkdir()
    plan_file = next(space.preprocessed.glob("*/*_macl_2d.json"))
    plan_file.unlink()


@pytest.fixture(scope="session")
def planned(tmp_path_factory):
    """Return a generated data set after nnU-Net's preprocessing. Tests must not write into it, see ``workspace``."""
    space = Workspace(tmp_path_factory.mktemp("planned"))
    plan_dataset(space)
    return space


@pytest.fixture
def workspace(planned, tmp_path, monkeypatch):
    """Return a copy of ``planned`` for one test, and set nnU-Net's variables."""
    set_folders(monkeypatch, tmp_path / "nnunet")
    return planned.copy(tmp_path / "nnunet")


@pytest.fixture
def target(workspace):
    """Return nnU-Net's 2D configuration of the data set in ``workspace``."""
    return DatasetConfiguration.load("901", "nnUNetPlans", "2d")
