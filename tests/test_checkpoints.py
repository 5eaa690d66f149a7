"""Checkpoints are written completely or not at all, and loading one runs no code from the file."""

import os
import pickle
import tarfile
import zipfile

import pytest
import torch

from nnunetv2_macl import checkpoints
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import atomic_write


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "checkpoint.pth"
    checkpoints.save({"value": 1}, file)

    def broken(stream):
        stream.write(b"half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        atomic_write(file, broken)
    assert checkpoints.load(file) == {"value": 1}
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_reported(tmp_path):
    def full(stream):
        with open("/dev/full", "wb") as device:
            device.write(b"x" * 100_000)

    with pytest.raises(UserError, match=r"a\.pth could not be written: the disk is full \([\d,]+ bytes free\)"):
        atomic_write(tmp_path / "a.pth", full)


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


def test_the_former_tar_format_is_refused_before_torch_reads_it(tmp_path):
    with tarfile.open(tmp_path / "a.pth", "w") as tar:
        tar.addfile(tarfile.TarInfo("pickle"))
    with pytest.raises(UserError, match=r"a\.pth cannot be loaded: it has torch's former tar format"):
        checkpoints.load(tmp_path / "a.pth")


def test_compressed_parts_that_would_fill_the_memory_are_refused(tmp_path):
    checkpoints.save({"a": torch.zeros(2**20)}, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as good,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as bad,
    ):
        for name in good.namelist():
            bad.writestr(name, good.read(name))
    assert checkpoints.load(tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"data/0 in it is compressed, and would become 4,194,304 bytes"):
        checkpoints.load(tmp_path / "b.pth")


def test_an_object_in_a_file_of_the_old_format_is_named(tmp_path):
    torch.save({"a": print}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"namely \S*print\.") as error:
        checkpoints.load(tmp_path / "a.pth")
    assert "pip install" not in str(error.value)


def test_what_an_old_torch_cannot_load_is_not_called_damaged(tmp_path, monkeypatch):
    """Before PyTorch 2.6, numpy's numbers cannot be allowed."""
    monkeypatch.setattr(checkpoints, "_is_recent_torch", lambda: False)
    error = pickle.UnpicklingError("WeightsUnpickler error: Unsupported global: GLOBAL numpy.core.multiarray.scalar")
    reason = checkpoints._why_not(tmp_path / "a.pth", error)
    assert (
        f"PyTorch {torch.__version__}" in reason and "pip install --upgrade torch" in reason and "damaged" not in reason
    )


@pytest.mark.filterwarnings("ignore")  # torch's, about TorchScript
def test_a_program_is_not_called_damaged(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Conv2d(1, 1, 1)), tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt cannot be loaded: it is a program") as error:
        checkpoints.load(tmp_path / "model.pt")
    assert "damaged" not in str(error.value) and "weights_only" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"<html>404</html>", pickle.dumps({"a": 1}, 4), None])
def test_damaged_files_are_named(tmp_path, content):
    file = tmp_path / "macl_encoder.pth"
    if content is None:
        torch.save({"a": torch.zeros(1000)}, file)
        content = file.read_bytes()[:-200]
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"macl_encoder\.pth cannot be loaded") as error:
        checkpoints.load_weights(file)
    assert "weights_only" not in str(error.value)  # torch's advice to run code from the file


def test_files_without_usable_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        checkpoints.load_weights(tmp_path / "nowhere")
    torch.save({"kind": "something"}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth holds no weights.* holds kind"):
        checkpoints.load_weights(tmp_path / "a.pth")
    torch.save({"kind": "macl_encoder", "format_version": 99}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="format version 99"):
        checkpoints.load_weights(tmp_path / "b.pth")


def test_missing_files_are_not_called_damaged(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for file in (tmp_path / "nowhere.pth", tmp_path / "file" / "a.pth"):
        with pytest.raises(UserError, match=rf"{file.name} does not exist"):
            checkpoints.load(file)
    with pytest.raises(UserError, match=r"cannot be read: Is a directory"):
        checkpoints.load(tmp_path)
    (tmp_path / "macl_encoder.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"no macl_decoder\.pth in .*Give .*macl_encoder\.pth to use the encoder alone"):
        checkpoints.load_weights(tmp_path)


def test_the_first_difference_is_named():
    ours = {"a": 1, "arch": {"features": [32, 64], "norm": "x"}}
    assert checkpoints.first_difference(ours, ours) is None
    theirs = {"a": 1, "arch": {"features": [32, 128], "norm": "y"}}
    assert checkpoints.first_difference(theirs, ours) == "arch.features is [32, 128] there and [32, 64] here"


def test_the_whole_network_of_a_cascade_keeps_untrained_inputs(tmp_path):
    """The first convolution also takes the first stage's segmentation, which pre-training does not have."""
    image, segmentation = torch.randn(4, 1, 3, 3), torch.randn(4, 3, 3, 3)
    trained = {"encoder.stem.weight": image, "encoder.stem.bias": torch.randn(4)}
    fresh = {"encoder.stem.weight": segmentation, "encoder.stem.bias": torch.zeros(4), "decoder.seg": torch.ones(2)}
    fresh["decoder.encoder.stem.weight"] = segmentation
    description = {"architecture": {"input_channels": 1}, "configuration": "3d_cascade_fullres"}
    checkpoints.export_weights(tmp_path, encoder=trained, decoder={}, unet_weights=fresh, description=description)
    whole = checkpoints.load(tmp_path / "macl_network.pth")["network_weights"]
    for key in ("encoder.stem.weight", "decoder.encoder.stem.weight"):
        assert torch.equal(whole[key][:, :1], image) and torch.equal(whole[key][:, 1:], segmentation[:, 1:])
    assert torch.equal(whole["encoder.stem.bias"], trained["encoder.stem.bias"])
    again = checkpoints.load_weights(tmp_path / "macl_network.pth").weights
    assert again.keys() == trained.keys() and all(torch.equal(again[key], trained[key]) for key in trained)


@pytest.mark.parametrize("lacking", ["trained_keys", "network_weights", "architecture"])
def test_a_missing_key_is_named(tmp_path, lacking):
    content = {
        "format_version": 1,
        "kind": "macl_encoder",
        "trained_keys": [],
        "network_weights": {},
        "architecture": {},
    }
    del content[lacking]
    checkpoints.save(content, tmp_path / "macl_encoder.pth")
    with pytest.raises(UserError, match=rf"macl_encoder\.pth is damaged: .*{lacking}"):
        checkpoints.load_weights(tmp_path / "macl_encoder.pth")


@pytest.mark.parametrize(
    "value, words", [(torch.tensor([1.0, torch.nan]), "holds NaN or infinite values, in a"), ("x", "a is a str, not a")]
)
def test_weights_that_are_no_numbers_are_refused(tmp_path, value, words):
    content = {"format_version": 1, "kind": "macl_encoder", "trained_keys": ["a"], "architecture": {}}
    checkpoints.save(content | {"network_weights": {"a": value}}, tmp_path / "macl_encoder.pth")
    with pytest.raises(UserError, match=rf"macl_encoder\.pth .*{words}"):
        checkpoints.load_weights(tmp_path / "macl_encoder.pth")
