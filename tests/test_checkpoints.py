"""Files: whole or not at all, and nothing in them is run."""

import os
import pickle

import pytest
import torch

from nnunetv2_macl import checkpoints
from nnunetv2_macl.errors import UserError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "checkpoint.pth"
    checkpoints.save({"value": 1}, file)

    def broken(stream):
        stream.write(b"half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        checkpoints.write_whole(file, broken)
    assert checkpoints.load(file) == {"value": 1}
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_named(tmp_path):
    def full(stream):
        with open("/dev/full", "wb") as device:
            device.write(b"x" * 100_000)

    with pytest.raises(UserError, match=r"a\.pth could not be written: the disk is full \([\d,]+ bytes free\)"):
        checkpoints.write_whole(tmp_path / "a.pth", full)


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["MACL_TEST_PAYLOAD"],)


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    payload = tmp_path / "payload_ran"
    monkeypatch.setenv("MACL_TEST_PAYLOAD", str(payload))
    for name, write in (("zip", torch.save), ("pickle", lambda x, f: f.write_bytes(pickle.dumps(x)))):
        file = tmp_path / f"{name}.pth"
        write({"network_weights": Hostile()}, file)
        with pytest.raises(UserError, match=f"{name}.pth cannot be loaded"):
            checkpoints.load(file)
    assert not payload.exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_damaged_files_are_named(tmp_path, content):
    file = tmp_path / "macl_encoder.pth"
    if content is None:
        torch.save({"a": torch.zeros(1000)}, file)
        content = file.read_bytes()[:-200]
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"macl_encoder\.pth cannot be loaded"):
        checkpoints.load_weights(file)


def test_other_weights_are_told(tmp_path):
    with pytest.raises(UserError, match="no pre-trained weights at"):
        checkpoints.load_weights(tmp_path / "nowhere")
    torch.save({"kind": "something"}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="no weights of MACL"):
        checkpoints.load_weights(tmp_path / "a.pth")
    torch.save({"kind": "macl_encoder", "format_version": 99}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="format version 99"):
        checkpoints.load_weights(tmp_path / "b.pth")


def test_first_difference_is_named():
    ours = {"a": 1, "arch": {"features": [32, 64], "norm": "x"}}
    assert checkpoints.first_difference(ours, ours) is None
    theirs = {"a": 1, "arch": {"features": [32, 128], "norm": "y"}}
    assert checkpoints.first_difference(theirs, ours) == "arch.features is [32, 128] there and [32, 64] here"
