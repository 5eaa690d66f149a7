"""A user's own network and method: the adapter in the documentation, and entry points of installed packages."""

import importlib
import re
import sys

import pytest
import torch
from contract_tools import PATCHES
from steps import recipe_of
from test_docs import ROOT

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.methods.base import Geometry
from nnunetv2_macl.methods.model import PretrainingModel
from nnunetv2_macl.methods.registry import all_methods, methods_of
from nnunetv2_macl.networks.base import check_adapter
from nnunetv2_macl.networks.registry import family_of, import_network, pretrainable
from nnunetv2_macl.planning.network import plan_network

PAGE = (ROOT / "docs" / "how_to" / "own_network.md").read_text(encoding="utf-8")


def file_of_the_page(language):
    (content,) = re.findall(rf"<<'{language}'\n(.*?)^{language}$", PAGE, flags=re.M | re.S)
    return content


@pytest.fixture
def lab_net(tmp_path, monkeypatch):
    """Return the module of the documentation, imported from PYTHONPATH."""
    (tmp_path / "lab_net.py").write_text(file_of_the_page("PYTHON"))
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("lab_net")
    del sys.modules["lab_net"]


def announce(folder, monkeypatch, group, value):
    """Make Python find the metadata of a package with an entry point."""
    metadata = folder / "lab-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: lab\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\nlab = {value}\n")
    monkeypatch.syspath_prepend(folder)


def network(module):
    return module.LabNet(2, 3, channels=[4, 8, 12], strides=[[1, 1], [2, 2], [2, 2]], deep_supervision=True)


def test_the_adapter_of_the_page_is_short_and_correct(lab_net):
    adapter = re.search(r"^class LabNetAdapter.*", file_of_the_page("PYTHON"), flags=re.M | re.S)[0]
    assert len(adapter.splitlines()) <= 30
    assert family_of("lab_net.LabNet") is family_of(lab_net.LabNet) is lab_net.LabNetAdapter
    check_adapter(lab_net.LabNetAdapter, network(lab_net))
    trained = pretrainable(network(lab_net), 1)
    geometry = Geometry(1, 3, [1, 1], [16, 16])
    model = PretrainingModel(trained, geometry, recipe_of(method="restoration", decoder_stages=1))
    (method,) = model
    views = {"masked": torch.randn(PATCHES, 2, 16, 16), "target": torch.randn(PATCHES, 2, 16, 16)}
    views["mask"] = torch.ones(PATCHES, 1, 16, 16, dtype=torch.bool)
    method.losses(method.encode(views), torch.zeros(PATCHES, 3), None)["total"].mean().backward()
    encoder, decoder = trained.trained_weights()
    assert encoder and decoder and all(p.grad is not None for p in trained.parameters())


def test_an_adapter_that_computes_something_else_is_rejected(lab_net, monkeypatch):
    monkeypatch.setattr(lab_net.LabNetAdapter, "decode", lambda self, maps, stages=None: [maps[-1], maps[-2], maps[0]])
    with pytest.raises(UserError, match=r"LabNetAdapter .*LabNet .*lab_net"):
        pretrainable(network(lab_net), 1)


def test_the_network_of_the_page_can_be_planned(workspace, lab_net, tmp_path):
    file = tmp_path / "lab_net.json"
    file.write_text(file_of_the_page("JSON"))
    assert plan_network("901", str(file)).stem == "nnUNetPlans_lab_net"


def test_an_entry_point_provides_an_adapter(lab_net, tmp_path, monkeypatch):
    folder = tmp_path / "installed"
    folder.mkdir()
    source = "from lab_net import LabNet, LabNetAdapter\n\n\nclass Other(LabNet):\n    pass\n\n\n"
    (folder / "other_net.py").write_text("from lab_net import LabNet\n\n\nclass Other(LabNet):\n    pass\n")
    source = "import lab_net\nimport other_net\n\n\nclass OtherAdapter(lab_net.LabNetAdapter):\n    adapts = (other_net.Other,)\n"
    (folder / "other_adapter.py").write_text(source)
    announce(folder, monkeypatch, "nnunetv2_macl.networks", "other_adapter")
    assert family_of("other_net.Other").__name__ == "OtherAdapter"
    for name in ("other_net", "other_adapter"):
        del sys.modules[name]


def test_an_entry_point_provides_a_method(tmp_path, monkeypatch):
    (tmp_path / "lab_method.py").write_text(
        "from nnunetv2_macl.methods.simclr import SimCLR\n\n\nclass Mine(SimCLR):\n    name = 'mine'\n"
    )
    announce(tmp_path, monkeypatch, "nnunetv2_macl.methods", "lab_method:Mine")
    all_methods.cache_clear()
    assert [method.__name__ for method in methods_of("mine")] == ["Mine"]
    all_methods.cache_clear()


def test_errors_in_other_modules_are_reported_with_their_names(tmp_path, monkeypatch):
    (tmp_path / "broken_net.py").write_text("1 / 0\n")
    announce(tmp_path, monkeypatch, "nnunetv2_macl.networks", "broken_net")
    with pytest.raises(UserError, match=r"lab .*broken_net .*nnunetv2_macl\.networks.* division by zero"):
        family_of("nowhere.Network")
    with pytest.raises(UserError, match=r"broken_net .*division by zero"):
        import_network("broken_net.Network")
    with pytest.raises(UserError, match=r"nowhere .*PYTHONPATH"):
        import_network("nowhere.Network")
